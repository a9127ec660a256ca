"""Find problems that would keep a daemon from working on time. Changes nothing."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import uuid4
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import asyncpg

from sequencerd.core.describe import counted, duration, text
from sequencerd.core.routing import ShardNumber
from sequencerd.errors import SequencerdError
from sequencerd.settings import DatabaseSettings
from sequencerd.storage import connections, migrate, migrations, server
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, with_hint
from sequencerd.storage.every_shard import differences
from sequencerd.storage.listener import POLL_INTERVAL, PROBE_INTERVAL
from sequencerd.storage.schemas import in_schema, schema_of
from sequencerd.storage.statements import QUERIES

Level = Literal["ok", "warning", "error"]

ROUND_TRIP = 5.0  # seconds for a notification
MAX_CLOCK_OFFSET = timedelta(seconds=1)
MAX_TRANSACTION_AGE = timedelta(minutes=10)
HOLIDAYS_AHEAD = timedelta(days=60)
MAX_EXAMPLES = 5
MAX_PROBLEMS = 1000
EMAILS_SEARCHED = 10_000  # enrollments in which the console looks for an address without an index
EMAIL_INDEX = (
    "CREATE INDEX CONCURRENTLY enrollments_email ON sequencer.enrollments (lower(data->>'email'));"
)
WITHOUT_SCHEMA = ("pooler", "notifications", "clock", "old transactions")
"""The checks that still run if the schema cannot be used."""

_TRIGGER = re.compile(
    r"^CREATE (?:CONSTRAINT )?TRIGGER (\w+)\s.*?\sON sequencer\.(\w+)", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The subject of a check, its result, and what to do."""

    about: str
    seen: str
    level: Level = "ok"
    advice: str = ""


def advise(error: SequencerdError, setting: str) -> str:
    """Return what to do if the database of a setting cannot be connected to. A server that answers
    is not to be started.
    """
    match error.__cause__:
        case asyncpg.InvalidAuthorizationSpecificationError():
            return f"correct the user and the password in {setting}, or the server's pg_hba.conf"
        case asyncpg.InvalidCatalogNameError():
            return f"create the database, or correct {setting}"
        case asyncpg.InsufficientPrivilegeError():
            return f"GRANT CONNECT on the database TO the user, or correct {setting}"
        case asyncpg.TooManyConnectionsError():
            return "close other connections, or raise the limit"
        case asyncpg.CannotConnectNowError():
            return "wait until it accepts connections, or see the log of the server"
        case ssl.SSLError():
            return f"correct sslmode and the certificates in {setting}"
        case ConnectionError() as cause if "rejected SSL" in str(cause):  # asyncpg has no type
            return f"correct sslmode in {setting}, or turn on TLS at the server"
        case OSError():
            return f"start it, or correct {setting}"
    return f"correct {setting}"


DiagnosisCheck = Callable[[asyncpg.Connection], Awaitable[Diagnosis]]

NOT_LISTENING = Diagnosis(
    "notifications",
    f"database.listen is false: daemons poll every {POLL_INTERVAL:g} s",
    "warning",
    "set database.listen_url to the server's own address",
)


def checks_of(shard: Shard, settings: DatabaseSettings) -> dict[str, DiagnosisCheck]:
    """Return the checks of a database, in order, including those of the settings."""

    async def listening(connection: asyncpg.Connection) -> Diagnosis:
        return await _listening(connection, shard) if settings.listen else NOT_LISTENING

    of_settings: dict[str, DiagnosisCheck] = {}
    if (number := shard.number) is not None:
        of_settings["shard"] = lambda connection: _checked(
            connection, "shard", f"{number}, as in the settings", number
        )
    of_settings["pooler"] = lambda connection: _pooler(connection, shard, settings)
    of_settings["notifications"] = listening
    return FIRST_CHECKS | of_settings | LATER_CHECKS


