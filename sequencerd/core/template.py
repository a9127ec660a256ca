"""Message templates: handlebars, compiled once, rendered within bounds.

dotpromptz-handlebars reads the blocks and the words of a template. The tags are split before it
(template_tags.py), and what they mean is rendered after it (template_render.py): so whitespace
stays as handlebars leaves it, values print as JavaScript prints them, and the work is counted,
which keeps a template from stalling the daemon.

A template reaches plain JSON data only: keys of objects, indexes of arrays, characters of texts,
and `length` of the latter two. No Python attribute, file or environment can be named.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dotpromptz_handlebars import Block, Mustache, Node, PartialBlock, TagToken, Text

# The package makes blocks from tags that are split already in this function only.
from dotpromptz_handlebars._render import _parse as parse_blocks

from sequencerd.core.javascript import is_truthy, number_text
from sequencerd.core.model import DefinitionError, EvaluationError
from sequencerd.core.template_helpers import HELPERS, check_option
from sequencerd.core.template_render import (
    Frame,
    Rendering,
    Scope,
    Value,
    Write,
    call_helper,
    constant,
    context_path,
    data_path,
    each_block,
    if_block,
    param_path,
    section,
    sequence,
    with_block,
    write_text,
    write_value,
)
from sequencerd.core.template_tags import Part, split

MAX_SOURCE = 256 * 1024  # characters
MAX_TAGS = 5_000
MAX_DEPTH = 100  # blocks within blocks; an {{else}} or {{else if}} counts as one
MAX_PATH = 1_000  # characters
MAX_PARAMS = 10  # names in {{#each list as |item index|}}
MAX_NESTED_CALLS = 20  # (calls (within (calls)))


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled template.

    `is_literal` tells that it has no tags and renders as its source; `reads` is what `paths`
    answers, and `surely_reads` those of them that are read from the context for certain.
    """

    source: str
    is_literal: bool
    reads: frozenset[str]
    surely_reads: frozenset[str]
    program: Write = field(repr=False, compare=False)

    def render(self, context: Mapping[str, object]) -> str:
        """The text for this context, which is plain JSON data.

        Raises EvaluationError ("bad_data") when a helper can't use its value, a value can't be
        printed, or the work exceeds its bound.
        """
        if self.is_literal:
            return self.source
        # Handlebars takes any value as its context; a mapping is read as a plain object.
        root = dict(context) if isinstance(context, Mapping) else context
        run = Rendering(root)
        self.program(Scope(run, root, None, Frame({"root": root}), {}))
        return "".join(run.out)


def compile_template(source: str, *, escape: bool) -> Template:
    """Reads a template; `escape` is for HTML: {{x}} escapes it, {{{x}}} and {{&x}} do not.

    Raises DefinitionError for a malformed or oversized template, and for a helper that does not
    exist or is given arguments that it doesn't take.
    """
    if len(source) > MAX_SOURCE:
        raise DefinitionError(
            f"the template has {len(source)} characters: write at most {MAX_SOURCE}"
        )
    if "{{" not in source:
        none = frozenset[str]()
        return Template(source, True, none, none, sequence([]))
    if source.count("{{") > MAX_TAGS:
        raise DefinitionError(
            f"the template has {source.count('{{')} tags: write at most {MAX_TAGS}"
        )
    compiler = _Compiler(escape)
    program = compiler.program(_parse(split(source)), _Place((), at_root=True, surely=True))
    reads, surely_reads = frozenset(compiler.reads), frozenset(compiler.surely_reads)
    return Template(source, False, reads, surely_reads, program)


def paths(source: str) -> frozenset[str]:
    """The paths that a template may read, with dots: {"data.email", "external.plan"}.

    Never too few: a path within {{#each}} is listed as if it were read from the context itself,
    and "this" stands for a template that reads the whole context. Raises DefinitionError.
    """
    return compile_template(source, escape=False).reads


# Reading a tag

_SEGMENT = re.compile(
    r"(?P<lead>\.\.|\.(?=[./]|$))"
    r"|\[(?P<bracketed>(?:\\\]|[^\]])*+)\]"
    r"|(?P<name>[^\s!\"#%-,./;->@\[-^`{-~]+)"
)
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_LITERALS = {"true": True, "false": False, "null": None, "undefined": None}
_BLOCKS = ("if", "unless", "with", "each")


