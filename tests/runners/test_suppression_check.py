"""The table and the daemon agree on addresses, whatever the case of their letters."""

from __future__ import annotations

import asyncpg
import pytest

from sequencerd.runners.suppression_check import SuppressionKey, Suppressions, forms
from sequencerd.storage.suppressions import read_suppressed


async def entry(connection: asyncpg.Connection, address: str) -> str:
    """An entry of suppressions, as it is kept."""
    kept: str = await connection.fetchval(
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('email', $1)"
        " RETURNING address",
        address,
    )
    await connection.execute("DELETE FROM sequencer.suppressions")
    return kept


@pytest.mark.parametrize(
    "spellings",
    [
        ("ada@x.org", "ADA@X.ORG", "Ada@X.org"),
        ("ada@müller.de", "ADA@MÜLLER.DE", "Ada@Müller.de", "ada@xn--mller-kva.DE"),
        ("ärger@x.org", "ÄRGER@X.ORG", "Ärger@x.org"),
        ("ada@öko.example", "ADA@ÖKO.EXAMPLE", "Ada@Öko.example", "ada@xn--ko-eka.example"),
        ("мария@пример.рф", "МАРИЯ@ПРИМЕР.РФ", "Мария@Пример.рф", "Мария@пример.рф"),
    ],
)
async def test_an_entry_is_found_in_any_case(
    connection: asyncpg.Connection, spellings: tuple[str, ...]
) -> None:
    for written in spellings:
        if "@xn--" in written:
            continue  # which is another form only for what is sent
        kept = await entry(connection, written)
        for sent in spellings:
            assert kept in forms("email", sent), (written, sent)


async def test_an_unusual_mixture_is_found_as_it_was_written(
    connection: asyncpg.Connection,
) -> None:
    """As the daemon writes it itself, after a bounce or an unsubscription."""
    mixed = "mÜllÄr@x.org"
    assert await entry(connection, mixed) in forms("email", mixed)


async def test_an_entry_with_a_name_is_found(connection: asyncpg.Connection) -> None:
    """As the steps of custom runners may write the address of their recipient."""
    kept = await entry(connection, "Ada Lovelace <Ada@x.org>")
    for written in ("Ada Lovelace <Ada@x.org>", '"Lovelace, Ada" <ADA@x.org >', "<ada@X.org>"):
        assert kept in forms("email", written)


@pytest.mark.parametrize("token", ["a\x00b", "a\ud800"])
async def test_an_address_that_no_entry_can_have_disturbs_no_other(
    connection: asyncpg.Connection, token: str
) -> None:
    """Addresses of several enrollments are looked up together."""
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('push', 'token')"
    )

    async def ask(keys: list[SuppressionKey]) -> set[SuppressionKey]:
        return await read_suppressed(connection, keys)

    found = await Suppressions(ask).find_suppressed("push", [token, "token"], None)
    assert found == {"token": "*"}


def test_another_address_is_not_suppressed() -> None:
    assert "ada@strasse.example" not in forms("email", "ada@straße.example")
    assert "müller@x.org" not in forms("email", "muller@x.org")