async def run_check(about: str, check: DiagnosisCheck, connection: asyncpg.Connection) -> Diagnosis:
    """Run a check and return its result. A check that cannot run is an error as well."""
    try:
        found = await check(connection)
        return replace(found, advice=in_schema(found.advice, schema_of(connection)))
    except asyncpg.InsufficientPrivilegeError as error:
        advice = "GRANT sequencer_daemon TO the user of this command"
        if await connection.fetchval(QUERIES["has_role"], "sequencer_daemon"):
            advice = "run `sequencerd grants --apply` as an administrator"
        return Diagnosis(about, f"cannot be checked: {with_hint(error)}", "error", advice)
    except asyncpg.QueryCanceledError as error:
        advice = "if statement_timeout is set for this user or database, set it to 0"
        return Diagnosis(about, f"cannot be checked: {error.args[0]}", "error", advice)
    except (SequencerdError, *TRANSIENT_ERRORS, ValueError) as error:
        text = with_hint(error) if isinstance(error, asyncpg.PostgresError) else str(error)
        seen = f"cannot be checked: {text or type(error).__name__}"
        return Diagnosis(about, seen, "error", "see the log of the server")


# --- the database


async def _server(connection: asyncpg.Connection) -> Diagnosis:
    row = await connection.fetchrow(QUERIES["server_facts"])
    version = f"PostgreSQL {row['version']}"
    if row["is_standby"]:
        advice = "name all servers in database.url, with ?target_session_attrs=read-write"
        return Diagnosis("server", f"{version}, a standby: nothing can be written", "error", advice)
    if row["is_read_only"]:
        advice = "set default_transaction_read_only = off for this user and database"
        return Diagnosis("server", f"{version}; transactions are read-only", "error", advice)
    if timedelta(0) < row["idle_timeout"] <= timedelta(seconds=PROBE_INTERVAL):
        seen = f"{version}; idle_session_timeout is {row['idle_timeout'].total_seconds():g} s"
        advice = (
            f"set it to 0 or to more than {PROBE_INTERVAL:g} s for this user: "
            "it closes the LISTEN connection, which is probed at that interval"
        )
        return Diagnosis("server", seen, "error", advice)
    if await server.is_on_citus(connection):
        return await _citus(connection, f"{version}, tables distributed by Citus")
    return Diagnosis("server", version)


async def _citus(connection: asyncpg.Connection, seen: str) -> Diagnosis:
    if rows := await connection.fetch(QUERIES["citus_settings"]):
        named = [f"{row['name']} = '{row['value']}'" for row in rows]
        advice = " and ".join(f"ALTER DATABASE ... SET {setting}" for setting in named)
        return Diagnosis("server", f"{seen} without {_some(named)}", "error", advice)
    return Diagnosis("server", f"{seen}: daemons poll every 10 to 100 ms")


async def _schema(connection: asyncpg.Connection) -> Diagnosis:
    return await _checked(connection, "schema", f"{migrations.available()[-1].name} is applied")


async def _checked(
    connection: asyncpg.Connection, about: str, seen: str, number: ShardNumber | None = None
) -> Diagnosis:
    """Check the schema, and the number of the shard if there is one."""
    try:
        await migrate.check(connection, number)
    except SequencerdError as error:
        what, _, advice = str(error).partition("; ")
        return Diagnosis(about, what, "error", advice)
    return Diagnosis(about, seen)


async def _triggers(connection: asyncpg.Connection) -> Diagnosis:
    wanted = {
        (table, name)
        for migration in migrations.available()
        for name, table in _TRIGGER.findall(migration.sql)
    }
    rows = await connection.fetch(QUERIES["present_triggers"])
    fire = {(row["table"], row["name"]) for row in rows if row["fires"]}
    if missing := sorted(wanted - fire):
        named = _some(f"{name} on {table}" for table, name in missing)
        advice = "ALTER TABLE sequencer.TABLE ENABLE TRIGGER ALL; create dropped triggers again"
        return Diagnosis("triggers", f"dropped or disabled: {named}", "error", advice)
    return Diagnosis("triggers", f"all {len(wanted)} fire")


