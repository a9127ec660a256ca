"""What holds for the text of all modules, and no linter checks."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.test_readme import REPOSITORY

ONE_FOR_EACH_ROOM = {"__init__.py", "runner.py"}
"""Names that mean the same in every room."""

OTHERS = "venvs"
"""The queues that bench/compare.py installs."""


def modules(*rooms: str) -> list[Path]:
    folders = (REPOSITORY / room for room in rooms)
    return [
        file
        for folder in folders
        for file in sorted(folder.rglob("*.py"))
        if OTHERS not in file.parts
    ]


def test_no_line_is_kept_from_the_formatter() -> None:
    """A table by hand goes through a function or a text, which are formatted like all else."""
    programs = [
        REPOSITORY / "hatch_build.py",
        *filter(Path.is_file, (REPOSITORY / "bin").iterdir()),
    ]
    found = [
        f"{file.relative_to(REPOSITORY)}:{number}"
        for file in [*modules("sequencerd", "tests", "bench"), *programs]
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(r"#\s*(fmt|yapf|ruff):\s*(skip|off|disable)", line)
    ]
    assert found == []


def test_no_two_modules_have_the_same_name() -> None:
    """A file that is opened by its name is the one that was meant."""
    found = defaultdict(list)
    for file in modules("sequencerd"):
        if file.name not in ONE_FOR_EACH_ROOM:
            found[file.name].append(str(file.relative_to(REPOSITORY)))
    assert [paths for paths in found.values() if len(paths) > 1] == []


def names_of_types(module: Path) -> Iterator[str]:
    """Yield the classes and type aliases of a module, without the underscore of private ones."""
    for node in ast.parse(module.read_text()).body:
        match node:
            case ast.ClassDef(name=name):
                yield name.removeprefix("_")
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if re.fullmatch(
                "_?[A-Z][A-Za-z]*[a-z][A-Za-z]*", name
            ) and "TypeVar(" not in ast.unparse(value):
                yield name.removeprefix("_")


def test_no_two_types_have_the_same_name() -> None:
    """A reader knows from the name of a class what it is, and a search finds one of them."""
    found = defaultdict(list)
    for file in modules("sequencerd"):
        for name in names_of_types(file):
            found[name.lower()].append(f"{file.relative_to(REPOSITORY)}: {name}")
    assert [places for places in found.values() if len(places) > 1] == []


def test_connections_are_opened_in_one_place() -> None:
    """With the shard's schema, and with what libpq's connection strings and variables say."""
    opening = re.compile(r"asyncpg\.(connect|create_pool)\(")
    places = [file.name for file in modules("sequencerd") if opening.search(file.read_text())]
    assert places == ["connections.py"]
