"""Write nonsense to every column of every table while a daemon runs: it is rejected by name, or
reported as a problem or a failure of its step, and the daemon continues with all others.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import asyncpg
import pytest

from sequencerd.engine.loop import Engine
from sequencerd.storage import connections
from tests.engine.test_enrolling import HOURLY, Daemon
from tests.helpers.databases import shard
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until

NOBODY = "no such thing"
LONG = "x" * 100_000
WINDOW = '{"days": ["mon", "tue", "wed", "thu", "fri", "sat", "sun"], "holidays": "DE"}'
DEEP = '{"a":' * 5000 + "1" + "}" * 5000
LARGE = '{"a": ' + "1" * 5000 + "}"  # more digits than Python reads
PAUSE = '{"amount": 20, "unit": "milliseconds"}'
IS_NIL = '{"lodashCommand": "isNil", "value": {"type": "get", "value": "data.a"}}'
NEVER = '{"from": "app.overdue", "every": {"amount": 9000, "unit": "years"}}'

VALUES: dict[str, list[object]] = {
    "text": ["", " ", NOBODY, LONG, "a\nb\x1b[31m", "'; DROP TABLE x; --", "\u202e", None],
    "text[]": [[], [NOBODY], [""], [LONG], None],
    "jsonb": [
        *("null", "[]", '"x"', "1", "{}", '{"a": 1}', DEEP, LARGE, '{"amount": "x"}', NEVER, None)
    ],
    "boolean": [True, False, None],
    "integer": [-(2**31), -1, 0, 2**31 - 1, None],
    "bigint": [-(2**63), -1, 0, 2**63 - 1, None],
    "interval": ["-1 day", "0", "178000000 years", None],
    "uuid": ["00000000-0000-0000-0000-000000000000", None],
    "date": ["-infinity", "infinity", "4713-01-01 BC", "9999-12-31", "5874897-12-31", None],
    "timestamp with time zone": [
        *(
            "-infinity",
            "infinity",
            "4713-01-01 BC",
            "0001-01-01",
            "9999-12-31",
            "294276-12-31",
            None,
        )
    ],
}

ROWS = """
    INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('{sequence}', '{victim}');
    INSERT INTO sequencer.suppressions VALUES ('email', '{victim}@example.com');
    INSERT INTO sequencer.topics VALUES ('{victim}', 'News');
    INSERT INTO sequencer.scheduled_runs (sequence, definition, next_run_at)
    SELECT name, enroll || jsonb_build_object('timezone', timezone), '9000-01-01Z'
      FROM sequencer.sequences WHERE name = '{sequence}'
        ON CONFLICT DO NOTHING;
    INSERT INTO sequencer.holidays VALUES ('DE', '2020-01-01'::date + {number}, '{victim}')
"""
OF_SEQUENCES = {"sequences", "steps", "revisions", "scheduled_runs"}
"""The tables whose rows belong to a sequence and are read by all of its enrollments."""
REMOVE = """
    DELETE FROM sequencer.enrollments WHERE sequence <> 'witness';
    DELETE FROM sequencer.sequences WHERE name <> 'witness';
    DELETE FROM sequencer.revisions WHERE sequence <> 'witness';
    DELETE FROM sequencer.suppressions;
    DELETE FROM sequencer.topics;
    DELETE FROM sequencer.holidays WHERE day <> '2019-01-01'
"""
COLUMNS = """
    SELECT c.table_name, c.column_name,
           CASE c.data_type WHEN 'ARRAY' THEN 'text[]' ELSE c.data_type END AS type
      FROM information_schema.columns AS c JOIN information_schema.tables AS t
           ON t.table_schema = c.table_schema AND t.table_name = c.table_name
     WHERE c.table_schema = 'sequencer' AND t.table_type = 'BASE TABLE'
       AND c.table_name NOT LIKE 'events%'
       AND c.table_name NOT IN
           ('activity', 'activity_progress', 'brakes', 'console_sessions', 'daemons',
            'lateness', 'migrations', 'problems', 'rates', 'removed_suppressions',
            'reservations', 'shard')
     ORDER BY c.table_name, c.ordinal_position
"""


async def make(connection: asyncpg.Connection, *names: str) -> None:
    """Make sequences that have all tables' rows but those of ROWS."""
    async with connection.transaction():
        await connection.execute(
            "INSERT INTO sequencer.sequences (name, first_step, enroll)"
            " SELECT name, 'work', $2 FROM unnest($1::text[]) AS name",
            names,
            json.dumps(HOURLY),
        )
        await connection.executemany(
            "INSERT INTO sequencer.steps (sequence, name, type, config, next_step)"
            " SELECT sequence, $2, $3, $4, $5 FROM unnest($1::text[]) AS sequence",
            [
                (names, "work", "Note", "{}", "open"),
                (names, "open", "WaitForWindow", WINDOW, "pause"),
                (names, "pause", "WaitForDuration", PAUSE, "check"),
                (names, "check", "Conditional", IS_NIL, None),
            ],
        )


