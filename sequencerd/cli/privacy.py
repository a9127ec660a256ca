"""Commands for personal data: forget, export-subject."""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

import asyncpg

from sequencerd.cli.commands import connect, fetch, on_database
from sequencerd.cli.operation import confirm
from sequencerd.cli.output import say, say_json
from sequencerd.errors import UsageError
from sequencerd.settings import Settings
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import with_hint
from sequencerd.storage.statements import QUERIES

SHOWN = 10  # ids of other enrollments


class Forgotten(NamedTuple):
    """What `sequencer.forget` returns."""

    enrollments: int
    events: int
    suppressions: int
    redacted: int
    mentioned_in: list[int]

    def __str__(self) -> str:
        counts = {
            "enrollments": self.enrollments,
            "events": self.events,
            "suppressed addresses": self.suppressions,
            "messages of other enrollments": self.redacted,
        }
        return ", ".join(f"{what}: {count:,}" for what, count in counts.items())


@on_database
async def forget_command(arguments: argparse.Namespace, _: Settings, shard: Shard) -> int:
    subject = arguments.subject
    connection = await connect(shard)
    try:
        if arguments.dry_run or not arguments.yes:
            would = await _forget(connection, subject, commit=False)
            if arguments.dry_run or not any(would[:-1]):
                return _report(arguments, would)
            confirm(f"forget {subject} ({would})? This cannot be undone.")
        return _report(arguments, await _forget(connection, subject, commit=True))
    except asyncpg.ObjectInUseError as error:
        raise UsageError(with_hint(error)) from error
    finally:
        await connection.close()


async def _forget(connection: asyncpg.Connection, subject: str, *, commit: bool) -> Forgotten:
    """Forget a subject; without `commit`, only find out what that would change."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        done = Forgotten(*await connection.fetchrow(QUERIES["forget"], subject))
    except BaseException:
        await transaction.rollback()
        raise
    await (transaction.commit() if commit else transaction.rollback())
    return done


def _report(arguments: argparse.Namespace, done: Forgotten) -> int:
    if arguments.json:
        say_json({"subject": arguments.subject, "dry_run": arguments.dry_run, **done._asdict()})
        return 0
    if not any(done[:-1]):
        say(f"nothing is held of {arguments.subject}")
    else:
        say(f"{'would forget' if arguments.dry_run else 'forgot'} {arguments.subject}: {done}")
    if done.mentioned_in:
        ids = ", ".join(map(str, done.mentioned_in[:SHOWN]))
        more = f" and {len(done.mentioned_in) - SHOWN:,} more" if done.mentioned_in[SHOWN:] else ""
        say(
            "data of other subjects name it and are left as they are: change them or forget those "
            f"subjects as well; enrollments {ids}{more}"
        )
    return 0


@on_database
async def export_subject_command(arguments: argparse.Namespace, _: Settings, shard: Shard) -> int:
    ((text,),) = await fetch(shard, "export_subject", arguments.subject)
    exported: dict[str, Any] = json.loads(text)
    say_json(exported, indent=2)
    return 0
