"""The Email runner against a real SMTP server."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from sequencerd.core.faults import DefinitionError
from sequencerd.core.model import Action, Limits, MessageContext
from sequencerd.core.task import Answer, Failed, Result, Suppressed, Undeliverable
from sequencerd.runners.email import smtp_dialogue
from sequencerd.runners.email.runner import EmailRunner
from sequencerd.runners.email.smtp import MailTransport
from sequencerd.runners.suppression_check import SuppressionKey, Suppressions
from tests.helpers import servers
from tests.helpers.runners import email_runner, failed
from tests.helpers.servers import (
    DIGEST,
    HOST,
    Mailbox,
    certificate,
    demanding_certificates,
    serving,
    smtp_server,
    task,
)

BASIC = {
    "from": "Shop <hi@example.com>",
    "to": "{{data.email}}",
    "subject": "Hello {{data.name}}",
    "text": "Dear {{data.name}}",
}


@pytest.fixture(autouse=True, params=[True, False], ids=["pipelining", "one by one"])
def pipelining(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test is run with both kinds of servers."""
    monkeypatch.setattr(servers, "PIPELINING", request.param)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """A server's context, and what a client needs to trust it."""
    return certificate(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def runner(server: Mailbox, query: str = "", **options: Any) -> AsyncIterator[EmailRunner]:
    """A runner for this server, closed at the end."""
    made = email_runner(f"smtp://{HOST}:{server.port}{query}", **options)
    try:
        yield made
    finally:
        await made.close()


async def send(
    server: Mailbox, config: dict[str, Any] | None = None, query: str = "", **data: Any
) -> Result:
    """Sends one message over a connection of its own."""
    data = {"email": "ada@example.com", "name": "Ada", **data}
    async with runner(server, query) as made:
        (result,) = await made.run(made.compile(BASIC | (config or {})), [task(**data)])
    return result


# --- the message


async def test_a_message_arrives_with_both_bodies_and_all_recipients() -> None:
    config = {
        "to": ["{{data.email}}", "Bob <bob@example.com>"],
        "cc": "eve@example.com, {{data.boss}}",
        "bcc": ["secret@example.com"],
        "replyTo": "help@example.com",
        "html": "<p>{{data.name}}</p>",
        "headers": {"X-Campaign": "c-{{id}}", "Auto-Submitted": "auto-generated"},
    }
    async with smtp_server() as server:
        result = await send(server, config, name="Ada & Söhne")
        message = server.parsed()
    assert isinstance(result, Answer)
    assert result.action is Action.NEXT
    assert result.message == (
        "sent to ada@example.com, bob@example.com, eve@example.com, secret@example.com: "
        "250 2.0.0 queued as 1"
    )
    envelope = server.messages[0]
    assert envelope.mail_from == "hi@example.com"
    assert len(envelope.rcpt_tos) == 4
    assert message["From"] == "Shop <hi@example.com>"
    assert message["To"] == "ada@example.com, Bob <bob@example.com>"
    assert message["Cc"] == "eve@example.com"
    assert "secret" not in envelope.content.decode()
    assert message["Reply-To"] == "help@example.com"
    assert message["Subject"] == "Hello Ada & Söhne"
    assert message["X-Campaign"] == "c-7"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["MIME-Version"] == "1.0"
    assert abs(parsedate_to_datetime(message["Date"]) - datetime.now(UTC)).total_seconds() < 60
    assert message.get_content_type() == "multipart/alternative"
    text, html = message.iter_parts()
    assert text.get_content().strip() == "Dear Ada & Söhne"
    assert html.get_content_type() == "text/html"
    assert "<p>Ada &amp; Söhne</p>" in html.get_content()


async def test_text_alone_is_no_multipart_and_survives_long_lines_and_dots() -> None:
    text = "first\n.\n..two\n" + "ü" * 2000 + "\n" + "x " * 1000
    async with smtp_server() as server:
        await send(server, {"text": text})
        message = server.parsed()
    assert message.get_content_type() == "text/plain"
    assert message.get_content().replace("\r\n", "\n").strip() == text.strip()
    assert max(map(len, server.messages[0].content.split(b"\r\n"))) <= 78


async def test_the_message_id_is_the_same_in_every_attempt() -> None:
    async with smtp_server() as server:
        server.answers["DATA"] = ["451 4.3.0 try again"]
        first = await send(server)
        await send(server)
        await send(server)
        ids = {server.parsed(index)["Message-ID"] for index in (0, 1)}
    assert failed(first).permanent is False
    assert ids == {f"<7.1.{DIGEST}@sequencerd.example.com>"}


async def test_the_words_of_a_list_id_may_be_in_any_script() -> None:
    list_id = "Grüße an {{data.email}} <news.example.com>"
    async with smtp_server() as server:
        await send(server, {**BASIC, "headers": {"List-Id": list_id}})
        assert server.parsed()["List-Id"] == "Grüße an ada@example.com <news.example.com>"


async def test_long_headers_are_folded_and_not_encoded() -> None:
    url = "https://example.com/unsubscribe?token=" + "a1b2c3" * 40
    references = " ".join(f"<{'m' * 60}{n}@example.com>" for n in range(5))
    config = {"listUnsubscribe": url, "headers": {"References": references}}
    async with smtp_server() as server:
        await send(server, config)
        content = server.messages[0].content.decode()
    assert f"List-Unsubscribe: <{url}>\r\n" in content
    assert "List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n" in content
    assert references.replace(" ", "\r\n ") in content


async def test_the_settings_give_a_list_unsubscribe_that_a_step_may_replace_or_drop() -> None:
    seen: list[tuple[str, str | None]] = []
    async with (
        smtp_server() as server,
        runner(server, list_unsubscribe="https://example.com/?s={{subject}}") as made,
    ):
        for config in ({}, {"listUnsubscribe": "mailto:out@example.com"}, {"listUnsubscribe": ""}):
            program = made.compile(BASIC | config)
            await made.run(program, [task(email="ada@example.com")])
            message = server.parsed(len(seen))
            seen.append((message["List-Unsubscribe"], message["List-Unsubscribe-Post"]))
    assert seen == [
        ("<https://example.com/?s=user-7>", "List-Unsubscribe=One-Click"),
        ("<mailto:out@example.com>", None),
        (None, None),
    ]


@pytest.mark.parametrize(
    ("address", "sent_to", "shown"),
    [
        ("ada@straße.example", "ada@xn--strae-oqa.example", "ada@xn--strae-oqa.example"),
        ('"Lovelace, Ada" <ada@x.org>', "ada@x.org", '"Lovelace, Ada" <ada@x.org>'),
        ("Größe <ada@x.org>", "ada@x.org", "Größe <ada@x.org>"),
        ("ada@x.org <ada@x.org>", "ada@x.org", '"ada@x.org" <ada@x.org>'),
        ("jörg@x.org", "jörg@x.org", "jörg@x.org"),
    ],
)
async def test_addresses_in_any_script_are_sent(address: str, sent_to: str, shown: str) -> None:
    async with smtp_server() as server:
        result = await send(server, email=address)
        message = server.parsed()
    assert isinstance(result, Answer)
    assert server.messages[0].rcpt_tos == [sent_to]
    assert message["To"] == shown
    assert ("SMTPUTF8" in server.messages[0].mail_options) == (not sent_to.isascii())


async def test_a_local_part_beyond_ascii_needs_a_server_for_it() -> None:
    async with smtp_server(utf8=False) as server, runner(server) as made:
        program = made.compile(BASIC)
        result = failed((await made.run(program, [task(email="jörg@x.org")]))[0])
        (other,) = await made.run(program, [task(email="ada@x.org")])
    assert result.permanent
    assert "SMTPUTF8" in result.message
    assert isinstance(other, Answer)
    assert server.connections == 1


@pytest.mark.parametrize(
    ("config", "sent_to"),
    [
        ({"cc": "jörg@x.org"}, ["ada@x.org"]),
        ({"bcc": "jörg@x.org", "cc": "eve@x.org"}, ["ada@x.org", "eve@x.org"]),
        ({"to": ["jörg@x.org", "ada@x.org"]}, ["ada@x.org"]),
        ({"to": "jörg@x.org", "cc": "ada@x.org"}, None),
        ({"cc": "jörg@x.org", "from": "für@example.com"}, None),
        ({"cc": "jörg@x.org", "replyTo": "für@example.com"}, None),
    ],
)
async def test_the_others_get_the_message_from_a_server_for_ascii_addresses(
    config: dict[str, Any], sent_to: list[str] | None
) -> None:
    async with smtp_server(utf8=False) as server, runner(server) as made:
        (result,) = await made.run(made.compile({**BASIC, **config}), [task(email="ada@x.org")])
        if sent_to is None:
            assert failed(result).permanent
            assert not server.messages
            return
        assert isinstance(result, Answer)
        assert f"sent to {', '.join(sent_to)}: " in (result.message or "")
        assert "; refused: jörg@x.org (" in (result.message or "")
        assert server.messages[0].rcpt_tos == sent_to
        assert server.messages[0].content.isascii()
        assert server.parsed()["To"] == "ada@x.org"


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({"email": ""}, "to: no address"),
        ({"email": "nobody"}, "to: 'nobody' is not an address"),
        ({"email": "a b@x.org"}, "to: "),
        ({"email": "ada@x..org"}, "to: "),
        ({"email": "ada@x.org\r\nBcc: eve@x.org"}, "to: a line break"),
        ({"email": '"ada <ada@x.org>'}, "to: "),
        ({"email": "<ada@x.org> <eve@x.org>"}, "to: "),
        ({"email": ["ada@x.org"] * 101}, "at most 100"),
        ({"name": "Ada\r\nBcc: eve@x.org"}, "subject: a line break"),
        ({"name": "Ada\u2028x"}, "subject: a line break"),
        ({"name": "x" * 20_000}, "subject: 20006 characters"),
    ],
)
async def test_invalid_messages_fail_permanently(data: dict[str, Any], names: str) -> None:
    if isinstance(data.get("email"), list):
        data = {"email": ", ".join(f"a{n}@x.org" for n in range(101))}
    async with smtp_server() as server:
        result = failed(await send(server, {"many": True}, **data))
    assert result.permanent
    assert result.failure == "bad_data"
    assert names in result.message
    assert server.messages == []


