"""Mail servers' URLs."""

from __future__ import annotations

import pytest

from sequencerd.runners.email.smtp_url import parse_url


@pytest.mark.parametrize(
    ("url", "port", "tls", "starttls"),
    [
        ("smtp://localhost", 25, False, False),
        ("smtp://[::1]", 25, False, False),
        ("smtp://localhost?starttls=always", 25, False, True),
        ("smtp://u:p@127.0.0.1", 587, False, None),
        ("smtp://mail.example.com", 25, False, None),
        ("smtp://mail.example.com:2525?starttls=never", 2525, False, False),
        ("smtp://u:p@mail.example.com", 587, False, True),
        ("smtp://u:p@mail.example.com?starttls=auto", 587, False, None),
        ("smtps://u:p@mail.example.com/", 465, True, False),
    ],
)
def test_ports_and_encryption(url: str, port: int, tls: bool, starttls: bool | None) -> None:
    server = parse_url(url)
    assert (server.port, server.tls, server.starttls) == (port, tls, starttls)
    assert (server.context is not None) == (tls or starttls is not False)


def test_user_and_password_are_percent_decoded() -> None:
    server = parse_url("smtp://ada%40example.com:p%2Fa%3As%23s@mail.example.com")
    assert (server.user, server.password) == ("ada@example.com", "p/a:s#s")


@pytest.mark.parametrize(
    "url",
    [
        "http://mail.example.com",
        "smtp://",
        "mail.example.com",
        "smtp://u:sec/ret@host",
        "smtp://u:sec#ret@host",
        "smtp://host:sec",
        "smtp://mail host",
        "smtp://mail..host",
        "smtp://host:0",
        "smtp://host?starttls=secret",
        "smtp://host?secret=1",
        "smtp://host?secret",
        "smtps://host?starttls=always",
        "smtp://host?starttls=always&cafile=/nowhere/there",
        "smtp://[sec]",
    ],
)
def test_a_url_that_cannot_work_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"SMTP URL|smtps://") as caught:
        parse_url(url)
    assert "sec/ret" not in str(caught.value)
    assert "sec#ret" not in str(caught.value)


def test_the_password_is_hidden_as_such_and_as_it_is_sent() -> None:
    server = parse_url("smtp://ada:hunter22@mail.example.com")
    said = "bad: AUTH PLAIN AGFkYQBodW50ZXIyMg== aHVudGVyMjI= hunter22"
    assert server.hide(said) == "bad: AUTH PLAIN *** *** ***"
    server = parse_url("smtp://ada:hunter22%2Fab@mail.example.com")
    assert server.hide("bad: hunter22%2fab, AUTH hunter22/...") == "bad: ***, AUTH ***..."
