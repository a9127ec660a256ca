"""Read and check documents of sequences, from YAML and JSON files or made by programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictInt,
    ValidationError,
    WithJsonSchema,
    field_validator,
)

from sequencerd.core import model
from sequencerd.core.brake import MAX_BRAKE
from sequencerd.core.calendar import dates
from sequencerd.core.config import Config, faults, nearest
from sequencerd.core.enrollment import MAX_NAME
from sequencerd.core.faults import DefinitionError, Fault, KeyPath, printable
from sequencerd.core.javascript.templates import check_partial
from sequencerd.core.languages import FILE, TEXT_SCHEMA, check_locale_path
from sequencerd.core.model import NEXT, InvalidStep, MessageContext, SideEffect, Step
from sequencerd.core.schedule import EnrollConfig, Span
from sequencerd.core.step_types import (
    is_instant,
    is_message,
    may_take_alt_next,
    named_steps,
    step_type,
)
from sequencerd.core.step_types.durations import Duration, FixedDuration, elapsed
from sequencerd.core.step_types.effects import Topic
from sequencerd.core.window_config import WindowConfig
from sequencerd.definitions import check, cycles, included
from sequencerd.definitions.compiler import (
    Definition,
    Runners,
    build,
    compile_behaviour,
    named_calendars,
    reads_external,
)
from sequencerd.definitions.yaml_reader import Document, DocumentError, read_documents
from sequencerd.errors import FileError

MAX_DESCRIPTION = 10_000  # bytes
MAX_HINTS = 50


def _zone(name: str) -> str:
    dates.zone(name)
    return name


def _short_enough(most: int) -> AfterValidator:
    def check(text: str) -> str:
        if len(text.encode()) > most:
            raise ValueError(f"must have at most {most:,} bytes")
        return text

    return AfterValidator(check)


def _check_recheck(value: timedelta) -> timedelta:
    if not timedelta(seconds=1) <= value <= timedelta(days=360):
        raise ValueError("must be from 1 second to 360 days")
    return value


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME), _short_enough(MAX_NAME)]
Description = Annotated[str, Field(max_length=MAX_DESCRIPTION), _short_enough(MAX_DESCRIPTION)]
PartialName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_./-]{0,99}$")]
PartialText = Annotated[str, WithJsonSchema(TEXT_SCHEMA)]
Recheck = Annotated[
    timedelta,
    BeforeValidator(lambda value: str(value) if isinstance(value, bool) else value),
    AfterValidator(_check_recheck),
    WithJsonSchema({"type": ["string", "number"]}),
]


class ReentryAfter(Config):
    """A subject may be enrolled again some time after its enrollment has ended."""

    after: Span
    """The time after the end, such as {amount: 90, unit: days}."""


Reentry = Literal["after_end", "always", "never"] | ReentryAfter


class BrakeConfig(Config):
    """Pauses the sequence when more side effects would begin in the period."""

    at_most: StrictInt = Field(ge=1, le=MAX_BRAKE, alias="at_most")
    """How many."""
    per: Duration
    """The period, such as {hours: 1}: weeks to seconds, of elapsed time."""

    @field_validator("per")
    @classmethod
    def _whole_seconds(cls, per: FixedDuration) -> FixedDuration:
        period = elapsed(per)
        if period < timedelta(seconds=1) or period.microseconds:
            raise ValueError("must be a whole number of seconds")
        return per

    def document(self) -> dict[str, Any]:
        """Return the same in hours or seconds, like sequencer.as_duration."""
        seconds = int(elapsed(self.per).total_seconds())
        hours, rest = divmod(seconds, 3600)
        amount, unit = (seconds, "seconds") if rest else (hours, "hours")
        return {"at_most": self.at_most, "per": {"amount": amount, "unit": unit}}


class FileStep(Config):
    """A step: its type and config, and the steps to which it leads."""

    name: Name
    """Unique in the sequence."""
    type: Name
    """A built-in type, or that of a custom runner."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The config of the step's type."""
    next: str | None = None
    """The step that follows. Default: the next one in the file; null ends the enrollment."""
    alt_next: str | None = None
    """The step that follows the exit altNext. Default: null, which ends the enrollment."""
    seed: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    """For a Split: the text that assigns subjects to branches. Default: its original names."""
    renamed_from: Name | None = None
    """The step's former name; its enrollments stay at the step. Can be removed once applied."""


