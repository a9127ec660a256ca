"""What runners share: rendering of templates, and texts for messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sequencerd.core.javascript.templates import Template, compile_template
from sequencerd.core.model import DefinitionError, EvaluationError, Fault

MAX_SHOWN = 300  # characters of what a server says

# What PostgreSQL's text or a terminal does not take: controls, and halves of characters.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\s]+")


class RenderError(ValueError):
    """A rendered value that cannot be sent. The message names the field."""


def compile_field(
    name: str, source: str, *, escape: bool = False, strict: bool = False
) -> Template:
    """Compile the template of a field. Raises DefinitionError, which names the field."""
    try:
        return compile_template(source, escape=escape, strict=strict)
    except DefinitionError as error:
        found = [Fault((name, *fault.path), fault.message) for fault in error.faults]
        raise DefinitionError(found) from error


def render(name: str, template: Template, view: Mapping[str, Any]) -> str:
    """Render a field's template. Raises RenderError, which names the field."""
    try:
        return template.render(view)
    except EvaluationError as error:
        raise RenderError(f"{name}: {error}") from error


def one_line(text: str, limit: int = MAX_SHOWN) -> str:
    """Return a text from elsewhere in one short, printable line, to be shown and stored."""
    text = _UNPRINTABLE.sub(" ", text[: limit * 4]).strip()
    return text if len(text) <= limit else f"{text[:limit]}..."
