"""Write systemd's units for this installation."""

from __future__ import annotations

import pwd
import stat
import sys
import sysconfig
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from sequencerd.errors import UsageError

_IN_UNITS = "/opt/sequencerd/bin/sequencerd"
_HIDDEN = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")  # noqa: S108 - to warn of them


def units(*, config: Path | None = None, user: str | None = None) -> dict[str, str]:
    """Return the units by file name, for the running program, and for another user or settings
    file.
    """
    start = program() if config is None else f"{program()} --config {_quoted(config)}"
    found = {}
    for file in _folder().iterdir():
        text = file.read_text(encoding="utf-8").replace(_IN_UNITS, start)
        if user is not None:
            about = "# A user that exists only while the service runs; it owns no files."
            text = text.replace(f"{about}\nDynamicUser=yes\n", f"# Must exist.\nUser={user}\n")
        found[file.name] = text
    return dict(sorted(found.items()))


def program() -> str:
    """Return the command that starts this installation."""
    script = _script()
    return _quoted(script) if script.exists() else f"{_quoted(Path(sys.executable))} -m sequencerd"


def _script() -> Path:
    return Path(sysconfig.get_path("scripts"), "sequencerd")


def _quoted(path: Path) -> str:
    """Quote a word for systemd."""
    text = str(path.absolute()).replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if " " in text else text


def warnings(user: str | None) -> list[str]:
    """Return why the service could not use this installation, or not run as this user."""
    found = [
        f"the service cannot see {folder}, where this installation is; install it into /opt"
        for folder in _HIDDEN
        if any(str(file).startswith(folder) for file in _files())
    ]
    if user is None and not found and (closed := _closed_path()):
        prefix = Path(sys.prefix)
        advice = f"-R go+rX {prefix}" if closed.is_relative_to(prefix) else f"go+x {closed}"
        found.append(f"the service's user cannot read {closed}; run: chmod {advice}")
    try:
        pwd.getpwnam(user or "root")
    except KeyError:
        found.append(f"this machine has no user {user!r}: create it before you start the service")
    return found


def _files() -> tuple[Path, ...]:
    """Return files without which the service cannot start."""
    return _script(), Path(sys.executable).resolve(), Path(__file__)


def _closed_path() -> Path | None:
    """Return the first folder or file of this installation that is closed to other users, as after
    an installation with a umask of 077.
    """
    for file in _files():
        for path in (*reversed(file.parents), file):
            needed = stat.S_IXOTH if path.is_dir() else stat.S_IROTH
            if path.exists() and not path.stat().st_mode & needed:
                return path
    return None


def write(folder: Path, texts: dict[str, str]) -> list[Path]:
    """Write the units. Return their paths. Raises UsageError."""
    written = []
    for name, text in texts.items():
        path = folder / name
        new = path.with_name(f"{name}.new")
        try:
            new.write_text(text, encoding="utf-8")
            new.chmod(0o644)
            new.replace(path)
        except OSError as error:
            hint = "; try sudo" if isinstance(error, PermissionError) else ""
            raise UsageError(f"{path} cannot be written: {error.strerror}{hint}") from error
        written.append(path)
    return written


def _folder() -> Traversable:
    """Return the folder systemd/: in the installed package, or beside it in a checkout."""
    packaged = files("sequencerd") / "units"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "systemd"
