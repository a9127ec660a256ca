"""The pages for operators: their commands and SQL run, and their tables are complete."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import asyncpg
import pytest

from sequencerd.cli.arguments import make_parser
from sequencerd.runners.registry import make_runners
from sequencerd.settings import Section, Settings
from sequencerd.storage.embedded import PostgresPrograms
from tests.helpers.clusters import stoppable
from tests.helpers.command_line import Command
from tests.helpers.databases import execute, make_login, with_login
from tests.helpers.engines import define, enroll, until
from tests.sql.test_roles import daemon
from tests.test_readme import REPOSITORY, blocks, environment, home, run

home = home  # noqa: PLW0127 - a fixture

ENDLESS = ("watch", "tail")
ASKS = ("retry", "cancel", "move", "reevaluate")


@pytest.mark.slow
async def test_a_day_of_an_operator(
    sequencerd: Command, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    days = '{"amount": 3, "unit": "days"}'
    await define(
        connection,
        "onboarding",
        ("hello", "GoTo", "{}", "pause"),
        ("pause", "WaitForDuration", days, "nudge"),
        ("nudge", "GoTo", "{}", None),
    )
    for subject in ("user-41", "user-40", "user-39", "user-42"):
        await enroll(connection, "onboarding", subject)
    await connection.execute(
        "UPDATE sequencer.enrollments SET status = 'failed', failure = 'error' WHERE id < 3"
    )
    (tmp_path / "onboarding.yaml").write_text(sequencerd("export", "onboarding"))
    for language, text in blocks(REPOSITORY / "docs/operating.md"):
        if text.startswith(("pg_", "CREATE ROLE")):
            continue  # has a test of its own
        assert language == "sh"
        for line in text.splitlines():
            command, *arguments = shlex.split(line)[1:]
            if command in ENDLESS:
                sequencerd(command, "--help")
                sequencerd(command, *arguments, "--nonsense", code=2)
                continue
            yes = ["--yes"] if command in ASKS else []
            if "2 --skip" in line:  # what has been retried has failed again
                await connection.execute(
                    "UPDATE sequencer.enrollments SET status = 'failed' WHERE id = 2"
                )
            sequencerd(command, *arguments, *yes)
    history = await connection.fetch(
        "SELECT action FROM sequencer.events ORDER BY at, enrollment_id"
    )
    assert {row["action"] for row in history} >= {"resumed", "moved", "cancelled"}
    statuses = await connection.fetch("SELECT document->>'status' FROM sequencer.revisions")
    assert {row[0] for row in statuses} == {"active", "paused", "archived"}


@pytest.mark.slow
async def test_a_backup_is_restored_on_a_server_without_roles(
    sequencerd: Command, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    await define(connection, "onboarding", ("hello", "GoTo", "{}", None))
    await enroll(connection, "onboarding", "user-42")
    found = blocks(REPOSITORY / "docs/operating.md")
    dump, roles, restore = (text for _, text in found if text.startswith(("pg_", "CREATE ROLE")))
    programs = PostgresPrograms.find()

    def shell(line: str) -> None:
        path = f"{programs.bin}:{sequencerd.variables['PATH']}"
        variables = {**sequencerd.variables, "PATH": path}
        subprocess.run(["bash", "-euc", line], env=variables, cwd=tmp_path, check=True)

    shell(dump)
    with stoppable(programs) as new:
        await execute(new.url, roles)
        sequencerd.variables["SEQUENCERD_DATABASE"] = new.url
        for line in restore.splitlines():
            if line.startswith("pg_"):
                shell(line)
            else:
                sequencerd(*shlex.split(line)[1:])
        assert "user-42" in sequencerd("list")
        await execute(new.url, "CREATE ROLE restorer LOGIN IN ROLE sequencer_daemon")
        found_by_daemon = sequencerd("--database", with_login(new.url, "restorer"), "doctor")
        assert "this user has the privileges of a daemon" in found_by_daemon


@pytest.mark.parametrize("page", ["reliability", "scaling", "shards", "citus", "security"])
async def test_the_sql_of_a_page_runs(
    connection: asyncpg.Connection, sequencerd: Command, page: str
) -> None:
    await define(connection, "onboarding", ("hello", "GoTo", "{}", None))
    await enroll(connection, "onboarding", {"security": "user-42"}.get(page, "ada"))
    for role in ("shop", "marketing", "sequencerd", "dpo"):
        await connection.execute(
            f"DO $$ BEGIN CREATE ROLE {role};"
            " EXCEPTION WHEN duplicate_object OR unique_violation THEN END $$"
        )
    for language, text in blocks(REPOSITORY / f"docs/{page}.md"):
        if "citus" in text:
            continue  # has tests of its own
        if language == "sql":
            await connection.execute(text)
        elif language == "toml":
            settings = Settings.model_validate(tomllib.loads(text))
            assert settings.shards or settings.database.pooled
        elif language == "sh" and page in {"shards", "citus"}:
            continue  # they have tests of their own
        elif language == "sh":
            for line in text.splitlines():
                command, *arguments = shlex.split(line.partition(" > ")[0])[1:]
                sequencerd(command, *arguments, *(["--yes"] if command == "forget" else []))
        elif text.startswith("postgresql://"):
            Settings.model_validate({"database": {"url": text.strip()}})
    count = await connection.fetchval("SELECT count(*) FROM sequencer.enrollments")
    assert count == {"scaling": 5001, "security": 0}.get(page, 1)


@pytest.mark.parametrize("page", ["lookups", "messages", "runners", "settings", "suppressions"])
def test_runners_can_be_made_with_the_settings_of_a_page(page: str) -> None:
    texts = [
        text
        for language, text in blocks(REPOSITORY / f"docs/{page}.md")
        if language == "toml" and not text.startswith("[project.")
    ]
    assert texts
    for text in texts:
        given = re.sub(r"\{file = [^}]*\}", f'"{"k" * 32}"', text)
        make_runners(Settings.model_validate(tomllib.loads(given)))


@pytest.mark.parametrize("page", ["lookups", "steps", "suppressions"])
async def test_statements_for_applications_run(connection: asyncpg.Connection, page: str) -> None:
    await connection.execute("CREATE SCHEMA app; CREATE TABLE app.accounts (name text, plan text)")
    statements = [
        text for language, text in blocks(REPOSITORY / f"docs/{page}.md") if language == "sql"
    ]
    assert statements
    for statement in statements:
        await connection.execute(statement)


@pytest.mark.slow
async def test_the_trigger_of_an_application_enrolls_at_once(
    connection: asyncpg.Connection, database: str
) -> None:
    """With the privileges of a daemon, and before its next sweep."""
    for name in ("trial", "feedback"):
        await define(connection, name, ("a", "GoTo", "{}", None))
    (text,) = (text for _, text in blocks(REPOSITORY / "docs/sql.md") if "CREATE TRIGGER" in text)
    await connection.execute(text)
    login = await make_login(connection, database, "login_daemon", "daemon")
    async with daemon(login, SEQUENCERD_ENGINE_SWEEP="3600"):
        await enroll(connection, "trial", "ada")
        done = "SELECT status = 'completed' FROM sequencer.enrollments WHERE sequence = 'feedback'"
        await until(connection, done)


async def test_each_column_of_an_enrollment_is_described(connection: asyncpg.Connection) -> None:
    """As docs/sql.md says."""
    columns = await connection.fetch(
        "SELECT attname, col_description(attrelid, attnum) FROM pg_attribute"
        " WHERE attrelid = 'sequencer.enrollments'::regclass AND attnum > 0 AND NOT attisdropped"
    )
    assert [name for name, description in columns if description is None] == []


def test_commands_that_pages_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """With their options; blocks are run by other tests."""
    wrong, count = [], 0
    for page in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        for named in re.findall(r"`(?:sudo )?sequencerd ([a-z-][^`\n]*)`", page.read_text()):
            command = re.split(r" [|<>]", re.sub(r"\bID\b", "7", named))[0]
            arguments = shlex.split(command)
            if len(arguments) == 1:
                arguments.append("--help")  # without the arguments that it requires
            count += 1
            try:
                make_parser().parse_args(arguments)
            except SystemExit as exited:
                if exited.code:
                    wrong.append(f"{page.name}: {named}: {capsys.readouterr().err}")
    assert wrong == []
    assert count > 80


def test_pages_use_standard_terms() -> None:
    pages = [
        *REPOSITORY.glob("*.md"),
        *(
            page
            for suffix in ("md", "yaml", "json")
            for page in REPOSITORY.glob(f"docs/*.{suffix}")
        ),
    ]
    unusual = re.compile(r"\b(mend\w*|(some|any|every)body|people|bell|anew)\b", re.IGNORECASE)
    found = {page.name: unusual.search(page.read_text()) for page in pages}
    assert {name: match[0] for name, match in found.items() if match} == {}
    assert len(pages) > 30


@pytest.mark.parametrize(
    "page", [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")], ids=lambda page: page.name
)
def test_pages_can_be_read(page: Path) -> None:
    """No paragraph, and no cell of a table, is longer than a reader keeps in mind."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    long = [
        part[:60]
        for line in text.splitlines()
        for part in (line.split(" | ") if line.startswith("|") else [line])
        if len(part.split()) > (100 if line.startswith("|") else 140)
    ]
    assert long == []


