"""psql on a throw-away database with the schema: `make shell`."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import asyncpg

from sequencerd.storage import embedded, migrate
from tests.conftest import FAST


def main() -> int:
    # not in the clone: root runs the server as a user who may not be able to enter it
    folder = Path(tempfile.mkdtemp(prefix="sequencerd-shell-"))
    try:
        with embedded.running(folder, settings=FAST) as server:
            asyncio.run(_migrate(server.url))
            print(f"SEQUENCERD_DATABASE='{server.url}'", file=sys.stderr)
            return subprocess.run([server.psql, server.url], check=False).returncode
    finally:
        shutil.rmtree(folder)


async def _migrate(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await migrate.migrate(connection)
    finally:
        await connection.close()


if __name__ == "__main__":
    sys.exit(main())
