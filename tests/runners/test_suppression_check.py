"""The table and the daemon agree on addresses, whatever the case of their letters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import asyncpg
import pytest

from sequencerd.core.task import NotStarted
from sequencerd.runners import Runner
from sequencerd.runners.addressed import AddressedRunner
from sequencerd.runners.suppression_check import SuppressionKey, Suppressions, forms
from sequencerd.storage.suppressions import read_suppressed
from tests.helpers.engines import Recorder
from tests.helpers.runners import email_runner, sms_runner
from tests.helpers.servers import task

NOWHERE = "127.0.0.1:1"


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


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (
            lambda suppressions: email_runner(f"smtp://{NOWHERE}", suppressions=suppressions),
            {"from": "a@x.org", "to": "b@x.org", "subject": "Hi", "text": "Hi"},
        ),
        (
            lambda suppressions: sms_runner(
                base_url=f"http://{NOWHERE}", suppressions=suppressions
            ),
            {"from": "+11231231234", "to": "+4915112345678", "message": "Hi"},
        ),
        (
            lambda suppressions: AddressedRunner(Recorder(), suppressions),
            {"channel": "push", "address": "token"},
        ),
    ],
    ids=["email", "sms", "addressed"],
)
async def test_nothing_is_sent_if_the_lease_expires_while_the_list_is_read(
    make: Callable[[Suppressions], Runner], config: Mapping[str, Any]
) -> None:
    """The database may answer only after an interruption."""
    is_expired = False

    async def ask(_: list[SuppressionKey]) -> set[SuppressionKey]:
        nonlocal is_expired
        is_expired = True
        return set()

    runner = make(Suppressions(ask))
    late = task()._replace(lease_expired=lambda _: is_expired)
    assert await runner.run(runner.compile(config), [late]) == [NotStarted()]
    assert is_expired
    await runner.close()
