"""Every column of every table is fed nonsense while a daemon runs: it is refused by name, or told
as a problem or a failure of its step, and the daemon goes on with everybody else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from sequencerd.engine.loop import Engine
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until

NOBODY = "no such thing"
LONG = "x" * 100_000
DEEP = '{"a":' * 5000 + "1" + "}" * 5000

VALUES: dict[str, list[object]] = {
    "text": ["", " ", NOBODY, LONG, "a\nb\x1b[31m", "'; DROP TABLE x; --", "\u202e", None],
    "text[]": [[], [NOBODY], [""], [LONG], None],
    "jsonb": ["null", "[]", '"x"', "1", "{}", '{"a": 1}', DEEP, '{"amount": "x"}', None],
    "boolean": [True, False, None],
    "integer": [-(2**31), -1, 0, 2**31 - 1, None],
    "bigint": [-(2**63), -1, 0, 2**63 - 1, None],
    "interval": ["-1 day", "0", "178000000 years", None],
    "uuid": ["00000000-0000-0000-0000-000000000000", None],
    "timestamp with time zone": ["-infinity", "infinity", "0001-01-01", "9999-12-31", None],
}

COLUMNS = """
    SELECT c.table_name, c.column_name,
           CASE c.data_type WHEN 'ARRAY' THEN 'text[]' ELSE c.data_type END AS type
      FROM information_schema.columns AS c JOIN information_schema.tables AS t
           ON t.table_schema = c.table_schema AND t.table_name = c.table_name
     WHERE c.table_schema = 'sequencer' AND t.table_type = 'BASE TABLE'
       AND c.table_name NOT LIKE 'events%'
       AND c.table_name NOT IN ('console_logouts', 'daemons', 'holidays', 'migrations', 'problems',
                                'scheduled_runs')
     ORDER BY c.table_name, c.ordinal_position
"""


@pytest.fixture
async def engine(database: str, connection: asyncpg.Connection) -> AsyncIterator[Engine]:
    """Two sequences of the same kind, of which one is going to suffer."""
    for name in ("victim", "witness"):
        await define(
            connection,
            name,
            ("work", "Note", "{}", "pause"),
            ("pause", "WaitForDuration", '{"amount": 20, "unit": "milliseconds"}', "check"),
            (
                "check",
                "Conditional",
                '{"lodashCommand": "isNil", "value": {"type": "get", "value": "data.a"}}',
                None,
            ),
        )
    runners = {"Note": Recorder()}
    async with running_engine(database, runners, sweep=0.5, lease=1) as engine:
        yield engine


async def test_nonsense_harms_no_other_enrollment(
    engine: Engine, connection: asyncpg.Connection
) -> None:
    columns = await connection.fetch(COLUMNS)
    assert {row["table_name"] for row in columns} >= {"sequences", "steps", "enrollments"}
    accepted = refused = 0
    for table, column, type_ in columns:
        for number, value in enumerate(VALUES[type_]):
            subject = f"{table} {column} {number}"
            try:
                async with connection.transaction():
                    await enroll(connection, "victim", subject)
                    await connection.execute(
                        "INSERT INTO sequencer.suppressions VALUES ('email', 'a@example.com')"
                    )
                    await connection.execute(_update(table, column, type_), _text(value))
            except asyncpg.PostgresError as error:
                words = f"{error} {error.column_name} {error.constraint_name} {error.detail}"
                assert column in words or "is out of range" in words, (subject, words)
                refused += 1
            else:
                accepted += 1
                id_ = await enroll(connection, "witness", subject)
                await until(
                    connection,
                    "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1",
                    id_,
                )
                await _restore(connection)
    assert accepted > 50
    assert refused > 50
    await until(connection, ALL_ENDED)


def _update(table: str, column: str, type_: str) -> str:
    which = {
        "sequences": "name = 'victim'",
        "steps": "sequence = 'victim' AND name = 'pause'",
        "enrollments": "sequence = 'victim' AND status = 'active'",
        "revisions": "sequence = 'victim'",
        "suppressions": "address = 'a@example.com'",
    }[table]
    return f"UPDATE sequencer.{table} SET {column} = $1::text::{type_} WHERE {which}"


def _text(value: object) -> str | None:
    match value:
        case None | str():
            return value
        case list():
            return "{" + ",".join(f'"{item}"' for item in value) + "}"
        case _:
            return str(value)


async def _restore(connection: asyncpg.Connection) -> None:
    """Makes the victim whole again. Who has failed tells why."""
    for row in await connection.fetch(
        "SELECT failure, last_error FROM sequencer.enrollments WHERE status = 'failed'"
    ):
        assert row["failure"]
        assert row["last_error"]
    await connection.execute("DELETE FROM sequencer.enrollments WHERE sequence <> 'witness'")
    await connection.execute("DELETE FROM sequencer.sequences WHERE name <> 'witness'")
    await connection.execute("DELETE FROM sequencer.revisions WHERE sequence <> 'witness'")
    await connection.execute("DELETE FROM sequencer.suppressions")
    await define(
        connection,
        "victim",
        ("work", "Note", "{}", "pause"),
        ("pause", "WaitForDuration", '{"amount": 20, "unit": "milliseconds"}', "check"),
        ("check", "GoTo", "{}", None),
    )
