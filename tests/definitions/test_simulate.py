"""Simulations: what they show, that they end, and that the engine does the same."""

from __future__ import annotations

import json
import re
import runpy
import time
from contextlib import chdir
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sequencerd.cli import main
from sequencerd.core.enrollment import Enrollment
from sequencerd.definitions.simulate import MAX_ENTRIES, Simulation
from sequencerd.errors import FileError, UsageError
from sequencerd.storage import conninfo
from sequencerd.testing import Settings, Simulator, load
from tests.helpers.command_line import Command
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until

REPOSITORY = Path(__file__).parents[2]
START = "2026-03-02T09:00:00Z"
DATA = {"name": "Ada", "email": "ada@example.com", "phone": "+4915112345678"}


def loaded(folder: Path, text: str, **outcomes: Any) -> Simulator:
    """A file of one sequence."""
    file = folder / "s.yaml"
    file.write_text(f"name: s\nsteps:\n{text}")
    return load(file, outcomes=outcomes)


def actions(simulation: Simulation) -> list[str]:
    return [f"{entry.step} {entry.action}" for entry in simulation.entries]


def test_messages_are_shown_as_they_would_be_sent(tmp_path: Path) -> None:
    sequences = loaded(
        tmp_path,
        "  - {name: mail, type: Email, config: {from: a@x.org, to: '{{data.to}}',"
        " subject: 'Hello {{data.name}}', text: 'Dear {{data.name}}',"
        " html: '<b>{{data.name}}</b>'}}\n"
        "  - {name: sms, type: SMS, config: {from: '+15005550006', to: '{{data.phone}}',"
        " message: 'Hi {{data.name}}'}}\n",
    )
    addressee = {"to": "Ada <ada@x.org>", "name": "Ädä & <Co>", "phone": "+49 151 12345678"}
    mail, sms = sequences.simulate(start=START, data=addressee).sent
    assert mail.details == {
        "from": "a@x.org",
        "to": "ada@x.org",
        "subject": "Hello Ädä & <Co>",
        "text": "Dear Ädä & <Co>",
        "html": "<b>Ädä &amp; &lt;Co&gt;</b>",
    }
    assert (sms.details["to"], sms.details["message"]) == ("+4915112345678", "Hi Ädä & <Co>")


def test_invalid_messages_fail_as_in_the_daemon(tmp_path: Path) -> None:
    sequences = loaded(
        tmp_path,
        "  - {name: mail, type: Email, config: {from: a@x.org, to: '{{data.to}}', subject: x,"
        " text: y}}\n",
    )
    simulation = sequences.simulate(start=START)
    assert simulation.status == "failed"
    assert simulation.end == "failed: to: no address"
    assert actions(simulation) == ["mail enrolled", "mail execute", "mail failed"]


def test_branches_are_explained_by_the_data_at_that_time(tmp_path: Path) -> None:
    condition = "lodashCommand: gte, value: {type: get, value: data.score}, "
    condition += "compareTo: {type: raw, value: 50}"
    sequences = loaded(
        tmp_path,
        f"  - {{name: before, type: Conditional, config: {{{condition}}}, altNext: more}}\n"
        "  - {name: more, type: UpdateData, config: {data: {score: 80}}}\n"
        f"  - {{name: after, type: Conditional, config: {{{condition}}}}}\n",
    )
    told = {e.step: e.message for e in sequences.simulate(start=START).entries if e.message}
    assert told == {
        "before": "gte(data.score = missing, 50) is false",
        "more": '{"score": 80}',
        "after": "gte(data.score = 80, 50) is true",
    }


@pytest.mark.parametrize(
    ("outcome", "status", "way"),
    [
        ("next", "completed", ["call execute", "call next", "good completed"]),
        ("altNext", "completed", ["call execute", "call altNext", "bad completed"]),
        ("fail", "completed", ["call execute", "call retry", "call execute", "call altNext"]),
        ("noop", "active", ["call execute"] * 4),
    ],
)
def test_a_given_outcome_decides_the_way(
    tmp_path: Path, outcome: str, status: str, way: list[str]
) -> None:
    sequences = loaded(
        tmp_path,
        "  - {name: call, type: Call, config: {onError: altNext, retry: {attempts: 2}}, next: good,"
        " altNext: bad}\n"
        "  - {name: good, type: GoTo, next: null}\n  - {name: bad, type: GoTo, next: null}\n",
        Call=outcome,
    )
    simulation = sequences.simulate(start=START)
    assert simulation.status == status
    assert [one for one in actions(simulation) if one in way][: len(way)] == way
    if outcome == "noop":
        assert len(simulation.entries) == MAX_ENTRIES + 1
        assert "stopped after 10000 entries" in simulation.end