async def test_strict_a_message_with_a_gap_is_not_sent() -> None:
    async with smtp_server() as server:
        plain = await send(server, {"text": "Hello {{data.nmae}},"})
        strict = failed(await send(server, {"text": "Hello {{data.nmae}},", "strict": True}))
    assert isinstance(plain, Answer)
    assert (strict.failure, strict.message) == ("bad_data", "text: data.nmae: the value is missing")
    assert len(server.messages) == 1


async def test_strict_applies_to_addresses() -> None:
    async with smtp_server() as server:
        for change, where in (
            ({"to": ["{{data.email}}", "{{data.boss}}"]}, "to: data.boss"),
            ({"cc": "{{data.boss}}"}, "cc: data.boss"),
            ({"to": "{{data.nick}} <{{data.email}}>"}, "to: data.nick"),
        ):
            assert isinstance(await send(server, change), Answer)
            strict = failed(await send(server, {**change, "strict": True}))
            assert (strict.failure, strict.message) == (
                "bad_data",
                f"{where}: the value is missing",
            )
        optional = {"cc": '{{default data.boss ""}}', "strict": True}
        assert isinstance(await send(server, optional), Answer)
    assert len(server.messages) == 4


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"text": None}, "text or html is missing"),
        ({"subject": None}, "subject"),
        ({"to": "nobody"}, "to: 'nobody' is not an address"),
        ({"to": []}, "to: no address"),
        ({"cc": ["a@x.org", "b"]}, "cc: 'b'"),
        ({"from": "a@"}, "from: "),
        ({"headers": {"Bcc": "eve@x.org"}}, "'Bcc' cannot be set"),
        ({"headers": {"X-A: b\r\nBcc": "c"}}, "cannot be set"),
        ({"html": "{{#if"}, "html: "),
        ({"attachment": "/etc/passwd"}, "attachment"),
    ],
)
async def test_a_config_that_cannot_work_is_refused(change: dict[str, Any], names: str) -> None:
    made = email_runner("smtp://mail.example.com")
    with pytest.raises(DefinitionError, match=names.replace("'", ".")):
        made.compile(BASIC | change)


