"""Steps that act on other enrollments, or collect items: Enroll, Cancel, Collect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, time
from typing import Any

from pydantic import Field, StrictInt

from sequencerd.core import exact_json
from sequencerd.core.calendar import dates
from sequencerd.core.config import Config, Faults
from sequencerd.core.enrollment import MAX_SUBJECT, NEVER
from sequencerd.core.faults import DefinitionError, EvaluationError
from sequencerd.core.model import (
    ALT_NEXT,
    NEXT,
    Cancellation,
    Entry,
    InstantStep,
    Stay,
    StepAnswer,
    Update,
)
from sequencerd.core.step_types.data import (
    compile_item,
    compile_object,
    copies_object,
    data_paths,
)
from sequencerd.core.step_types.durations import (
    Duration,
    calendars_of,
    compile_move,
    describe_duration,
    spelled_out,
)
from sequencerd.core.step_types.record import StepType
from sequencerd.core.step_types.template_config import compile_text
from sequencerd.core.view import REMOVED, Context, parse_data
from sequencerd.core.window_config import TimeOfDay, parse_clock

# --- other enrollments


class EnrollStepConfig(Config):
    """Enrolls a subject in another sequence; goes to altNext, if set, if the sequence refuses."""

    sequence: str = Field(min_length=1)
    """The sequence."""
    subject: str | None = None
    """The subject: a template. Default: the enrollment's own subject."""
    data: dict[str, Any] = Field(default_factory=dict)
    """The data of the new enrollment; texts are templates, and {get: path} copies a value. Instead
    of keys, {get: data} copies all data."""


def _enroll(config: EnrollStepConfig) -> InstantStep:
    faults = Faults()
    whole: Callable[[Context], dict[str, Any]] | None = None
    data: dict[str, Callable[[Context], Any]] = {}
    if copies_object(config.data):
        with faults.at():
            whole = compile_object(config.data)
    else:
        for key, value in config.data.items():
            with faults.at("data", key):
                data[key] = compile_item((), ("data", key), value)
    subject = _subject(config.subject, faults)
    faults.check()

    def answer(context: Context) -> StepAnswer:
        own = context.enrollment
        timezone = own.timezone if config.subject is None else None
        made = whole(context) if whole else {key: make(context) for key, make in data.items()}
        return Entry(config.sequence, subject(context), exact_json.dumps(made), timezone)

    refused = ALT_NEXT._replace(is_optional=True)
    return InstantStep(answer, (NEXT, refused), concerns=(("enrolls", config.sequence),))


class CancelConfig(Config):
    """Cancels the active enrollments of a subject in a sequence, except this one."""

    sequence: str = Field(min_length=1)
    """The sequence."""
    subject: str | None = None
    """The subject: a template. Default: the enrollment's own subject."""


def _cancel(config: CancelConfig) -> InstantStep:
    faults = Faults()
    subject = _subject(config.subject, faults)
    faults.check()
    return InstantStep(
        lambda context: Cancellation(config.sequence, subject(context)),
        concerns=(("cancels", config.sequence),),
    )


def _subject(source: str | None, faults: Faults) -> Callable[[Context], str]:
    """Compile a subject; its errors are added to `faults`."""
    if source is None:
        return lambda context: context.enrollment.subject
    render: Callable[[Context], str] = lambda _: source  # noqa: E731
    with faults.at("subject"):
        render = compile_text(("subject",), source)

    def subject(context: Context) -> str:
        found = render(context)
        size = len(found.encode("utf-8", "replace"))
        if not 1 <= size <= MAX_SUBJECT or "\0" in found:
            raise EvaluationError(
                "bad_data",
                f"subject: {source!r} does not give a subject of 1 to {MAX_SUBJECT} bytes",
            )
        return found

    return subject


# --- items


