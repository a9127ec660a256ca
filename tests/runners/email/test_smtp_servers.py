"""Mail servers as they behave in reports: slow, strict, greylisting, with limits and tokens."""

from __future__ import annotations

import asyncio
import base64
import json
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from sequencerd.core.model import Action, Limits, RetryPolicy
from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.runners.email import smtp, smtp_dialogue
from sequencerd.runners.email.pending import DATA_KEY
from sequencerd.runners.email.runner import EmailRunner
from sequencerd.runners.email.smtp_connect import check_hello_name
from tests.helpers import servers
from tests.helpers.runners import email_runner, failed
from tests.helpers.servers import HOST, Request, Script, certificate, http_server, scripted, task

CONFIG = {"from": "hi@example.com", "to": "{{data.email}}", "subject": "x", "text": "x"}


@asynccontextmanager
async def runner(server: Script, **options: Any) -> AsyncIterator[EmailRunner]:
    """A runner for this server, closed at the end."""
    made = email_runner(server.url, **options)
    try:
        yield made
    finally:
        await made.close()


async def send(
    made: EmailRunner,
    config: dict[str, Any] | None = None,
    *,
    email: str = "a@x.org",
    pending: object = None,
    **data: Any,
) -> Result:
    """Sends one message, of which a part may be left."""
    data |= {"email": email, DATA_KEY: pending}
    (result,) = await made.run(made.compile(CONFIG | (config or {})), [task(**data)])
    return result


# --- how long it may take


async def test_the_answer_to_the_message_is_waited_for() -> None:
    async with (
        scripted(slow={".": 1.5}) as server,
        runner(server, limits=Limits(timeout=1)) as made,
    ):
        result = await send(made)
    assert isinstance(result, Answer)
    assert len(server.messages) == 1


@pytest.mark.parametrize(
    ("command", "fault"),
    [("CONNECT", "server"), ("EHLO", "server"), ("MAIL", "unclear"), ("DATA", "unclear")],
)
async def test_each_other_reply_has_its_time(command: str, fault: str) -> None:
    async with (
        scripted(slow={command: 60}) as server,
        runner(server, limits=Limits(timeout=1)) as made,
    ):
        result = failed(await send(made))
    assert "no answer within 1 s to " in result.message
    assert (result.fault, result.unknown, result.permanent) == (fault, False, False)
    assert server.messages == []


async def test_the_time_of_a_call_leaves_room_for_all_phases() -> None:
    made = email_runner("smtp://mail.example.com", limits=Limits(2, per_second=1))
    assert made.limits.timeout >= smtp.OFFER_TIMEOUT + smtp_dialogue.FINAL_TIMEOUT + 2


# --- the greeting


def named(host: str) -> Any:
    """A resolver that gives this name for any."""
    real = socket.getaddrinfo

    def find(name: Any, *args: Any, **options: Any) -> Any:
        answers = real(HOST, *args, **options)
        return [(*answer[:3], host if name != HOST else "", answer[4]) for answer in answers]

    return find