async def _roles(connection: asyncpg.Connection) -> Diagnosis:
    if hidden := await server.hidden_tables(connection):
        advice = "GRANT sequencer_daemon TO the user, or give it a policy USING (true)"
        seen = f"row-level security may hide rows: {_some(map(str, hidden))}"
        return Diagnosis("roles", seen, "error", advice)
    if missing := await connection.fetch(QUERIES["missing_grants"]):
        named = _some((row["statement"] for row in missing), between=" ")
        advice = "run `sequencerd grants --apply` as an administrator"
        return Diagnosis(
            "roles", f"{counted(len(missing), 'grant')} missing: {named}", "warning", advice
        )
    if lacking := await connection.fetch(QUERIES["lacking_privileges"]):
        named = _some(row["missing"] for row in lacking)
        advice = "if a daemon runs as this user, GRANT sequencer_daemon TO it"
        return Diagnosis("roles", f"this user lacks {named}", "warning", advice)
    if await connection.fetchval(QUERIES["is_superuser"]):
        advice = "run the daemon as a user with the privileges of sequencer_daemon only"
        return Diagnosis("roles", "this user is a superuser", "warning", advice)
    return Diagnosis("roles", "this user has the privileges of a daemon")


async def _pooler(
    connection: asyncpg.Connection, shard: Shard, settings: DatabaseSettings
) -> Diagnosis:
    if await _is_pooled(connection):
        return await _pooled(connection, shard, settings)
    if settings.listen_url is None or settings.url is None:
        return Diagnosis("pooler", "none")
    try:
        through = await connections.connect(Shard(settings.url.get_secret_value()))
    except SequencerdError as error:
        return Diagnosis("pooler", str(error), "error", advise(error, "database.url"))
    try:
        seen = "listen_url bypasses it" if await _is_pooled(through) else "url uses none"
    finally:
        await through.close()
    return Diagnosis("pooler", seen)


async def _pooled(
    connection: asyncpg.Connection, shard: Shard, settings: DatabaseSettings
) -> Diagnosis:
    if not settings.listen:
        return Diagnosis("pooler", "in use, as configured")
    if (await _listening(connection, shard)).level == "error":
        advice = "set database.listen_url to the server's own address, or listen = false"
        return Diagnosis("pooler", "a pooler in transaction mode breaks LISTEN", "error", advice)
    try:
        pool = await connections.connect_pool(shard, 1, pooled=settings.pooled)
    except asyncpg.PostgresError as error:
        seen = f"in session mode; the daemon cannot connect: {error.args[0]}"
        return Diagnosis("pooler", seen, "error", connections.advice_on_pooler(error) or "")
    await pool.close()
    return Diagnosis("pooler", "in session mode")


async def _is_pooled(connection: asyncpg.Connection) -> bool:
    row = await connection.fetchrow(QUERIES["server_facts"])
    return bool(row["pid"] != connection.get_server_pid())


async def _listening(connection: asyncpg.Connection, shard: Shard) -> Diagnosis:
    """Listen on a separate connection, as the daemon does."""
    channel, heard = f"sequencer_{uuid4().hex}", asyncio.Event()
    listener = await connections.connect(shard)
    try:
        await listener.add_listener(channel, lambda *_: heard.set())
        begun = time.perf_counter()
        await connection.execute(QUERIES["notify"], channel)
        async with asyncio.timeout(ROUND_TRIP):
            await heard.wait()
        took = (time.perf_counter() - begun) * 1000
    except TimeoutError:
        advice = "LISTEN needs a direct connection; without it everything waits for the next sweep"
        seen = f"none received within {ROUND_TRIP:g} s"
        return Diagnosis("notifications", seen, "error", advice)
    finally:
        listener.terminate()
    return Diagnosis("notifications", f"received after {took:.1f} ms")


