"""Plan and apply: what would change, for which enrollments; and the same, done."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from sequencerd.core.advance import advance
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.model import InvalidStep, Sequence
from sequencerd.core.step_types import BUILT_IN, is_instant, named_steps
from sequencerd.core.step_types.effects import EffectConfig
from sequencerd.definitions import apply_plan, files, plan
from sequencerd.definitions.compiler import Definition, compile_behaviour, from_rows
from sequencerd.definitions.diff import compare, is_same
from sequencerd.definitions.files import FileSequence
from sequencerd.definitions.yaml_writer import to_yaml
from sequencerd.errors import FileError, PlanError
from sequencerd.storage.sequences import read_definitions
from sequencerd.storage.statements import QUERIES
from sequencerd.testing import load
from tests.definitions.test_check import RUNNERS as FILE_RUNNERS
from tests.definitions.test_step_types import CASES
from tests.helpers.engines import ALL_ENDED, enroll, running_engine, until
from tests.helpers.plans import RUNNERS, Applying

GOOD = """
name: s
timezone: Europe/Berlin
steps:
  - {name: hello, type: Note, config: {text: Hello}}
  - {name: pause, type: WaitForDuration, config: {amount: 3, unit: days}}
  - {name: bye, type: Note}
"""
PAID = "{lodashCommand: eq, value: {type: get, value: data.paid}, compareTo: {type: raw, value: 1}}"
WAITS_FOR_PAYMENT = f"WaitForCondition, config: {PAID}"
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ"
GOAL = f"  - {{name: paid, type: Goal, config: {PAID}}}\n"


@pytest.fixture
def apply(connection: asyncpg.Connection, tmp_path: Path) -> Applying:
    return Applying(connection, tmp_path)


async def enrolled_at(
    connection: asyncpg.Connection, step: str, subject: str, ago: str, wait: str
) -> int:
    """An enrollment that came to a step a while ago."""
    id_ = await enroll(connection, "s", subject)
    await connection.execute(
        "UPDATE sequencer.enrollments SET step = $2, visit = 2, entered_at = now() - $3::interval,"
        " wake_at = now() - $3::interval + $4::interval WHERE id = $1",
        *(id_, step, interval(ago), interval(wait)),
    )
    return id_


def interval(text: str) -> timedelta:
    amount, unit = text.split()
    return timedelta(**{unit: int(amount)})


async def test_apply_changes_sequences_and_a_repetition_changes_nothing(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    assert (await apply(GOOD)).sequences[0].changes.is_new
    before = await connection.fetch("SELECT * FROM sequencer.steps ORDER BY position")
    again = await apply(GOOD)
    assert not again
    assert list(again.lines(done=True)) == ["s: nothing changed"]
    assert await connection.fetch("SELECT * FROM sequencer.steps ORDER BY position") == before
    assert await connection.fetchval("SELECT revision FROM sequencer.sequences") == 1
    assert await connection.fetchval("SELECT count(*) FROM sequencer.revisions") == 1


async def test_a_description_is_kept_and_its_change_wakes_nothing(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD)
    await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    described = GOOD.replace(
        "name: s\n", "name: s\ndescription: |\n  Greets.\n  Says goodbye.\n", 1
    )
    assert await apply.lines(described) == ["s:", "changed description"]
    await apply(described)
    short = GOOD.replace("name: s\n", "name: s\ndescription: Greets.\n", 1)
    await apply(short)
    assert await apply.lines(GOOD) == ["s:", "description: Greets. → none"]
    (text,) = await connection.fetchrow("SELECT sequencer.document('s')")
    assert to_yaml(json.loads(text)).startswith("name: s\ndescription: Greets.\n")
    marked = "SELECT count(*) FROM sequencer.steps WHERE reschedule_from IS NOT NULL"
    assert await connection.fetchval(marked) == 0
    with pytest.raises(FileError, match="description: must have at most 10,000 characters"):
        await apply(GOOD.replace("name: s\n", f"name: s\ndescription: {'x' * 10_001}\n", 1))


async def test_a_plan_lists_each_change_and_apply_makes_it(apply: Applying) -> None:
    await apply(GOOD)
    changed = """
name: s
reentry: never
steps:
  - {name: start, renamedFrom: hello, type: Note, config: {text: Hi, to: [ada]}, next: bye}
  - {name: bye, type: Note, altNext: start}
  - {name: more, type: Other, next: start}