async def test_ehlo_has_a_name_with_a_dot_or_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for host in ("mailer", "localhost", "localhost.localdomain", "mail.example.com"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        monkeypatch.setattr("socket.getaddrinfo", named(host))
        async with scripted() as server, runner(server) as made:
            await send(made)
            names.append(server.commands[0])
    assert names == [f"EHLO [{HOST}]"] * 3 + ["EHLO mail.example.com"]


async def test_the_name_can_be_set() -> None:
    async with scripted() as server, runner(server, hello_name="news.example.org") as made:
        await send(made)
    assert server.commands[0] == "EHLO news.example.org"
    check_hello_name("[192.0.2.1]")
    for bad in ("mailer", "", "a b.example.com", "a.example.com\r\nMAIL", "mail_1.example.com"):
        with pytest.raises(ValueError, match="hello_name"):
            email_runner("smtp://mail.example.com", hello_name=bad)


async def test_a_refused_hello_name_is_the_operators_fault() -> None:
    refusal = "504 5.5.2 <mailer>: Helo command rejected: need fully-qualified hostname"
    async with scripted(answers={"RCPT": [refusal]}) as server, runner(server) as made:
        result = failed(await send(made))
    assert (result.fault, result.permanent) == ("server", False)
    assert "Helo command rejected" in result.message


@pytest.mark.parametrize(("code", "asked"), [(502, True), (500, True), (421, False), (451, False)])
async def test_helo_follows_where_ehlo_is_not_known(code: int, asked: bool) -> None:
    answers = {"EHLO": [f"{code} what"]}
    async with scripted(answers=answers) as server, runner(server) as made:
        result = await send(made)
    assert any(command.startswith("HELO ") for command in server.commands) == asked
    assert isinstance(result, Answer) == asked
    if isinstance(result, Failed):
        assert (result.fault, result.permanent) == ("server", False)


async def test_blank_lines_before_a_reply_are_skipped() -> None:
    answers: dict[str, list[str | bytes | None]] = {
        "CONNECT": [b"\r\n220 here\r\n\r\n"],
        "EHLO": [b"\r\n250-here\r\n250 PIPELINING\r\n"],
        "MAIL": [b"\r\n\r\n250 ok\r\n"],
        ".": [b"\r\n250-it is\r\n250 queued\r\n"],
    }
    async with scripted(answers=answers) as server, runner(server) as made:
        result = await send(made)
    assert isinstance(result, Answer)
    assert "250 it is queued" in str(result.message)


async def test_replies_before_tls_are_refused(tmp_path: Path) -> None:
    context, cafile = certificate(tmp_path)
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(b"220 here\r\n")
            await reader.readline()
            writer.write(b"250-here\r\n250-AUTH PLAIN\r\n250 STARTTLS\r\n")
            await reader.readline()
            writer.write(b"220 go on\r\n250-evil\r\n250 AUTH PLAIN\r\n")  # in one packet
            with suppress(OSError):
                await writer.start_tls(context)
            heard.append(await reader.readline())
        finally:
            writer.close()

    server = await asyncio.start_server(talk, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    made = email_runner(f"smtp://ada:secret@localhost:{port}?starttls=always&cafile={cafile}")
    result = failed(await send(made))
    await made.close()
    server.close()
    await server.wait_closed()
    assert "between STARTTLS and TLS" in result.message
    assert (result.fault, result.unknown) == ("server", False)
    assert heard in ([], [b""])


# --- logins with a password


async def test_another_login_is_tried_where_one_is_refused() -> None:
    answers: dict[str, list[str | bytes | None]] = {"AUTH": ["535 5.7.8 no secret for it"]}
    extensions = ["PIPELINING", "AUTH LOGIN PLAIN CRAM-MD5"]
    async with scripted(answers=answers, extensions=extensions) as server:
        made = email_runner(f"smtp://ada:secret@{HOST}:{server.port}?starttls=never")
        result = await send(made)
        await made.close()
    assert isinstance(result, Answer), result
    logins = [command.split()[1] for command in server.commands if command.startswith("AUTH ")]
    assert logins == ["CRAM-MD5", "PLAIN"]  # unencrypted, it begins with what shows no password


@pytest.mark.parametrize("refusal", ["535 5.7.8 bad", "421 4.7.0 too many failed logins"])
async def test_a_refused_login_is_reported_though_the_server_hangs_up(refusal: str) -> None:
    answers: dict[str, list[str | bytes | None]] = {"AUTH": [refusal, None]}
    async with scripted(answers=answers, extensions=["AUTH PLAIN LOGIN"]) as server:
        made = email_runner(f"smtp://ada:secret@{HOST}:{server.port}?starttls=never")
        result = failed(await send(made))
        await made.close()
    assert f"refuses the login: {refusal}" in result.message
    assert (result.fault, result.permanent) == ("server", False)


async def test_a_login_that_is_not_answered_shows_no_password() -> None:
    async with scripted(extensions=["AUTH LOGIN"]) as server:
        server.answers["AUTH"] = ["334 UGFzc3dvcmQ6"]
        server.slow[base64.b64encode(b"secret").decode().upper()] = 60
        url = f"smtp://ada:secret@{HOST}:{server.port}?starttls=never"
        made = email_runner(url, limits=Limits(timeout=1))
        result = failed(await send(made))
        await made.close()
    assert "no answer within 1 s to AUTH" in result.message
    assert base64.b64encode(b"secret").decode() not in result.message


# --- replies


async def test_a_message_larger_than_the_server_takes_is_not_offered() -> None:
    async with scripted(extensions=["SIZE 300", "PIPELINING"]) as server, runner(server) as made:
        result = failed(await send(made, {"text": "x" * 300}))
    assert result.permanent
    assert "accepts messages of at most 300 bytes" in result.message
    assert [command for command in server.commands if command.startswith("MAIL")] == []


@pytest.mark.parametrize("size", ["SIZE", "SIZE 0", "SIZE many"])
async def test_a_server_may_hide_the_size_that_it_takes(size: str) -> None:
    async with scripted(extensions=[size]) as server, runner(server) as made:
        assert isinstance(await send(made), Answer)


async def test_a_server_that_shuts_down_instead_of_taking_the_message() -> None:
    answers: dict[str, list[str | bytes | None]] = {"DATA": ["421 mail.example.org closing"]}
    async with scripted(answers=answers) as server, runner(server) as made:
        result = failed(await send(made))
    assert (result.fault, result.permanent, result.unknown) == ("server", False, False)


async def test_a_message_that_is_answered_out_of_order_may_have_been_accepted() -> None:
    async with scripted(answers={".": ["354 go on"]}) as server, runner(server) as made:
        result = failed(await send(made))
    assert "answers the message with 354" in result.message
    assert (result.fault, result.permanent, result.unknown) == ("unclear", False, True)


async def test_replies_in_an_old_encoding_are_read() -> None:
    said = "550 Kontingent für ausgehende Nachrichten überschritten"
    answers: dict[str, list[str | bytes | None]] = {".": [f"{said}\r\n".encode("latin-1")]}
    async with scripted(answers=answers) as server, runner(server) as made:
        result = failed(await send(made))
    assert said in result.message
    assert result.cause == "over quota"


async def test_a_greeting_in_an_old_encoding_is_read() -> None:
    said = "554 gesperrt für heute"
    answers: dict[str, list[str | bytes | None]] = {"CONNECT": [f"{said}\r\n".encode("latin-1")]}
    async with scripted(answers=answers) as server, runner(server) as made:
        assert said in failed(await send(made)).message


# --- recipients


def again(result: Result, first: Task) -> Task:
    """The next execution of a step that answered noop, with its data merged."""
    assert isinstance(result, Answer)
    assert result.action is Action.NOOP
    data = first.view["data"] | (result.data or {})
    return Task(first.key, {**first.view, "data": data})


async def test_a_greylisted_copy_is_sent_later_to_its_recipient_alone() -> None:
    config = CONFIG | {"cc": "bob@x.org", "bcc": ["eve@x.org", "gone@x.org"]}
    retry = RetryPolicy(first_delay=60, longest_delay=3600)
    async with scripted() as server, runner(server, retry=retry) as made:
        program = made.compile(config)
        grey, no = "450 4.2.0 Greylisted", "550 5.1.1 no such user"
        server.answers["RCPT"] = ["250 ok", grey, grey, no]
        first = task(email="ada@x.org")
        (one,) = await made.run(program, [first])
        assert isinstance(one, Answer)
        assert "sent to ada@x.org" in str(one.message)
        assert one.retry_after == timedelta(seconds=60)
        server.answers["RCPT"] = ["250 ok", grey]
        (two,) = await made.run(program, [second := again(one, first)])
        assert isinstance(two, Answer)
        assert two.retry_after == timedelta(seconds=120)
        (three,) = await made.run(program, [again(two, second)])
    assert [recipients for recipients, _ in server.messages] == [
        ["ada@x.org"],
        ["bob@x.org"],
        ["eve@x.org"],
    ]
    assert isinstance(three, Answer)
    assert three.action is Action.NEXT
    assert three.data == {DATA_KEY: None}
    contents = {content.split(b"Date:")[0] for _, content in server.messages}
    assert len(contents) == 1  # the same message, with the same recipients to be seen


@pytest.mark.parametrize("refusal", ["450 4.2.0 Greylisted", "550 5.1.1 gone"])
async def test_a_copy_never_keeps_an_enrollment_for_good(refusal: str) -> None:
    since = (datetime.now(UTC) - timedelta(days=3)).isoformat()
    left = {"key": task().key, "to": ["bob@x.org"], "since": since, "tries": 50}
    answers = {"RCPT": [refusal]}
    async with scripted(answers=answers) as server, runner(server) as made:
        result = await send(made, {"cc": "bob@x.org"}, pending=left)
    assert isinstance(result, Answer)
    assert result.action is Action.NEXT
    assert refusal[:3] in str(result.message)
    assert server.messages == []


async def test_data_cannot_add_a_recipient_to_a_pending_message() -> None:
    now = datetime.now(UTC).isoformat()
    left = {"key": task().key, "to": ["evil@x.test", "bob@x.org"], "since": now, "tries": 0}
    async with scripted() as server, runner(server) as made:
        await send(made, {"cc": "bob@x.org"}, pending=left)
        await send(made, {"cc": "bob@x.org"}, pending=left | {"key": "another"})
        await send(made, {"cc": "bob@x.org"}, pending="nonsense")
    assert [r for r, _ in server.messages] == [["bob@x.org"]] + [["a@x.org", "bob@x.org"]] * 2


async def test_too_many_recipients_are_sent_to_in_several_transactions() -> None:
    everybody = [f"a{n}@x.org" for n in range(5)]
    full = "452 4.5.3 Error: too many recipients"
    replies = ["250 ok"] * 2 + [full] * 3 + ["250 ok"] * 2 + ["552 too many recipients", "250 ok"]
    async with scripted(answers={"RCPT": [*replies]}) as server, runner(server) as made:
        result = await send(made, {"to": everybody[:3], "cc": everybody[3:]})
    assert [recipients for recipients, _ in server.messages] == [
        everybody[:2],
        everybody[2:4],
        everybody[4:],
    ]
    assert isinstance(result, Answer)
    assert result.action is Action.NEXT
    assert server.connections == 1


async def test_a_server_may_count_recipients_when_it_gets_the_message() -> None:
    """Exim refuses all of it, with recipients_max_reject."""
    everybody = [f"a{n}@x.org" for n in range(5)]
    answers = {
        "RCPT": ["250 ok", "250 ok", *["552 too many recipients"] * 3],
        "DATA": ["554 Too many recipients"],
        ".": ["250 queued", "550 5.5.3 Too many recipients in a message"],
    }
    async with scripted(answers=answers) as server, runner(server) as made:
        result = await send(made, {"to": everybody[:3], "cc": everybody[3:]})
        answers["RCPT"] = ["550 no such user", "250 ok", "552 too many recipients"]
        answers["DATA"] = ["554 Too many recipients"]
        await send(made, {"to": everybody[:3]})
    sent = [recipients for recipients, _ in server.messages]
    assert sent == [
        everybody[:2],
        [everybody[2]],
        [everybody[3]],
        [everybody[4]],
        *[[everybody[1]], [everybody[2]]],
    ]
    assert isinstance(result, Answer)
    assert result.action is Action.NEXT
    assert server.connections == 1


async def test_a_single_recipient_that_is_too_many_is_refused() -> None:
    answers = {".": ["554 Too many recipients"]}
    async with scripted(answers=answers) as server, runner(server) as made:
        assert failed(await send(made)).permanent


async def test_a_broken_connection_leaves_only_the_remaining_recipients() -> None:
    full = "452 4.5.3 Error: too many recipients"
    answers = {"RCPT": ["250 ok", full], ".": ["250 queued", None]}
    async with scripted(answers=answers) as server, runner(server) as made:
        program = made.compile(CONFIG | {"to": ["a@x.org", "b@x.org"]})
        first = task()
        (one,) = await made.run(program, [first])
        (two,) = await made.run(program, [again(one, first)])
    assert [recipients for recipients, _ in server.messages] == [["a@x.org"], ["b@x.org"]]
    assert isinstance(one, Answer)
    assert one.unknown
    assert "it may have been delivered; sent to 1 later" in (one.message or "")
    assert isinstance(two, Answer)


@pytest.mark.parametrize(
    ("email", "sent_to"),
    [
        ("a..b@docomo.ne.jp", '"a..b"@docomo.ne.jp'),
        (".a@docomo.ne.jp", '".a"@docomo.ne.jp'),
        ('"a.."@docomo.ne.jp', '"a.."@docomo.ne.jp'),
        ('"a b"@x.org', '"a b"@x.org'),
        ('"a\\"@evil.test"@x.org', '"a\\"@evil.test"@x.org'),
        ('"ada"@x.org', "ada@x.org"),
        ('Ada <"a.."@docomo.ne.jp>', '"a.."@docomo.ne.jp'),
    ],
)
async def test_local_parts_with_dots_and_quotes(email: str, sent_to: str) -> None:
    async with scripted() as server, runner(server) as made:
        result = await send(made, email=email)
    assert isinstance(result, Answer), result
    assert [recipients for recipients, _ in server.messages] == [[sent_to]]


async def test_replies_that_are_out_of_order_suppress_no_address() -> None:
    answers: dict[str, list[str | bytes | None]] = {
        "MAIL": [b"250 ok\r\n250 once more\r\n"],
        "RCPT": ["550 5.1.1 no such user", "250 ok"],
    }
    async with scripted(answers=answers) as server, runner(server) as made:
        result = failed(await send(made, {"cc": "b@x.org"}))
    assert "answers DATA with 250" in result.message
    assert result.undeliverable == ()


# --- connections that were idle


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("answer", [None, "421 4.4.2 idle for too long"])
async def test_a_closed_idle_connection_costs_no_attempt(command: str, answer: str | None) -> None:
    async with scripted() as server, runner(server) as made:
        await send(made)
        server.answers[command] = [answer]
        result = await send(made)
    assert isinstance(result, Answer)
    assert server.connections == 2
    assert len(server.messages) == 2


@pytest.mark.parametrize(
    ("url", "greeting", "says"),
    [
        ("smtp://{host}?starttls=always", "220 here", "offers no STARTTLS"),
        ("smtp://ada:secret@{host}?starttls=never", "220 here", "no supported authentication"),
        ("smtp://{host}?starttls=never", "HTTP/1.1 400 Bad Request", "HTTP/1.1 400"),
        ("smtp://{host}?starttls=never", "SSH-2.0-OpenSSH", "SSH-2.0"),
    ],
)
async def test_a_server_that_is_not_as_the_settings_say_is_there(
    url: str, greeting: str, says: str
) -> None:
    """So `doctor` does not advise to start it."""
    async with scripted(answers={"CONNECT": [greeting]}, extensions=[]) as server:
        made = email_runner(url.format(host=f"127.0.0.1:{server.port}"))
        result = await made.check()
        await made.close()
    assert isinstance(result, Failed)
    assert says in result.message
    assert (result.fault, result.cause) == ("server", "refused")


async def test_an_address_is_named_in_brackets() -> None:
    made = email_runner("smtp://[::1]:1?starttls=never")
    result = await made.check()
    await made.close()
    assert str(getattr(result, "message", "")).startswith("[::1]:1: ")


@pytest.mark.parametrize("extensions", [["PIPELINING"], []])
async def test_a_refused_sender_is_the_reason_though_the_server_hangs_up(
    extensions: list[str],
) -> None:
    answers: dict[str, list[str | bytes | None]] = {
        "MAIL": ["550 5.7.1 blocked, see https://example.org"],
        "RCPT": [None],
    }
    async with scripted(extensions=extensions, answers=answers) as server, runner(server) as made:
        result = await send(made)
    assert isinstance(result, Failed)
    assert "550 5.7.1 blocked, see https://example.org" in result.message


@pytest.mark.parametrize("extensions", [["PIPELINING"], []])
@pytest.mark.parametrize("before", [[], ["250 ok"]])
async def test_a_server_hangs_up_after_it_refuses_a_recipient(
    extensions: list[str], before: list[str]
) -> None:
    """As Exim does with "drop": the others get the message over another connection."""
    answers = {"RCPT": [*before, "550 5.1.1 unknown", None]}
    async with scripted(extensions=extensions, answers=answers) as server, runner(server) as made:
        result = await send(made, {"cc": "b@x.org", "bcc": "c@x.org"})
    assert isinstance(result, Answer)
    gone = "b@x.org" if before else "a@x.org"
    assert [one.address for one in result.undeliverable] == [gone]
    (sent,) = server.messages
    assert sent[0] == [one for one in ("a@x.org", "b@x.org", "c@x.org") if one != gone]
    assert server.connections == 2


async def test_a_server_hangs_up_after_it_refuses_a_recipient_for_now() -> None:
    async with (
        scripted(answers={"RCPT": ["450 4.2.1 busy", None]}) as server,
        runner(server) as made,
    ):
        result = await send(made, {"cc": "b@x.org"})
    assert isinstance(result, Failed)
    assert (result.permanent, result.fault, server.messages) == (False, "enrollment", [])
    assert "450 4.2.1 busy" in result.message


@pytest.mark.parametrize(
    "reply",
    [
        "451 4.3.0 try again",
        "503 5.5.1 nested MAIL command",
        "530 5.7.0 Authentication required",
        "554 5.7.0 Too many messages in this session",
    ],
)
async def test_a_sender_is_only_refused_if_a_new_connection_refuses_it(reply: str) -> None:
    async with scripted() as server, runner(server) as made:
        await send(made)
        server.answers["MAIL"] = [reply]
        result = await send(made)
        assert isinstance(result, Answer)
        server.answers["MAIL"] = [reply, reply]
        result = await send(made)
    assert isinstance(result, Failed)
    assert (server.connections, len(server.messages)) == (3, 2)


async def test_a_connection_that_is_not_reset_is_not_used_again() -> None:
    """The next message would go to the recipients of both, where a server keeps them."""
    async with scripted() as server, runner(server) as made:
        server.answers = {"RCPT": ["550 5.1.1 no"], "RSET": ["502 5.5.1 not implemented"]}
        await send(made)
        assert isinstance(await send(made), Answer)
    assert server.connections == 2


async def test_a_connection_is_reset_only_if_a_message_was_begun() -> None:
    async with scripted() as server, runner(server) as made:
        await send(made)
        await send(made)
    assert [one.split()[0] for one in server.commands].count("RSET") == 0


async def test_a_server_that_goes_away_between_messages_is_down() -> None:
    """The message that finds the old connection closed is not the cause."""
    async with scripted() as server, runner(server) as made:
        await send(made)
        server.answers = {"RCPT": [None], "CONNECT": [None]}
        result = failed(await send(made))
    assert (result.fault, result.cause) == ("server", "unreachable")


async def test_an_idle_connection_that_is_dead_costs_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(smtp, "REUSE_TIMEOUT", 0.1)
    async with scripted() as server, runner(server) as made:
        await send(made)
        server.slow["MAIL"] = 3600
        result = await send(made)
    assert isinstance(result, Answer)
    assert len(server.messages) == 2


async def test_replies_of_a_connection_that_is_given_up_do_not_count() -> None:
    gone, ok = "550 5.1.1 no such user", "250 ok"
    async with scripted() as server, runner(server) as made:
        server.answers["."] = [b"250 queued\r\n250 once more\r\n"]
        await send(made)
        server.answers["RCPT"] = [gone, ok, gone, ok]  # on the old connection, and on the new one
        result = await send(made, {"cc": "b@x.org"})
    assert [recipients for recipients, _ in server.messages] == [["a@x.org"], ["b@x.org"]]
    assert isinstance(result, Answer)
    assert [one.address for one in result.undeliverable] == ["a@x.org"]


async def test_several_closed_idle_connections() -> None:
    async with scripted() as server, runner(server) as made:
        program = made.compile(CONFIG)
        await made.run(program, [task(n, email="a@x.org") for n in range(5)])
        count = server.connections
        server.answers["MAIL"] = [None] * count
        result = await send(made)
    assert count > 1
    assert isinstance(result, Answer)
    assert server.connections == count + 1


# --- headers


def headers(content: bytes, name: str) -> list[str]:
    """The values of a header, unfolded."""
    head = content.split(b"\r\n\r\n")[0].decode().replace("\r\n ", " ").split("\r\n")
    return [line.partition(":")[2].strip() for line in head if line.startswith(f"{name}:")]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"listUnsubscribe": "https://x.org/u?a=?b?="}, "<https://x.org/u?a=?b?=>"),
        ({"listUnsubscribe": "https://x.org/ü"}, "<https://x.org/%C3%BC>"),
        ({"listUnsubscribe": "https://Bücher.de:80/ü"}, "<https://xn--bcher-kva.de:80/%C3%BC>"),
        (
            {"listUnsubscribe": "<mailto:a@x.org?subject=ü>, <https://x.org/{{subject}}>"},
            "<mailto:a@x.org?subject=%C3%BC>, <https://x.org/user-7>",
        ),
        (
            {"headers": {"list-unsubscribe": "<https://x.org/é?=?a?=>, <mailto:out@x.org>"}},
            "<https://x.org/%C3%A9?=?a?=>, <mailto:out@x.org>",
        ),
        (
            {"headers": {"List-Unsubscribe": "<mailto:a@x.org>"}, "listUnsubscribe": "https://b"},
            "<mailto:a@x.org>",
        ),
        ({"listUnsubscribe": f"https://x.org/{'u' * 950}"}, f"<https://x.org/{'u' * 950}>"),
    ],
)
async def test_list_unsubscribe_is_never_encoded_and_comes_once(
    config: dict[str, Any], expected: str
) -> None:
    everywhere = "https://example.com/out"
    async with scripted() as server, runner(server, list_unsubscribe=everywhere) as made:
        result = await send(made, config)
    assert isinstance(result, Answer), result
    content = server.messages[0][1]
    names = ("List-Unsubscribe", "list-unsubscribe")
    assert [value for name in names for value in headers(content, name)] == [expected]
    one_click = [] if "headers" in config else ["List-Unsubscribe=One-Click"]
    assert headers(content, "List-Unsubscribe-Post") == one_click
    assert all(len(line) <= 998 for line in content.split(b"\r\n"))
    assert b"=?utf-8" not in content


