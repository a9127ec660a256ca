"""Phone numbers in all notations, and that the database normalises suppressions in the same way."""

from __future__ import annotations

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.runners.fields import RenderError
from sequencerd.runners.sms.numbers import normalise, read_number
from sequencerd.runners.suppression_check import forms

NUMBER = "+4915112345678"

WRITTEN = {
    "+4915112345678": NUMBER,
    " +49 (151) 123-456.78 ": NUMBER,
    "+49 (0)151 12345678": NUMBER,
    "+49(0)151/12345678": NUMBER,
    "+49 - (0) 151 123 456 78": NUMBER,
    "(+49) (0)151 12345678": NUMBER,
    "\u202a+49 151 12345678\u202c": NUMBER,
    "\u202a+49\u00a0(0)\u200b151\u2011123\u2013456\u201478\u202c": NUMBER,
    "\u2066+49 151 12345678\u2069": NUMBER,
    "\ufeff+49 151\u2212123\u00ad456 78": NUMBER,
    "+49 151 / 123 456 78": NUMBER,
    "tel:+49-151-12345678": NUMBER,
    "TEL: +49 (0) 151 12345678": NUMBER,
    "＋４９ （０）１５１ １２３４５６７８": NUMBER,
    "\u200f+٤٩ (٠)١٥١ ١٢٣٤٥٦٧٨": NUMBER,
    "+۴۹۱۵۱۱۲۳۴۵۶۷۸": NUMBER,
    "+४९ १५१ १२३४५६७८": NUMBER,
    "+৪৯ ১৫১ ১২৩৪৫৬৭৮": NUMBER,
    "+၄၉ ၁၅၁ ၁၂၃၄၅၆၇၈": NUMBER,
    "whatsapp:+٤٩١٥١١٢٣٤٥٦٧٨": f"whatsapp:{NUMBER}",
    "+44 (0)20 7946 0000": "+442079460000",
    "+353 (0)1 234 5678": "+35312345678",
    "+39 (0)6 1234 5678": "+390612345678",  # a part of the number there
    "+225 (0)1 23 45 67 89": "+2250123456789",
    "whatsapp:+49 (0)151 12345678": f"whatsapp:{NUMBER}",
    "WhatsApp:+4915112345678": f"whatsapp:{NUMBER}",
    "rcs:+4915112345678": f"rcs:{NUMBER}",
    "rcs:brand_agent": "rcs:brand_agent",
    "user-42": "user-42",
    "User-42": "user-42",
    "0151 12345678": "015112345678",
}


@pytest.mark.parametrize(("text", "expected"), list(WRITTEN.items()))
def test_numbers_in_common_notations(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert expected in forms("sms", text)


@pytest.mark.parametrize("text", [text for text, number in WRITTEN.items() if number[0] == "+"])
def test_numbers_that_can_be_sent_to(text: str) -> None:
    assert read_number(text) == WRITTEN[text]


@pytest.mark.parametrize(
    ("text", "sent_to"),
    [
        ("whatsapp:+49 151 12345678", f"whatsapp:{NUMBER}"),
        ("rcs:+49 (0)151 12345678", f"rcs:{NUMBER}"),
        ("messenger:AbC_123", "messenger:AbC_123"),
    ],
)
def test_other_channels_go_through(text: str, sent_to: str) -> None:
    assert read_number(text) == sent_to


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0151 12345678",
        "+0151",
        "ada",
        "+49 151 x",
        "tel:",
        "whatsapp:",
        ":+49151",
        "a b:c",
        "+49151;ext=1",
        "messenger:a b",
        "messenger:a\nb",
        "+1234567890123456",
        "+",
    ],
)
def test_invalid_numbers(text: str) -> None:
    with pytest.raises(RenderError, match=r"^to: "):
        read_number(text)


async def entry(connection: asyncpg.Connection, text: str) -> str:
    """An entry of suppressions, as it is kept."""
    kept: str = await connection.fetchval(
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('sms', $1)"
        " RETURNING address",
        text,
    )
    await connection.execute("DELETE FROM sequencer.suppressions")
    return kept


async def test_the_database_stores_numbers_in_the_form_used_for_sending(
    connection: asyncpg.Connection,
) -> None:
    for text, expected in WRITTEN.items():
        assert await entry(connection, text) == expected


PIECES = [
    "+",
    "49",
    "39",
    "(0)",
    "0",
    "(",
    ")",
    " ",
    "-",
    "/",
    ".",
    "\u202a",
    "\u2013",
    "\u00a0",
    "tel:",
    "whatsapp:",
    "a",
    ":",
    "１",
    "٣",
    "۰",
    "（０）",
    "\u3000",
    "\t",
]


async def test_the_database_and_the_runner_agree(connection: asyncpg.Connection) -> None:
    texts: set[str] = set()

    @given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join))
    def collect(text: str) -> None:
        texts.add(text)

    collect()
    for text in texts:
        if normalised := normalise(text):
            assert await entry(connection, text) in forms("sms", text) | {normalised}, text