# --- the server's answers


async def test_a_refused_recipient_does_not_affect_the_others() -> None:
    async with smtp_server() as server:
        server.refused = {"bob@example.com": "550 5.1.1 no such user"}
        result = await send(server, {"cc": "bob@example.com"})
    assert isinstance(result, Answer)
    assert result.message == (
        "sent to ada@example.com: 250 2.0.0 queued as 1; "
        "refused: bob@example.com (550 5.1.1 no such user)"
    )


async def test_a_temporarily_refused_addressee_delays_the_message_for_all() -> None:
    async with smtp_server() as server:
        server.refused = {"ada@example.com": "450 4.2.0 greylisted"}
        result = failed(await send(server, {"cc": "bob@example.com"}))
    assert not result.permanent
    assert "not sent to any recipient yet" in result.message
    assert server.messages == []


async def test_a_temporarily_refused_copy_does_not_delay_the_message() -> None:
    async with smtp_server() as server:
        server.refused = {"bob@example.com": "452 4.2.2 mailbox full"}
        result = await send(server, {"bcc": "bob@example.com"})
    assert isinstance(result, Answer)
    assert "refused: bob@example.com (452 4.2.2 mailbox full)" in (result.message or "")


@pytest.mark.parametrize(
    ("command", "answer", "permanent", "fault"),
    [
        ("RCPT", "550 5.1.1 no such user", True, "enrollment"),
        ("RCPT", "450 4.2.0 greylisted", False, "enrollment"),
        ("RCPT", "452 4.2.2 mailbox full", False, "enrollment"),
        ("RCPT", "550 4.2.0 a passing reason all the same", False, "enrollment"),
        ("RCPT", "450 4.2.1 user receives mail: rate limit", False, "enrollment"),
        ("RCPT", "452 4.5.3 too many recipients", False, "enrollment"),
        ("RCPT", "421 4.3.2 shutting down", False, "server"),
        ("MAIL", "550 5.7.1 sender not allowed", False, "unclear"),
        ("MAIL", "530 5.7.0 authentication required", False, "server"),
        ("MAIL", "451 4.3.0 try later", False, "unclear"),
        ("MAIL", "421 4.3.2 shutting down", False, "server"),
        ("DATA", "554 5.6.0 message refused", True, "enrollment"),
        ("DATA", "552 5.3.4 message size exceeds fixed limit", True, "enrollment"),
        ("DATA", "451 4.3.0 try later", False, "enrollment"),
        ("DATA", "421 4.7.0 try later", False, "enrollment"),
        ("DATA", "454 Throttling failure: Maximum sending rate exceeded.", False, "server"),
        ("MAIL", "450 4.7.1 Error: too much mail from 127.0.0.1", False, "server"),
        ("DATA", "421-4.7.28 unusual rate of mail\r\n421 4.7.28 from you", False, "server"),
        ("DATA", "550 5.4.5 Daily user sending limit exceeded", False, "server"),
    ],
)
async def test_a_refusal_is_attributed_by_its_reply(
    command: str, answer: str, permanent: bool, fault: str
) -> None:
    async with smtp_server() as server:
        server.answers[command] = [answer]
        result = failed(await send(server))
    assert (result.permanent, result.fault) == (permanent, fault)
    assert answer[-8:] in result.message
    assert server.messages == []