async def test_long_and_folded_ascii_headers_stay_as_they_are() -> None:
    subject = "word " * 60 + "end"
    references = "<1@x.org>\r\n <2@x.org>\r\n\t<3@x.org>"
    config = {"subject": subject, "headers": {"References": "{{data.refs}}", "X-Long": "x" * 200}}
    async with scripted() as server, runner(server) as made:
        result = await send(made, config, refs=references)
    assert isinstance(result, Answer), result
    content = server.messages[0][1]
    assert headers(content, "Subject") == [subject]
    assert headers(content, "References") == ["<1@x.org> <2@x.org> <3@x.org>"]
    assert headers(content, "X-Long") == ["x" * 200]
    assert b"=?" not in content


# --- tokens


def tokens_of(*lives: float, status: int = 200) -> tuple[list[dict[str, list[str]]], Any]:
    """A token endpoint that returns token-1, token-2, ..., and the requests to it."""
    asked: list[dict[str, list[str]]] = []

    async def respond(request: Request) -> servers.Answer:
        asked.append(parse_qs(request.body.decode()))
        if status != 200:
            body: dict[str, Any] = {"error": "invalid_client", "error_description": "the-secret!"}
        else:
            life = lives[min(len(asked), len(lives)) - 1]
            body = {"access_token": f"token-{len(asked)}", "expires_in": life}
        return servers.Answer(status, json.dumps(body).encode())

    return asked, respond


