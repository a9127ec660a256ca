"""psql on a throw-away database with the schema: `make shell`."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import asyncpg

from sequencerd.storage import embedded, migrate
from tests.helpers.databases import FAST_SETTINGS, server_folder


def main() -> int:
    with server_folder() as folder, embedded.running(folder, settings=FAST_SETTINGS) as server:
        asyncio.run(_migrate(server.url))
        print(f"SEQUENCERD_DATABASE='{server.url}'", file=sys.stderr)
        return subprocess.run([server.psql, server.url], check=False).returncode


async def _migrate(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await migrate.migrate(connection)
    finally:
        await connection.close()


if __name__ == "__main__":
    sys.exit(main())
