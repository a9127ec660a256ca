"""Addresses and headers, whatever text comes."""

from __future__ import annotations

from email import message_from_bytes, policy

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sequencerd.runners.email import mime
from sequencerd.runners.fields import RenderError

texts = st.text(max_size=300) | st.text("ab =?\"'<>@,;:\\\r\nü€😀.", max_size=300)


@given(texts)
def test_a_header_carries_its_text_and_nothing_else(text: str) -> None:
    try:
        value = mime.check_header("subject", text.strip())
    except RenderError:
        return
    written = mime.message([mime.header("Subject", value)], "x", None, "=_1")
    message = message_from_bytes(written, policy=policy.default)
    assert list(message) == [
        "Subject",
        "MIME-Version",
        "Content-Type",
        "Content-Transfer-Encoding",
    ]
    assert all(len(line) <= 998 for line in written.split(b"\r\n"))
    assert b"\n" not in written.replace(b"\r\n", b"")
    # The reader's own rule: whitespace at the folds counts as one space.
    assert " ".join(str(message["Subject"]).split()) == " ".join(value.split())


@given(texts)
@example("Grüße aus München")
@example("ü" * 200)
def test_the_words_of_a_list_id_are_encoded_and_its_id_is_not(text: str) -> None:
    try:
        value = mime.check_header("List-Id", f"{text} <news.example.com>".strip())
        header = mime.list_id_header("List-Id", value)
    except RenderError:
        return
    written = mime.message([header], "x", None, "=_1")
    assert max(map(len, written.split(b"\r\n"))) <= 998
    message = message_from_bytes(written, policy=policy.default)
    assert message.keys()[:2] == ["List-Id", "MIME-Version"]
    words, _, id_ = str(message["List-Id"]).rpartition(" ")
    assert id_ == "<news.example.com>"
    if not text.isascii():
        assert words.split() == text.strip(' "').split()


@given(texts, texts)
def test_addresses_that_are_read_can_be_written(name: str, rest: str) -> None:
    try:
        boxes = mime.parse_mailboxes("to", f'"{name}" <ada@example.com>, {rest}')
    except RenderError:
        return
    written = mime.message([mime.address_header("To", boxes)], "x", None, "=_1")
    message = message_from_bytes(written, policy=policy.default)
    assert message.keys()[:2] == ["To", "MIME-Version"]
    # the reader takes headers for ASCII, and keeps the bytes of UTF-8 as halves of characters
    found = [
        address.addr_spec.encode("utf-8", "surrogateescape").decode()
        for address in message["To"].addresses
    ]
    assert found == [box.address for box in boxes]


@pytest.mark.parametrize("name", ["a" * 890, '"' * 600, "x," * 440, "Ada " * 220, "ü" * 890])
def test_long_names_make_no_line_that_is_too_long(name: str) -> None:
    box = mime.make_mailbox("to", name, f"{'a' * 64}@{'b' * 60}.{'c' * 60}.{'d' * 60}.example.org")
    written = mime.message([mime.address_header("To", [box])], "x", None, "=_1")
    assert max(map(len, written.split(b"\r\n"))) <= 998
    (found,) = message_from_bytes(written, policy=policy.default)["To"].addresses
    assert found.addr_spec == box.address
    # the reader puts a blank between encoded words
    assert found.display_name.replace(" ", "") == name.replace(" ", "")


@given(st.text(max_size=500))
def test_a_body_arrives_as_it_is(text: str) -> None:
    try:
        written = mime.message([], text, f"<p>{text}</p>", "=_1")
    except RenderError:
        assert any("\ud800" <= character <= "\udfff" for character in text)
        return
    message = message_from_bytes(written, policy=policy.default)
    plain, html = message.iter_parts()
    expected = text.replace("\r\n", "\n").replace("\r", "\n").encode()
    for part, body in ((plain, expected), (html, b"<p>" + expected + b"</p>")):
        got = part.get_payload(decode=True)
        assert isinstance(got, bytes)
        assert got.replace(b"\r\n", b"\n").strip() == body.strip()


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("", []),
        (" , ,", []),
        ("a@x.org", [("", "a@x.org")]),
        ("a@x.org,b@x.org ,", [("", "a@x.org"), ("", "b@x.org")]),
        ("Ada <a@x.org>, B. O'Brien <b@x.org>", [("Ada", "a@x.org"), ("B. O'Brien", "b@x.org")]),
        (r'"A \"B\", \\C" <a@x.org>', [(r'A "B", \C', "a@x.org")]),
        ("<a@x.org>", [("", "a@x.org")]),
        ("a+tag@sub.x-y.org", [("", "a+tag@sub.x-y.org")]),
        ("a@MÜNCHEN.de", [("", "a@xn--mnchen-3ya.de")]),
        ("a@localhost", [("", "a@localhost")]),
        ("\ufeffa@x.org", [("", "a@x.org")]),
        ("Ada <\u202aa@\u200bx.org\u202c>", [("Ada", "a@x.org")]),
        ("a\u00ad@x.org\u200d", [("", "a@x.org")]),
        ("نامه\u200cای@x.org", [("", "نامه\u200cای@x.org")]),  # needed within words
    ],
)
def test_lists_of_addresses(text: str, boxes: list[tuple[str, str]]) -> None:
    assert [(box.name, box.address) for box in mime.parse_mailboxes("to", text)] == boxes


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "@x.org",
        "a@",
        "a@x.org b@x.org",
        "a@@x.org",
        "a@-x.org",
        "a@x_y.org",
        "a@x.org.",
        "a@[127.0.0.1]",
        "a@x.org>",
        "<a@x.org",
        "Ada <>",
        "a\x00@x.org",
        "a@\u200b.org",
        f"{'a' * 65}@x.org",
        f"a@{'x' * 64}.org",
        f"a@{'x.' * 130}org",
        "Lovelace, Ada <a@x.org>",
    ],
)
def test_invalid_addresses(text: str) -> None:
    with pytest.raises(RenderError, match=r"^to: "):
        mime.parse_mailboxes("to", text)


def test_hostile_lists_are_refused() -> None:
    for hostile in ('"' * 9_999, "<" * 9_999, ',"' * 4_999, '\\"' * 4_999, "a" * 9_999):
        with pytest.raises(RenderError):
            mime.parse_mailboxes("to", hostile)


@pytest.mark.parametrize("gap", [2, 900, 2000])
def test_gaps_between_words_arrive_in_lines_that_are_not_too_long(gap: int) -> None:
    subject = "word " * 30 + " " * gap + "end"
    written = mime.header("Subject", subject)
    assert max(map(len, written.split("\r\n"))) <= 998
    assert message_from_bytes(written.encode(), policy=policy.default)["Subject"] == subject
