"""Remove the secrets of the settings from texts: lines of the log, and what servers answer."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from urllib.parse import urlsplit

from sequencerd.core.hiding import hiding
from sequencerd.errors import SettingsError
from sequencerd.settings import Settings
from sequencerd.storage import conninfo

MIN_SECRET_LENGTH = 4  # characters; masking shorter secrets would mask parts of most lines
MIN_LENGTH_IN_RESULTS = 8
"""The same for messages of results, whose addresses `bounce` reads."""

_BASIC = re.compile(r"\bBasic ([A-Za-z0-9+/]+)=*")


def make_redaction(settings: Settings, min_length: int = MIN_SECRET_LENGTH) -> Callable[[str], str]:
    """Return the function that replaces the secrets of the settings in a text."""
    hide = hiding(_parts(settings.secrets()), min_length)
    return lambda text: hide(_BASIC.sub(_without_login, text) if "Basic " in text else text)


def _without_login(found: re.Match[str]) -> str:
    """Return a header of Basic authentication without its credentials, user:password."""
    start = found[1][: len(found[1]) // 4 * 4]  # the text may be cut
    return "Basic ***" if b":" in base64.b64decode(start) else found[0]


def _parts(secrets: Iterable[str]) -> Iterator[str]:
    """Yield secrets, the words of headers, and the passwords of URLs."""
    for secret in secrets:
        parts = {secret, *secret.split(), *_passwords(secret)}
        yield from parts - {"Bearer", "Basic"}


def _passwords(url: str) -> Iterator[str]:
    with suppress(ValueError):
        if password := urlsplit(url).password:
            yield password
    with suppress(SettingsError):  # as written in the database's connection string
        if password := conninfo.parse(url).get("password"):
            yield password