@dataclass(frozen=True, slots=True)
class _Path:
    parts: tuple[str, ...]
    up: int = 0  # how many `../`
    data: bool = False  # starts with @
    scoped: bool = False  # starts with `.`, `..` or `this`

    @property
    def name(self) -> str | None:
        """The single plain name, which may be a helper's."""
        return None if len(self.parts) != 1 or self.scoped or self.data else self.parts[0]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tag stands, as far as the compiler knows."""

    params: tuple[str, ...]  # block parameters in sight
    at_root: bool  # the current value may be the context itself
    surely: bool  # it is the context itself


@dataclass(frozen=True, slots=True)
class _Call:
    """A tag's words: {{head args options as |params|}}."""

    head: _Path
    args: list[str]
    options: dict[str, str]
    params: tuple[str, ...]


def _is_literal(token: str) -> bool:
    return token in _LITERALS or _NUMBER.fullmatch(token) is not None


def _literal_value(token: str) -> object:
    if token in _LITERALS:
        return _LITERALS[token]
    return float(token) if "." in token or len(token) > 15 else int(token)


def _read_path(token: str) -> _Path:
    """A path: names, [any text] and leading `..`, `.` or `this`, separated by `.` or `/`.

    A last segment that reads as a literal is an error, as in handlebars: `list.0` and `a.true`
    (but `list.[0]` and `list.0.name` are paths).
    """
    if len(token) > MAX_PATH:
        raise DefinitionError(f"a path in the template is longer than {MAX_PATH} characters")
    data = token.startswith("@")
    position, up, scoped = int(data), 0, False
    parts: list[str] = []
    while True:
        found = _SEGMENT.match(token, position)
        if found is None or _is_literal(token[position:]):
            raise _bad_path(token)
        if found["bracketed"] is not None:
            parts.append(found["bracketed"].replace("\\]", "]"))
        elif found["name"] not in (None, "this"):
            parts.append(found["name"])
        elif parts:
            raise _bad_path(token)
        else:
            scoped = True
            up += found[0] == ".."
        position = found.end()
        if position == len(token):
            return _Path(tuple(parts), up, data, scoped)
        if token[position] not in "./":
            raise _bad_path(token)
        position += 1


def _parse(parts: list[Part]) -> list[Node]:
    try:
        return parse_blocks(parts, max_depth=MAX_DEPTH)
    except Exception as error:  # the package reports some malformed tags by IndexError
        raise DefinitionError(f"the template is malformed: {str(error)[:200]}") from error


def _bad_path(token: str) -> DefinitionError:
    return DefinitionError(
        f"{token[:60]!r} in the template is not a path: write a.b, a.[b c], ../a or list.[0]"
    )


def _read_call(call: Mapping[str, object]) -> _Call:
    name, args, options, params = call["name"], call["args"], call["hash"], call["params"]
    assert isinstance(name, str)
    assert isinstance(args, list)
    assert isinstance(options, dict)
    assert isinstance(params, list)
    if len(params) > MAX_PARAMS:
        raise DefinitionError(f"a block has {len(params)} parameters: write at most {MAX_PARAMS}")
    for param in params:
        if _read_path(param).name is None:
            raise DefinitionError(f"{param[:60]!r} is not a name for a block parameter")
    if call["literal"]:
        head = _Path((name,))
    elif _NUMBER.fullmatch(name):
        head = _Path((number_text(float(name)),))  # {{1}} reads the key "1"
    else:
        head = _Path((name,)) if name in _LITERALS else _read_path(name)
    return _Call(head, args, options, tuple(params))


# Compiling


