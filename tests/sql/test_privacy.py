"""Forgetting a subject, and exporting what is held of it."""

from __future__ import annotations

import json
from random import Random

import asyncpg
import pytest

from sequencerd.core.task import Answer
from sequencerd.runners.suppression_check import SuppressionKey, Suppressions, hashed
from sequencerd.storage.suppressions import read_suppressed
from tests.helpers.command_line import Command
from tests.helpers.engines import Held, Recorder, define, enroll, running_engine, until

EMAIL, PHONE, SUBJECT = "ada.l@example.com", "+49 151 234567-8", "customer-4711"
NUMBER = "+491512345678"
DATA = {
    "email": "Ada.L@Example.com",
    "contact": {"phones": [PHONE]},
    "items": [{"comment": "by Lovelace"}],
}
TERMS = (EMAIL, NUMBER, "1512345678", PHONE, SUBJECT, "Lovelace")


@pytest.fixture
async def held(connection: asyncpg.Connection) -> asyncpg.Connection:
    """A subject about which every table has a row, beside other subjects."""
    await define(
        connection,
        "s",
        ("send", "Note", "{}", "wait"),
        ("wait", "WaitForDuration", '{"amount": 3, "unit": "days"}', None),
    )
    await define(
        connection, "t", ("wait", "WaitForDuration", '{"amount": 3, "unit": "days"}', None)
    )
    for sequence, status in (("s", "active"), ("t", "failed")):
        id_ = await enroll(connection, sequence, SUBJECT, json.dumps(DATA))
        await connection.execute(
            "UPDATE sequencer.enrollments SET status = $2, last_error = $3 WHERE id = $1",
            id_,
            status,
            f"550 <{EMAIL}>: unknown",
        )
        await event(connection, id_, f"sent to {EMAIL}, signed Lovelace")
        await connection.execute(
            "INSERT INTO sequencer.daemons (name, alive_until) VALUES ($1, now())", f"d{id_}"
        )
        await connection.execute(
            "INSERT INTO sequencer.problems (daemon, kind, about, since, message)"
            " VALUES ($1, 'quarantined', $2, now(), $3), ($1, 'runner', 'Email', now(), $4)",
            f"d{id_}",
            str(id_),
            f"Lovelace, {SUBJECT}",
            f"421 4.7.0 <{EMAIL}>: try later",
        )
    other = await enroll(connection, "s", "other", '{"email": "bob@example.com"}')
    await event(connection, other, f"enrolled '{SUBJECT}' in t")
    await event(connection, other, f"to {NUMBER}: not x{EMAIL}, and not {SUBJECT}1")
    await connection.execute(
        "UPDATE sequencer.enrollments SET last_error = $2 WHERE id = $1", other, f"cc {EMAIL}."
    )
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address, reason) VALUES"
        " ('email', $1, $3), ('sms', $2, 'STOP'), ('email', 'bob@example.com', $3)",
        EMAIL,
        PHONE,
        f"asked by {EMAIL}",
    )
    await connection.execute(
        "SELECT set_config('sequencer.reason', $1, false)", f"{EMAIL} complained"
    )
    await connection.execute("UPDATE sequencer.sequences SET status = 'paused' WHERE name = 't'")
    await connection.execute("SELECT set_config('sequencer.reason', '', false)")
    await connection.execute(
        "INSERT INTO sequencer.scheduled_runs (sequence, definition, next_run_at, problem)"
        " VALUES ('s', '{}', now(), $1)",
        f"data of subject '{SUBJECT}' have 2 MB",
    )
    return connection


async def event(connection: asyncpg.Connection, id_: int, message: str) -> None:
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)"
        " VALUES ($1, clock_timestamp(), 's', 'send', 1, 'next', $2)",
        id_,
        message,
    )


async def everything(connection: asyncpg.Connection) -> str:
    """All rows of all tables, as text."""
    tables = await connection.fetch(
        "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r'"
        " AND relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)"
        " AND relnamespace::regnamespace::text NOT LIKE 'pg_toast%'"
    )
    rows = [
        text
        for (table,) in tables
        for (text,) in await connection.fetch(f"SELECT t::text FROM {table} AS t")
    ]
    return "\n".join(rows)


async def forget(connection: asyncpg.Connection, subject: str = SUBJECT) -> asyncpg.Record:
    return await connection.fetchrow("SELECT * FROM sequencer.forget($1)", subject)


