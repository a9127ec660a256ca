"""Process a form that is sent twice, for example by a double click, only once."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.responses import RedirectResponse, Response

FIELD = "once"
"""The form field that distinguishes two forms with the same contents."""

MAX_KEPT_FORMS = 1000  # forms that were sent


class SentForms:
    """The results of the forms that were sent."""

    def __init__(self) -> None:
        self._sent: dict[str, asyncio.Task[Response]] = {}

    async def process(
        self, user: str, form: Mapping[str, str], work: Coroutine[Any, Any, Response]
    ) -> Response:
        """Do the work of a form. If it is in progress or done, redirect to the same page instead.
        Work that did not end with a redirect, because it found an error, is done again.
        """
        key = hashlib.sha256(json.dumps([user, sorted(form.items())]).encode()).hexdigest()
        if known := self._sent.get(key):
            answer = await asyncio.shield(known)
            if answer.status_code == 303:
                work.close()
                return RedirectResponse(answer.headers["location"], 303)
        task = self._sent[key] = asyncio.create_task(work)
        for old in list(self._sent)[:-MAX_KEPT_FORMS]:
            if self._sent[old].done():
                del self._sent[old]
        try:
            # a browser that sends it again has broken off the first request
            answer = await asyncio.shield(task)
        except Exception:
            self._sent.pop(key, None)
            raise
        if answer.status_code != 303:
            self._sent.pop(key, None)
        return answer
