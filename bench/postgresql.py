"""A PostgreSQL server for a benchmark: the machine's or the embedded one, with settings that are
named in the report, in a folder that is deleted at the end.

    python bench/postgresql.py 15 bench/scale.py --works mix

runs another benchmark on it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sequencerd.storage.embedded import PostgresPrograms

SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "8GB", "max_connections": "200"}
"""Beside these, everything is PostgreSQL's default."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its superuser's URL, the process id of its postmaster, and its version."""

    dsn: str
    process: int
    version: str


def find(wanted: str) -> Path | None:
    """Return the folder of a server's programs: of a version, a path, or None for the embedded."""
    if wanted == "embedded":
        return None
    folder = Path(f"/usr/lib/postgresql/{wanted}/bin") if wanted.isdigit() else Path(wanted)
    if not (folder / "initdb").exists():
        if f" {wanted}." in PostgresPrograms.find().run("postgres", "--version"):
            return None
        raise SystemExit(f"no PostgreSQL server in {folder}")
    return folder


@contextmanager
def running(wanted: str, more: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a server as long as the context lasts, with more settings; as an unprivileged user where
    this is root.
    """
    folder = find(wanted)
    programs = (
        PostgresPrograms.find() if folder is None else replace(PostgresPrograms.find(), bin=folder)
    )
    data = Path(tempfile.mkdtemp(prefix="sequencerd-bench-"))
    if programs.user:
        shutil.chown(data, programs.user.pw_uid, programs.user.pw_gid)
    try:
        programs.run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings = {
            **SETTINGS,
            **(more or {}),
            "port": port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": data,
        }
        with (data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        programs.run("pg_ctl", "-D", data, "-l", data / "log", "-w", "start")
        try:
            process = int((data / "postmaster.pid").read_text().split()[0])
            shown = programs.run("postgres", "--version")
            found = re.search(r"[0-9][0-9.]*", shown)
            yield Server(
                f"postgresql://postgres@127.0.0.1:{port}/postgres",
                process,
                found[0] if found else "?",
            )
        finally:
            programs.run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop", check=False)
    finally:
        shutil.rmtree(data, ignore_errors=True)


def main(wanted: str, *command: str) -> int:
    """Run a program with the URL of a server, and return its exit status."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with running(wanted) as server:
        program = [sys.executable, *command, "--dsn", server.dsn]
        return subprocess.run(program, env=environment, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: postgresql.py SERVER PROGRAM [ARGUMENT ...]")
    sys.exit(main(*sys.argv[1:]))