def test_a_simulated_limit_counts_sent_messages(tmp_path: Path) -> None:
    limit = "{limit: {topic: news, at_most: 1, per: {days: 7}}}"
    sequences = loaded(
        tmp_path,
        f"  - {{name: one, type: Call, config: {limit}, next: two}}\n"
        f"  - {{name: two, type: Call, config: {limit}, next: null}}\n",
        Call="next",
    )
    simulation = sequences.simulate(start=START)
    assert actions(simulation) == [
        "one enrolled",
        "one execute",
        "one next",
        "two noop",
        "two execute",
        "two next",
        "two completed",
    ]
    assert simulation.ended_at - simulation.entries[0].at == timedelta(days=7)


def test_a_simulated_limit_counts_no_failed_messages(tmp_path: Path) -> None:
    limit = "limit: {topic: news, at_most: 1, per: {days: 7}}"
    config = f"{{{limit}, onError: altNext, retry: {{attempts: 1}}}}"
    sequences = loaded(
        tmp_path,
        f"  - {{name: one, type: Call, config: {config}, next: null, altNext: two}}\n"
        f"  - {{name: two, type: Call, config: {config}, next: null, altNext: null}}\n",
        Call="fail",
    )
    sent = [(one.step, one.at) for one in sequences.simulate(start=START).sent]
    assert [step for step, _ in sent] == ["one", "two"]
    assert sent[1][1] - sent[0][1] < timedelta(days=1)


def test_a_paused_sequence_is_simulated_as_it_will_run(applied: Command) -> None:
    applied("pause", "s")
    assert "second  completed" in applied("simulate", "s", "--start", START)


def test_changes_wake_a_waiting_enrollment(tmp_path: Path) -> None:
    sequences = loaded(
        tmp_path,
        "  - {name: wait, type: WaitForDuration, config: {amount: 5, unit: days}}\n"
        "  - {name: end, type: GoTo, next: null}\n"
        "  - {name: goal, type: Goal, config: {lodashCommand: identity,"
        " value: {type: get, value: data.paid}}, next: null}\n",
    )
    plain = sequences.simulate(start=START)
    assert (plain.ended_at.day, plain.steps) == (7, ["wait", "end"])
    early = sequences.simulate(start=START, changes={"P2D": {"paid": True}})
    assert early.ended_at == datetime(2026, 3, 4, 9, tzinfo=UTC)
    assert "goal is met" in [entry.message for entry in early.entries]
    late = sequences.simulate(start=START, changes={"2026-04-01": {"paid": True}})
    assert late.entries == plain.entries


def test_changes_of_one_time_are_all_made(tmp_path: Path) -> None:
    sequences = loaded(
        tmp_path, "  - {name: wait, type: WaitForDuration, config: {amount: 3, unit: day}}\n"
    )
    made = sequences.simulate(start=START, changes={"P1D": {"a": 1}, "PT24H": {"b": 2}})
    assert json.loads(made.enrollment.data) == {"a": 1, "b": 2}


def test_a_wait_beyond_the_end_is_reported(tmp_path: Path) -> None:
    text = "  - {name: wait, type: WaitForDuration, config: {amount: 5, unit: days}}\n"
    sequences = loaded(tmp_path, text)
    simulation = sequences.simulate(start=START, until="2026-03-03")
    assert (simulation.status, simulation.enrollment.step) == ("active", "wait")
    assert simulation.end == "waits until Sat 2026-03-07 09:00:00"


def test_a_year_of_daily_steps_takes_no_time(tmp_path: Path) -> None:
    text = "  - {name: day, type: WaitForDuration, config: {amount: 1, unit: day}}\n"
    text += "  - {name: mail, type: Email, config: {from: a@x.org, to: b@x.org, subject: x,"
    text += " text: '{{data.name}}'}, next: day}\n"
    begun = time.process_time()
    simulation = loaded(tmp_path, text).simulate(start=START, data={"name": "Ada"})
    assert len(simulation.sent) == 366
    assert time.process_time() - begun < 60  # seconds; it takes a fraction of one