@pytest.fixture
async def engine(database: str, connection: asyncpg.Connection) -> AsyncIterator[Engine]:
    """A sequence that is not going to suffer."""
    await connection.execute(
        "CREATE SCHEMA app; CREATE VIEW app.overdue AS SELECT 'x' AS subject WHERE false;"
        "INSERT INTO sequencer.holidays VALUES ('DE', '2019-01-01')"
    )
    await make(connection, "witness")
    async with running_engine(database, {"Note": Recorder()}, sweep=0.5, lease=1) as engine:
        yield engine


@pytest.mark.slow
async def test_nonsense_harms_no_other_enrollment(
    engine: Engine, database: str, connection: asyncpg.Connection
) -> None:
    """Each value of a column is given to a sequence, or another row, of its own."""
    columns = await connection.fetch(COLUMNS)
    assert {row["table_name"] for row in columns} >= {"sequences", "steps", "enrollments"}
    accepted = refused = 0
    pool = await connections.connect_pool(shard(database), 4)
    for table, column, type_ in columns:
        values = VALUES[type_]
        names = [f"victim-{number}" for number in range(len(values))]
        await make(connection, *(names if table in OF_SEQUENCES else names[:1]))
        for number, (victim, value) in enumerate(zip(names, values, strict=True)):
            sequence = victim if table in OF_SEQUENCES else names[0]
            try:
                async with connection.transaction():
                    rows = ROWS.format(victim=victim, sequence=sequence, number=number)
                    await connection.execute(rows)
                    update = _update(table, column, type_)
                    done = await connection.execute(update, _text(value), victim)
            except asyncpg.PostgresError as error:
                words = f"{error} {error.column_name} {error.constraint_name} {error.detail}"
                case = table, column, value
                assert column in words or "is out of range" in words, (case, words)
                refused += 1
            else:
                assert done == "UPDATE 1", (table, column, value)
                accepted += 1
        id_ = await enroll(connection, "witness", f"{table} {column}")
        await until(
            connection, "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1", id_
        )
        if column == "enroll" or table == "scheduled_runs":
            await _run_of_witness(pool, connection)
        await _remove(connection)
    await pool.close()
    assert accepted > 50
    assert refused > 50
    await until(connection, ALL_ENDED)


def _update(table: str, column: str, type_: str) -> str:
    which = {
        "sequences": "name = $2",
        "steps": "sequence = $2 AND name = 'pause'",
        "enrollments": "subject = $2",
        "revisions": "sequence = $2",
        "holidays": "name = $2",
        "scheduled_runs": "sequence = $2",
        "suppressions": "address = $2 || '@example.com'",
        "topics": "name = $2",
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


async def _run_of_witness(pool: asyncpg.Pool, connection: asyncpg.Connection) -> None:
    await connection.execute("DELETE FROM sequencer.scheduled_runs WHERE sequence = 'witness'")
    told = await Daemon(pool, 30.0).turn()
    assert "witness" not in told
    assert await connection.fetchval(
        "SELECT last_run_at FROM sequencer.scheduled_runs WHERE sequence = 'witness'"
    )


async def _remove(connection: asyncpg.Connection) -> None:
    """Remove all victims. An enrollment that has failed says why."""
    for row in await connection.fetch(
        "SELECT failure, last_error FROM sequencer.enrollments WHERE status = 'failed'"
    ):
        assert row["failure"]
        assert row["last_error"]
    await connection.execute(REMOVE)


@pytest.mark.parametrize("partials", ['{"footer": ["x"]}', '{"footer": []}'])
async def test_partials_that_are_lists_concern_only_their_messages(
    database: str, connection: asyncpg.Connection, partials: str
) -> None:
    """The table allows them. No definition could be loaded, and no daemon started."""
    await define(connection, "witness", ("a", "Note", "{}", None))
    await define(connection, "victim", ("a", "Note", '{"text": "{{> footer}}"}', None))
    await connection.execute(
        "UPDATE sequencer.sequences SET partials = $1 WHERE name = 'victim'", partials
    )
    async with running_engine(database, {"Note": Recorder()}):
        await enroll(connection, "witness", "ada")
        await enroll(connection, "victim", "ada")
        await until(connection, ALL_ENDED)


async def test_of_a_long_time_zone_only_the_beginning_is_read(
    engine: Engine, connection: asyncpg.Connection
) -> None:
    """A text has no other limit than 1 GB, and a similar name was searched for all of it."""
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, timezone)"
        " VALUES ('witness', 'ada', repeat('x', 1000000))"
    )
    await until(connection, ALL_ENDED)
    warnings = await connection.fetch(
        "SELECT message FROM sequencer.events WHERE action = 'warning' ORDER BY at"
    )
    assert warnings
    for row in warnings:
        assert row["message"].startswith(f"'{'x' * 100}' is not a time zone: ")
