"""Make the text part of a message that has only HTML, for programs that do not show HTML."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

MAX_HTML_LENGTH = 200_000  # characters of HTML, which take less than a second

_SAME = re.compile(r"\[([^\[\]\n]+)\]\((?:mailto:|tel:)?\1\)")
_IMAGE_IN_LINK = re.compile(r"\[\[([^\[\]\n]+)\]\]\(")
_NAMELESS = re.compile(r"\[\s*\]\((\S+?)\)")
_GAP = re.compile(r"\n(?:[ \t]*\n){2,}")
_ENDS = re.compile(r"(?<![ \t])[ \t]+$", re.MULTILINE)


@cache
def _config() -> Any:
    # imported only when needed, because most messages have a text
    from inscriptis.model.config import ParserConfig  # noqa: PLC0415

    return ParserConfig(display_links=True, display_images=True)


def plain_text(html: str) -> str | None:
    """Return HTML as plain text, with its links, and the alternative texts of images; None if it is
    empty or would take too long.
    """
    if len(html) > MAX_HTML_LENGTH:
        return None
    from inscriptis import get_text  # noqa: PLC0415 - as above

    try:
        text = get_text(html, _config())
    except (ValueError, RecursionError):
        return None
    text = _NAMELESS.sub(r"<\1>", _IMAGE_IN_LINK.sub(r"[\1](", text))
    text = _GAP.sub("\n\n", _ENDS.sub("", _SAME.sub(r"\1", text))).strip("\n")
    return text or None