def test_every_promise_is_shown() -> None:
    page = (REPOSITORY / "docs/reliability.md").read_text()
    promised = set(re.findall(r"`(test_\w+)`", page))
    files = (REPOSITORY / "tests").rglob("test_*.py")
    there = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert promised
    assert promised <= there


@pytest.mark.slow
async def test_installing_can_be_followed(
    home: Path, connection: asyncpg.Connection, database: str
) -> None:
    followed = (REPOSITORY / "README.md").read_text().splitlines()  # by a test of that page
    (home / "bin/apt-get").write_text('#!/bin/sh\necho "$@" >> "$HOME/apt"\n')
    (home / "bin/apt-get").chmod(0o755)
    for language, text in blocks(REPOSITORY / "docs/install.md"):
        if language == "sql":
            async with connection.transaction():
                for role in ("sequencerd", "shop"):
                    await connection.execute(f"DROP ROLE IF EXISTS {role}")
                await connection.execute(text)
                granted = await connection.fetchval(
                    "SELECT pg_has_role('shop', 'sequencer_enroller', 'usage')"
                )
                assert granted
            continue
        for line in text.splitlines():
            # those of requirements.txt come from the network: make test does it
            if "requirements.txt" not in line and line not in followed:
                run(line, home, environment(home, database))
    assert (home / "apt").read_text() == (
        "install --yes python3-venv\ninstall ./dist/sequencerd_*.deb\n"
    )
    assert len((home / "docker").read_text().splitlines()) == 3


