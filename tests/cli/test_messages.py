"""preview and send-test: the finished message of a step, outside of any journey."""

from __future__ import annotations

import asyncio
import email
import json
import re
from email.policy import default
from pathlib import Path

import asyncpg
import pytest

from sequencerd.cli import main
from sequencerd.runners.email.page import page
from sequencerd.runners.unsubscribe import UnsubscribeLinks
from tests.helpers.command_line import Command
from tests.helpers.servers import Answer, Request, http_server, scripted, smtp_server

FILE = """
name: trial
timezone: Europe/Berlin
lookup: app.plans
steps:
  - name: welcome
    type: Email
    config:
      from: "Shop <hi@example.com>"
      to: "{{data.email}}"
      cc: boss@example.com
      bcc: archive@example.com
      subject: "Welcome, {{data.name}}"
      text: "{{subject}} {{timezone}} {{external.plan}}"
      html: "<body><p>Hi {{data.name}}</p></body>"
      headers: {List-Id: "<trial.example.com>", X-Campaign: spring}
      listUnsubscribe: "https://example.com/out?{{subject}}"
  - name: text
    type: SMS
    config: {from: "+15005550006", to: "{{data.phone}}", message: "Hi {{data.name}}"}
  - {name: pause, type: WaitForDuration, config: {amount: 1, unit: days}}
  - {name: score, type: Score, config: {}}
"""
DATA = json.dumps({"email": "ada@example.com", "name": "Ada & Co", "phone": "+49 (0)151 123456"})


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, in the present folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEQUENCERD_DATABASE", raising=False)
    (tmp_path / "trial.yaml").write_text(FILE)
    return tmp_path / "trial.yaml"


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Return what a command prints on standard output, or on standard error if it fails."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, errors = capsys.readouterr()
    assert ended.value.code == code, out + errors
    return errors if code else out