async def test_refused_recipients_are_permanent_only_if_all_refusals_are() -> None:
    async with smtp_server() as server:
        server.refused = {"ada@example.com": "550 5.1.1 gone", "bob@example.com": "450 4.2.0 wait"}
        mixed = failed(await send(server, {"cc": "bob@example.com"}))
        server.refused["bob@example.com"] = "553 5.1.3 bad"
        both = failed(await send(server, {"cc": "bob@example.com"}))
    assert not mixed.permanent
    assert both.permanent
    assert "ada@example.com (550 5.1.1 gone), bob@example.com (553 5.1.3 bad)" in both.message


# --- connections


async def test_many_messages_use_few_connections() -> None:
    async with smtp_server() as server, runner(server, limits=Limits(2)) as made:
        program = made.compile(BASIC)
        tasks = [task(n, email=f"a{n}@example.com") for n in range(40)]
        results = await made.run(program, tasks)
        await made.run(program, tasks[:1])
    assert all(isinstance(result, Answer) for result in results)
    assert len(server.messages) == 41
    assert server.connections == 2


@pytest.mark.parametrize("answer", ["drop", "421 4.4.2 idle for too long", "452 4.7.0 enough"])
async def test_a_connection_that_the_server_gave_up_is_replaced_at_once(answer: str) -> None:
    async with smtp_server() as server, runner(server) as made:
        program = made.compile(BASIC)
        await made.run(program, [task(email="a@x.org")])
        server.answers["MAIL"] = [answer]
        (result,) = await made.run(program, [task(email="b@x.org")])
    assert isinstance(result, Answer)
    assert server.connections == 2
    assert len(server.messages) == 2


