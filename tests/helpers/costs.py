"""A pytest plugin for --durations: where the time of the processors went, as waiting costs none."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

STARTED: pytest.StashKey[tuple[float, float]] = pytest.StashKey()
POSTGRESQL = "postgresql_seconds"


def note_postgresql(config: pytest.Config, data: Path) -> None:
    """Note what a server has used, before it is stopped; without /proc nothing is known."""
    with suppress(OSError):
        pid = (data / "postmaster.pid").read_text().split()[0]
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = sum(map(int, fields[11:15]))  # its own, and those of processes that have ended
        _output(config)[POSTGRESQL] = ticks / os.sysconf("SC_CLK_TCK")


def _output(config: pytest.Config) -> dict[str, Any]:
    """Return what the controller gets from a worker of pytest-xdist; the process may be both."""
    if not hasattr(config, "workeroutput"):
        config.workeroutput = {}  # type: ignore[attr-defined]
    output: dict[str, Any] = config.workeroutput  # type: ignore[attr-defined]
    return output


def _used() -> tuple[float, float]:
    """Return the seconds of this process, and of the programs that it has started."""
    times = os.times()
    return times.user + times.system, times.children_user + times.children_system


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    item.stash[STARTED] = _used()
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown":
        (python, programs), (then, others) = _used(), item.stash[STARTED]
        report.user_properties.append(("seconds", [python - then, programs - others]))
    return report


class Costs:
    """What the tests of each folder have used, in all processes."""

    def __init__(self) -> None:
        self.folders: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        self.postgresql = 0.0
        self.begun = os.times().elapsed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if report.when == "teardown" and name == "seconds":
                assert isinstance(value, list)
                path = report.nodeid.partition("::")[0]
                sums = self.folders["/".join(path.split("/")[:2])]
                sums[:] = [had + new for had, new in zip(sums, [1, *value], strict=True)]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.postgresql += getattr(node, "workeroutput", {}).get(POSTGRESQL, 0.0)

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        self.postgresql += _output(config).get(POSTGRESQL, 0.0)
        times = os.times()
        terminalreporter.section("CPU seconds of tests and of the programs that they start")
        for folder, (tests, python, programs) in sorted(
            self.folders.items(), key=lambda item: -sum(item[1][1:])
        ):
            terminalreporter.line(f"{python:6.1f} {programs:6.1f}  {folder}: {tests} tests")
        terminalreporter.line(
            f"{sum(times[:4]):.0f} in all and {self.postgresql:.0f} of PostgreSQL, within"
            f" {times.elapsed - self.begun:.0f} seconds"
        )
