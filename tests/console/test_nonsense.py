"""Nonsense in each parameter of each page and form gives a clear message: nothing that runs in the
browser, no internal error, and no database that seems to be unavailable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from urllib.parse import parse_qsl, quote, urlencode

import asyncpg
import httpx
import pytest

from sequencerd.console.lists import FILTERS
from tests.console.conftest import console, counted, page_with
from tests.console.test_pages import check
from tests.console.test_roles import as_role, console_of_users, settled, token_of
from tests.console.test_roles import forms as forms_
from tests.console.test_viewers import FOR_OPERATORS, WITHOUT_DATA, _pages, _runners
from tests.console.test_viewers import journey as journey_
from tests.helpers.engines import define, enroll, until

journey = journey_
forms = forms_

SCRIPT = "<script>window.hit = 1</script>"
VALUES = (
    " ",
    "\0",
    "-1",
    "1e9",
    "٣",
    "2147483648",
    "9223372036854775807",
    "99999999999999999999",
    "x" * 10_000,
    "😀" * 2000,
    SCRIPT,
    "'\"><img src=x onerror=alert(1)>",
    "\u202eRTL",
    "a\nb",
    "%",
    "{",
    '{"a": ' + "[" * 3000,
    '{"a": "\\u0000"}',
    "2030-13-45",
    "9999-12-31T23:59:59-23:59",
    "0001-01-01T00:00:00+14:00",
    "infinity",
    "data..=x",
    "1,,x",
    "P99999999D",
    "Mars/Base",
)
UNREADABLE = ("%ED%A0%80", "%FF")  # half a character, and none of UTF-8
MORE = {
    "/search": ("q", "sort", "columns", "before", "skip", "after", *FILTERS),
    "/tables/search.json": ("q", "sort", "columns", "before", "skip", "limit", *FILTERS),
    "/sequence": ("step", "from", "skip", "before", "range", "way"),
    "/over-time": ("sequence", "step", "from", "until", "by"),
    "/simulate": (
        "start",
        "until",
        "timezone",
        "data",
        "external",
        "outcome",
        "answer.Note",
        "when.1",
        "set.1",
        "enrollment",
    ),
    "/message": ("data", "external", "timezone"),
    "/enroll": ("sequence", "subject", "email", "data", "timezone", "step", "start"),
    "/suppressions": ("channel", "address", "topic", "source", "after_channel"),
    "/change": ("ended_by", "to", *FILTERS),
    "/edit": ("revision", "text", "base", "plan", "brake", "move.wait"),
    "/funnel": ("split", "range"),
    "/login": ("to",),
    "/step": ("config.amount", "config.unit"),
    "/message/test": ("data", "external", "timezone"),
}
"""Parameters that the requests of other tests do not have."""


def _variants(path: str, given: Mapping[str, str], values: Iterator[str]) -> Iterator[str]:
    """Yield queries that each have nonsense in one parameter."""
    for name in dict.fromkeys((*given, *MORE.get(path, ()))):
        kept = urlencode({key: value for key, value in given.items() if key != name})
        for _ in range(3):
            yield f"{kept}&{name}={next(values)}"


def _check(answer: httpx.Response, what: str) -> None:
    assert answer.status_code in (200, 303, 404, 409, 422), f"{what[:300]}: {answer.text}"
    if answer.headers.get("content-type", "").startswith("text/html"):
        assert SCRIPT not in answer.text, what[:300]
    if answer.status_code in (404, 409, 422):
        assert len(answer.text) < 200_000, what[:300]


def _nonsense() -> Iterator[str]:
    return cycle([*map(quote, VALUES), *UNREADABLE])


async def test_nonsense_in_query_parameters(
    database: str, connection: asyncpg.Connection, journey: tuple[int, int]
) -> None:
    values = _nonsense()
    async with console(database, _runners(), own=_runners, write=True) as client:
        await until(
            connection, "SELECT count(*) = 1 FROM sequencer.enrollments WHERE status = 'failed'"
        )
        await counted(client, "failures")
        urls = [pages[0] for pages in _pages(*journey).values() if pages]
        for url in (*urls, *FOR_OPERATORS.values(), *WITHOUT_DATA[:1], *MORE):
            path, _, query = url.partition("?")
            if path.endswith(("/test", "/static/{name:path}")):
                continue
            for variant in _variants(path, dict(parse_qsl(query)), values):
                _check(await client.get(f"{path}?{variant}"), f"{path}?{variant}")


async def test_nonsense_in_forms(
    database: str, connection: asyncpg.Connection, forms: dict[str, dict[str, str]]
) -> None:
    values = _nonsense()
    headers = {**as_role("editor"), "Content-Type": "application/x-www-form-urlencoded"}
    async with console_of_users(database, write=True) as client:
        await settled(connection)
        token = await token_of(client, headers)
        for path, form in forms.items():
            if path in ("/logout", "/oidc", "/login"):
                continue
            for variant in _variants(path, form, values):
                content = f"token={token}&{variant}"
                answer = await client.post(path, content=content, headers=headers)
                _check(answer, f"{path} {variant}")


async def test_a_wrong_filter_or_range_is_reported_beside_the_form(
    database: str, connection: asyncpg.Connection, journey: tuple[int, int]
) -> None:
    async with console(database, _runners(), own=_runners) as client:
        for path, kept, words in (
            (
                "/search?where=plan+is+pro&sequence=s",
                "plan is pro",
                "data filter as in data.plan = pro",
            ),
            ("/search?wakes_from=noon", "noon", "Wakes from is not a time such as"),
            ("/search?wakes_from=9999-12-31T23:59-12:00", "9999-12-31", "is not a time such as"),
            ("/search?sort=nothing", 'id="found"', "There is no column nothing to sort by."),
            ("/over-time?sequence=s&from=noon", "noon", "From is not a time such as"),
            ("/over-time?sequence=s&step=gone", "<option selected>s", "has no step gone."),
            ("/over-time?from=2030-01-02&until=2030-01-01", "2030-01-02", "ends before it begins"),
        ):
            page = await client.get(path)
            assert page.status_code in (404, 422), path
            assert kept in page.text, path
            assert 'role="alert"' in page.text
            assert words in check(page), path


async def test_programs_get_plain_text(
    database: str, connection: asyncpg.Connection, journey: tuple[int, int]
) -> None:
    async with console(database, _runners(), own=_runners) as client:
        for path, status, text in (
            ("/tables/search.json?before=x", 422, "Before is not a number.\n"),
            ("/tables/nothing.json", 404, "There is no such table.\n"),
            ("/tables/search.csv?before=9999999999999999999", 422, "Before is not a number.\n"),
            ("/tables/steps.csv?sequence=%00", 422, "Sequence contains invalid characters.\n"),
        ):
            answer = await client.get(path)
            assert (answer.status_code, answer.text) == (status, text)
        long = await client.get("/sequence", params={"sequence": "x" * 10_000})
        assert len(long.text) < 5000


async def test_links_to_deleted_objects(
    database: str, connection: asyncpg.Connection, journey: tuple[int, int]
) -> None:
    waiting, _ = journey
    async with console(database, _runners(), own=_runners, write=True) as client:
        await connection.execute("DELETE FROM sequencer.enrollments WHERE id = $1", waiting)
        await connection.execute(
            "UPDATE sequencer.steps SET next_step = 'note' WHERE name = 'letter';"
            "DELETE FROM sequencer.steps WHERE name = 'bad'"
        )
        await page_with(client, "/sequence?sequence=s&step=bad", "has no step bad.")
        for path, status, words in (
            (f"/enrollments/{waiting}", 404, f"Enrollment {waiting} does not exist."),
            (f"/data?id={waiting}", 404, f"Enrollment {waiting} does not exist."),
            (f"/change?action=cancel&id={waiting}", 200, "No matching enrollments."),
            (f"/simulate?enrollment={waiting}", 404, f"Enrollment {waiting} does not exist."),
            (f"/message?sequence=s&step=letter&enrollment={waiting}", 404, "does not exist."),
            ("/message?sequence=s&step=bad", 404, "The sequence s has no step bad."),
            ("/step?sequence=s&step=bad", 404, "There is no step bad in the sequence."),
            ("/revision?sequence=s&revision=99", 404, "The sequence s has no revision 99."),
            ("/revision?sequence=s&revision=3000000000", 404, "s has no revision 3000000000."),
            ("/edit?sequence=s&revision=99", 404, "The sequence s has no revision 99."),
            ("/changes/99", 404, "Unknown change: changes are not kept"),
            ("/suppression?channel=email&address=gone&topic=*", 404, "is not suppressed"),
            (
                "/search?cause=000000000000&status=failed",
                200,
                "Cause of the failure: no longer exists",
            ),
            ("/funnel?sequence=gone", 404, "There is no sequence gone."),
            (f"/search?q=&before={waiting}", 200, "Enrollments"),
        ):
            page = await client.get(path)
            assert page.status_code == status, path
            assert words in check(page), path


@pytest.mark.parametrize("masked", [(), ("data.email", "subject")])
async def test_data_that_cannot_be_read_hide_no_other_enrollment(
    database: str, connection: asyncpg.Connection, masked: tuple[str, ...]
) -> None:
    """PostgreSQL takes more brackets and digits than Python."""
    await define(
        connection, "s", ("wait", "WaitForDuration", '{"amount": 1, "unit": "days"}', None)
    )
    ids = [
        await enroll(
            connection, "s", f"u{number}", f'{{"email": "{number}@example.com", "a": {a}}}'
        )
        for number, a in enumerate(
            ("1", "[" * 5000 + "]" * 5000, "[" * 400 + "]" * 400, "1" * 5000)
        )
    ]
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, data, status, failure, last_error)"
        " SELECT sequence, subject || 'f', data, 'failed', 'error', 'x' FROM sequencer.enrollments"
    )
    async with console(database, write=True, mask=masked) as client:
        await counted(client, "failures")
        for path in (
            *("/failures", "/search", "/search?columns=data.a,data.email&sort=data.a"),
            *("/tables/search.json", "/tables/search.csv", "/sequence?sequence=s&step=wait"),
            *(f"/enrollments/{id_}" for id_ in ids),
        ):
            page = await client.get(path)
            assert page.status_code == 200, f"{path} {page.text}"
        assert (await client.get(f"/data?id={ids[0]}")).status_code == 200
        for id_ in ids[1:3]:
            page = await client.get(f"/data?id={id_}")
            assert page.status_code in (200, 422), page.text
