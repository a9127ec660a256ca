"""`sequencerd doctor` and `watch`: what they find, and that they find it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from aiosmtpd.controller import Controller
from pydantic import SecretStr

from sequencerd.cli import doctor as command
from sequencerd.service import diagnosis
from sequencerd.service.diagnosis import Diagnosis
from sequencerd.settings import DatabaseSettings, Settings
from sequencerd.storage.connections import Shard
from sequencerd.storage.statements import QUERIES
from tests.helpers.command_line import Command, beside
from tests.helpers.databases import make_login, shard, with_login
from tests.helpers.engines import define, enroll, running_engine
from tests.helpers.pooler import pgbouncer
from tests.helpers.servers import Answer, Request, certificate, http_server, smtp_server
from tests.helpers.waiting import PATIENCE

READ_ONLY = (
    "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on',"
    " current_database()); END $$"
)
Findings = Mapping[str, Diagnosis]


async def examine(url: str, **settings: Any) -> Findings:
    read = Settings.model_validate(settings)
    return {finding.about: finding async for _, finding in command.examine([shard(url)], read)}


async def test_doctor_finds_no_problem(database: str, connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("a", "GoTo", "{}", None))
    async with running_engine(database):
        found = await examine(database)
    wrong = {about: f.seen for about, f in found.items() if f.level != "ok"}
    assert wrong == {"roles": "this user is a superuser"}
    assert len(found) == 21


@pytest.mark.parametrize(
    "wrong",
    [
        ("schema", "error", "no schema sequencer yet", "DROP SCHEMA sequencer CASCADE"),
        (
            "holidays",
            "warning",
            "DE ends on 2001-01-01",
            """UPDATE sequencer.sequences SET time_window = '{"holidays": "DE"}';
            INSERT INTO sequencer.holidays VALUES ('DE', '2001-01-01'), ('FR', '2001-01-01')""",
        ),
        (
            "rates",
            "ok",
            "reached in the last hour: Email at 2.5 per second",
            """INSERT INTO sequencer.rates VALUES ('Email', 2.5, now(), now()),
            ('SMS', 9, now(), now() - interval '2 hours')""",
        ),
        (
            "triggers",
            "error",
            "wake_on_change on enrollments",
            "ALTER TABLE sequencer.enrollments DISABLE TRIGGER wake_on_change",
        ),
        (
            "triggers",
            "error",
            "record_revision on sequences",
            "DROP TRIGGER record_revision ON sequencer.sequences",
        ),
        (
            "vacuum",
            "error",
            "autovacuum is off",
            "ALTER TABLE sequencer.enrollments SET (autovacuum_enabled = false)",
        ),
        ("history", "warning", "no partition", "SELECT sequencer_test_drop_partitions()"),
        ("daemons", "warning", "none connected", "SELECT 1"),
        (
            "overdue",
            "warning",
            "1 enrollment, the oldest for 1 h",
            "UPDATE sequencer.enrollments SET wake_at = now() - interval '1 hour'",
        ),
        (
            "failed",
            "warning",
            "1 with bad_data",
            "UPDATE sequencer.enrollments SET status = 'failed', failure = 'bad_data'",
        ),
        (
            "failed",
            "warning",
            "1 set by hand",
            "UPDATE sequencer.enrollments SET status = 'failed'",
        ),
        (
            "history",
            "warning",
            "events are outside of the partitions",
            """INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)
            VALUES (1, '2001-01-01Z', 's', 'a', 1, 'next')""",
        ),
        (
            "history",
            "warning",
            "events are in the future, until 2999-01-01",
            """INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)
            VALUES (1, '2999-01-01Z', 's', 'a', 1, 'next')""",
        ),
        (
            "ids",
            "error",
            "enrollments_id_seq is behind 1, sequencer.revision_numbers is behind ",
            """ALTER SEQUENCE sequencer.enrollments_id_seq RESTART;
            ALTER SEQUENCE sequencer.revision_numbers RESTART""",
        ),
        (
            "steps",
            "error",
            "s/a: it is wrong",
            "UPDATE sequencer.steps SET problem = 'it is wrong'",
        ),
        (
            "lookup app.nothing",
            "error",
            "no such function",
            "UPDATE sequencer.sequences SET lookup = 'app.nothing'",
        ),
        (
            "server",
            "error",
            "read-only",
            READ_ONLY,
        ),
        (
            "server",
            "error",
            "idle_session_timeout is 4 s",
            READ_ONLY.replace("default_transaction_read_only = on", "idle_session_timeout = 4000"),
        ),
    ],
)
async def test_problems_are_found(
    database: str, connection: asyncpg.Connection, wrong: tuple[str, str, str, str]
) -> None:
    about, level, words, statement = wrong
    await define(connection, "s", ("a", "GoTo", "{}", None))
    await enroll(connection, "s", "ada")
    await connection.execute(
        "CREATE FUNCTION sequencer_test_drop_partitions() RETURNS void LANGUAGE plpgsql AS $$"
        " DECLARE name text; BEGIN FOR name IN SELECT inhrelid::regclass FROM pg_inherits"
        " WHERE inhparent = 'sequencer.events'::regclass LOOP"
        " IF name NOT LIKE '%other' THEN EXECUTE 'DROP TABLE ' || name; END IF; END LOOP; END $$"
    )
    await connection.execute(statement)
    finding = (await examine(database))[about]
    assert finding.level == level
    assert words in finding.seen
    assert finding.advice


async def test_checks_without_problems_are_described(
    database: str, connection: asyncpg.Connection
) -> None:
    found = await examine(database)
    assert found["time zones"].seen == "none in use; the server has the same rules"
    await define(connection, "s", ("a", "GoTo", "{}", None))
    await enroll(connection, "s", "ada")
    await connection.execute("ANALYZE sequencer.enrollments")
    found = await examine(database)
    for about, words in (
        ("time zones", "1 in use; the server has the same rules"),
        ("old transactions", "none older than 10 min"),
        ("overdue", "none"),
        ("failed", "none"),
        ("holidays", "none used"),
        ("history", "has its partition for this month"),
        ("brakes", "none has paused a sequence"),
        ("ids", "the next ones are free"),
    ):
        assert (found[about].level, found[about].seen) == ("ok", words)


async def test_a_transaction_that_was_left_open(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "MAX_TRANSACTION_AGE", timedelta(0))
    async with connection.transaction(isolation="repeatable_read"):
        await connection.fetch("SELECT 1")
        finding = (await examine(database))["old transactions"]
    assert finding.level == "warning"
    assert f"process {connection.get_server_pid()} of postgres" in finding.seen


async def test_a_user_with_too_few_privileges(
    database: str, connection: asyncpg.Connection
) -> None:
    login = await make_login(connection, database, "login_enroller", "enroller")
    found = await examine(login)
    assert found["roles"].level == "warning"
    assert "this user lacks DELETE, INSERT" in found["roles"].seen
    assert "GRANT sequencer_daemon" in found["roles"].advice


async def test_ids_that_would_be_generated_again_are_repaired_by_the_advice(
    database: str, connection: asyncpg.Connection
) -> None:
    """As after a logical replication, which copies no sequence of PostgreSQL."""
    await define(connection, "s", ("a", "GoTo", "{}", None))
    await enroll(connection, "s", "ada")
    await connection.execute("ALTER SEQUENCE sequencer.enrollments_id_seq RESTART")
    found = (await examine(database))["ids"]
    _, _, repair = found.advice.partition(": ")
    await connection.execute(repair)
    assert (await examine(database))["ids"].seen == "the next ones are free"
    await enroll(connection, "s", "bob")
    daemon = await make_login(connection, database, "login_daemon", "daemon")
    assert "only the schema's owner" in (await examine(daemon))["ids"].seen


async def test_a_statement_timeout_that_is_too_short_is_named(
    database: str, connection: asyncpg.Connection, sequencerd: Command
) -> None:
    async with connection.transaction():
        await connection.execute("LOCK TABLE sequencer.migrations, sequencer.enrollments")
        limited = f"{database}&options=-c%20statement_timeout=500"
        found = (await examine(limited))["schema"]
        sequencerd("--database", limited, "status", code=1)
    advice = "if statement_timeout is set for this user or database, set it to 0"
    assert found.advice == advice
    assert sequencerd.errors.endswith(f"statement timeout; {advice}\n")


async def test_an_unreachable_database() -> None:
    found = await examine("postgresql://127.0.0.1:1/x")
    assert list(found) == ["database"]
    assert "cannot connect" in found["database"].seen


@pytest.mark.parametrize(
    ("url", "seen", "advice"),
    [
        ("postgresql://127.0.0.1:1/x", "refused|Connect", "start it, or correct database.url"),
        ("nonsense://x", "begins with", "correct database.url"),
        ("{with_login}", "sequencer_test_absent", "correct the user and the password in database"),
        ("{absent}", "does not exist", "create the database, or correct database.url"),
    ],
)
async def test_only_a_server_that_does_not_answer_is_to_be_started(
    database: str, url: str, seen: str, advice: str
) -> None:
    known = {
        "with_login": with_login(database, "sequencer_test_absent"),
        "absent": urlsplit(database)._replace(path="/sequencer_test_absent").geturl(),
    }
    found = (await examine(url.format(**known)))["database"]
    assert re.search(seen, found.seen)
    assert found.advice.startswith(advice)


async def test_the_setting_of_a_shard_is_named() -> None:
    one = Shard("postgresql://127.0.0.1:1/x", name="a")
    settings = DatabaseSettings(listen_url=SecretStr(one.url))
    (found,) = [finding async for finding in command._examine_shard(one, settings, set(), {})]
    assert found.advice == "start it, or correct shards.a.listen_url"


async def test_a_mail_server_that_refuses_the_login_is_not_to_be_started(database: str) -> None:
    async with smtp_server(password="right") as server:
        url = f"smtp://ada:wrong@127.0.0.1:{server.port}"
        found = (await examine(database, email={"url": url}))["mail server"]
    assert "refuses the login: 535" in found.seen
    assert found.advice == "correct [email], or see the log of the server"


async def test_a_notification_that_does_not_arrive(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "ROUND_TRIP", 0.2)
    monkeypatch.setitem(QUERIES, "notify", "SELECT $1::text")
    finding = (await examine(database))["notifications"]
    assert finding.level == "error"
    assert "direct connection" in finding.advice


async def test_polling_instead_of_listen(database: str, connection: asyncpg.Connection) -> None:
    finding = (await examine(database, database={"listen": False}))["notifications"]
    assert finding.level == "warning"
    assert "poll every 1 s" in finding.seen
    assert "listen_url" in finding.advice


@pytest.mark.parametrize(
    ("of_pooler", "listen", "found"),
    [
        ("transaction", True, "error: a pooler in transaction mode breaks LISTEN"),
        ("transaction", False, "ok: in use, as configured"),
        ("session", True, "error: in session mode; the daemon cannot connect: unsupported"),
        ("session\nignore_startup_parameters = sequencer.notify", True, "ok: in session mode"),
    ],
)
@pytest.mark.usefixtures("connection")
async def test_a_pooler_without_its_settings_is_an_error(
    database: str, tmp_path: Path, of_pooler: str, listen: bool, found: str
) -> None:
    mode, _, settings = of_pooler.partition("\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnosis, "ROUND_TRIP", 0.5 if mode == "transaction" else PATIENCE)
        with pgbouncer(database, tmp_path, mode=mode, settings=settings) as through:
            finding = (await examine(through, database={"listen": listen}))["pooler"]
    assert f"{finding.level}: {finding.seen}".startswith(found)
    assert ("ignore_startup_parameters" in finding.advice) == ("cannot connect" in found)


async def test_a_direct_connection_beside_a_pooler(
    database: str, connection: asyncpg.Connection
) -> None:
    settings = {"url": database, "listen_url": database}
    assert "uses none" in (await examine(database, database=settings))["pooler"].seen
    settings["url"] = "postgresql://127.0.0.1:1/x"
    finding = (await examine(database, database=settings))["pooler"]
    assert (finding.level, "cannot connect" in finding.seen) == ("error", True)


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


async def test_reachable_endpoints_are_ok(database: str, connection: asyncpg.Connection) -> None:
    async def respond(request: Request) -> Answer:
        seen.append((request.method, request.target))
        return Answer(status=200 if request.target.endswith(".json") else 405)

    seen: list[tuple[str, str]] = []
    mail = Controller(object(), hostname="127.0.0.1", port=closed_port())
    mail.start()
    await connection.execute("CREATE SCHEMA app")
    await connection.execute(
        "CREATE FUNCTION app.plans(text[]) RETURNS TABLE (subject text, data jsonb)"
        " LANGUAGE sql AS $$ SELECT '', '{}'::jsonb $$"
    )
    await define(connection, "s", ("a", "GoTo", "{}", None))
    await connection.execute("UPDATE sequencer.sequences SET lookup = 'app.plans'")
    try:
        async with http_server(respond) as server:
            found = await examine(
                database,
                email={"url": f"smtp://127.0.0.1:{mail.port}"},
                sms={"account_sid": "AC1", "auth_token": "t", "base_url": server.url},
                runners={"Crm": {"url": f"{server.url}/crm"}},
                lookups={"plans": {"url": f"{server.url}/plans"}},
            )
    finally:
        mail.stop()
    ends = {
        about: found[about].seen
        for about in ("mail server", "Twilio", "runner Crm", "lookup plans", "lookup app.plans")
    }
    assert ends == {
        "mail server": f"127.0.0.1:{mail.port} is ready for mail",
        "Twilio": "accepts the login",
        "runner Crm": "reachable; responds to GET with 405",
        "lookup plans": "reachable; responds to GET with 405",
        "lookup app.plans": "is an SQL function",
    }
    assert {method for method, _ in seen} == {"GET"}  # what changes nothing


async def test_unreachable_endpoints_are_errors_without_secrets(
    database: str, connection: asyncpg.Connection
) -> None:
    port = closed_port()
    await define(connection, "s", ("a", "Email", "{}", None))

    async def respond(_: Request) -> Answer:
        return Answer(status=401)

    async with http_server(respond) as server:
        found = await examine(
            database,
            email={"url": f"smtp://user:secret@127.0.0.1:{port}"},
            sms={"account_sid": "AC1", "auth_token": "token", "base_url": server.url},
            runners={"Crm": {"url": f"http://127.0.0.1:{port}"}},
        )
    for about, words in (
        ("mail server", f"127.0.0.1:{port}"),
        ("Twilio", "rejects the login with 401"),
        ("runner Crm", "127.0.0.1"),
    ):
        assert found[about].level == "error", found[about]
        assert words in found[about].seen
        assert found[about].advice
    assert not any("secret" in f.seen or "token" in f.seen for f in found.values())


async def test_an_endpoint_that_hangs_up_is_not_to_be_started(
    database: str, connection: asyncpg.Connection
) -> None:
    async def respond(_: Request) -> Answer:
        return Answer(raw=b"")

    async with http_server(respond) as server:
        found = (await examine(database, runners={"Crm": {"url": server.url}}))["runner Crm"]
    assert found.level == "error"
    assert found.advice == "see its log, or correct its url"


async def test_a_server_without_a_valid_certificate_is_not_to_be_started(
    database: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    """Nor one that does not speak TLS."""

    async def respond(_: Request) -> Answer:
        return Answer()

    async def answer_plainly(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    context, _ = certificate(tmp_path)
    async with (
        http_server(respond, context) as https,
        await asyncio.start_server(answer_plainly, "127.0.0.1", 0) as plain,
    ):
        port = plain.sockets[0].getsockname()[1]
        found = await examine(
            database,
            email={"url": https.url.replace("https:", "smtps:")},
            runners={
                "Untrusted": {"url": https.url},
                "Plain": {"url": f"https://127.0.0.1:{port}/"},
            },
        )
    for about in ("mail server", "runner Untrusted", "runner Plain"):
        assert found[about].level == "error"
        assert found[about].advice.startswith("correct "), found[about]


async def test_a_database_without_tls_is_not_to_be_started() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)
        writer.write(b"N")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"postgresql://ada@127.0.0.1:{port}/app?sslmode=require"
        found = (await examine(url))["database"]
    assert "rejected SSL upgrade" in found.seen
    assert found.advice == "correct sslmode in database.url, or turn on TLS at the server"


async def test_the_exit_code_says_whether_there_is_an_error(
    sequencerd: Command, connection: asyncpg.Connection
) -> None:
    text = sequencerd("doctor")
    assert "ok       server: PostgreSQL" in text
    assert "WARNING  daemons: none connected\n         start one: sequencerd run\n" in text
    await connection.execute("ALTER TABLE sequencer.steps DISABLE TRIGGER ALL")
    findings = json.loads(sequencerd("doctor", "--json", code=1))
    levels = {one["about"]: one["level"] for one in findings}
    assert (levels["triggers"], levels["server"]) == ("error", "ok")


async def test_watch_shows_changes(sequencerd: Command, connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("a", "GoTo", "{}", None))
    async with beside(sequencerd, "watch", "s", "--interval", "0.1") as (out, _):
        while b"+0" not in await out.readline():
            pass
        await enroll(connection, "s", "ada")
        while b"+1" not in await out.readline():
            pass
    sequencerd("watch", "--interval", "x", code=2)
    assert "not a number of seconds" in sequencerd.errors
    sequencerd("watch", "nowhere", code=1)
    assert "'nowhere' does not exist" in sequencerd.errors


async def test_enrollments_that_wait_for_a_runner_that_is_down(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("a", "Email", "{}", None))
    await enroll(connection, "s", "ada")
    await connection.execute(
        "UPDATE sequencer.enrollments SET wake_at = now() - interval '1 hour';"
        "INSERT INTO sequencer.daemons (name, started_at, alive_until)"
        " VALUES ('d', now(), now() + interval '1 hour');"
        "INSERT INTO sequencer.problems (daemon, kind, about, since, message, waiting)"
        " VALUES ('d', 'runner', 'Email', '2026-03-02T10:00Z', 'mail.x.test refuses', 1240)"
    )
    found = await examine(database)
    assert found["overdue"].level == "ok"
    since = "Email has been down since 2026-03-02 10:00:00Z"
    told = f"{since}, 1,240 enrollments waiting: mail.x.test refuses"
    assert found["problems"].seen == told
    await connection.execute("UPDATE sequencer.daemons SET alive_until = now() - interval '1 hour'")
    found = await examine(database)
    assert found["overdue"].level == "warning"
    assert found["problems"].level == "ok"


def test_a_dynamic_user_needs_a_name(tmp_path: Path) -> None:
    """For peer authentication over a socket."""
    unit = tmp_path / "etc/systemd/system/sequencerd.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nDynamicUser=yes\n")
    names = tmp_path / "etc/nsswitch.conf"
    names.write_text("passwd: files\n")
    found = command._name_service("postgresql:///app", tmp_path)
    assert found
    assert (found.level, "libnss-systemd" in found.advice) == ("warning", True)
    assert command._name_service("postgresql://host/app", tmp_path) is None
    names.write_text("passwd: files systemd\n")
    found = command._name_service("host=/run/postgresql", tmp_path)
    assert found
    assert found.level == "ok"


async def test_the_search_by_address_may_need_an_index(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", '{"amount": 1, "unit": "day"}', None))
    await enroll(connection, "s", "ada")
    await enroll(connection, "s", "bob")
    assert (await examine(database))["e-mail search"].seen == "needs no index yet"
    monkeypatch.setattr(diagnosis, "EMAILS_SEARCHED", 1)
    found = (await examine(database))["e-mail search"]
    assert found.level == "ok"
    await connection.execute(found.advice.partition(": ")[2])
    assert (await examine(database))["e-mail search"].seen == "has its index"