async def test_nothing_of_a_forgotten_subject_is_left_in_any_table(
    held: asyncpg.Connection,
) -> None:
    before = await everything(held)
    assert all(term in before for term in (EMAIL, NUMBER, SUBJECT, "Lovelace"))
    done = await forget(held)
    assert (done["enrollments"], done["suppressions"], done["mentioned_in"]) == (2, 2, [])
    after = await everything(held)
    kept = f"not x{EMAIL}, and not {SUBJECT}1"  # other words that contain one of these
    assert after.count(kept) == 1
    for term in TERMS:
        assert term.lower() not in after.replace(kept, "").lower(), term
    assert "enrolled '[forgotten]' in t" in after
    assert after.count("bob@example.com") == 2
    assert dict(await forget(held)) == {
        "enrollments": 0,
        "events": 0,
        "suppressions": 0,
        "redacted": 0,
        "mentioned_in": [],
    }


async def test_a_number_with_a_zero_in_brackets_is_forgotten(held: asyncpg.Connection) -> None:
    other = await enroll(held, "s", "another")
    await event(held, other, "+49 (0)151 234567-8, 0049(0)1512345678; +49 (0)151 23456789")
    await forget(held)
    message = await held.fetchval(
        "SELECT message FROM sequencer.events WHERE enrollment_id = $1 AND action = 'next'", other
    )
    assert message == "+[forgotten], [forgotten]; +49 (0)151 23456789"


async def test_a_forgotten_address_stays_suppressed(held: asyncpg.Connection) -> None:
    await forget(held)

    async def ask(keys: list[SuppressionKey]) -> set[SuppressionKey]:
        return await read_suppressed(held, keys)

    check = Suppressions(ask)
    written = [EMAIL, "ADA.L@example.com", "eve@example.com"]
    assert (await check.find_suppressed("email", written, None)).keys() == set(written[:2])
    numbers = [PHONE, NUMBER, "+491512345679"]
    assert (await check.find_suppressed("sms", numbers, "news")).keys() == {PHONE, NUMBER}
    # once more in clear, and forgotten again
    await held.execute("INSERT INTO sequencer.suppressions VALUES ('email', $1)", EMAIL)
    assert (await forget(held, EMAIL))["suppressions"] == 1
    assert EMAIL not in await held.fetchval(
        "SELECT string_agg(address, ' ') FROM sequencer.suppressions"
    )


async def test_a_forgotten_address_stays_suppressed_for_its_topics(
    connection: asyncpg.Connection,
) -> None:
    await define(connection, "s", ("send", "Note", "{}", None))
    await enroll(connection, "s", "user-42", '{"token": "fH7:Xy", "email": "ada@x.org"}')
    await connection.execute(
        "INSERT INTO sequencer.suppressions VALUES ('push', 'fH7:Xy', 'news'),"
        " ('push', 'fh7:xy', '*'), ('email', 'ada@x.org', 'news'), ('email', 'ada@x.org', 'bills')"
    )

    async def ask(keys: list[SuppressionKey]) -> set[SuppressionKey]:
        return await read_suppressed(connection, keys)

    check = Suppressions(ask)
    await forget(connection, "user-42")
    for topic, push, mail in (
        ("news", "news", "news"),
        ("bills", None, "bills"),
        (None, None, None),
    ):
        assert (await check.find_suppressed("push", ["fH7:Xy"], topic)).get("fH7:Xy") == push
        assert (await check.find_suppressed("email", ["ada@x.org"], topic)).get("ada@x.org") == mail


async def test_an_address_that_only_messages_name_is_forgotten_with_its_suppression(
    connection: asyncpg.Connection,
) -> None:
    """As of a lookup, which is not kept; and the sender in the same message is no subject."""
    await define(connection, "s", ("send", "Note", "{}", None))
    for subject in ("user-42", "user-43"):
        id_ = await enroll(connection, "s", subject)
        await event(connection, id_, f"<{subject}@example.org> bounced, from shop@example.com")
    await connection.execute(
        "INSERT INTO sequencer.suppressions VALUES ('email', 'user-42@example.org')"
    )
    assert (await forget(connection, "user-42"))["suppressions"] == 1
    (message,) = [row[0] for row in await connection.fetch("SELECT message FROM sequencer.events")]
    assert message == "<user-43@example.org> bounced, from shop@example.com"


