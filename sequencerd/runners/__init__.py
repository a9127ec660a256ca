"""Runners execute the steps of one type. The names exported here are for authors of runners.

A function needs `runner` to describe it, and `Refused`, `Answer` and `Failed` for its result; an
object implements `Runner`. Everything else in this package is private: `registry` makes the runners
of the settings. Imports the core, settings and errors; never storage.
"""

from sequencerd.core.faults import DefinitionError
from sequencerd.core.model import Action, Limits, RetryPolicy
from sequencerd.core.task import Answer, Failed, Result, Task
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
