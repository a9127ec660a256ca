"""JSON whose numbers keep all their digits, as in jsonb: a runner's answer is stored unchanged.

A number that a float represents is a float. Any other is a Decimal, which Python's encoder cannot
write.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

MAX_DEPTH = 200  # brackets within each other; Python's own limit depends on its version and caller
# also a text without an end, which would otherwise be read once for each of its quotation marks
_NESTING = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{}\]]', re.DOTALL)
_MARKED = re.compile(r'"\\u0000(-?[0-9.]+(?:[eE][+-]?[0-9]+)?)\\u0000"')


def loads(text: str, *, exact: bool = True) -> Any:
    """Parse JSON. Unless it is to be `exact`, all numbers with a fraction are floats. Raises
    ValueError and RecursionError.
    """
    check_depth(text)
    return json.loads(text, parse_float=_number if exact else None)


def check_depth(text: str) -> None:
    """Raise ValueError for JSON that is nested so deeply that what reads it would fail."""
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return
    depth = 0
    for found in _NESTING.finditer(text):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found[0], 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def dumps(value: object, *, ensure_ascii: bool = True) -> str:
    """Write JSON. Raises ValueError, also for NaN and infinity, TypeError and RecursionError."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False, default=_marked)
    return _MARKED.sub(r"\1", text) if "\\u0000" in text else text


def _number(text: str) -> float | Decimal:
    try:
        number, exact = float(text), Decimal(text)
    except InvalidOperation as error:
        raise ValueError(f"the exponent of {text:.30} is too large") from error
    return number if Decimal(repr(number)) == exact else exact


def _marked(value: object) -> str:
    """Write a Decimal as a text with NUL characters, which no text from PostgreSQL contains."""
    if not isinstance(value, Decimal):
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    if not value.is_finite():
        raise ValueError(f"{value} is not a JSON number")
    return f"\0{value}\0"