def bearers(server: Script) -> list[str]:
    """The tokens that a server was shown."""
    shown = [command.split()[-1] for command in server.commands if command.startswith("AUTH")]
    return [base64.b64decode(text).decode() for text in shown]


def with_user(server: Script) -> str:
    return f"smtp://ada%40example.com@{HOST}:{server.port}?starttls=never"


def client(url: str, **changes: str | None) -> dict[str, str | None]:
    return {"token_url": url, "client_id": "me", "client_secret": "the-secret", **changes}


LOGIN = ["PIPELINING", "AUTH LOGIN XOAUTH2"]


@asynccontextmanager
async def with_tokens(respond: servers.Respond) -> AsyncIterator[tuple[Script, EmailRunner]]:
    """A mail server, and a runner that gets its tokens from an endpoint."""
    async with http_server(respond) as endpoint, scripted(extensions=LOGIN) as server:
        made = email_runner(with_user(server), oauth=client(endpoint.url))
        try:
            yield server, made
        finally:
            await made.close()


@pytest.mark.parametrize("refresh_token", [None, "refresh-1"])
async def test_a_token_is_fetched_once_and_shown(refresh_token: str | None) -> None:
    asked, respond = tokens_of(3600)
    async with http_server(respond) as endpoint, scripted(extensions=LOGIN) as server:
        oauth = client(endpoint.url, scope="https://mail/.default", refresh_token=refresh_token)
        made = email_runner(with_user(server), oauth=oauth)
        results = await made.run(made.compile(CONFIG), [task(n, email="a@x.org") for n in range(3)])
        await made.close()
    assert all(isinstance(result, Answer) for result in results)
    expected = {
        "client_id": ["me"],
        "client_secret": ["the-secret"],
        "scope": ["https://mail/.default"],
        "grant_type": ["refresh_token" if refresh_token else "client_credentials"],
    }
    assert asked == [expected | ({"refresh_token": ["refresh-1"]} if refresh_token else {})]
    assert set(bearers(server)) == {"user=ada@example.com\1auth=Bearer token-1\1\1"}


