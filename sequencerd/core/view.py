"""What steps, conditions, templates and runners read of an enrollment."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property, lru_cache
from hashlib import sha256
from shlex import quote
from typing import Any, Final

from sequencerd.core import exact_json
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.faults import EvaluationError

Holidays = Mapping[str, frozenset[date]]
"""The days of each calendar in sequencer.holidays."""


def no_holidays(calendar: str) -> str:
    """Explain why a calendar cannot be used."""
    return (
        f"calendar {calendar!r} has no holidays: fill it with `sequencerd holidays COUNTRY YEAR "
        f"--calendar {quote(calendar)}`, or insert its days into the table holidays"
    )


def share(seed: str, subject: str) -> float:
    """Return a number from 0 to 1 for a subject: constant for a seed, uniform over all subjects."""
    key = f"{seed}\0{subject}".encode("utf-8", "replace")
    return float(int.from_bytes(sha256(key).digest()[:6]) / 2**48)


External = Mapping[str, Any]
"""External data about a subject; empty without a lookup."""


Condition = Callable[[str], bool]
"""A condition on a view, given as JSON text."""


@dataclass(slots=True, eq=False)
class Context:
    """The evaluation context: what steps and goals read of an enrollment, and the time.

    `has_read_own` tells whether values of the enrollment itself were read, and not only its state.
    Conditions that read only the data do not count: `answers` has their results.
    """

    _enrollment: Enrollment
    now: datetime
    timezone: str
    external: External
    _holidays: Holidays | None = None
    answers: list[tuple[Condition, bool]] = field(default_factory=list)
    has_read_own: bool = False
    seed: str | None = None  # of the step that reads it

    def is_of(self, enrollment: Enrollment) -> bool:
        """Return whether this is the context of exactly this enrollment."""
        return self._enrollment is enrollment

    @property
    def enrollment(self) -> Enrollment:
        """Return the whole enrollment; this counts as reading its own values."""
        self.has_read_own = True
        return self._enrollment

    @property
    def entered_at(self) -> datetime:
        """Return since when the enrollment has been at its step."""
        return self._enrollment.entered_at or self.now

    def share(self, seed: str) -> float:
        """Return the subject's position between 0 and 1."""
        return share(seed, self.enrollment.subject)

    def holidays(self, calendar: str | None) -> Collection[date]:
        """Return the days of a calendar. Raises EvaluationError if it has none."""
        if calendar is None or self._holidays is None:
            return ()
        if calendar not in self._holidays:
            raise EvaluationError("invalid_step", no_holidays(calendar))
        return self._holidays[calendar]

    def holds(self, condition: Condition, roots: Set[str]) -> bool:
        """Return whether a condition that reads these keys of the view holds."""
        if roots != _DATA:
            return condition(self.json(roots))
        answer = condition(data_view(self._enrollment))
        self.answers.append((condition, answer))
        return answer

    def json(self, roots: Set[str] | None) -> str:
        """Return a view with these keys (None: all) as JSON text."""
        if roots is None or not roots <= _STATE:
            self.has_read_own = True
        if roots == _DATA:
            return data_view(self._enrollment)
        others: dict[str, Any] = state_view(
            self._enrollment, self.timezone, self.entered_at, self.external
        )
        _add_own(others, self._enrollment)
        if roots is not None:
            others = {name: value for name, value in others.items() if name in roots}
        has_data = roots is None or "data" in roots
        return _with_data(others, self._enrollment.data if has_data else None)


def data_view(enrollment: Enrollment) -> str:
    """Return a view that contains only the data, as JSON text."""
    return f'{{"data":{enrollment.data}}}'


_DATA = {"data"}
_STATE = {"sequence", "step", "timezone", "visit", "attempt", "startStep"}
"""The values that all enrollments in one state share."""


class StateView(dict[str, Any]):
    """The values of a view that all enrollments in one state share, and None for the others."""

    @cached_property
    def text(self) -> str:
        """Return the shared values as JSON."""
        return json.dumps({name: value for name, value in self.items() if name not in _OWN_NAMES})


_OWN_NAMES = ("id", "originalId", "subject", "dataLookup", "startSequence")


