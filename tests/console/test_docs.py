"""docs/console.md: its settings and SQL hold, its pictures are there and small."""

from __future__ import annotations

import re
from pathlib import Path

import asyncpg

from sequencerd import settings_file
from tests.test_readme import REPOSITORY, blocks

PAGE = REPOSITORY / "docs/console.md"


async def test_the_documentation_of_the_console_is_correct(
    connection: asyncpg.Connection, tmp_path: Path
) -> None:
    languages = set()
    for language, text in blocks(PAGE):
        languages.add(language)
        if language == "sql":
            await connection.execute(text)
            continue
        if language == "toml":
            file = tmp_path / "sequencerd.toml"
            file.write_text(text)
            assert settings_file.load({}, file).listen
    assert languages == {"toml", "sql", "sh", "ini"}


def test_the_pictures_of_the_documentation_are_small() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE.read_text())
    assert len(pictures) == 4
    for name in pictures:
        assert (PAGE.parent / name).stat().st_size < 150_000