@settings(deadline=None)
@given(
    amounts=st.lists(st.integers(-2, 400), min_size=1, max_size=6),
    jumps=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    changes=st.dictionaries(st.integers(0, 800), st.booleans(), max_size=4),
)
@example(amounts=[0, 1], jumps=[1, 0, 0, 0, 0, 0], changes={0: False})  # a change with two steps
def test_a_simulation_always_ends_and_time_never_goes_back(
    tmp_path_factory: pytest.TempPathFactory,
    amounts: list[int],
    jumps: list[int],
    changes: dict[int, bool],
) -> None:
    names = [f"s{n}" for n in range(len(amounts))]
    text = "".join(
        f"  - {{name: {name}, type: WaitForDuration, config: {{amount: {amount}, unit: hours}},"
        f" next: {names[jump % len(names)]}}}\n"
        for name, amount, jump in zip(names, amounts, jumps, strict=False)
    )
    try:
        sequences = loaded(tmp_path_factory.mktemp("s"), text)
    except FileError:
        assume(condition=False)  # a cycle of waits that are over on arrival
    data = {f"PT{hours}H": {"paid": paid} for hours, paid in changes.items()}
    simulation = sequences.simulate(start=START, until="2026-03-20", changes=data)
    times = [entry.at for entry in simulation.entries]
    assert times == sorted(times)
    assert simulation.status in ("active", "failed")


async def test_the_engine_agrees_with_the_simulation(
    database: str, connection: asyncpg.Connection
) -> None:
    steps = (
        ("begin", "WaitForDuration", '{"amount": 5, "unit": "ms"}', "work"),
        ("work", "Note", "{}", "set"),
        ("set", "UpdateData", '{"data": {"score": 3}}', "choose"),
        (
            "choose",
            "Conditional",
            json.dumps(
                {
                    "lodashCommand": "gt",
                    "value": {"type": "get", "value": "data.score"},
                    "compareTo": {"type": "raw", "value": 2},
                }
            ),
            "last",
        ),
        ("last", "Note", "{}", None),
    )
    async with running_engine(database, {"Note": Recorder()}) as engine:
        await define(connection, "s", *steps)
        id_ = await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
        definitions = dict(engine.catalog.sequences)
    rows = await connection.fetch(
        "SELECT step, action FROM sequencer.events WHERE enrollment_id = $1 ORDER BY visit, at", id_
    )
    now = datetime.now(UTC)
    fresh = Enrollment(id_, "ada", "{}", now, uuid4(), None, now, "s", "begin", None)
    simulation = Simulator(definitions, {"Note": Recorder()}).follow(fresh, now, None, {}, None)
    simulated = [(e.step, e.action) for e in simulation.entries if e.action != "execute"]
    assert simulated == [tuple(row) for row in rows]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"start": "tomorrow"}, "ISO 8601 time"),
        ({"changes": {"P": {}}}, "ISO 8601 duration"),
        ({"changes": {"P1DT": {}}}, "ISO 8601 duration"),
        ({"changes": {"P99999999999D": {}}}, "outside of the years 1 to 9999"),
        ({"until": "2026-03-02T08:59:59Z"}, "until: 2026-03-02 08:59:59Z is before the start"),
        ({"start": "9999-12-31T09:00:00Z"}, "start: .* is not in the years 2 to 9997"),
        ({"start": "0001-01-01"}, "start: .* is not in the years 2 to 9997"),
        ({"until": "9998-01-01"}, "until: .* is not in the years 2 to 9997"),
        ({"sequence": "t"}, "does not exist"),
    ],
)
def test_errors_are_reported(tmp_path: Path, wrong: dict[str, Any], words: str) -> None:
    sequences = loaded(tmp_path, "  - {name: a, type: GoTo}\n")
    with pytest.raises(UsageError, match=words):
        sequences.simulate(**({"start": START} | wrong))


@pytest.mark.parametrize("start", ["0002-01-01", "9997-12-31T23:59:59Z"])
def test_times_at_both_ends_are_shown_in_each_zone(
    sequencerd: Command, tmp_path: Path, start: str
) -> None:
    wait = "{name: wait, type: WaitForDuration, config: {amount: 3, unit: days}}"
    (tmp_path / "s.yaml").write_text(f"name: s\nsteps:\n  - {wait}\n")
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        lines = sequencerd("simulate", "s.yaml", "--start", start, "--timezone", zone).splitlines()
        assert lines[-1].endswith(f"wait  completed ({zone})")


