"""Runners execute the steps of one type. The names exported here are for authors of runners.

A function needs `runner` to describe it, and `Refused`, `Answer` and `Failed` for its result; an
object implements `Runner`. Everything else in this package is private. The registry of runners is
made in service/daemon.py.
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
