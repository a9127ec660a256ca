"""Follow README.md word by word on Debian: the first mail, the service, and the service being
killed, stopped and reloaded.
"""

from __future__ import annotations

import pytest

from tests.helpers.waiting import PATIENCE
from tests.system.debian import Machine, blocks

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def service(machine: Machine) -> Machine:
    """The machine after the page's sections "Getting started" and "Run it as a service"."""
    install, start, use = blocks("README.md", "Getting started")
    (definition,) = blocks("README.md", "Getting started", "yaml")
    (sql,) = blocks("README.md", "Getting started", "sql")
    (serve,) = blocks("README.md", "Run it as a service")
    assert start.endswith("\nsequencerd run\n")
    machine(
        f"""
cd sequencerd-clone
{install}
cat > trial.yaml <<'END'
{definition}END
{start.rstrip()} &
psql --quiet "$SEQUENCERD_DATABASE" <<'END'
{sql}END
{use}
timeout {PATIENCE:.0f} bash -c \
    "until journalctl --unit=mail | grep --quiet 'Subject: Welcome, Bob'; do sleep 0.2; done"
kill %1
wait %1
{serve}
""",
        user="ada",
    )
    return machine


def state(machine: Machine) -> tuple[str, str, int]:
    """Whether it runs, its process, and how often it was started again."""
    found = machine.show("sequencerd", "ActiveState", "MainPID", "NRestarts")
    return found["ActiveState"], found["MainPID"], int(found["NRestarts"])


def test_the_readme_leads_to_a_service_that_sends_mail(service: Machine) -> None:
    active, _, restarts = state(service)
    assert (active, restarts) == ("active", 0)
    assert service("systemctl is-enabled sequencerd").strip() == "enabled"
    service.enroll("Carol")
    assert service.journal("sequencerd", "-p warning") in ("", "-- No entries --\n")


def test_the_service_restarts_after_sigkill(service: Machine) -> None:
    _, process, restarts = state(service)
    service("systemctl kill --signal=KILL --kill-who=main sequencerd")
    started_again(service, process, restarts)
    service.enroll("Dora")


def test_a_daemon_that_hangs_is_ended_by_the_watchdog(service: Machine) -> None:
    _, process, restarts = state(service)
    service("systemctl kill --signal=STOP --kill-who=main sequencerd")
    started_again(service, process, restarts)
    assert "watchdog" in service.journal("sequencerd").lower()
    service.enroll("Emma")


def started_again(machine: Machine, process: str, restarts: int) -> None:
    command = "systemctl show sequencerd -p ActiveState -p MainPID -p NRestarts"
    right = f"NRestarts={restarts + 1}"
    found = machine.until(command, lambda text: right in text and "=active\n" in text)
    assert f"MainPID={process}\n" not in found


def test_reload_takes_new_settings_without_a_restart(service: Machine) -> None:
    before = state(service)
    service("printf '[log]\\nlevel = \"debug\"\\n' > /etc/sequencerd/sequencerd.toml")
    service("systemctl reload sequencerd")
    service.sql(
        "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('trial', 'no-address')"
    )
    service.until("journalctl --unit=sequencerd", lambda log: '"enrollment failed"' in log)
    assert state(service) == before


def test_wrong_settings_fail_the_reload_and_the_old_ones_stay(service: Machine) -> None:
    before = state(service)
    service("printf '[log]\\nlevel = \"loud\"\\n' > /etc/sequencerd/sequencerd.toml")
    service("systemctl reload sequencerd", code=1)
    assert "log.level" in service.journal("sequencerd", "-p warning")
    assert state(service) == before
    service.enroll("Gwen")


def test_wrong_settings_fail_the_start_once_with_the_reason(service: Machine) -> None:
    service("systemctl stop sequencerd")
    since = service("date '+--since=\"%Y-%m-%d %H:%M:%S.%6N\"'").strip()
    service("systemctl start sequencerd", code=1)
    found = service.show("sequencerd", "ActiveState", "Result", "ExecMainStatus", "NRestarts")
    assert found == {
        "ActiveState": "failed",
        "Result": "exit-code",
        "ExecMainStatus": "2",
        "NRestarts": "0",
    }
    reasons = service.journal("sequencerd", "-p warning", since)
    assert "log.level" in reasons
    assert "Traceback" not in service.journal("sequencerd", since)
    service("rm /etc/sequencerd/sequencerd.toml; systemctl start sequencerd")
    service.enroll("Hana")


def test_stop_ends_the_service_cleanly(service: Machine) -> None:
    service("systemctl stop sequencerd")
    found = service.show("sequencerd", "ActiveState", "Result", "ExecMainStatus")
    assert found == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    leased = "SELECT count(*) FROM sequencer.enrollments WHERE leased_by IS NOT NULL"
    assert service.sql(leased) == "0"


def test_each_shard_has_a_service_of_its_own(service: Machine) -> None:
    url = "postgresql://app@localhost/app"
    lines = [f'{name} = {{url = \\"{url}\\", schema = \\"{name}\\"}}' for name in ("a", "eu-1")]
    service("rm /etc/sequencerd/sequencerd.env")
    settings = "/etc/sequencerd/sequencerd.toml"
    service(f'printf "[shards]\\n{lines[0]}\\n{lines[1]}\\n" > {settings}')
    service("/opt/sequencerd/bin/sequencerd migrate")
    service("systemctl enable --now sequencerd@a sequencerd@eu-1")
    service("systemctl reload sequencerd@eu-1")
    for name in ("a", "eu-1"):
        found = service.show(f"sequencerd@{name}", "ActiveState", "StatusText")
        assert found["ActiveState"] == "active"
        assert found["StatusText"].startswith(f"{name}: 0 sequences, ")
        daemons = f'SELECT count(*) FROM \\"{name}\\".daemons WHERE alive_until > now()'
        assert service.sql(daemons) == "1"
    service("systemctl start sequencerd@b", code=1)
    assert service.show("sequencerd@b", "ActiveState", "ExecMainStatus", "NRestarts") == {
        "ActiveState": "failed",
        "ExecMainStatus": "2",
        "NRestarts": "0",
    }
    reason = service.journal("sequencerd@b", "-p warning")
    assert "'b', which is not in the settings; available: a, eu-1" in reason
    service("systemctl disable --now sequencerd@a sequencerd@eu-1")
