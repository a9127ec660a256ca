"""The embedded server: started, shared, stopped, and found again after a crash."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from sequencerd.storage import embedded
from sequencerd.storage.embedded import EmbeddedError, EmbeddedServer
from tests.helpers.databases import FAST_SETTINGS, initialize_server


@pytest.fixture
def folder() -> Iterator[Path]:
    # not within pytest's folder, which another user than root cannot enter
    with tempfile.TemporaryDirectory(prefix="sequencerd-") as made:
        Path(made).chmod(0o711)
        yield Path(made) / "server"


async def version(server: EmbeddedServer) -> str:
    connection = await asyncpg.connect(server.url)
    text: str = await connection.fetchval("SELECT version()")
    await connection.close()
    return text


def postmaster(server: EmbeddedServer) -> int | None:
    file = server.data / "postmaster.pid"
    return int(file.read_text().splitlines()[0]) if file.exists() else None


async def test_the_last_user_stops_the_server(folder: Path) -> None:
    initialize_server(folder)
    with embedded.running(folder, settings=FAST_SETTINGS) as first:
        assert "PostgreSQL 18" in await version(first)
        pid = postmaster(first)
        with embedded.running(folder) as second:
            assert (second.url, postmaster(second)) == (first.url, pid)
        assert "PostgreSQL" in await version(first)
    assert postmaster(first) is None


async def test_the_server_is_found_after_a_crash(folder: Path) -> None:
    initialize_server(folder)
    with embedded.running(folder, settings=FAST_SETTINGS) as server:
        pid = postmaster(server)
        assert pid
        os.kill(pid, signal.SIGKILL)
        with embedded.running(folder, settings=FAST_SETTINGS) as again:
            assert "PostgreSQL" in await version(again)
            assert postmaster(again) != pid


async def test_a_data_folder_with_a_long_path_works(folder: Path) -> None:
    long = folder / ("long" * 30)
    initialize_server(long)
    with embedded.running(long, settings=FAST_SETTINGS) as server:
        assert "PostgreSQL" in await version(server)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "not_installed")
    with pytest.raises(EmbeddedError, match=r"pip install 'sequencerd\[embedded\]'"):
        embedded.running(folder).__enter__()


def test_a_command_without_a_database_uses_one_to_which_only_its_owner_can_connect(
    folder: Path,
) -> None:
    folder.mkdir()
    variables = {**os.environ, "XDG_DATA_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "sequencerd", "status"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no sequences yet" in done.stdout
    made = folder / "sequencerd/postgresql"
    assert f"using the embedded one in {made}" in done.stderr
    for path in (made, made / "data"):
        assert path.stat().st_mode & 0o077 == 0
        assert path.stat().st_uid != 0  # root becomes another user


def test_data_are_stored_in_xdg_data_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    assert embedded.default_folder() == folder / "sequencerd/postgresql"
    monkeypatch.delenv("XDG_DATA_HOME")
    if os.geteuid() == 0:
        assert embedded.default_folder() == Path("/var/lib/sequencerd/postgresql")
    else:
        assert embedded.default_folder().is_relative_to(Path.home())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_the_user_that_runs_the_server_for_root_can_enter_its_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the package was installed, and the command runs, with a umask of 077."""
    installed = folder.with_name("installed") / embedded.PACKAGE / "pginstall18/bin"
    data = folder / "data/sequencerd/postgresql"
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
    umask = os.umask(0o077)
    try:
        installed.mkdir(parents=True)
        (installed / "initdb").touch(mode=0o700)
        copied = embedded._copy(installed)
        programs = embedded.PostgresPrograms(copied, embedded._unprivileged())
        assert not programs.can_read(installed / "initdb")
        assert programs.can_read(copied / "initdb")
        embedded._prepare(data, programs)
    finally:
        os.umask(umask)
    assert programs.can_read(data)
    assert stat.S_IMODE(data.stat().st_mode) == 0o700


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container."""

    def fail(_: str) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(embedded, "user_data_path", fail)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(EmbeddedError, match="set SEQUENCERD_DATABASE, or HOME"):
        embedded.default_folder()


def test_a_planted_socket_folder_is_left_unchanged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = folder / ("long" * 30)
    victim, shared = folder / "victim", folder / "shared"
    for made in (long, victim, shared):
        made.mkdir(parents=True)
    victim.chmod(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    programs = embedded.PostgresPrograms.find()
    made = embedded._socket_folder(long, programs)
    assert made.parent == shared
    assert embedded._socket_folder(long, programs) == made  # the next process takes it, too
    made.rmdir()
    made.symlink_to(victim)
    before = victim.stat()
    with pytest.raises(EmbeddedError, match="is not a folder that only its owner can use"):
        embedded._socket_folder(long, programs)
    after = victim.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (
        before.st_uid,
        before.st_gid,
        before.st_mode,
    )
