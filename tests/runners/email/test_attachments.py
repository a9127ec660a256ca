"""Attachments, from data and from real HTTP servers."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from email.message import EmailMessage
from typing import Any

import pytest

from sequencerd.core.faults import DefinitionError
from sequencerd.core.task import Answer, Result, Suppressed
from sequencerd.runners.email import attachments
from sequencerd.runners.email.attachments import (
    AttachmentError,
    Attachments,
    file_name,
    parse_source,
)
from sequencerd.runners.email.runner import EmailRunner
from sequencerd.runners.suppression_check import SuppressionKey, Suppressions
from tests.helpers import servers
from tests.helpers.runners import email_runner, failed
from tests.helpers.servers import HOST, HttpServer, Mailbox, Request, http_server, smtp_server, task

MAIL = {"from": "a@example.com", "to": "{{data.to}}", "subject": "Hello", "text": "Dear"}
PDF = b"%PDF-1.4 \x00\xff" * 1000


@asynccontextmanager
async def sending(
    respond: servers.Respond, **options: Any
) -> AsyncIterator[tuple[Mailbox, HttpServer, EmailRunner]]:
    """A mail server, a server of files, and a runner that may fetch from it."""
    async with smtp_server() as mail, http_server(respond) as files:
        options = {"attachments_from": [files.url], **options}
        runner = email_runner(f"smtp://{HOST}:{mail.port}", **options)
        try:
            yield mail, files, runner
        finally:
            await runner.close()


async def send(
    runner: EmailRunner,
    *attached: dict[str, Any],
    config: dict[str, Any] | None = None,
    **data: Any,
) -> Result:
    program = runner.compile({**MAIL, **(config or {}), "attachments": list(attached)})
    (result,) = await runner.run(program, [task(to="ada@example.com", **data)])
    return result


def parts(message: EmailMessage) -> list[str]:
    """The types of all parts, in order."""
    return [part.get_content_type() for part in message.walk()]


async def pdf(_: Request) -> servers.Answer:
    return servers.Answer(200, PDF, {"Content-Type": "text/plain; charset=x"})


async def test_files_by_url_and_from_data() -> None:
    async with sending(pdf) as (mail, files, runner):
        result = await send(
            runner,
            {"url": "{{data.url}}", "filename": "Rechnung {{data.number}} für Ada.pdf"},
            {"url": f"{files.url}/terms%20of%20use.pdf?token=x"},
            {"url": f"{files.url}/raw"},
            {"base64": "{{data.csv}}", "filename": "a.csv"},
            {"base64": "aGk=", "contentType": "image/png"},
            {"url": "{{data.nothing}}"},
            {"base64": "{{data.nothing}}"},
            url=f"{files.url}/invoice",
            number=7,
            csv=base64.encodebytes(b"a;b\n" * 50).decode(),
        )
        assert isinstance(result, Answer), result
        message = mail.parsed()
        assert [request.method for request in files.requests] == ["GET"] * 3
        assert "authorization" not in files.requests[0].headers
    assert parts(message) == [
        "multipart/mixed",
        "text/plain",
        "application/pdf",
        "application/pdf",
        "text/plain",
        "text/csv",
        "image/png",
    ]
    found = list(message.iter_attachments())
    assert [part.get_filename() for part in found] == [
        "Rechnung 7 für Ada.pdf",
        "terms of use.pdf",
        "raw",
        "a.csv",
        "attachment.png",
    ]
    assert found[0].get_payload(decode=True) == PDF
    assert found[3].get_payload(decode=True) == b"a;b\n" * 50
    assert found[0].get_content_disposition() == "attachment"
    assert max(map(len, mail.messages[0].content.split(b"\r\n"))) <= 998


@pytest.mark.parametrize(
    ("written", "given", "name", "expected"),
    [
        ("text/calendar; method=REQUEST", "", "a.ics", "text/calendar; method=REQUEST"),
        ('Text/Calendar;method="REQUEST" ; x=y', "", "a", 'text/calendar; method="REQUEST"; x=y'),
        ("", "text/csv; charset=iso-8859-1", "a", "text/csv; charset=iso-8859-1"),
        (
            "",
            "Text/CSV; header=present;charset=iso-8859-1",
            "a.csv",
            "text/csv; charset=iso-8859-1",
        ),
        ("", "text/plain; charset=iso-8859-1", "a.csv", "text/csv"),
        ("", "application/pdf; name=secret.pdf", "a.pdf", "application/pdf"),
        ("text/plain; charset=utf-8\r\nBcc: e@x.org", "", "a.txt", "text/plain"),
        ("text/plain; a=b" * 99, "", "a.txt", "text/plain"),
        ("multipart/mixed; boundary=b", "", "a.txt", "text/plain"),
        ("text/plain; charset=ü", "", "a.txt", "text/plain"),
    ],
)
async def test_types_with_parameters(written: str, given: str, name: str, expected: str) -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(200, b"a;b", {"Content-Type": given} if given else {})

    async with sending(respond) as (mail, files, runner):
        attached = {"url": files.url, "filename": name, "contentType": "{{data.type}}"}
        assert isinstance(await send(runner, attached, type=written), Answer)
        content = mail.messages[0].content
    assert (
        f"\r\nContent-Type: {expected}\r\nContent-Transfer-Encoding: base64\r\n".encode() in content
    )


async def test_images_in_html() -> None:
    async with sending(pdf) as (mail, files, runner):
        html = {"html": "<img src='cid:logo'><img src='cid:b.png'>"}
        attached = (
            {"url": f"{files.url}/logo.png", "contentId": "logo"},
            {"base64": "aGk=", "filename": "b.png", "inline": True},
            {"url": f"{files.url}/terms.pdf"},
        )
        assert isinstance(await send(runner, *attached, config=html), Answer)
        assert isinstance(await send(runner, attached[0]), Answer)
        message, without_html = mail.parsed(0), mail.parsed(1)
        wrong = await send(runner, {"base64": "aGk=", "filename": "a b.png", "inline": True})
        assert "contentId: 'a b.png' cannot be one" in failed(wrong).message
    assert parts(message) == [
        "multipart/mixed",
        "multipart/alternative",
        "text/plain",
        "multipart/related",
        "text/html",
        "image/png",
        "image/png",
        "application/pdf",
    ]
    images = [part for part in message.walk() if part["Content-ID"]]
    assert [part["Content-ID"] for part in images] == ["<logo>", "<b.png>"]
    assert images[0].get_content_disposition() == "inline"
    assert parts(without_html) == ["multipart/mixed", "text/plain", "image/png"]


@pytest.mark.parametrize(
    ("status", "permanent", "wait"),
    [
        (202, False, None),  # it is being made
        (204, False, None),
        (206, False, None),
        (404, True, None),
        (410, True, None),
        (400, True, None),
        (403, False, None),
        (429, False, 7),
        (500, False, None),
        (503, False, 7),
        (302, False, None),
    ],
)
async def test_a_missing_file_fails_by_its_status(
    status: int, permanent: bool, wait: int | None
) -> None:
    async def respond(_: Request) -> servers.Answer:
        headers = {"Retry-After": "7"} if wait else {"Location": "/again"}
        return servers.Answer(status, b"secret", headers)

    async with sending(respond) as (mail, files, runner):
        result = failed(await send(runner, {"url": f"{files.url}/x?token=secret"}))
        assert not mail.connections
    assert result.permanent is permanent
    assert result.fault == "enrollment"  # the mail server is well, and its other messages go on
    assert not result.asked
    assert result.retry_after == (None if wait is None else timedelta(seconds=wait))
    assert result.message.startswith(f"attachments.0: {HOST} ")
    assert "secret" not in result.message


async def test_a_server_that_is_down_or_hangs_is_passing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sending(pdf) as (_, files, runner):
        url = files.url
    async with smtp_server() as mail:
        runner = email_runner(f"smtp://{HOST}:{mail.port}", attachments_from=[url])
        result = failed(await send(runner, {"url": url}))
        await runner.close()
    assert not result.permanent
    assert "attachments.0: 127.0.0.1:" in result.message

    async def hang(_: Request) -> servers.Answer:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(attachments, "FETCH_TIMEOUT", 0.05)
    async with sending(hang) as (_, files, runner):
        result = failed(await send(runner, {"url": files.url}))
    assert not result.permanent
    assert "not complete within" in result.message


async def test_redirects_are_followed_where_they_are_allowed() -> None:
    async def respond(request: Request) -> servers.Answer:
        targets = {"/near": "/file.pdf", "/far": f"http://localhost:{files.port}/file.pdf"}
        if request.target in targets:
            return servers.Answer(302, b"", {"Location": targets[request.target]})
        return servers.Answer(200, PDF)

    async with sending(respond) as (mail, files, runner):
        assert isinstance(await send(runner, {"url": f"{files.url}/near"}), Answer)
        (part,) = mail.parsed().iter_attachments()
        assert part.get_filename() == "near"
        result = failed(await send(runner, {"url": f"{files.url}/far"}))
        assert result.permanent
        assert "http://localhost is not allowed by email.attachments_from" in result.message
        assert len(files.requests) == 3


@pytest.mark.parametrize(
    "host",
    [
        "a..files.example.com",
        f"{'a' * 64}.files.example.com",
        ".files.example.com",
        "a b.files.example.com",
        "a%00.files.example.com",
        "xn--.files.example.com",
        "a.files.example.com:99999",
    ],
)
async def test_a_host_in_data_that_cannot_exist_is_the_enrollments_fault(host: str) -> None:
    async with sending(servers.all_next, attachments_from=["*.files.example.com"]) as (
        mail,
        _,
        made,
    ):
        result = failed(await send(made, {"url": "https://{{data.host}}/a.pdf"}, host=host))
    assert (result.permanent, result.failure) == (True, "bad_data")
    assert mail.messages == []


@pytest.mark.parametrize("location", ["", "http://[::1", "https://files.example.com:port/"])
async def test_a_redirect_that_leads_nowhere_is_not_repeated(location: str) -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(302, b"", {"Location": location})

    async with sending(respond) as (_, files, runner):
        result = failed(await send(runner, {"url": files.url}))
        assert (result.permanent, result.message) == (False, "attachments.0: 127.0.0.1 answers 302")
        assert len(files.requests) == 1


async def test_too_large_or_invalid_attachments_fail_permanently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attachments, "MAX_BYTES", 15_000)
    async with sending(pdf) as (mail, files, runner):
        large = failed(await send(runner, {"url": files.url}, {"url": files.url}))
        assert large.permanent
        assert "attachments.1: the attachments have more than" in large.message
        large = failed(await send(runner, {"base64": base64.b64encode(b"x" * 16_000).decode()}))
        assert large.permanent
        broken = failed(await send(runner, {"base64": "a{{data.to}}"}))
        assert (broken.permanent, broken.failure) == (True, "bad_data")
        assert broken.message == "attachments.0.base64: is not base64"
        assert not mail.messages


async def test_suppressed_messages_fetch_no_attachments() -> None:
    async def ask(keys: list[SuppressionKey]) -> set[SuppressionKey]:
        return {key for key in keys if key[1] == "ada@example.com"}

    async with sending(pdf, suppressions=Suppressions(ask)) as (_, files, runner):
        result = await send(runner, {"url": files.url})
        assert isinstance(result, Suppressed)
        assert not files.requests
    async with sending(pdf, only_to=[]) as (_, files, runner):
        assert isinstance(await send(runner, {"url": files.url}), Suppressed)
        assert not files.requests


async def test_a_file_is_fetched_once_in_an_attempt_and_few_at_a_time() -> None:
    now = most = 0

    async def respond(_: Request) -> servers.Answer:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return servers.Answer(200, PDF)

    async def ask(keys: list[SuppressionKey]) -> set[SuppressionKey]:
        return {key for key in keys if key[1] == "cc@example.com"}

    async with sending(respond, suppressions=Suppressions(ask)) as (mail, files, runner):
        config = {**MAIL, "cc": "cc@example.com", "attachments": [{"url": files.url}]}
        program = runner.compile(config)
        tasks = [task(n, to=f"a{n}@example.com") for n in range(12)]
        results = await runner.run(program, tasks)
        assert all(isinstance(result, Answer) for result in results)
        assert len(files.requests) == len(mail.messages) == 12
    assert most <= attachments.MAX_FETCHES


@pytest.mark.parametrize(
    "url",
    [
        "https://files.example.com/x",
        "HTTPS://FILES.example.com:443/x",
        "https://a.cdn.example.com/pub/x",
        "http://localhost:8000/x",
        "https://[2001:db8::1]/x",
    ],
)
def test_urls_that_match_a_pattern_are_allowed(url: str) -> None:
    sources = ["files.example.com", "https://*.cdn.example.com/pub/*", "http://localhost:8000"]
    made = Attachments([*sources, "https://[2001:db8::1]"])
    assert made._allowed("a", url)


@pytest.mark.parametrize(
    "url",
    [
        "http://files.example.com/x",
        "https://files.example.com:8443/x",
        "https://files.example.com./x",
        "https://files.example.com@evil.com/",
        "https://user:password@files.example.com/",
        "https://files.example.com\\@evil.com/",
        "https://files.example.com%40evil.com/",
        "https://evil.com/#files.example.com",
        "https://evil.com/?https://a.cdn.example.com/pub/x",
        "https://a.cdn.example.com.evil.com/pub/x",
        "https://cdn.example.com/pub/x",
        "https://a.cdn.example.com/other",
        "https://a.cdn.example.com/pub/../other",
        "https://a.cdn.example.com/pub/%2e%2e/other",
        "http://127.0.0.1:8000/x",
        "http://localhost/x",
        "http://2130706433:8000/",
        "//files.example.com/x",
        "files.example.com/x",
        "file:///etc/passwd",
        "https://files.example.com/\x00",
        "https://[",
        "x",
    ],
)
def test_all_other_urls_are_refused(url: str) -> None:
    made = Attachments(
        ["files.example.com", "https://*.cdn.example.com/pub/*", "http://localhost:8000"]
    )
    with pytest.raises(AttachmentError) as refused:
        made._allowed("attachments.0", url)
    assert refused.value.failed.permanent
    assert "password" not in str(refused.value)


PRIVATE = ["localhost", HOST, "[::ffff:127.0.0.1]", "127.0.1"]


@pytest.mark.parametrize("host", PRIVATE)
@pytest.mark.parametrize("is_redirected", [False, True])
async def test_a_host_that_only_matches_a_wildcard_must_be_public(
    host: str, is_redirected: bool
) -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(302 if is_redirected else 200, PDF, {"Location": private})

    async with sending(respond) as (mail, files, _):
        private = f"http://{host}:{files.port}/x"
        named = f"http://127.1:{files.port}"
        allowed = [f"http://*:{files.port}", named]
        made = email_runner(f"smtp://{HOST}:{mail.port}", attachments_from=allowed)
        result = failed(await send(made, {"url": named if is_redirected else private}))
        await made.close()
        assert len(files.requests) == is_redirected
    assert not mail.connections
    assert result.permanent
    assert result.message.startswith("attachments.0: ")
    assert "has the private address" in result.message
    assert "name this host in the settings" in result.message


@pytest.mark.parametrize(
    "pattern", ["", "ftp://x", "https://", "a b", "u@x.org", "x:99999", "x/ y"]
)
def test_a_pattern_that_cannot_be_read(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a host"):
        parse_source(pattern)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("invoice.pdf", "invoice.pdf"),
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\a.pdf", "a.pdf"),
        ("a\r\nX-Evil: 1\x00.pdf", "a X-Evil_ 1.pdf"),
        ("a\u202efdp.exe", "afdp.exe"),
        ('"a" <b>|?*.pdf', "_a_ _b____.pdf"),
        (".htaccess", "htaccess"),
        ("...", "attachment.pdf"),
        ("", "attachment.pdf"),
        ("x" * 200 + ".pdf", "x" * 96 + ".pdf"),
        ("Größe 😀.pdf", "Größe 😀.pdf"),
    ],
)
def test_names_are_those_of_files(name: str, safe: str) -> None:
    assert file_name(name, "application/pdf") == safe


async def test_names_arrive_in_any_script_and_length() -> None:
    names = [
        "a.pdf",
        'q;"uo.pdf',
        "ä.pdf",
        "請求書" * 30 + ".pdf",
        "😀" * 90 + ".pdf",
        "b" * 95 + ".pdf",
    ]
    async with sending(pdf) as (mail, _, runner):
        attached = [{"base64": "aGk=", "filename": f"{{{{data.n{n}}}}}"} for n in range(len(names))]
        data: dict[str, Any] = {f"n{n}": name for n, name in enumerate(names)}
        assert isinstance(await send(runner, *attached, **data), Answer)
        found = [part.get_filename() for part in mail.parsed().iter_attachments()]
        lines = mail.messages[0].content.split(b"\r\n")
    assert found == [file_name(name, "") for name in names]
    assert max(map(len, lines)) <= 100


def test_errors_of_attachments_name_their_key() -> None:
    runner = email_runner("smtp://127.0.0.1:9")
    for wrong, says in (
        ({}, "attachments.0: write either url or base64"),
        ({"url": "x", "base64": "y"}, "attachments.0: write either url or base64"),
        ({"url": "invoice.pdf"}, "attachments.0.url: must be a URL such as"),
        ({"url": "{{#if"}, "attachments.0.url: line 1"),
        ({"base64": "{{x}}", "filename": "{{x"}, "attachments.0.filename: line 1"),
        ({"base64": "x", "inline": "yes"}, "attachments.0.inline: must be true or false"),
        ({"base64": "x", "name": "y"}, "attachments.0.name: an attachment has no key 'name'"),
    ):
        with pytest.raises(DefinitionError) as refused:
            runner.compile({**MAIL, "attachments": [wrong]})
        assert says in str(refused.value)
    with pytest.raises(DefinitionError, match="at most 10 items"):
        runner.compile({**MAIL, "attachments": [{"base64": "x"}] * 11})


async def test_a_preview_contains_attachments_and_a_simulation_names_them() -> None:
    async with sending(pdf) as (_, files, runner):
        attached = [{"url": f"{files.url}/a.pdf"}, {"base64": "aGk=", "filename": "b.txt"}]
        program = runner.compile({**MAIL, "attachments": attached})
        here = task(to="ada@example.com")
        assert b"application/pdf" in await runner.write(program, here)
        assert runner.preview(program, here)["files"] == f"{files.url}/a.pdf, b.txt"
        assert len(files.requests) == 1
        program = runner.compile({**MAIL, "attachments": [{"url": "https://other.example.com"}]})
        with pytest.raises(AttachmentError, match="not allowed"):
            await runner.write(program, here)