async def _clock(connection: asyncpg.Connection) -> Diagnosis:
    before = datetime.now(UTC)
    there = await connection.fetchval(QUERIES["server_time"])
    offset = there - (before + (datetime.now(UTC) - before) / 2)
    seen = f"the database's clock is {abs(offset.total_seconds()):.3f} s " + (
        "ahead of this machine's" if offset > timedelta(0) else "behind this machine's"
    )
    if abs(offset) > MAX_CLOCK_OFFSET:
        advice = "synchronise both with NTP; the database's clock decides what is due"
        return Diagnosis("clock", seen, "warning", advice)
    return Diagnosis("clock", seen)


async def _time_zones(connection: asyncpg.Connection) -> Diagnosis:
    unknown, other = set(), set()
    rows = await connection.fetch(QUERIES["zones_in_use"])
    for row in rows:
        name = row["timezone"]
        try:
            local = row["at"].astimezone(ZoneInfo(name)).replace(tzinfo=None)
        except (ZoneInfoNotFoundError, ValueError):
            unknown.add(name)
        else:
            if local != row["local"]:
                other.add(name)
    if unknown:
        advice = "correct the sequence's timezone; the IANA database lists the names"
        return Diagnosis(
            "time zones", f"unknown on this machine: {_some(sorted(unknown))}", "error", advice
        )
    if other:
        advice = "update tzdata on this machine, which the daemon uses, or on the server"
        seen = f"rules differ from the server's for {_some(sorted(other))}"
        return Diagnosis("time zones", seen, "warning", advice)
    count = len({row["timezone"] for row in rows})
    return Diagnosis("time zones", f"{count or 'none'} in use; the server has the same rules")


async def _vacuum(connection: asyncpg.Connection) -> Diagnosis:
    row = await connection.fetchrow(QUERIES["vacuum_facts"])
    if not (row["is_on"] and row["counts"]) or "autovacuum_enabled=false" in row["options"]:
        advice = "set autovacuum and track_counts on; ALTER TABLE ... RESET (autovacuum_enabled)"
        return Diagnosis("vacuum", "autovacuum is off for enrollments", "error", advice)
    seen = f"enrollments: {counted(row['live'], 'row')}, {row['dead']:,} dead"
    if row["dead"] > 10_000 and row["dead"] > row["live"]:
        advice = "VACUUM sequencer.enrollments; see whether old transactions block autovacuum"
        return Diagnosis("vacuum", seen, "warning", advice)
    return Diagnosis("vacuum", seen)


async def _old_transactions(connection: asyncpg.Connection) -> Diagnosis:
    rows = await connection.fetch(QUERIES["old_snapshots"], MAX_TRANSACTION_AGE)
    if rows:
        named = _some(
            row["what"] + (f" for {duration(row['age'].total_seconds())}" if row["age"] else "")
            for row in rows
        )
        advice = (
            "end them, or set idle_in_transaction_session_timeout: dead rows accumulate meanwhile"
        )
        return Diagnosis("old transactions", named, "warning", advice)
    return Diagnosis(
        "old transactions", f"none older than {duration(MAX_TRANSACTION_AGE.total_seconds())}"
    )


async def _history(connection: asyncpg.Connection) -> Diagnosis:
    row = await connection.fetchrow(QUERIES["partition_facts"])
    if row["ahead"] is not None:
        advice = (
            "the server's clock was ahead: enrollments that moved then wait for too long, and "
            "docs/reliability.md shows how to continue them"
        )
        seen = f"events are in the future, until {row['ahead']:%Y-%m-%d}"
        return Diagnosis("history", seen, "warning", advice)
    if row["has_others"] or not row["has_month"]:
        advice = "start a daemon, which adds them; or SELECT sequencer.add_event_partitions()"
        seen = "events are outside of the partitions of their months"
        if not row["has_month"]:
            seen = "there is no partition for this month"
        return Diagnosis("history", seen, "warning", advice)
    return Diagnosis("history", "has its partition for this month")


# --- the work


