"""Runners execute the steps of one type. What this package exports is for authors of runners.

A function needs `runner` to describe it, and `Refused`, `Answer` and `Failed` for its outcome; an
object of its own implements `Runner`. Everything else in this package is private. daemon.py makes
the registry of runners.
"""

from sequencerd.core.model import (
    Action,
    Answer,
    DefinitionError,
    Failed,
    Limits,
    Result,
    RetryPolicy,
    Task,
)
from sequencerd.runners.protocol import Refused, Runner
from sequencerd.runners.python import runner

__all__ = [
    "Action",
    "Answer",
    "DefinitionError",
    "Failed",
    "Limits",
    "Refused",
    "Result",
    "RetryPolicy",
    "Runner",
    "Task",
    "runner",
]