def keys_of(section: type[Section]) -> Iterator[str]:
    """The keys of a section of the settings, and of the sections in it."""
    for name, field in section.model_fields.items():
        types = (field.annotation, *get_args(field.annotation))
        inner = [one for one in types if isinstance(one, type) and issubclass(one, Section)]
        yield from (key for one in inner for key in keys_of(one))
        if not inner:
            yield field.alias or name


def test_every_setting_is_shown_with_a_value() -> None:
    pages = "\n".join(page.read_text() for page in (REPOSITORY / "docs").glob("*.md"))
    missing = [key for key in keys_of(Settings) if not re.search(rf"\b{key} = ", pages)]
    assert missing == []


def test_every_failure_is_explained() -> None:
    text = "".join(file.read_text() for file in (REPOSITORY / "sequencerd").rglob("*.py"))
    codes = set(re.findall(r'\b(?:EvaluationError|Fail|fail)\(\s*"(\w+)",', text))
    page = (REPOSITORY / "docs/failures.md").read_text()
    listed, told = page.split("## Events that are not failures")
    assert set(re.findall(r"^\| `(\w+)` \|", listed, re.MULTILINE)) == codes
    assert {"error", "bad_data", "outcome_unknown"} <= codes
    actions = set(re.findall(r"^\| `(\w+)` \|", told, re.MULTILINE))
    assert actions <= known_actions()


def known_actions() -> set[str]:
    """As the schema explains them."""
    sql = (REPOSITORY / "sql/0001_sequencer.sql").read_text()
    found = re.search(r"COLUMN sequencer.events.action IS '(.*)\.';", sql)
    assert found
    return set(re.split(r"[,;] ", found[1]))


def test_every_event_is_explained() -> None:
    page = (REPOSITORY / "docs/sql.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"\w+", row)}
    assert known_actions() <= listed


def test_the_designs_page_names_files_that_exist() -> None:
    text = (REPOSITORY / "docs/design.md").read_text("utf-8")
    rooms = [path.name for path in (REPOSITORY / "sequencerd").iterdir() if path.is_dir()]
    named = re.findall(rf"`((?:{'|'.join(rooms)}|sequencerd|sql|tests|docs)/[^` ]*)`", text)
    assert len(named) > 50
    missing = [
        name
        for name in named
        if not (REPOSITORY / name).exists() and not (REPOSITORY / "sequencerd" / name).exists()
    ]
    assert missing == []
    modules = {path.stem for path in (REPOSITORY / "sequencerd/engine").glob("[a-z]*.py")}
    assert not [name for name in modules if f"`{name}`" not in text and f"/{name}.py" not in text]