""".replace("Other", "WaitForDuration, config: {amount: 1, unit: day}")
    said = [
        "s:",
        "timezone: Europe/Berlin → UTC",
        "reentry: after_end → never",
        "renamed hello → start",
        "added more (WaitForDuration)",
        "changed start: config.text Hello → Hi, config.to, next pause → bye",
        "changed bye: next none → more, altNext none → start",
        "removed pause",
    ]
    assert await apply.lines(changed) == said
    planned = await apply.plan(changed)
    done = await apply(changed, expected=planned.fingerprint)
    assert [line.strip() for line in done.lines(done=True)] == said
    assert await apply.lines(changed) == ["s: nothing changed"]


async def test_a_plan_counts_effects_on_enrollments(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD)
    for subject, ago in (("ada", "2 days"), ("bob", "1 days"), ("eve", "0 days")):
        await enrolled_at(connection, "pause", subject, ago, "3 days")
    begins_later = (
        "INSERT INTO sequencer.enrollments (sequence, subject, step, wake_at)"
        " VALUES ('s', 'zoe', 'pause', now() + interval '1 year')"
    )
    await connection.execute(begins_later)
    shorter = GOOD.replace("amount: 3", "amount: 36").replace("unit: days", "unit: hours")
    assert re.fullmatch(
        rf"3 wait at pause: 1 would continue at once, 2 wait until another time, {TIME} to {TIME}",
        (await apply.lines(shorter))[-1],
    )
    same = GOOD.replace("amount: 3", "amount: 72").replace("unit: days", "unit: hours")
    assert (await apply.lines(same))[-1] == "3 wait at pause: 3 wait as before"
    until = "WaitForDate, config: {date: '{{data.until}}'}"
    broken = GOOD.replace("WaitForDuration, config: {amount: 3, unit: days}", until)
    assert (
        "3 wait at pause: 3 would fail: bad_data, step 'pause': date ''"
        in (await apply.lines(broken))[-1]
    )
    paid = GOOD.replace("WaitForDuration, config: {amount: 3, unit: days}", WAITS_FOR_PAYMENT)
    assert (await apply.lines(paid))[-1] == "3 wait at pause: 3 wait until the data changes"
    paused = shorter.replace("name: s", "name: s\nstatus: paused")
    assert (await apply.lines(paused))[-1] == "nothing is executed while it is paused"
    done = await apply(shorter)
    assert re.fullmatch(
        rf"3 wait at pause: 1 continues at once, 2 wait until another time, {TIME} to {TIME}",
        list(done.lines(done=True))[-1].strip(),
    )


async def test_a_window_is_planned_applied_and_exported(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    windowed = GOOD.replace("steps:", "window: {days: [sun, mon], holidays: DE}\nsteps:")
    await apply(GOOD)
    for subject in ("ada", "bob"):
        await enrolled_at(connection, "hello", subject, "1 hours", "30 hours")
    # it is told before, and after, that the calendar is empty
    lines = await apply.lines(windowed)
    assert lines[:2] == ["s:", "changed window"]
    assert lines[2].startswith("calendar 'DE' has no holidays: fill it with")
    assert lines[3].startswith("2 wait at hello: 2 would fail: invalid_step, calendar 'DE'")
    await connection.execute("INSERT INTO sequencer.holidays VALUES ('DE', '2001-01-01')")
    assert not any("calendar" in line for line in await apply.lines(windowed))
    await apply(windowed)
    assert not await apply.plan(windowed)
    document = json.loads(await connection.fetchval("SELECT sequencer.document('s')"))
    assert document["window"] == {"days": ["sun", "mon"], "holidays": "DE"}
    exported = to_yaml(document)
    assert not await apply.plan(exported)
    assert await apply.lines(GOOD)


async def test_keys_are_exported_in_the_order_of_the_documentation(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    text = """name: s
reentry:
  after:
    amount: 90
    unit: days
window:
  days:
    - mon
  from: 09:00
  to: '17:00'
steps:
  - name: until
    type: WaitForCondition
    config:
      any:
        - lodashCommand: eq
          value:
            type: get
            value: data.x
          compareTo:
            type: raw
            value: 1
      timeout:
        amount: 3
        unit: days
  - name: note
    type: Note
    config:
      z: 1
      aa: 2
      retry:
        attempts: 3
        firstDelay: 10
      limit:
        at_most: 3
        per:
          amount: 7
          unit: days
        then: skip
    altNext: null
"""
    await apply(text)
    document = json.loads(await connection.fetchval("SELECT sequencer.document('s')"))
    assert to_yaml(document) == text


async def test_a_topic_is_planned_applied_and_exported(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    about = GOOD.replace("steps:", "topic: marketing\nsteps:")
    await apply(GOOD)
    await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    assert await apply.lines(about) == ["s:", "topic: none → marketing"]
    await apply(about)
    assert not await apply.plan(about)
    document = json.loads(await connection.fetchval("SELECT sequencer.document('s')"))
    assert document["topic"] == "marketing"
    assert not await apply.plan(to_yaml(document))
    assert await apply.lines(GOOD) == ["s:", "topic: marketing → none"]
    # where topics are listed, one that is not may be misspelt
    await connection.execute("INSERT INTO sequencer.topics (name, title) VALUES ('marketin', 'x')")
    hint = "topic 'marketing' is not in the table topics; did you mean 'marketin'?"
    assert hint in await apply.lines(about)
    limited = "limit: {topic: marketing, at_most: 1, per: {days: 1}}"
    assert hint in await apply.lines(GOOD.replace("{text: Hello}", f"{{{limited}}}"))
    await connection.execute("UPDATE sequencer.topics SET name = 'marketing'")
    assert hint not in await apply.lines(about)


async def test_limits_are_planned_with_counts(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    """Of steps and of topics; what is wrong with one is reported where the topic is used."""

    def file(topic: str, *limits: str) -> str:
        steps = "".join(
            f"  - {{name: s{n}, type: Note, config: {{{limit}}}, altNext: null}}\n"
            for n, limit in enumerate(limits)
        )
        return f"name: s\n{topic}steps:\n{steps}"

    three = "limit: {at_most: 3, per: {days: 7}}"
    two = "limit: {at_most: 2, per: {days: 7}}"
    await connection.execute(
        "INSERT INTO sequencer.topics VALUES"
        " ('news', 'News', NULL, '{\"at_most\": 5, \"per\": {\"days\": 30}}'),"
        " ('odd', 'Odd', NULL, '{\"at_most\": 0, \"per\": {\"days\": 30}}')"
    )
    lines = await apply.lines(file("", three, three, ""))
    assert "limits 2 steps: s0, s1" in lines
    await apply(file("", three, three, ""))
    assert {"limits otherwise 1 step: s0", "no longer limits 1 step: s1", "limits 1 step: s2"} <= {
        *await apply.lines(file("", two, "", three))
    }
    news = "the limit of the topic news (5 in 30 days) applies to "
    lines = await apply.lines(file("topic: news\n", three, "topic: null, " + three, ""))
    assert f"{news}2 steps: s0, s2" in lines
    assert not any(line.startswith(("limits", "no longer")) for line in lines)
    await apply(file("topic: news\n", three, three, ""))
    assert not await apply.plan(file("topic: news\n", three, three, ""))
    lines = await apply.lines(file("topic: news\n", three, three, "topic: odd"))
    assert any(
        line.startswith("the limit of the topic 'odd' in the table topics is wrong: at_most: must")
        and line.endswith("it stops 1 step: s2")
        for line in lines
    )


async def test_a_plan_counts_waits_for_limits(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    text = (
        "name: s\nsteps:\n"
        "  - {name: a, type: Note, config: {limit: {at_most: %d, per: {days: 7}}}, altNext: null}\n"
    )
    await apply(text % 3)
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, entered_at, wake_at)"
        " VALUES ('s', 'ada', now(), now() + interval '1 day')"
    )
    assert "1 waits at a: 1 would continue as soon as the limit has room" in await apply.lines(
        text % 4
    )


async def test_texts_in_several_languages_are_planned_by_language(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    mail = """
name: s
locale: data.language
steps:
  - name: mail
    type: Email
    config:
      from: a@example.com
      to: "{{data.email}}"
      subject: {en: Hello, de: Hallo}
      text: Hello
