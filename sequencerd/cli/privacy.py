"""Commands for personal data: forget, export-subject."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import asyncpg

from sequencerd.cli.commands import connected, explain, on_shards, reading, report_missing
from sequencerd.cli.ids import Id, labelled
from sequencerd.cli.operation import confirm
from sequencerd.cli.output import say, say_json, say_raw, warn
from sequencerd.core import exact_json
from sequencerd.errors import UsageError
from sequencerd.settings import Settings
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import with_hint
from sequencerd.storage.every_shard import ShardAnswers, ask, ask_all
from sequencerd.storage.statements import QUERIES

MAX_IDS = 10  # ids of other enrollments
NEEDS_ALL = (
    "nothing was forgotten: each shard may have messages and suppressions with addresses that only "
    "other shards know; repeat the command when all shards can be reached"
)

TextRow = dict[str, object]
"""A text about the subject that a shard does not have: `value`, and whether an address in it
`is_own`.
"""


class Forgotten(NamedTuple):
    """The result of `sequencer.forget`."""

    enrollments: int
    events: int
    suppressions: int
    redacted: int
    mentioned_in: list[int | str]

    def __str__(self) -> str:
        counts = {
            "enrollments": self.enrollments,
            "events": self.events,
            "suppressed addresses": self.suppressions,
            "messages of other enrollments": self.redacted,
        }
        return ", ".join(f"{what}: {count:,}" for what, count in counts.items())

    def plus(self, other: Forgotten) -> Forgotten:
        """Add another result."""
        return Forgotten(*map(add, self, other))


@on_shards
async def forget_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    """Forget a subject in all shards, because it may be enrolled in any of them."""

    async def read(shard: Shard) -> str:
        return await _export(shard, arguments.subject, [])

    texts = []
    if len(shards) > 1:
        exported = await ask_all(explain(arguments), shards, read, otherwise=NEEDS_ALL)
        texts = _known_texts(exported)

    async def forget(*, commit: bool) -> ShardAnswers[Forgotten]:
        return await ask(
            explain(arguments),
            shards,
            lambda shard: _forget(shard, arguments.subject, texts, commit=commit),
            warn=warn if commit else None,
        )

    if arguments.dry_run or not arguments.yes:
        answers = await forget(commit=False)
        would = _added_up(answers)
        if arguments.dry_run or not any(would[:-1]):
            _report(arguments, would)
            return _report_missing(answers)
        _report_missing(answers)
        confirm(f"forget {arguments.subject} ({would})? This cannot be undone.")
    answers = await forget(commit=True)
    _report(arguments, _added_up(answers))
    return _report_missing(answers)


def _known_texts(documents: Mapping[Shard, str]) -> list[TextRow]:
    """Return what a shard does not know: the texts in the others. Raises UsageError."""
    found: list[TextRow] = []
    for shard, document in documents.items():
        try:
            exact_json.check_depth(document)
            found += _texts(document)
        except ValueError as error:
            raise _unreadable(shard, error) from error
    return found


def _unreadable(shard: Shard, error: Exception) -> UsageError:
    return UsageError(
        f"the data in shard {shard.name} cannot be read ({error}): name each shard by itself, with"
        " --shard"
    )


def _texts(document: str) -> Iterator[TextRow]:
    """Yield texts in an export that may contain addresses: all values of the subject's data, and
    messages with an address, which may be another subject's. Numbers are given as PostgreSQL writes
    them.
    """
    exported = json.loads(document, parse_int=str, parse_float=str)
    yield {"value": exported["subject"], "is_own": True}
    for enrollment in exported["enrollments"]:
        yield from ({"value": value, "is_own": True} for value in _values(enrollment["data"]))
        messages = [event["message"] for event in enrollment["history"]]
        for message in (*messages, enrollment["last_error"]):
            if message and "@" in message:
                yield {"value": message, "is_own": False}


def _values(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            yield from _values(value)


def _added_up(answers: ShardAnswers[Forgotten]) -> Forgotten:
    nothing = Forgotten(0, 0, 0, 0, [])
    return reduce(Forgotten.plus, answers.found.values(), nothing)


def _report_missing(answers: ShardAnswers[Forgotten]) -> int:
    if code := report_missing(answers, refusals=True):
        warn(
            "the data in these shards is not forgotten: repeat the command when they can be reached"
        )
    return code


async def _forget(
    shard: Shard, subject: str, texts: Sequence[TextRow], *, commit: bool
) -> Forgotten:
    """Forget a subject; without `commit`, only find out what that would change. `texts` are those
    about it in other shards.
    """
    try:
        async with connected(shard) as connection:
            transaction = connection.transaction()
            await transaction.start()
            if texts:
                await connection.execute(QUERIES["know_texts"], json.dumps(texts))
            done = Forgotten(*await connection.fetchrow(QUERIES["forget"], subject))
            await (transaction.commit() if commit else transaction.rollback())
    except asyncpg.ObjectInUseError as error:
        raise UsageError(with_hint(error)) from error
    return done._replace(mentioned_in=[_id(shard, int(one)) for one in done.mentioned_in])


def _report(arguments: argparse.Namespace, done: Forgotten) -> None:
    if arguments.json:
        say_json({"subject": arguments.subject, "dry_run": arguments.dry_run, **done._asdict()})
        return
    if not any(done[:-1]):
        say(f"there is no data about {arguments.subject}")
    else:
        say(f"{'would forget' if arguments.dry_run else 'forgot'} {arguments.subject}: {done}")
    if done.mentioned_in:
        ids = ", ".join(map(str, done.mentioned_in[:MAX_IDS]))
        more = (
            f" and {len(done.mentioned_in) - MAX_IDS:,} more" if done.mentioned_in[MAX_IDS:] else ""
        )
        say(
            "the data of other subjects mentions it and was not changed: change it, or forget "
            f"those subjects as well; enrollments {ids}{more}"
        )


@on_shards
async def export_subject_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    def reading_with(texts: Sequence[TextRow]) -> Callable[[Shard], Awaitable[str]]:
        return lambda shard: _export(shard, arguments.subject, texts)

    answers = await ask(explain(arguments), shards, reading_with([]))
    if len(shards) > 1 and (texts := _known_texts(answers.found)):
        answers = await ask(explain(arguments), shards, reading_with(texts))
    exported: dict[str, Any] = {}
    for shard, document in answers.found.items():
        try:
            parts = exact_json.loads(document, exact=False)
        except (ValueError, RecursionError) as error:  # PostgreSQL takes more brackets and digits
            if len(shards) > 1:
                raise _unreadable(shard, error) from error
            say_raw(f"{_in_ascii(document)}\n")
            return report_missing(answers)
        for key, value in parts.items():
            if isinstance(value, list):
                exported.setdefault(key, []).extend(_with_shard(shard, row) for row in value)
            else:
                exported.setdefault(key, value)
    say_json(exported, indent=2)
    return report_missing(answers)


def _in_ascii(document: str) -> str:
    """Return JSON without characters that may control a terminal."""
    ascii_only = re.sub("[^\0-\x7e]", lambda found: json.dumps(found[0])[1:-1], document)
    return ascii_only.replace("\x7f", "\\u007f")


async def _export(shard: Shard, subject: str, texts: Sequence[TextRow]) -> str:
    async with reading(shard) as connection:
        if texts:
            await connection.execute(QUERIES["know_texts"], json.dumps(texts))
        document: str = await connection.fetchval(QUERIES["export_subject"], subject)
    return document


def _with_shard(shard: Shard, row: Any) -> Any:
    if isinstance(row, dict):
        return labelled(shard, row, as_json=True)
    return _id(shard, row)


def _id(shard: Shard, number: int) -> int | str:
    return number if shard.name is None else str(Id(shard.name, number))