def state_view(
    enrollment: Enrollment, timezone: str, entered_at: datetime, external: External
) -> StateView:
    """Return the view of a state; the names are the original's."""
    return StateView(
        {
            "id": None,
            "originalId": None,
            "subject": None,
            "dataLookup": None,
            "sequence": enrollment.sequence,
            "step": enrollment.step,
            "external": external,
            "timezone": timezone,
            "visit": enrollment.visit,
            "attempt": enrollment.attempt,
            "startSequence": None,
            "startStep": iso(entered_at),
        }
    )


def view(enrollment: Enrollment, timezone: str, entered_at: datetime, external: External) -> View:
    """Return what runners receive. Raises EvaluationError for data that cannot be read."""
    return view_in_state(enrollment, state_view(enrollment, timezone, entered_at, external))


def view_in_state(enrollment: Enrollment, of_state: StateView) -> View:
    """Return what runners receive, given the values of its state. Raises EvaluationError for data
    that cannot be read.
    """
    made = View(of_state)
    _add_own(made, enrollment)
    made["data"] = parse_data(enrollment.data)
    made.data = enrollment.data
    made.state = of_state
    return made


def _add_own(values: dict[str, Any], enrollment: Enrollment) -> None:
    """Set the values that a view of the enrollment's state leaves open."""
    original_id = enrollment.original_id
    values["id"] = enrollment.id
    values["originalId"] = enrollment.id if original_id is None else _original_id(original_id)
    values["subject"] = values["dataLookup"] = enrollment.subject
    values["startSequence"] = iso(enrollment.created_at)


def _original_id(id_: str) -> int | str:
    """Return the id of an enrollment in the original."""
    return int(id_) if id_.isascii() and id_.isdecimal() else id_


class View(dict[str, Any]):
    """The values that `get` paths, templates and custom runners may read, with their JSON text."""

    data: str  # the JSON text of the data
    state: StateView | None = None  # the shared values, unless it has others

    @classmethod
    def of(cls, values: Mapping[str, Any], data: str) -> View:
        """Make a view of these values, with this text of the data; without `__init__`, which takes
        longer.
        """
        made = cls(values)
        made.data = data
        return made

    @cached_property
    def text(self) -> str:
        """Return it as JSON, with the data as in PostgreSQL."""
        if self.state is None:
            others = {name: value for name, value in self.items() if name != "data"}
            return _with_data(others, self.data)
        # written out: to encode a dict takes three times as long
        original_id, subject = self["originalId"], json.dumps(self["subject"])
        if isinstance(original_id, str):
            original_id = json.dumps(original_id)
        return (
            f'{{"data":{self.data},"id": {self["id"]}, "originalId": {original_id}, '
            f'"subject": {subject}, "dataLookup": {subject}, '
            f'"startSequence": "{self["startSequence"]}", {self.state.text[1:]}'
        )


def _with_data(others: Mapping[str, Any], data: str | None) -> str:
    """Return JSON text, with the data as in PostgreSQL."""
    text = json.dumps(others)
    if data is None:
        return text
    return f'{{"data":{data},{text[1:]}' if others else f'{{"data":{data}}}'


_decode = json.JSONDecoder().raw_decode  # without a search for blanks, which jsonb lacks


def parse_data(text: str, *, exact: bool = False) -> dict[str, Any]:
    """Parse an enrollment's data; `exact` keeps all digits, for data that are written again. Raises
    EvaluationError for values that PostgreSQL accepts and Python does not.
    """
    try:
        data: dict[str, Any]
        if exact:
            data = exact_json.loads(text)
        else:
            exact_json.check_depth(text)
            data = _decode(text)[0]
    except (ValueError, RecursionError) as error:
        raise EvaluationError("bad_data", f"data cannot be read: {error}") from error
    return data


REMOVED: Final = object()
"""In changes of data, the value of a key that is removed."""


def merge_data(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return data with changes of their top-level keys."""
    return {key: value for key, value in {**data, **changes}.items() if value is not REMOVED}


@lru_cache(maxsize=4096)  # the enrollments of a batch have entered their step at one time
def iso(instant: datetime) -> str:
    """Format an instant (aware, in UTC) in ISO 8601 with milliseconds, like JavaScript."""
    return instant.isoformat(timespec="milliseconds")[:23] + "Z"
