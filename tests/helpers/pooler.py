"""PgBouncer before a database, where it is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.helpers.databases import address
from tests.helpers.waiting import PATIENCE


@contextmanager
def pgbouncer(
    database: str, folder: Path, *, mode: str = "transaction", settings: str = ""
) -> Iterator[str]:
    """One with few connections: the URL that leads to the database."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("there is no pgbouncer")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    name = urlsplit(database).path.lstrip("/")
    host, port_of_server = address(database)
    config = folder / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n{name} = host={host} port={port_of_server} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n"
        f"pool_mode = {mode}\ndefault_pool_size = 4\n"
        f"unix_socket_dir =\n{settings}\n" + ("user = postgres\n" if os.geteuid() == 0 else "")
    )
    path = folder / "pgbouncer.log"
    with path.open("wb") as log:
        process = subprocess.Popen([program, config], stderr=log)
    try:
        end = time.monotonic() + PATIENCE
        while " process up:" not in (text := path.read_text()):
            assert process.poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.005)
        yield f"postgresql://postgres@127.0.0.1:{port}/{name}?sslmode=disable"
    finally:
        process.terminate()
        process.wait()