@pytest.mark.parametrize("unit", ["Y", "M", "W", "D"])
def test_changes_come_when_a_wait_of_the_same_length_ends(tmp_path: Path, unit: str) -> None:
    """From a time that is skipped later, and across two changes of the clocks."""
    name = {"Y": "years", "M": "months", "W": "weeks", "D": "days"}[unit]
    simulator = loaded(
        tmp_path,
        f"  - {{name: wait, type: WaitForDuration, config: {{amount: 7, unit: {name}}}}}\n"
        "  - {name: half, type: WaitForDuration, config: {amount: 90, unit: minutes}}\n"
        "  - {name: end, type: WaitForDuration, config: {amount: 1, unit: day}}\n",
    )
    changes = {f"P7{unit}": {"a": 1}, f"P7{unit}T1H30M": {"b": 1}}
    for start in ("2026-03-22T02:30:00", "2026-08-31T09:00:00"):
        simulation = simulator.simulate(
            start=start, until="2035-01-01", timezone="Europe/Berlin", changes=changes
        )
        ends = [entry.at for entry in simulation.entries if entry.action == "next"]
        assert [entry.at for entry in simulation.entries if entry.action == "data"] == ends[:2]


def test_a_result_without_a_lookup_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "{name: entry, steps: [{name: a, type: GoTo, config: {sequence: plans, step: a}}]}\n"
        "---\n{name: plans, lookup: app.plans, steps: [{name: a, type: GoTo}]}\n"
        "---\n{name: other, steps: [{name: a, type: GoTo}]}\n"
    )
    made = load(file)
    for name in ("entry", "plans"):
        assert made.simulate(name, start=START, external={}).status == "completed"
    words = "'other' has no lookup that could return this result; those with one: plans"
    with pytest.raises(UsageError, match=words):
        made.simulate("other", start=START, external={})


# --- the command line


def test_the_page_can_be_followed(sequencerd: Command) -> None:
    sequencerd.folder = REPOSITORY
    page = (REPOSITORY / "docs/simulate.md").read_text()
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        if language == "sh":
            sequencerd.follow(text)
        elif language == "python":
            with chdir(REPOSITORY):
                exec(text, {})


def test_the_example_passes() -> None:
    example = runpy.run_path(str(REPOSITORY / "examples/test_onboarding.py"))
    tests = [function for name, function in example.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def test_what_is_tried_again_is_printed_once(sequencerd: Command, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "name: s\nsteps:\n  - {name: mail, type: Email, config: {from: a@x.org, to: b@x.org,"
        " subject: '{{#if (gt attempt 2)}}So{{else}}Hi{{/if}}', text: T, retry: {attempts: 4}}}\n"
    )
    lines = sequencerd(
        "simulate", "s.yaml", "--start", START, "--runner", "Email=fail"
    ).splitlines()
    shown = [
        line.split("  ")[-1].strip() for line in lines if "execute" in line or "subject" in line
    ]
    as_before = "execute Email, as before"
    assert shown == [
        "execute Email",
        "subject: Hi",
        as_before,
        "execute Email",
        "subject: So",
        as_before,
    ]


def test_the_timeline_is_in_the_zone_of_the_subject(sequencerd: Command, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "name: s\nsteps:\n"
        "  - {name: wait, type: WaitForDuration, config: {amount: 1, unit: day}}\n"
        "  - {name: mail, type: Email, config: {from: a@x.org, to: b@x.org, subject: Hi,"
        " text: 'Ä\n\n\n  b'}}\n"
    )
    given = ("simulate", "s.yaml", "--start", START, "--timezone", "Asia/Tokyo")
    lines = sequencerd(*given).splitlines()
    assert lines[0] == "Mon 2026-03-02 18:00:00  wait  enrolled"
    assert lines[2] == "Tue 2026-03-03 18:00:00  mail  execute Email"
    assert [line.split() for line in lines[3:7]] == [
        ["from:", "a@x.org"],
        ["subject:", "Hi"],
        ["text:", "Ä"],
        [],
    ]
    assert lines[-1] == "Tue 2026-03-03 18:00:00  mail  completed (Asia/Tokyo)"
    told = json.loads(sequencerd(*given, "--json"))
    assert told["status"] == "completed"
    assert told["entries"][2]["details"]["subject"] == "Hi"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--set", "P3D"), "--set"),
        (("--set", "P3D: 7"), "must be a JSON object"),
        (("--data", "{"), "--data is not JSON"),
        (("--runner", "Score"), "use TYPE=next|altNext|noop|fail"),
        (("--timezone", "Mars"), "timezone: "),
    ],
)
def test_wrong_options_are_named(applied: Command, option: tuple[str, str], words: str) -> None:
    applied("simulate", "s.yaml", *option, code=2)
    assert words in applied.errors