"""
    other = mail.replace("locale: data.language\n", "").replace("de: Hallo", "de: Moin, fr: Salut")
    await apply(mail)
    assert not await apply.plan(mail)
    assert await apply.lines(other) == [
        "s:",
        "locale: data.language → none",
        "changed mail: config.subject.de Hallo → Moin, config.subject.fr none → Salut",
    ]
    document = json.loads(await connection.fetchval("SELECT sequencer.document('s')"))
    assert document["locale"] == "data.language"
    assert not await apply.plan(to_yaml(document))
    await apply(other)
    assert await connection.fetchval("SELECT locale FROM sequencer.sequences") is None
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute("UPDATE sequencer.sequences SET locale = 'language'")


async def test_a_goal_and_a_zone_affect_all_enrollments(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD)
    id_ = await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    await enrolled_at(connection, "pause", "bob", "1 days", "3 days")
    await connection.execute(
        "UPDATE sequencer.enrollments SET data = '{\"paid\": 1}' WHERE id = $1", id_
    )
    await connection.execute("UPDATE sequencer.enrollments SET leased_by = 'd' WHERE id <> $1", id_)
    assert (await apply.lines(GOOD + GOAL))[1:] == [
        "added paid (Goal)",
        "changed bye: next none → paid",
        "2 wait at pause: 1 would continue at once, 1 is being executed and finishes unchanged",
    ]
    assert len(await apply.lines(GOOD.replace("Berlin", "Rome"))) == 3
    await apply(GOOD + GOAL)
    # a goal that is renamed or moved is met by no other enrollment
    first = GOOD.replace("steps:\n", f"steps:\n{GOAL}").replace("name: paid", "name: p")
    first = first.replace("type: Goal", "type: Goal, renamedFrom: paid")
    assert not any(" wait at " in line for line in await apply.lines(first))


@pytest.mark.parametrize("is_swapped", [True, False])
async def test_a_goal_that_takes_the_condition_of_another_affects_all_enrollments(
    apply: Applying, connection: asyncpg.Connection, is_swapped: bool
) -> None:
    """Two goals swap their conditions; or a wait becomes a goal with that of one that moves on."""
    vip = PAID.replace("data.paid", "data.vip")
    other = GOAL.replace("paid, type", "vip, type").replace(PAID, vip)
    before, after = GOOD + GOAL + other, GOOD + GOAL.replace(PAID, vip) + other.replace(vip, PAID)
    if not is_swapped:
        before = GOOD + GOAL
        after = GOOD.replace("steps:\n", f"steps:\n{GOAL}").replace(
            "name: bye, type: Note", f"name: bye, type: Goal, config: {PAID}"
        )
    await apply(before)
    await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    await connection.execute("UPDATE sequencer.steps SET reschedule_from = NULL")
    assert any(line.startswith("1 waits at pause: ") for line in await apply.lines(after))
    await apply(after)
    rescheduled = "SELECT reschedule_from FROM sequencer.steps WHERE name = 'pause'"
    assert await connection.fetchval(rescheduled) == 0


async def test_a_removed_step_with_enrollments_needs_a_move(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD)
    id_ = await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    failed = await enrolled_at(connection, "pause", "bob", "1 days", "3 days")
    await connection.execute(
        "UPDATE sequencer.enrollments SET status = 'failed' WHERE id = $1", failed
    )
    later = (
        "INSERT INTO sequencer.enrollments (sequence, subject, step, wake_at)"
        " VALUES ('s', 'zoe', 'pause', '2040-01-01Z') RETURNING id"
    )
    later_id = await connection.fetchval(later)
    without = "\n".join(line for line in GOOD.splitlines() if "pause" not in line)
    (refused,) = (await apply.plan(without)).refused
    assert refused == (
        "s: 2 enrollments at pause, which is removed; specify where to continue: --move pause=STEP"
    )
    with pytest.raises(PlanError, match="2 enrollments at pause"):
        await apply(without)
    with pytest.raises(PlanError, match="'bey' does not exist; did you mean 'bye'"):
        await apply(without, moves={"pause": "bey"})
    assert await connection.fetchval("SELECT count(*) FROM sequencer.steps") == 3
    wrong = {"pause": "bye", "paus": "bye"}
    with pytest.raises(PlanError, match="do not remove a step 'paus'; did you mean 'pause'"):
        await apply(without, moves=wrong)
    assert await connection.fetchval("SELECT count(*) FROM sequencer.steps") == 3
    done = await apply(without, moves={"pause": "bye"})
    assert "  2 move from pause to bye, where a new visit begins" in done.lines(done=True)
    rows = await connection.fetch(
        "SELECT id, step, visit, entered_at > now() - interval '1 hour' AS new, wake_at <= now()"
        " AS due FROM sequencer.enrollments ORDER BY id"
    )
    assert [tuple(row) for row in rows] == [
        (id_, "bye", 3, True, True),
        (failed, "bye", 3, True, None),
        (later_id, "bye", 2, None, False),
    ]
    moved = await connection.fetch(
        "SELECT step, message FROM sequencer.events WHERE action='moved'"
    )
    assert {tuple(row) for row in moved} == {("pause", "to bye by postgres")}


@pytest.mark.parametrize("old", ["pause", "nowhere"])
async def test_a_move_from_a_step_that_is_not_removed_is_refused(
    apply: Applying, connection: asyncpg.Connection, old: str
) -> None:
    await apply(GOOD)
    await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    changed = GOOD.replace("bye", "adieu")
    refusal = f"--move {old}=adieu: these files do not remove a step '{old}'; available: bye"
    assert (await apply.plan(changed, moves={old: "adieu"})).refused == (refusal,)
    for text in (changed, GOOD):
        with pytest.raises(PlanError, match=f"do not remove a step '{old}'"):
            await apply(text, moves={old: "adieu"})
    assert await connection.fetchval("SELECT revision FROM sequencer.sequences") == 1
    assert await connection.fetchval("SELECT step FROM sequencer.enrollments") == "pause"


async def test_enrollments_that_reach_a_removed_step_after_the_plan_are_not_lost(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD)
    without = "\n".join(line for line in GOOD.splitlines() if "pause" not in line)
    planned = await apply.plan(without)
    await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    with pytest.raises(PlanError, match="1 enrollment at pause"):
        await apply(without, expected=planned.fingerprint)


ARRIVAL = """
CREATE SEQUENCE public.removals;
CREATE FUNCTION public.arrive() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF nextval('public.removals') <= {times} THEN -- which is not rolled back
        INSERT INTO sequencer.enrollments (sequence, subject, step)
        VALUES (OLD.sequence, 'late', OLD.name);
    END IF;
    RETURN OLD;
