"""What the modules of commands share: the type of a command, and tables of names."""

from __future__ import annotations

from collections.abc import Callable

Command = Callable[[object, object], object]
"""lodash's function, asked with the two operands of a condition."""


def named(names: str, command: Command) -> dict[str, Command]:
    """A table in which one command has several names."""
    return dict.fromkeys(names.split(), command)


def of_value(function: Callable[[object], object]) -> Command:
    """A command that does not look at the second operand."""
    return lambda value, _: function(value)


def gives_true(_value: object, _other: object) -> bool:
    """For results that are arrays, objects or functions whatever is given: they are true."""
    return True