def test_a_preview_is_the_message_as_it_would_be_sent(
    trial: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data", DATA, "--subject", "ada", "--lookup", '{"plan": "pro"}')
    run(capsys, "preview", "trial.yaml", "welcome", *options, "-o", "welcome.eml")
    message = email.message_from_bytes(Path("welcome.eml").read_bytes(), policy=default)
    assert not message.defects
    assert message["To"] == "ada@example.com"
    assert message["Cc"] == "boss@example.com"
    assert message["Bcc"] is None
    assert message["Subject"] == "Welcome, Ada & Co"
    assert message["List-Unsubscribe"] == "<https://example.com/out?ada>"
    text, html = message.iter_parts()
    assert text.get_content().strip() == "ada Europe/Berlin pro"
    assert "<p>Hi Ada &amp; Co</p>" in html.get_content()
    printed = run(capsys, "preview", "trial.yaml", "trial", "welcome", *options)
    assert printed.splitlines()[:2] == ["From: Shop <hi@example.com>", "To: ada@example.com"]
    shown = run(capsys, "preview", "trial.yaml", "welcome", "--html", *options)
    assert "<b>Subject:</b> Welcome, Ada &amp; Co</div>" in shown
    assert "<p>Hi Ada &amp; Co</p>" in shown
    (trial.parent / "many.yaml").write_text(
        f"{FILE}\n---\nname: other\nsteps: [{{name: a, type: Score}}]"
    )
    assert run(capsys, "preview", "many.yaml", "trial", "text", "--data", DATA) == (
        "From: +15005550006\nTo: +49151123456\nSegments: 1 (GSM-7)\n\nHi Ada & Co\n"
    )


def test_a_preview_in_a_language(trial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = FILE.replace('"Welcome, {{data.name}}"', "{en: Welcome, de: Willkommen}")
    text = text.replace('"Hi {{data.name}}"', "{en: Hi, de: Tach}")
    for locale in ("data.locale", "data.user.language", "external.language"):
        trial.write_text(text.replace("timezone:", f"locale: {locale}\ntimezone:"))
        options = ("--data", DATA, "--locale", "de-AT")
        assert "Subject: Willkommen" in run(capsys, "preview", "trial.yaml", "welcome", *options)
        assert "\n\nTach\n" in run(capsys, "preview", "trial.yaml", "text", *options)
        assert "\n\nHi\n" in run(capsys, "preview", "trial.yaml", "text", "--data", DATA)


@pytest.mark.parametrize(
    "command",
    [
        ("preview", "trial.yaml", "welcome"),
        ("simulate", "trial.yaml", "--runner", "SMS=next", "--runner", "Score=next"),
    ],
    ids=lambda command: command[0],
)
def test_a_link_outside_of_a_journey_unsubscribes_from_the_topic_of_the_message(
    command: tuple[str, ...],
    trial: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = f'[unsubscribe]\nurl = "https://mail.example.com"\nkeys = ["{"k" * 40}"]\n'
    (trial.parent / "s.toml").write_text(settings)
    monkeypatch.setenv("SEQUENCERD_CONFIG", "s.toml")
    text = FILE.replace('      listUnsubscribe: "https://example.com/out?{{subject}}"\n', "")
    text = text.replace("{{external.plan}}", "{{unsubscribe_url}}")
    trial.write_text(text.replace("timezone:", "topic: offers\ntimezone:"))
    printed = run(capsys, *command, "--data", DATA)
    found = re.search(r"https://mail\.example\.com/unsubscribe/([\w.-]+)", printed)
    assert found is not None
    subscription = UnsubscribeLinks("https://mail.example.com", ["k" * 40]).read(found[1])
    assert subscription is not None
    assert subscription.topic == "offers"


def test_why_there_is_no_preview(trial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ("trial.yaml welcom", "has no step 'welcom'; did you mean 'welcome'?"),
        ("trial.yaml pause", "trial/pause is a WaitForDuration, which sends no message"),
        ("trial.yaml score", "trial/score is a Score, which sends no message"),
        ("trial.yaml trail welcome", "sequence 'trail' does not exist"),
        ("trial.yaml welcome", "trial/welcome cannot be sent: to: no address"),
        ("trial.yaml welcome --data 7", "--data must be a JSON object"),
        ("trial.yaml welcome --timezone X", "--timezone: "),
        ("trial.yaml welcome --enrollment 7 --data {}", "--data does not go with --enrollment"),
        ("nowhere.yaml welcome", "nowhere.yaml:1: error: cannot be read"),
    ):
        errors = run(capsys, "preview", *arguments.split(), code=2 if "--" in arguments else 1)
        assert words in errors, errors
    options = ("preview", "trial.yaml", "welcome", "--data", DATA)
    assert "nowhere/x.eml" in run(capsys, *options, "-o", "nowhere/x.eml", code=1)
    typo = FILE.replace("{{data.name}}</p>", "{{data.nmae}}</p>")
    trial.write_text(typo)
    with pytest.raises(SystemExit):
        main(options)
    assert "trial/welcome: html: no data has the path 'data.nmae'" in capsys.readouterr().err


def test_a_page_shows_inline_images_and_texts_without_html() -> None:
    image = (
        b"Subject: A <b>\r\nContent-Type: multipart/related; boundary=x\r\n\r\n--x\r\n"
        b"Content-Type: text/html\r\n\r\n<html><head></head><body><img src='cid:logo'>"
        b"<img src=cid:none></body></html>\r\n--x\r\nContent-Type: image/png\r\n"
        b"Content-ID: <logo>\r\nContent-Transfer-Encoding: base64\r\n\r\naGk=\r\n--x--\r\n"
    )
    shown = page(image)
    assert "<head><meta charset=" in shown
    assert "<body><div" in shown
    assert "src='data:image/png;base64,aGk='" in shown
    assert "<img src=cid:none>" in shown
    assert "A &lt;b&gt;</div>" in shown
    assert page(b"Subject: x\r\n\r\na <b>\r\n").endswith("<pre>a &lt;b&gt;\r\n</pre>\n")


async def test_a_test_is_sent_without_an_enrollment(
    sequencerd: Command, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    (tmp_path / "trial.yaml").write_text(
        FILE.replace("  - {name: score, type: Score, config: {}}\n", "")
    )
    sequencerd.variables |= {
        "SEQUENCERD_SMS_ACCOUNT_SID": "AC1",
        "SEQUENCERD_SMS_AUTH_TOKEN": "secret",
    }
    await asyncio.to_thread(sequencerd, "apply", "trial.yaml")
    enrolled = await asyncio.to_thread(
        sequencerd, "enroll", "trial", "ada", "--data", DATA, "--step", "pause", "--json"
    )
    id_ = str(json.loads(enrolled)["id"])
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('email', 'me@example.com')"
    )
    before = await _everything(connection)
    async with smtp_server() as server:
        sequencerd.variables["SEQUENCERD_SMTP_URL"] = f"smtp://127.0.0.1:{server.port}"
        sequencerd.variables["SEQUENCERD_EMAIL_LIST_UNSUBSCRIBE"] = "https://example.com/all"
        said = await asyncio.to_thread(
            sequencerd,
            "send-test",
            "trial",
            "welcome",
            "--to",
            "me@example.com",
            "--enrollment",
            id_,
        )
        assert said.startswith("sent to me@example.com: 250")
        (envelope,) = server.messages
        assert envelope.rcpt_tos == ["me@example.com"]
        message = server.parsed()
        assert message["Subject"] == "[Test] Welcome, Ada & Co"
        assert message["X-Sequencerd-Test"] == "true"
        assert message["X-Campaign"] == "spring"
        assert not [name for name in message if name.startswith("List-")]
        assert b"ada Europe/Berlin" in envelope.content
        server.refused["me@example.com"] = "550 5.1.1 no such user"
        await asyncio.to_thread(
            sequencerd, "send-test", "trial", "welcome", "--to", "me@example.com", code=1
        )
        assert "550 5.1.1 no such user" in sequencerd.errors
    assert await _everything(connection) == before
    preview = ("preview", "trial", "welcome", "--enrollment", id_)
    assert "To: ada@example.com" in await asyncio.to_thread(sequencerd, *preview)
    preview = ("preview", "trial.yaml", "welcome", "--enrollment", id_)
    assert "To: ada@example.com" in await asyncio.to_thread(sequencerd, *preview)
    await asyncio.to_thread(
        sequencerd, "preview", "trial", "welcome", "--enrollment", "999", code=1
    )
    assert "enrollment 999 does not exist" in sequencerd.errors


async def _everything(connection: asyncpg.Connection) -> object:
    """What a journey would have changed."""
    return [
        await connection.fetch(f"SELECT t::text FROM sequencer.{table} AS t")
        for table in ("enrollments", "events", "suppressions")
    ]


async def test_a_test_shows_no_secret(
    trial: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers repeat the login that they were sent, decoded or not, and what others were sent."""
    (trial.parent / "s.toml").write_text('[runners.Score]\nurl = "http://localhost:1"\n')
    monkeypatch.setenv("SEQUENCERD_CONFIG", "s.toml")
    monkeypatch.setenv("SEQUENCERD_SMS_ACCOUNT_SID", "AC1")
    monkeypatch.setenv("SEQUENCERD_SMS_AUTH_TOKEN", "sms/token")
    status = 201

    async def echo(request: Request) -> Answer:
        said = f"{request.headers['authorization']}, sms/token, sms%2Ftoken, mail-passw0rd"
        return Answer(status, json.dumps({"sid": said, "message": said}).encode())

    refusal: list[str | bytes | None] = ["535 not mail-passw0rd, sms/token"]
    async with (
        http_server(echo) as web,
        scripted(answers={"AUTH": refusal}, extensions=["AUTH PLAIN"]) as mail,
    ):
        monkeypatch.setenv("SEQUENCERD_SMS_BASE_URL", web.url)
        url = mail.url.replace("//", "//ada:mail-passw0rd@")
        monkeypatch.setenv("SEQUENCERD_SMTP_URL", url)
        text = ("send-test", "trial.yaml", "text", "--data", DATA, "--to", "+15005550009")
        sent = await asyncio.to_thread(run, capsys, *text)
        assert sent == "sent to +15005550009: Basic ***, ***, ***, *** 201\n"
        status = 400
        refused = await asyncio.to_thread(run, capsys, *text, code=1)
        assert "refuses +15005550009: 400 Basic ***, ***, ***, ***\n" in refused
        welcome = ("send-test", "trial.yaml", "welcome", "--data", DATA, "--to", "me@example.com")
        refused = await asyncio.to_thread(run, capsys, *welcome, code=1)
        assert "refuses the login: 535 not ***, ***\n" in refused


async def test_a_test_by_sms_follows_the_settings(
    trial: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def respond(_: Request) -> Answer:
        return Answer(201, b'{"sid": "SM1", "status": "queued"}')

    (trial.parent / "s.toml").write_text('[runners.Score]\nurl = "http://localhost:1"\n')
    monkeypatch.setenv("SEQUENCERD_CONFIG", "s.toml")
    send = ("send-test", "trial.yaml", "text", "--data", DATA, "--to")
    failing = await asyncio.to_thread(run, capsys, *send, "+15005550009", code=1)
    assert "set sms.account_sid" in failing
    monkeypatch.setenv("SEQUENCERD_SMS_ACCOUNT_SID", "AC1")
    monkeypatch.setenv("SEQUENCERD_SMS_AUTH_TOKEN", "secret")
    async with http_server(respond) as server:
        monkeypatch.setenv("SEQUENCERD_SMS_BASE_URL", server.url)
        said = await asyncio.to_thread(run, capsys, *send, "+1 500 555-0009")
        assert said == "sent to +15005550009: SM1 queued\n"
        assert server.requests[0].body.endswith(b"Body=%5BTest%5D+Hi+Ada+%26+Co")
        assert b"To=%2B15005550009" in server.requests[0].body
        monkeypatch.setenv("SEQUENCERD_SMS_ONLY_TO", "+49*")
        failing = await asyncio.to_thread(run, capsys, *send, "+15005550009", code=1)
        assert "not sent to +15005550009: not in sms.only_to" in failing
        assert len(server.requests) == 1
    failing = await asyncio.to_thread(run, capsys, *send, "me", code=2)
    assert "--to: 'me' is not an international number" in failing
    failing = await asyncio.to_thread(
        run, capsys, "send-test", "trial.yaml", "welcome", "--to", "{{data.email}}", code=2
    )
    assert "--to: '{{data.email}}' is not an address" in failing
