"""Write a definition as a YAML file that applies to the same definition."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import yaml
from pydantic import TypeAdapter

from sequencerd.core.config import in_order
from sequencerd.core.step_types import config_in_order, may_take_alt_next, step_type
from sequencerd.definitions.diff import SequenceDocument
from sequencerd.definitions.files import FileSequence

DEFAULTS: dict[str, Any] = {
    "description": None,
    "timezone": "UTC",
    "status": "active",
    "reentry": "after_end",
    "lookup": None,
    "recheck": 60,
    "window": None,
    "topic": None,
    "locale": None,
    "partials": {},
    "enroll": None,
    "brake": None,
}
# Values that YAML 1.2 reads as a number or a word, unlike the library's older YAML.
_PLAIN_IN_NEW_YAML = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|0o[0-7]+")


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and quotes texts that could be read as something
    else.
    """

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        """Indent lists, as is customary."""
        super().increase_indent(flow, indentless=False)

    def ignore_aliases(self, _data: Any) -> bool:
        """Write equal values in full, without aliases."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else '"' if _PLAIN_IN_NEW_YAML.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(document: SequenceDocument) -> str:
    """Return the document as a file would have it, without default values."""
    sequence: dict[str, Any] = {"name": document["name"]}
    for key, default in DEFAULTS.items():
        if document[key] != default:
            sequence[key] = document[key]
    if "recheck" in sequence:
        recheck = timedelta(seconds=float(sequence["recheck"]))
        sequence["recheck"] = TypeAdapter(timedelta).dump_python(recheck, mode="json")
    steps = document["steps"]
    sequence["steps"] = [_step(*pair) for pair in zip(steps, [*steps[1:], None], strict=True)]
    sequence = in_order(sequence, FileSequence)
    made = _dump(sequence, allow_unicode=True)
    if all(line.isprintable() for line in made.split("\n")):
        return made
    return _dump(sequence, allow_unicode=False)  # no character changes the direction of text


def _dump(value: Any, *, allow_unicode: bool, flow: bool = False) -> str:
    made: str = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=allow_unicode,
        width=10**6,
        default_flow_style=flow,
    )
    return made


def flow_scalar(value: str | float | None) -> str:
    """Return a value in a form that is valid anywhere in YAML, also within brackets."""
    return _dump([value], allow_unicode=True, flow=True).strip()[1:-1]


def quoted(text: str) -> str:
    """Return a text in double quotes, as one line."""
    made: str = yaml.dump(text, default_style='"', allow_unicode=True, width=10**6)
    return made.rstrip("\n")


def _step(step: SequenceDocument, following: SequenceDocument | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": step["name"], "type": step["type"]}
    if step["config"]:
        shown["config"] = config_in_order(step["type"], step["config"])
    # `check` warns if next is omitted before a goal, and altNext where a side effect may take it
    default = None if following is None else following["name"]
    if step["next"] != default or (following is not None and step_type(following["type"]).is_goal):
        shown["next"] = step["next"]
    if step["altNext"] is not None or may_take_alt_next(step["type"], step["config"]):
        shown["altNext"] = step["altNext"]
    if "seed" in step:
        shown["seed"] = step["seed"]
    return shown
