"""Render templates for runners, and clean texts for messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sequencerd.core.config import Faults
from sequencerd.core.faults import DefinitionError, EvaluationError, Fault
from sequencerd.core.javascript.templates import NO_PARTIALS, Template, compile_template
from sequencerd.core.languages import DEFAULT_LOCALE, choose, read_locale
from sequencerd.core.model import NOTHING_SHARED, MessageContext

MAX_SHOWN = 300  # characters of a server's text

# Characters that PostgreSQL's text or a terminal rejects: controls and lone surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\s]+")


class RenderError(ValueError):
    """A rendered value that cannot be sent. The message names the field."""


def compile_field(
    name: str,
    source: str,
    *,
    escape: bool = False,
    strict: bool = False,
    partials: Mapping[str, str] = NO_PARTIALS,
) -> Template:
    """Compile the template of a field. Raises DefinitionError, which names the field."""
    try:
        return compile_template(source, escape=escape, strict=strict, partials=partials)
    except DefinitionError as error:
        found = [Fault((name, *fault.path), fault.message) for fault in error.faults]
        raise DefinitionError(found) from error


@dataclass(frozen=True, slots=True)
class Translations:
    """A template for each language, and the path of the subject's language."""

    templates: Mapping[str, Template]
    locale: str


def compile_texts(
    name: str,
    source: str | Mapping[str, str],
    shared: MessageContext = NOTHING_SHARED,
    *,
    escape: bool = False,
    strict: bool = False,
) -> Template | Translations:
    """Compile a text of a message, or one for each language. Raises DefinitionError, which names
    the field.
    """
    partials = dict(shared.partials)
    if isinstance(source, str):
        return compile_field(name, source, escape=escape, strict=strict, partials=partials)
    faults = Faults()
    templates = {}
    for language, text in source.items():
        with faults.at(name):
            templates[language] = compile_field(
                language, text, escape=escape, strict=strict, partials=partials
            )
    faults.check()
    return Translations(templates, shared.locale or DEFAULT_LOCALE)


def marked_as_test(text: str | Mapping[str, str]) -> str | dict[str, str]:
    """Return a text, in each of its languages, that begins with a mark."""
    if isinstance(text, str):
        return f"[Test] {text}"
    return {language: f"[Test] {one}" for language, one in text.items()}


def chosen(
    name: str, template: Template | Translations, view: Mapping[str, Any]
) -> tuple[str, Template]:
    """Return the template in the language of the subject, and its name."""
    if isinstance(template, Template):
        return name, template
    language, one = choose(template.templates, read_locale(view, template.locale))
    return f"{name}.{language}", one


def render(name: str, template: Template | Translations, view: Mapping[str, Any]) -> str:
    """Render a field's template, in the language of the subject. Raises RenderError, which names
    the field.
    """
    name, template = chosen(name, template, view)
    try:
        return template.render(view)
    except EvaluationError as error:
        raise RenderError(f"{name}: {error}") from error


def one_line(text: str, limit: int = MAX_SHOWN) -> str:
    """Return a text of unknown origin as one short, printable line, to be shown and stored."""
    text = _UNPRINTABLE.sub(" ", text[: limit * 4]).strip()
    return text if len(text) <= limit else f"{text[:limit]}..."


def text_of(error: BaseException) -> str:
    """Return the text of an exception of a plug-in, whose own method may fail."""
    try:
        return str(error)
    except Exception as other:
        return f"(no text: {type(other).__name__})"
