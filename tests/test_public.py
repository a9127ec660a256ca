"""The public surface: what the authors of runners and of sequences import, and its types."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from tests.test_readme import REPOSITORY

PUBLIC = {"sequencerd.runners", "sequencerd.testing"}

PLUG_IN = """
from sequencerd.runners import Answer, Failed, Refused, runner
from sequencerd.testing import load

@runner(concurrency=2)
def gift(config: dict[str, str], enrollment: dict[str, str]) -> Answer | Failed:
    if "code" not in config:
        raise Refused("code is missing")
    return Answer(message=config["code"])

reveal_type(load("a.yaml").simulate(start="2026-03-02T09:00:00Z").status)
"""


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_what_is_exported_is_there(name: str) -> None:
    module = import_module(name)
    assert all(hasattr(module, export) for export in module.__all__)


@pytest.mark.parametrize("module", ["sequencerd.runners.python", "sequencerd.runners.protocol"])
def test_a_module_of_the_runners_can_be_imported_first(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)


def test_docs_and_examples_import_public_names_alone() -> None:
    pages = [*(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "examples").rglob("*.py")]
    pattern = re.compile(r"^from (sequencerd[\w.]*) import ([\w, ]+)$", re.MULTILINE)
    found = [match for page in pages for match in pattern.findall(page.read_text())]
    assert found
    for module, names in found:
        assert module in PUBLIC, module
        assert set(names.split(", ")) <= set(import_module(module).__all__), names


def test_a_plug_in_sees_the_types(tmp_path: Path) -> None:
    (tmp_path / "plug_in.py").write_text(PLUG_IN)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent",
         "--cache-dir", os.devnull, "plug_in.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'active'" in done.stdout, done.stdout


def test_the_wheel_has_the_license_and_the_types(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(tmp_path)) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
        (text,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(text) == (REPOSITORY / "LICENSE").read_bytes()
    assert fields["License-Expression"] == "Apache-2.0"
    assert "sequencerd/py.typed" in names


def build(folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=REPOSITORY, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel
