"""The replay of the original libraries' answers fails where it must."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracle.replay import main

GOOD = '{"command": "eq", "value": {"type": "raw", "value": 1}, "subject": {}, "result": false}\n'
WRONG = GOOD.replace("false", "true")


@pytest.mark.parametrize("content", ["", WRONG, "{", GOOD + "\n" + GOOD, '{"else": 1}\n'])
def test_invalid_records_of_the_oracle_fail(tmp_path: Path, content: str) -> None:
    (tmp_path / "cases.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 1


def test_no_file_fails(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 1


def test_a_line_per_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cases.jsonl").write_text(GOOD)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "cases: 1 of 1\n"
