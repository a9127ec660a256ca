"""Apply plans."""

from __future__ import annotations

import json
from collections.abc import Sequence

import asyncpg

from sequencerd.definitions.compiler import Definition, Runners
from sequencerd.definitions.diff import seeds
from sequencerd.definitions.plan import Plan, SequencePlan, make
from sequencerd.errors import FileError, PlanError
from sequencerd.storage.statements import QUERIES

MAX_REMOVALS = 10  # attempts to remove steps at which enrollments arrive


async def apply(
    connection: asyncpg.Connection,
    definitions: Sequence[Definition],
    runners: Runners,
) -> Plan:
    """Change the database's sequences to the definitions, in the caller's transaction. Raises
    PlanError if the plan cannot be applied; FileError if the database rejects a definition.
    """
    await connection.execute(QUERIES["lock_definitions"])
    plan = await make(connection, definitions, runners)
    check(plan)
    await write(connection, plan, definitions)
    return plan


def check(plan: Plan, expected: str | None = None) -> None:
    """Raise PlanError if a plan cannot be applied, or does not have the `expected` fingerprint."""
    if expected is not None and plan.fingerprint != expected:
        raise PlanError(
            f"plan {expected} no longer holds: the files, the options or the sequences have "
            "changed since; make a new one with sequencerd plan"
        )
    if plan.refused:
        raise PlanError("\n".join(plan.refused))


async def write(
    connection: asyncpg.Connection,
    plan: Plan,
    definitions: Sequence[Definition],
    *,
    brake: int | None = None,
    from_files: bool = True,
) -> None:
    """Apply a plan of `make`, in the same transaction, which has locked the definitions. `brake` is
    the number of side effects that may begin in an hour, for a day, in the sequences that change.
    Raises FileError if the database rejects a definition.
    """
    written = [pair for pair in zip(plan.sequences, definitions, strict=True) if pair[0].changes]
    written.sort(key=lambda pair: pair[0].sequence)  # like the brakes that daemons lock
    # a step may get the former name of another: what is written names steps as they are afterwards
    for part in (_rename, _write):
        for one, definition in written:
            try:
                await part(connection, one, definition)
            except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
                raise FileError(f"{definition.where}: {error}") from error
    if brake is not None:
        changed = [one.sequence for one in plan.sequences if one.changes]
        await connection.execute(QUERIES["set_apply_brake"], changed, brake)
    if plan.archived:
        await connection.execute(QUERIES["archive"], plan.archived)
    if from_files:
        await connection.execute(QUERIES["mark_from_file"], [s.sequence for s in plan.sequences])


async def _rename(connection: asyncpg.Connection, one: SequencePlan, _: Definition) -> None:
    for old, new in one.changes.renamed.items():
        await connection.execute(QUERIES["rename_step"], one.sequence, old, new)


async def _write(connection: asyncpg.Connection, one: SequencePlan, definition: Definition) -> None:
    steps = one.after["steps"]
    names = [kept["name"] for kept in steps]
    reentry, brake = one.after["reentry"], one.after["brake"]
    await connection.execute(
        QUERIES["apply_sequence"],
        one.sequence,
        names[0],
        one.after["timezone"],
        one.after["status"],
        "after" if isinstance(reentry, dict) else reentry,
        one.after["lookup"],
        definition.sequence.recheck,
        one.after["description"],
        "{amount} {unit}".format(**reentry["after"]) if isinstance(reentry, dict) else None,
        None if one.after["window"] is None else json.dumps(one.after["window"]),
        json.dumps(one.after["enroll"]) if one.after["enroll"] else None,
        one.after["topic"],
        one.after["locale"],
        json.dumps(one.after["partials"]) if one.after["partials"] else None,
        brake and brake["at_most"],
        brake and brake["per"]["amount"] * (3600.0 if brake["per"]["unit"] == "hours" else 1.0),
    )
    await connection.execute(
        QUERIES["apply_steps"],
        one.sequence,
        names,
        list(range(len(steps))),
        [kept["type"] for kept in steps],
        [json.dumps(kept["config"]) for kept in steps],
        [kept["next"] for kept in steps],
        [kept["altNext"] for kept in steps],
        [seeds(one.after).get(name) for name in names],
    )
    await _remove_steps(connection, one, names)


async def _remove_steps(
    connection: asyncpg.Connection, one: SequencePlan, names: Sequence[str]
) -> None:
    """Delete the steps that are not in `names`, and move their enrollments as planned. Daemons may
    move more enrollments there at any time. Raises PlanError if one that has arrived since the plan
    cannot be moved.
    """
    for attempt in range(1, MAX_REMOVALS + 1):
        for old, new in one.moves.items():
            while await connection.fetchval(QUERIES["move_enrollments"], one.sequence, old, new):
                pass
        try:
            async with connection.transaction():
                await connection.execute(QUERIES["remove_steps"], one.sequence, names)
        except asyncpg.ForeignKeyViolationError as error:
            if (error.table_name, error.column_name) != ("steps", "name"):
                raise  # not of guard_step
            if not one.moves or attempt == MAX_REMOVALS:
                raise PlanError(
                    f"{one.sequence}: {error.args[0]}; they arrived after the plan was made: "
                    "specify where to continue (--move OLD=STEP), or apply it again"
                ) from error
        else:
            return
