"""Ask the core what the original's libraries were asked, and count the answers that agree.

    python -m tests.oracle.replay [--failures] [DIRECTORY]

Every line of every *.jsonl in the directory (default: $ORACLE_DIR, else the one of this file) is
one case with the answer of the real lodash, moment or handlebars. One line is printed per file:
cases that agree, of all cases in it. Nothing is left out: what we answer otherwise on purpose
(docs/compatibility.md) counts as disagreement and is allowed for in the floors. The same floors
hold for every directory. Exits with 1 below a floor, or when there is nothing or something
unreadable to replay.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sequencerd.core.calendar import dates
from sequencerd.core.faults import DefinitionError, EvaluationError
from sequencerd.core.javascript.conditions import Operand, compile_predicate
from sequencerd.core.javascript.templates import compile_template

FLOORS = {
    "lodash": 1.0,
    "moment": 0.95,
    "handlebars": 0.95,  # all but numbers side by side
}
"""The share of a file's cases of one kind that must agree."""

Case = Mapping[str, Any]  # whatever JSON the library was given
REJECTED = (DefinitionError, EvaluationError)


def lodash(case: Case) -> bool:
    """Boolean(_[command](value, compareTo)), or that it throws."""
    try:
        compare_to = Operand(**case["compareTo"]) if "compareTo" in case else None
        predicate = compile_predicate(case["command"], Operand(**case["value"]), compare_to)
        result = predicate(json.dumps(case["subject"]))
    except REJECTED:
        return bool(case.get("throws"))
    return not case.get("throws") and result is bool(case["result"])


def moment(case: Case) -> bool:
    """The same value or instant; null where we reject or find nothing."""
    try:
        result = MOMENT[case["op"]](case)
    except REJECTED:
        result = None
    return type(result) is type(case["result"]) and result == case["result"]


def handlebars(case: Case) -> bool:
    """The same text with and without escaping, or an error in both."""
    return all(
        _rendered(case, escape=escape) == case.get(expected)
        for escape, expected in ((True, "result"), (False, "result_raw"))
    )


def _rendered(case: Case, *, escape: bool) -> str | None:
    try:
        return compile_template(case["template"], escape=escape).render(json.dumps(case["context"]))
    except REJECTED:
        return None


def _get(case: Case) -> int:
    return dates.get(_instant(case["instant"]), case["attribute"], dates.zone(case["zone"]))


def _add(case: Case) -> str:
    start, tz = _instant(case["instant"]), dates.zone(case["zone"])
    return dates.format_iso(dates.add(start, case["amount"], case["unit"], tz))


def _subtract_is_after(case: Case) -> bool:
    """The original's own test. Ours is start plus amount; the arithmetic is the same function."""
    tz, amount = dates.zone(case["zone"]), case["amount"]
    back = dates.add(_instant(case["now"]), _negated(amount), case["unit"], tz)
    return bool(back > _instant(case["start"]))


def _negated(amount: Any) -> Any:
    number = isinstance(amount, int | float) and not isinstance(amount, bool)
    return -amount if number else amount  # what is no number is for `add` to reject


def _next_match(case: Case) -> str | None:
    after, tz = _instant(case["after"]), dates.zone(case["zone"])
    found = dates.next_match(after, case["attribute"], case["values"], tz)
    return dates.format_iso(found) if found else None


def _parse(case: Case) -> str | None:
    found = dates.parse(case["input"], dates.zone(case["zone"]))
    return dates.format_iso(found) if found else None


def _instant(text: str) -> Any:
    instant = dates.parse(text, dates.zone("UTC"))
    if instant is None:
        raise EvaluationError("bad_data", f"{text!r} is no instant")
    return instant


MOMENT: Mapping[str, Callable[[Case], object]] = {
    "get": _get,
    "add": _add,
    "subtract_is_after": _subtract_is_after,
    "next_match": _next_match,
    "parse": _parse,
}

# Which library answered is told by the case's own key, whatever its file is called.
_KINDS: Mapping[str, tuple[str, Callable[[Case], bool]]] = {
    "command": ("lodash", lodash),
    "op": ("moment", moment),
    "template": ("handlebars", handlebars),
}


@dataclass
class Score:
    """What became of the cases of one file, by kind."""

    cases: Counter[str] = field(default_factory=Counter)
    agreed: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def below(self) -> list[str]:
        """A sentence for each kind that is below its floor."""
        return [
            f"{kind}: {self.agreed[kind] / total:.4f} agree, at least {FLOORS[kind]} must"
            for kind, total in self.cases.items()
            if self.agreed[kind] < FLOORS[kind] * total
        ]


def read_cases(path: Path) -> list[tuple[str, Case]]:
    """The lines of a file with their cases. Raises ValueError or OSError with the place."""
    # Only "\n" ends a line: texts may hold the other line ends that splitlines() knows.
    lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    if lines == [""]:
        raise ValueError("the file is empty")
    cases = []
    for number, line in enumerate(lines, start=1):
        try:
            case = json.loads(line)
            _kind(case)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is unreadable: {error}") from error
        cases.append((line, case))
    return cases


def replay(cases: Sequence[tuple[str, Case]]) -> Score:
    """Runs the cases. An error that is not a rejection is a disagreement like any other."""
    score = Score()
    for line, case in cases:
        kind, agrees = _kind(case)
        score.cases[kind] += 1
        try:
            agreed = agrees(case)
        except Exception as error:
            score.failures.append(f"{error!r}: {line}")
            continue
        if agreed:
            score.agreed[kind] += 1
        else:
            score.failures.append(line)
    return score


def _kind(case: object) -> tuple[str, Callable[[Case], bool]]:
    if isinstance(case, dict):
        for key, kind in _KINDS.items():
            if key in case:
                return kind
    raise ValueError("neither a command, an op nor a template")


def main(arguments: Sequence[str]) -> int:
    """Replays a directory, prints, and returns the exit status."""
    show = "--failures" in arguments
    named = [argument for argument in arguments if argument != "--failures"]
    directory = Path(named[0] if named else os.environ.get("ORACLE_DIR") or Path(__file__).parent)
    files = sorted(directory.glob("*.jsonl"))
    problems = [] if files else [f"{directory}: no *.jsonl file"]
    for path in files:
        try:
            score = replay(read_cases(path))
        except (OSError, ValueError) as error:
            problems.append(f"{path.name}: {error}")
            continue
        print(f"{path.stem}: {score.agreed.total()} of {score.cases.total()}")
        problems += [f"{path.stem}: {sentence}" for sentence in score.below()]
        if show:
            print(*score.failures, sep="\n")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
