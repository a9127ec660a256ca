"""What README.md and docs/ show is run, in the order in which it is shown."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from textwrap import dedent

import asyncpg
import pytest

from sequencerd import settings_file
from sequencerd.runners.registry import make_runners
from sequencerd.storage import migrate
from tests.helpers.databases import execute, with_database
from tests.helpers.engines import until
from tests.helpers.packages import Packages

REPOSITORY = Path(__file__).parent.parent

# What a block cannot do in a test is done beside it: installing from the network, becoming root,
# changing the machine, and the whole test suite, which is what is running.
SHIMS = {
    # an environment uses the pip of this one: to install another takes seconds of CPU time
    "python3": f'"{sys.executable}" "$@" --without-pip\nln -s "$HOME/bin/pip" "$3/bin/"',
    "python": f'exec "{sys.executable}" "$@"',
    # what it would build is built once for all tests; that of the Dockerfile builds for itself
    "pip": 'for one; do shift; [ "$one" != . ] || one="$HOME"/*.whl; set -- "$@" $one; done\n'
    'exec "$(dirname "$0")/python" -m pip "$@"',
    "make": f'exec {shutil.which("make")} --dry-run VENV="$PWD/.venv" "$@"',
    "sequencerd": f'exec "{sys.executable}" -m sequencerd "$@"',
    "sudo": 'exec env -u PIP_TARGET "$@"',
    "docker": 'echo "$@" >> "$HOME/docker"',
    "helm": 'echo "$@" >> "$HOME/helm"',
    "kubectl": 'echo "$@" >> "$HOME/kubectl"',
    "systemctl": 'echo "$@" >> "$HOME/systemctl"',
}


def blocks(path: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page, also those in lists: language and text."""
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, dedent(text)) for language, text in found]


@pytest.fixture
async def empty_database(server: str) -> AsyncIterator[str]:
    await execute(server, "CREATE DATABASE readme")
    yield with_database(server, "readme")
    await execute(server, "DROP DATABASE readme WITH (FORCE)")


