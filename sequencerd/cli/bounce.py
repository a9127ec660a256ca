"""The command to which a mail server passes bounces and abuse reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import asyncpg

from sequencerd.cli.commands import connected, explain, on_shards
from sequencerd.cli.output import say
from sequencerd.core.task import Undeliverable
from sequencerd.errors import ShardsError
from sequencerd.runners.email.bounces import MAX_READ, BounceReport, UnknownAddress, read_report
from sequencerd.runners.email.mime import as_written
from sequencerd.runners.email.smtp import read_sent
from sequencerd.runners.suppression_check import spellings
from sequencerd.settings import Settings
from sequencerd.storage import suppressions
from sequencerd.storage.connections import Shard
from sequencerd.storage.every_shard import ask, ask_all

MAIL_SERVER_RETRIES = "the mail server should try again"


@on_shards
async def bounce_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    """Suppress what a bounce on standard input reports, in all shards. Other messages are ignored:
    a failure would make the mail server bounce the bounce.
    """
    report = read_report(_read())
    if not report.dead:
        say("ignored: it reports neither a nonexistent address nor abuse")
        return 0

    async def find(shard: Shard) -> list[Undeliverable]:
        async with connected(shard) as connection:
            return await _find(connection, report)

    answers = await ask(explain(arguments), shards, find)
    found = list(dict.fromkeys(one for ours in answers.found.values() for one in ours))

    async def suppress(shard: Shard) -> None:
        async with connected(shard) as connection:
            await suppressions.add(connection, found)

    if not found:
        if answers.missing:
            raise ShardsError("\n".join([*answers.lines(), MAIL_SERVER_RETRIES]))
        say("ignored: according to the history, no message was sent to the address that it reports")
        return 0
    await ask_all(explain(arguments), shards, suppress, otherwise=MAIL_SERVER_RETRIES)
    for one in found:
        say(f"suppressed {one.address}: {one.reason}")
    return 0


def _read() -> bytes:
    """Read the message, and the rest of one that is too long, so that the mail server can finish
    writing.
    """
    raw = sys.stdin.buffer.read(MAX_READ)
    while sys.stdin.buffer.read(MAX_READ):
        pass
    return raw


async def _find(connection: asyncpg.Connection, report: BounceReport) -> list[Undeliverable]:
    """Return the recipients of our messages that a report concerns."""
    found = {}
    for mark in report.marks:
        sent = [
            address
            for message in await suppressions.sent_messages(connection, *mark)
            for address in read_sent(message)
        ]
        for dead in report.dead:
            named = _matching(dead, sent)
            if report.kind == "complaint" and len({*sent}) == 1:
                named = sent  # whatever the report replaces the address by (RFC 6590)
            for address in named:
                reason = f"{dead.reason} (enrollment {mark.enrollment})"
                found[address] = Undeliverable("email", as_written(address), reason, report.kind)
    return [*found.values()]


def _matching(dead: UnknownAddress, sent: Sequence[str]) -> list[str]:
    """Return the recipients that a report names."""
    if dead.address is None or not sent:
        return []
    named = spellings(dead.address)
    return [address for address in sent if spellings(address) & named]