def test_a_simulation_continues_from_where_an_enrollment_is(
    applied: Command, tmp_path: Path
) -> None:
    applied("enroll", "s", "ada", "--data", '{"name": "Ada"}')
    begun = json.loads(applied("simulate", "--from-enrollment", "1", "--json"))
    assert [entry["step"] for entry in begun["entries"]] == ["first", "first", "second", "second"]
    lasted = datetime.fromisoformat(begun["ended_at"]) - datetime.now(UTC)
    assert timedelta(days=2) < lasted < timedelta(days=4)
    assert json.loads(applied("show", "1", "--json"))["history"] == []  # it only reads
    (tmp_path / "s.yaml").write_text("name: s\nsteps:\n  - {name: first, type: GoTo, next: null}\n")
    other = json.loads(applied("simulate", "s.yaml", "--from-enrollment", "1", "--json"))
    assert other["status"] == "completed"
    applied("simulate", "--from-enrollment", "99", code=1)
    assert "enrollment 99 does not exist" in applied.errors


async def test_an_unknown_time_zone_is_ignored_as_by_the_daemon(
    applied: Command, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    """Only SQL can write one."""
    step = "{name: first, type: WaitForDate, config: {date: '2099-01-01T09:00'}, next: null}"
    (tmp_path / "s.yaml").write_text(f"name: s\ntimezone: Asia/Tokyo\nsteps:\n  - {step}\n")
    applied("apply", "s.yaml")
    id_ = await enroll(connection, "s", "ada")
    await connection.execute("UPDATE sequencer.enrollments SET timezone = 'Mars/Phobos'")
    simulated = applied("simulate", "--from-enrollment", str(id_), "--until", "2100-01-01")
    last = "Thu 2099-01-01 09:00:00  first  completed (Asia/Tokyo)"
    assert simulated.splitlines()[-1] == last


FIVE_DAYS = """
name: s
topic: news
steps:
  - name: first
    type: WaitForDuration
    config: {amount: 5, unit: business days, holidays: DE}
  - {name: second, type: Note}
  - {name: third, type: Note}
"""


async def test_a_file_is_simulated_with_holidays_and_limits_of_topics(
    sequencerd: Command, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    """From the start, and from an enrollment."""
    (tmp_path / "s.yaml").write_text(FIVE_DAYS)
    given = ("simulate", "s.yaml", "--runner", "Note=next", "--start", "2026-03-30T09:00:00Z")
    missing = "calendar 'DE' has no holidays"
    assert f"failed: step 'first': {missing}" in sequencerd(*given).splitlines()[-1]
    await connection.execute(
        "INSERT INTO sequencer.holidays VALUES ('DE', '2026-04-03', ''), ('DE', '2026-04-06', '');"
        "INSERT INTO sequencer.topics (name, title, frequency_limit) VALUES ('news', 'News',"
        """ '{"at_most": 1, "per": {"days": 2}}')"""
    )
    assert sequencerd(*given).splitlines()[-1] == "Fri 2026-04-10 09:00:00  third   completed (UTC)"
    assert not sequencerd.errors
    await define(connection, "s", ("first", "WaitForCondition", "{}", None))
    id_ = await connection.fetchval(
        "INSERT INTO sequencer.enrollments (sequence, subject, entered_at)"
        " VALUES ('s', 'ada', '2026-03-30T09:00:00Z') RETURNING id"
    )
    simulated = sequencerd(*given[:-2], "--from-enrollment", str(id_))
    assert "noop: the limit is reached: 1 in 2 days, for the topic news" in simulated


def test_holidays_that_are_not_known_are_reported(sequencerd: Command, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(FIVE_DAYS)
    given = ("simulate", "s.yaml", "--runner", "Note=next", "--start", "2026-03-30T09:00:00Z")
    sequencerd.variables["SEQUENCERD_DATABASE"] = f"postgresql://nobody@/none?host={tmp_path}"
    for why in ("cannot connect to the database", "no database is configured"):
        assert "Mon 2026-04-06 09:00:00  third   completed" in sequencerd(*given)
        assert f"no day is a holiday of DE, which only the database knows: {why}" in (
            sequencerd.errors
        )
        sequencerd.without_database()


@pytest.mark.parametrize("command", ["simulate", "graph", "check"])
def test_a_file_needs_no_usable_database(sequencerd: Command, tmp_path: Path, command: str) -> None:
    """One that is down, or in which the schema is missing."""
    (tmp_path / "s.yaml").write_text("{name: s, steps: [{name: here, type: GoTo, next: null}]}")
    sequencerd.variables["SEQUENCERD_DATABASE_SCHEMA"] = "none"
    for _ in range(2):
        assert sequencerd(command, "s.yaml")
        sequencerd.variables["SEQUENCERD_DATABASE"] = f"postgresql://x@/none?host={tmp_path}"


# --- graph


def test_libpq_variables_name_the_database_of_a_file(applied: Command, database: str) -> None:
    applied("enroll", "s", "ada")
    counted = applied("graph", "s")
    applied.without_database()
    given = conninfo.arguments(database, name="", timeout=0)
    applied.variables |= {"PGDATABASE": given["database"], "PGUSER": given["user"]}
    for key in {"host", "port"} & given.keys():
        applied.variables[f"PG{key.upper()}"] = ",".join(map(str, given[key]))
    assert applied("graph", "s.yaml") == counted
    assert counted.split()[:2] == ["1", "first"]


def test_a_graph_counts_the_enrollments(applied: Command, tmp_path: Path) -> None:
    for subject in ("ada", "bob"):
        applied("enroll", "s", subject)
    text = applied("graph", "s")
    assert text.splitlines()[0].split() == ["2", "first", "WaitForDuration", "next", "second"]
    assert applied("graph", "s.yaml") == text
    assert "2 here" in applied("graph", "s", "--format", "mermaid")
    assert "2 here" in applied("graph", "s", "--format", "dot")
    applied("graph", "nobody", code=1)
    assert "sequence 'nobody' does not exist" in applied.errors


def test_graphs_show_brakes_and_limits(
    applied: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "braked.yaml"
    file.write_text(
        """
name: braked
topic: news
brake: {at_most: 1500, per: {minutes: 90}}
steps:
  - {name: wait, type: WaitForDuration, config: {amount: 1, unit: day}}
  - name: note
    type: Email
    config:
      from: us@example.com
      to: "{{data.email}}"
      subject: Hello
      text: Hello
      limit: {at_most: 3, per: {days: 7}, then: skip}
"""
    )
    brake, limit = "brake: at most 1,500 in 90 minutes", "at most 3 in 7 days (topic news)"
    for of_database in (False, True):
        if of_database:
            applied("apply", "braked.yaml")
        target = "braked" if of_database else "braked.yaml"
        first, wait, note = applied("graph", target).splitlines()
        assert first == brake
        assert "at most" not in wait
        assert note.endswith(f"; {limit}")
        mermaid = applied("graph", target, "--format", "mermaid")
        assert f'  brake>"{brake}"] -.- s0' in mermaid
        assert limit.replace("(", "#40;").replace(")", "#41;") in mermaid
        dot = applied("graph", target, "--format", "dot")
        assert f'label="{brake}"' in dot
        assert limit in dot
    applied("apply", "braked.yaml", "--brake", "5")  # nothing changes, so it sets none
    assert applied("graph", "braked").startswith(brake)
    file.write_text(file.read_text().replace("text: Hello", "text: Hi"))
    applied("apply", "braked.yaml", "--brake", "5")
    assert applied("graph", "braked").startswith("brake: at most 5 in 1 hour, until 2")


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    from sequencerd.definitions import drawing

    file = tmp_path / "s.yaml"
    steps = [
        {"name": 'a "quote" \\ [x] #1', "type": "GoTo", "next": "ü<br>\n2", "altNext": None},
        {"name": "ü<br>\n2", "type": "GoTo", "config": {"step": "there", "sequence": "other"}},
    ]
    others = {"name": "other", "steps": [{"name": "there", "type": "GoTo"}]}
    file.write_text(json.dumps({"name": "s", "steps": steps}) + "\n---\n" + json.dumps(others))
    sequence = load(file).definitions["s"]
    mermaid = drawing.mermaid(sequence, {})
    assert 's0["a #34;quote#34; #92; #91;x#93; #35;1<br/>GoTo"]' in mermaid
    assert 's1["ü#60;br#62; 2<br/>GoTo"]' in mermaid
    assert 'o0(["other/there"])' in mermaid
    dot = drawing.dot(sequence, {})
    assert '"step a \\"quote\\" \\\\ [x] #1" -> "step ü<br>\\n2";' in dot
    assert (
        drawing.text(sequence, {}).splitlines()[1] == "ü<br> 2             GoTo  next other/there"
    )


@pytest.mark.parametrize(
    ("start", "times"),
    [
        # 29 March 2026: 02:00 does not exist in Berlin; 25 October: it comes twice
        ("2026-03-28T01:30:00Z", ["29 01:30", "29 07:00", "30 07:00", "31 06:00"]),
        ("2026-10-24T00:30:00Z", ["25 00:30", "25 08:00", "26 08:00", "27 07:00"]),
    ],
)
def test_summer_time_begins_and_ends_during_waits(
    tmp_path: Path, start: str, times: list[str]
) -> None:
    sequences = loaded(
        tmp_path,
        "  - {name: day, type: WaitForDuration, config: {amount: 1, unit: days}}\n"
        "  - {name: nine, type: WaitForDateComparison, config: {attribute: hour, values: [9]}}\n"
        "  - {name: next, type: WaitForDuration, config: {amount: 24, unit: hours}}\n"
        "  - {name: last, type: WaitForDuration, config: {amount: 23, unit: hours}}\n",
    )
    journey = sequences.simulate(start=start, timezone="Europe/Berlin")
    assert journey.status == "completed"
    ends = [f"{entry.at:%d %H:%M}" for entry in journey.entries if entry.action == "next"]
    assert ends == times


JUMPING = """
name: s
steps:
  - {name: over, type: GoTo, config: {sequence: t, step: days}, altNext: else}
  - {name: else, type: WaitForDuration, config: {amount: 1, unit: days}}
---
name: t
status: %s
steps:
  - {name: days, type: WaitForDuration, config: {amount: 1, unit: days}}
"""


def test_a_refused_jump_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(JUMPING % "active")
    sequences = load(file)
    went = sequences.simulate("s", start=START)
    assert (went.enrollment.sequence, went.steps) == ("t", ["over", "days"])
    refused = sequences.simulate("s", start=START, enrolled=["t"])
    assert (refused.enrollment.sequence, refused.steps) == ("s", ["over", "else"])
    file.write_text(JUMPING % "archived")
    archived = load(file).simulate("s", start=START)
    assert actions(archived)[1] == "over altNext"
    assert "archived" in (archived.entries[1].message or "")
    file.write_text((JUMPING % "archived").replace(", altNext: else", ""))
    assert "archived" in load(file).simulate("s", start=START).end


async def test_a_simulated_enrollment_respects_reentry(
    connection: asyncpg.Connection, sequencerd: Command
) -> None:
    days = '{"amount": 3, "unit": "days"}'
    await define(connection, "s", ("over", "GoTo", '{"sequence": "t", "step": "days"}', None))
    await define(connection, "t", ("days", "WaitForDuration", days, None))
    await enroll(connection, "t", "ada")
    id_ = await enroll(connection, "s", "ada")
    assert "refuses a second entry" in sequencerd("simulate", "--from-enrollment", str(id_))


@pytest.mark.parametrize(
    ("goes", "leads"),
    [
        ("next", ["mail expired", "good next", "good completed"]),
        ("altNext", ["mail expired", "other next", "other completed"]),
        ("end", ["mail expired", "mail completed"]),
    ],
)
def test_expired_messages_are_not_sent(tmp_path: Path, goes: str, leads: list[str]) -> None:
    sequences = loaded(
        tmp_path,
        "  - {name: mail, type: Email, altNext: other, next: good, config: {from: a@x.org,"
        " to: b@x.org, subject: x, text: y, expires: '{{data.begins}}',"
        f" onExpired: {goes}}}}}\n"
        "  - {name: good, type: UpdateData, next: null, config: {data: {sent: true}}}\n"
        "  - {name: other, type: UpdateData, next: null, config: {data: {sent: false}}}\n",
    )
    in_time = sequences.simulate(start=START, data={"begins": "2026-03-03T09:00:00Z"})
    assert "mail execute" in actions(in_time)
    late = sequences.simulate(start=START, data={"begins": START})
    assert [action for action in actions(late) if action != "mail enrolled"] == leads


LOOP = (
    "  - {name: remind, type: Note}\n"
    "  - {name: pause, type: WaitForDuration, config: {amount: 1, unit: day}}\n"
    "  - {name: paid, type: Conditional, config: {lodashCommand: eq,"
    " value: {type: get, value: data.paid}, compareTo: {type: raw, value: true}},"
    " next: thanks, altNext: again}\n"
    "  - {name: thanks, type: Score, next: null}\n"
    "  - {name: again, type: GoTo, config: {step: remind}}\n"
)


def test_an_answer_changes_the_data_that_the_next_condition_reads(tmp_path: Path) -> None:
    answer = {"action": "next", "message": "paid by card", "data": {"paid": True}}
    simulation = loaded(tmp_path, LOOP, Note=answer, Score="next").simulate(start=START)
    assert simulation.steps == ["remind", "pause", "paid", "thanks"]
    (because,) = (entry.message for entry in simulation.entries if entry.step == "paid")
    assert because == "eq(data.paid = true, true) is true"
    assert json.loads(simulation.enrollment.data) == {"paid": True}


def test_numbers_are_shown_to_the_last_digit(sequencerd: Command, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "name: s\nsteps:\n  - name: copy\n    type: UpdateData\n"
        "    config: {data: {x: {get: data.huge}, y: {get: data.n}}}\n"
    )
    data = '{"huge": 1e400}'
    shown = sequencerd(
        "simulate", str(file), "--data", data, "--set", 'copy: {"n": 0.1000000000000000000001}'
    )
    assert 'changed by {"n": 0.1000000000000000000001}' in shown
    assert 'next: {"x": 1E+400, "y": 0.1000000000000000000001}' in shown


@pytest.mark.parametrize("answer", [{"action": "nxt"}, {"daat": {}}, "nxt"])
def test_a_wrong_answer_is_rejected(tmp_path: Path, answer: Any) -> None:
    with pytest.raises(UsageError, match=r"outcome of Note: .*next, altNext, noop, fail"):
        loaded(tmp_path, LOOP, Note=answer, Score="next").simulate(start=START)


@pytest.mark.parametrize("step", ["remind", "pause", "paid"])
def test_data_changes_on_arrival_at_a_step(tmp_path: Path, step: str) -> None:
    simulator = loaded(tmp_path, LOOP, Note="next", Score="next")
    simulation = simulator.simulate(start=START, changes={step: {"paid": True}})
    assert simulation.steps == ["remind", "pause", "paid", "thanks"]
    (changed,) = (entry for entry in simulation.entries if entry.action == "data")
    assert (changed.step, changed.message) == (step, 'changed by {"paid": true}')


def test_a_date_is_past_for_an_enrollment_that_returns_to_it(tmp_path: Path) -> None:
    """In a simulation it returns at the very time; in the daemon, a moment later."""
    simulator = loaded(
        tmp_path,
        "  - {name: due, type: WaitForDate, config: {date: '{{data.due}}', past: altNext},"
        " altNext: null}\n"
        "  - {name: note, type: Note, next: due}\n",
        Note="next",
    )
    simulation = simulator.simulate(start=START, data={"due": "2026-03-09T09:00:00Z"})
    assert (simulation.steps, simulation.status) == (["due", "note", "due"], "completed")


def test_a_change_at_an_unknown_step_is_rejected(tmp_path: Path) -> None:
    simulator = loaded(tmp_path, LOOP, Note="next", Score="next")
    with pytest.raises(UsageError, match=r"'paus' is not a step.*did you mean 'pause'"):
        simulator.simulate(start=START, changes={"paus": {"paid": True}})


def test_a_cycle_is_named_and_its_rounds_are_printed_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(f"name: s\nsteps:\n{LOOP}")
    arguments = ["simulate", str(tmp_path / "s.yaml"), "--start", START]
    with pytest.raises(SystemExit) as exited:
        main([*arguments, "--runner", "Note=next", "--runner", "Score=next"])
    assert exited.value.code == 0
    *lines, more, last = capsys.readouterr().out.splitlines()
    assert sum("execute Note" in line for line in lines) == 2
    assert more.startswith("... and so on: ")
    assert "it loops: remind → pause → paid → again → remind" in last


def test_a_message_is_not_hidden_by_the_condition_of_its_step(tmp_path: Path) -> None:
    """Only the events that the condition decides show it, and the end is printed once."""
    simulator = loaded(
        tmp_path,
        "  - {name: odd, type: Conditional, config: {lodashCommand: eq,"
        " value: {type: get, value: data.x}, compareTo: {type: raw, value: 1}}}\n",
    )
    simulation = simulator.simulate(start=START, data={"x": 1})
    assert [(entry.action, entry.message) for entry in simulation.entries] == [
        ("enrolled", None),
        ("next", "eq(data.x = 1, 1) is true"),
        ("completed", None),
    ]
    assert [entry.action for entry in simulation.timeline] == ["enrolled", "next"]


@pytest.mark.parametrize("option", ["data", "subject", "timezone", "start"])
def test_an_enrollment_has_its_own_start_and_data(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--from-enrollment", "1", f"--{option}", "{}"])
    assert f"--{option} does not go with --from-enrollment" in capsys.readouterr().err


def test_a_link_to_unsubscribe_needs_no_settings(tmp_path: Path) -> None:
    sequence = loaded(
        tmp_path,
        "  - {name: mail, type: Email, config: {from: a@x.org, to: b@x.org, subject: x,"
        " text: '{{unsubscribe_url}}'}}\n",
    )
    (mail,) = sequence.simulate(start=START).sent
    assert mail.details["text"].startswith("https://example.com/unsubscribe/")
    with pytest.raises(FileError, match="unsubscribe_url would be empty"):
        load(tmp_path / "s.yaml", settings=Settings())
