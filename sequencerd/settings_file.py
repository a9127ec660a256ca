"""Read the settings: a TOML file and the environment, once.

`SEQUENCERD_CONFIG` names the file (default: /etc/sequencerd/sequencerd.toml where it exists). Every
setting of a section can be set as `SEQUENCERD_<SECTION>_<KEY>`, which overrides the file; a secret
can be read from a file named by `SEQUENCERD_<SECTION>_<KEY>_FILE`, or in TOML written as
`{file = "NAME"}`. Short: `SEQUENCERD_DATABASE` is the database's URL, `SEQUENCERD_SMTP_URL` that of
the mail server.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sequencerd.core.config import faults
from sequencerd.core.faults import Fault
from sequencerd.errors import SettingsError
from sequencerd.settings import SECTIONS, Settings, read_secret_file

DEFAULT_FILE = Path("/etc/sequencerd/sequencerd.toml")

_PREFIX = "SEQUENCERD_"
_SHORT = {"DATABASE": ("database", "url"), "SMTP_URL": ("email", "url")}
_NO_SETTING = {"CONFIG", "INSTANCE"}
_OF_KUBERNETES = re.compile(
    r"""SEQUENCERD_(\w+_)?(
        SERVICE_(HOST|PORT(_\w+)?)=.* | PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?=.* | =(tcp|udp|sctp)://.*)
    )""",
    re.VERBOSE | re.DOTALL,
)
"""Variables, with their values, that Kubernetes sets beside a Service named sequencerd..., and
Docker for links.
"""
_TABLES = ("RUNNERS", "LOOKUPS", "SHARDS", "CONSOLE_USERS", "CONSOLE_OIDC", "EMAIL_OAUTH")
"""Tables that only the file can have."""


def load(
    environment: Mapping[str, str],
    file: Path | None = None,
    *,
    secrets: Collection[str] | None = None,
) -> Settings:
    """Read the file and the environment. Raises SettingsError with one line.

    `secrets` names the sections whose secrets are read from files, by default all. Those of other
    sections get a placeholder, so that definitions can be read without access to the files.
    """
    if file is None and (named := environment.get(f"{_PREFIX}CONFIG")):
        file = Path(named)
    folder = environment.get("CREDENTIALS_DIRECTORY")
    values: dict[str, Any] = {}
    variables: dict[tuple[object, ...], str] = {}  # the names, by the path of what they set
    if file is not None:
        values = _read(file)
    else:
        with suppress(_NoFileError):
            values = _read(DEFAULT_FILE)
            file = DEFAULT_FILE
    for name, text in environment.items():
        if (
            name.startswith(_PREFIX)
            and name.removeprefix(_PREFIX) not in _NO_SETTING
            and not _OF_KUBERNETES.fullmatch(f"{name}={text}")
        ):
            section, key, value = _from_environment(name, text, folder, secrets)
            values.setdefault(section, {})
            if not isinstance(values[section], dict):
                raise SettingsError(f"{section} must be a section of the file: [{section}]")
            values[section][key] = value
            variables[section, key] = name
    for section in () if secrets is None else values.keys() - set(secrets):
        values[section] = _without_files(values[section], section)
    try:
        return Settings.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        found = faults(error, Settings, values, "this file")
        raise SettingsError(_wrong(found, variables, file)) from error


def _wrong(
    found: Iterable[Fault], variables: Mapping[tuple[object, ...], str], file: Path | None
) -> str:
    """Return what is wrong, and in which variable or file it is."""
    places: dict[str, list[str]] = {}
    for fault in found:
        place = variables.get(fault.path[:2]) or file
        text = str(fault).replace("a mapping, key: value", "a table")
        where = f"wrong setting in {place}" if place else "wrong setting"
        places.setdefault(where, []).append(text.replace("a mapping", "a table"))
    return "; ".join(f"{where}: {'; '.join(texts)}" for where, texts in places.items())


class _NoFileError(SettingsError):
    """The file does not exist."""


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))  # some editors write a mark
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _NoFileError(f"settings file {file}: {error.strerror}") from error
    except PermissionError as error:
        hint = (
            "use sudo, or --config with a file of your own; for the service, make it readable by "
            "all users, and keep secrets in files of their own"
        )
        raise SettingsError(f"settings file {file}: {error.strerror}; {hint}") from error
    except OSError as error:
        raise SettingsError(f"settings file {file}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"settings file {file}: {error}") from error


def _without_files(value: object, *path: str) -> object:
    """Return a part of the settings with a placeholder for each secret in a file."""
    if isinstance(value, list):
        return [_without_files(part, *path) for part in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"file"}:
        if path[0] == "shards":
            return f"postgresql:///{path[1]}"
        return _PLACEHOLDERS.get((path[0], path[-1]), "c2VjcmV0")
    return {key: _without_files(part, *path, key) for key, part in value.items()}


_PLACEHOLDERS: Mapping[tuple[str, str], str] = {
    ("database", "url"): "postgresql:///",
    ("database", "listen_url"): "postgresql:///",
    ("email", "url"): "smtp://user@localhost",
    ("console", "password_hash"): f"scrypt$32768$8$1${'A' * 22}==${'A' * 43}=",
    ("unsubscribe", "keys"): "0" * 32,
}
"""The placeholders of secrets that must have a certain form."""


def _from_environment(
    name: str, text: str, folder: str | None, secrets: Collection[str] | None
) -> tuple[str, str, object]:
    """Return the section, the key and the value that a variable sets."""
    short = name.removeprefix(_PREFIX)
    known = _variables()
    if short in known:
        return *known[short], text
    if short.endswith("_FILE") and (place := known.get(short.removesuffix("_FILE"))):
        if secrets is not None and place[0] not in secrets:
            return *place, {"file": text}
        try:
            return *place, read_secret_file(text, folder)
        except ValueError as error:
            raise SettingsError(f"{name}: {error}") from error
    table = next((one for one in _TABLES if short.startswith(f"{one}_")), None)
    near = get_close_matches(short, known, n=1)
    if table is not None:
        hint = f"; write [{table.lower().replace('_', '.')}] in the settings file"
    else:
        hint = f"; did you mean {_PREFIX}{near[0]}?" if near else ""
    raise SettingsError(f"{name} is not a setting{hint}")


def _variables() -> dict[str, tuple[str, str]]:
    """Return what a variable can set: everything except the tables of runners, whose keys users
    name.
    """
    places = {
        f"{section}_{key}".upper(): (section, key)
        for section, kind in SECTIONS.items()
        for key in (field.alias or name for name, field in kind.model_fields.items())
    }
    return places | _SHORT
