"""Connection strings: what psql takes works, or is rejected by name."""

from __future__ import annotations

import os
import pwd
import ssl
from pathlib import Path
from typing import Any

import pytest

from sequencerd.errors import SettingsError
from sequencerd.storage import connections, conninfo
from tests.helpers.databases import shard

SECRET = "pa55word"  # in no message


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without files of the user that runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PGSYSCONFDIR", str(tmp_path / "etc"))
    return tmp_path


def arguments(text: str, **environment: str) -> dict[str, Any]:
    made = conninfo.arguments(
        text, name="sequencerd", timeout=10, environment={"USER": "ada", **environment}
    )
    if made["server_settings"] == {"application_name": "sequencerd"}:
        del made["server_settings"]
    if made["timeout"] == 10:
        del made["timeout"]
    return made


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("", {}),
        ("app", {"database": "app"}),
        (
            "postgresql://u:p%40%2F@h:6543/d%20b",
            {"user": "u", "password": "p@/", "host": ["h"], "port": 6543, "database": "d b"},
        ),
        ("postgres://[::1]:5433,h2/d", {"host": ["::1", "h2"], "port": [5433, 5432]}),
        ("postgresql://u@%2Frun%2Fpg/d", {"host": ["/run/pg"], "user": "u"}),
        ("postgresql:///d?host=a,b&port=1,2", {"host": ["a", "b"], "port": [1, 2]}),
        (
            r" host = h  password='a \'b\\' dbname=d user=u\ v ",
            {"host": ["h"], "password": r"a 'b\ ".strip(), "user": "u v"},
        ),
        ("hostaddr=10.0.0.1 host=h", {"host": ["10.0.0.1"]}),
        ("postgresql://h/d?connect_timeout=1", {"timeout": 2}),
        ("postgresql://h/d?connect_timeout=0", {"timeout": None}),
        ("postgresql://h/d?channel_binding=prefer&gssencmode=disable&keepalives=1", {}),
        (
            "postgresql://h/d?application_name=a&options=-c%20geqo%3Doff",
            {"server_settings": {"application_name": "a", "options": "-c geqo=off"}},
        ),
        ("postgresql://h/d?sslmode=disable", {"dsn": "postgresql://?sslmode=disable"}),
        ("postgresql://h/d?ssl=true", {"dsn": "postgresql://?sslmode=require"}),
        ("postgresql://h/d?target_session_attrs=read-write", {"database": "d"}),
    ],
)
def test_connection_strings_of_psql(text: str, made: dict[str, Any]) -> None:
    found = arguments(text)
    assert {key: found.get(key) for key in made} == made


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mysql://u:pa55word@h/d", "write postgresql://"),
        ("postgresql://h/d?aplication_name=x", "aplication_name; did you mean application_name?"),
        ("postgresql://h/d?search_path=x", "options=-c search_path="),
        ("ada:pa55word@h/d", "write postgresql://user@host/name"),
        ("postgresql://u:pa55/word@h/d", "port that is not a number"),
        ("postgresql://u:x?pa55word@h/d", "percent escapes"),
        ("postgresql://h/d?channel_binding=require", "channel_binding=require"),
        (
            "postgresql://h/d?requirepeer=postgres",
            "requirepeer of the database is not",
        ),
        (
            f"postgresql://h/d?scram_client_key={SECRET}",
            "not supported; leave it out",
        ),
        ("postgresql://h/d?sslcertmode=require", "write sslcertmode=allow"),
        ("postgresql://h/d?gssencmode=require", "gssencmode=require"),
        ("postgresql://h/d?client_encoding=latin1", "client_encoding=latin1"),
        ("postgresql://h/d?connect_timeout=soon", "connect_timeout"),
        ("postgresql://h/d?target_session_attrs=rw", "write target_session_attrs=any"),
        ("postgresql://h/d?sslmode=verify-full&sslrootcert=/no/ca", "sslrootcert of the"),
        ("postgresql://h/d?sslmode=require&sslkey=/no/key", "/no/key: No such file"),
        ("postgresql://h/d?sslrootcert=system&sslmode=require", "needs sslmode=verify-full"),
        ("host=h password='pa55word", "quote values"),
        ("host=h pa55word", "quote values"),
        ("host=a,b port=1,2,3", "2 hosts and 3 ports"),
        ("port=99999", "port of the database"),
        ("service=nope", "no service nope in"),
    ],
)
def test_rejected_parameters_are_named(text: str, words: str) -> None:
    with pytest.raises(SettingsError) as raised:
        arguments(text)
    assert words in str(raised.value)
    assert SECRET not in str(raised.value)
    assert "pa55" not in str(raised.value)


def test_the_string_precedes_the_service_and_the_environment(home: Path) -> None:
    (home / ".pg_service.conf").write_text("[app]\nhost=of-service\ndbname=of-service\nport=1\n")
    variables = {"PGHOST": "of-env", "PGUSER": "of-env", "PGSERVICE": "app"}
    made = arguments("postgresql:///of-url", **variables)
    assert made == {"host": ["of-service"], "port": 1, "database": "of-url", "user": "of-env"}
    assert arguments("service=app", PGHOST="of-env") == arguments("", PGSERVICE="app")
    assert conninfo.is_set({"PGSERVICE": "app"})
    assert not conninfo.is_set({"PGUSER": "ada"})


def test_a_password_file_with_escapes(home: Path) -> None:
    file = home / "passwords"
    file.write_text(
        "# none\nh:*:*:x:no\nh:5432:a\\:b:ada:p\\:a\\\\:s\n/own:*:*:*:own\nlocalhost:*:*:*:socket\n"
    )
    file.chmod(0o600)
    variables = {"PGPASSFILE": str(file), "PGUSER": "ada"}
    escaped = arguments("postgresql://h/a%3Ab", **variables)["password"]
    assert escaped() == r"p:a\:s"
    assert arguments("host=/own", **variables)["password"]() == "own"
    assert arguments("host=/run/pg", **variables)["password"]() == "socket"
    assert "password" not in arguments("postgresql://other/a", **variables)
    assert conninfo.complete("host=/own", variables)["password"] == "own"
    file.write_text("h:*:*:*:changed\n")  # before the next connection of a pool
    assert escaped() == "changed"
    file.chmod(0o644)
    assert "password" not in arguments("postgresql://h/a%3Ab", **variables)


def test_the_default_user_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in psql, whatever variables say; they count if the user has no name."""
    monkeypatch.setenv("LOGNAME", "mallory")
    assert arguments("app")["user"] == pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setattr(os, "geteuid", lambda: 2**31 - 5)
    assert arguments("app")["user"] == "mallory"


def test_the_authorities_of_the_system() -> None:
    context = arguments("postgresql://h/d?sslrootcert=system")["ssl"]
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)


async def test_the_server_accepts_the_parameters(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = "SELECT current_setting('application_name'), current_setting('geqo'), current_user"
    for key, value in conninfo.parse(database).items():
        monkeypatch.setenv({"dbname": "PGDATABASE"}.get(key, f"PG{key.upper()}"), value)
    for text in (
        "application_name=x options='-c geqo=off' connect_timeout=5",
        "postgresql:///?application_name=x&options=-c%20geqo%3Doff&keepalives_idle=5",
    ):
        connection = await connections.connect(shard(text))
        assert tuple(await connection.fetchrow(shown)) == ("x", "off", "postgres")
        await connection.close()
