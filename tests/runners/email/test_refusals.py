"""What mail servers say, and what it means: refusals.txt has the texts."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from sequencerd.runners.email.refusals import (
    LONG_WAIT,
    SHORT_WAIT,
    RefusalMeaning,
    Stage,
    read_refusal,
    says_unknown,
)

STAGES: dict[str, Stage] = {
    "connection": "connection",
    "sender": "sender",
    "recipient": "recipient",
    "message": "message",
}


def texts() -> Iterator[tuple[RefusalMeaning, Stage, int, str]]:
    """What refusals.txt has: the meaning, the stage, the code and the text."""
    meaning = None
    lines = Path(__file__).with_name("refusals.txt").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("["):
            meaning = RefusalMeaning(line.strip("[]"))
        elif meaning and line:
            stage, code, text = line.split(maxsplit=2)
            yield meaning, STAGES[stage], int(code), text.replace(r"\n", "\n")


@pytest.mark.parametrize(("meaning", "stage", "code", "text"), list(texts()))
def test_refusals_are_classified(
    meaning: RefusalMeaning, stage: Stage, code: int, text: str
) -> None:
    assert read_refusal(code, text, stage).meaning is meaning


@pytest.mark.parametrize(
    "text",
    [
        "5.1.1 <x@y.org>: Recipient address rejected: User unknown in relay recipient table",
        "5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient not found by SMTP address lookup",
        "5.1.2 The domain y.org was not found",
        "5.1.6 The mailbox has moved",
        "5.1.1 The account does not exist.\n5.1.1 See https://example.com/spam-policy",
        "sorry, no mailbox here by that name (#5.1.1)",
        "sorry, no mailbox here by that name (#5.1.1 - chkuser)",
        "#5.1.1 User unknown",
        "[5.1.1] no such user",
        "5.1.1 User ada (ada@example.org) not listed in Domino Directory",
        "5.1.1 <ada@example.org>: Empfängeradresse verweigert: Benutzer unbekannt",
        "5.1.1 Adresse d au moins un destinataire invalide. Invalid recipient.",
        "5.1.2 DNS Error: DNS type 'mx' lookup of example.org responded with code NXDOMAIN",
        "5.1.1 unknown user; check the address and try again",
    ],
)
def test_an_address_that_does_not_exist(text: str) -> None:
    assert says_unknown(text)


@pytest.mark.parametrize(
    "text",
    [
        "User unknown",  # servers say so to what they block, too
        "No such user here",
        "5.1.3 bad syntax",
        "5.1.0 Address rejected",
        "5.2.1 The mailbox is disabled",
        "5.2.2 The mailbox is full",
        "5.3.4 The message is too large",
        "5.4.1 Recipient address rejected: Access denied",
        "5.6.1 The message cannot be read",
        "5.7.1 User unknown",
        "5.7.26 Unauthenticated email is not accepted",
        "4.1.1 The mailbox is being moved",
        "5.1.1 Rejected as spam",
        "5.1.1 Your network is on a blocklist",
        "5.1.1 Rejected by the recipient's policy",
        "5.1.1 Sender address rejected",
        "5.1.2 Relay not allowed.",
        "5.1.1 We do not relay",
        "5.1.1 <ada@example.com> - 203.0.113.222 has sent to too many recipients this hour. IB607",
        "5.1.1 <ada@example.com>: too many messages from your network",
        "5.1.2 Relaying denied",
        "#5.1.0 Address rejected.",
        "5.1.1 mailbox full",
        "5.1.1 user over quota",
        "5.1.1 greylisted",
        "5.1.1 The message is larger than the maximum size of the mailbox",
        "5.1.1 mailbox temporarily disabled",
        "5.1.2 DNS Soft Error looking up example.org",
        "5.1.1 your IP 203.0.113.222 is listed at zen.spamhaus.org",
        "5.1.1 refused, see https://dnsbl.example.org/?ip=203.0.113.222",
        "5.1.1 sender verify failed",
        "5.1.1 Ihre Nachricht wurde wegen unserer Richtlinien als unerwünscht abgelehnt",
        "5.1.1 Adresse IP bloquée, réputation insuffisante",
        "5.1.1 Retransmisión denegada",
        "5.1.1 Mensaje rechazado por la política del servidor",
        "5.1.1 Сообщение похоже на спам",
        "5.1.1 拒绝中继",
    ],
)
def test_replies_that_do_not_concern_the_address(text: str) -> None:
    assert not says_unknown(text)


@pytest.mark.parametrize(
    ("reply", "wait"),
    [
        ("550 Too many messages. Try again in 92 seconds.", timedelta(seconds=92)),
        ("451 rate limit exceeded, wait 5 minutes", timedelta(minutes=5)),
        ("451 rate limit exceeded, try again in 999999 hours", timedelta(days=1)),
        ("454 Throttling failure: Maximum sending rate exceeded.", SHORT_WAIT),
        ("421 4.7.0 Connection rate limit reached", SHORT_WAIT),
        ("421 Too many connections per minute", SHORT_WAIT),
        ("421 Too many connections in the last hour", LONG_WAIT),
        ("421 Too many concurrent SMTP connections; please try again later.", None),
        ("454 Throttling failure: Daily message quota exceeded.", LONG_WAIT),
        ("550 Domain x has exceeded the max emails per hour (500/500 (100%)) allowed.", LONG_WAIT),
    ],
)
def test_how_long_a_quota_lasts(reply: str, wait: timedelta | None) -> None:
    assert read_refusal(int(reply[:3]), reply[4:], "message") == (RefusalMeaning.QUOTA, wait)


@pytest.mark.parametrize("text", ["", "\n", "x" * 100_000, "a limit " * 9_999, "per hour " * 9_999])
def test_any_text_is_read(text: str) -> None:
    for code in (421, 450, 550, 552):
        assert isinstance(read_refusal(code, text, "message").meaning, RefusalMeaning)