class FileSequence(Config):
    """A sequence of sequencerd: named steps, in order."""

    name: Name
    """Unique in the database."""
    description: Description | None = None
    """What the sequence is for; shown to operators."""
    timezone: Annotated[str, AfterValidator(_zone)] = "UTC"
    """An IANA name, such as Europe/Berlin, for subjects without a time zone of their own."""
    status: Literal["active", "paused", "archived"] = "active"
    """paused: nothing is executed. archived: no new enrollments; existing ones continue. Default:
    active, or paused if it has been paused by hand."""
    reentry: Reentry = "after_end"
    """When a subject may be enrolled again; {after: {amount: 90, unit: days}}: after the end."""
    lookup: Annotated[str, Field(min_length=1)] | None = None
    """The lookup for external data: an endpoint, a Python function, or an SQL function."""
    recheck: Recheck = timedelta(minutes=1)
    """How often goals and waits that read external data are checked, such as PT5M."""
    window: WindowConfig | None = None
    """When side effects may begin, unless a step has a window of its own."""
    topic: Topic | None = None
    """The topic of side effects, such as marketing, unless a step has its own."""
    locale: Annotated[str, AfterValidator(check_locale_path)] | None = None
    """The path of the subject's language, for translated texts. Default: data.locale."""
    partials: dict[PartialName, PartialText] = Field(default_factory=dict)
    """Templates that messages of the sequence include as {{> name}}."""
    enroll: EnrollConfig | None = None
    """Enrolls the subjects that a view or function returns, by a schedule."""
    brake: BrakeConfig | None = None
    """Pauses the sequence before more side effects begin: {at_most: 500, per: {hours: 1}}."""
    steps: list[FileStep] = Field(min_length=1)
    """The steps; enrollments start at the first one."""


@dataclass(frozen=True, slots=True)
class FileFinding:
    """An error or warning at a line of a document."""

    origin: str  # such as the path of the file
    line: int
    sequence: str | None
    step: str | None
    message: str
    is_error: bool = True
    column: int = 1

    def __str__(self) -> str:
        """Format the finding as editors and build servers expect."""
        where = "/".join(name for name in (self.sequence, self.step) if name is not None)
        text = printable(f"{where}: {self.message}" if where else self.message)
        text = text.replace("\n", " ").replace("\t", " ")
        return f"{self.origin}:{self.line}: {'error' if self.is_error else 'warning'}: {text}"


def read_file(path: Path, runners: Runners) -> list[Definition]:
    """Read the sequences of a YAML or JSON file. Raises FileError with all errors."""
    return read_all([path], runners)


def read_all(paths: Iterable[Path], runners: Runners) -> list[Definition]:
    """Read the sequences of several files. Raises FileError with all errors."""
    definitions, findings = read_files(paths, runners)
    if errors := [str(finding) for finding in findings if finding.is_error]:
        raise FileError("\n".join(errors))
    return definitions


def read_files(
    paths: Iterable[Path],
    runners: Runners,
    data: Mapping[str, check.KnownPaths] = MappingProxyType({}),
) -> tuple[list[Definition], list[FileFinding]]:
    """Return the sequences without an error, and all findings, as `check_documents` does."""
    return check_documents({str(path): read_documents(path) for path in paths}, runners, data)


def check_documents(
    documents: Mapping[str, Iterable[Document]],
    runners: Runners,
    data: Mapping[str, check.KnownPaths] = MappingProxyType({}),
) -> tuple[list[Definition], list[FileFinding]]:
    """Return the sequences without errors, and all findings, in the order of the documents.

    `documents` are given by origin; a DocumentError that an iterator raises becomes a finding.
    `data` contains the paths of examples of data, by sequence.
    """
    definitions, findings = [], []
    read = {origin: _read_sources(origin, found) for origin, found in documents.items()}
    sources = {
        source.name: source for found, _ in reversed(read.values()) for source in reversed(found)
    }
    entered: dict[str, set[str]] = {}
    for source in sources.values():
        for _, name, step in source.steps_elsewhere():
            entered.setdefault(name, set()).add(step)
    built = {
        source: one
        for found, _ in read.values()
        for source in found
        if (one := _build(source, sources, runners)) is not None
    }
    remarks: dict[str | None, list[check.Remark]] = {}
    known = {one.sequence.name: one.sequence for one in reversed(built.values())}
    for name, remark in cycles.check(known):
        remarks.setdefault(name, []).append(remark)
    for found, unreadable in read.values():
        for source in found:
            if (one := built.get(source)) is not None:
                found_here = check.check(one.sequence, entered.get(source.name or "", set()))
                all_found = [*found_here, *remarks.pop(source.name, [])]
                all_found += check.check_partials(one.sequence)
                if source.name is not None and source.name in data:
                    all_found += check.unknown_paths(one.sequence, data[source.name])
                if (definition := _checked(source, one, all_found)) is not None:
                    definitions.append(definition)
            findings += sorted(source.findings, key=lambda finding: finding.line)
        findings += unreadable
    return definitions, findings