async def test_a_token_is_renewed_before_it_ends() -> None:
    asked, respond = tokens_of(0.01, 3600)
    async with with_tokens(respond) as (server, made):
        await send(made)
        server.answers["MAIL"] = [None]
        await asyncio.sleep(0.02)  # the life of the first token
        assert isinstance(await send(made), Answer)
        server.answers["MAIL"] = [None]
        assert isinstance(await send(made), Answer)
    assert len(asked) == 2
    assert [text[-9:-2] for text in bearers(server)] == ["token-1", "token-2", "token-2"]


async def test_a_token_that_was_withdrawn_is_replaced_at_once() -> None:
    asked, respond = tokens_of(3600)
    async with with_tokens(respond) as (server, made):
        await send(made)
        server.answers["MAIL"] = [None]
        reason = base64.b64encode(b'{"status":"401"}').decode()
        server.answers["AUTH"] = [f"334 {reason}"]
        server.answers[""] = ["535 5.7.8 expired"]
        result = await send(made)
    assert isinstance(result, Answer)
    assert len(asked) == 2


async def test_a_fresh_token_that_is_refused_is_the_operators_fault() -> None:
    _, respond = tokens_of(3600)
    async with http_server(respond) as endpoint, scripted(extensions=LOGIN) as server:
        server.answers["AUTH"] = ["535 5.7.3 Authentication unsuccessful token-1 token-2"] * 2
        made = email_runner(with_user(server), oauth=client(endpoint.url))
        result = failed(await send(made))
        await made.close()
    assert (result.fault, result.permanent) == ("server", False)
    assert "refuses the login: 535" in result.message
    assert "token-2" not in result.message


