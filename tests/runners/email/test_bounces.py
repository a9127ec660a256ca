"""What bounces and abuse reports say, as mail servers write them."""

from __future__ import annotations

import base64
import quopri

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.runners.email.bounces import MAX_MARKS, MessageMark, read_report
from sequencerd.runners.email.smtp import read_sent

MARK = MessageMark(7, 1, "f66a91ef9a4ab3d4")
TOKEN = "7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1"

DSN = """\
Return-Path: <>
From: MAILER-DAEMON@mx.example.org (Mail Delivery System)
To: {to}
Subject: Undelivered Mail Returned to Sender
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status; boundary="b"

--b
Content-Type: text/plain

I'm sorry to have to inform you that your message could not be delivered.

--b
Content-Type: message/delivery-status

Reporting-MTA: dns; mx.example.org

{recipient}
--b
Content-Type: text/rfc822-headers

From: shop@example.com
To: ada@example.org
Message-ID: <{token}@sequencerd.example.com>

--b--
"""


def dsn(recipient: str, to: str = "shop@example.com", token: str = TOKEN) -> bytes:
    """A delivery status notification about one recipient."""
    return DSN.format(recipient=recipient, to=to, token=token).encode()


def failed(status: str, diagnostic: str = "", address: str = "ada@example.org") -> str:
    """The group of fields of a recipient."""
    return (
        f"Final-Recipient: rfc822; {address}\nAction: failed\nStatus: {status}\n"
        + f"Diagnostic-Code: {diagnostic}\n" * bool(diagnostic)
    )


@pytest.mark.parametrize(
    "recipient",
    [
        failed("5.1.1"),
        "Action: failed\nFinal-Recipient: rfc822; ada@example.org\nStatus: 5.1.1\n",
        failed("5.1.1 (bad destination mailbox address)"),
        failed("5.1.1").replace("Action: failed", "Action: failed (permanent failure)"),
        failed("5.1.1", "smtp; 550 5.1.1 <ada@example.org>: User unknown in virtual table"),
        failed("5.0.0", "smtp; 550-5.1.1 The email account does not exist."),
        failed("5.1.10", "smtp;550 5.1.10 RESOLVER.ADR.RecipientNotFound; not found"),
        failed("5.1.1", "smtp; 550 ada is not known here"),
        failed("5.1.2", "x-unix; host unknown").replace("Action: failed", "action: Failed"),
    ],
)
def test_an_address_that_does_not_exist(recipient: str) -> None:
    report = read_report(dsn(recipient))
    assert report.kind == "bounce"
    assert report.marks == (MARK,)
    assert [one.address for one in report.dead] == ["ada@example.org"]


@pytest.mark.parametrize(
    "recipient",
    [
        failed("5.1.1").replace("failed", "delayed"),
        failed("5.1.1").replace("failed", "relayed"),
        failed("4.4.1", "smtp; connection timed out"),
        failed("4.1.1"),
        failed("5.2.2", "smtp; 552 5.2.2 mailbox full"),
        failed("5.7.1", "smtp; 550 5.7.1 rejected by policy"),
        failed("5.1.1", "smtp; 550 5.7.1 blocked"),
        failed("5.1.1", "smtp; 550 Blocked as spam"),
        failed("5.0.0", "smtp; 550 User unknown"),
        failed("5.1.1", address="nobody"),
        "",
    ],
)
def test_reports_that_do_not_concern_the_address(recipient: str) -> None:
    assert read_report(dsn(recipient)).dead == ()


def test_a_forwarded_message_names_its_original_recipient_too() -> None:
    fields = "Original-Recipient: rfc822;ada@example.org\n" + failed("5.1.1", address="a@b.org")
    assert [one.address for one in read_report(dsn(fields)).dead] == ["ada@example.org", "a@b.org"]


def test_several_recipients_are_judged_one_by_one() -> None:
    fields = failed("5.1.1") + "\n" + failed("5.7.1", address="b@x.org")
    fields += "\n" + failed("5.1.1", address="c@x.org")
    found = [one.address for one in read_report(dsn(fields)).dead]
    assert found == ["ada@example.org", "c@x.org"]


