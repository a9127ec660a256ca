"""Commands that act on enrollments: enroll."""

from __future__ import annotations

import argparse
import json

import asyncpg

from sequencerd.cli.commands import Commands, add_json, connect, on_database, with_hint
from sequencerd.core import dates
from sequencerd.errors import UsageError
from sequencerd.settings import Settings
from sequencerd.store import QUERIES


def add_to(commands: Commands) -> None:
    """Adds these commands."""
    enroll = commands.add(
        "enroll",
        on_database(_enroll),
        "enroll a subject in a sequence",
        """enroll onboarding user-42 --data '{"email": "ada@example.com"}'""",
    )
    enroll.add_argument("sequence")
    enroll.add_argument("subject")
    enroll.add_argument("--data", default="{}", metavar="JSON", help="what its templates read")
    enroll.add_argument("--timezone", metavar="ZONE", help="the subject's own")
    enroll.add_argument("--step", help="begin there instead of at the first step")
    enroll.add_argument("--at", metavar="TIME", help="begin then, ISO 8601")
    add_json(enroll)


async def _enroll(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    try:
        data = json.loads(arguments.data)
    except ValueError as error:
        raise UsageError(f"--data is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UsageError('--data must be a JSON object such as {"email": "ada@example.com"}')
    at = None
    if arguments.at is not None and (at := dates.parse(arguments.at, dates.zone("UTC"))) is None:
        raise UsageError(f"--at {arguments.at!r} is not an ISO 8601 date")
    connection = await connect(url)
    try:
        id_ = await connection.fetchval(
            QUERIES["enroll"],
            arguments.sequence,
            arguments.subject,
            json.dumps(data),
            arguments.timezone,
            arguments.step,
            at,
        )
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
        raise UsageError(with_hint(error)) from error
    finally:
        await connection.close()
    if id_ is None:
        raise UsageError(
            f"{arguments.subject} is in {arguments.sequence} already; its reentry policy allows "
            "no second time"
        )
    print(json.dumps({"id": id_}) if arguments.json else f"enrolled as {id_}")
    return 0
