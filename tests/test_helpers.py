"""What the helpers of tests promise."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

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