@pytest.fixture
def home(tmp_path: Path, packages: Packages) -> Path:
    """A copy of the repository, as after a clone, and the shims and the wheel beside it."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "dist", "build")
    shutil.copytree(REPOSITORY, tmp_path / "clone", ignore=ignored)
    shutil.copy(packages.wheel, tmp_path)
    (tmp_path / "bin").mkdir()
    for name, script in SHIMS.items():
        shim = tmp_path / "bin" / name
        shim.write_text(f"#!/bin/sh\n{script}\n")
        shim.chmod(0o755)
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    return tmp_path


def environment(home: Path, url: str) -> Mapping[str, str]:
    site = home / "site"
    return {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{site}:{sysconfig.get_path('purelib')}",
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_NO_COMPILE": "0",  # pip's way to say: compile nothing
        "PIP_IGNORE_INSTALLED": "1",
        "PIP_NO_DEPS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_QUIET": "1",
        "SEQUENCERD_DATABASE": url,
        "SEQUENCERD_SMTP_URL": "smtp://127.0.0.1:9",
    }


async def test_the_readme_can_be_followed(empty_database: str, home: Path) -> None:
    variables = environment(home, empty_database)
    daemons = []
    connection = None
    try:
        for language, text in blocks(home / "clone/README.md"):
            if language == "yaml":
                (home / "clone/trial.yaml").write_text(text)
            elif language == "sql":
                connection = await asyncpg.connect(empty_database)
                for statement in text.split(";\n"):
                    if statement.strip():
                        await connection.execute(statement)
                await until(
                    connection, "SELECT 'paid' = ANY (goals_met) FROM sequencer.enrollments"
                )
            else:
                assert language == "sh"
                for line in text.splitlines():
                    if line == "sequencerd run":
                        daemons.append(
                            await asyncio.create_subprocess_exec(
                                str(home / "bin/sequencerd"), "run", cwd=home, env=variables
                            )
                        )
                    elif not line.startswith("export SEQUENCERD_"):
                        run(line, home, variables)
        assert connection is not None
        assert await connection.fetchval("SELECT count(*) FROM sequencer.enrollments") == 2
    finally:
        for daemon in daemons:
            daemon.send_signal(signal.SIGTERM)
            assert await daemon.wait() == 0
        if connection:
            await connection.close()
    # it ran what was installed, not the checkout; and the service starts what was installed
    assert (home / "site/sequencerd/sql/0001_sequencer.sql").exists()
    assert (home / "systemctl").read_text() == "enable --now sequencerd\n"
    unit = (home / "etc/systemd/system/sequencerd.service").read_text()
    start = re.search(r"^ExecStart=(\S+) run$", unit, flags=re.MULTILINE)
    assert start
    assert start[1] == f"{home}/opt/sequencerd/bin/sequencerd"
    run(f"{start[1]} --version", home, variables)


def run(line: str, home: Path, variables: Mapping[str, str]) -> None:
    line = line.replace(" /opt/", f" {home}/opt/").replace(" /etc/", f" {home}/etc/")
    line = line.replace("install-service", f"install-service --to {home}/etc/systemd/system")
    done = subprocess.run(
        ["bash", "-euc", line],
        cwd=home / "clone",
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


async def test_the_sql_page_can_be_followed(empty_database: str) -> None:
    connection = await asyncpg.connect(empty_database)
    await migrate.migrate(connection)
    await connection.execute(
        "INSERT INTO sequencer.sequences (name, first_step) VALUES ('trial', 'two-weeks');"
        "INSERT INTO sequencer.steps (sequence, name, type)"
        " VALUES ('trial', 'two-weeks', 'GoTo'), ('trial', 'ended', 'GoTo')"
    )
    for language, text in blocks(REPOSITORY / "docs/sql.md"):
        assert language == "sql"
        await connection.execute(text)
    assert await connection.fetchval("SELECT count(*) FROM sequencer.enrollments") == 1002
    await connection.close()


def test_the_settings_page_shows_settings(tmp_path: Path) -> None:
    ((language, text),) = blocks(REPOSITORY / "docs/settings.md")
    assert language == "toml"
    file = tmp_path / "sequencerd.toml"
    file.write_text(text)
    shown = settings_file.load({}, file)
    assert set(make_runners(shown)) >= {"Email", "SMS", "Score"}


def test_the_service_page_can_be_followed(home: Path, tmp_path: Path) -> None:
    for name in ("database", "smtp", "score", "score-token"):
        (tmp_path / name).write_text(f"postgresql://{name}/x\n" if name == "database" else "c2Vj")
    program = home / "opt/sequencerd/bin/sequencerd"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{SHIMS['sequencerd']}\n")
    program.chmod(0o755)
    shown = ""
    for language, text in blocks(REPOSITORY / "docs/service.md"):
        if language == "sh":
            for line in text.splitlines():
                run(line, home, environment(home, "postgresql://nowhere/x"))
        elif language == "toml":
            file = tmp_path / "sequencerd.toml"
            file.write_text(text.replace("/run/secrets", str(tmp_path)))
            shown += repr(settings_file.load({"CREDENTIALS_DIRECTORY": str(tmp_path)}, file))
        else:
            assert text.startswith("[Service]\nLoadCredential=")
    assert (home / "etc/systemd/system/sequencerd@.service").exists()
    assert (home / "systemctl").read_text() == "daemon-reload\nenable --now sequencerd\n"
    assert (home / "docker").read_text() == "compose up --build --detach\n"
    assert (home / "helm").read_text().startswith("install sequencerd packaging/helm ")
    assert "listen='127.0.0.1:9187'" in shown


@pytest.mark.parametrize(
    "page", sorted(REPOSITORY.glob("*.md")) + sorted(REPOSITORY.glob("docs/*.md"))
)
def test_links_lead_somewhere(page: Path) -> None:
    for name, section in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not section or section in sections(target), f"{name}#{section}"


def sections(page: Path) -> set[str]:
    """The sections of a page, as links name them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
