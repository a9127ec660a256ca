"""Secrets of the settings in texts of servers."""

from __future__ import annotations

import pytest

from sequencerd.service.redaction import make_redaction
from sequencerd.settings import Settings

REDACT = make_redaction(
    Settings.model_validate(
        {
            "database": {"url": "host=db1 dbname=app password='s3 cret'"},
            "sms": {"account_sid": "AC1", "auth_token": 'to/"ken'},
        }
    )
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('not to/"ken', "not ***"),
        ('{"token": "to/\\"ken"}', '{"token": "***"}'),
        ("?token=to%2F%22ken&to=1", "?token=***&to=1"),
        ("Authorization: Basic QUMxOnRvLyJrZW4=, once", "Authorization: Basic ***, once"),
        ("Basic QUMxOnRvLyJrZ…", "Basic ***…"),  # cut
        ("no login with s3 cret", "no login with ***"),
        ("use Basic authentication or Basic ABCDE=== logins", None),
    ],
)
def test_each_form_of_a_secret(text: str, shown: str | None) -> None:
    assert REDACT(text) == (shown or text)
