"""Change single values of a YAML text in place; comments, order and layout are kept."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import NamedTuple

import yaml

from sequencerd.core.faults import KeyPath
from sequencerd.definitions import yaml_reader
from sequencerd.definitions.yaml_writer import flow_scalar, quoted

ScalarValue = str | int | float | None

_HEADER = re.compile(r"[|>][-+0-9]*")


class EditError(ValueError):
    """A value that cannot be changed without changing others."""


def set_values(text: str, values: Mapping[KeyPath, ScalarValue]) -> str:
    """Replace scalar values that exist in the text of one document, and return the text.

    Raises EditError, and DocumentError if the text is not YAML.
    """
    documents = list(yaml_reader.parse(text))
    root = yaml_reader.compose(text)
    if len(documents) != 1 or root is None:
        raise EditError("there must be one sequence in the text")
    wanted = copy.deepcopy(documents[0].value)
    edits = []
    for path, value in values.items():
        edits.append(_edit(text, _find(root, path), value))
        holder = wanted
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
    for start, end, written in sorted(edits, reverse=True):
        text = text[:start] + written + text[end:]
    try:
        made = [document.value for document in yaml_reader.parse(text)]
    except yaml_reader.DocumentError:
        made = []
    # for example because an alias repeats the value elsewhere
    if json.dumps(made) != json.dumps([wanted]):
        raise EditError("a value is written in a way that only the editor can change")
    return text


class _ValuePlace(NamedTuple):
    """The position of a value in the text."""

    node: yaml.ScalarNode
    column: int  # the key's position
    is_flow: bool  # within brackets


def _find(root: yaml.Node, path: KeyPath) -> _ValuePlace:
    name = ".".join(map(str, path))
    node, column, is_flow = root, 0, False
    for key in path:
        is_flow = is_flow or bool(getattr(node, "flow_style", False))
        if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        found = [pair for pair in pairs if pair[0].value == key]
        if not found:
            raise EditError(f"{name} is not written there")
        column, node = found[0][0].start_mark.column, found[0][1]
    if not isinstance(node, yaml.ScalarNode):
        raise EditError(f"{name} is not a single value")
    return _ValuePlace(node, column, is_flow)


def _edit(text: str, place: _ValuePlace, value: ScalarValue) -> tuple[int, int, str]:
    """Return the part of the text to replace, and its replacement."""
    node = place.node
    start, end = node.start_mark.index, node.end_mark.index
    is_block = node.style in ("|", ">")
    if is_block:  # up to the end of its last line: blank lines after it are kept
        end = start + len(text[start:end].rstrip("\n"))
    former = text[start:end]
    if not isinstance(value, str):
        return start, end, flow_scalar(value)
    is_last = not text[end:].partition("\n")[0].strip()  # in the line
    if "\n" in value and is_last and not place.is_flow and _fits_a_block(value):
        indentation = _indentation(former) if is_block else place.column + 2
        comment = _HEADER.sub("", former.partition("\n")[0], count=1) if is_block else ""
        return start, end, _block(value, indentation, comment)
    if node.style == '"' or not value.isprintable():
        return start, end, quoted(value)
    if node.style == "'":
        return start, end, "'" + value.replace("'", "''") + "'"
    return start, end, flow_scalar(value)


def _fits_a_block(value: str) -> bool:
    """Return whether a block can contain a text unchanged: its characters, its first line and its
    end.
    """
    lines = value.split("\n")
    return (
        all(line.isprintable() for line in lines)
        and lines[0] != ""
        and not lines[0].startswith(" ")
        and not value.endswith("\n\n")
    )


def _indentation(block: str) -> int:
    lines = [line for line in block.split("\n")[1:] if line.strip()]
    return len(lines[0]) - len(lines[0].lstrip(" ")) if lines else 2


def _block(value: str, indentation: int, comment: str) -> str:
    """Format a text of several lines as a block, without the end of its last line."""
    header = "|" if value.endswith("\n") else "|-"
    lines = value.removesuffix("\n").split("\n")
    return "\n".join([header + comment, *(line and " " * indentation + line for line in lines)])
