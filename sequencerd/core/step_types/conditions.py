"""The condition in the config of a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from sequencerd.core.config import Config
from sequencerd.core.javascript.conditions import (
    COMMANDS,
    Operand,
    Predicate,
    compile_predicate,
    known_command,
)
from sequencerd.core.model import Context


class ConditionConfig(Config):
    """A condition, Boolean(_[lodashCommand](value, compareTo))."""

    lodash_command: Annotated[str, AfterValidator(known_command)] = Field(
        json_schema_extra={"enum": [*sorted(COMMANDS)]}
    )
    """lodash's command, such as eq, gte, isEqual, includes."""
    value: Operand
    """The first operand."""
    compare_to: Operand | None = None
    """The second operand, of those commands that have one."""

    def predicate(self) -> Predicate:
        """Compile the condition."""
        return compile_predicate(self.lodash_command, self.value, self.compare_to)


def read_condition(config: Mapping[str, Any]) -> ConditionConfig:
    """Read the condition in a mapping, whatever its other keys. Raises ValidationError."""
    keys = ("lodashCommand", "value", "compareTo")
    return ConditionConfig.model_validate({key: config[key] for key in keys if key in config})


def compile_condition(config: ConditionConfig) -> Callable[[Context], bool]:
    """Compile a condition to a function of the evaluation context. Raises DefinitionError."""
    predicate = config.predicate()
    return lambda context: predicate(context.json(predicate.roots))


def describe_wait(config: Mapping[str, Any]) -> str:
    """Describe a wait for a condition; empty for what is none."""
    match config:
        case {"lodashCommand": command, "value": value}:
            operands = [value, *([config["compareTo"]] if "compareTo" in config else [])]
            return f"waits until {command}({', '.join(map(_describe_operand, operands))}) is true"
    return ""


def _describe_operand(operand: object) -> str:
    match operand:
        case {"type": "get", "value": path}:
            return str(path)
        case {"value": value}:
            return json.dumps(value, ensure_ascii=False)
    return "?"
