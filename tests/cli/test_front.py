"""The command that prints the SQL of one table over all shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from sequencerd.cli import main

SHARDS = """
[shards]
a = {url = "postgresql://app:secret@db1/app", schema = "a"}
b = {url = "postgresql://app@db2/app"}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


def run(settings: Path, *arguments: str) -> object:
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(settings), "fdw", *arguments])
    return exit_.value.code


def test_all_shards_are_printed_in_their_order(
    settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.write_text(SHARDS)
    assert run(settings) == 0
    printed = capsys.readouterr().out
    assert "(sequencer.shard_of(subject, 2))" in printed
    assert printed.index("db1") < printed.index("db2")
    assert "schema_name 'a'" in printed
    assert "secret" not in printed
    assert run(settings, "--shard", "a") == 1
    assert "leave out --shard" in capsys.readouterr().err


def test_without_shards(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings.write_text("")
    assert run(settings) == 1
    assert "there are no [shards] in the settings" in capsys.readouterr().err