async def test_a_restart_of_the_server_is_not_noticed() -> None:
    async with smtp_server() as server, runner(server) as made:
        program = made.compile(BASIC)
        await made.run(program, [task(email="a@x.org")])
        server.cut()
        (result,) = await made.run(program, [task(email="b@x.org")])
    assert isinstance(result, Answer)
    assert server.connections == 2


async def test_a_refusal_leaves_the_connection_usable() -> None:
    async with smtp_server() as server, runner(server) as made:
        program = made.compile(BASIC)
        for command in ("MAIL", "RCPT", "DATA"):
            server.answers[command] = ["550 5.0.0 no"]
            failed((await made.run(program, [task(email="a@x.org")]))[0])
        (result,) = await made.run(program, [task(email="b@x.org")])
    assert isinstance(result, Answer)
    assert server.connections == 1


async def test_an_idle_connection_is_closed() -> None:
    async with smtp_server() as server:
        transport = MailTransport(
            f"smtp://{HOST}:{server.port}", connections=1, timeout=5, idle=0.05
        )
        made = email_runner(f"smtp://{HOST}:{server.port}")
        made._transport = transport
        await made.run(made.compile(BASIC), [task(email="a@x.org")])
        assert len(server.open) == 1
        await server.alone.wait()
        await made.close()


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA"])
async def test_a_connection_that_breaks_is_a_passing_failure(command: str) -> None:
    async with smtp_server() as server:
        server.answers[command] = ["drop"]
        result = failed(await send(server))
    assert (result.permanent, result.fault) == (False, "unclear")
    assert result.unknown == (command == "DATA")


async def test_a_server_that_hangs_is_left_after_the_time_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(smtp_dialogue, "FINAL_TIMEOUT", 0.3)
    async with smtp_server() as server, runner(server) as made:
        server.hang = True
        result = failed((await made.run(made.compile(BASIC), [task(email="a@x.org")]))[0])
    assert not result.permanent
    assert "within 0.3 s" in result.message
    assert result.unknown


async def test_cancelled_in_the_middle_the_connection_is_not_used_again() -> None:
    async with smtp_server() as server, runner(server) as made:
        program = made.compile(BASIC)
        server.hang = True
        running = asyncio.create_task(made.run(program, [task(email="a@x.org")]))
        await server.hanging.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        server.hang = False
        (result,) = await made.run(program, [task(email="b@x.org")])
    assert isinstance(result, Answer)
    assert server.connections == 2


async def test_a_port_without_a_listener() -> None:
    async with smtp_server() as server:
        gone = server.port
    made = email_runner(f"smtp://{HOST}:{gone}")
    result = failed((await made.run(made.compile(BASIC), [task(email="a@x.org")]))[0])
    await made.close()
    assert not result.permanent
    assert f"{HOST}:{gone}" in result.message


async def test_a_name_that_does_not_exist() -> None:
    made = email_runner("smtp://mail.invalid", limits=Limits(timeout=5))
    result = failed((await made.run(made.compile(BASIC), [task(email="a@x.org")]))[0])
    assert not result.permanent
    assert "mail.invalid" in result.message