END $$;
CREATE TRIGGER a_arrives BEFORE DELETE ON sequencer.steps
    FOR EACH ROW EXECUTE FUNCTION public.arrive();
"""


async def test_enrollments_that_arrive_while_their_step_is_removed(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD)
    await connection.execute(ARRIVAL.format(times=2))
    without = "\n".join(line for line in GOOD.splitlines() if "pause" not in line)
    with pytest.raises(PlanError, match=r"^s: step 'pause' .* \(--move OLD=STEP\)"):
        await apply(without)
    await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    await apply(without, moves={"pause": "bye"})
    assert await connection.fetchval("SELECT last_value FROM public.removals") == 3
    assert await connection.fetchval("SELECT step FROM sequencer.enrollments") == "bye"


async def test_a_foreign_key_of_others_is_no_arrival(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD)
    await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    await connection.execute(
        "CREATE SEQUENCE public.removals;"
        "CREATE FUNCTION public.count() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM nextval('public.removals'); RETURN OLD; END $$;"
        "CREATE TRIGGER z_counts BEFORE DELETE ON sequencer.steps"
        " FOR EACH ROW EXECUTE FUNCTION public.count();"
        "CREATE TABLE public.owners (sequence text, step text,"
        " FOREIGN KEY (sequence, step) REFERENCES sequencer.steps);"
        "INSERT INTO public.owners VALUES ('s', 'pause')"
    )
    without = "\n".join(line for line in GOOD.splitlines() if "pause" not in line)
    with pytest.raises(FileError, match=r"sequence 's'.* \"owners_sequence_step_fkey\""):
        await apply(without, moves={"pause": "bye"})
    assert await connection.fetchval("SELECT last_value FROM public.removals") == 1
    await connection.execute("DELETE FROM public.owners")
    await apply(without, moves={"pause": "bye"})


async def test_a_plan_that_no_longer_holds_is_refused(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD)
    shorter = GOOD.replace("amount: 3", "amount: 1")
    fingerprint = (await apply.plan(shorter)).fingerprint
    assert (await apply.plan(shorter)).fingerprint == fingerprint
    await connection.execute("UPDATE sequencer.sequences SET status = 'paused'")
    with pytest.raises(PlanError, match="no longer holds"):
        await apply(shorter, expected=fingerprint)
    await apply(shorter, expected=(await apply.plan(shorter)).fingerprint)
    other = (await apply.plan(GOOD)).fingerprint
    with pytest.raises(PlanError, match="no longer holds"):
        await apply(GOOD.replace("Hello", "Hi"), expected=other)


async def test_renames_keep_enrollments_and_goals(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD + GOAL)
    id_ = await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    await connection.execute("UPDATE sequencer.enrollments SET goals_met = '{x,paid}'")
    before = await connection.fetchrow("SELECT entered_at, wake_at FROM sequencer.enrollments")
    await connection.execute("UPDATE sequencer.steps SET reschedule_from = NULL")
    # a name that is given on: pause becomes bye, and bye becomes end
    renamed = (
        (GOOD + GOAL)
        .replace("name: bye", "name: end, renamedFrom: bye")
        .replace("name: pause", "name: bye, renamedFrom: pause")
        .replace("name: paid", "name: customer, renamedFrom: paid")
    )
    done = await apply(renamed)
    assert done.sequences[0].changes.renamed == {"bye": "end", "pause": "bye", "paid": "customer"}
    assert not done.sequences[0].changes.changed
    row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", id_)
    assert (row["step"], row["visit"], row["goals_met"]) == ("bye", 2, ["x", "customer"])
    assert (row["entered_at"], row["wake_at"]) == tuple(before)
    assert await connection.fetchval(
        "SELECT bool_and(reschedule_from IS NULL) FROM sequencer.steps"
    )
    assert not await apply(renamed)


async def test_names_that_are_given_on_are_written_as_planned(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    """The first step gets the former name of another, also in the configs of other sequences."""
    jump = "---\nname: a\nsteps:\n  - {name: j, type: GoTo, config: {sequence: s, step: STEP}}\n"
    await apply(GOOD + jump.replace("STEP", "hello"))
    renamed = (GOOD + jump.replace("STEP", "pause")).replace("steps:", "reentry: never\nsteps:")
    renamed = renamed.replace("name: pause", "name: rest, renamedFrom: pause")
    renamed = renamed.replace("name: hello", "name: pause, renamedFrom: hello")
    assert (await apply.lines(renamed))[2:4] == ["renamed pause → rest", "renamed hello → pause"]
    waiting = await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    await apply(renamed)
    assert await apply.lines(renamed) == ["s: nothing changed", "a: nothing changed"]
    new = await enroll(connection, "s", "bob")
    rows = await connection.fetch("SELECT id, step FROM sequencer.enrollments")
    assert dict(rows) == {waiting: "rest", new: "pause"}


async def test_a_plan_knows_met_goals_and_executed_side_effects_by_their_new_names(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    repeated = GOAL.replace("type: Goal", "type: Goal, next: hello")
    await apply(GOOD + repeated)
    for subject in ("ada", "bob"):
        await enrolled_at(connection, "pause", subject, "1 days", "3 days")
    await connection.execute(
        "UPDATE sequencer.enrollments SET data = '{\"paid\": 1}', goals_met = '{paid}',"
        " wake_at = entered_at + interval '3 days', executed = CASE subject WHEN 'bob' THEN"
        " '{s/bye}' ELSE '{}' END::text[]"
    )
    # the step at which they wait becomes one that is executed once more, or, for bob, a loop
    renamed = (GOOD + repeated).replace("name: paid", "name: customer, renamedFrom: paid")
    renamed = renamed.replace("amount: 3", "amount: 1").replace(
        "name: bye", "name: end, renamedFrom: bye"
    )
    assert (await apply.lines(renamed))[-1] == (
        "2 wait at pause: 1 would continue at once, 1 would fail: loop, a loop that never waits: "
        "s/end → s/end; add a step that waits, so that time passes before a side effect is "
        "executed again"
    )


async def test_a_met_goal_that_is_forgotten_changes_no_wait(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD + GOAL)
    await enrolled_at(connection, "pause", "ada", "1 days", "3 days")
    await connection.execute("UPDATE sequencer.enrollments SET goals_met = '{paid}'")
    repeated = GOOD + GOAL.replace("{lodash", "{repeat: true, lodash")
    assert (await apply.lines(repeated))[-1] == "1 waits at pause: 1 waits as before"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            GOOD.replace("name: bye", "name: pause, renamedFrom: bye").replace(
                "name: pause, type: Wait", "name: bye, renamedFrom: pause, type: Wait"
            ),
            "change names in a circle",
        ),
        (
            GOOD.replace("name: bye", "name: bye, renamedFrom: x").replace(
                "name: pause", "name: pause, renamedFrom: x"
            ),
            "another step was also renamed from 'x'",
        ),
    ],
)
async def test_impossible_renames_are_explained(apply: Applying, text: str, words: str) -> None:
    with pytest.raises(FileError, match=words):
        await apply(text)


async def test_a_pause_by_hand_outlives_an_apply(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD)
    await connection.execute("UPDATE sequencer.sequences SET status = 'paused'")
    assert not await apply(GOOD)
    await apply(GOOD.replace("name: s", "name: s\nstatus: active"))
    assert await connection.fetchval("SELECT status FROM sequencer.sequences") == "active"
    await apply(GOOD.replace("name: s", "name: s\nstatus: archived"))
    assert await apply.lines(GOOD) == ["s:", "status: archived → active"]


async def test_prune_archives_sequences_that_no_file_has(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD)
    await connection.execute(
        "INSERT INTO sequencer.sequences (name, first_step) VALUES ('by-hand', 'a')"
    )
    other = GOOD.replace("name: s\n", "name: t\n")
    assert (await apply(other)).archived == ()
    assert (await apply.plan(other, prune=True)).archived == ("s",)
    assert (await apply(other, prune=True)).archived == ("s",)
    rows = await connection.fetch("SELECT name, status FROM sequencer.sequences ORDER BY name")
    assert [tuple(row) for row in rows] == [
        ("by-hand", "active"),
        ("s", "archived"),
        ("t", "active"),
    ]
    assert not await apply(other, prune=True)
    assert await apply.lines(GOOD) == ["s:", "status: archived → active"]


async def test_concurrent_applies_run_one_after_the_other(
    apply: Applying, database: str, tmp_path: Path
) -> None:
    others = [await asyncpg.connect(database) for _ in range(3)]
    (tmp_path / "x").mkdir()
    appliers = [Applying(other, tmp_path / "x") for other in others]
    done = await asyncio.gather(*(applier(GOOD) for applier in appliers))
    assert sorted(bool(one) for one in done) == [False, False, True]
    for other in others:
        await other.close()


@pytest.mark.parametrize("config", [{"x": "\0"}, {"x": "\ud800"}])
async def test_values_that_postgresql_cannot_store_are_explained(
    apply: Applying, connection: asyncpg.Connection, config: Mapping[str, Any]
) -> None:
    apply.file.write_text(GOOD)
    (definition,) = files.read_file(apply.file, RUNNERS)
    definition.sequence.steps["hello"].config["x"] = config["x"]  # type: ignore[index]
    with pytest.raises(FileError, match="sequence 's'"):
        async with connection.transaction():
            await apply_plan.apply(connection, [definition], RUNNERS)


async def test_equal_jsonb_is_no_change(apply: Applying, connection: asyncpg.Connection) -> None:
    await apply(GOOD)
    assert not await apply(GOOD.replace("amount: 3", "amount: 3.0"))
    await apply(GOOD.replace("text: Hello", "text: 1"))
    assert (await apply(GOOD.replace("text: Hello", "text: true"))).sequences[0].changes
    assert not await apply(GOOD.replace("text: Hello", "text: true"))
    await apply(GOOD.replace("text: Hello", "text: 1.0e+23"))
    assert not await apply(GOOD.replace("text: Hello", "text: 1.0e+23"))


async def test_a_plan_counts_scheduled_enrollments(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        "CREATE SCHEMA app; CREATE VIEW app.due AS SELECT 'x' || n AS subject"
        " FROM generate_series(1, 12) AS n"
    )
    text = (
        "{name: s, enroll: {from: %s, schedule: 0 9 * * 1-5, at_most: 20},"
        " steps: [{name: a, type: WaitForDuration, config: {amount: 3, unit: days}}]}"
    )
    assert "12 of app.due would enter now" in await apply.lines(text % "app.due")
    await apply(text % "app.due")
    await enroll(connection, "s", "x3")
    assert "11 of app.due would enter now" in await apply.lines(text % "app.due")
    few = text.replace("at_most: 20", "at_most: 2") % "app.due"
    assert "more than at_most = 2 of app.due would enter now: none would" in await apply.lines(few)
    told = "app.none cannot be read: no view, table or function without arguments is named app.none"
    assert told in await apply.lines(text % "app.none")
    document = json.loads(await connection.fetchval("SELECT sequencer.document('s')"))
    assert await apply.lines(to_yaml(document)) == [
        "s: nothing changed",
        "11 of app.due would enter now",
    ]
    # what the query may not do is allowed again after it
    assert await connection.fetchval("SHOW statement_timeout") == "0"


@pytest.mark.parametrize(
    ("span", "kept"),
    [
        ("{amount: 90, unit: days}", "{'amount': 90, 'unit': 'days'}"),
        ("{amount: 1, unit: year}", "{'amount': 12, 'unit': 'months'}"),
        ("{amount: 36, unit: hours}", "{'amount': 36, 'unit': 'hours'}"),
        ("{amount: 90, unit: minutes}", "{'amount': 5400, 'unit': 'seconds'}"),
    ],
)
async def test_reentry_after_a_time_is_applied_and_exported(
    apply: Applying, connection: asyncpg.Connection, span: str, kept: str
) -> None:
    text = f"{{name: s, reentry: {{after: {span}}}, steps: [{{name: a, type: GoTo}}]}}"
    await apply("{name: s, steps: [{name: a, type: GoTo}]}")
    after = " ".join(str(value) for value in ast.literal_eval(kept).values())
    assert f"reentry: after_end → after {after}" in await apply.lines(text)
    await apply(text)
    document = json.loads(await connection.fetchval("SELECT sequencer.document('s')"))
    assert document["reentry"] == {"after": ast.literal_eval(kept)}
    assert await apply.lines(to_yaml(document)) == ["s: nothing changed"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(1, 1.0, True), (1, True, False), ([1, {"a": 0}], [1, {"a": False}], False), ({}, [], False)],
)
def test_values_compare_as_jsonb_does(one: object, other: object, same: bool) -> None:
    assert is_same(one, other) is same


async def test_every_transaction_keeps_one_revision(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(GOOD)
    async with connection.transaction():
        await connection.execute("UPDATE sequencer.sequences SET timezone = 'UTC'")
        await connection.execute("UPDATE sequencer.steps SET next_step = NULL WHERE name = 'pause'")
        await connection.execute("DELETE FROM sequencer.steps WHERE name = 'bye'")
    await connection.execute("UPDATE sequencer.sequences SET status = status")
    await connection.execute("UPDATE sequencer.steps SET problem = 'by the daemon'")
    await connection.execute("UPDATE sequencer.steps SET name = 'start' WHERE name = 'hello'")
    rows = await connection.fetch(QUERIES["revisions_of"], "s")
    changes = [
        list(compare(json.loads(row["before"]), json.loads(row["document"])).lines())
        for row in rows[:-1]
    ]
    assert changes == [
        ["first step: hello → start", "added start (Note)", "removed hello"],
        ["timezone: Europe/Berlin → UTC", "changed pause: next bye → none", "removed bye"],
    ]
    assert {row["by"] for row in rows} == {"postgres"}
    # it outlives the sequence, and goes on with one of the same name
    last = rows[0]["revision"]
    await connection.execute("DELETE FROM sequencer.sequences")
    await apply(GOOD)
    assert await connection.fetchval("SELECT revision FROM sequencer.sequences") == last + 1
    await connection.execute("UPDATE sequencer.sequences SET name = 't'")
    kept = await connection.fetch("SELECT DISTINCT sequence FROM sequencer.revisions")
    assert [row["sequence"] for row in kept] == ["t"]


SPLIT = """
name: s
steps:
  - {name: deal, type: Split, config: {next: 50, altNext: 50}, next: a, altNext: b}
  - {name: a, type: GoTo, next: null}
  - {name: b, type: GoTo, next: null}
