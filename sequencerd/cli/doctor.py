"""The command doctor: find problems of the database, and of the servers that a daemon calls."""

from __future__ import annotations

import argparse
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import asyncpg

from sequencerd.cli.commands import on_shards, reading
from sequencerd.cli.output import busy, say, say_json
from sequencerd.errors import SequencerdError, SettingsError
from sequencerd.service.diagnosis import (
    WITHOUT_SCHEMA,
    Diagnosis,
    advise,
    checks_of,
    compare_shards,
    run_check,
)
from sequencerd.service.redaction import make_redaction
from sequencerd.settings import DatabaseSettings, Settings
from sequencerd.storage import connections, conninfo
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import TRANSIENT_ERRORS
from sequencerd.storage.statements import QUERIES


async def examine(
    shards: Sequence[Shard], settings: Settings
) -> AsyncIterator[tuple[str | None, Diagnosis]]:
    """Examine each shard, compare them, and examine the endpoints once for all. Yield each finding
    with the name of its shard. A check that cannot run is an error as well.
    """
    types: set[str] = set()
    used: dict[str, bool] = {}
    for shard in shards:
        database = settings.of_shard(shard.name).database
        async for finding in _examine_shard(shard, database, types, used):
            yield shard.name, finding
    if len(shards) > 1:
        facts = {}
        for shard in shards:
            with suppress(SequencerdError, *TRANSIENT_ERRORS):  # reported by a check
                async with reading(shard) as connection:
                    facts[str(shard.name)] = await connection.fetchrow(QUERIES["common_facts"])
        for finding in compare_shards(facts, len(shards)):
            yield None, finding
    if _calls_servers(settings, types, used):
        # imported only if needed, because it takes long
        from sequencerd.cli.doctor_endpoints import examine_endpoints  # noqa: PLC0415

        async for finding in examine_endpoints(settings, types, used):
            yield None, finding


async def _examine_shard(
    shard: Shard, settings: DatabaseSettings, types: set[str], used: dict[str, bool]
) -> AsyncIterator[Diagnosis]:
    """Run the checks of a database, and collect the step types and lookups of its definitions."""
    try:
        connection = await connections.connect(shard)
    except SequencerdError as error:
        section = "database" if shard.name is None else f"shards.{shard.name}"
        setting = f"{section}.{'listen_url' if settings.listen_url else 'url'}"
        yield Diagnosis("database", str(error), "error", advise(error, setting))
    else:
        try:
            async for finding in _examine_database(connection, shard, settings):
                yield finding
            its_types, its_lookups = await _in_use(connection)
            types |= its_types
            used |= its_lookups
        finally:
            connection.terminate()
    if names := _name_service(shard.url):
        yield names


def _calls_servers(settings: Settings, types: set[str], used: Mapping[str, bool]) -> bool:
    """Return whether a daemon calls any server."""
    from sequencerd.core.step_types import is_message  # noqa: PLC0415 - as above

    sms = settings.sms.url or settings.sms.account_sid
    oidc = settings.console and settings.console.oidc
    is_set = settings.email.url or sms or settings.runners or settings.lookups or oidc
    return bool(is_set or used or any(map(is_message, types)))


async def _examine_database(
    connection: asyncpg.Connection, shard: Shard, settings: DatabaseSettings
) -> AsyncIterator[Diagnosis]:
    has_schema = True
    for about, check in checks_of(shard, settings).items():
        if not has_schema and about not in WITHOUT_SCHEMA:
            continue
        with busy(f"checking {about}"):
            finding = await run_check(about, check, connection)
        yield finding
        if about == "schema":
            has_schema = finding.level != "error"


async def _in_use(connection: asyncpg.Connection) -> tuple[set[str], dict[str, bool]]:
    """Return the step types and lookups of definitions; none if they cannot be read."""
    try:
        types = await connection.fetch(QUERIES["types_in_use"])
        used = await connection.fetch(QUERIES["lookups_in_use"])
    except TRANSIENT_ERRORS:  # reported by a check
        return set(), {}
    return {row["type"] for row in types}, {row["name"]: row["is_function"] for row in used}


def _name_service(url: str, root: Path = Path("/")) -> Diagnosis | None:
    """Check whether the server can look up the name of a dynamic user, for peer authentication."""
    try:
        unit = (root / "etc/systemd/system/sequencerd.service").read_text(encoding="utf-8")
        names = (root / "etc/nsswitch.conf").read_text(encoding="utf-8")
        host = conninfo.arguments(url, name="", timeout=0).get("host", ["/"])[0]
    except (OSError, UnicodeDecodeError, SettingsError):
        return None
    if "\nDynamicUser=yes\n" not in unit or not host.startswith("/"):
        return None
    if re.search(r"^passwd:.*\bsystemd\b", names, re.MULTILINE):
        return Diagnosis("name service", "knows the service's dynamic user")
    seen = "peer authentication would not know the service's dynamic user"
    return Diagnosis("name service", seen, "warning", "apt-get install libnss-systemd")


# --- the command


@on_shards
async def doctor_command(
    arguments: argparse.Namespace, settings: Settings, shards: Sequence[Shard]
) -> int:
    findings: list[tuple[str | None, Diagnosis]] = []
    redact = make_redaction(settings)
    async for shard, found in examine(shards, settings):
        finding = replace(found, seen=redact(found.seen))
        findings.append((shard, finding))
        if not arguments.json:
            mark = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  "}[finding.level]
            where = "" if shard is None else f"{shard}: "
            say(f"{mark}  {where}{finding.about}: {finding.seen}", hang=9)
            if finding.advice:
                say(f"         {finding.advice}", hang=0)
    if arguments.json:
        is_sharded = shards[0].name is not None
        say_json(
            [
                {**asdict(finding), **({"shard": shard} if is_sharded else {})}
                for shard, finding in findings
            ]
        )
    return int(any(finding.level == "error" for _, finding in findings))
