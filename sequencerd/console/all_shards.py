"""Ask all shards for a page, and show what their answers have in common."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import TypeVar

from sequencerd.console.context import PageContext, lost, missing
from sequencerd.console.query import NotFoundError
from sequencerd.console.summary import SummaryRow
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief, is_lost

_T = TypeVar("_T")


async def in_all(
    context: PageContext,
    work: Callable[[PageContext], Awaitable[_T]],
    *,
    only: Collection[str] | None = None,
) -> dict[str | None, _T]:
    """Return the answers of all shards, or of `only` some, by name; with a single database, its
    answer. The page says which shards are missing. Raises the error if none answers.
    """
    if not context.parts:
        return {None: await work(context)}
    names = [name for name in context.parts if only is None or name in only]
    known = lost.get({})

    async def ask(name: str) -> _T:
        if name in known:
            raise known[name]
        return await work(context.parts[name])

    answers = await asyncio.gather(*map(ask, names), return_exceptions=True)
    found: dict[str | None, _T] = {}
    failed: list[BaseException] = []
    for name, answer in zip(names, answers, strict=True):
        if not isinstance(answer, BaseException):
            found[name] = answer
            continue
        failed.append(answer)
        if isinstance(answer, TRANSIENT_ERRORS):
            missing.get()[name] = brief(answer)
            if is_lost(answer):
                known[name] = answer
        elif not isinstance(answer, NotFoundError):  # only some may have a sequence
            raise answer
    if not found:
        raise failed[0]
    return found


def say_where_missing(found: Iterable[str | None]) -> str | None:
    """Say in which shards a change was made if some are missing; None if it was made in all."""
    if not missing.get():
        return None
    names = ", ".join(missing.get())
    return (
        f"{', '.join(map(str, found))}, not in {names}: repeat the change when all can be reached."
    )


def common_or_each(values: Mapping[str | None, _T]) -> _T | str:
    """Return a value if all shards have the same, otherwise the value of each shard."""
    first, *others = values.values()
    if all(value == first for value in others):
        return first
    return "; ".join(f"{shard}: {value}" for shard, value in values.items())


def grouped(found: Mapping[str | None, _T | None]) -> list[tuple[str | None, _T]]:
    """Return each value once, with the names of its shards, or None if all shards have it."""
    groups: list[tuple[list[str | None], _T]] = []
    for name, value in found.items():
        if value is None:
            continue
        for names, other in groups:
            if value == other:
                names.append(name)
                break
        else:
            groups.append(([name], value))
    return [
        (None if len(names) == len(found) else ", ".join(map(str, names)), value)
        for names, value in groups
    ]


def matching_rows(
    found: Mapping[str | None, Iterable[SummaryRow]], key: Callable[[SummaryRow], object]
) -> list[dict[str | None, SummaryRow]]:
    """Return the rows of all shards; a row that several shards have is returned once. The nth row
    with a key is the same in all of them.
    """
    merged: dict[tuple[object, int], dict[str | None, SummaryRow]] = {}
    for name, rows in found.items():
        times: Counter[object] = Counter()
        for row in rows:
            times[key(row)] += 1
            merged.setdefault((key(row), times[key(row)]), {})[name] = row
    return list(merged.values())