"""


async def dealt(connection: asyncpg.Connection, name: str = "s", step: str = "deal") -> list[str]:
    """Where the Split of the database's definition sends subjects."""
    sequences, steps = await read_definitions(connection, [name])
    return dealt_by({name: from_rows(sequences[0], steps, RUNNERS)}, name, step)


def dealt_by(definitions: Mapping[str, Sequence], name: str, step: str) -> list[str]:
    now = datetime.now(UTC)
    subjects = [
        Enrollment(n, f"u{n}", "{}", now, UUID(int=n), None, now, name, step, None)
        for n in range(100)
    ]
    return [advance(definitions, one, now).enrollment.step for one in subjects]


async def test_renames_reassign_no_subject(apply: Applying, connection: asyncpg.Connection) -> None:
    await apply(SPLIT)
    before = await dealt(connection)
    assert set(before) == {"a", "b"}
    renamed = SPLIT.replace("name: deal,", "name: share, renamedFrom: deal,")
    assert dealt_by(load(apply.file).definitions, "s", "deal") == before
    apply.file.write_text(renamed)
    assert dealt_by(load(apply.file).definitions, "s", "share") == before
    assert await apply.lines(renamed) == ["s:", "renamed deal → share"]
    await apply(renamed)
    assert await dealt(connection, step="share") == before
    plain = SPLIT.replace("name: deal,", "name: share,")
    assert await apply.lines(plain) == ["s: nothing changed"]
    await connection.execute("UPDATE sequencer.sequences SET name = 't'")
    assert await dealt(connection, "t", "share") == before
    # an export says it, so that it is the same in another database
    text = await connection.fetchval("SELECT sequencer.document('t')")
    exported = to_yaml(json.loads(text))
    assert "seed: s/deal" in exported
    assert await apply.lines(exported) == ["t: nothing changed"]
    assert dealt_by(load(apply.file).definitions, "t", "share") == before
    await connection.execute("DELETE FROM sequencer.sequences")
    await apply(exported)
    assert await dealt(connection, "t", "share") == before


