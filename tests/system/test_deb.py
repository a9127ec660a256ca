"""The Debian package: built, installed, run with peer authentication, upgraded and purged."""

from __future__ import annotations

import re

import pytest

import sequencerd
from tests.system.debian import Machine, blocks

pytestmark = pytest.mark.system

HERE = "cd /home/ada/sequencerd-clone"
FILES = [
    "/usr/share/man/man1/sequencerd.1.gz",
    "/usr/share/bash-completion/completions/sequencerd",
    "/usr/share/zsh/vendor-completions/_sequencerd",
    "/usr/share/fish/vendor_completions.d/sequencerd.fish",
    "/lib/systemd/system/sequencerd.service",
    "/lib/systemd/system/sequencerd@.service",
    "/usr/share/doc/sequencerd/settings.md",
    "/usr/share/doc/sequencerd/copyright",
    "/etc/sequencerd/sequencerd.toml",
]


@pytest.fixture(scope="module")
def installed(machine: Machine) -> Machine:
    _, install = blocks("docs/install.md", "Debian and Ubuntu")
    machine(f"{HERE}\numask 077\n{install}", user="ada")
    return machine


def test_the_package_installs_its_files_and_starts_nothing(installed: Machine) -> None:
    version = installed("sequencerd --version").strip()
    assert re.fullmatch(rf"{re.escape(sequencerd.__version__)}, schema \d{{4}}_\w+", version)
    installed(f"ls {' '.join(FILES)}")
    assert ".TH" in installed("zcat /usr/share/man/man1/sequencerd.1.gz")
    licenses = "/opt/sequencerd/lib/python3*/site-packages/sequencerd-*/licenses"
    installed(f"ls {licenses}/LICENSE {licenses}/sequencerd/core/javascript/vendor/lodash.LICENSE")
    found = installed.show("sequencerd", "ActiveState", "UnitFileState")
    assert found == {"ActiveState": "inactive", "UnitFileState": "disabled"}


def test_a_service_without_a_database_names_the_setting(installed: Machine) -> None:
    installed("systemctl start sequencerd", code=1)
    reason = installed.journal("sequencerd", "-p warning")
    assert "database" in reason
    assert "Traceback" not in reason
    assert installed.show("sequencerd", "ExecMainStatus")["ExecMainStatus"] == "2"


def test_the_service_runs_as_a_dynamic_user_with_peer_authentication(installed: Machine) -> None:
    (definition,) = blocks("README.md", "Getting started", "yaml")
    owner = "--database postgresql://app@localhost/app"
    installed(f"sequencerd {owner} migrate")
    installed.sql("CREATE ROLE sequencerd LOGIN IN ROLE sequencer_daemon")
    installed(f"cat > trial.yaml <<'END'\n{definition}END\nsequencerd {owner} apply trial.yaml")
    installed("sed --in-place 's/^# url/url/' /etc/sequencerd/sequencerd.toml")
    settings = "/etc/sequencerd/sequencerd.toml"
    installed(f"printf '[email]\\nurl = \"smtp://localhost:25\"\\n' >> {settings}")
    installed("systemctl enable --now sequencerd")
    installed.enroll("Carol")
    user = installed("stat --format=%U /proc/$(systemctl show -P MainPID sequencerd)").strip()
    assert user == "sequencerd"
    sessions = "SELECT count(*) > 0 FROM pg_stat_activity WHERE usename = 'sequencerd'"
    assert installed.sql(sessions) == "t"


def test_an_upgrade_restarts_the_daemon_and_keeps_its_settings(installed: Machine) -> None:
    before = installed.show("sequencerd", "MainPID")
    installed(f"{HERE}\napt-get install --reinstall --yes ./dist/sequencerd_*.deb")
    found = installed.show("sequencerd", "MainPID", "ActiveState")
    assert found["ActiveState"] == "active"
    assert found["MainPID"] != before["MainPID"]
    installed.enroll("Dora")


def test_a_daemon_that_cannot_start_does_not_fail_an_upgrade(installed: Machine) -> None:
    """As after an upgrade with a newer schema, until `sequencerd migrate`."""
    installed.sql("INSERT INTO sequencer.migrations VALUES (9001, '9001_more.sql', 'x')")
    installed(f"{HERE}\napt-get install --reinstall --yes ./dist/sequencerd_*.deb")
    assert installed("dpkg-query --show --showformat='${db:Status-Abbrev}' sequencerd") == "ii "
    installed.sql("DELETE FROM sequencer.migrations WHERE version = 9001")
    installed.until("systemctl is-active sequencerd", lambda state: state.strip() == "active")


def test_a_purge_leaves_nothing_but_the_database(installed: Machine) -> None:
    installed("systemctl enable --now sequencerd@1")
    installed("apt-get purge --yes sequencerd")
    assert installed.show("sequencerd", "LoadState", "ActiveState") == {
        "LoadState": "not-found",
        "ActiveState": "inactive",
    }
    left = installed("find / -xdev -name '*sequencerd*' -not -path '/home/*'")
    assert left == ""
    assert installed.sql("SELECT count(*) FROM sequencer.enrollments") == "2"
