"""Addresses made from templates: a value fills a name or an address, and never adds another
address.

Separators of mailboxes are read from the template itself: before it is compiled, its commas, angle
brackets and quotation marks are replaced by markers that no value can contain. So `{{data.name}}
<{{data.email}}>` is one mailbox, whatever the name is, and the comma in a block such as `{{#each
data.team}}{{email}}, {{/each}}` separates addresses as it should.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sequencerd.core.faults import DefinitionError, Fault
from sequencerd.core.javascript.templates import Template
from sequencerd.runners.email.mime import (
    MAX_HEADER,
    Mailbox,
    check_header,
    make_mailbox,
    parse_mailbox,
    parse_mailboxes,
)
from sequencerd.runners.fields import RenderError, compile_field, one_line, render

_SECRET = secrets.token_hex(8)
_COMMA, _OPEN, _CLOSE = (f"\ue000{_SECRET}{n}\ue001" for n in range(3))
"""Authors of data cannot know these markers, and no template reads anything in them as a tag."""

_TAG = re.compile(
    r"\\?\{\{!--.*?--~?\}\}"
    r"|\\?\{\{\{(?:\"[^\"]*\"|'[^']*'|[^\"'}]|\}(?!\}\}))*\}\}\}"
    r"|\\?\{\{(?:\"[^\"]*\"|'[^']*'|[^\"'}]|\}(?!\}))*\}\}",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class AddressField:
    """The addresses of a field: the mailboxes of its literal parts, and the templates of its other
    parts.
    """

    name: str
    parts: tuple[tuple[Mailbox, ...] | Template, ...]
    many: bool

    @property
    def count(self) -> int | None:
        """Return the number of addresses, if it is the same for every enrollment."""
        literal = [part for part in self.parts if isinstance(part, tuple)]
        return sum(map(len, literal)) if len(literal) == len(self.parts) else None

    def render(self, view: Mapping[str, Any]) -> list[Mailbox]:
        """Return the mailboxes for an enrollment. Raises RenderError, which names the field."""
        found: list[Mailbox] = []
        for part in self.parts:
            if isinstance(part, tuple):
                found += part
            else:
                for text in render(self.name, part, view).split(_COMMA):
                    found += self._mailboxes(text)
        return found

    def _mailboxes(self, text: str) -> list[Mailbox]:
        name, is_named, rest = text.rpartition(_OPEN)
        if is_named:
            address, closed, behind = rest.partition(_CLOSE)
            if not closed or behind.strip() or _OPEN in name or _CLOSE in name:
                raise RenderError(f"{self.name}: {_shown(text)!r} is not an address")
            address = address.strip()
            name = check_header(self.name, one_line(name, MAX_HEADER))
            return [make_mailbox(self.name, name, address)] if address else []
        if not text.strip():
            return []
        if self.many:
            return parse_mailboxes(self.name, text)
        return [parse_mailbox(self.name, text)]


def compile_addresses(
    name: str,
    field: str | Iterable[str] | None,
    *,
    many: bool = False,
    strict: bool = False,
) -> AddressField:
    """Compile the addresses of a field, a text or a list. Raises DefinitionError, which names the
    field.

    With `many`, a value may contain several addresses; with `strict`, a missing value is an error.
    """
    sources = [] if field is None else [field] if isinstance(field, str) else list(field)
    return AddressField(name, tuple(_compile(name, source, strict) for source in sources), many)


def _compile(name: str, source: str, strict: bool) -> tuple[Mailbox, ...] | Template:
    template = compile_field(name, source)  # report errors for the template as it was written
    if not template.is_literal:
        return compile_field(name, _marked(source), strict=strict)
    try:
        return tuple(parse_mailboxes(name, source))
    except RenderError as error:
        message = str(error).removeprefix(f"{name}: ")
        raise DefinitionError([Fault((name,), message)]) from error


def _marked(source: str) -> str:
    """Return the template with markers in place of its own separators, and without its quotation
    marks.
    """
    written = []
    position = 0
    is_quoted = False
    for tag in (*_TAG.finditer(source), None):
        text = source[position : tag.start() if tag else None]
        marked, is_quoted = _mark(text, is_quoted)
        written.append(marked)
        if tag:
            written.append(tag[0])
            position = tag.end()
    return "".join(written)


def _mark(text: str, is_quoted: bool) -> tuple[str, bool]:
    marks = {",": _COMMA, "<": _OPEN, ">": _CLOSE}
    written = []
    characters = iter(text)
    for character in characters:
        if character == "\\" and is_quoted:
            written.append(next(characters, ""))
        elif character == '"':
            is_quoted = not is_quoted
        else:
            written.append(character if is_quoted else marks.get(character, character))
    return "".join(written), is_quoted


def _shown(text: str) -> str:
    for mark, character in ((_COMMA, ","), (_OPEN, "<"), (_CLOSE, ">")):
        text = text.replace(mark, character)
    return one_line(text, 100)
