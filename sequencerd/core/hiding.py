"""Hide secrets in texts of others, in whatever notation they repeat them."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from html import unescape
from string import ascii_letters, digits

HIDDEN = "***"

MIN_PART = 8
"""Characters of a secret, or of its base64, that are recognised without the rest."""

_NOTATION = re.compile(
    r"""
    %(?:25)*(?P<percent>[0-9A-Fa-f]{2})             # of URLs, perhaps repeatedly
    | \\+u(?P<code>[0-9A-Fa-f]{4})                  # of JSON
    | \\+(?P<quoted>["'/])
    | (?P<backslash>\\)\\+
    | &(?:amp;)*(?P<entity>\#?[0-9A-Za-z]{2,6};)    # of HTML
    """,
    re.VERBOSE,
)
_UNFINISHED = re.compile(r"(?:%|\\|&)[#0-9A-Za-z]{0,6}\Z")
_LIKE_BASE64 = re.compile(r"[A-Za-z0-9+/=]{12}")
_BASE64 = frozenset(f"{ascii_letters}{digits}+/=")
_CUT = re.compile(r"\.\.\.|…|\Z")


def hiding(secrets: Iterable[str], min_length: int = 1) -> Callable[[str], str]:
    """Return the function that replaces secrets of at least so many characters in a text.

    It finds them as they are, escaped for URLs, JSON, Python and HTML, as part of a text in base64,
    and at the end of a text that was cut.
    """
    return _hiding(frozenset(secrets), min_length)


@lru_cache(maxsize=1000)
def _hiding(secrets: frozenset[str], min_length: int) -> Callable[[str], str]:
    plain_secrets = {plain for secret in secrets if len(plain := _read(secret)[0]) >= min_length}
    # letters beyond ASCII are several bytes in a URL
    utf8 = {plain.encode("utf-8", "replace").decode("latin-1") for plain in plain_secrets}
    as_text = (plain_secrets | utf8) - {""}
    in_base64 = {form for secret in secrets | plain_secrets for form in _base64(secret)}
    searched = _beginnings(as_text), _beginnings(in_base64)
    long_forms = [
        form for form in as_text | in_base64 if len(form) > MIN_PART and "://" not in form
    ]

    def hide(text: str) -> str:
        plain, ends = _read(text)
        for beginning in searched[0]:
            if beginning in plain:
                break
        else:
            if not _LIKE_BASE64.search(plain) or not any(one in plain for one in searched[1]):
                return text
        forms = as_text | in_base64
        found = {span for form in forms for span in _spans(plain, form)}
        found |= {span for form in long_forms for span in _cut_spans(plain, form)}
        found = {
            _whole(plain, *span) if plain[slice(*span)] in in_base64 else span for span in found
        }
        hidden, done = "", 0
        for start, end in sorted(found):
            if end > done:
                begin = ends[start - 1] if start else 0
                hidden += text[ends[done - 1] if done else 0 : begin]
                hidden += HIDDEN if start >= done or not done else ""
                done = end
        return hidden + text[ends[done - 1] if done else 0 :]

    return hide


def _beginnings(forms: Collection[str]) -> list[str]:
    """Return beginnings of forms: a text that contains a form contains one of these."""
    return [
        form[:MIN_PART]
        for form in forms
        if not any(other in form for other in forms if other != form)
    ]


def _read(text: str) -> tuple[str, list[int] | range]:
    """Return a text without the notations, and where each of its characters ends in the text."""
    if not ("%" in text or "\\" in text or "&" in text):
        return text, range(1, len(text) + 1)
    parts: list[str] = []
    ends: list[int] = []
    done = 0
    for found in _NOTATION.finditer(text):
        name = found.lastgroup or ""
        value = found[name]
        if name in ("percent", "code"):
            value = chr(int(value, 16))
        elif name == "entity":
            value = unescape(f"&{value}")
        if len(value) == 1:
            parts += (text[done : found.start()], value)
            ends += (*range(done + 1, found.start() + 1), found.end())
            done = found.end()
    parts.append(text[done:])
    ends += range(done + 1, len(text) + 1)
    return "".join(parts), ends


def _spans(text: str, form: str) -> Iterator[tuple[int, int]]:
    start = text.find(form)
    while start >= 0:
        yield start, start + len(form)
        start = text.find(form, start + len(form))


def _cut_spans(text: str, form: str) -> Iterator[tuple[int, int]]:
    """Yield where a text was cut within a form."""
    for cut in _CUT.finditer(text):
        end = cut.start()
        start = text.rfind(form[:MIN_PART], max(0, end - len(form)), end)
        if start >= 0 and form.startswith(_UNFINISHED.sub("", text[start:end])):
            yield start, end


def _whole(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the place of the whole base64 around a part of it."""
    while start and text[start - 1] in _BASE64:
        start -= 1
    while end < len(text) and text[end] in _BASE64:
        end += 1
    return start, end


def _base64(secret: str) -> Iterator[str]:
    """Yield the characters of base64 that belong to a secret alone, after 0, 1 or 2 other bytes."""
    raw = secret.encode("utf-8", "replace")
    for before in range(3):
        whole = b64encode(b"\0" * before + raw).decode()
        form = whole[(8 * before + 5) // 6 : 8 * (before + len(raw)) // 6]
        if len(form) >= MIN_PART:
            yield form
