"""Start `python -m sequencerd` as a fork of one process that has imported it.

The imports take a second of CPU time, which is most of the time of a short program. A forked
program is a child of the process that starts it, with its own signals, streams and exit code. A
program that needs an interpreter of its own (other paths of modules, another user) is started as
usual.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import inspect
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import sequencerd
from sequencerd import cli, settings_file
from sequencerd.console.html import make_templates
from sequencerd.runners.registry import make_runners
from tests.helpers import shared

PACKAGE = Path(sequencerd.__file__).parent
PROGRAM = [sys.executable, "-m", "sequencerd"]
AT_START = ("PYTHON", "LC_", "LANG", "LD_")
"""Variables that an interpreter reads when it starts."""
PLAIN = {
    "executable": None,
    "preexec_fn": None,
    "pass_fds": (),
    "shell": False,
    "gid": None,
    "gids": None,
    "uid": None,
    "umask": -1,
    "start_new_session": False,
    "process_group": -1,
}
own_variables: dict[str, str] = {}
"""These variables of the process that forks: a program with others needs its own interpreter."""
MAX_REQUEST = 2**20  # bytes
SET_CHILD_SUBREAPER = 36  # of prctl(): orphans below this process become its children
LOCK = threading.Lock()


def use() -> None:
    """Fork the programs that this process starts from now on, on Linux."""
    if sys.platform == "linux":
        own_variables.update(_read_at_start(os.environ))
        subprocess.Popen = _Popen  # type: ignore[misc]


class _Popen(subprocess.Popen):  # type: ignore[type-arg]
    def _execute_child(self, *given: Any) -> None:
        start = super()._execute_child  # type: ignore[misc]
        wanted = inspect.signature(start).bind(*given).arguments
        if not _is_plain(wanted):
            start(*given)
            return
        pipes = [wanted[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        files = [number if given == -1 else given for number, given in enumerate(pipes)]
        request = {
            "arguments": [os.fsdecode(one) for one in wanted["args"][len(PROGRAM) :]],
            "folder": os.fsdecode(wanted["cwd"] or Path.cwd()),
            "variables": dict(wanted["env"] or os.environ),
        }
        self.pid = _start(json.dumps(request).encode(), files)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(wanted[name] for name in ends))  # type: ignore[attr-defined]


def _is_plain(wanted: Mapping[str, Any]) -> bool:
    """Return whether a program can be forked: it needs no interpreter of its own."""
    arguments, variables = wanted["args"], wanted["env"] or os.environ
    there = Path(wanted["cwd"] or ".") / "sequencerd"
    return (
        isinstance(arguments, list | tuple)
        and list(arguments[: len(PROGRAM)]) == PROGRAM
        and all(wanted[name] == value for name, value in PLAIN.items())
        and (not there.exists() or there.samefile(PACKAGE))  # `python -m` looks there first
        and _read_at_start(variables) == own_variables
    )


def _read_at_start(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(AT_START)}


def _start(request: bytes, files: list[int]) -> int:
    """Start a program, and return its number once it is a child of this process."""
    with LOCK:
        forker = _forker()
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(forker, [request], files)
            return int(forker.recv(MAX_REQUEST))
        finally:
            prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@functools.cache
def _forker() -> socket.socket:
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    arguments = [sys.executable, "-m", __name__, str(theirs.fileno())]
    os.posix_spawn(sys.executable, arguments, os.environ)
    theirs.close()
    atexit.register(ours.close)  # the cache would keep it until the interpreter warns of it
    ours.recv(MAX_REQUEST)  # it has imported
    return ours


# --- in the other process


def serve(requests: socket.socket) -> None:
    """Fork for each request, until the process that asks has ended."""
    for module in pkgutil.walk_packages(sequencerd.__path__, "sequencerd."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    _prepare()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    requests.send(b"ready")
    while True:
        request, files, _, _ = socket.recv_fds(requests, MAX_REQUEST, 3)
        if not request:
            return
        read, write = os.pipe()
        if (between := os.fork()) == 0:
            if program := os.fork():
                os.write(write, str(program).encode())
                os._exit(0)  # its child becomes a child of the process that requested it
            _run(files, **json.loads(request))
        os.waitpid(between, 0)
        requests.send(os.read(read, MAX_REQUEST))
        for number in (read, write, *files):
            os.close(number)


def _prepare() -> None:
    """Make what most programs make when they start."""
    shared.read_entry_points_once()
    shared.make_parser_once()
    cli.make_parser()  # type: ignore[attr-defined]
    make_runners(settings_file.load({}))
    make_templates()


def _run(files: list[int], arguments: list[str], folder: str, variables: dict[str, str]) -> None:
    """Become the program."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 100)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    time.tzset()
    sys.path[0], sys.argv = folder, ["sequencerd", *arguments]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115

    code: object = 1
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120  # as Python ends
    os._exit(code if isinstance(code, int) else 0)  # taking the modules apart takes 50 ms


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
