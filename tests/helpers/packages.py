"""The source archive and the wheel of this tree, built once for all processes of a run."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[2]


class Packages(NamedTuple):
    unpacked: Path
    """What the source archive has."""
    wheel: Path
    """Built from that, as a distribution's builder does."""


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    made = folder / "packages"
    with (folder / "packages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            building = tmp_path_factory.mktemp("packages")
            archive = _build("sdist", REPOSITORY, building)
            subprocess.run(["tar", "--extract", "--file", archive], cwd=building, check=True)
            (unpacked,) = (path for path in building.iterdir() if path.is_dir())
            _build("wheel", unpacked, building)
            building.rename(made)
    (unpacked,) = (path for path in made.iterdir() if path.is_dir())
    (wheel,) = made.glob("*.whl")
    return Packages(unpacked, wheel)


def _build(kind: str, source: Path, folder: Path) -> Path:
    before = set(folder.iterdir())
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (built,) = set(folder.iterdir()) - before
    return built
