"""What the helpers of tests promise."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.copies import MAX_BYTES, Copies
from tests.helpers.databases import Administrator

TWO_TESTS = """
import gc, socket

class Cycle:
    def __init__(self):
        self.me, self.socket = self, socket.socket()

def test_one():
    left = Cycle()
    assert False, left

def test_another():
    gc.collect()
"""

OF_SQL = "tests/sql/test_orm.py tests/sql/test_shard_of.py"


def test_a_socket_that_a_failing_test_leaves_open_fails_no_other(
    tmp_path: Path, repository: Path
) -> None:
    (tmp_path / "test_two.py").write_text(TWO_TESTS)
    done = subprocess.run(
        shlex.split(
            f"{sys.executable} -m pytest -W error::ResourceWarning"
            " -W error::pytest.PytestUnraisableExceptionWarning -p tests.helpers.leftovers"
            f" -p no:cacheprovider --rootdir {tmp_path} -c /dev/null {tmp_path}"
        ),
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout


def test_tests_run_in_another_schema(server: str, repository: Path) -> None:
    """Some of them: CONTRIBUTING.md says how to run all."""
    variables = {"SEQUENCERD_TEST_SCHEMA": 'My "Größe"', "SEQUENCERD_TEST_DATABASE": server}
    done = subprocess.run(
        shlex.split(f"{sys.executable} -m pytest -q -n 0 -p no:cacheprovider {OF_SQL}"),
        cwd=repository,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_a_given_server_is_used_by_all_processes_of_pytest(repository: Path) -> None:
    done = subprocess.run(
        shlex.split(f"{sys.executable} -m pytest -q -n 1 -p no:cacheprovider {OF_SQL} -x"),
        cwd=repository,
        env=os.environ | {"SEQUENCERD_TEST_DATABASE": "postgresql://postgres@/x?host=/missing"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "/missing/.s.PGSQL" in done.stdout, done.stdout


ENROLL = (
    "INSERT INTO sequencer.sequences (name, first_step) VALUES ('s', 'a');"
    "INSERT INTO sequencer.steps (sequence, name, type) VALUES ('s', 'a', 'GoTo');"
    "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'ada')"
)
LARGE = (
    f"INSERT INTO sequencer.topics SELECT 't' || n, 'x' FROM generate_series(1, {MAX_BYTES}/30) n"
)


def test_a_database_with_new_rows_is_emptied_for_the_next_test(copies: Copies) -> None:
    for _ in range(2):
        with copies.one() as url:
            session = Administrator(url)
            session.execute(ENROLL)
            assert [row["id"] for row in session.fetch("SELECT * FROM sequencer.enrollments")] == [
                1
            ]
            for table in ("sequences", "steps", "revisions"):
                assert len(session.fetch(f"SELECT FROM sequencer.{table}")) == 1
            session.close()
    with copies.one() as again:
        assert again == url


@pytest.mark.parametrize(
    "change",
    [
        "CREATE TABLE public.x (); DROP TABLE public.x",
        "REVOKE SELECT ON sequencer.events FROM sequencer_editor",
        "COMMENT ON TABLE sequencer.events IS 'x'",
        "ALTER TABLE sequencer.events DISABLE TRIGGER ALL",
        "TRUNCATE sequencer.events",
        "ANALYZE sequencer.events",
        "DELETE FROM sequencer.migrations",
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET jit = off', current_database()); END $$",
        "SELECT lo_create(0)",
        LARGE,
    ],
)
def test_a_database_that_is_changed_otherwise_is_dropped(copies: Copies, change: str) -> None:
    with copies.one() as url:
        session = Administrator(url)
        session.execute(change)
        session.close()
    with copies.one() as another:
        assert another != url


def test_a_database_that_is_still_in_use_is_dropped(copies: Copies) -> None:
    with copies.one() as url:
        session = Administrator(url)
    with copies.one() as another:
        assert another != url
    session.close()