async def test_a_new_split_with_a_former_name_assigns_subjects_independently(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(SPLIT)
    before = await dealt(connection)
    await connection.execute("UPDATE sequencer.steps SET name = 'share' WHERE name = 'deal'")
    deal = "\n  - {name: deal, type: Split, config: {next: 50, altNext: 50}, next: a, altNext: b}"
    await apply(SPLIT.replace("name: deal,", "name: share,") + deal)
    assert await dealt(connection, step="share") == before
    assert await dealt(connection) != before
    await connection.execute("DELETE FROM sequencer.steps WHERE name = 'deal'")
    await connection.execute(
        "INSERT INTO sequencer.steps (sequence, name, type, config, next_step, alt_next_step)"
        " SELECT 's', 'deal', type, config, 'a', 'b' FROM sequencer.steps WHERE name = 'share'"
    )
    assert await dealt(connection) != before
    other = SPLIT.replace("name: deal,", "name: share, seed: mine,")
    assert "changed share: seed s/deal → mine" in await apply.lines(other)


NAMING = """
name: s
steps:
  - name: choose
    type: Switch
    config:
      cases:
        - {when: {lodashCommand: isNil, value: {type: get, value: data.x}}, step: mail}
        - {when: {lodashCommand: isNil, value: {type: get, value: data.y}}, step: null}
    next: split
  - name: split
    type: Split
    config:
      ways:
        - {name: a, weight: 1, step: mail}
        - {name: b, weight: 1, step: back}
    next: null
  - {name: back, type: GoTo, config: {step: mail}}
  - {name: mail, type: Note, next: null}
---
name: other
steps: [{name: over, type: GoTo, config: {sequence: s, step: mail}}]
"""


async def targets(connection: asyncpg.Connection) -> set[str]:
    """All names of steps in configs."""
    rows = await connection.fetch(
        "SELECT DISTINCT n.of_sequence, n.step FROM sequencer.steps AS s,"
        " sequencer.named_steps(s.type, s.sequence, s.config) AS n"
    )
    return {f"{row['of_sequence']}/{row['step']}" for row in rows}


async def test_steps_that_configs_name_follow_renames(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(NAMING)
    assert await targets(connection) == {"s/mail", "s/back"}
    renamed = NAMING.replace("name: mail,", "name: letter, renamedFrom: mail,").replace(
        "step: mail", "step: letter"
    )
    assert await apply.lines(renamed) == ["s:", "renamed mail → letter", "other: nothing changed"]
    await apply(renamed)
    assert await targets(connection) == {"s/letter", "s/back"}
    await connection.execute("UPDATE sequencer.steps SET name = 'post' WHERE name = 'letter'")
    await connection.execute("UPDATE sequencer.sequences SET name = 't' WHERE name = 's'")
    assert await targets(connection) == {"t/post", "t/back"}
    over = await connection.fetchval("SELECT config FROM sequencer.steps WHERE name = 'over'")
    assert json.loads(over) == {"sequence": "t", "step": "post"}
    sequences, steps = await read_definitions(connection, ["t"])
    found = from_rows(sequences[0], steps, RUNNERS)
    assert {one.target for one in found.steps["split"].exits} == {"post", "back"}


async def test_a_step_that_a_config_names_cannot_be_deleted(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    await apply(NAMING)
    words = "step 'back' of sequence 's' cannot be deleted: step 'split' of sequence 's' leads to"
    with pytest.raises(asyncpg.ForeignKeyViolationError, match=words):
        await connection.execute("DELETE FROM sequencer.steps WHERE name = 'back'")
    async with connection.transaction():  # in any order
        await connection.execute("DELETE FROM sequencer.steps WHERE name = 'back'")
        await connection.execute("DELETE FROM sequencer.steps WHERE name = 'split'")
        await connection.execute(
            "UPDATE sequencer.steps SET next_step = 'mail' WHERE name = 'choose'"
        )
    first, _, _ = NAMING.partition("---")
    kept = first.replace("name: mail", "name: post").replace("step: mail", "step: post")
    planned = await apply.plan(kept)
    [refused] = planned.refused
    assert refused.startswith("s: step mail is removed, but other/over leads to it: change that")
    with pytest.raises(PlanError, match="other/over leads to it"):
        await apply(kept)
    with pytest.raises(asyncpg.ForeignKeyViolationError, match="of sequence 'other' leads to"):
        await connection.execute("DELETE FROM sequencer.sequences WHERE name = 's'")
    assert not (
        await apply.plan(kept + NAMING[NAMING.index("---") :].replace("mail", "post"))
    ).refused
    await connection.execute("DELETE FROM sequencer.sequences")


async def test_the_database_finds_the_step_names_of_the_records(
    connection: asyncpg.Connection,
) -> None:
    """With sequencer.named_steps, for types that several statements list."""
    wrong = [1, None, {"step": 1}, {"step": "b", "sequence": 1}, {"cases": 1}, {"ways": [1, {}]}]
    right = [
        {"step": "b"},
        {"step": "b", "sequence": "o"},
        {"cases": [{"step": "b"}, {"step": None}, {"step": "c", "when": {"step": "x"}}]},
        {"ways": [{"step": "b"}, {"name": "c"}]},
    ]
    for type_ in (*BUILT_IN, "Note"):
        cases = (config for of_type, config in CASES if of_type == type_)
        for config in (*wrong, *right, *cases):
            rows = await connection.fetch(
                "SELECT * FROM sequencer.named_steps($1, 's', $2)", type_, json.dumps(config)
            )
            found = {(tuple(row["path"]), row["step"], row["of_sequence"]) for row in rows}
            assert found == {
                (tuple(map(str, path)), step, sequence or "s")
                for path, step, sequence in named_steps(type_, config)
            }, (type_, config)
    statements = await connection.fetch(
        "SELECT prosrc FROM pg_proc WHERE pronamespace = 'sequencer'::regnamespace"
        " UNION ALL SELECT pg_get_indexdef('sequencer.steps_naming'::regclass)"
    )
    texts = "\n".join([*(text for (text,) in statements), QUERIES["named_elsewhere"]])
    lists = re.findall(r"type (?:IN|= ANY) \((?:ARRAY\[)?([^])]*'GoTo'[^])]*)", texts)
    assert len(lists) == 4
    for listed in lists:
        assert {*re.findall(r"'(\w+)'", listed)} == {
            type_ for type_, record in BUILT_IN.items() if record.steps
        }


async def test_the_history_and_the_overview_show_branches(
    apply: Applying, database: str, connection: asyncpg.Connection
) -> None:
    await apply(NAMING)
    for number in range(12):
        await enroll(connection, "s", f"u{number}", json.dumps({"x": 1, "y": number % 3 or None}))
    async with running_engine(database, RUNNERS):
        await until(connection, ALL_ENDED)
    rows = await connection.fetch(
        "SELECT step, action, message, count(*) FROM sequencer.events"
        " WHERE step IN ('choose', 'split') AND action <> 'completed' AND action <> 'enrolled'"
        " GROUP BY 1, 2, 3"
    )
    told = {(step, action, message): count for step, action, message, count in rows}
    ways = {message: count for (step, _, message), count in told.items() if step == "split"}
    assert told.keys() - {("split", "branch", way) for way in ways} == {
        ("choose", "branch", "case 2"),
        ("choose", "next", None),
    }
    assert told["choose", "branch", "case 2"] == 4
    assert sum(ways.values()) == 8
    assert ways.keys() == {"a", "b"}
    overview = await connection.fetch("SELECT step, branches FROM sequencer.overview")
    found = {row["step"]: json.loads(row["branches"] or "null") for row in overview}
    assert found == {
        "choose": {"case 2": 4},
        "split": ways,
        "back": None,
        "mail": None,
        "over": None,
    }


async def test_sequences_and_steps_that_do_not_exist_are_named(apply: Applying) -> None:
    other = GOOD.replace("name: s\n", "name: other\n")
    leading = """
name: leading
steps:
  - {name: start, type: Enroll, config: {sequence: other}}
  - {name: stop, type: Cancel, config: {sequence: nope}}
  - {name: jump, type: GoTo, config: {sequence: other, step: bye}}
"""
    missing = "which does not exist"
    assert [line for line in await apply.lines(leading) if missing in line] == [
        f"start enrolls sequence 'other', {missing}",
        f"stop cancels sequence 'nope', {missing}",
        f"jump leads to step 'bye' of sequence 'other', {missing}",
    ]
    assert [line for line in await apply.lines(f"{leading}---{other}") if missing in line] == [
        f"stop cancels sequence 'nope', {missing}",
    ]
    await apply(other.replace("bye", "goodbye"))
    assert [line for line in await apply.lines(leading) if missing in line] == [
        f"stop cancels sequence 'nope', {missing}",
        f"jump leads to step 'bye' of sequence 'other', {missing}",
    ]


async def test_a_lookup_that_is_no_function_is_named(
    apply: Applying, connection: asyncpg.Connection
) -> None:
    sequence = f"{GOOD}lookup: app.plans\n"
    missing = "lookup 'app.plans' does not exist: create the function app.plans(text[])"
    assert missing in await apply.lines(sequence)
    await connection.execute(
        "CREATE SCHEMA app; CREATE FUNCTION app.plans(text) RETURNS text RETURN $1"
    )
    assert missing in await apply.lines(sequence)
    await connection.execute(
        "CREATE FUNCTION app.plans(subjects text[], more integer DEFAULT 1)"
        " RETURNS TABLE (subject text, data jsonb)"
        " LANGUAGE sql AS $$ SELECT unnest(subjects), '{}'::jsonb $$"
    )
    assert missing not in await apply.lines(sequence)
    # the name of an endpoint, which the daemon's settings may have
    assert not [line for line in await apply.lines(f"{GOOD}lookup: plans\n") if "lookup" in line]


def with_null(type_: str, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config as it is, and with null for each key that may be null."""
    models = [BUILT_IN[type_].config] if type_ in BUILT_IN else []
    models += [] if is_instant(type_) else [EffectConfig]
    keys = [field.alias or name for one in models for name, field in one.model_fields.items()]
    for found in (config, *({**config, key: None} for key in keys)):
        if not isinstance(compile_behaviour(type_, found, FILE_RUNNERS), InvalidStep):
            yield dict(found)


async def test_null_for_any_key_is_applied_and_exported(
    connection: asyncpg.Connection, tmp_path: Path
) -> None:
    configs = [(type_, found) for type_, config in CASES for found in with_null(type_, config)]
    assert len(configs) > 4 * len(CASES)
    nulls = dict.fromkeys(("next", "altNext", "seed", "renamedFrom"))
    end = {"name": "there", "type": "GoTo", "config": {}}
    steps = [
        {"name": f"{type_} {number}", "type": type_, "config": config, **(nulls if even else {})}
        for number, (type_, config) in enumerate(configs)
        for even in [number % 2 == 0]
    ]
    file = tmp_path / "file.yaml"

    def read(*documents: Mapping[str, Any]) -> tuple[list[Definition], list[files.FileFinding]]:
        file.write_text("\n---\n".join(map(json.dumps, documents)))
        return files.read_files([file], FILE_RUNNERS)

    keys: dict[str, Any] = {"name": "s"}
    for key in FileSequence.model_fields.keys() - {"name", "steps"}:
        if not read({"name": "s", key: None, "steps": [end]})[1]:
            keys[key] = None
    assert len(keys) > 5
    found, findings = read({**keys, "steps": [*steps, end]}, {"name": "other", "steps": [end]})
    assert not [one for one in findings if one.is_error]
    async with connection.transaction():
        await apply_plan.apply(connection, found, FILE_RUNNERS)
    assert not await plan.make(connection, found, FILE_RUNNERS)

    exported = json.loads(await connection.fetchval("SELECT sequencer.document('s')"))
    file.write_text(to_yaml(exported) + "---\n{name: other, steps: [{name: there, type: GoTo}]}")
    again, remarks = files.read_files([file], FILE_RUNNERS)
    assert not await plan.make(connection, again, FILE_RUNNERS)
    assert {(one.step, one.message) for one in remarks} <= {
        (one.step, one.message) for one in findings
    }
    read_again, written = (
        [(step.name, step.config, step.next_step, step.alt_next_step) for step in steps.values()]
        for steps in (again[0].sequence.steps, found[0].sequence.steps)
    )
    assert read_again == written