@pytest.mark.parametrize("subject", ["7", "a+b (c)*", "[x", "back\\slash", "it's", "ä" * 300])
async def test_a_subject_matches_whole_words_and_is_no_pattern(
    connection: asyncpg.Connection, subject: str
) -> None:
    await define(connection, "s", ("send", "Note", "{}", None))
    await enroll(connection, "s", subject)
    other = await enroll(connection, "s", "other")
    await event(connection, other, f"attempt 7 of 17 by d7; enrolled '{subject}' in s")
    await connection.execute(
        "UPDATE sequencer.enrollments SET subject = 'new' WHERE id = $1", other
    )
    await event(connection, other, f"from {subject} to new by me")
    await forget(connection, subject)
    texts = [
        r[0] for r in await connection.fetch("SELECT message FROM sequencer.events ORDER BY at")
    ]
    assert texts[0] == "attempt 7 of 17 by d7; enrolled '[forgotten]' in s"
    assert texts[2] == "from [forgotten] to new by me"


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ("User-42", "enrolled 'uSER-42' in s"),
        ("100%-off_'x'\\", "enrolled '100%-OFF_'X'\\' in s"),
        ("y\u0131ld\u0131z", "enrolled 'YILDIZ' in s"),
        ("\u03c3\u03bf\u03c6\u03cc\u03c2", "enrolled '\u03a3\u039f\u03a6\u038c\u03a3' in s"),
        ("M\u00fcLLER@example.com", "sent to m\u00dcller@EXAMPLE.com"),
        ("+49 (0)151 234567-8", "to +49151/2345678: no"),
    ],
)
async def test_texts_that_match_the_pattern_are_found(
    connection: asyncpg.Connection, subject: str, message: str
) -> None:
    await define(connection, "s", ("send", "Note", "{}", None))
    other = await enroll(connection, "s", "other", json.dumps({"note": message}))
    await enroll(connection, "s", subject)
    await event(connection, other, message)
    matches = await connection.fetchval("SELECT $1 ~* sequencer.mentions_of($2)", message, subject)
    data_match = await connection.fetchval(
        "SELECT data::text ~* sequencer.mentions_of($2) FROM sequencer.enrollments WHERE id = $1",
        other,
        subject,
    )
    done = await forget(connection, subject)
    assert done["mentioned_in"] == ([other] if data_match else [])
    assert matches == await connection.fetchval(
        "SELECT count(*) = 1 FROM sequencer.events WHERE message LIKE '%[forgotten]%'"
    )


async def test_data_of_other_subjects_stay_and_are_reported(held: asyncpg.Connection) -> None:
    invoice = await enroll(held, "s", "invoice-9", json.dumps({"to": EMAIL}))
    same = await enroll(held, "s", EMAIL)
    owner = await enroll(held, "s", "invoice-10", json.dumps({"customer": SUBJECT}))
    done = await forget(held)
    assert done["mentioned_in"] == [invoice, same, owner]
    data = await held.fetchval("SELECT data FROM sequencer.enrollments WHERE id = $1", invoice)
    assert json.loads(data)["to"] == EMAIL


async def test_nothing_is_forgotten_while_a_side_effect_runs(
    connection: asyncpg.Connection, database: str
) -> None:
    held = Held(Answer(message="sent"))
    await define(
        connection,
        "s",
        ("send", "Note", "{}", "wait"),
        ("wait", "WaitForDuration", '{"amount": 3, "unit": "days"}', None),
    )
    async with running_engine(database, {"Note": Recorder(held)}):
        id_ = await enroll(connection, "s", "ada")
        await held.begun.wait()
        with pytest.raises(asyncpg.ObjectInUseError) as refused:
            await forget(connection, "ada")
        assert f"nothing was forgotten: enrollment {id_} is executing step 'send'" in str(
            refused.value
        )
        assert "Try again when the side effect, or its daemon" in (refused.value.hint or "")
        held.released.set()
        await until(connection, "SELECT step = 'wait' FROM sequencer.enrollments")
        done = await forget(connection, "ada")
        assert done["enrollments"] == 1
    assert await connection.fetchval("SELECT count(*) FROM sequencer.events") == 0


async def test_an_expired_lease_does_not_prevent_forgetting(connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("send", "Note", "{}", None))
    await enroll(connection, "s", "ada")
    await connection.execute(
        "UPDATE sequencer.enrollments SET leased_by = 'gone', wake_at = now() - interval '1 s'"
    )
    await connection.execute(
        "INSERT INTO sequencer.daemons (name, alive_until) VALUES ('gone', now() + interval '1 h')"
    )
    with pytest.raises(asyncpg.ObjectInUseError):
        await forget(connection, "ada")
    await connection.execute("UPDATE sequencer.daemons SET alive_until = now()")
    assert (await forget(connection, "ada"))["enrollments"] == 1


