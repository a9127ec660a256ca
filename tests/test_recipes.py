"""The page of recipes: each file has no errors or warnings, each simulation prints what it says.

`RENEW=1` writes what the simulations print into the page.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from sequencerd.cli import main

PAGE = Path(__file__).parents[1] / "docs/recipes.md"
SETTINGS = """
[runners.Score]
url = "http://localhost:1"
[runners.SelfTest]
url = "http://localhost:1"
[sms]
account_sid = "AC00000000000000000000000000000000"
auth_token = "secret"
"""


class Recipe(NamedTuple):
    """A section of the page: its file, and what it runs, each with the output that is expected."""

    title: str
    file: str
    simulations: list[tuple[str, str]]


def recipes() -> list[Recipe]:
    found = []
    for section in PAGE.read_text().split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        (file,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        (block,) = re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        found.append(Recipe(title, file, _simulations(block)))
    return found


def _simulations(block: str) -> list[tuple[str, str]]:
    """Split a block at its prompts. A command goes on after a line that ends with a backslash."""
    found = []
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command = re.match(r"(?:.*\\\n)*.*\n", part)
        assert command
        found.append((command[0], part[command.end() :]))
    return found


def test_every_recipe_is_in_the_list() -> None:
    linked = re.findall(r"\(#(.*?)\)", PAGE.read_text())
    titles = [recipe.title.lower() for recipe in recipes()]
    assert sorted(linked) == sorted(re.sub(r"[^\w -]", "", one).replace(" ", "-") for one in titles)


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.title)
def test_a_recipe(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in os.environ:
        if variable.startswith("SEQUENCERD_"):
            monkeypatch.delenv(variable)
    Path("sequencerd.toml").write_text(SETTINGS)
    monkeypatch.setenv("SEQUENCERD_CONFIG", "sequencerd.toml")
    name = re.match(r"name: (\S+)\n", recipe.file)
    assert name, "a recipe begins with the name of its sequence"
    Path(f"{name[1]}.yaml").write_text(recipe.file)
    assert _run("check", "--strict", f"{name[1]}.yaml") == 0, capsys.readouterr().out
    capsys.readouterr()
    for command, expected in recipe.simulations:
        program, *arguments = shlex.split(command.replace("\\\n", " "))
        assert (program, arguments[0]) == ("sequencerd", "simulate")
        code = _run(*arguments)
        printed, errors = capsys.readouterr()
        assert (code, errors) == (0, "")
        if os.environ.get("RENEW"):
            PAGE.write_text(PAGE.read_text().replace(command + expected, command + printed))
        else:
            assert printed == expected


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert isinstance(exited.value.code, int)
    return exited.value.code