async def test_an_endpoint_without_tokens_is_the_operators_fault() -> None:
    _, respond = tokens_of(status=401)
    async with with_tokens(respond) as (_, made):
        result = failed(await send(made))
    assert (result.fault, result.permanent, result.cause) == ("server", False, "refused")
    assert "the token endpoint answered 401: ***!" in result.message
    assert "the-secret" not in repr(made._source.__dict__)


@pytest.mark.parametrize("status", [429, 503])
async def test_a_token_endpoint_may_ask_for_a_pause(status: int) -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(status, b"later", {"Retry-After": "600"})

    async with with_tokens(respond) as (_, made):
        result = failed(await send(made))
    assert (result.fault, result.retry_after) == ("server", timedelta(seconds=600))


@pytest.mark.parametrize(
    "body",
    [
        b'{"access_token": "token-9", "expires_in": "3599"}',
        b'{"access_token": "token-9", "expires_in": -1, "token_type": "bearer", "scope": []}',
        b'{"access_token": "token-9", "expires_in": 1e400}',
        b'{"access_token": "token-9", "expires_in": NaN}',
        b'{"access_token": "token-9"}',
    ],
)
async def test_what_token_endpoints_write(body: bytes) -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(body=body)

    async with with_tokens(respond) as (server, made):
        assert isinstance(await send(made), Answer)
    assert bearers(server) == ["user=ada@example.com\1auth=Bearer token-9\1\1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-c", "print('token-9')"], None),
        (["-c", 'print(\'{"access_token": "token-9", "expires_in": 60}\')'], None),
        (["-c", "raise SystemExit(3)"], "token_command ended with status 3"),
        (["-c", "print('two words')"], "token_command prints no token"),
        (["-c", "pass"], "token_command prints no token"),
    ],
)
async def test_a_command_prints_the_token(words: Sequence[str], said: str | None) -> None:
    async with scripted(extensions=LOGIN) as server:
        made = email_runner(with_user(server), token_command=shlex.join([sys.executable, *words]))
        result = await send(made)
        await made.close()
    if said is None:
        assert isinstance(result, Answer), result
        assert bearers(server) == ["user=ada@example.com\1auth=Bearer token-9\1\1"]
    else:
        assert said in failed(result).message
        assert failed(result).fault == "server"


async def test_settings_of_tokens_that_cannot_work() -> None:
    for url in ("smtp://mail.example.com", "smtp://ada:secret@mail.example.com"):
        with pytest.raises(ValueError, match="smtp://user@host"):
            email_runner(url, oauth=client("https://login.example.com"))
    with pytest.raises(ValueError, match="token_command"):
        email_runner("smtp://ada@mail.example.com", token_command=" ")
