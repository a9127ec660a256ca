"""lodash's commands, one function each: COMMANDS[name](value, compareTo).

Only the truth of a result is used. Where it is always an array, an object or a function, which
are true, empty or not, the function checks what lodash would throw at and returns True. No
command changes what it is given. Raises EvaluationError where lodash throws.
"""

from __future__ import annotations

from collections.abc import Mapping

from sequencerd.core.lodash import array, collection, equality, lang, number, paths, text, util
from sequencerd.core.lodash import object as object_
from sequencerd.core.lodash.table import Command

COMMANDS: Mapping[str, Command] = {
    **array.COMMANDS,
    **collection.COMMANDS,
    **equality.COMMANDS,
    **lang.COMMANDS,
    **number.COMMANDS,
    **object_.COMMANDS,
    **paths.COMMANDS,
    **text.COMMANDS,
    **util.COMMANDS,
}
"""The commands that a definition may name."""

_NEEDS_FUNCTIONS = """
    after ary before bind curry curryRight debounce defer delay flip memoize negate once partial
    partialRight rearg rest spread tap throttle thru unary
"""

LEFT_OUT: Mapping[str, str] = {
    **dict.fromkeys(_NEEDS_FUNCTIONS.split(), "it needs a function, which a definition can't hold"),
    **dict.fromkeys(("random", "sample"), "its answer is random"),
    **dict.fromkeys(
        ("mixin", "noConflict", "runInContext"), "it changes lodash itself, not an answer"
    ),
    "template": "it runs a text as a program",
}
"""The commands of lodash that a definition may not name, with the reason."""