def test_the_mark_of_the_bounce_address() -> None:
    to = f"bounces+{TOKEN.upper()}@example.com"
    assert read_report(dsn(failed("5.1.1"), to, token="hidden")).marks == (MARK,)
    assert read_report(dsn(failed("5.1.1"), token="hidden")).marks == ()


FEEDBACK = """\
From: <abusedesk@provider.example>
To: abuse@example.com
Subject: FW: Buy now
MIME-Version: 1.0
Content-Type: multipart/report; report-type=feedback-report; boundary="b"

--b
Content-Type: text/plain

This is an email abuse report.

--b
Content-Type: message/feedback-report

Feedback-Type: {kind}
User-Agent: SomeGenerator/1.0
Version: 1
{recipient}
--b
Content-Type: message/rfc822
Content-Disposition: inline

From: <shop@example.com>
To: <redacted@provider.example>
Message-ID: <7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1@sequencerd.example.com>

Buy now

--b--
"""


@pytest.mark.parametrize(
    ("kind", "recipient", "dead"),
    [
        ("abuse", "Original-Rcpt-To: <ada@example.org>\n", ["ada@example.org"]),
        ("fraud", "", [None]),
        ("abuse", "Original-Rcpt-To: 6c9ad4\n", [None]),  # redacted
        ("not-spam", "Original-Rcpt-To: <ada@example.org>\n", []),
        ("auth-failure", "Original-Rcpt-To: <ada@example.org>\n", []),
    ],
)
def test_abuse_reports(kind: str, recipient: str, dead: list[str | None]) -> None:
    report = read_report(FEEDBACK.format(kind=kind, recipient=recipient).encode())
    assert [one.address for one in report.dead] == dead
    assert report.kind == "complaint"
    assert report.marks == (MARK,)


MICROSOFT = """\
From: <staff@hotmail.com>
Subject: complaint about message from 192.0.2.1
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="b"

--b
Content-Type: message/rfc822

X-HmXmrOriginalRecipient: ada@hotmail.com
X-Reporter-IP: 192.0.2.22
From: <shop@example.com>
To: <ada@hotmail.com>
Message-ID: <7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1@sequencerd.example.com>

Buy now

--b--
"""


def test_abuse_reports_of_microsoft() -> None:
    report = read_report(MICROSOFT.encode())
    assert [one.address for one in report.dead] == ["ada@hotmail.com"]
    assert (report.kind, report.marks) == ("complaint", (MARK,))
    assert read_report(MICROSOFT.replace("staff@", "eve@").encode()).dead == ()
    assert read_report(MICROSOFT.replace("X-HmXmr", "X-").encode()).dead == ()


QMAIL = """\
Return-Path: <>
From: MAILER-DAEMON@mx.example.org
To: shop@example.com
Subject: failure notice

Hi. This is the qmail-send program at mx.example.org.
I'm afraid I wasn't able to deliver your message to the following addresses.
This is a permanent error; I've given up. Sorry it didn't work out.

<ada@example.org>:
Sorry, no mailbox here by that name. (#5.1.1)

<bob@example.org>:
192.0.2.1 does not like recipient.
Remote host said: 550 5.7.1 Blocked (#5.1.1)
Giving up on 192.0.2.1.

--- Below this line is a copy of the message.

Return-Path: <shop@example.com>
Message-ID: <7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1@sequencerd.example.com>
To: eve@example.org

Write to max@example.org: 550 5.1.1
"""
EXIM = """\
From: Mail Delivery System <Mailer-Daemon@mx.example.org>
To: shop@example.com
Subject: Mail delivery failed: returning message to sender

This message was created automatically by mail delivery software.

A message that you sent could not be delivered to one or more of its
recipients. This is a permanent error. The following address(es) failed:

  ada@example.org
    host mx.example.org [192.0.2.1]
    SMTP error from remote mail server after RCPT TO:<ada@example.org>:
    550 5.1.1 User unknown

------ This is a copy of the message, including all the headers. ------

Message-ID: <7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1@sequencerd.example.com>
"""


