"""What the counts and lists of several shards are together, without a database."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from types import SimpleNamespace
from typing import cast

import asyncpg

from sequencerd.console.all_shards import in_all
from sequencerd.console.context import PageContext, lost, missing
from sequencerd.console.lists import EnrollmentPage
from sequencerd.console.merging import found_in_all
from sequencerd.console.query import Query
from sequencerd.console.summary import Counts
from sequencerd.console.summary_of_shards import merge_counts
from sequencerd.console.tables import Table
from sequencerd.storage.connections import Shard

NOW = datetime(2026, 3, 2, tzinfo=UTC)
DAY = date(2026, 3, 1)
NOTHING = Counts(NOW, [], [], [], [], [], [], [], {}, {}, None, [], None, None)


def test_counts_are_as_old_as_the_oldest() -> None:
    before = replace(NOTHING, at=NOW - timedelta(minutes=1))
    assert merge_counts({"a": NOTHING, "b": before}).at == before.at


def test_the_flow_is_known_from_the_day_on_from_which_each_shard_knows_it() -> None:
    key = ("s", "first", "entered")
    shards = {
        "a": replace(NOTHING, flow={key: Counter({DAY: 2})}, flow_since=DAY - timedelta(days=3)),
        "b": replace(NOTHING, flow={key: Counter({DAY: 5})}, flow_since=DAY),
        "empty": NOTHING,
    }
    merged = merge_counts(shards)
    assert merged.flow_since == DAY
    assert merged.flow == {key: Counter({DAY: 7})}
    assert merge_counts({"a": NOTHING, "b": NOTHING}).flow_since is None


def test_medians_are_shown_for_each_shard() -> None:
    shards = {name: replace(NOTHING, stays={("s", "a"): n}) for n, name in enumerate("ab", 1)}
    assert merge_counts(shards).stays == {("s", "a"): {"a": 1, "b": 2}}


def test_problems_name_their_shard() -> None:
    shards = {
        "a": replace(NOTHING, problems=[{"kind": "quarantined", "about": "17"}]),
        "b": replace(NOTHING, problems=[{"kind": "runner", "about": "Email"}]),
    }
    found = merge_counts(shards).problems
    assert [(row["about"], row["shard"]) for row in found] == [("17", "a"), ("Email", "b")]


async def test_a_page_ends_where_a_shard_may_have_more() -> None:
    """What other shards have below that is on the next page, or it would be there twice."""
    pages = {"a": ([9, 8, 7], {"before": "7"}), "b": ([8, 5, 3], None)}

    async def find(part: PageContext, query: Query) -> EnrollmentPage:
        ids, more = pages[str(part.shard.name)]
        assert query.given == {}
        return EnrollmentPage(Table("found", (), [{"id": id_} for id_ in ids], {}, more))

    parts = {name: SimpleNamespace(shard=Shard("", name=name)) for name in "ab"}
    context = cast("PageContext", SimpleNamespace(parts=parts))
    token = missing.set({})
    try:
        found = await found_in_all(context, Query({}), find)
        few = await found_in_all(context, Query({}, rows=2), find)
    finally:
        missing.reset(token)
    assert [row["id"] for row in found.table.rows] == ["a/9", "a/8", "b/8", "a/7"]
    assert found.table.more == {"before": "7"}
    assert [row["id"] for row in few.table.rows] == ["a/9", "a/8"]
    assert few.table.more == {"before": "a/8"}


async def test_a_request_waits_once_for_a_shard_that_does_not_answer() -> None:
    parts = {name: SimpleNamespace(shard=Shard("", name=name)) for name in "abc"}
    context = cast("PageContext", SimpleNamespace(parts=parts))
    asked: Counter[str | None] = Counter()

    async def work(part: PageContext) -> str | None:
        asked[part.shard.name] += 1
        if part.shard.name == "b":
            raise TimeoutError
        if part.shard.name == "c":
            raise asyncpg.InsufficientPrivilegeError("permission denied")
        return part.shard.name

    for requests in (1, 2):
        missing.set({})
        lost.set({})
        for _ in range(2):
            assert await in_all(context, work) == {"a": "a"}
            assert missing.get() == {"b": "TimeoutError", "c": "permission denied"}
        assert asked == {"a": 2 * requests, "b": requests, "c": 2 * requests}
