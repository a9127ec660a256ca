"""Plans of the hot statements, with many sleeping enrollments and statistics from when there were
few: none scans the whole table, whichever plan PostgreSQL chooses.

With statistics from when all had ended, nor do those that know the ids or subjects read all that is
active.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import asyncpg
import pytest

from sequencerd.storage.connections import counting
from sequencerd.storage.statements import QUERIES
from tests.helpers.engines import define

SLEEPERS = 200_000
IDS = "'{" + ",".join(map(str, range(1, 1001))) + "}'"
NAMES = "'{" + ",".join(["s"] * 1000) + "}'"
HERE = "'s', 'a'"

HOT = {
    "claim": "'{s}', '{a}', now(), 'me', '{}', '{1}', '{1000}', '{-infinity}'",
    "peek": f"{HERE}, now(), 'me', '{{}}', 1, 21, '-infinity', true",
    "claim_some": f"{HERE}, now(), 'me', {IDS}, 1",
    "claim_bare": f"{HERE}, now(), 'me', {IDS}, 1",
    "due_ids": f"{HERE}, now(), 'me', '{{}}', 1, 1000, '-infinity'",
    "orphans": f"ARRAY['s'], ARRAY['a'], '{{-infinity}}', now(), 'me', {IDS}",
    "large_data": IDS,
    "expired_ids": f"{HERE}, now(), 'me', '{{}}', 1000, now()",
    "forget_expiries": f"{HERE}, 5000",
    "count_expired_leases": f"{IDS}, {IDS}, now()",
    "left": "'{s}', '{a}', now(), 'me', '{}', '{-infinity}', '{true}'",
    "first_wakes": "'{s}', '{a}', '{-infinity}', '{\"\",s}', '{\"\",a}', '{s,z}', '{a,z}'",
    "occupied_steps": f"{HERE}, 20000",
    "count_due": "ARRAY['s'], ARRAY['a'], '{-infinity}', now(), 1000",
    "lock": IDS,
    "fences": IDS,
    "is_any_free": IDS,
    "present_fences": IDS,
    "existing": IDS,
    "lock_unchanged": f"{IDS}, '1', 's', 'me', 1",
    "write_and_record": f"{IDS}, {HERE}, 'active', now(), now(), 1, 0, 0, NULL, NULL, NULL, NULL,"
    " '{}', NULL, NULL, now()" + 10 * ", '{}'",
    "write_in_place": f"'{{\"(0,1)\"}}', {HERE}, 'active', now(), now(), 1, 0, 0, NULL, NULL, NULL,"
    " NULL, '{}', NULL, NULL, now()" + 10 * ", '{}'",
    "write_each": f"{IDS}" + 15 * ", '{}'" + ", now()",
    "write_unchanged": f"{IDS}"
    + 15 * ", '{}'"
    + ", now()"
    + 11 * ", '{}'"
    + ", 1, 's', 'me', '{1}'",
    "write_one_unchanged": f"1, {HERE}, 'active', now(), now(), 1, 0, 0, NULL, NULL, NULL, NULL,"
    " '{}', NULL, NULL, now()" + 8 * ", '{}'" + ", '{1}', 1, 's', 'me', '{1}'",
    "write_alike_unchanged": f"{IDS}, {HERE}, 'active', now(), now(), 1, 0, 0, NULL, NULL, NULL,"
    " NULL, '{}', NULL, NULL, now()" + 8 * ", '{}'" + ", '{1}', 1, 's', 'me', '{1}'",
    "write_goals": "1, '{}', NULL",
    "merge_data": "1, '{}', '{}'",
    "extend_leases": f"{IDS}, 'me', now()",
    "active_ids": f"{HERE}, 1, 10000",
    "lock_waiting": f"{HERE}, {IDS}, now(), 1",
    "waiting": f"{HERE}, {IDS}, now()",
    "failed_steps": "'a', 'z'",
    "revive": "ARRAY['s'], ARRAY['a'], now(), 5000",
    "waiting_of_subjects": "'{u7,u8}', 0, now(), 1000",
    "lock_cancelled": f"{IDS}, {NAMES}, {NAMES}",
    "cancel_others": f"{IDS}, {NAMES}, now()",
}
BY_ID = (
    *("claim_some", "claim_bare", "extend_leases", "lock_waiting", "waiting"),
    *("waiting_of_subjects", "lock_cancelled", "cancel_others"),
)


@pytest.mark.slow
async def test_no_hot_statement_scans_the_whole_table(connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("a", "GoTo", "{}", None), ("b", "GoTo", "{}", None))
    await connection.execute("ALTER TABLE sequencer.enrollments SET (autovacuum_enabled = false)")
    for begins, ends in ((1, 1000), (1001, SLEEPERS)):
        await connection.execute(
            "SET session_replication_role = replica;"
            "INSERT INTO sequencer.enrollments"
            " (sequence, step, subject, wake_at, entered_at, reentry)"
            " SELECT 's', CASE n % 10 WHEN 0 THEN 'b' ELSE 'a' END, 'u' || n,"
            " now() + n * interval '1 second', now(), 'after_end'"
            f" FROM generate_series({begins}, {ends}) AS n;"
            "RESET session_replication_role"
        )
        if ends == 1000:
            await connection.execute("ANALYZE sequencer.enrollments")
    # after pg_restore or pg_upgrade, there are no statistics of the history
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)"
        f" SELECT n, now(), 's', 'a', 1, 'next' FROM generate_series(1, {SLEEPERS}) AS n"
    )
    wrong = []
    for name, arguments in HOT.items():
        for mode in ("custom", "generic"):
            plan = await explain(connection, QUERIES[name], arguments, mode)
            wrong += [
                f"{name}, {mode}: {node['Node Type']}"
                for node in nodes(plan)
                if node.get("Relation Name", "").startswith(("enrollments", "events"))
                and node["Node Type"] in ("Seq Scan", "Bitmap Heap Scan")
                # which contain a row's events, and the few enrollments of a step that expire
                and not any(
                    name in str(node) for name in ("enrollment_id_at", "enrollments_expiring")
                )
            ]
    assert wrong == []
    await connection.execute(
        "TRUNCATE sequencer.enrollments; SET session_replication_role = replica;"
        "INSERT INTO sequencer.enrollments"
        " (sequence, step, subject, status, wake_at, ended_at, reentry)"
        " SELECT 's', 'b', 'old' || n, 'completed', NULL, now(), 'after_end'"
        " FROM generate_series(1, 1000) AS n;"
        "ANALYZE sequencer.enrollments;"
        "INSERT INTO sequencer.enrollments (sequence, step, subject, wake_at, entered_at, reentry)"
        " SELECT 's', 'a', 'u' || n, now() + n * interval '1 second', now(), 'after_end'"
        f" FROM generate_series(1, {SLEEPERS}) AS n;"
        "RESET session_replication_role"
    )
    for name in BY_ID:
        for mode in ("custom", "generic"):
            plan = await explain(connection, QUERIES[name], HOT[name], mode)
            wrong += [
                f"{name}, {mode}: {node['Index Name']}"
                for node in nodes(plan)
                if node.get("Index Name", "").startswith("enrollments_due")
            ]
    assert wrong == []


@pytest.mark.parametrize("mode", ["custom", "generic"])
async def test_arrays_are_joined_without_nested_loops(
    connection: asyncpg.Connection, mode: str
) -> None:
    """The time would grow with the square of their length."""
    plan = await explain(connection, QUERIES["write_and_record"], HOT["write_and_record"], mode)
    joins = [node["Node Type"] for node in nodes(plan) if "Join Type" in node]
    assert joins in (["Hash Join"], ["Merge Join"])


async def explain(
    connection: asyncpg.Connection, query: str, arguments: str, mode: str
) -> Mapping[str, Any]:
    """The plan of a prepared statement."""
    count = len(set(re.findall(r"\$\d+", query)))
    given = f"({arguments})" if count else ""
    await connection.execute(f"SET plan_cache_mode = force_{mode}_plan")
    await connection.execute(f"PREPARE hot AS {query}")
    text = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE hot {given}")
    await connection.execute("DEALLOCATE hot")
    plan: Mapping[str, Any] = json.loads(text)[0]["Plan"]
    return plan


def nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for below in plan.get("Plans", []):
        yield from nodes(below)


async def test_counting_does_not_use_jit(connection: asyncpg.Connection) -> None:
    """A view over a million rows costs enough for it, and takes less time than the compiler."""
    async with counting(connection):
        assert await connection.fetchval("SHOW jit") == "off"
    assert await connection.fetchval("SHOW jit") == "on"
