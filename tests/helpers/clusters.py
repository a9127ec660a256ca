"""Servers of their own, which stop, or have extensions that the embedded PostgreSQL lacks."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import kill
from pathlib import Path

import pytest

from sequencerd.storage.embedded import Programs
from tests.helpers.databases import FAST, server_folder

INSTALLED = Path("/usr/lib/postgresql")
"""Where Debian's packages are."""


def programs_with(extension: str) -> Programs:
    """The newest installed server that has an extension. Skips the test if there is none."""
    control = f"extension/{extension}.control"
    for share in sorted(Path("/usr/share/postgresql").glob(f"*/{control}"), reverse=True):
        folder = INSTALLED / share.parts[-3] / "bin"
        if (folder / "initdb").exists():
            return replace(Programs.find(), bin=folder)
    pytest.skip(f"no PostgreSQL server with {extension} in {INSTALLED}")


@dataclass(frozen=True)
class Cluster:
    """A server on a port of its own, and the URL of its database `app`."""

    programs: Programs
    data: Path
    url: str

    def start(self) -> None:
        self.programs.run("pg_ctl", "-D", self.data, "-l", self.data / "log", "-w", "start")

    def stop(self) -> None:
        """As a crash; a server that has stopped already is left alone."""
        self.programs.run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop", check=False)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Meanwhile it takes connections, and answers nothing."""
        postmaster = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        processes = [postmaster, *map(int, children)]
        for process in processes:
            kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                kill(process, signal.SIGCONT)


@contextmanager
def stoppable(programs: Programs, **settings: str) -> Iterator[Cluster]:
    """Run a server that the test can stop and start again."""
    with server_folder() as folder:
        data = folder / "data"
        if programs.user:
            shutil.chown(folder, programs.user.pw_uid, programs.user.pw_gid)
        programs.run(
            "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        places = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""}
        options = FAST | {"shared_buffers": "32MB"} | places | settings
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
def cluster(programs: Programs, **settings: str) -> Iterator[str]:
    """Run a server, and yield the URL of its database `app`."""
    with stoppable(programs, **settings) as made:
        yield made.url
