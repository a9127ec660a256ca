"""The example package: installed as a user would, found and run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sequencerd.core.faults import DefinitionError
from sequencerd.core.model import Action
from sequencerd.core.task import Answer, Failed
from sequencerd.runners.python import load
from tests.helpers.servers import task

SOURCE = Path(__file__).parents[2] / "examples" / "runner-package"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, built and installed into a folder of its own, without a network."""
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(SOURCE, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, *offline, str(source)], check=True)
    monkeypatch.syspath_prepend(str(target))


@pytest.mark.usefixtures("installed")
async def test_the_example_package() -> None:
    made = load()["Coupon"]
    program = made.compile({"prefix": "SPRING", "plans": ["trial"]})
    given, again, other, refused = [
        (await made.run(program, [task(id_, **data)]))[0]
        for id_, data in (
            (7, {"plan": "trial"}),
            (7, {"plan": "trial"}),
            (8, {"plan": "x"}),
            (9, {}),
        )
    ]
    assert isinstance(given, Answer)
    assert given.data is not None
    assert given.data["coupon"].startswith("SPRING-")
    assert given == again
    assert other == Answer(Action.ALT_NEXT)
    assert refused == Failed("data.plan is missing", permanent=True)
    with pytest.raises(DefinitionError, match="prefix"):
        made.compile({"plans": []})
