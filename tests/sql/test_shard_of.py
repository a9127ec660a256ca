"""The shard of a subject in SQL and in the languages of docs/shards.md; reevaluations as rows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import asyncpg
import pytest

from sequencerd.core.routing import shard_of
from tests.helpers.engines import define, enroll

SHARDS = 16
SUBJECTS = ["user-42", "", "Zoë", "日本", "\U0001f600", "e\u0301", "a'b\\c\n", "x" * 1000]
NUMBERS = [shard_of(subject, SHARDS) for subject in SUBJECTS]


async def test_sql_finds_the_same_shard(connection: asyncpg.Connection) -> None:
    found = await connection.fetch(
        "SELECT sequencer.shard_of(subject, $2) FROM unnest($1::text[]) WITH ORDINALITY"
        " AS s (subject, position) ORDER BY position",
        SUBJECTS,
        SHARDS,
    )
    assert [number for (number,) in found] == NUMBERS


async def test_an_invalid_number_of_shards_is_rejected(connection: asyncpg.Connection) -> None:
    assert await connection.fetchval("SELECT sequencer.shard_of(NULL, 4)") is None
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.fetchval("SELECT sequencer.shard_of('user-42', 0)")


NODE = """
const subjects = JSON.parse(process.argv[1]);
console.log(JSON.stringify(subjects.map((subject) => shardOf(subject, Number(process.argv[2])))));
"""
GO = """
func main() {
	var subjects []string
	if err := json.Unmarshal([]byte(os.Args[1]), &subjects); err != nil {
		panic(err)
	}
	shards, _ := strconv.Atoi(os.Args[2])
	numbers := []uint32{}
	for _, subject := range subjects {
		numbers = append(numbers, ShardOf(subject, uint32(shards)))
	}
	json.NewEncoder(os.Stdout).Encode(numbers)
}
"""
GO_IMPORTS = 'import (\n\t"encoding/json"\n\t"os"\n\t"strconv"\n'


def example(repository: Path, language: str) -> str:
    """The function of the page that says how to find a shard."""
    page = (repository / "docs/shards.md").read_text()
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if re.search("shard_?of", block, re.IGNORECASE)]
    return str(found)


def run(*command: str | Path, folder: Path) -> list[int]:
    arguments = [*map(str, command), json.dumps(SUBJECTS), str(SHARDS)]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)
    return found


def test_the_python_example_of_the_docs(repository: Path) -> None:
    module: dict[str, object] = {}
    exec(example(repository, "python"), module)
    found = module["shard_of"]
    assert callable(found)
    assert [found(subject, SHARDS) for subject in SUBJECTS] == NUMBERS


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node")
def test_the_node_example_of_the_docs(repository: Path, tmp_path: Path) -> None:
    program = example(repository, "js") + NODE
    assert run("node", "-e", program, folder=tmp_path) == NUMBERS


@pytest.mark.skipif(not shutil.which("go"), reason="there is no go")
def test_the_go_example_of_the_docs(repository: Path, tmp_path: Path) -> None:
    written = example(repository, "go").replace("import (\n", GO_IMPORTS, 1)
    (tmp_path / "main.go").write_text(f"package main\n\n{written}{GO}")
    assert run("go", "run", "main.go", folder=tmp_path) == NUMBERS


async def test_inserting_a_reevaluation_wakes(connection: asyncpg.Connection) -> None:
    """As through a foreign table, which can call no function."""
    await define(
        connection, "s", ("wait", "WaitForDuration", '{"amount": 3, "unit": "days"}', None)
    )
    ids = [await enroll(connection, "s", subject) for subject in ("ada", "bob")]
    asleep = "SET wake_at = now() + interval '1 day', entered_at = now()"
    await connection.execute(f"UPDATE sequencer.enrollments {asleep}")
    await connection.execute("INSERT INTO sequencer.reevaluations (subject) VALUES ('ada')")
    awake = "SELECT id FROM sequencer.enrollments WHERE wake_at <= now()"
    assert await connection.fetchval(awake) == ids[0]
    await connection.execute(f"UPDATE sequencer.enrollments {asleep}")
    await connection.execute("INSERT INTO sequencer.reevaluations (sequence) VALUES ('s')")
    assert sorted(id_ for (id_,) in await connection.fetch(awake)) == ids


async def test_a_role_that_may_not_enroll_may_not_reevaluate(
    connection: asyncpg.Connection,
) -> None:
    insert = "INSERT INTO sequencer.reevaluations (subject) VALUES ('ada')"
    await connection.execute("SET ROLE sequencer_enroller")
    assert await connection.execute(insert) == "INSERT 0 1"
    await connection.execute("RESET ROLE; SET ROLE sequencer_privacy")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute(insert)
