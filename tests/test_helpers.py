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


PROCESS = "SELECT pg_backend_pid()"
REMEMBERED = """
    SELECT current_setting('work_mem') = '9MB' OR current_user <> session_user
           OR EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory')
           OR EXISTS (SELECT FROM pg_prepared_statements WHERE name = 'x')
           OR EXISTS (SELECT FROM pg_cursors WHERE name = 'x')
           OR EXISTS (SELECT FROM pg_listening_channels())
"""


def test_a_session_is_used_by_the_next_test_and_has_forgotten_its_last_user(copies: Copies) -> None:
    sessions = []
    for _ in range(2):
        with copies.one() as url:
            for _ in range(2):
                session = Administrator(url)
                sessions += session.fetch(PROCESS)
                assert session.fetch(REMEMBERED) == [(False,)]
                session.execute(
                    "SET work_mem = '9MB'; SET ROLE sequencer_daemon; PREPARE x AS SELECT 1;"
                    "DECLARE x CURSOR WITH HOLD FOR SELECT 1; LISTEN x;"
                    "SELECT pg_advisory_lock_shared(1)"
                )
                assert session.fetch(REMEMBERED) == [(True,)]
                session.close()
    first, second, third, fourth = sessions
    assert first != second
    assert {third, fourth} == {first, second}


def test_a_session_that_was_ended_is_not_used(copies: Copies, administrator: Administrator) -> None:
    with copies.one() as url:
        session = Administrator(url)
        [(process,)] = session.fetch(PROCESS)
        session.close()
    with copies.one() as again:
        assert again == url
        administrator.fetch(f"SELECT pg_terminate_backend({process}, 60000)")
        session = Administrator(url)
        assert session.fetch(PROCESS) != [(process,)]
        session.close()


def test_a_session_that_fails_is_closed(copies: Copies) -> None:
    with copies.one() as url:
        session = Administrator(url)
        session.execute("BEGIN; DELETE FROM sequencer.topics")
        session.close()
        other = Administrator(url)
        other.execute("BEGIN; LOCK TABLE sequencer.topics NOWAIT")
        other.close()