def names(paths: Iterable[Path]) -> list[str]:
    """Return the names of the sequences in some files, without checking the sequences."""
    found = [source.name for path in paths for source in _sources_of(path)]
    return [name for name in found if name is not None]


def types(path: Path) -> set[str]:
    """Return the step types in a file, whether or not they are served."""
    found = (_text_at(step, "type") for source in _sources_of(path) for step in source.steps)
    return {type_ for type_ in found if type_ is not None}


class _SequenceSource:
    """A sequence as it is written, and the findings about it so far."""

    def __init__(self, origin: str, document: Document) -> None:
        self.origin = origin
        self.document = document
        self.name = _text_at(document.value, "name")
        steps = document.value.get("steps") if isinstance(document.value, dict) else None
        self.steps: list[Any] = steps if isinstance(steps, list) else []
        self.step_names = [_text_at(step, "name") for step in self.steps]
        self.findings: list[FileFinding] = []
        self.files: dict[KeyPath, Path] = {}  # of texts in separate files
        self.wrong_partials: set[str] = set()
        if document.folder is not None:
            self._include(document.folder)

    def _include(self, folder: Path) -> None:
        """Replace references to files with the texts in these files."""
        value = self.document.value
        for path, holder in list(included.places(value)):
            key = str(path[-1])
            try:
                self.files[path], holder[key] = included.read(folder, holder[key][FILE])
            except included.IncludedError as error:
                self.add_finding((*path, FILE), str(error))
                holder[key] = ""
        if not isinstance(value, dict) or not isinstance(value.get("partials", {}), dict):
            return
        try:
            for name, file in list(included.partials_beside(folder, value)):
                self.files["partials", name], text = included.read(folder, file)
                value.setdefault("partials", {})[name] = text
        except included.IncludedError as error:
            self.add_finding((), f"partials: {error}")

    def __str__(self) -> str:
        return f"{self.origin}:{self.document.line(())}"

    def add_finding(self, keys: KeyPath, message: str, *, is_error: bool = True) -> None:
        """Add a finding; `keys` is the path from the top of the document."""
        step, text = None, str(Fault(keys, message))
        if keys[:1] == ("steps",) and len(keys) > 1:
            number = int(keys[1])
            step = self.step_names[number] or None
            text = str(Fault(keys[3:] if keys[2:3] == ("config",) else keys[2:], message))
            if step is None:
                text = f"step {number + 1}: {text}"
        within = re.match(r"line (\d+): ", message)  # of a template
        if file := self.files.get(keys):
            origin, line, column = str(file), int(within[1]) if within else 1, 1
        else:
            inner = int(within[1]) if within else 0
            origin = self.origin
            line, column = self.document.line(keys, inner), self.document.column(keys, inner)
        self.findings.append(FileFinding(origin, line, self.name, step, text, is_error, column))

    def steps_elsewhere(self) -> Iterator[tuple[KeyPath, str, str]]:
        """Yield the steps of other sequences that configs name: path, sequence and step."""
        for number, value in enumerate(self.steps):
            config = value.get("config") if isinstance(value, dict) else None
            for path, step, sequence in named_steps(_text_at(value, "type") or "", config):
                if sequence is not None:
                    yield ("steps", number, "config", *path), sequence, step


def _text_at(value: object, key: str) -> str | None:
    text = value.get(key) if isinstance(value, dict) else None
    return text if isinstance(text, str) else None


def _window_at(value: object) -> dict[str, Any] | None:
    """Return the window of a sequence as it is written."""
    window = value.get("window") if isinstance(value, dict) else None
    return window if isinstance(window, dict) else None


def _read_sources(
    origin: str, documents: Iterable[Document]
) -> tuple[list[_SequenceSource], list[FileFinding]]:
    """Read the sequences of one origin, and the error that ended it early, if any."""
    sources: list[_SequenceSource] = []
    try:
        sources.extend(_SequenceSource(origin, document) for document in documents)
    except DocumentError as error:
        return sources, [
            FileFinding(origin, error.line, None, None, str(error), True, error.column)
        ]
    empty = FileFinding(origin, 1, None, None, "it contains no sequence")
    return sources, [] if sources else [empty]