@pytest.mark.parametrize("text", [QMAIL, EXIM])
def test_plain_bounces(text: str) -> None:
    report = read_report(text.encode())
    assert {one.address for one in report.dead} == {"ada@example.org"}
    assert report.marks == (MARK,)


def test_a_reply_that_quotes_a_bounce_is_no_bounce() -> None:
    answer = EXIM.replace("Mail Delivery System <Mailer-Daemon@", "Ada <ada@")
    assert read_report(answer.encode()).dead == ()
    assert read_report(EXIM.replace("5.1.1 ", "").encode()).dead == ()


def test_a_large_message_is_read_in_part() -> None:
    raw = dsn(failed("5.1.1")).replace(b"--b--", b"x" * 2_000_000 + b"\n--b--")
    assert read_report(raw).dead


def encoded(raw: bytes, encoding: str, content_type: str) -> bytes:
    """The same message with one of its parts encoded."""
    head = f"Content-Type: {content_type}\n\n".encode()
    before, _, rest = raw.partition(head)
    content, end, after = rest.partition(b"\n--b")
    encode = {"base64": base64.encodebytes, "quoted-printable": quopri.encodestring}[encoding]
    content = encode(content + b"\n")
    head = head.replace(b"\n\n", f"\nContent-Transfer-Encoding: {encoding}\n\n".encode())
    return before + head + content + end + after


@pytest.mark.parametrize("encoding", ["base64", "quoted-printable"])
@pytest.mark.parametrize("kind", ["message/delivery-status", "message/global-delivery-status"])
def test_reports_with_an_encoding(encoding: str, kind: str) -> None:
    raw = dsn(failed("5.1.1") + "X-Long: " + "x" * 100 + "\n")
    raw = raw.replace(b"message/delivery-status", kind.encode())
    assert read_report(encoded(raw, encoding, kind)) == read_report(raw)
    assert [one.address for one in read_report(raw).dead] == ["ada@example.org"]


def test_a_returned_message_with_an_encoding_identifies_itself() -> None:
    raw = dsn(failed("5.1.1")).replace(b"text/rfc822-headers", b"message/rfc822")
    report = read_report(encoded(raw, "base64", "message/rfc822"))
    assert report.marks == (MARK,)


@pytest.mark.parametrize(
    ("recipient", "address"),
    [
        ("utf-8; josé@example.org", "josé@example.org"),
        (r"utf-8; jos\x{E9}@example.org", "josé@example.org"),
        ('rfc822; "a..b"@example.org', '"a..b"@example.org'),
        ('rfc822; "a b"@example.org', '"a b"@example.org'),
        ("rfc822; a..b@example.org", "a..b@example.org"),
        ("rfc822; 'ada@example.org'", "ada@example.org"),
        ("RFC822;<ada@example.org.>", "ada@example.org"),
        ("rfc822; o'brien@example.org", "o'brien@example.org"),
        ("ada@example.org", "ada@example.org"),
    ],
)
def test_how_reports_write_addresses(recipient: str, address: str) -> None:
    fields = f"Final-Recipient: {recipient}\nAction: failed\nStatus: 5.1.1\n"
    assert [one.address for one in read_report(dsn(fields)).dead] == [address]


@pytest.mark.parametrize(
    ("status", "diagnostic"),
    [
        ("5.1.1", "550 5.1.1 unknown; rejecting"),  # without the type
        (
            "5.1.0",
            "smtp; 5.1.0 - Unknown address error 550-'5.1.1 <ada@example.org>... User unknown'",
        ),
        ("5.0.0", "smtp; 511 sorry, no mailbox here by that name (#5.1.1 - chkuser)"),
        ("5.0.0", "smtp;550 #5.1.1 RESOLVER.ADR.RecipNotFound; not found"),
        ("5.1.2; Host unknown", ""),
    ],
)
def test_what_other_servers_said_in_words_of_their_own(status: str, diagnostic: str) -> None:
    report = read_report(dsn(failed(status, diagnostic)))
    assert [one.address for one in report.dead] == ["ada@example.org"]


def test_groups_of_fields_may_be_separated_by_blanks() -> None:
    fields = failed("5.7.1", address="b@x.org") + " \t\n" + failed("5.1.1", address="c@x.org")
    assert [one.address for one in read_report(dsn(fields)).dead] == ["c@x.org"]


