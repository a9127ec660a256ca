"""Servers of their own, with the extensions that the embedded PostgreSQL lacks."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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


@contextmanager
def cluster(programs: Programs, **settings: str) -> Iterator[str]:
    """Run a server on a port of its own, and yield the URL of its database `app`."""
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
        programs.run("pg_ctl", "-D", data, "-l", data / "log", "-w", "start")
        try:
            programs.run("createdb", "-h", "127.0.0.1", "-p", port, "-U", "postgres", "app")
            yield f"postgresql://postgres@127.0.0.1:{port}/app"
        finally:
            programs.run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop", check=False)