def _sources_of(path: Path) -> list[_SequenceSource]:
    sources, _ = _read_sources(str(path), read_documents(path))
    return sources


class _BuiltSequence(NamedTuple):
    """A sequence whose steps were read; where a name is wrong, an exit may be missing."""

    sequence: model.Sequence
    parsed: FileSequence | None
    are_exits_known: bool


def _build(
    source: _SequenceSource, sources: Mapping[str | None, _SequenceSource], runners: Runners
) -> _BuiltSequence | None:
    """Build the sequence unless none of its steps can be read."""
    parsed = _parse(source)
    _check_names(source, sources)
    are_exits_known = not source.findings
    shared = MessageContext(parsed.locale if parsed else None, _check_partials(source))
    steps = _read_steps(source, runners, shared)
    if not steps:
        return None
    given = model.Sequence(
        source.name or "",
        steps[0].name,
        parsed.timezone if parsed else "UTC",
        {step.name: step for step in steps},
        archived=_text_at(source.document.value, "status") == "archived",
        lookup=_text_at(source.document.value, "lookup"),
        recheck=parsed.recheck if parsed else timedelta(minutes=1),
        topic=parsed.topic if parsed else None,
        shared=shared,
    )
    sequence = build(given, _window_at(source.document.value) if parsed else None)
    for step in steps:
        built = sequence.steps[step.name].behaviour
        if isinstance(built, InvalidStep):
            known = step.behaviour.faults if isinstance(step.behaviour, InvalidStep) else ()
            for keys, message in built.faults[len(known) :]:
                config = ("config",) if keys else ()
                source.add_finding(("steps", step.position, *config, *keys), message)
    return _BuiltSequence(sequence, parsed, are_exits_known)


def _checked(
    source: _SequenceSource, built: _BuiltSequence, remarks: Iterable[check.Remark]
) -> Definition | None:
    """Return the definition if it has no error."""
    sequence, parsed, are_exits_known = built
    for name, keys, message, is_error in remarks:
        if keys[:1] == ("partials",):
            source.add_finding(keys, message, is_error=is_error)
        elif are_exits_known or keys:
            number = sequence.steps[name].position
            source.add_finding(("steps", number, *keys), message, is_error=is_error)
    if parsed is None or any(finding.is_error for finding in source.findings):
        return None
    where = f"{source}: sequence {parsed.name!r}"
    return Definition(
        sequence,
        {"after": parsed.reentry.after.document()}
        if isinstance(parsed.reentry, ReentryAfter)
        else parsed.reentry,
        parsed.status if "status" in parsed.model_fields_set else None,
        where,
        parsed.description,
        _window_at(source.document.value),
        {step.name: step.renamed_from for step in parsed.steps if step.renamed_from},
        enroll=parsed.enroll,
        brake=parsed.brake.document() if parsed.brake else None,
    )


def _check_partials(source: _SequenceSource) -> tuple[tuple[str, str], ...]:
    """Return the partials of a sequence. Their errors are reported here, and not for each step."""
    value = source.document.value
    partials = value.get("partials") if isinstance(value, dict) else None
    found = partials if isinstance(partials, dict) else {}
    texts = {name: text for name, text in found.items() if isinstance(text, str)}
    for name, text in texts.items():
        try:
            check_partial(text)
        except DefinitionError as error:
            source.wrong_partials.add(name)
            for fault in error.faults:
                source.add_finding(("partials", name), fault.message)
    return tuple(texts.items())


def _parse(source: _SequenceSource) -> FileSequence | None:
    value = source.document.value
    try:
        parsed = FileSequence.model_validate(value)
    except ValidationError as error:
        for keys, message in faults(error, FileSequence, value, "a sequence"):
            source.add_finding(keys, message)
        return None
    return parsed


def _check_names(source: _SequenceSource, sources: Mapping[str | None, _SequenceSource]) -> None:
    """Report duplicate names and targets that do not exist."""
    first = sources[source.name]
    if source.name is not None and first is not source:
        source.add_finding(
            ("name",), f"sequence {source.name!r} is defined twice, first in {first}"
        )
    for number, step in enumerate(source.steps):
        name = source.step_names[number]
        if name is not None and source.step_names.index(name) != number:
            source.add_finding(("steps", number, "name"), f"step {name!r} is defined twice")
        for key in ("next", "altNext"):
            if (target := _text_at(step, key)) is not None:
                _check_target(source, ("steps", number, key), target, source)
    former = [_text_at(step, "renamedFrom") for step in source.steps]
    for number, name in enumerate(former):
        if name is not None and former.index(name) != number:
            source.add_finding(
                ("steps", number, "renamedFrom"), f"another step was also renamed from {name!r}"
            )
        if name is not None and _renamed_in_a_circle(number, source.step_names, former):
            source.add_finding(
                ("steps", number, "renamedFrom"),
                "these steps change names in a circle: rename one of them in a first apply",
            )
    for path, other, target in source.steps_elsewhere():
        if other in sources and other != source.name:
            _check_target(source, path, target, sources[other])


