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
            "runners": {"R": {"url": "http://r", "headers": {"X-Key": "a+b/c&d=longer-kéy"}}},
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
        # as PHP, Go, Java and templates of HTML write it
        (r'{"key": "a+b\/c\u0026d=longer-k\u00e9y"}', '{"key": "***"}'),
        (r'"{\"key\": \"a+b\\/c&d=longer-kéy\"}"', r'"{\"key\": \"***\"}"'),
        ("?key=a%2bb%2fc%26d%3dlonger-k%c3%a9y&to=1", "?key=***&to=1"),
        ("?key=a%252Bb%252Fc%2526d%253Dlonger-k%25C3%25A9y", "?key=***"),
        ("<p>to/&quot;ken</p> <p>a&#43;b&#x2F;c&amp;d=longer-kéy</p>", "<p>***</p> <p>***</p>"),
        ("535 AHgAYStiL2MmZD1sb25nZXIta8OpeQ== refused", "535 *** refused"),
        # cut
        ("no access with a+b/c&d=lon... (401)", "no access with ***... (401)"),
        ("no access with a%2Bb%2Fc%26d%3Dlo%6", "no access with ***"),
        ("a+b is no key, nor is 100%25 of a&b...", None),
    ],
)
def test_each_form_of_a_secret(text: str, shown: str | None) -> None:
    assert REDACT(text) == (shown or text)
