"""The units, and systemd's notification protocol over a real socket."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import asyncpg
import httpx
import pytest
from starlette.applications import Starlette

from sequencerd import daemon as composition
from sequencerd.cli import install_service, main
from sequencerd.errors import SettingsError
from sequencerd.service.http_server import serving
from sequencerd.service.logs import make_log
from sequencerd.service.systemd import notify
from sequencerd.settings import LogSettings, Settings
from tests.helpers.engines import define, enroll, stuck_package, until
from tests.helpers.waiting import PATIENCE, eventually
from tests.service.test_http_server import free_port

UNITS = sorted((Path(__file__).parents[2] / "systemd").glob("*.service"))


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """systemd's end of the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(PATIENCE)
        yield end


def told(manager: socket.socket, wanted: Callable[[str], bool]) -> list[str]:
    """What the daemon tells, up to the message that is wanted."""
    messages = [manager.recv(1000).decode()]
    begun = time.monotonic()
    while not wanted(messages[-1]):
        assert time.monotonic() - begun < PATIENCE, messages
        messages.append(manager.recv(1000).decode())
    return messages


def is_ready(message: str) -> bool:
    return message.startswith("READY=1")


@contextmanager
def service(
    manager: socket.socket, database: str, file: Path, folder: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A daemon as systemd starts it, which is stopped gracefully at the end."""
    variables = {
        **os.environ,
        "SEQUENCERD_CONFIG": str(file),
        "SEQUENCERD_DATABASE": database,
        "NOTIFY_SOCKET": manager.getsockname(),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "sequencerd", "run"],
        cwd=folder,
        env=variables,
        stderr=subprocess.PIPE,
        text=True,
    ) as daemon:
        try:
            yield daemon
        finally:
            daemon.send_signal(signal.SIGCONT)
            daemon.terminate()
            daemon.wait()


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    file = tmp_path / "sequencerd.toml"
    file.write_text("")
    return file


def test_the_daemon_notifies_when_it_is_ready_turns_and_stops(
    manager: socket.socket, database: str, settings: Path
) -> None:
    with service(manager, database, settings) as daemon:
        begun = told(manager, is_ready)
        assert begun[-1] == ("READY=1\nSTATUS=0 sequences, 0 active steps, 0 overdue; in flight 0")
        told(manager, lambda message: message == "WATCHDOG=1")
        daemon.send_signal(signal.SIGTERM)
        told(manager, lambda message: message == "STOPPING=1")
        assert daemon.wait() == 0


async def test_the_status_follows(
    manager: socket.socket,
    database: str,
    settings: Path,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEQUENCERD_ENGINE_SWEEP", "0.5")
    day = '{"amount": 1, "unit": "day"}'
    await define(connection, "s", ("pause", "WaitForDuration", day, None))
    await enroll(connection, "s", "u")
    with service(manager, database, settings):
        told(manager, is_ready)
        told(manager, lambda message: "1 sequence, 1 active step, 0 overdue" in message)


async def test_a_hangup_takes_over_the_settings_and_wrong_ones_change_nothing(
    manager: socket.socket, database: str, settings: Path, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("score", "Score", "{}", None))
    id_ = await enroll(connection, "s", "u")
    failed = "SELECT failure = 'invalid_step' FROM sequencer.enrollments WHERE id = $1"
    again = "SELECT status = 'active' FROM sequencer.enrollments WHERE id = $1"
    runner = '[runners.Score]\nurl = "http://127.0.0.1:9/"\n'

    with service(manager, database, settings) as daemon:

        def reload(text: str) -> str:
            settings.write_text(text)
            daemon.send_signal(signal.SIGHUP)
            reloading = told(manager, lambda message: message.startswith("RELOADING=1\n"))[-1]
            told(manager, lambda message: message == "READY=1")
            return reloading

        told(manager, is_ready)
        await until(connection, failed, id_)
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        text = reload(runner + "[engine]\nbatch = 7\n[log]\nlevel = 'debug'\n")
        at = int(text.removeprefix("RELOADING=1\nMONOTONIC_USEC="))
        assert before <= at <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        await until(connection, again, id_)
        reload("[runners.Score]\nurll = 'x'\n")
        daemon.terminate()
        _, log = daemon.communicate()
    assert daemon.returncode == 0
    assert '"settings": ["engine.batch"], "event": "changed settings require a restart"' in log
    assert "settings reloaded" in log
    assert "invalid settings, the old ones remain" in log
    assert "did you mean 'url'" in log
    assert await connection.fetchval(again, id_)


async def test_a_loop_that_is_stuck_feeds_no_watchdog(
    manager: socket.socket,
    settings: Path,
    connection: asyncpg.Connection,
    database: str,
) -> None:
    """With a runner that blocks the event loop, as no async function should."""
    folder = settings.parent
    site = stuck_package(folder)
    go = folder / "go"
    await define(connection, "s", ("x", "Stuck", f'{{"go": "{go}"}}', None))
    await enroll(connection, "s", "u")
    with service(manager, database, settings, site):
        await eventually((folder / "go.begun").exists)
        manager.settimeout(1)
        drain(manager)
        await asyncio.sleep(3)
        assert drain(manager) == []
        go.touch()
        manager.settimeout(PATIENCE)
        told(manager, lambda message: message == "WATCHDOG=1")


def drain(manager: socket.socket) -> list[str]:
    """The notifications that were not read yet."""
    found = []
    try:
        while True:
            found.append(manager.recv(1000).decode())
    except TimeoutError:
        return found


def fill(manager: socket.socket) -> int:
    """Send until systemd's socket has no room, and return how many messages it has."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(manager.getsockname())
        for number in itertools.count():
            try:
                sock.send(b"full")
            except BlockingIOError:
                return number
    raise AssertionError


def test_a_full_socket_holds_nothing_up_and_loses_no_state(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    number = fill(manager)
    for state in ("READY=1", "WATCHDOG=1", "STATUS=one", "STATUS=two", "WATCHDOG=1"):
        notify(state)  # would wait for ever
    for _ in range(number):
        assert manager.recv(1000) == b"full"
    notify("WATCHDOG=1")
    received = [manager.recv(1000).decode() for _ in range(3)]
    assert received == ["READY=1", "STATUS=two", "WATCHDOG=1"]
    notify("STATUS=three")
    assert manager.recv(1000) == b"STATUS=three"
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(1000)


def test_a_daemon_becomes_ready_although_the_socket_was_full(
    manager: socket.socket, database: str, settings: Path
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    settings.write_text(f'[http]\nlisten = "{listen}"\n')
    number = fill(manager)
    with service(manager, database, settings) as daemon:
        begun = time.monotonic()
        while not is_ready_at(listen):
            assert time.monotonic() - begun < PATIENCE
            assert daemon.poll() is None
        for _ in range(number):
            manager.recv(1000)
        told(manager, is_ready)
        told(manager, lambda message: message == "WATCHDOG=1")


def is_ready_at(listen: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://{listen}/readyz").is_success
    return False


def test_without_systemd_nothing_is_notified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    notify("READY=1")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_unit_is_right_and_hardened(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name.replace("@", "@1")
    copy.write_text(unit.read_text().replace("/opt/sequencerd/bin/sequencerd", sys.executable))
    verified = analyze("verify", str(copy))
    assert "Unknown" not in verified
    assert verified.strip() == ""
    exposure = analyze("security", "--offline=true", "--threshold=20", str(copy))
    assert "Overall exposure level" in exposure


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_every_directive_has_a_comment(unit: Path) -> None:
    lines = unit.read_text().splitlines()
    commented = [
        line
        for line, above in zip(lines[1:], lines, strict=False)
        if "=" in line and line[0] != "#" and not above.startswith("#")
    ]
    assert [line.partition("=")[0] for line in commented] == ["Description"]


def test_the_units_differ_by_the_instance_alone() -> None:
    one, several = (
        unit.read_text().splitlines() for unit in sorted(UNITS, key=lambda u: "@" in u.name)
    )
    assert [line for line in several if "%i" not in line and "sequencerd@1" not in line] == [
        line for line in one if not line.startswith("Description=")
    ]


def test_the_service_is_installed_with_the_right_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(file), "install-service", "--user", "ada", "--to", str(tmp_path)])
    assert ended.value.code == 0
    assert "systemctl daemon-reload" in capsys.readouterr().out
    for name in ("sequencerd.service", "sequencerd@.service"):
        text = (tmp_path / name).read_text()
        assert f"\nExecStart={install_service.program()} --config {file} run\n" in text
        assert "\nUser=ada\n" in text
        assert "DynamicUser" not in text
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644
    start = install_service.program().split()
    assert subprocess.run([*start, "--version"], check=True, capture_output=True).stdout


def test_unreachable_installations_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_service, "_files", lambda: (Path("/home/ada/bin/sequencerd"),))
    with pytest.raises(SystemExit) as ended:
        main(["install-service", "--to", str(tmp_path / "missing")])
    assert ended.value.code == 1
    errors = capsys.readouterr().err
    assert "cannot see /home/" in errors
    assert "missing/sequencerd.service cannot be written: No such file" in errors
    assert main_prints(capsys, "install-service", "--print").count("\nDynamicUser=yes\n") == 2


def test_an_installation_that_is_closed_to_others_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after an installation with a umask of 077."""
    with tempfile.TemporaryDirectory(prefix="sequencerd-") as made:  # pytest's folder is closed
        Path(made).chmod(0o711)
        script = Path(made, "programs/venv/bin/sequencerd")
        script.parent.mkdir(parents=True)
        script.touch()
        venv = script.parents[1]
        monkeypatch.setattr("sys.prefix", str(venv))
        monkeypatch.setattr(install_service, "_files", lambda: (script,))
        monkeypatch.setattr(install_service, "_HIDDEN", ())
        assert install_service.warnings(None) == []
        for path, advice in (
            (script, f"-R go+rX {venv}"),
            (venv, f"-R go+rX {venv}"),
            (venv.parent, f"go+x {venv.parent}"),
        ):
            path.chmod(0o700)
            (warning,) = install_service.warnings(None)
            assert warning == f"the service's user cannot read {path}; run: chmod {advice}"
        assert install_service.warnings("root") == []


def main_prints(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def analyze(*arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_failed_start_is_logged_with_its_priority(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a service without a database: one line, and the status that systemd does not restart."""
    for name in ("PGHOST", "PGDATABASE", "PGPORT", "SEQUENCERD_DATABASE", "SEQUENCERD_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setattr("sequencerd.service.systemd.is_journal", lambda: True)
    with pytest.raises(SystemExit) as ended:
        main(["run"])
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("<3>")
    assert "no database is configured: set database.url in /etc/sequencerd" in line


def test_a_reload_checks_the_settings_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text("[runners.Score]\nurl = 'http://127.0.0.1:9/'\n")
    assert "valid" in main_prints(capsys, "--config", str(file), "run", "--check")
    file.write_text("[runners.Score]\nurl = 'http://127.0.0.1:9/'\nsecret = 'whsec_!'\n")
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(file), "run", "--check"])
    assert ended.value.code == 2
    for unit in UNITS:
        checks, signal_ = re.findall(r"^ExecReload=(.*)$", unit.read_text(), flags=re.MULTILINE)
        assert checks.endswith("run --check")
        assert "-HUP" in signal_
        assert "\nRestartPreventExitStatus=2\n" in unit.read_text()


async def test_a_daemon_on_a_standby_waits_for_the_promotion(
    manager: socket.socket,
    connection: asyncpg.Connection,
    settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = iter([True, True, False])

    async def is_standby(_: asyncpg.Connection) -> bool:
        return next(answers)

    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setattr("sequencerd.storage.server.is_standby", is_standby)
    monkeypatch.setattr(composition, "PROMOTION_INTERVAL", 0.01)
    log = make_log(Settings(log=LogSettings(format="json")))
    await composition._wait_for_promotion(connection, log)
    assert capsys.readouterr().err.count("waiting for its promotion") == 1
    assert is_ready(told(manager, is_ready)[-1])
    assert told(manager, lambda message: message == "WATCHDOG=1")


async def test_an_address_that_is_taken_is_reported_once(manager: socket.socket) -> None:
    reported: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        async with serving(Starlette(), listen, reported.append):
            assert reported == [listen]
        with pytest.raises(SettingsError, match="in use"):
            async with serving(Starlette(), listen):
                pass
