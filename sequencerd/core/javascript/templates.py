"""Templates by handlebars, with additional helpers.

Compiling a template analyses it; its program is created when it is first rendered. A template has
access to JSON data only: no files, no environment, no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.date_format import DEFAULT, check_locale, compile_format
from sequencerd.core.faults import DefinitionError, EvaluationError, Fault
from sequencerd.core.graph import reach
from sequencerd.core.javascript import sandbox
from sequencerd.core.view import View

MAX_SOURCE = 256 * 1024  # characters
MAX_TAGS = 5_000
MAX_ROUNDS = 20  # of dates that depend on dates
LARGE = 2000  # characters of a program; those of a message take up to 40 ms to compile

NO_PARTIALS: Mapping[str, str] = MappingProxyType({})

USAGE: Mapping[str, str] = {
    "and": "(and value value ...)",
    "capitalize": "{{capitalize value}}",
    "date": '{{date value format="D MMMM YYYY" zone="Europe/Berlin" locale="de"}}',
    "default": '{{default value "otherwise"}}',
    "each": "{{#each list}}...{{/each}} or {{#each list as |item|}}...{{/each}}",
    "eq": "(eq value value)",
    "gt": "(gt value value)",
    "gte": "(gte value value)",
    "if": "{{#if value}}...{{/if}}",
    "includes": "(includes list value)",
    "json": "{{json value}}",
    "log": "{{log ...}}",
    "lookup": "{{lookup object key}}",
    "lower": "{{lower value}}",
    "lt": "(lt value value)",
    "lte": "(lte value value)",
    "ne": "(ne value value)",
    "not": "(not value)",
    "number": '{{number value decimals=2 locale="de"}}',
    "or": "(or value value ...)",
    "trim": "{{trim value}}",
    "unless": "{{#unless value}}...{{/unless}}",
    "upper": "{{upper value}}",
    "url": "{{url value}}",
    "with": "{{#with value}}...{{/with}}",
}
"""The helpers, with their syntax."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|0[xXoObB][0-9a-fA-F]+")
_SYNTAX = re.compile(
    r"(?:Parse|Lexical) error on line (?P<line>\d+)[:.].*?\n(?P<shown>.*)\n(?P<before>-*)\^"
    r"(?:\nExpecting (?P<expected>.*), got '(?P<got>\w+)')?",
    re.DOTALL,
)
_TOKENS = (
    ("OPEN_ENDBLOCK", "", "there is no block to close here"),
    ("INVERSE", "OPEN_ENDBLOCK", "a block may have only one {{else}}"),
    ("INVERSE", "", "{{else}} belongs into a block such as {{#if}}"),
    ("OPEN_INVERSE_CHAIN", "OPEN_ENDBLOCK", "{{else}} must be the last part of a block"),
    ("OPEN_INVERSE_CHAIN", "", "{{else}} belongs into a block such as {{#if}}"),
    ("CLOSE_UNESCAPED", "", "a tag ends with as many braces as it begins with"),
    ("CLOSE", "CLOSE_UNESCAPED", "a tag ends with as many braces as it begins with"),
    ("CLOSE", "CLOSE_SEXPR", "a parenthesis is not closed"),
    ("CLOSE", "CLOSE_BLOCK_PARAMS", "write names between two bars, as in {{#each list as |item|}}"),
    ("CLOSE", "", "the tag has no name"),
    ("EOF", "", "the tag is not closed: write }}"),
)
"""What is wrong where handlebars finds a token while it expects another one."""
_HINTS = (
    (
        re.compile(r"(?<=\.)-?[0-9]|[\w.-]*\["),
        "write an index or a key in brackets, as in {{data.items.[0]}}",
    ),
    (
        re.compile(r"[=!<>&|+*/?-]"),
        'there are no operators: write a helper, such as (eq data.plan "pro")',
    ),
)
"""What to write instead of what a template has at the place of a syntax error."""
_AT_LINE = re.compile(r"(.*) - (\d+):\d+", re.DOTALL)
_MISMATCH = re.compile(r"(.*) doesn't match (.*)", re.DOTALL)
# A brace, or the end of the template; handlebars shows 20 characters, and "..." if there are more.
_UNFINISHED = re.compile(r"\}.*|[\w.-]*(?<!\.\.\.)", re.DOTALL)
_NO_NAME = "{{/[ ]}}"  # closes the last block that is open, by a name that no block has


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled template.

    `is_literal`: it has no tags and renders as its source. `reads` are the paths that it may read,
    separated by dots. They may be too many, but never too few: a path within {{#each}} is listed as
    if it were a path of the view, and "this" stands for the whole view. `surely_reads` are the
    paths that are certainly read from the view; `roots` are the first keys of `reads`, None for
    all.
    """

    source: str
    is_literal: bool
    reads: frozenset[str]
    surely_reads: frozenset[str]
    roots: frozenset[str] | None
    program: str = field(repr=False, compare=False)
    dates: tuple[_Date, ...] = field(repr=False, compare=False)

    @property
    def is_slow_at_first(self) -> bool:
        """Whether this thread has yet to compile it, and takes long for that unless another thread
        translates it.
        """
        return len(self.program) >= LARGE and not sandbox.has(self.program)

    def translate(self) -> str:
        """Do the longest part of compiling it, for `compile` in another thread. Raises
        EvaluationError.
        """
        with _evaluating():
            return sandbox.translate(self.program)

    def compile(self, translated: str) -> None:
        """Compile it from its translation, so that this thread can render it. Raises
        EvaluationError.
        """
        with _evaluating():
            sandbox.add(self.program, translated)

    def render(self, view: Mapping[str, object] | str) -> str:
        """Render the view of an enrollment, or its JSON text.

        Raises EvaluationError ("bad_data") if a helper rejects its value, a value cannot be
        printed, or a limit is exceeded.
        """
        if self.is_literal:
            return self.source
        text = view if isinstance(view, str) else _json(view)
        answers = {} if isinstance(view, str) or not self.dates else self._expected(view)
        for _ in range(MAX_ROUNDS):
            with _evaluating():
                found = sandbox.evaluate(
                    "template", self.program, text, json.dumps(answers) if answers else ""
                )
            if found.startswith("="):
                return str(found[1:])
            for question in json.loads(found)[1:]:
                answers[question] = answer = _answer(question)
                if not isinstance(answer, str):
                    break  # the rendering fails there, unless it does not come there again
        raise EvaluationError(
            "bad_data", f"dates depend on other dates, more than {MAX_ROUNDS} levels deep"
        )

    def _expected(self, view: Mapping[str, object]) -> dict[str, str | dict[str, str]]:
        """Format the dates that it will request, so that it need not be rendered twice."""
        answers = {}
        for date in self.dates:
            value: object = view
            for key in date.keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, str):
                zone = date.zone or str(view.get("timezone") or "UTC")
                question = _written([value, date.format, zone, date.locale])
                answers[question] = _answer(question)
        return answers


@contextmanager
def _evaluating() -> Iterator[None]:
    try:
        yield
    except (sandbox.ThrownError, sandbox.LimitError) as error:
        raise EvaluationError("bad_data", str(error)) from error


class _Date(NamedTuple):
    """A date that is certainly printed: its path, and its format."""

    keys: tuple[str, ...]
    format: str
    zone: str
    locale: str


def compile_template(
    source: str,
    *,
    escape: bool,
    strict: bool = False,
    partials: Mapping[str, str] = NO_PARTIALS,
) -> Template:
    """Compile a template. `escape` is for HTML: {{x}} is escaped, {{{x}}} and {{&x}} are not.
    With `strict`, printing a missing value is an error. `partials` may be included; they are
    compiled in the same way.

    Raises DefinitionError for a malformed or oversized template, an unknown helper or partial, and
    a helper with wrong arguments.
    """
    if "{{" not in source and len(source) <= MAX_SOURCE:
        none = frozenset[str]()
        return Template(source, True, none, none, none, "", ())
    found = _analysis(source)
    used = _used(found, partials)
    inlines = _inlines(found, used)
    is_certain = not any(one["isDynamic"] for one in (found, *used.values()))
    wrong = [*_wrong(found), *_missing(found, partials, inlines)]
    for name, one in used.items():
        wrong += [f"partial {name!r}: {text}" for text in _wrong(one)]
        if is_certain:
            missing = _missing(one, partials, inlines)
            wrong += [f"partial {name!r}: {text}" for text in missing]
    if wrong:
        raise DefinitionError([Fault((), text) for text in wrong])
    reads = _shared(frozenset(found["reads"]).union(*(one["reads"] for one in used.values())))
    roots = frozenset(path.split(".")[0] for path in reads)
    program = {"source": source, "html": escape, "strict": strict}
    if used:
        program["partials"] = {name: partials[name] for name in used}
    return Template(
        source=source,
        is_literal=False,
        reads=reads,
        surely_reads=_shared(frozenset(found["surelyReads"])),
        roots=None if "this" in roots else _shared(roots | {"timezone"}),
        program=json.dumps(program),
        dates=tuple(
            _Date(tuple(keys), *[given.get(name, "") for name in ("format", "zone", "locale")])
            for keys, given in found["dates"]
        ),
    )


@lru_cache(maxsize=10_000)
def _shared(names: frozenset[str]) -> frozenset[str]:
    """Return an equal set, which all templates that read the same values share."""
    return names


def check_partial(source: str) -> None:
    """Raise DefinitionError for a partial that no template can use. Missing partials are reported
    for the templates, which may define them.
    """
    if wrong := list(_wrong(_analysis(source))):
        raise DefinitionError([Fault((), text) for text in wrong])


def missing_layouts(source: str, partials: Mapping[str, str]) -> list[str]:
    """Describe missing partials with a block, which handlebars renders in their place. The template
    has no errors.
    """
    found = _analysis(source)
    inlines = _inlines(found, _used(found, partials))
    return list(_missing(found, partials, inlines, with_block=True))


def called_partials(source: str, partials: Mapping[str, str]) -> set[str]:
    """Return the partials that a template uses, directly or through others, if they are valid."""

    def called(text: str) -> set[str]:
        with suppress(DefinitionError):
            return _named(_analysis(text), partials)
        return set()

    return reach(called(source), lambda name: called(partials[name]))


def _named(found: Mapping[str, Any], partials: Mapping[str, str]) -> set[str]:
    """Return the partials that a template includes; all if it computes a name."""
    if found["isDynamic"]:
        return set(partials)
    return {name for _, name, _, _ in found["used"] if name in partials}


def surely_used(source: str, partials: Mapping[str, str]) -> set[str]:
    """Return the partials that a template without errors certainly renders with the whole view."""

    def rendered(text: str) -> set[str]:
        used = _analysis(text)["used"]
        return {name for _, name, _, is_sure in used if is_sure and name in partials}

    return reach(rendered(source), lambda name: rendered(partials[name]))


def surely_read(source: str, partials: Mapping[str, str]) -> set[str]:
    """Return the paths that a template without errors certainly reads from the view, itself or in
    partials.
    """
    sources = [source, *(partials[name] for name in surely_used(source, partials))]
    return {path for one in sources for path in _analysis(one)["surelyReads"]}


def _analysis(source: str) -> dict[str, Any]:
    """Return the analysis of a template alone. Raises DefinitionError."""
    if len(source) > MAX_SOURCE:
        raise DefinitionError(
            f"the template has {len(source)} characters: write at most {MAX_SOURCE}"
        )
    if source.count("{{") > MAX_TAGS:
        raise DefinitionError(
            f"the template has {source.count('{{')} tags: write at most {MAX_TAGS}"
        )
    found: dict[str, Any] = json.loads(_analysed(source)) if "{{" in source else _NO_TAGS
    return found


_NO_TAGS: dict[str, Any] = {
    **dict.fromkeys(("wrong", "constants", "dates", "reads", "surelyReads", "inlines", "used"), ()),
    "isDynamic": False,
}
"""The analysis of a text without tags, for which no context is created."""


def _inlines(found: Mapping[str, Any], used: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the partials that a template, or one that it uses, defines itself."""
    return {name for one in (found, *used.values()) for name in one["inlines"]}


def _wrong(found: Mapping[str, Any]) -> Iterator[str]:
    """Describe the errors of a template, except for missing partials."""
    for line, kind, name in found["wrong"]:
        yield f"line {line}: {_described(kind, name)}"
    for line, *constant in found["constants"]:
        for said in _misused(*constant):
            yield f"line {line}: {said}"


def _used(found: Mapping[str, Any], partials: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the analyses of the partials that a template uses, directly or through others; of all
    if it computes a name. Raises DefinitionError, which names the partial.
    """
    used: dict[str, dict[str, Any]] = {}
    open_ = [found]
    while open_ and partials:
        one = open_.pop()
        for name in sorted(_named(one, partials)):
            if name not in used:
                try:
                    used[name] = _analysis(partials[name])
                except DefinitionError as error:
                    wrong = [Fault((), f"partial {name!r}: {fault}") for fault in error.faults]
                    raise DefinitionError(wrong) from error
                open_.append(used[name])
    return used


def _missing(
    found: Mapping[str, Any],
    partials: Mapping[str, str],
    inlines: Collection[str],
    *,
    with_block: bool = False,
) -> Iterator[str]:
    """Describe each partial that does not exist."""
    for line, name, has_block, _ in found["used"]:
        if has_block is with_block and name not in partials and name not in inlines:
            near = get_close_matches(name, partials, n=1)
            shown = name[:60]
            inline = f'{{{{#*inline "{shown}"}}}}...{{{{/inline}}}}'
            hint = f"write it under partials, or {inline} before it"
            if near:
                hint = f"did you mean {near[0]!r}?"
            yield f"line {line}: the template has no partial {shown!r}: {hint}"


def with_renamed_keys(source: str, names: Mapping[str, str]) -> str:
    """Return the template with other names for keys of the view. Raises DefinitionError."""
    if "{{" not in source:
        return source
    try:
        return sandbox.ask("rename", json.dumps({"source": source, "names": dict(names)}))
    except (sandbox.ThrownError, sandbox.LimitError) as error:
        raise DefinitionError(_syntax(str(error), source)) from error


@lru_cache(maxsize=1000)  # a template is compiled and checked several times, and parsed once
def _analysed(source: str) -> str:
    """Return the analysis by handlebars' own parser, as JSON. Raises DefinitionError."""
    try:
        return sandbox.ask("analyse", json.dumps(source))
    except sandbox.ThrownError as error:
        raise DefinitionError(_syntax(str(error), source)) from error
    except sandbox.LimitError as error:
        raise DefinitionError(f"the template cannot be read: {error}") from error


def _syntax(message: str, source: str) -> str:
    """Describe a syntax error of handlebars in a line."""
    if malformed := _SYNTAX.match(message):
        if malformed["got"] == "EOF" and "OPEN_ENDBLOCK" in malformed["expected"]:
            return _not_closed(source)
        shown, hint = malformed["shown"], _hint(malformed)
        return f"line {malformed['line']}: the template is malformed at {shown[-60:]!r}; {hint}"
    if at_line := _AT_LINE.fullmatch(message):
        if names := _MISMATCH.fullmatch(at_line[1]):
            opened, closed = names.groups()
            if opened == "else":
                return f"line {at_line[2]}: write {{{{else}}}} without #"
            return (
                f"line {at_line[2]}: the block {opened[:60]} is closed by {{{{/{closed[:60]}}}}}: "
                f"write {{{{/{opened[:60]}}}}}"
            )
        return f"line {at_line[2]}: {at_line[1]}"
    return f"the template is malformed: {message[:200]}"


def _not_closed(source: str) -> str:
    """Describe the last block that is open at the end of a template: handlebars knows its line."""
    try:
        sandbox.ask("analyse", json.dumps(source + _NO_NAME))
    except (sandbox.ThrownError, sandbox.LimitError) as error:
        found = _AT_LINE.fullmatch(str(error))
        if found and (names := _MISMATCH.fullmatch(found[1])):
            name = names[1][:60]
            return f"line {found[2]}: the block {name} is not closed: write {{{{/{name}}}}}"
    return "the template ends within a block: close it, as in {{/if}}"


def _hint(malformed: re.Match[str]) -> str:
    """Say what to do about a syntax error."""
    got, expected = malformed["got"] or "", malformed["expected"] or ""
    shown, column = malformed["shown"], len(malformed["before"])
    if not got:
        return "the comment or the raw block is not closed"
    for token, instead, hint in _TOKENS:
        if token == got and instead in expected:
            return hint
    if _UNFINISHED.fullmatch(shown, column):
        return "the tag is not closed: write }}"
    hints = (hint for wrong, hint in _HINTS if wrong.match(shown, column))
    return next(hints, f"{shown[column : column + 20]!r} is not expected here")


def _described(kind: str, name: str) -> str:
    match kind:
        case "helper":
            near = get_close_matches(name, USAGE, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(USAGE)}"
            if "." in name:
                hint = "a path takes no arguments; write other keys as in data.[first name]"
            elif name in ("elif", "elseif", "elsif"):
                hint = "write {{else if value}}"
            return f"the template calls the unknown helper {name[:60]!r}: {hint}"
        case "decorator":
            return f"{name[:60]!r} is not a decorator: there is {{{{#*inline}}}}"
        case "inline":
            return f"{name} is not a block: write {USAGE[name]}"
        case "block":
            return f"{name} is a block: write {USAGE[name]}"
        case "hidden":
            return f"{name[:60]!r} is a block parameter here, not a helper: give it another name"
    return f"{name} does not take these arguments: write {USAGE[name]}"


def _misused(helper: str, option: str, value: object) -> Iterator[str]:
    """Describe the error in a constant argument of a helper; the first one has no `option`."""
    check = _CONSTANTS.get((helper, option))
    try:
        if check is not None:
            check(value)
    except DefinitionError as error:
        yield f"{option}: {error}" if option == "decimals" else str(error)


def _text_for(option: str, check: Callable[[str], object]) -> Callable[[object], None]:
    """Return a check of an option that is a text; null stands for its default."""

    def checked(value: object) -> None:
        if value is not None and not isinstance(value, str):
            raise DefinitionError(f"{option} must be a text, not {json.dumps(value)}")
        if value is not None:
            check(value)

    return checked


def _check_decimals(value: object) -> None:
    if isinstance(value, bool) or value not in range(21):
        raise DefinitionError(f"must be a whole number from 0 to 20, not {json.dumps(value)}")


def _check_date(value: object) -> None:
    if not isinstance(value, str) or dates.parse(value, dates.zone("UTC")) is None:
        raise DefinitionError(f"{json.dumps(value)} is not a date, write an ISO 8601 text")


def _check_number(value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    if not _NUMBER.fullmatch(text.strip()):
        raise DefinitionError(f"{json.dumps(value)} is not a number")


_CONSTANTS: Mapping[tuple[str, str], Callable[[object], None]] = {
    ("date", ""): _check_date,
    ("date", "format"): _text_for("format", compile_format),
    ("date", "zone"): _text_for("zone", dates.zone),
    ("date", "locale"): _text_for("locale", check_locale),
    ("number", ""): _check_number,
    ("number", "decimals"): _check_decimals,
    ("number", "locale"): _text_for("locale", check_locale),
}
"""The checks of constant arguments, by helper and option."""


@lru_cache(maxsize=10_000)
def _answer(question: str) -> str | dict[str, str]:
    """Return a formatted date, or the reason why that is not possible."""
    text, pattern, zone, locale = json.loads(question)
    try:
        tz = dates.zone(zone)
        at = dates.parse(text, tz)
        if at is not None:
            return compile_format(pattern or DEFAULT, locale)(at.astimezone(tz))
    except (DefinitionError, OverflowError) as error:
        return {"error": str(error)}
    return {"error": f"the value is {text[:60]!r}, write an ISO 8601 text"}


def _json(view: Mapping[str, object]) -> str:
    return view.text if isinstance(view, View) else json.dumps(view)


def _written(question: list[str]) -> str:
    """Return JSON as JSON.stringify writes it."""
    return json.dumps(question, ensure_ascii=False, separators=(",", ":"))