def test_groups_of_fields_may_follow_each_other() -> None:
    fields = (
        failed("5.1.1") + failed("5.7.1", address="b@x.org") + failed("5.1.1", address="c@x.org")
    )
    found = [one.address for one in read_report(dsn(fields)).dead]
    assert found == ["ada@example.org", "c@x.org"]


@pytest.mark.parametrize("raw", [dsn(failed("5.1.1")), dsn(failed("5.0.0", "smtp; 550 5.1.1 no"))])
@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_a_report_with_other_line_ends(raw: bytes, end: bytes) -> None:
    report = read_report(raw.replace(b"\n", end))
    assert [one.address for one in report.dead] == ["ada@example.org"]
    assert report.marks == (MARK,)


OPENSMTPD = DSN.replace(
    "I'm sorry to have to inform you that your message could not be delivered.",
    """\
    An error has occurred while attempting to deliver a message for
    the following list of recipients:

ada@example.org: 550 5.1.1 <ada@example.org>: Recipient address rejected: User unknown
bob@example.org: 552 5.2.2 <bob@example.org>: Recipient address rejected: Mailbox full
eve@example.org: 550 5.1.1 User unknown

    Below is a copy of the original message:""",
)


def test_a_report_without_reasons_is_explained_by_its_text() -> None:
    """As by OpenSMTPD."""
    fields = failed("5.0.0") + "\n" + failed("5.0.0", address="bob@example.org")
    raw = OPENSMTPD.format(recipient=fields, to="shop@example.com", token=TOKEN).encode()
    assert [one.address for one in read_report(raw).dead] == ["ada@example.org"]
    explained = raw.replace(b"5.0.0", b"5.7.1")
    assert read_report(explained).dead == ()
    explained = raw.replace(b"Status: 5.0.0\n", b"Status: 5.0.0\nDiagnostic-Code: smtp; 550 no\n")
    assert read_report(explained).dead == ()
    assert read_report(raw.replace(b"Action: failed", b"Action: delayed")).dead == ()


SENDMAIL = """\
Return-Path: <MAILER-DAEMON>
From: System Administrator <admin@mx.example.org>
To: shop@example.com
Subject: Returned mail: see transcript for details

   ----- The following addresses had permanent fatal errors -----
<ada@example.org>
    (reason: 550 5.1.1 <ada@example.org>... User unknown)

   ----- Transcript of session follows -----
... while talking to mx.example.org.:
>>> DATA
<<< 550 5.1.1 <ada@example.org>... User unknown
550 5.1.1 <ada@example.org>... User unknown
<<< 503 5.0.0 Need RCPT (recipient)

   ----- Original message follows -----

Return-Path: <shop@example.com>
Message-ID: <7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1@sequencerd.example.com>
"""
EXCHANGE = """\
From: postmaster@example.org
Subject: Unzustellbar: Angebot
Content-Type: text/plain; charset="iso-8859-1"
Content-Transfer-Encoding: quoted-printable

Folgende(r) Empf=E4nger konnte(n) nicht erreicht werden:

      'ada@example.org' am 28.11.2026 10:00
            Der E-Mail-Empf=E4nger wurde nicht gefunden.
            <mx.example.org #5.1.1 smtp;550 5.1.1 User unknown>

Message-ID: <7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1@sequencerd.example.com>
"""
HTML = """\
From: Mail Delivery Subsystem <mailer-daemon@mx.example.org>
Subject: Undeliverable
Content-Type: multipart/mixed; boundary="b"

--b
Content-Type: text/html; charset=utf-8

<p><a href="mailto:ada@example.org">ada@example.org</a></p>
<p>The response was: <br>550 <b>5.1.10</b> RESOLVER.ADR.RecipientNotFound</p>

--b
Content-Type: message/rfc822

To: ada@example.org
Message-ID: <7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1@sequencerd.example.com>

Hello

--b--
"""

