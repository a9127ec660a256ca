"""The public surface: what the authors of runners and of sequences import, and its types."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import sequencerd
from tests.helpers.packages import Packages
from tests.test_readme import REPOSITORY

LOCKS = sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("packaging/*.txt"))

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
def test_exported_names_exist(name: str) -> None:
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
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            "--cache-dir",
            str(Path(sys.prefix) / "mypy"),  # kept as the bytecode is
            "plug_in.py",
        ],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'active'" in done.stdout, done.stdout


def test_the_wheel_has_the_licenses_and_the_types(packages: Packages) -> None:
    unpacked = packages.unpacked
    with zipfile.ZipFile(packages.wheel) as wheel:
        names = wheel.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(wheel.read(metadata))
        folder = metadata.replace("METADATA", "licenses")
        vendored = sorted(REPOSITORY.glob("sequencerd/**/vendor/*.LICENSE"))
        assert len(vendored) == 6
        for path in [REPOSITORY / "LICENSE", *vendored]:
            name = path.relative_to(REPOSITORY)
            assert wheel.read(f"{folder}/{name}") == path.read_bytes()
            assert (unpacked / name).read_bytes() == path.read_bytes()
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Version"] == sequencerd.__version__
    migrations = {f"sequencerd/sql/{path.name}" for path in (REPOSITORY / "sql").iterdir()}
    assert {"sequencerd/py.typed", *migrations} <= set(names)
    installed = {name.partition(".data/data/share/")[2] for name in names} - {""}
    assert installed - {"man/man1/sequencerd.1"} == {  # which make deb has, see its test
        "bash-completion/completions/sequencerd",
        "fish/vendor_completions.d/sequencerd.fish",
        "zsh/site-functions/_sequencerd",
    }


def test_the_build_system_is_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    for pinned in project["build-system"]["requires"]:
        assert pinned in project["dependency-groups"]["build"]
        for name in ("requirements.txt", "packaging/build-requirements.txt"):
            text = (REPOSITORY / name).read_text()
            assert re.search(rf"^{pinned} \\\n    --hash=", text, re.MULTILINE)


@pytest.mark.parametrize("file", ["requirements.txt", *LOCKS])
def test_a_lock_has_a_hash_for_each_package_and_names_no_index(file: str) -> None:
    lines = (REPOSITORY / file).read_text().splitlines()
    pins = [line for line in lines if re.match(r"\w", line)]
    assert pins
    for pin in pins:
        assert re.fullmatch(r"[\w.\[\],-]+==[\w.]+( ; .+)? \\", pin), pin
        assert lines[lines.index(pin) + 1].startswith("    --hash=sha256:")
    assert not [line for line in lines if line.startswith("--") or "://" in line]