async def test_an_export_has_all_data_of_a_subject(held: asyncpg.Connection) -> None:
    invoice = await enroll(held, "s", "invoice-9", json.dumps({"to": EMAIL}))
    text = await held.fetchval("SELECT sequencer.export_subject($1)", SUBJECT)
    exported = json.loads(text)
    first, second = exported["enrollments"]
    assert (first["sequence"], first["data"]) == ("s", DATA)
    assert second["last_error"] == f"550 <{EMAIL}>: unknown"
    assert [one["message"] for one in first["history"]] == [f"sent to {EMAIL}, signed Lovelace"]
    assert {one["address"] for one in exported["suppressions"]} == {EMAIL, NUMBER}
    assert [one["about"] for one in exported["problems"]] == [str(first["id"]), str(second["id"])]
    assert exported["mentioned_in"] == [invoice]
    assert "bob" not in text
    # of an address that was forgotten, the hash is found by the address
    await forget(held)
    await enroll(held, "s", "new-1", json.dumps({"email": EMAIL}))
    exported = json.loads(await held.fetchval("SELECT sequencer.export_subject('new-1')"))
    (kept,) = exported["suppressions"]
    assert kept["address"].startswith("sha256:")
    empty = json.loads(await held.fetchval("SELECT sequencer.export_subject('nobody')"))
    assert empty["enrollments"] == empty["suppressions"] == []


async def test_removed_suppressions_are_exported_and_redacted(held: asyncpg.Connection) -> None:
    await held.execute(
        "INSERT INTO sequencer.removed_suppressions (channel, address, topic, source, created_at,"
        " reason) VALUES ('email', sequencer.suppression_hash($1), '*', 'stop', now(), $2)",
        EMAIL,
        f"otto in the console: {EMAIL} has called",
    )
    exported = json.loads(await held.fetchval("SELECT sequencer.export_subject($1)", SUBJECT))
    assert [one["source"] for one in exported["removed_suppressions"]] == ["stop"]
    await forget(held)
    reason = await held.fetchval("SELECT reason FROM sequencer.removed_suppressions")
    assert reason == "otto in the console: [forgotten] has called"


# --- the commands


async def test_the_commands_forget_and_export(
    sequencerd: Command, held: asyncpg.Connection
) -> None:
    invoice = await enroll(held, "s", "invoice-9", json.dumps({"to": EMAIL}))
    exported = json.loads(sequencerd("export-subject", SUBJECT))
    assert len(exported["enrollments"]) == 2
    before = await everything(held)
    would = sequencerd("forget", SUBJECT, "--dry-run")
    assert f"would forget {SUBJECT}: enrollments: 2, events: " in would
    assert f"enrollments {invoice}" in would
    sequencerd("forget", SUBJECT, code=2)
    assert "use --yes, or --dry-run" in sequencerd.errors
    assert await everything(held) == before
    done = json.loads(sequencerd("forget", SUBJECT, "--yes", "--json"))
    assert (done["enrollments"], done["suppressions"], done["dry_run"]) == (2, 2, False)
    assert sequencerd("forget", "nobody") == "there is no data about nobody\n"


async def test_a_setting_of_the_database_does_not_change_what_is_searched(
    sequencerd: Command, held: asyncpg.Connection
) -> None:
    await held.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET standard_conforming_strings = off',"
        " current_database()); END $$"
    )
    await enroll(held, "s", "c\\d.e")
    assert len(json.loads(sequencerd("export-subject", "c\\d.e"))["enrollments"]) == 1
    sequencerd("forget", SUBJECT, "--yes")
    assert sequencerd("forget", SUBJECT) == f"there is no data about {SUBJECT}\n"


NOTATIONS = [
    ("whatsapp:+49 151 234567-8", "sms", "whatsapp:+491512345678"),
    ("+49 151 234567-8", "sms", "whatsapp:+491512345678"),
    ("rcs:+491512345678", "sms", "+491512345678"),
    ("tel:+49-151-2345678", "sms", NUMBER),
    ("+49\u00a0151\u00a02345678", "sms", NUMBER),
    ("\u202a+49 ( 0 ) 151 2345678\u202c", "sms", NUMBER),
    ("＋４９１５１２３４５６７８", "sms", NUMBER),
    ("+٤٩ ١٥١ ٢٣٤٥٦٧٨", "sms", NUMBER),
    ("+၄၉ ၁၅၁ ၂၃၄၅၆၇၈", "sms", NUMBER),
    ("0049 151 2345678", "sms", NUMBER),
    ("ADA@X.ORG", "email", "ada@x.org"),
    ("ada@bücher.example", "email", "ada@xn--bcher-kva.example"),
    ("ADA@xn--bcher-kva.example", "email", "ada@bücher.example"),
    ("ada@BÜCHER.example", "email", "ada@bÜcher.example"),
    ("ada@bücher.example", "email", "ada@bÜcher.example"),
    ('Ada <"a..b"@x.org>', "email", "a..b@x.org"),
    ("a..b@x.org", "email", '"a..b"@x.org'),
]


