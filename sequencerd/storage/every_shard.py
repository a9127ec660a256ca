"""Do work on every shard, and report where it failed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from sequencerd.errors import (
    FileError,
    SequencerdError,
    SettingsError,
    ShardsError,
    UsageError,
)
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import TRANSIENT_ERRORS

_T = TypeVar("_T")

MAX_CONCURRENT_SHARDS = 8  # shards that are processed at the same time

Explain = Callable[[Shard, BaseException], Awaitable[SequencerdError]]
"""Returns what an error of a shard means to the user."""


class ShardAnswers(NamedTuple, Generic[_T]):
    """The answers of shards, in their order, and the errors of the others."""

    found: Mapping[Shard, _T]
    missing: Mapping[Shard, SequencerdError]

    def lines(self, *, refusals: bool = False) -> list[str]:
        """Describe what is missing. Errors of only some shards, such as a name that they do not
        have, are described with `refusals`.
        """
        return _named(
            {
                shard: error
                for shard, error in self.missing.items()
                if refusals or not isinstance(error, UsageError)
            }
        )


def differences(by_shard: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Return the keys whose values differ between shards, each with the shards of each value."""
    found = []
    for key in sorted({key for values in by_shard.values() for key in values}):
        groups: dict[str, list[str]] = {}
        for shard, values in by_shard.items():
            groups.setdefault(json.dumps(values.get(key), sort_keys=True), []).append(shard)
        if len(groups) > 1:
            found.append(f"{key} ({' | '.join(map(', '.join, groups.values()))})")
    return found


def _named(errors: Mapping[Shard, SequencerdError]) -> list[str]:
    return [f"shard {shard.name}: {error}" for shard, error in errors.items()]


async def ask(
    explain: Explain,
    shards: Iterable[Shard],
    work: Callable[[Shard], Awaitable[_T]],
    *,
    at_once: int = MAX_CONCURRENT_SHARDS,
    warn: Callable[[str], None] | None = None,
) -> ShardAnswers[_T]:
    """Do the same on every shard. An error on one does not affect the others. Raises
    SequencerdError if all fail; without [shards], the error of `work`. Where the work changes
    something, an interruption is reported to `warn`, with the shards in which it is done.
    """
    answers = await ask_each(explain, list(shards), work, at_once, warn)
    if not answers.found:
        raise _one_of(answers.missing)
    return answers


async def ask_all(
    explain: Explain,
    shards: Iterable[Shard],
    work: Callable[[Shard], Awaitable[_T]],
    *,
    otherwise: str,
    at_once: int = MAX_CONCURRENT_SHARDS,
) -> Mapping[Shard, _T]:
    """Do the same where no shard may be missing. `otherwise` says in the error what that means."""
    answers = await ask_each(explain, list(shards), work, at_once)
    if answers.missing:
        error = _one_of(answers.missing)
        if not answers.found and isinstance(error, UsageError | FileError):
            raise error
        raise ShardsError("\n".join([*_named(answers.missing), otherwise]))
    return answers.found


async def ask_each(
    explain: Explain,
    shards: Sequence[Shard],
    work: Callable[[Shard], Awaitable[_T]],
    at_once: int = MAX_CONCURRENT_SHARDS,
    warn: Callable[[str], None] | None = None,
) -> ShardAnswers[_T]:
    """Do the same, also if all fail. Raises SettingsError: no shard is used with wrong settings."""
    if shards[0].name is None:
        return ShardAnswers({shards[0]: await work(shards[0])}, {})
    free = asyncio.Semaphore(at_once)
    found: dict[Shard, _T] = {}
    missing: dict[Shard, SequencerdError] = {}

    async def one(shard: Shard) -> None:
        async with free:
            try:
                found[shard] = await work(shard)
            except BrokenPipeError:
                raise  # of the output: the reader is gone
            except (SequencerdError, *TRANSIENT_ERRORS) as error:
                missing[shard] = await explain(shard, error)

    try:
        await asyncio.gather(*map(one, shards))
    except asyncio.CancelledError:
        if warn is not None:
            warn(_interrupted(found, [shard for shard in shards if shard not in found]))
        raise
    found = {shard: found[shard] for shard in shards if shard in found}
    missing = {shard: missing[shard] for shard in shards if shard in missing}
    if wrong := {shard: one for shard, one in missing.items() if isinstance(one, SettingsError)}:
        raise SettingsError("\n".join(_named(wrong)))
    return ShardAnswers(found, missing)


def _interrupted(done: Iterable[Shard], others: Iterable[Shard]) -> str:
    parts = (("done in", done), ("perhaps not in", others))
    said = [
        f"{text} {', '.join(names)}" for text, of in parts if (names := [str(s.name) for s in of])
    ]
    return f"interrupted: {', '.join(said)}; repeat the command"


def _one_of(errors: Mapping[Shard, SequencerdError]) -> SequencerdError:
    """Combine the errors of several shards. An error that all have is the user's mistake."""
    first, *others = errors.values()
    is_same = all(str(one) == str(first) for one in others)
    if isinstance(first, UsageError | FileError) and is_same:
        return first
    lines = _named(errors)
    return ShardsError("\n".join(lines)) if others else type(first)(lines[0])
