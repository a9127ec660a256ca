"""A pytest plugin: --jobs N runs the tests in N processes.

They are forked when all tests are collected, which takes seconds of CPU time: processes that start
by themselves would collect once each. A process asks for more tests when it begins its last one.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest

SHARED_FOLDER: pytest.StashKey[Path] = pytest.StashKey()


def shared_folder(factory: pytest.TempPathFactory, config: pytest.Config) -> Path:
    """Return a folder that all processes of this run share."""
    return config.stash.get(SHARED_FOLDER, factory.getbasetemp())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--jobs", type=int, default=1, metavar="N", help="run in N processes")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    number = min(session.config.getoption("jobs"), len(session.items))
    if number < 2 or session.testsfailed or session.config.option.collectonly:
        return None  # pytest's own loop
    config = session.config
    factory: pytest.TempPathFactory = config._tmp_path_factory  # type: ignore[attr-defined]
    config.stash[SHARED_FOLDER] = factory.getbasetemp()
    processes: dict[Connection, int] = {}
    for name in range(number):
        ours, theirs = Pipe()
        if (process := os.fork()) == 0:
            for connection in (ours, *processes):
                connection.close()
            _Worker(session, theirs).run_and_exit(f"process-{name}")
        theirs.close()
        processes[ours] = process
    _Controller(session, processes).run()
    return True


class _Controller:
    """The process that has collected the tests: hands them out, and gets their reports."""

    def __init__(self, session: pytest.Session, processes: dict[Connection, int]) -> None:
        self._session = session
        self._processes = processes
        self._number = len(processes)
        self._next = 0
        self._last: dict[Connection, str] = {}

    def run(self) -> None:
        session = self._session
        try:
            while self._processes:
                for connection in wait(self._processes):
                    assert isinstance(connection, Connection)
                    self._receive(connection)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
        finally:
            for connection, process in self._processes.items():
                connection.close()  # the process ends when it has something to say
                os.waitpid(process, 0)

    def _receive(self, connection: Connection) -> None:
        try:
            message = connection.recv()
        except EOFError:
            connection.close()
            _, status = os.waitpid(self._processes.pop(connection), 0)
            if status:
                last = self._last.get(connection)
                raise RuntimeError(f"a process ended with {status} after {last}") from None
            return
        match message:
            case None:
                with suppress(BrokenPipeError):
                    connection.send(self._take())
            case dict():
                config = self._session.config
                report = config.hook.pytest_report_from_serializable(config=config, data=message)
                self._last[connection] = report.nodeid
                config.hook.pytest_runtest_logreport(report=report)
            case text:
                raise RuntimeError(text)

    def _take(self) -> range:
        """Return the next tests, all of one file: many at first, and few in the end."""
        items, begin = self._session.items, self._next
        end = begin + (len(items) - begin) // (2 * self._number) + 1
        while self._next < min(end, len(items)) and items[self._next].path == items[begin].path:
            self._next += 1
        return range(begin, self._next)


class _Worker:
    """A process that runs tests."""

    def __init__(self, session: pytest.Session, connection: Connection) -> None:
        self._session = session
        self._config = session.config
        self._connection = connection

    def run_and_exit(self, name: str) -> None:
        """Run tests until there are no more; exit without what the process that forked has left."""
        code = 1
        try:
            self._begin(name)
            self._run()
            code = 0
        except (ConnectionError, EOFError, KeyboardInterrupt):
            pass  # no more tests are wanted
        except BaseException:
            self._connection.send(traceback.format_exc())
        finally:
            os._exit(code)

    def _begin(self, name: str) -> None:
        """Print nothing, and write to files of its own."""
        plugins = self._config.pluginmanager
        plugins.unregister(name="terminalreporter")
        capture = plugins.getplugin("capturemanager")
        capture.stop_global_capturing()
        capture.start_global_capturing()
        folder = self._config.stash[SHARED_FOLDER] / name
        folder.mkdir(0o700)
        self._config._tmp_path_factory._basetemp = folder  # type: ignore[attr-defined]
        plugins.register(self)

    def _run(self) -> None:
        try:
            for item, following in pairwise(chain(self._given(), [None])):
                assert item is not None
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        finally:
            self._session._setupstate.teardown_exact(None)
        self._config._ensure_unconfigure()  # reports what the last test has left open

    def _given(self) -> Iterator[pytest.Item]:
        while True:
            self._connection.send(None)
            numbers = self._connection.recv()
            if not numbers:
                return
            yield from (self._session.items[number] for number in numbers)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._connection.send(data)
