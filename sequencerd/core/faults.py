"""What is wrong with a definition or an enrollment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

MAX_MESSAGE = 2000  # characters


KeyPath = tuple[str | int, ...]
"""The keys and indexes of a path to a value."""


class Fault(NamedTuple):
    """An error at one place of a definition, with advice."""

    path: KeyPath
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path))}: {self.message}" if self.path else self.message


class DefinitionError(ValueError):
    """A definition that cannot be executed: a sentence, or all errors that were found."""

    def __init__(self, wrong: str | Iterable[Fault]) -> None:
        self.faults = (Fault((), wrong),) if isinstance(wrong, str) else tuple(wrong)
        super().__init__("; ".join(map(str, self.faults)))


FAILURES = (
    "error",
    "outcome_unknown",
    "bad_data",
    "invalid_step",
    "unsatisfiable",
    "loop",
    "already_enrolled",
    "archived",
)
"""The codes of failures, as docs/failures.md explains them."""


class EvaluationError(Exception):
    """An enrollment that cannot continue. `failure` is the code for its row, the message the
    reason.
    """

    def __init__(self, failure: str, message: str) -> None:
        super().__init__(message)
        self.failure = failure


def printable(text: str) -> str:
    """Return text that PostgreSQL accepts and a terminal can show: no control characters, and
    limited in length.
    """
    text = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
