"""The unit, and systemd's notification protocol over a real socket."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sequencerd.systemd import notify

UNITS = sorted((Path(__file__).parent.parent / "systemd").glob("*.service"))


@pytest.fixture
def manager(tmp_path: Path) -> socket.socket:
    """systemd's end of the socket."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    end.bind(str(tmp_path / "notify"))
    end.settimeout(20)
    return end


def test_the_daemon_tells_when_it_is_ready_turns_and_stops(
    manager: socket.socket, database: str
) -> None:
    variables = {
        **os.environ,
        "SEQUENCERD_DATABASE": database,
        "NOTIFY_SOCKET": manager.getsockname(),
    }
    daemon = subprocess.Popen([sys.executable, "-m", "sequencerd", "run"], env=variables)
    try:
        told = [manager.recv(100).decode()]
        while told[-1] != "READY=1":
            told.append(manager.recv(100).decode())
        daemon.send_signal(signal.SIGTERM)
        while told[-1] != "STOPPING=1":
            told.append(manager.recv(100).decode())
    finally:
        daemon.terminate()
        assert daemon.wait() == 0
        manager.close()
    assert "WATCHDOG=1" in told


def test_without_systemd_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
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


def analyze(*arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
