"""Time what the core does once per enrollment, and compare it with targets.

    python bench/core.py [--repeat 5] [--json]

The best of the repeats is shown: the others were disturbed. Exits with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import timeit
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from sequencerd.core.calendar.dates import next_match
from sequencerd.core.javascript.conditions import Operand, compile_predicate
from sequencerd.core.javascript.templates import compile_template
from sequencerd.core.view import View, parse_data

BERLIN = ZoneInfo("Europe/Berlin")
AFTER = datetime(2026, 3, 2, 10, 17, 30, tzinfo=UTC)

CONTEXT: dict[str, object] = {
    "id": 7,
    "subject": "user-42",
    "sequence": "onboarding",
    "step": "nudge",
    "timezone": "Europe/Berlin",
    "data": {
        "name": "Ada Lovelace",
        "email": "ada@example.com",
        "score": 7,
        "plan": "trial",
        "paid": False,
        "due": "2026-03-31T22:30:00Z",
        "items": [{"name": f"Lesson {n}", "minutes": n * 2.5} for n in range(1, 6)],
    },
}

DATA = json.dumps(CONTEXT["data"])

TO = "{{data.name}} <{{data.email}}>"
SUBJECT = "{{data.name}}, your {{data.plan}} ends on {{date data.due format='D MMMM'}}"
TEXT = """\
Hello {{default data.name "there"}},

{{#if data.paid}}
Thank you for your order.
{{else}}
Your {{data.plan}} ends on {{date data.due format="dddd, D MMMM YYYY" zone="Europe/Berlin"}}.
{{/if}}

{{#each data.items}}
- {{name}} ({{minutes}} minutes)
{{/each}}
"""
HTML = """\
<html><body><p>Hello {{default data.name "there"}},</p>
{{#if data.paid}}<p>Thank you for your order.</p>
{{else}}<p>Your {{data.plan}} ends on {{date data.due format="dddd, D MMMM YYYY"}}.</p>{{/if}}
<ul>{{#each data.items}}<li>{{name}} ({{minutes}} minutes)</li>{{/each}}</ul>
<p><a href="https://example.com/?user={{subject}}">Go on</a></p></body></html>
"""


@dataclass(frozen=True)
class Measure:
    """A function to time, and the most microseconds that a call may take; None: no target."""

    name: str
    call: Callable[[], object]
    target: float | None


@dataclass(frozen=True)
class Result:
    name: str
    microseconds: float
    target: float | None

    @property
    def missed(self) -> bool:
        return self.target is not None and self.microseconds > self.target

    def __str__(self) -> str:
        target = "" if self.target is None else f"   target {self.target:g} µs"
        return f"{self.name:<44}{self.microseconds:>10.2f} µs{target}{'  MISSED' * self.missed}"


def predicate() -> Measure:
    condition = compile_predicate(
        "gt", Operand(type="get", value="data.score"), Operand(type="raw", value=5)
    )
    return Measure("gt on a get path, from JSON text", lambda: condition(f'{{"data":{DATA}}}'), 6)


def mail() -> Measure:
    templates = [compile_template(source, escape=False) for source in (TO, SUBJECT, TEXT)]
    templates.append(compile_template(HTML, escape=True))

    def render() -> list[str]:
        view = View.of({**CONTEXT, "data": parse_data(DATA)}, DATA)
        return [template.render(view) for template in templates]

    return Measure("an Email step's four templates", render, 250)


def match(name: str, attribute: str, values: list[int], target: float | None) -> Measure:
    return Measure(name, lambda: next_match(AFTER, attribute, values, BERLIN), target)


def matches() -> Iterator[Measure]:
    yield match("next hour 9", "hour", [9], 50)
    yield match("next Monday to Friday", "day", [1, 2, 3, 4, 5], 50)
    yield match("next Saturday", "day", [6], 50)
    yield match("next December", "month", [11], 50)
    yield match("next 31st", "date", [31], None)
    yield match("next day 366 of a year (leap years only)", "dayOfYear", [366], None)
    yield match("next ISO week 53", "isoWeek", [53], None)


def time(measure: Measure, repeat: int) -> Result:
    timer = timeit.Timer(measure.call)
    number, _ = timer.autorange()
    return Result(measure.name, min(timer.repeat(repeat, number)) / number * 1e6, measure.target)


def main() -> int:
    parser = argparse.ArgumentParser(description="times the core's functions")
    parser.add_argument("--repeat", type=int, default=5, help="best of so many runs (default 5)")
    parser.add_argument("--json", action="store_true", help="print a line of JSON per measure")
    options = parser.parse_args()
    results = [time(measure, options.repeat) for measure in (predicate(), mail(), *matches())]
    for result in results:
        print(json.dumps(asdict(result)) if options.json else result)
    return int(any(result.missed for result in results))


if __name__ == "__main__":
    sys.exit(main())
