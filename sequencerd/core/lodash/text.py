"""lodash's commands on texts. Whatever is given is converted to its text first."""

from __future__ import annotations

import math

from sequencerd.core.javascript import (
    MAX_DEPTH,
    MAX_SAFE_INTEGER,
    MAX_TEXT_LENGTH,
    SPACE,
    UNDEFINED,
    has_property,
    is_nil,
    is_number,
    is_object,
    property_of,
    to_integer,
    to_string,
    too_deep,
    type_error,
    units,
)
from sequencerd.core.lodash.paths import to_key, to_path
from sequencerd.core.lodash.table import Command, named, of_value

_JOINER = "\u200d"
_VARIANTS = "\ufe0e\ufe0f"
_APOSTROPHES = str.maketrans("", "", "'\u2019")
_NO_LETTERS = frozenset("\u00d7\u00f7\u180e" + SPACE + "".join(map(chr, range(0x2000, 0x2070))))


def base_to_string(value: object, depth: int = 0) -> str:
    """lodash's text of a value: as JavaScript's, but "-0", and "null" within arrays."""
    if isinstance(value, str):
        return value
    if is_number(value) and value == 0 and math.copysign(1, value) < 0:
        return "-0"
    if isinstance(value, list):
        if depth == MAX_DEPTH:
            raise too_deep()
        return ",".join([base_to_string(item, depth + 1) for item in value])
    return to_string(value)


def text_of(value: object) -> str:
    """_.toString: as base_to_string, and nothing for null and undefined."""
    return "" if is_nil(value) else base_to_string(value)


def starts_with(value: object, target: object) -> bool:
    """_.startsWith; a missing target reads as the text "undefined"."""
    return units(text_of(value)).startswith(units(base_to_string(target)))


def ends_with(value: object, target: object) -> bool:
    """_.endsWith; a missing target reads as the text "undefined"."""
    return units(text_of(value)).endswith(units(base_to_string(target)))


def symbols(text: str) -> list[str]:
    """The characters that lodash counts: a combining mark belongs to the one before it.

    So does what a zero width joiner joins, such as the parts of an emoji.
    """
    found: list[str] = []
    for character in text:
        if found and (_combines(character) or found[-1].endswith(_JOINER) or character == _JOINER):
            found[-1] += character
        else:
            found.append(character)
    return found


def _combines(character: str) -> bool:
    return (
        "\u0300" <= character <= "\u036f"
        or "\u20d0" <= character <= "\u20ff"
        or "\ufe20" <= character <= "\ufe2f"
        or character in _VARIANTS
        or "\U0001f3fb" <= character <= "\U0001f3ff"
    )


def has_words(value: object, _: object) -> bool:
    """_.camelCase and the other cases: true if the text has a word in it.

    Letters, digits and what is neither a space nor punctuation make words; combining marks and
    apostrophes are left out first.
    """
    return any(_is_letter(letter) for letter in text_of(value).translate(_APOSTROPHES))


def _is_letter(letter: str) -> bool:
    if letter < "\u00c0":
        return letter.isascii() and letter.isalnum()
    return letter not in _NO_LETTERS and not _is_mark(letter) and not "\ud800" <= letter <= "\udfff"


def _is_mark(letter: str) -> bool:
    return (
        "\u0300" <= letter <= "\u036f"
        or "\u20d0" <= letter <= "\u20ff"
        or "\ufe20" <= letter <= "\ufe2f"
    )


def without_marks(value: object, _: object) -> str:
    """_.deburr: without combining marks; letters with an accent stay, as a text they are true."""
    return "".join(letter for letter in text_of(value) if not _is_mark(letter))


def trim(value: object, characters: object) -> str:
    """_.trim: without JavaScript's white space, or the given characters, at both ends."""
    return _trimmed(value, characters, left=True, right=True)


def trim_start(value: object, characters: object) -> str:
    """_.trimStart: at the start."""
    return _trimmed(value, characters, left=True, right=False)


def trim_end(value: object, characters: object) -> str:
    """_.trimEnd: at the end."""
    return _trimmed(value, characters, left=False, right=True)


def _trimmed(value: object, characters: object, *, left: bool, right: bool) -> str:
    text = text_of(value)
    if not text:
        return text
    letters = symbols(text) if characters is not UNDEFINED else list(text)
    removed = set(SPACE if characters is UNDEFINED else symbols(base_to_string(characters)))
    start, end = 0, len(letters)
    while left and start < end and letters[start] in removed:
        start += 1
    while right and start < end and letters[end - 1] in removed:
        end -= 1
    return "".join(letters[start:end])


def repeat(value: object, times: object) -> str:
    """_.repeat: once where the number is missing. One repetition stands for all."""
    text, count = text_of(value), 1.0 if times is UNDEFINED else to_integer(times)
    if count < 1 or count > MAX_SAFE_INTEGER:
        return ""
    _check_length(len(units(text)) * count)
    return text


def pad(value: object, length: object) -> object:
    """_.pad, _.padStart, _.padEnd: true unless the text is empty and the length not above zero."""
    text, wanted = text_of(value), to_integer(length)
    if wanted <= MAX_SAFE_INTEGER:
        _check_length(wanted)
    return text or wanted > 0


def _check_length(length: float) -> None:
    if length > MAX_TEXT_LENGTH:
        raise type_error(f"a text of {length:.0f} characters is too long")


def truncate(value: object, options: object) -> str:
    """_.truncate: to `length` (30) with an `omission` ("...") at the end, or at a `separator`."""
    given = options if is_object(options) else {}
    length = to_integer(property_of(given, "length")) if has_property(given, "length") else 30
    omission = "..."
    if has_property(given, "omission"):
        omission = base_to_string(property_of(given, "omission"))
    text = text_of(value)
    letters = symbols(text)
    if length >= len(letters):
        return text
    end = int(length) - len(symbols(omission))
    if end < 1:
        return omission
    kept = "".join(letters[:end])
    separator = property_of(given, "separator")
    if separator is UNDEFINED:
        return kept + omission
    between = base_to_string(separator)
    if not text.startswith(between, len(kept)):
        index = kept.rfind(to_string(separator))
        kept = kept[:index] if index > -1 else kept
    return kept + omission


def texts(value: object, separator: object) -> object:
    """_.split, _.words: an array."""
    text_of(value)
    if not is_nil(separator):
        to_string(separator)
    return True


def to_path_(value: object, _: object) -> object:
    """_.toPath: an array of keys."""
    return [to_key(part) for part in value] if isinstance(value, list) else to_path(text_of(value))


COMMANDS: dict[str, Command] = {
    "deburr": without_marks,
    "endsWith": ends_with,
    "pad": pad,
    "padEnd": pad,
    "padStart": pad,
    "repeat": repeat,
    "split": texts,
    "startsWith": starts_with,
    "toPath": to_path_,
    "trim": trim,
    "trimEnd": trim_end,
    "trimStart": trim_start,
    "truncate": truncate,
    "words": texts,
    **named("camelCase kebabCase lowerCase snakeCase startCase upperCase", has_words),
    **named(
        """
        capitalize escape escapeRegExp lowerFirst replace toLower toString toUpper unescape
        upperFirst
        """,
        of_value(text_of),  # whose truth stays when letters are changed
    ),
}
