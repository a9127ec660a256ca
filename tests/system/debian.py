"""Debian in systemd-nspawn, without a network: trees made by debootstrap, wheels for their Python.

Trees and wheels are kept, by default in the user's cache; SEQUENCERD_SYSTEM_CACHE names another
folder. A machine writes to an overlay that ends with it. What cannot be had here skips the test.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import pytest

from tests.helpers.waiting import PATIENCE

REPOSITORY = Path(__file__).parents[2]
BINARY = [REPOSITORY / "requirements.txt", REPOSITORY / "packaging/build-requirements.txt"]
SOURCE = REPOSITORY / "packaging/manual-requirements.txt"


def cache() -> Path:
    given = os.environ.get("SEQUENCERD_SYSTEM_CACHE")
    path = Path(given) if given else platformdirs.user_cache_path("sequencerd") / "system"
    path.mkdir(parents=True, exist_ok=True)
    return path


def need(*programs: str) -> None:
    """Skip where this machine cannot do it."""
    if os.geteuid() != 0:
        pytest.skip("it needs root")
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed")


def made_once(name: str, make: Callable[[Path], Sequence[Sequence[str | Path]]]) -> Path:
    """Return the folder that commands make, and skip where one fails."""
    path = cache() / name
    if not path.exists():
        new = path.with_name(f"{name}.new")
        shutil.rmtree(new, ignore_errors=True)
        for command in make(new):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                lines = (done.stdout + done.stderr).strip().splitlines()
                pytest.skip(f"{Path(command[0]).name}: {lines[-1] if lines else done.returncode}")
        new.rename(path)
    return path


def tree(suite: str, *packages: str) -> Path:
    """Return the root of a minimal Debian with these packages."""
    need("debootstrap")
    return made_once(
        f"{suite}-{_digest(' '.join(packages).encode())}",
        lambda new: [
            [
                "debootstrap",
                "--variant=minbase",
                f"--include={','.join(packages)}",
                suite,
                new,
                *_mirror(),
            ]
        ],
    )


def wheels(python: str) -> Path:
    """Return a folder with all that is pinned, for a version of Python such as 3.11."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    binary = ["--only-binary", ":all:", "--python-version", python]
    return made_once(
        f"wheels-{python}-{_digest(b''.join(path.read_bytes() for path in [*BINARY, SOURCE]))}",
        lambda new: [
            [*download, *binary, "--dest", new, *(f"--requirement={path}" for path in BINARY)],
            [*download, "--dest", new, f"--requirement={SOURCE}"],
        ],
    )


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:12]


def _mirror() -> list[str]:
    """Return the mirror that this machine's apt uses; without apt, debootstrap has one."""
    if shutil.which("apt-get") is None:
        return []
    done = subprocess.run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI)",
            "Created-By: Packages",
            "Origin: Debian",
            "Label: Debian",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split()[:1]


def clone() -> bytes:
    """Return an archive of the files that git has, or would add, as they are now."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    ).stdout
    return subprocess.run(
        ["tar", "--create", "--null", "--files-from=-"],
        cwd=REPOSITORY,
        input=names,
        capture_output=True,
        check=True,
    ).stdout


def blocks(page: str, heading: str, language: str = "sh") -> list[str]:
    """Return the fenced blocks below a heading of a page."""
    text = (REPOSITORY / page).read_text()
    (section,) = re.findall(
        rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |\Z)", text, re.MULTILINE | re.DOTALL
    )
    return re.findall(rf"^```{language}\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)


class Machine:
    """A machine that has booted."""

    def __init__(self, leader: int) -> None:
        self._leader = leader

    def __call__(
        self, command: str, *, user: str = "root", code: int = 0, stdin: bytes = b""
    ) -> str:
        """Run a script in a login shell. Return what it prints, to either output."""
        done = self._run(command, user, stdin)
        output = done.stdout.decode()
        assert done.returncode == code, f"{command}\n{output}exit status {done.returncode}"
        return output

    def _run(self, command: str, user: str, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [
                *("nsenter", "--target", str(self._leader), "--all", "--"),
                *("env", "--ignore-environment", "LANG=C.UTF-8"),
                *("su", "--login", user, "--command"),
                f"exec bash -euo pipefail -c {_quoted(command)}",
            ],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )

    def until(self, command: str, right: Callable[[str], bool]) -> str:
        """Wait until the output of a command is right, and return it."""
        end = time.monotonic() + PATIENCE
        while True:
            output = self._run(command, "root", b"").stdout.decode()
            if right(output):
                return output
            assert time.monotonic() < end, f"{command}\n{output}"
            time.sleep(0.2)

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Return properties of a unit."""
        properties = " ".join(f"--property={name}" for name in names)
        lines = self(f"systemctl show {unit} {properties}").splitlines()
        return dict(line.split("=", 1) for line in lines)

    def sql(self, statement: str) -> str:
        return self(f'psql -qAt -U app -h localhost -c "{statement}" app').strip()

    def enroll(self, name: str) -> None:
        """Enroll in the page's sequence, and wait for the mail."""
        data = f'{{\\"email\\": \\"{name}@example.com\\", \\"name\\": \\"{name}\\"}}'
        columns = "INSERT INTO sequencer.enrollments (sequence, subject, data)"
        self.sql(f"{columns} VALUES ('trial', '{name}', '{data}')")
        self.until("journalctl --unit=mail -o cat", lambda mail: f"Welcome, {name}" in mail)

    def journal(self, unit: str, *options: str) -> str:
        return self(f"journalctl --sync; journalctl --unit={unit} -o cat {' '.join(options)}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


@contextmanager
def booted(root: Path, log: Path, *, wheels: Path | None = None) -> Iterator[Machine]:
    """A machine with only a loopback, whose pip finds the wheels and nothing else."""
    need("systemd-nspawn", "nsenter")
    own = [] if Path("/run/systemd/system").exists() else ["--register=no", "--keep-unit"]
    binds = [f"--bind-ro={wheels}:/wheels"] if wheels else []
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                "systemd-nspawn",
                "--boot",
                f"--directory={root}",
                "--volatile=overlay",
                f"--machine=sequencerd-{os.getpid()}",
                "--private-network",
                "--console=pipe",
                *own,
                *binds,
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        machine = Machine(_leader(process, log))
        machine.until("systemctl is-system-running", lambda state: state.strip() == "running")
        machine("printf '127.0.0.1 localhost\\n::1 localhost\\n' > /etc/hosts")
        machine("printf '[global]\\nno-index = true\\nfind-links = /wheels\\n' > /etc/pip.conf")
        yield machine
    finally:
        process.terminate()
        process.wait()


def _leader(process: subprocess.Popen[bytes], log: Path) -> int:
    """Return the process that is the first of the machine."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        # before, it is nspawn's own child
        for child in children.read_text().split():
            if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                return int(child)
        time.sleep(0.05)
    lines = log.read_text().strip().splitlines()
    pytest.skip(f"systemd-nspawn does not boot here: {lines[-1] if lines else ''}")
