"""Separate servers, which can be stopped, or have extensions that the embedded PostgreSQL lacks."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from os import kill
from pathlib import Path

import pytest

from sequencerd.storage.embedded import PostgresPrograms
from tests.helpers.databases import FAST_SETTINGS, cluster_data, copy_data, server_folder

INSTALLED_FOLDER = Path("/usr/lib/postgresql")
"""Where Debian's packages are."""


def programs_with(extension: str) -> PostgresPrograms:
    """The newest installed server that has an extension. Skips the test if there is none."""
    control = f"extension/{extension}.control"
    for share in sorted(Path("/usr/share/postgresql").glob(f"*/{control}"), reverse=True):
        folder = INSTALLED_FOLDER / share.parts[-3] / "bin"
        if (folder / "initdb").exists():
            return replace(PostgresPrograms.find(), bin=folder)
    pytest.skip(f"no PostgreSQL server with {extension} in {INSTALLED_FOLDER}")


@dataclass(frozen=True)
class Cluster:
    """A server on a port of its own, and the URL of its database `app`."""

    programs: PostgresPrograms
    data: Path
    url: str

    def start(self) -> None:
        self.programs.run("pg_ctl", "-D", self.data, "-l", self.data / "log", "-w", "start")

    def stop(self) -> None:
        """As a crash; a server that has stopped already is left alone."""
        self.programs.run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop", check=False)

    def crash(self) -> None:
        """Kill it and all of its processes, and start it again."""
        processes = self._processes()
        for process in processes:
            kill(process, signal.SIGKILL)
        for process in processes:
            while Path(f"/proc/{process}/stat").exists():
                time.sleep(0.01)
        self.start()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Meanwhile it takes connections, and answers nothing."""
        processes = self._processes()
        _send(signal.SIGSTOP, processes)
        try:
            yield
        finally:
            _send(signal.SIGCONT, processes)

    def _processes(self) -> list[int]:
        postmaster = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        return [postmaster, *map(int, children)]


def _send(number: signal.Signals, processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # a session that was ending
            kill(process, number)


@contextmanager
def stoppable(programs: PostgresPrograms, **settings: str) -> Iterator[Cluster]:
    """Run a server that the test can stop and start again."""
    with server_folder() as folder:
        data = folder / "data"
        if programs.user:
            shutil.chown(folder, programs.user.pw_uid, programs.user.pw_gid)
        copy_data(cluster_data(programs), data)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        places = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""}
        options = FAST_SETTINGS | {"shared_buffers": "32MB"} | places | settings
        with (data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in options.items())
        made = Cluster(programs, data, f"postgresql://postgres@127.0.0.1:{port}/app")
        made.start()
        try:
            programs.run("createdb", "-h", "127.0.0.1", "-p", port, "-U", "postgres", "app")
            yield made
        finally:
            made.stop()


@contextmanager
def cluster(programs: PostgresPrograms, **settings: str) -> Iterator[str]:
    """Run a server, and yield the URL of its database `app`."""
    with stoppable(programs, **settings) as made:
        yield made.url


@contextmanager
def citus_nodes() -> Iterator[list[Cluster]]:
    """Run three servers with the extension Citus, which know nothing of each other."""
    programs = programs_with("citus")
    settings = {
        "shared_preload_libraries": "citus",
        "synchronous_commit": "on",  # what is committed survives the kill of a server
        "wal_level": "logical",  # for moves
        "max_prepared_transactions": "100",
    }
    with ExitStack() as stack:
        yield [stack.enter_context(stoppable(programs, **settings)) for _ in range(3)]