def _renamed_in_a_circle(
    number: int, names: Sequence[str | None], former: Sequence[str | None]
) -> bool:
    """Return whether following the former names of a step leads back to it."""
    at: str | None = former[number]
    for _ in names:
        if at is None or at not in names:
            return False
        if at == names[number]:
            return True
        at = former[names.index(at)]
    return False


_ENDS = ("end", "exit", "stop", "done", "finish", "none")
"""Names of steps that other tools have for the end."""


def _check_target(
    source: _SequenceSource, keys: KeyPath, target: str, there: _SequenceSource
) -> None:
    if target not in there.step_names:
        where = "" if there is source else f" in sequence {there.name!r}"
        known = [name for name in there.step_names if name is not None]
        # a file full of errors must not take minutes
        hint = f"; {nearest(target, known)}" if len(source.findings) < MAX_HINTS else ""
        if target.lower() in _ENDS:
            hint = "; write null to end the enrollment"
        source.add_finding(keys, f"step {target!r} does not exist{where}{hint}")


def _check_alt_next(source: _SequenceSource, number: int, step: Step) -> None:
    """Warn about a side effect that can end an enrollment because its altNext is omitted."""
    if isinstance(step.behaviour, SideEffect) and may_take_alt_next(step.type, step.config):
        cause = (
            "its config has altNext" if is_message(step.type) else "its runner may answer altNext"
        )
        message = f"{cause}, which ends the enrollment here: write altNext, with a step or null"
        source.add_finding(("steps", number), message, is_error=False)


def _check_next(source: _SequenceSource, number: int, step: Step) -> None:
    """Warn about a step that leads to a goal, and waits there, only because its next is omitted."""
    following = source.steps[number + 1] if number + 1 < len(source.steps) else None
    if step_type(_text_at(following, "type")).is_goal and any(
        exit_.path == NEXT.path for exit_ in step.behaviour.exits
    ):
        message = (
            f"leads to the goal {step.next_step!r}, where enrollments wait until it is met: write "
            "next, with a step or null"
        )
        source.add_finding(("steps", number), message, is_error=False)


def _read_steps(source: _SequenceSource, runners: Runners, shared: MessageContext) -> list[Step]:
    """Read the steps that can be read, each name once, and report the errors of their configs."""
    steps: dict[str, Step] = {}
    for number, value in enumerate(source.steps):
        try:
            parsed = FileStep.model_validate(value)
        except ValidationError:
            continue  # reported with the whole sequence
        following = [*source.step_names, None][number + 1]
        step = Step(
            sequence=source.name or "",
            name=parsed.name,
            type=parsed.type,
            source=parsed.config,
            next_step=parsed.next if "next" in parsed.model_fields_set else following,
            alt_next_step=parsed.alt_next,
            behaviour=compile_behaviour(parsed.type, parsed.config, runners, shared),
            position=number,
            reads_external=reads_external(parsed.type, parsed.config, shared),
            seed=parsed.seed,
            calendars=named_calendars(parsed.type, parsed.config),
        )
        if parsed.alt_next is None and "alt_next" not in parsed.model_fields_set:
            _check_alt_next(source, number, step)
        if "next" not in parsed.model_fields_set:
            _check_next(source, number, step)
        if parsed.seed is not None and not step_type(parsed.type).is_seeded:
            message = f"a {parsed.type} is not decided by a seed: leave it out"
            source.add_finding(("steps", number, "seed"), message)
        steps.setdefault(step.name, step)
        if isinstance(step.behaviour, InvalidStep):
            is_served = is_instant(parsed.type) or parsed.type in runners
            for keys, message in step.behaviour.faults:
                if any(message.startswith(f"partial {name!r}: ") for name in source.wrong_partials):
                    continue
                key = "config" if is_served else "type"
                source.add_finding(("steps", number, key, *keys), message.removeprefix("type "))
    return list(steps.values())