class _Compiler:
    """Turns the package's nodes into functions that write them; notes the paths on the way."""

    def __init__(self, escape: bool) -> None:
        self.escape = escape
        self.reads: set[str] = set()
        self.surely_reads: set[str] = set()

    def program(self, nodes: Iterable[Node], place: _Place) -> Write:
        return sequence([self.node(node, place) for node in nodes])

    def node(self, node: Node, place: _Place) -> Write:
        match node:
            case Text(copied):
                return write_text(copied)
            case Mustache(call, raw):
                value = self.mustache(_read_call(call), place)
                return write_value(value, escape=self.escape and not raw)
            case Block(call, body, inverse):
                return self.block(_read_call(call), body, inverse, place)
            case PartialBlock(_, body, None, {}):
                return self.program(body, place)  # there are no partials, this is the fallback
            case _:
                raise DefinitionError(
                    "the template has a partial, or a second {{else}} in one block: "
                    "write a partial's text in place, and one {{else}} per block"
                )

    def mustache(self, call: _Call, place: _Place) -> Value:
        """{{x}}: a path, or a helper when it is given arguments."""
        name = call.head.name
        if name in place.params:
            return self.path(call.head, place)
        if name in (*_BLOCKS, "blockHelperMissing", "helperMissing"):
            raise DefinitionError(f"{name} is a block: write {{{{#{name} ...}}}}...{{{{/{name}}}}}")
        if call.args or call.options or name in ("lookup", "log"):
            return self.helper(call, place, 0)
        return self.path(call.head, place)

    def block(self, call: _Call, body: list[Node], inverse: list[Node], place: _Place) -> Write:
        """{{#x}}...{{else}}...{{/x}}: a built-in block, a section, or a helper's value."""
        name = None if call.head.name in place.params else call.head.name
        inner = _Place(
            (*place.params, *call.params),
            at_root=place.at_root and name not in ("with", "each"),
            surely=place.surely and name in ("if", "unless"),
        )
        then, otherwise = self.program(body, inner), self.program(inverse, place)
        if name in _BLOCKS:
            if len(call.args) != 1:
                raise DefinitionError(f"#{name} takes exactly one argument, not {len(call.args)}")
            value = self.value(call.args[0], place, 0)
            if name == "with":
                return with_block(value, then, otherwise, call.params)
            if name == "each":
                return each_block(value, then, otherwise, call.params)
            include_zero = self.value(call.options.get("includeZero", "false"), place, 0)
            if name == "if":
                return if_block(value, include_zero, then, otherwise)
            return if_block(value, include_zero, otherwise, then)
        if name is not None and (call.args or call.options or name in ("lookup", "log")):
            if name in ("date", "default", "json"):
                raise DefinitionError(f"{name} is not a block: write {HELPERS[name].usage}")
            return write_value(self.helper(call, place, 0), escape=False)
        return section(self.path(call.head, place), then, otherwise, call.params)

    def value(self, token: str, place: _Place, depth: int) -> Value:
        """An argument: a text, number or other literal, a (call), or a path."""
        if token.startswith("("):
            return self.nested_call(token, place, depth + 1)
        if token[0] in "\"'":
            return constant(_unquote(token))
        if _is_literal(token):
            return constant(_literal_value(token))
        return self.path(_read_path(token), place)

    def nested_call(self, token: str, place: _Place, depth: int) -> Value:
        """(helper args options) as an argument."""
        if depth > MAX_NESTED_CALLS:
            raise DefinitionError(f"calls are nested more than {MAX_NESTED_CALLS} deep")
        match _parse([TagToken(token[1:-1].strip())]):
            case [Mustache(call, False)]:
                return self.helper(_read_call(call), place, depth)
            case _:
                raise DefinitionError(f"{token[:60]!r} in the template is not (helper arguments)")

    def helper(self, call: _Call, place: _Place, depth: int) -> Value:
        """A call of a helper, or of a name that is none."""
        name = call.head.name
        helper = HELPERS.get(name or "")
        if name is None or helper is None:
            return self.unknown_helper(call, place)
        unknown = set() if helper.options is None else set(call.options) - helper.options
        if unknown or not helper.least <= len(call.args) <= helper.most:
            raise DefinitionError(
                f"{name} does not take these arguments in the template: write {helper.usage}"
            )
        for key, token in call.options.items():
            if token[0] in "\"'":
                check_option(name, key, _unquote(token))
        args = [self.value(token, place, depth) for token in call.args]
        options = {key: self.value(token, place, depth) for key, token in call.options.items()}
        label = call.args[0] if call.args else name
        return call_helper(helper, args, options, label, html=self.escape)

    def unknown_helper(self, call: _Call, place: _Place) -> Value:
        """With arguments an error at once; with options or none only if the name has a value."""
        name = ".".join(call.head.parts)[:60]
        if call.args:
            known = difflib.get_close_matches(name, [*HELPERS, *_BLOCKS], n=1)
            hint = f"did you mean {known[0]}?" if known else f"there are {', '.join(HELPERS)}"
            raise DefinitionError(f"the template calls the unknown helper {name!r}: {hint}")
        value = self.path(call.head, place)

        def read(scope: Scope) -> None:
            if is_truthy(value(scope)):
                raise EvaluationError("bad_data", f"{name} is a value, not a helper")

        return read

    def path(self, path: _Path, place: _Place) -> Value:
        parts = path.parts if any(path.parts[:1]) else ()  # {{[]}} is the current value
        if parts and parts[0] in place.params and not path.up and not path.scoped:
            return param_path(parts[0], parts[1:])
        if path.data:
            if parts[:1] == ("root",):
                self.reads.add(".".join(parts[1:]) or "this")
                self.surely_reads.add(".".join(parts[1:]) or "this")
            return data_path(path.up, parts)
        if parts or path.up or place.at_root:
            self.reads.add(".".join(parts) or "this")
        if parts and place.surely and not path.up:
            self.surely_reads.add(".".join(parts))
        return context_path(path.up, parts)


def _unquote(token: str) -> str:
    return token[1:-1].replace("\\" + token[0], token[0])