@pytest.mark.parametrize(
    ("greeting", "said"),
    [
        (b"554 no service for you\r\n", "554 no service for you"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP/1.1 400 Bad Request"),
    ],
    ids=["refusal", "other protocol"],
)
async def test_a_server_that_does_not_greet(greeting: bytes, said: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await writer.drain()
        writer.close()

    async with serving(talk) as port:
        made = email_runner(f"smtp://{HOST}:{port}")
        result = failed((await made.run(made.compile(BASIC), [task(email="a@x.org")]))[0])
        await made.close()
    assert not result.permanent
    assert said in result.message


async def test_each_subject_gets_a_language() -> None:
    config = {
        "subject": {"en": "Hello {{data.name}}", "de": "Hallo {{data.name}}"},
        "text": {"default": "Dear", "de": "Lieb {{number data.name}}"},
        "html": "<p>{{data.name}}</p>",
    }
    async with smtp_server() as server:
        await send(server, config, locale="de-AT", name="7")
        await send(server, config, locale="fr", name="7")
        failure = failed(await send(server, config, locale="de", name="x"))
        async with runner(server) as made:
            program = made.compile(BASIC | config, MessageContext(locale="data.user.language"))
            await made.run(program, [task(email="a@x.org", user={"language": "de"}, name="7")])
    assert failure.message.startswith("text.de: ")
    found = [server.parsed(n) for n in range(3)]
    assert [message["Subject"] for message in found] == ["Hallo 7", "Hello 7", "Hallo 7"]
    texts = [message.get_body(("plain",)) for message in found]
    assert [str(text and text.get_content()).strip() for text in texts] == [
        "Lieb 7",
        "Dear",
        "Lieb 7",
    ]


def suppressing(*addresses: str) -> Suppressions:
    async def ask(keys: list[SuppressionKey]) -> set[SuppressionKey]:
        return {("email", address, "*") for address in addresses} & set(keys)

    return Suppressions(ask)


async def test_a_suppressed_recipient_gets_nothing() -> None:
    nobody = suppressing("ada@x.org", "eve@xn--bcher-kva.example")
    config = BASIC | {"to": ["{{data.email}}", "Bob <bob@x.org>"], "cc": "Eve@b\u00fccher.example"}
    async with smtp_server() as server, runner(server, suppressions=nobody) as made:
        (result,) = await made.run(made.compile(config), [task(email="Ada@X.org")])
        assert isinstance(result, Answer)
        assert "suppressed: Ada@X.org, Eve@xn--bcher-kva.example" in str(result.message)
        (envelope,) = server.messages
        assert envelope.rcpt_tos == ["bob@x.org"]
        assert server.parsed()["To"] == "Bob <bob@x.org>"
        assert server.parsed()["Cc"] is None
        # no recipient is left
        (result,) = await made.run(made.compile(BASIC), [task(email="ada@x.org")])
        assert result == Suppressed("not sent to ada@x.org")
        assert len(server.messages) == 1


async def test_a_recipient_is_the_same_in_any_case() -> None:
    config = BASIC | {"to": ["{{data.email}}", "ADA@x.org"], "cc": "ada@X.ORG", "bcc": "Bob@x.org"}
    async with smtp_server() as server, runner(server) as made:
        await made.run(made.compile(config), [task(email="Ada@x.org")])
    assert [one.rcpt_tos for one in server.messages] == [["Ada@x.org", "Bob@x.org"]]
    nobody = suppressing("ada@x.org")
    async with smtp_server() as server, runner(server, suppressions=nobody) as made:
        (result,) = await made.run(made.compile(config), [task(email="Ada@x.org")])
    assert isinstance(result, Suppressed)


@pytest.mark.parametrize("entry", ["a..b@docomo.ne.jp", '"a..b"@docomo.ne.jp'])
@pytest.mark.parametrize("email", ["A..b@docomo.ne.jp", '"a..b"@DOCOMO.ne.jp'])
async def test_a_suppressed_address_may_be_quoted(entry: str, email: str) -> None:
    async with smtp_server() as server, runner(server, suppressions=suppressing(entry)) as made:
        (result,) = await made.run(made.compile(BASIC), [task(email=email, name="Ada")])
    assert isinstance(result, Suppressed), result
    assert server.messages == []


@pytest.mark.parametrize("entry", ["ada@x.org", "ada@x.org\u200b", "\u202aada@x.org\u202c"])
async def test_invisible_characters_hide_no_address(entry: str) -> None:
    """Neither that of a message, nor an entry that an application copies from the same data."""
    email = entry if not entry.isascii() else "\ufeffada@x.org"
    async with smtp_server(utf8=False) as server, runner(server) as made:
        (result,) = await made.run(made.compile(BASIC), [task(email=email, name="Ada")])
        assert isinstance(result, Answer)
        assert [one.rcpt_tos for one in server.messages] == [["ada@x.org"]]
    async with smtp_server() as server, runner(server, suppressions=suppressing(entry)) as made:
        (result,) = await made.run(made.compile(BASIC), [task(email=email, name="Ada")])
    assert result == Suppressed("not sent to ada@x.org")


async def test_an_address_that_does_not_exist_is_suppressed_as_users_write_it() -> None:
    async with smtp_server() as server:
        server.answers["RCPT"] = ["550 5.1.1 User unknown"]
        result = failed(await send(server, email="a..b@docomo.ne.jp"))
    assert [one.address for one in result.undeliverable] == ["a..b@docomo.ne.jp"]


async def test_a_subject_can_be_suppressed() -> None:
    async with smtp_server() as server, runner(server, suppressions=suppressing("user-7")) as made:
        (result,) = await made.run(made.compile(BASIC), [task(email="ada@x.org")])
        assert result == Suppressed("not sent to user-7")
        assert not server.messages


async def test_an_entry_stops_its_topic_alone() -> None:
    async def ask(keys: list[SuppressionKey]) -> set[SuppressionKey]:
        return {("email", "ada@x.org", "marketing")} & set(keys)

    async with smtp_server() as server, runner(server, suppressions=Suppressions(ask)) as made:
        program = made.compile(BASIC)
        about = task(email="Ada@X.org")._replace(topic="marketing")
        assert await made.run(program, [about]) == [
            Suppressed("not sent to Ada@X.org (topic marketing)")
        ]
        for topic in ("invoices", None):
            await made.run(program, [about._replace(topic=topic)])
        assert len(server.messages) == 2


async def test_recipients_that_do_not_exist_are_named_in_the_result() -> None:
    config = BASIC | {"cc": ["bob@x.org", "eve@x.org", "max@x.org"]}
    unknown = "550 5.1.1 <bob@x.org>: Recipient address rejected: User unknown"
    for suppress in (True, False):
        async with smtp_server() as server, runner(server, suppress_bounces=suppress) as made:
            server.refused = {
                "bob@x.org": unknown,
                "eve@x.org": "550 5.7.1 Rejected by policy",
                "max@x.org": "550 User unknown",
            }
            program = made.compile(config)
            (sent,) = await made.run(program, [task(email="ada@x.org")])
            assert isinstance(sent, Answer)
            gone = (Undeliverable("email", "bob@x.org", unknown),) if suppress else ()
            assert sent.undeliverable == gone
            server.refused["ada@x.org"] = "550 5.1.10 Recipient not found"
            (result,) = await made.run(program, [task(email="ada@x.org")])
            assert isinstance(result, Failed)
            named = {one.address for one in result.undeliverable}
            assert named == ({"ada@x.org", "bob@x.org"} if suppress else set())


async def test_bounces_go_to_an_address_with_the_mark_of_the_message() -> None:
    async with smtp_server() as server, runner(server, bounce_address="b+{token}@x.org") as made:
        await made.run(made.compile(BASIC), [task(email="ada@x.org")])
        (envelope,) = server.messages
        mark = server.parsed()["Message-ID"].strip("<").partition("@")[0]
        assert envelope.mail_from == f"b+{mark}@x.org"
        assert server.parsed()["From"] != envelope.mail_from


async def test_a_message_is_refused_for_its_one_recipient() -> None:
    async with smtp_server() as server, runner(server) as made:
        server.answers["DATA"] = ["550 5.1.1 The account does not exist"] * 2
        (result,) = await made.run(made.compile(BASIC), [task(email="ada@x.org")])
        assert isinstance(result, Failed)
        assert [one.address for one in result.undeliverable] == ["ada@x.org"]
        two = made.compile(BASIC | {"cc": "bob@x.org"})
        (result,) = await made.run(two, [task(email="ada@x.org")])
        assert isinstance(result, Failed)  # it does not say which
        assert not result.undeliverable


async def test_suppressions_of_many_messages_are_read_together() -> None:
    asked: list[list[SuppressionKey]] = []

    async def ask(keys: list[SuppressionKey]) -> set[SuppressionKey]:
        asked.append(keys)
        await asyncio.sleep(0.01)
        return {("sms", "+4915112345678", "*")}

    suppressions = Suppressions(ask)
    found = await asyncio.gather(
        *(suppressions.find_suppressed("sms", [f"+49151123456{n}"], None) for n in range(70, 90))
    )
    assert sum(map(len, found)) == 1
    assert 1 <= len(asked) <= 2


async def test_messages_are_paced() -> None:
    async with smtp_server() as server, runner(server, limits=Limits(per_second=50)) as made:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await made.run(made.compile(BASIC), [task(n, email="a@x.org") for n in range(11)])
        assert loop.time() - begin >= 0.2
    assert len(server.messages) == 11
    assert made.limits.timeout > 30


# --- TLS and login


async def test_starttls_and_login(tls: tuple[ssl.SSLContext, Path]) -> None:
    context, cafile = tls
    async with smtp_server(starttls=context, password="päss:wörd") as server:
        url = f"smtp://ada:p%C3%A4ss%3Aw%C3%B6rd@localhost:{server.port}"
        made = email_runner(f"{url}?starttls=always&cafile={cafile}")
        (result,) = await made.run(made.compile(BASIC), [task(email="a@x.org")])
        await made.close()
    assert isinstance(result, Answer)


async def test_tls_from_the_start(tls: tuple[ssl.SSLContext, Path]) -> None:
    context, cafile = tls
    async with smtp_server(tls=context) as server:
        made = email_runner(f"smtps://localhost:{server.port}?cafile={cafile}")
        (result,) = await made.run(made.compile(BASIC), [task(email="a@x.org")])
        await made.close()
    assert isinstance(result, Answer)


@pytest.mark.parametrize("kind", ["tls", "starttls"])
async def test_the_name_of_a_mail_server_may_end_with_a_dot(
    kind: str, tls: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    original = loop.getaddrinfo

    async def found(host: Any, port: int, **options: Any) -> Any:
        return await original(str(host).removesuffix("."), port, **options)

    monkeypatch.setattr(loop, "getaddrinfo", found)
    context, cafile = tls
    scheme, query = ("smtps", "") if kind == "tls" else ("smtp", "starttls=always&")
    is_tls = kind == "tls"
    async with smtp_server(
        tls=context if is_tls else None, starttls=None if is_tls else context
    ) as server:
        made = email_runner(f"{scheme}://localhost.:{server.port}?{query}cafile={cafile}")
        (result,) = await made.run(made.compile(BASIC), [task(email="ada@x.org")])
        await made.close()
    assert isinstance(result, Answer), result


@pytest.mark.parametrize("kind", ["tls", "starttls"])
async def test_an_untrusted_certificate(kind: str, tls: tuple[ssl.SSLContext, Path]) -> None:
    scheme = "smtps" if kind == "tls" else "smtp"
    query = "" if kind == "tls" else "starttls=always"
    results: list[Result] = []
    context: dict[str, Any] = {kind: tls[0]}
    async with smtp_server(**context) as server:
        for verify in ("", "verify=no"):
            options = "&".join(filter(None, [query, verify]))
            made = email_runner(
                f"{scheme}://localhost:{server.port}" + (f"?{options}" if options else "")
            )
            results += await made.run(made.compile(BASIC), [task(email="a@x.org")])
            await made.close()
    assert not failed(results[0]).permanent
    assert "certificate is not trusted" in failed(results[0]).message
    assert isinstance(results[1], Answer)


async def test_a_mail_server_that_demands_a_certificate(tmp_path: Path) -> None:
    context, cafile = certificate(tmp_path)
    with demanding_certificates(context) as port:
        made = email_runner(f"smtps://localhost:{port}?cafile={cafile}")
        result = failed((await made.run(made.compile(BASIC), [task(email="a@x.org")]))[0])
        await made.close()
    assert "certificate required" in result.message
    assert (result.fault, result.unknown, result.cause) == ("server", False, "refused")


async def test_starttls_that_is_not_offered() -> None:
    async with smtp_server() as server:
        result = failed(await send(server, query="?starttls=always"))
        anyway = await send(server, query="?starttls=auto")
    assert not result.permanent
    assert "offers no STARTTLS" in result.message
    assert isinstance(anyway, Answer)


async def test_a_refused_login_shows_no_password() -> None:
    async with smtp_server(password="right") as server:
        made = email_runner(f"smtp://ada:wrong-secret@{HOST}:{server.port}")
        result = failed((await made.run(made.compile(BASIC), [task(email="a@x.org")]))[0])
        await made.close()
    assert not result.permanent
    assert "refuses the login: 535" in result.message
    assert "wrong-secret" not in result.message
    assert "wrong-secret" not in repr(made._transport._server)


async def test_a_login_that_the_server_does_not_offer() -> None:
    async with smtp_server() as server:
        made = email_runner(f"smtp://ada:secret@{HOST}:{server.port}")
        result = failed((await made.run(made.compile(BASIC), [task(email="a@x.org")]))[0])
        await made.close()
    assert not result.permanent
    assert "authentication" in result.message
