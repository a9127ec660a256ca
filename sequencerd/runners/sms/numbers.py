"""Phone numbers as users write them, and in the form in which messages are sent: E.164, such as
+4915112345678.

`sequencer.normalise_suppression` in the database normalises the entries of suppressions in the same
way; a test compares the two.
"""

from __future__ import annotations

import re

from sequencerd.runners.fields import RenderError, one_line

_NUMBER = re.compile(r"\+[1-9][0-9]{1,14}")
_ZEROS = "\u0660\u06f0\u0966\u09e6\u1040\uff10"
"""The zeros that Arabic, Persian, Hindi, Bengali, Burmese and Japanese keyboards write."""

_PLAIN = str.maketrans("＋（）．／", "+()./") | {
    ord(zero) + digit: str(digit) for zero in _ZEROS for digit in range(10)
}

SEPARATORS = (
    r"\s\u00a0\u00ad\u058a\u05be\u061c\u1680\u1806\u180e\u2000-\u2015\u2028-\u202f\u2043\u2044"
    r"\u205f-\u206f\u2212\u2215\u2e17\u2e1a\u2e3a\u2e3b\u3000\u301c\u3030\u30a0\u30fc\ufe31\ufe32"
    r"\ufe58\ufe63\ufeff\uff0d().\/-"
)
"""Blanks, dashes, slashes, dots and brackets, and invisible characters that are copied along with
numbers from web pages and address books.
"""

_CHANNEL = re.compile(r"([a-z][a-z0-9.+-]*):(.*)", re.DOTALL)
_WRITTEN = re.compile(rf"[+0-9{SEPARATORS}]+")
_AHEAD = re.compile(rf"^[{SEPARATORS}]+")
_SEPARATOR = re.compile(rf"[{SEPARATORS}]")
_TRUNK_ZERO = re.compile(
    # these keep the zero of the area code: Italy and neighbours, and three countries in Africa
    rf"^(\+(?!(?:39|378|379|225|241|242)[{SEPARATORS}])[1-9][0-9]{{0,2}})[{SEPARATORS}]*\([\s]*0[\s]*\)"
)


def normalise(text: str) -> str:
    """Return a number without separators between its digits; other addresses in lower case.

    The zero in +49 (0)151 is for domestic calls, and not part of the number. `tel:` is removed;
    whatsapp:+49 151 ... keeps its channel.
    """
    plain = text.strip().lower().translate(_PLAIN)
    channel = ""
    if matched := _CHANNEL.fullmatch(_AHEAD.sub("", plain)):
        channel, plain = f"{matched[1]}:".removeprefix("tel:"), matched[2]
    if not _WRITTEN.fullmatch(plain):
        return channel + plain
    return channel + _SEPARATOR.sub("", _TRUNK_ZERO.sub(r"\1", _AHEAD.sub("", plain)))


def read_number(text: str) -> str:
    """Return a recipient: a number in E.164 form, or an address of another channel such as
    whatsapp:+4915112345678. Raises RenderError.
    """
    number = normalise(text)
    if _NUMBER.fullmatch(number):
        return number
    channel, colon, rest = number.partition(":")
    if colon and rest and rest.isprintable() and " " not in rest and _CHANNEL.fullmatch(number):
        # other addresses, such as those of messenger:, may have capitals; a number has none
        return number if _NUMBER.fullmatch(rest) else f"{channel}:{text.strip().partition(':')[2]}"
    raise RenderError(
        f"to: {one_line(text, 40)!r} is not an international number such as +4915112345678"
    )
