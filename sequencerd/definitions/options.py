"""Parse values that users enter on the command line and in the console."""

from __future__ import annotations

import re
from typing import Any

from sequencerd.core import exact_json
from sequencerd.core.calendar import dates
from sequencerd.core.faults import DefinitionError
from sequencerd.errors import ArgumentError

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def read_object(text: str, name: str, *, exact: bool = False) -> dict[str, Any]:
    """Read a JSON object that the database can store, such as the data of an enrollment; `exact`
    keeps all digits of numbers. Raises ArgumentError.
    """
    try:
        value = exact_json.loads(text, exact=exact)
        # not NaN and infinity
        written = exact_json.dumps(exact_json.loads(text), ensure_ascii=False)
        written.encode()  # not half of a pair of surrogates
        if _NUL.search(written):
            raise ValueError("the database cannot store \\u0000")
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArgumentError(f'{name} must be a JSON object such as {{"email": "ada@example.com"}}')
    return value


def read_zone(name: str) -> str:
    """Check the name of a time zone. Raises ArgumentError."""
    try:
        dates.zone(name)
    except DefinitionError as error:
        raise ArgumentError(f"timezone: {error}") from error
    return name
