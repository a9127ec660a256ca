"""How long the operator's commands take on a million enrollments.

    .venv/bin/python -m bench.operating [--rows 1000000]

Starts the embedded PostgreSQL, fills it, and runs each command as a process, start included.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import asyncpg

from sequencerd.storage import embedded, migrate

FILL = """
INSERT INTO sequencer.sequences (name, first_step)
SELECT 'sequence-' || n, 'pause' FROM generate_series(1, 20) AS n;
INSERT INTO sequencer.steps (sequence, name, type, config)
SELECT 'sequence-' || n, step, 'WaitForDuration', '{"amount": 30, "unit": "days"}'
  FROM generate_series(1, 20) AS n, unnest(ARRAY['pause', 'second', 'third']) AS step;
SET sequencer.notify = off;
INSERT INTO sequencer.enrollments (sequence, subject, data, step, wake_at)
SELECT 'sequence-' || 1 + n % 20, 'user-' || n,
       jsonb_build_object('email', 'user-' || n || '@example.com', 'plan', n % 7),
       (ARRAY['pause', 'second', 'third'])[1 + n / 20 % 3],
       now() + CASE WHEN n % 1000 = 0 THEN -1 ELSE 1 END * n * interval '1 second'
  FROM generate_series(1, $rows) AS n;
"""

COMMANDS = (
    ("status",),
    ("list",),
    ("list", "--overdue"),
    ("list", "--subject", "user-4711"),
    ("show", "4711"),
    ("doctor",),
    ("cancel", "--sequence", "sequence-1", "--dry-run"),
    ("cancel", "--step", "pause", "--dry-run"),
)


async def fill(url: str, rows: int) -> None:
    """Insert the enrollments, and analyse the tables."""
    connection = await asyncpg.connect(url)
    await migrate.migrate(connection)
    await connection.execute(FILL.replace("$rows", str(rows)))
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


def run(url: str, *arguments: str) -> tuple[float, float]:
    """Return the seconds that a command takes, and its seconds of CPU time."""
    begun, before = time.perf_counter(), _cpu()
    done = subprocess.run(
        [sys.executable, "-m", "sequencerd", "--database", url, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - begun
    if done.returncode and arguments[0] != "doctor":
        raise SystemExit(done.stderr)
    return seconds, _cpu() - before


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show(seconds: float, cpu: float, arguments: tuple[str, ...]) -> None:
    """Print a line."""
    print(f"{seconds:6.2f} s, {cpu:4.2f} s here  sequencerd {' '.join(arguments)}", flush=True)


def main() -> None:
    """Fill a database and print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    folder = Path(tempfile.mkdtemp(prefix="sequencerd-"))
    try:
        with embedded.running(folder, settings={"fsync": "off"}) as server:
            asyncio.run(fill(server.url, rows))
            for arguments in COMMANDS:
                show(*min(run(server.url, *arguments) for _ in range(3)), arguments)
            third = ("cancel", "--sequence", "sequence-2", "--step", "third", "--yes")
            show(*run(server.url, *third), third)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
