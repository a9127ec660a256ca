"""A pytest plugin for --durations: it reports CPU time, because waiting costs none."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator
from contextlib import suppress
from operator import add
from pathlib import Path
from typing import Any

import pytest

Seconds = list[float]
"""Of the tests' own processes, of programs that they have started, and of their PostgreSQL."""

MAX_NAMED_TESTS = 20  # tests that are named
SERVER: pytest.StashKey[int] = pytest.StashKey()
SERVER_USED: pytest.StashKey[float] = pytest.StashKey()  # so far; it ends before the last test does
STARTED: pytest.StashKey[list[float]] = pytest.StashKey()
FIELD = "seconds"


def watch_postgresql(config: pytest.Config, data: Path) -> None:
    """Count what a server uses from now on; without /proc nothing is known."""
    with suppress(OSError):
        config.stash[SERVER] = int((data / "postmaster.pid").read_text().split()[0])


def _used(config: pytest.Config) -> Seconds:
    times = os.times()
    python = times.user + times.system
    return [python, times.children_user + times.children_system, _postgresql(config)]


def _postgresql(config: pytest.Config) -> float:
    server = config.stash.get(SERVER, None)
    if server is None:
        return 0.0
    try:
        running = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    except OSError:
        return config.stash.get(SERVER_USED, 0.0)
    # its own, with those of processes that have ended, and of those that run
    ticks = sum(_ticks(server)) + sum(sum(_ticks(process)[:2]) for process in running)
    config.stash[SERVER_USED] = ticks / os.sysconf("SC_CLK_TCK")
    return config.stash[SERVER_USED]


def _ticks(process: str | int) -> list[int]:
    """A process's time in user mode and in the kernel, and the same of its children."""
    with suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return [*map(int, fields[11:15])]
    return []


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    item.stash[STARTED] = _used(item.config)
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown":
        started = item.stash[STARTED]
        used = [now - then for now, then in zip(_used(item.config), started, strict=True)]
        report.user_properties.append((FIELD, used))
    return report


class Costs:
    """What the tests have used, in all processes."""

    def __init__(self) -> None:
        self.tests: dict[str, Seconds] = {}
        self.begun = os.times().elapsed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if report.when == "teardown" and name == FIELD:
                assert isinstance(value, list)
                self.tests[report.nodeid] = value

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        folders: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
        for test, seconds in self.tests.items():
            folder = "/".join(test.partition("::")[0].split("/")[:2])
            folders[folder] = list(map(add, folders[folder], [1, *seconds]))
        sums = [0, 0.0, 0.0, 0.0]
        terminalreporter.section("CPU seconds of tests, programs that they start, and PostgreSQL")
        for folder, (tests, *seconds) in sorted(
            folders.items(), key=lambda item: -sum(item[1][1:])
        ):
            terminalreporter.line(f"{_columns(seconds)}  {folder}: {tests:.0f} tests")
            sums = list(map(add, sums, [tests, *seconds]))
        terminalreporter.line(f"{_columns(sums[1:])}  {sums[0]:.0f} tests")
        most_expensive = sorted(self.tests.items(), key=lambda item: -sum(item[1]))[
            :MAX_NAMED_TESTS
        ]
        terminalreporter.line("the most expensive tests:")
        for test, seconds in most_expensive:
            terminalreporter.line(f"{_columns(seconds)}  {test}")
        times = os.times()
        terminalreporter.line(
            f"{sum(times[:4]):.0f} in all, within {times.elapsed - self.begun:.0f} seconds"
        )


def _columns(seconds: Seconds) -> str:
    return " ".join(f"{one:6.1f}" for one in seconds)
