"""Links with which recipients unsubscribe: signed, so that they need no database and never end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

from itsdangerous import BadData, URLSafeSerializer

from sequencerd.core.javascript.templates import Template
from sequencerd.core.languages import DEFAULT_LOCALE, read_locale
from sequencerd.core.model import DefinitionError, Fault, View
from sequencerd.runners.fields import Translations
from sequencerd.runners.suppression_check import EVERYTHING

PATH = "/unsubscribe/"
NAME = "unsubscribe_url"
"""What templates read."""

MAX_TOKEN = 2000  # characters
MAX_LANGUAGE = 35


class Subscription(NamedTuple):
    """What a link ends: the messages about a topic to an address; `*` is all of them."""

    channel: str
    address: str
    topic: str = EVERYTHING
    language: str = ""  # of its recipient; empty if it is not known


class UnsubscribeLinks:
    """Makes links and reads them. The first key signs, all of them verify."""

    def __init__(self, url: str, keys: Iterable[str]) -> None:
        self._url = url.rstrip("/")
        self._tokens = URLSafeSerializer(
            [*keys][::-1],
            salt="sequencerd unsubscribe",
            signer_kwargs={"digest_method": sha256, "key_derivation": "hmac"},
        )

    def link(self, subscription: Subscription) -> str:
        """Return the URL of the page of a subscription."""
        return f"{self._url}{PATH}{self._tokens.dumps([*subscription])}"

    def read(self, token: str) -> Subscription | None:
        """Return what a token was made for; None if it was not made with one of the keys."""
        if len(token) > MAX_TOKEN:
            return None
        try:
            return Subscription(*self._tokens.loads(token))
        except (BadData, TypeError):
            return None

    def added(
        self,
        view: Mapping[str, Any],
        channel: str,
        addresses: Iterable[str],
        topic: str | None,
        templates: Iterable[Template | Translations | None],
    ) -> Mapping[str, Any]:
        """Return a view with the link for a message. If the message has several recipients, the
        link is for the subject, as it is not known who will follow it.
        """
        known = {*addresses}
        address = known.pop() if len(known) == 1 else str(view["subject"])
        path = next((one.locale for one in templates if isinstance(one, Translations)), None)
        language = read_locale(view, path or DEFAULT_LOCALE)
        subscription = Subscription(
            channel,
            address,
            topic or EVERYTHING,
            language if isinstance(language, str) and len(language) <= MAX_LANGUAGE else "",
        )
        values = {**view, NAME: self.link(subscription)}
        return View.of(values, view.data) if isinstance(view, View) else values


def check_reads(templates: Mapping[str, Template | Translations | None]) -> None:
    """Refuse templates that need a link where there can be none. Raises DefinitionError."""
    for name, template in templates.items():
        several = template.templates.values() if isinstance(template, Translations) else [template]
        if any(one is not None and NAME in one.surely_reads for one in several):
            message = f"{NAME} would be empty: set unsubscribe.url and unsubscribe.keys"
            raise DefinitionError([Fault((name,), message)])