class CollectConfig(Config):
    """Collects items that sequencer.collect() adds to data.items, then moves them to data.batch."""

    quiet: Duration | None = None
    """Ends the collection when no item has arrived for this time, such as {minutes: 10}."""
    most: Duration | None = None
    """Ends the collection this long after the first item at the latest, such as {hours: 1}."""
    at: TimeOfDay | None = None
    """Instead of quiet and most: the local time at which the collection ends, such as "08:00"."""
    at_most: StrictInt = Field(default=1000, ge=1, le=10_000, alias="at_most")
    """The number of items to keep; further items are only counted."""


def _collect(config: CollectConfig) -> InstantStep:
    end = _end_of_round(config)

    def answer(context: Context) -> StepAnswer:
        data = parse_data(context.enrollment.data, exact=True)
        items = data.get("items")
        if items is None or items == []:
            return Stay(NEVER)
        if not isinstance(items, list):
            raise EvaluationError("bad_data", "data.items is not a list")
        known = data.get("collecting")
        known = known if isinstance(known, dict) else {}
        since = _instant(known.get("since"), context.entered_at)
        last = _instant(known.get("last"), since)
        until = end(context, since, min(last, context.now))
        if until > context.now:
            return Stay(until)
        count = known.get("count")
        count = max(count, len(items)) if isinstance(count, int) else len(items)
        batch = items[: config.at_most]
        collected = {
            "count": count,
            "omitted": count - len(batch),
            "since": known.get("since"),
            "last": known.get("last"),
        }
        moved = {"batch": batch, "collected": collected, "items": [], "collecting": REMOVED}
        return Update(moved, f"{count} item{'' if count == 1 else 's'}", has_waited=True)

    # it passes at once only with items that have arrived since it passed before: not a loop
    return InstantStep(answer, (NEXT._replace(at_once="never"),), collects=True)


def _end_of_round(config: CollectConfig) -> Callable[[Context, datetime, datetime], datetime]:
    """Compile when the items whose first and last came at some times are due."""
    if (config.at is None) == (config.quiet is None and config.most is None):
        raise DefinitionError("needs quiet, most or both; or at")
    if config.at is not None:
        clock = parse_clock(config.at)
        return lambda context, since, _: _next_time(since, clock, context.timezone)
    quiet = compile_move(config.quiet, ("quiet",)) if config.quiet else None
    most = compile_move(config.most, ("most",)) if config.most else None

    def end(context: Context, since: datetime, last: datetime) -> datetime:
        moves = ((quiet, last), (most, since))
        return min(move(context)(start) for move, start in moves if move is not None)

    return end


def _next_time(since: datetime, clock: time, timezone: str) -> datetime:
    """Return when the local clock next shows a time; where it skips it, after the gap."""
    zone = dates.zone(timezone)
    found = dates.at_clock(since, clock, zone)
    if found > since:
        return found
    return dates.at_clock(dates.add(since, 1, "day", zone), clock, zone)


def _instant(value: object, default: datetime) -> datetime:
    """Return when an item arrived. Any user can change the data, so it may be invalid."""
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else default
        return found.astimezone(UTC) if found.tzinfo is not None else default
    except (ValueError, OverflowError):
        return default


def _describe_collect(config: Mapping[str, Any]) -> str:
    if at := config.get("at"):
        return f"waits for items, until {at}"
    ends = []
    for key, words in (("quiet", "until {} without one"), ("most", "at most {}")):
        match spelled_out(config.get(key)):
            case dict() as duration:
                ends.append(words.format(describe_duration(duration)))
    return f"waits for items, {', '.join(ends)}" if ends else ""


TYPES = (
    StepType(
        name="Enroll",
        config=EnrollStepConfig,
        compile=_enroll,
        templates=("subject", "data"),
        paths=data_paths,
    ),
    StepType(name="Cancel", config=CancelConfig, compile=_cancel, templates=("subject",)),
    StepType(
        name="Collect",
        config=CollectConfig,
        compile=_collect,
        describe=_describe_collect,
        calendars=(*calendars_of(("quiet",)), *calendars_of(("most",))),
        produces=("batch", "collected", "items", "collecting"),
    ),
)
