"""Read YAML and JSON files as plain values, each with its line.

YAML is read with the core schema of YAML 1.2, of which JSON is a subset: dates, times of day, `yes`
and `no` are texts, `1e3` is a number. Anchors, aliases and merge keys work. Values that JSON or
PostgreSQL cannot represent are rejected, and so are files that would take long to read.
"""

from __future__ import annotations

import codecs
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from sequencerd.core.faults import KeyPath

MAX_SIZE = 1024 * 1024  # bytes
MAX_VALUES = 50_000  # values of a file, including those that aliases repeat
MAX_DEPTH = 50

_TAG = "tag:yaml.org,2002:"


class DocumentError(ValueError):
    """A file that cannot be read, with the line of the error."""

    def __init__(self, message: str, line: int = 1, column: int = 1) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a file: its value, and the line and column (from 1) of each key and item."""

    value: Any
    lines: dict[KeyPath, int] = field(repr=False)
    columns: dict[KeyPath, int] = field(repr=False)
    blocks: dict[KeyPath, int] = field(repr=False)  # the line before the text of each `|`
    folder: Path | None = None  # of the file, if it is one

    def line(self, keys: KeyPath, within: int = 0) -> int:
        """Return the line of a value, or of the nearest one that contains it; in a text of several
        lines, the line `within` it (from 1).
        """
        if within and keys in self.blocks:
            return self.blocks[keys] + within
        return self.lines[self._known(keys)]

    def column(self, keys: KeyPath, within: int = 0) -> int:
        """Return the column that belongs to the line of a value; 1 in a text of several lines."""
        return 1 if within and keys in self.blocks else self.columns[self._known(keys)]

    def _known(self, keys: KeyPath) -> KeyPath:
        while keys not in self.lines:
            keys = keys[:-1]
        return keys


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a file that are not empty. Raises DocumentError."""
    for document in parse(_read_text(path)):
        yield replace(document, folder=path.parent)


def parse(text: str) -> Iterator[Document]:
    """Yield the documents of a text that are not empty. Raises DocumentError."""
    try:
        loader = _Loader(text)
        while loader.check_node():
            if (document := loader.document()).value is not None:
                yield document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = ", ".join(part for part in (error.context, error.problem) if part)
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise DocumentError(words, *place) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        shown = f"{ord(text[error.position]):#04x}"
        raise DocumentError(f"the character {shown} is not allowed here", line) from error


def compose(text: str) -> yaml.Node | None:
    """Return the nodes of a text's first document, with their positions. `parse` must accept the
    text.
    """
    loader = _Loader(text)
    return loader.get_node() if loader.check_node() else None


_pipes: dict[tuple[int, int], bytes] = {}
"""What was read from pipes, such as /dev/stdin, by device and inode. A command may read a file more
than once, but a pipe is empty then.
"""


def _read_bytes(path: Path) -> bytes:
    status = path.stat()
    key = status.st_dev, status.st_ino
    if key in _pipes:
        return _pipes[key]
    with path.open("rb") as file:
        content = file.read(MAX_SIZE + 1)
    if stat.S_ISFIFO(status.st_mode):
        _pipes[key] = content
    return content


def _read_text(path: Path) -> str:
    try:
        content = _read_bytes(path)
    except IsADirectoryError:
        raise DocumentError(f"is a folder: name its files, such as {path}/*.yaml") from None
    except (OSError, ValueError) as error:
        raise DocumentError(f"cannot be read: {getattr(error, 'strerror', error)}") from error
    if len(content) > MAX_SIZE:
        raise DocumentError(f"has more than {MAX_SIZE} bytes: split it into several files")
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DocumentError("is not in UTF-8: save it in this encoding", line) from error
    # unlike YAML, JSON may be indented with tabs; texts in JSON contain none
    return text.replace("\t", " ") if path.suffix == ".json" else text


