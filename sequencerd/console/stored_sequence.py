"""The stored definition of a sequence, and the page that compares its revisions."""

from __future__ import annotations

import asyncio
import difflib
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sequencerd.console.all_shards import common_or_each, in_all
from sequencerd.console.context import PageContext, context_of, query_of, render
from sequencerd.console.query import NotFoundError
from sequencerd.definitions.diff import parse_document
from sequencerd.definitions.yaml_writer import to_yaml
from sequencerd.storage import connections


@dataclass(frozen=True)
class StoredSequence:
    """A sequence as it is in the database; `base` says so in forms. Of several shards, it is that
    of the first.
    """

    revision: int
    status: str
    from_file: bool
    by: str | None
    reason: str | None
    base: str


async def read_stored(context: PageContext, name: str) -> StoredSequence:
    """Read the current definition of a sequence. Raises NotFoundError."""
    found = await in_all(
        context, lambda part: connections.read(part.pool, "console_sequence", name)
    )
    stored = {shard: rows[0] for shard, rows in found.items() if rows}
    if not stored:
        raise NotFoundError(f"There is no sequence {name}.")
    first, *_ = stored.values()
    base = " ".join(
        str(row["revision"]) if shard is None else f"{shard}:{row['revision']}"
        for shard, row in stored.items()
    )
    merged = {
        "status": common_or_each({shard: row["status"] for shard, row in stored.items()}),
        "from_file": any(row["from_file"] for row in stored.values()),
        "base": base,
    }
    return StoredSequence(**{**first, **merged})


async def read_yaml(context: PageContext, name: str, revision: int | None) -> str:
    """Return a sequence as YAML, as it is or as a revision had it; of several shards, that of the
    first that has it. Raises NotFoundError.
    """
    found = await in_all(
        context, lambda part: connections.read(part.pool, "document", name, revision)
    )
    documents = (document for ((document,),) in found.values())
    document = next(filter(None, documents), None)
    if document is None:
        raise NotFoundError(f"The sequence {name} has no revision {revision}.")
    return await asyncio.to_thread(_yaml, name, document)


def _yaml(name: str, document: str | None) -> str:
    return to_yaml(parse_document(name, document)) if document else ""


async def compare(request: Request) -> Response:
    """Show a revision beside the previous one, or beside another."""
    context, query = context_of(request), query_of(request)
    name, revision = query.must("sequence"), query.number("revision", 0)
    rows = await connections.read(context.pool, "console_revisions", name, revision, 1)
    if not rows or rows[0]["revision"] != revision:
        raise NotFoundError(f"The sequence {name} has no revision {revision}.")
    before, after = rows[0]["before"], rows[0]["document"]
    async with context.simulating:  # of thousands of steps it takes seconds
        lines = await asyncio.to_thread(
            lambda: side_by_side(_yaml(name, before), _yaml(name, after))
        )
    stored = await read_stored(context, name)
    return render(
        request,
        "compare.html",
        title=f"Revision {revision} of {name}",
        name=name,
        row=rows[0],
        reason=context.mask({"message": rows[0]["reason"]})["message"],
        lines=lines,
        is_present=stored.revision == revision,
    )


def side_by_side(before: str, after: str) -> list[dict[str, Any]]:
    """Return the lines of two texts, as far as they differ, with their neighbours. A row without
    lines stands for what is left out.
    """
    old, new = before.splitlines(), after.splitlines()
    # lines that occur often begin no match, or a thousand steps would take minutes
    matcher = difflib.SequenceMatcher(None, old, new)
    rows: list[dict[str, Any]] = []
    for number, group in enumerate(matcher.get_grouped_opcodes()):
        if number:
            rows.append({"kind": "gap", "before": None, "after": None})
        for kind, first, last, start, end in group:
            rows += [
                {
                    "kind": kind,
                    "before": old[first + offset] if first + offset < last else None,
                    "after": new[start + offset] if start + offset < end else None,
                }
                for offset in range(max(last - first, end - start))
            ]
    return rows
