"""Parse connection strings like libpq, and translate them for asyncpg, which supports fewer
parameters.

What `psql` accepts works, or is rejected by name. Precedence is libpq's: the connection string,
then the service file, then the environment.
"""

from __future__ import annotations

import configparser
import getpass
import os
import pwd
import re
import ssl
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

from sequencerd.errors import SettingsError

_WITH_VARIABLE = (
    *("host", "hostaddr", "port", "user", "password", "passfile", "options"),
    *("target_session_attrs", "channel_binding", "require_auth", "load_balance_hosts"),
    *("client_encoding", "gssencmode", "krbsrvname", "gsslib", "requirepeer"),
    *("sslmode", "sslnegotiation", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslcrldir"),
    *("sslcertmode", "sslsni", "min_protocol_version", "max_protocol_version"),
    *("ssl_min_protocol_version", "ssl_max_protocol_version"),
)
_VARIABLES = {f"PG{key.replace('_', '').upper()}": key for key in _WITH_VARIABLE} | {
    "PGAPPNAME": "application_name",
    "PGCONNECT_TIMEOUT": "connect_timeout",
    "PGDATABASE": "dbname",
}
"""libpq's environment variables, with the parameters that they set."""

_PLACES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE")

_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_OF_ASYNCPG = (
    *("sslmode", "sslnegotiation", *_FILES, "sslpassword", "ssl_min_protocol_version"),
    *("ssl_max_protocol_version", "krbsrvname", "gsslib"),
)
"""Parameters that asyncpg reads from the query of a URL."""

_ONLY = {
    "channel_binding": ("prefer", "disable"),
    "client_encoding": ("utf8", "utf-8", "unicode", "auto"),
    "gssencmode": ("prefer", "disable"),
    "load_balance_hosts": ("disable",),
    "replication": ("false", "off", "no", "0"),
    "require_auth": ("",),
    "max_protocol_version": ("latest", "3.0"),
    "min_protocol_version": ("3.0",),
    "oauth_client_id": ("",),
    "oauth_client_secret": ("",),
    "oauth_issuer": ("",),
    "oauth_scope": ("",),
    "requirepeer": ("",),
    "requiressl": ("0",),
    "scram_client_key": ("",),
    "scram_server_key": ("",),
    "sslcertmode": ("allow",),
    "sslcompression": ("0",),
    "sslcrldir": ("",),
    "sslkeylogfile": ("",),
    "sslsni": ("1",),
    "target_session_attrs": (
        "any",
        "primary",
        "standby",
        "prefer-standby",
        "read-write",
        "read-only",
    ),
}
"""Parameters for which asyncpg has no other value, so that every parameter of libpq is known.
Its own error for the last one names no values.
"""

_WITHOUT_EFFECT = (
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
    *("tcp_user_timeout", "gssdelegation", "fallback_application_name"),
)
"""Ignored because the daemon probes its connections itself, which is faster."""

_KNOWN = frozenset({*_VARIABLES.values(), *_OF_ASYNCPG, *_ONLY, *_WITHOUT_EFFECT, "service"})

_PAIR = re.compile(r"\s*(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s'\\]|\\.)*)(?=\s|$)", re.DOTALL)
_ENTRY = re.compile(r"(?!#)" + r"((?:[^:\\]|\\.)*):" * 4 + "(.*)")
_HOST = re.compile(r"(?:\[(?P<six>[^\]]*)\]|(?P<other>[^:]*))(?::(?P<port>\d*))?")


def is_set(environment: Mapping[str, str]) -> bool:
    """Return whether libpq's variables name a database, so that no connection string is needed."""
    return any(environment.get(name) for name in _PLACES)


def arguments(
    text: str,
    *,
    name: str,
    timeout: float,
    settings: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return asyncpg's arguments for a connection string. Raises SettingsError.

    `name` and `timeout` apply unless the string has an application_name or a connect_timeout;
    `settings` are server settings. A password file is read for each connection that asyncpg opens,
    as by libpq, so that the password of a running daemon can be changed.
    """
    given = _without_password_file(text, environment)
    made: dict[str, Any] = {
        "timeout": _timeout(given.get("connect_timeout"), timeout),
        "server_settings": {
            "application_name": given.get("application_name", name),
            **({"options": given["options"]} if "options" in given else {}),
            **(settings or {}),
        },
        **_address(given),
    }
    for key, argument in (
        ("user", "user"),
        ("password", "password"),
        ("dbname", "database"),
        ("target_session_attrs", "target_session_attrs"),
    ):
        if key in given:
            made[argument] = given[key]
    if "password" not in given and _password(given) is not None:
        made["password"] = partial(_password, given)
    if given.get("sslrootcert") == "system":
        made["ssl"] = _system_context(given)
    elif query := {key: given[key] for key in _OF_ASYNCPG if key in given}:
        made["dsn"] = f"postgresql://?{urlencode(query)}"
    return made


def complete(text: str, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the parameters of a connection string, with those of the service file, the environment
    and the password file. Raises SettingsError.
    """
    given = _without_password_file(text, environment)
    if "password" not in given and (password := _password(given)) is not None:
        given["password"] = password
    return given


def _without_password_file(text: str, environment: Mapping[str, str] | None) -> dict[str, str]:
    variables = os.environ if environment is None else environment
    given = parse(text)
    if service := given.pop("service", None) or variables.get("PGSERVICE"):
        given = _service(service, variables) | given
    found = {key: variables[name] for name, key in _VARIABLES.items() if variables.get(name)}
    given = {key: value for key, value in (found | given).items() if value or key == "password"}
    _check(given)
    if "user" not in given:
        given["user"] = _login()
    return given


def parse(text: str) -> dict[str, str]:
    """Return the parameters of a URL, of KEYWORD=VALUE pairs, or of the bare name of a database.

    Raises SettingsError, which quotes nothing that may be part of a password.
    """
    scheme, is_url, rest = text.strip().partition("://")
    if is_url and scheme in ("postgresql", "postgres"):
        given = _from_url(rest)
    elif is_url and re.fullmatch(r"[\w+.-]+", scheme):
        raise SettingsError(f"the database's URL begins with {scheme}://; write postgresql://")
    elif "=" in text:
        given = _from_pairs(text)
    elif is_url or re.search(r"[@:/]", text):
        raise SettingsError("the database's URL is wrong; write postgresql://user@host/name")
    else:
        given = {"dbname": text.strip()} if text.strip() else {}
    if given.pop("ssl", "") == "true":  # as in JDBC, and supported by libpq
        given["sslmode"] = "require"
    if "database" in given:  # the name in asyncpg
        given["dbname"] = given.pop("database")
    for key in given:
        if key not in _KNOWN:
            _reject(key)
    return given


def _reject(key: str) -> None:
    if not re.fullmatch(r"\w{1,63}", key):
        raise SettingsError(
            "the database's URL has a parameter without a name; write special characters in the "
            "password as percent escapes, such as %3F for ?"
        )
    near = get_close_matches(key, _KNOWN, n=1)
    hint = (
        f"did you mean {near[0]}?" if near else f"a setting of the server is options=-c {key}=..."
    )
    raise SettingsError(f"the database's URL has the unknown parameter {key}; {hint}")


def _from_url(rest: str) -> dict[str, str]:
    place, _, query = rest.partition("?")
    authority, _, database = place.partition("/")
    login, _, hosts = authority.rpartition("@")
    user, has_password, password = login.partition(":")
    given = {"user": unquote(user), "dbname": unquote(database)}
    if has_password:
        given["password"] = unquote(password)
    matches = [_HOST.fullmatch(host) for host in hosts.split(",")]
    if not all(matches):
        raise SettingsError(
            "the database's URL has a port that is not a number; write special characters in the "
            "password as percent escapes, such as %2F for /"
        )
    if hosts:
        given["host"] = ",".join(unquote(m["six"] or m["other"] or "") for m in matches if m)
        ports = [m["port"] or "" for m in matches if m]
        given["port"] = ",".join(ports) if any(ports) else ""
    for pair in filter(None, query.split("&")):
        key, _, value = pair.partition("=")
        given[unquote(key)] = unquote(value)
    return {key: value for key, value in given.items() if value or key == "password"}


def _from_pairs(text: str) -> dict[str, str]:
    given, position = {}, 0
    while text[position:].strip():
        match = _PAIR.match(text, position)
        if match is None:
            raise SettingsError(
                "the database's connection string is not KEYWORD=VALUE pairs; quote values with "
                "blanks, as in password='a b'"
            )
        value = match[2]
        if value.startswith("'"):
            value = value[1:-1]
        given[match[1]] = _plain(value)
        position = match.end()
    return given


def _service(name: str, variables: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of a service, from the user's file or else the system's."""
    own = variables.get("PGSERVICEFILE")
    files = [
        Path(own) if own else _home() / ".pg_service.conf",
        Path(variables.get("PGSYSCONFDIR", "/etc/postgresql-common"), "pg_service.conf"),
    ]
    for file in files:
        parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=False)
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"the service file {file} cannot be read: {error}") from error
        if parser.has_section(name):
            given = dict(parser[name])
            for key in given:
                if key not in _KNOWN or key == "service":
                    raise SettingsError(f"service {name} in {file} has the unknown parameter {key}")
            return given
    places = " or ".join(map(str, files))
    raise SettingsError(f"there is no service {name} in {places}")


def _check(given: Mapping[str, str]) -> None:
    for key, allowed in _ONLY.items():
        if (value := given.get(key)) is not None and value.lower() not in allowed:
            if not allowed[0]:  # the value may be a secret
                raise SettingsError(f"{key} of the database is not supported; leave it out")
            advice = f"write {key}={allowed[0]}"
            if key == "channel_binding":
                advice += " together with sslmode=verify-full, which also rules out a middleman"
            raise SettingsError(f"{key}={value} of the database is not supported; {advice}")
    for key in _FILES:
        path = given.get(key)
        if path and not (key == "sslrootcert" and path == "system"):
            try:
                with Path(path).open("rb"):
                    pass
            except OSError as error:
                raise SettingsError(f"{key} of the database: {path}: {error.strerror}") from error


def _timeout(text: str | None, default: float) -> float | None:
    """Return libpq's connect_timeout in seconds: no limit for 0, and at least 2."""
    if text is None:
        return default
    try:
        seconds = int(text)
    except ValueError:
        raise SettingsError("connect_timeout of the database is not a number of seconds") from None
    return max(seconds, 2) if seconds > 0 else None


def _address(given: Mapping[str, str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if "hostaddr" in given and given.get("sslmode") == "verify-full" and "host" in given:
        raise SettingsError(
            "hostaddr of the database is not supported with host and sslmode=verify-full; "
            "leave out hostaddr"
        )
    hosts = [host for host in given.get("hostaddr", given.get("host", "")).split(",") if host]
    if hosts:
        made["host"] = hosts
    if ports := given.get("port"):
        numbers = [port or "5432" for port in ports.split(",")]
        if not all(port.strip().isdecimal() and 0 < int(port) < 65536 for port in numbers):
            raise SettingsError("port of the database is not a number from 1 to 65535")
        if len(numbers) > 1 and len(numbers) != len(hosts):
            raise SettingsError(
                f"the database has {len(hosts)} hosts and {len(numbers)} ports; give one port for "
                "each host, or one for all"
            )
        made["port"] = [int(port) for port in numbers] if len(numbers) > 1 else int(numbers[0])
    return made


def _password(given: Mapping[str, str]) -> str | None:
    """Return the password from the password file. Asyncpg does not resolve its escapes.

    A file that other users can read is ignored, and asyncpg warns about it.
    """
    file = Path(given["passfile"]) if "passfile" in given else _home() / ".pgpass"
    try:
        if file.stat().st_mode & 0o077:
            return None
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    user = given["user"]
    database = given.get("dbname", user)
    hosts = given.get("host", given.get("hostaddr", "localhost")).split(",")
    ports = given.get("port", "5432").split(",")
    entries = [match.groups() for line in lines if (match := _ENTRY.fullmatch(line))]
    for number, host in enumerate(hosts):
        port = ports[number] if len(ports) == len(hosts) else ports[0]
        names = {"localhost", host} if host.startswith("/") else {host}
        for *patterns, password in entries:
            known = [_plain(pattern) for pattern in patterns]
            allowed = (names, {port}, {database}, {user})
            if all(
                pattern == "*" or one in values
                for pattern, one, values in zip(patterns, known, allowed, strict=True)
            ):
                return _plain(password)
    return None


def _plain(text: str) -> str:
    """Resolve backslash escapes."""
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _login() -> str:
    """Return the name of the process's user, as libpq does: variables such as LOGNAME may name
    another user, as with `runuser -u postgres`. They count if the user has no name here.
    """
    with suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # for example in a container
        raise SettingsError(
            "the database's URL names no user, and the user of this process has no name; write "
            "postgresql://user@host/name"
        ) from None


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")


def _system_context(given: Mapping[str, str]) -> ssl.SSLContext:
    """Return a context that trusts the system's authorities, and checks the host name."""
    if given.get("sslmode", "verify-full") != "verify-full":
        raise SettingsError("sslrootcert=system of the database needs sslmode=verify-full")
    context = ssl.create_default_context()
    if "sslcert" in given:
        context.load_cert_chain(given["sslcert"], given.get("sslkey"), given.get("sslpassword"))
    return context
