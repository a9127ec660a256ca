"""The words of the system as data. Start here, then read advance.py."""

from __future__ import annotations


class DefinitionError(ValueError):
    """A definition that cannot work. The message says what is wrong and what to write instead."""


class EvaluationError(Exception):
    """An enrollment that cannot go on. `failure` is the code that its row gets, the message why."""

    def __init__(self, failure: str, message: str) -> None:
        super().__init__(message)
        self.failure = failure