class _Loader(yaml.SafeLoader):
    """Converts YAML nodes to plain values, and records their lines."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0

    def document(self) -> Document:
        """Return the next document."""
        node = self.get_node()
        made = Document(None, {(): 1}, {(): 1}, {})
        if node is None:
            return made
        _note((), node.start_mark, made)
        return replace(made, value=self._plain(node, (), made))

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Limit the document: each level takes a few nested calls in Python, and each value takes
        time.
        """
        self._depth += 1
        self._count(self.peek_event().start_mark)  # type: ignore[no-untyped-call] # has no types
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _count(self, mark: yaml.Mark) -> None:
        self._values += 1
        if self._depth > MAX_DEPTH:
            raise _wrong(f"nested more than {MAX_DEPTH} levels deep", mark)
        if self._values > 2 * MAX_VALUES:  # counted when it is read and when an alias repeats it
            raise _wrong(f"more than {MAX_VALUES} values, with those that aliases repeat", mark)

    def _plain(self, node: yaml.Node, keys: KeyPath, made: Document) -> Any:
        self._depth += 1
        self._count(node.start_mark)
        match node:
            case yaml.MappingNode(tag=tag) if tag == f"{_TAG}map":
                value: Any = {}
                for key_node, value_node in self._items(node):
                    key = str(_scalar(key_node))
                    _note((*keys, key), key_node.start_mark, made)
                    value[key] = self._plain(value_node, (*keys, key), made)
            case yaml.SequenceNode(tag=tag) if tag == f"{_TAG}seq":
                value = []
                for number, item in enumerate(node.value):
                    _note((*keys, number), item.start_mark, made)
                    value.append(self._plain(item, (*keys, number), made))
            case yaml.ScalarNode():
                value = _scalar(node)
                if node.style == "|":
                    made.blocks[keys] = node.start_mark.line + 1
            case _:
                raise _wrong(_unknown(node), node.start_mark)
        self._depth -= 1
        return value

    def _items(self, node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
        """Return the keys of a mapping, which must be unique, and those that merge keys add."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                is_list = isinstance(value_node, yaml.SequenceNode)
                merged += value_node.value if is_list else [value_node]
                continue
            key = _scalar(key_node)
            if not isinstance(key, str):
                shown = f" {key_node.value}" if isinstance(key_node, yaml.ScalarNode) else ""
                raise _wrong(f"the key{shown} must be text, in quotes", key_node.start_mark)
            if key in own:
                raise _wrong(f"the key {key!r} is given twice", key_node.start_mark)
            own[key] = key_node, value_node
        for source in merged:
            if not isinstance(source, yaml.MappingNode):
                raise _wrong("<< needs a mapping, or a list of mappings", source.start_mark)
            self._depth += 1
            self._count(source.start_mark)
            for key_node, value_node in self._items(source):
                own.setdefault(str(_scalar(key_node)), (key_node, value_node))
            self._depth -= 1
        return list(own.values())


def _note(keys: KeyPath, mark: yaml.Mark, made: Document) -> None:
    """Record the position of a key or an item."""
    made.lines[keys], made.columns[keys] = mark.line + 1, mark.column + 1


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _scalar(node: yaml.Node) -> str | int | float | bool | None:
    if not isinstance(node, yaml.ScalarNode):
        return None
    text: str = node.value
    with suppress(ValueError):  # a tag that does not fit the text, or a number with 5000 digits
        match node.tag.removeprefix(_TAG):
            case "str" | "merge":
                return _text(text, node.start_mark)
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text, 0 if text[:2] in ("0o", "0x") else 10)
            case "float" if abs(number := float(text)) < float("inf"):
                return number
    raise _wrong(_unknown(node), node.start_mark)


def _text(text: str, mark: yaml.Mark) -> str:
    """Join surrogate pairs, as JSON escapes characters beyond U+FFFF; YAML does not."""
    try:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _wrong("the text has half of a surrogate pair, \\ud800 to \\udfff", mark) from None
    if "\0" in text:
        raise _wrong("the text has a character that PostgreSQL cannot hold, \\u0000", mark)
    return text


def _unknown(node: yaml.Node) -> str:
    shown = str(node.value)[:40] if isinstance(node, yaml.ScalarNode) else ""
    if node.tag.startswith(_TAG):
        return f"{shown!r} is not a JSON value ({node.tag.removeprefix(_TAG)}): put it in quotes"
    return f"the tag {node.tag!r} is not supported: leave it out"


def _wrong(message: str, mark: yaml.Mark) -> ConstructorError:
    return ConstructorError(None, None, message, mark)