async def _ids(connection: asyncpg.Connection) -> Diagnosis:
    if await server.is_on_citus(connection):
        return Diagnosis("ids", "not checked: several nodes generate them")
    rows = await connection.fetch(QUERIES["number_generators"])
    if behind := [row for row in rows if row["is_behind"]]:
        named = _some(f"{row['generator']} is behind {row['highest']}" for row in behind)
        repairs = (f"SELECT setval('{row['generator']}', {row['highest']});" for row in behind)
        seen = f"the next ones are in use: {named}"
        return Diagnosis("ids", seen, "error", f"as the schema's owner: {' '.join(repairs)}")
    if all(row["is_behind"] is None for row in rows):
        return Diagnosis("ids", "only the schema's owner can see whether the next ones are free")
    return Diagnosis("ids", "the next ones are free")


async def _daemons(connection: asyncpg.Connection) -> Diagnosis:
    count = await connection.fetchval(QUERIES["count_daemons"])
    if not count:
        return Diagnosis("daemons", "none connected", "warning", "start one: sequencerd run")
    return Diagnosis("daemons", f"{count} connected")


async def _problems(connection: asyncpg.Connection) -> Diagnosis:
    rows = await connection.fetch(QUERIES["reported_problems"], None, MAX_PROBLEMS)
    if reported := [row for row in rows if row["kind"] != "brake"]:
        named = _some((_problem(row) for row in reported), between="; ")
        advice = "remove the cause; the daemon retries automatically"
        return Diagnosis("problems", named, "error", advice)
    return Diagnosis("problems", "none reported by daemons")


def _problem(row: asyncpg.Record) -> str:
    if row["kind"] == "runner":
        waiting = f", {counted(row['waiting'], 'enrollment')} waiting" if row["waiting"] else ""
        since = text(row["since"])
        return f"{row['about']} has been down since {since}{waiting}: {row['message']}"
    if row["kind"] == "enroll":
        return str(row["message"])
    place = f" at {row['sequence']}/{row['step']}" if row["sequence"] else ""
    return f"enrollment {row['about']}{place} is quarantined: {row['message']}"


async def _brakes(connection: asyncpg.Connection) -> Diagnosis:
    if rows := await connection.fetch(QUERIES["braked_sequences"]):
        named = _some(
            f"{row['sequence']} ({row['reason'].removeprefix('brake: ')})" for row in rows
        )
        advice = "find out why there are so many; then sequencerd resume, which counts from zero"
        return Diagnosis("brakes", f"have paused {named}", "error", advice)
    return Diagnosis("brakes", "none has paused a sequence")


async def _overdue(connection: asyncpg.Connection) -> Diagnosis:
    async with connections.counting(connection):
        row = await connection.fetchrow(QUERIES["count_overdue"])
    if row["count"]:
        longest = duration(row["longest"].total_seconds())
        seen = f"{counted(row['count'], 'enrollment')}, the oldest for {longest}"
        advice = "see sequencerd status and sequencerd list --overdue"
        return Diagnosis("overdue", seen, "warning", advice)
    return Diagnosis("overdue", "none")


async def _failed(connection: asyncpg.Connection) -> Diagnosis:
    async with connections.counting(connection):
        rows = await connection.fetch(QUERIES["failed_by_code"])
    if rows:
        named = _some(f"{row['count']:,} {_failure(row['failure'])}" for row in rows)
        advice = "see sequencerd list --status failed; fix the cause, then sequencerd retry"
        return Diagnosis("failed", named, "warning", advice)
    return Diagnosis("failed", "none")


def _failure(code: str | None) -> str:
    return f"with {code}" if code else "set by hand"


async def _steps(connection: asyncpg.Connection) -> Diagnosis:
    if rows := await connection.fetch(QUERIES["problems"]):
        named = _some((f"{r['sequence']}/{r['step']}: {r['problem']}" for r in rows), between="; ")
        advice = "fix the definition or the settings; enrollments then continue automatically"
        return Diagnosis("steps", named, "error", advice)
    return Diagnosis("steps", "all can be executed")


