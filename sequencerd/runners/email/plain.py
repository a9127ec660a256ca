"""Makes the text part of a message that has HTML alone, for programs that show no HTML."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

LONGEST = 200_000  # characters of HTML, which take less than a second

_SAME = re.compile(r"\[([^\[\]\n]+)\]\((?:mailto:|tel:)?\1\)")
_GAP = re.compile(r"\n(?:[ \t]*\n){2,}")
_ENDS = re.compile(r"[ \t]+$", re.MULTILINE)


@cache
def _config() -> Any:
    # imported when it is needed, as most messages have a text
    from inscriptis.model.config import ParserConfig  # noqa: PLC0415

    return ParserConfig(display_links=True)


def plain_text(html: str) -> str | None:
    """Return HTML as plain text, with its links; None if that is empty, or would take long."""
    if len(html) > LONGEST:
        return None
    from inscriptis import get_text  # noqa: PLC0415 - as above

    try:
        text = get_text(html, _config())
    except (ValueError, RecursionError):
        return None
    text = _GAP.sub("\n\n", _ENDS.sub("", _SAME.sub(r"\1", text))).strip("\n")
    return text or None
