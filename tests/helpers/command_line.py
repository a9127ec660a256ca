"""`sequencerd` on a test's database, in the test's own process, and as one of its own."""

from __future__ import annotations

import asyncio
import io
import os
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from sequencerd.cli import main
from tests.helpers.waiting import PATIENCE

# A command runs an event loop of its own, which a test's thread may have already. One thread for
# all commands, as each thread makes its own JavaScript context.
THREAD = ThreadPoolExecutor(1, thread_name_prefix="sequencerd")


async def start_sequencerd(*arguments: str, **options: Any) -> asyncio.subprocess.Process:
    """Start `sequencerd` as a process of its own; the options are those of asyncio."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sequencerd", *arguments, **options
    )


@asynccontextmanager
async def beside(
    command: Command, *arguments: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamReader]]:
    """Run a command beside the test, which reads what it prints and its errors line by line."""
    pipe = asyncio.subprocess.PIPE
    process = await start_sequencerd(*arguments, env=command.variables, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE):
            yield process.stdout, process.stderr
    finally:
        process.terminate()
        await process.wait()


class Command:
    """Runs `sequencerd` on a test's database."""

    def __init__(self, database: str, folder: Path) -> None:
        self.variables = {**os.environ, "SEQUENCERD_DATABASE": database}
        self.folder = folder
        self.errors = ""

    def without_database(self) -> None:
        """Leave it to the settings file, which may have several."""
        for name in ("SEQUENCERD_DATABASE", "SEQUENCERD_DATABASE_SCHEMA"):
            self.variables.pop(name, None)

    def __call__(self, *arguments: str, code: int = 0, stdin: bytes = b"") -> str:
        """What the command prints. It ends with `code`; `errors` has its standard error."""
        out, errors = io.StringIO(), io.StringIO()
        with (
            patch.dict(os.environ, self.variables, clear=True),
            patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin))),
            chdir(self.folder),
            redirect_stdout(out),
            redirect_stderr(errors),
        ):
            ended = THREAD.submit(_main, arguments).result()
        assert ended == code, out.getvalue() + errors.getvalue()
        self.errors = errors.getvalue()
        return out.getvalue()

    def follow(self, text: str, code: int = 0) -> str:
        """What the lines of a page print that call `sequencerd`; others go to a shell."""
        printed = ""
        for line in text.replace("\\\n", " ").splitlines():
            name, *arguments = shlex.split(line)
            if name != "sequencerd":
                subprocess.run(["bash", "-euc", line], cwd=self.folder, check=True)
            elif arguments[-2:-1] == [">"]:
                (self.folder / arguments[-1]).write_text(self(*arguments[:-2], code=code))
            else:
                printed += self(*arguments, code=code)
        return printed

    def program(self, *arguments: str, code: int = 0) -> str:
        """The same by a process of its own, as `run` needs one for its signals."""
        done = subprocess.run(
            [sys.executable, "-m", "sequencerd", *arguments],
            env=self.variables,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        self.errors = done.stderr
        return done.stdout


def _main(arguments: tuple[str, ...]) -> object:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code
