"""The public surface: what the wheel brings beside the modules."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.test_readme import REPOSITORY


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