async def _holidays(connection: asyncpg.Connection) -> Diagnosis:
    """Find calendars without a future day: every later day would silently be a business day."""
    rows = await connection.fetch(QUERIES["last_holidays"])
    soon = datetime.now(UTC).date() + HOLIDAYS_AHEAD
    if ending := [row for row in rows if row["last_day"] < soon]:
        named = _some(f"{row['calendar']} ends on {row['last_day']}" for row in ending)
        year = max(soon.year, ending[0]["last_day"].year + 1)
        advice = f"sequencerd holidays {ending[0]['calendar']} {year}"
        return Diagnosis("holidays", named, "warning", f"add more days, as with {advice}")
    known = f"known for the next {HOLIDAYS_AHEAD.days} days"
    return Diagnosis("holidays", known if rows else "none used")


async def _rates(connection: asyncpg.Connection) -> Diagnosis:
    rows = await connection.fetch(QUERIES["rates_reached"])
    if not rows:
        return Diagnosis("rates", "no runner has waited for its rate in the last hour")
    seen = _some(f"{row['runner']} at {row['per_second']:g} per second" for row in rows)
    advice = "calls wait for their turn: if the server takes more, raise per_second"
    return Diagnosis("rates", f"reached in the last hour: {seen}", "ok", advice)


async def _email_search(connection: asyncpg.Connection) -> Diagnosis:
    if await connection.fetchval(QUERIES["console_has_email_index"]):
        return Diagnosis("e-mail search", "has its index")
    if await connection.fetchval(QUERIES["console_has_at_most"], EMAILS_SEARCHED):
        return Diagnosis("e-mail search", "needs no index yet")
    seen = f"the console searches data.email in the latest {EMAILS_SEARCHED:,} enrollments only"
    return Diagnosis("e-mail search", seen, "ok", f"if that matters: {EMAIL_INDEX}")


# --- several shards


def compare_shards(
    facts: Mapping[str, Mapping[str, str | None]], shards: int
) -> Iterator[Diagnosis]:
    """Compare what shards should have in common. `facts` are those of each that can be read, as
    JSON; `shards` is the number of all.
    """
    same = "the same in all"
    if len(facts) < shards:
        same = f"the same in {', '.join(facts)}" if len(facts) > 1 else "cannot be compared"
    for about, advice in {
        "server": "run the same version of PostgreSQL everywhere",
        "definitions": "apply the files to all shards; sequencerd plan shows the differences",
        "topics": "write the same rows to the table topics in all shards",
        "holidays": "add the same days to the table holidays in all shards",
        "step types": "give the daemons of all shards the same settings",
    }.items():
        known = {shard: json.loads(of[about] or "null") for shard, of in facts.items()}
        known = {shard: value for shard, value in known.items() if value is not None}
        if differing := differences(known):
            seen = _some(differing, between="; ")
            yield Diagnosis(f"{about} of the shards", f"differ: {seen}", "warning", advice)
        else:
            yield Diagnosis(f"{about} of the shards", same)


FIRST_CHECKS: dict[str, DiagnosisCheck] = {
    "server": _server,
    "schema": _schema,
    "triggers": _triggers,
    "roles": _roles,
}
LATER_CHECKS: dict[str, DiagnosisCheck] = {
    "clock": _clock,
    "time zones": _time_zones,
    "vacuum": _vacuum,
    "old transactions": _old_transactions,
    "history": _history,
    "ids": _ids,
    "daemons": _daemons,
    "problems": _problems,
    "brakes": _brakes,
    "overdue": _overdue,
    "failed": _failed,
    "steps": _steps,
    "holidays": _holidays,
    "rates": _rates,
    "e-mail search": _email_search,
}
CHECKS = FIRST_CHECKS | LATER_CHECKS
"""The checks that need only a connection, in order; those of the settings are between the two."""


def _some(items: Iterable[str], between: str = ", ") -> str:
    """Join the first items, and add the number of the others."""
    every = list(items)
    more = f" and {len(every) - MAX_EXAMPLES:,} more" if len(every) > MAX_EXAMPLES else ""
    return between.join(every[:MAX_EXAMPLES]) + more