async def suppress_notation(
    connection: asyncpg.Connection, written: str, channel: str, suppressed: str
) -> None:
    """Enroll the subject with a contact, and suppress it in another notation, as it was stored."""
    await define(connection, "s", ("send", "Note", "{}", None))
    await enroll(connection, "s", SUBJECT, json.dumps({"contact": [written]}))
    async with connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        insert = "INSERT INTO sequencer.suppressions (channel, address) VALUES ($1, $2)"
        await connection.execute(insert, channel, suppressed)


@pytest.mark.parametrize(("written", "channel", "suppressed"), NOTATIONS)
async def test_other_notations_of_an_address_are_found(
    connection: asyncpg.Connection, written: str, channel: str, suppressed: str
) -> None:
    await suppress_notation(connection, written, channel, suppressed)
    exported = json.loads(await connection.fetchval("SELECT sequencer.export_subject($1)", SUBJECT))
    assert [row["address"] for row in exported["suppressions"]] == [suppressed]
    assert (await forget(connection))["suppressions"] == 1
    left = await connection.fetchval("SELECT array_agg(address) FROM sequencer.suppressions")
    assert left == [hashed(suppressed)]


async def test_the_commands_know_other_notations_of_addresses(
    sequencerd: Command, connection: asyncpg.Connection
) -> None:
    await suppress_notation(connection, "ada@bücher.example", "email", "ada@xn--bcher-kva.example")
    exported = json.loads(sequencerd("export-subject", SUBJECT))
    assert [row["address"] for row in exported["suppressions"]] == ["ada@xn--bcher-kva.example"]
    assert "suppressed addresses: 1" in sequencerd("forget", SUBJECT, "--yes")


async def test_an_international_address_is_redacted_as_it_was_sent(
    connection: asyncpg.Connection,
) -> None:
    """Servers quote the domain in ASCII."""
    await define(connection, "s", ("send", "Note", "{}", None))
    await enroll(connection, "s", SUBJECT, '{"email": "ada@bücher.example"}')
    other = await enroll(connection, "s", "other")
    await event(connection, other, "550 <Ada@xn--bcher-kva.example>: unknown")
    assert (await forget(connection))["redacted"] == 1
    kept = await connection.fetchval(
        "SELECT message FROM sequencer.events WHERE enrollment_id = $1", other
    )
    assert kept == "550 <[forgotten]>: unknown"


async def test_a_domain_in_ascii_is_that_of_the_standard(connection: asyncpg.Connection) -> None:
    random = Random(7)
    letters = "abcxyz0189-äößéłșñαβγяжטשعकไ한例え😀𐍈"
    labels = ["".join(random.choices(letters, k=random.randint(1, 30))) for _ in range(300)]
    found = await connection.fetch(
        "SELECT label, sequencer.punycode(label) AS written FROM unnest($1::text[]) AS label",
        labels,
    )
    assert {row["label"]: row["written"] for row in found} == {
        label: label.encode("punycode").decode("ascii") for label in labels
    }


async def test_a_subject_with_many_addresses_is_forgotten(connection: asyncpg.Connection) -> None:
    """As of a digest. The time to compile a pattern grows with the cube of the number of what must
    not be beside a word.
    """
    await define(connection, "s", ("send", "Note", "{}", None))
    addresses = [f"user{number}@example.com" for number in range(300)]
    await enroll(connection, "s", SUBJECT, json.dumps({"items": addresses}))
    other = await enroll(connection, "s", "other", '{"email": "user7@example.com"}')
    await event(connection, other, "sent to user7@example.com, not to user7@example.com.au")
    pattern = await connection.fetchval("SELECT sequencer.mentions_of($1)", SUBJECT)
    assert (pattern.count("(?<!"), pattern.count("@")) == (1, 302)
    done = await forget(connection)
    assert (done["redacted"], done["mentioned_in"]) == (1, [other])
    kept = await connection.fetchval("SELECT message FROM sequencer.events")
    assert kept == "sent to [forgotten], not to user7@example.com.au"


async def test_forget_reports_a_side_effect_in_progress(
    sequencerd: Command, held: asyncpg.Connection
) -> None:
    await held.execute(
        "UPDATE sequencer.enrollments SET leased_by = 'd', wake_at = now() + interval '1 h'"
        " WHERE status = 'active'"
    )
    sequencerd("forget", SUBJECT, "--yes", code=1)
    assert "is executing step 'send' of sequence 's'; Try again when" in sequencerd.errors
