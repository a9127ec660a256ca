"""Conditions by lodash's commands: Boolean(_[command](value, compareTo)), JavaScript's way.

The commands are in `lodash`; every other name is rejected when the definition is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sequencerd.core.config import Faults
from sequencerd.core.javascript import UNDEFINED, is_truthy
from sequencerd.core.lodash import COMMANDS, LEFT_OUT
from sequencerd.core.lodash.paths import compile_get, first_key, get
from sequencerd.core.model import DefinitionError, EvaluationError, Fault

__all__ = [
    "COMMANDS",
    "UNDEFINED",
    "Operand",
    "Predicate",
    "compile_get",
    "compile_predicate",
    "first_key",
    "get",
    "known_command",
]


class Operand(BaseModel):
    """`{"type": "get", "value": path}` reads the enrollment, `{"type": "raw", ...}` is itself.

    A path is a text such as "data.items[0].name", a list of keys, or what else lodash takes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    type: Literal["get", "raw"]
    """get reads the enrollment at a path, raw is the value as it stands here."""
    value: object = None
    """The path, such as data.items[0].name, or the value."""

    def given(self) -> object:
        """The value; UNDEFINED where the definition has none."""
        return self.value if "value" in self.model_fields_set else UNDEFINED


@dataclass(frozen=True, slots=True)
class Predicate:
    """A condition, ready to be asked of a subject."""

    command: str
    function: Callable[[object, object], object]
    value: Callable[[object], object]
    compare_to: Callable[[object], object]

    def __call__(self, subject: object) -> bool:
        """The answer. Raises EvaluationError where the command can't work with the data."""
        return is_truthy(self.function(self.value(subject), self.compare_to(subject)))

    def operands(self, subject: object) -> tuple[object, object]:
        """What is compared, for whoever explains the answer."""
        return self.value(subject), self.compare_to(subject)


def compile_predicate(command: str, value: Operand, compare_to: Operand | None) -> Predicate:
    """Looks the command up and the paths through.

    Raises DefinitionError for an unknown command and for a path that no key can be made of.
    """
    function = COMMANDS[known_command(command)]
    faults = Faults()
    with faults.at("value"):
        read_value = _reader(value)
    with faults.at("compareTo"):
        read_other = _reader(compare_to)
    faults.check()
    return Predicate(command, function, read_value, read_other)


def known_command(command: str) -> str:
    """The command itself. Raises DefinitionError for one that is not known."""
    if command in COMMANDS:
        return command
    if reason := LEFT_OUT.get(command):
        raise DefinitionError(f"{command!r} is left out, since {reason}")
    near = get_close_matches(command, COMMANDS, n=1, cutoff=0)
    raise DefinitionError(f"{command!r} is not known; did you mean {near[0]!r}?")


def _reader(operand: Operand | None) -> Callable[[object], object]:
    given = UNDEFINED if operand is None else operand.given()
    if operand is None or operand.type == "raw":
        return lambda _: given
    try:
        return compile_get(given)
    except EvaluationError as error:
        raise DefinitionError([Fault(("value",), f"is no path: {error}")]) from error
