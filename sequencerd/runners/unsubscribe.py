"""Links with which recipients unsubscribe: signed, so they need no database and do not expire."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

from itsdangerous import BadData, URLSafeSerializer

from sequencerd.core.faults import DefinitionError, Fault
from sequencerd.core.javascript.templates import NO_PARTIALS, Template, surely_read
from sequencerd.core.languages import read_locale
from sequencerd.core.view import View
from sequencerd.runners.email.mime import with_ascii_host
from sequencerd.runners.fields import Translations
from sequencerd.runners.suppression_check import EVERYTHING

PATH = "/unsubscribe/"
NAME = "unsubscribe_url"
"""The name that templates read."""

MAX_TOKEN = 2000  # characters
_TOKEN = re.compile(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]")
MAX_LANGUAGE = 35


class Subscription(NamedTuple):
    """What a link ends: messages about a topic to an address; `*` is all topics."""

    channel: str
    address: str
    topic: str = EVERYTHING
    language: str = ""  # the recipient's language; empty if unknown


class UnsubscribeLinks:
    """Makes links and reads them. The first key signs; all keys verify."""

    def __init__(self, url: str, keys: Iterable[str]) -> None:
        self._url = with_ascii_host(url).rstrip("/")
        self._tokens = URLSafeSerializer(
            [*keys][::-1],
            salt="sequencerd unsubscribe",
            signer_kwargs={"digest_method": sha256, "key_derivation": "hmac"},
        )

    def link(self, subscription: Subscription) -> str:
        """Return the URL of the page for a subscription."""
        return f"{self._url}{PATH}{self._tokens.dumps([*subscription])}"

    def read(self, token: str) -> Subscription | None:
        """Return the subscription in a token, without what may follow it in a text; None if no key
        verifies it.
        """
        found = _TOKEN.match(token)
        if found is None or len(found[0]) > MAX_TOKEN:
            return None
        try:
            return Subscription(*self._tokens.loads(found[0]))
        except (BadData, TypeError):
            return None

    def added(
        self,
        view: Mapping[str, Any],
        channel: str,
        addresses: Iterable[str],
        topic: str | None,
        locale: str,
    ) -> Mapping[str, Any]:
        """Return a view with the link of a message. If the message has several recipients, the link
        is for the subject, because it is unknown which recipient will follow it. `locale` is the
        path of the subject's language.
        """
        known = {*addresses}
        address = known.pop() if len(known) == 1 else str(view["subject"])
        language = read_locale(view, locale)
        subscription = Subscription(
            channel,
            address,
            topic or EVERYTHING,
            language if isinstance(language, str) and len(language) <= MAX_LANGUAGE else "",
        )
        values = {**view, NAME: self.link(subscription)}
        return View.of(values, view.data) if isinstance(view, View) else values


def check_reads(
    templates: Mapping[str, Template | Translations],
    partials: Mapping[str, str] = NO_PARTIALS,
) -> None:
    """Reject templates that need a link where there is none, also in one of the partials that they
    use. Raises DefinitionError.
    """
    for name, template in templates.items():
        several = template.templates.values() if isinstance(template, Translations) else [template]
        if any(NAME in surely_read(one.source, partials) for one in several):
            message = f"{NAME} would be empty: set unsubscribe.url and unsubscribe.keys"
            raise DefinitionError([Fault((name,), message)])