CHINESE = """\
From: PostMaster@mail.example.org
Subject: =?utf-8?b?6YCA5L+h?=
Content-Type: text/plain; charset=gb18030
Content-Transfer-Encoding: base64

{text}

Message-ID: <7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1@sequencerd.example.com>
""".format(
    text=base64.encodebytes(
        "收件人（ada@example.org）的地址不存在，邮件无法送达。\n"
        "对方服务器返回：550 5.1.1 User unknown\n".encode("gb18030")
    ).decode()
)


@pytest.mark.parametrize(
    "text",
    [
        SENDMAIL,
        EXCHANGE,
        HTML,
        CHINESE,
        QMAIL.replace("(#5.1.1)", "(#5.1.1 - chkuser)"),
        EXIM.replace("550 5.1.1", "550 #5.1.1"),
    ],
)
def test_plain_bounces_of_other_systems(text: str) -> None:
    report = read_report(text.encode())
    assert {one.address for one in report.dead} == {"ada@example.org"}
    assert report.marks == (MARK,)


def test_a_server_that_does_not_relay_knows_no_addresses() -> None:
    text = "550 5.1.2 Relay not allowed."
    assert read_report(dsn(failed("5.1.2", f"smtp; {text}"))).dead == ()
    assert read_report(EXIM.replace("550 5.1.1 User unknown", text).encode()).dead == ()


@pytest.mark.parametrize(
    "level",
    [
        "Content-Type: multipart/mixed; boundary=b{n}\n\n--b{n}\n",
        "Content-Type: message/rfc822\n\n",
        "Content-Type: message/delivery-status\n\n",
    ],
)
def test_a_message_that_is_nested_deeply_is_no_report(level: str) -> None:
    nested = "".join(level.format(n=n) for n in range(15_000))
    assert read_report((nested + DSN).encode()).dead == ()


@pytest.mark.parametrize("piece", ["a", '\\"', "1.", "a@b.org ", "a@b.org 5.1.1\n"])
def test_no_message_takes_long(piece: str) -> None:
    """Anyone can write to the address of bounces; these took from minutes to an hour."""
    head = EXIM.partition("\n\n")[0] + '\n\n"'
    read_report((head + piece * (1_000_000 // len(piece))).encode())


def test_few_of_the_marks_in_a_message_are_looked_up() -> None:
    """Each takes a query, and a megabyte has room for twenty thousand."""
    others = "".join(f"{number}.1.{'0' * 32}\n" for number in range(1000, 20_000))
    report = read_report(dsn(failed("5.1.1")) + others.encode())
    assert MARK in report.marks
    assert len(report.marks) == MAX_MARKS


PIECES = [
    DSN,
    QMAIL,
    FEEDBACK,
    "\n\n",
    "--b\n",
    "Content-Type: message/delivery-status\n",
    "Content-Transfer-Encoding: base64\n",
    "=?x?q?y?=",
    "\x00",
    "charset=nonsense",
    "charset=idna",
    "Content-Type: message/rfc822\n",
    TOKEN,
    "Action: failed\n",
    "Status: 5.1.1\n",
    "Final-Recipient: rfc822;a@b.org\n",
]


@given(st.lists(st.sampled_from([piece.encode() for piece in PIECES]) | st.binary(max_size=40)))
def test_no_incoming_message_raises(pieces: list[bytes]) -> None:
    read_report(b"".join(pieces))


@pytest.mark.parametrize(
    ("message", "addresses"),
    [
        ("sent to a@x.org: 250 2.0.0 queued", ["a@x.org"]),
        (
            "sent to a@x.org, b@x.org and 3 more: 250 ok; refused: c@x.org (550 no)",
            ["a@x.org", "b@x.org"],
        ),
        ("attempt 1 came too late to move it: next: sent to a@x.org: 250 ok", ["a@x.org"]),
        ("not sent to a@x.org", []),
        ("sent to +49151123456: SM1 queued", []),
        ('sent to "a..b"@x.org, "a, b: c"@x.org: 250 ok', ['"a..b"@x.org', '"a, b: c"@x.org']),
        ('sent to "a \\" b"@x.org and 2 more: 250 ok', ['"a \\" b"@x.org']),
    ],
)
def test_recipients_in_the_history(message: str, addresses: list[str]) -> None:
    assert read_sent(message) == addresses
