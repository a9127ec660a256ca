"""Addresses made from data: names arrive as they are, and no value adds a recipient."""

from __future__ import annotations

from email import message_from_bytes, policy
from email.header import decode_header, make_header
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.faults import DefinitionError
from sequencerd.core.task import Answer, Failed
from sequencerd.runners.email import mime
from sequencerd.runners.email.addresses import compile_addresses
from sequencerd.runners.fields import RenderError
from tests.helpers.runners import email_runner
from tests.helpers.servers import HOST, smtp_server, task

NAMED = "{{data.name}} <{{data.email}}>"


def boxes(source: str, *, many: bool = False, **data: Any) -> list[tuple[str, str]]:
    """The names and addresses that a template makes."""
    found = compile_addresses("to", source, many=many).render({"data": data})
    return [(box.name, box.address) for box in found]


NAMES = [
    "Lovelace, Ada",
    'John "Johnny" Smith',
    "a<b",
    "a>b",
    "x <evil@x.test>",
    "victim@evil.org, Bob",
    "back\\",
    "back\\\\",
    '"',
    '"quoted"',
    "=?utf-8?q?x?=",
    "Größe; (Ada)",
    "日本 太郎",
    "Ada " * 50 + "Lovelace",
    "L" * 850,
]


@pytest.mark.parametrize("name", NAMES)
async def test_a_name_arrives_as_it_is(name: str) -> None:
    config = {
        "from": "Shop <hi@example.com>",
        "subject": "x",
        "text": "x",
        "to": [NAMED, '"{{data.name}}" <bob@x.org>'],
        "replyTo": NAMED,
    }
    async with smtp_server() as server:
        made = email_runner(f"smtp://{HOST}:{server.port}")
        (result,) = await made.run(made.compile(config), [task(name=name, email="ada@x.org")])
        await made.close()
        assert isinstance(result, Answer), result
        assert server.messages[0].rcpt_tos == ["ada@x.org", "bob@x.org"]
        message = server.parsed()
    for header, addresses in (("To", ["ada@x.org", "bob@x.org"]), ("Reply-To", ["ada@x.org"])):
        read = message[header].addresses
        assert [address.addr_spec for address in read] == addresses
        assert {address.display_name for address in read} == {name}
    lines = server.messages[0].content.split(b"\r\n")
    assert max(map(len, lines)) <= 998


def test_a_name_that_is_too_long_for_a_line_is_encoded() -> None:
    (box,) = compile_addresses("to", NAMED).render(
        {"data": {"name": "L" * 1500, "email": "a@x.org"}}
    )
    assert str(make_header(decode_header(str(box)))) == f"{'L' * 1500} <a@x.org>"
    assert max(map(len, str(box).split("\r\n"))) <= 78


def test_a_name_becomes_one_line() -> None:
    assert boxes(NAMED, name="Ada\r\nBcc: evil@x.test\u2028", email="ada@x.org") == [
        ("Ada Bcc: evil@x.test", "ada@x.org")
    ]
    assert boxes(NAMED, name=None, email="ada@x.org") == [("", "ada@x.org")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{data.a}}, {{data.b}}", [("", "a@x.org"), ("", "b@x.org")]),
        ("A <{{data.a}}>, {{data.name}} <{{data.b}}>", [("A", "a@x.org"), ("L, A", "b@x.org")]),
        ('"Last, First" <{{data.a}}>', [("Last, First", "a@x.org")]),
        (r'"a \"b\" \\" <{{data.a}}>', [(r'a "b" \ '.strip(), "a@x.org")]),
        (
            "{{#each data.team}}{{name}} <{{email}}>, {{/each}}c@x.org",
            [("L, A", "a@x.org"), ("B", "b@x.org"), ("", "c@x.org")],
        ),
        ("{{#if data.none}}{{data.a}}, {{/if}}c@x.org", [("", "c@x.org")]),
        ("{{#if data.a}}{{data.a}}, {{/if}}c@x.org", [("", "a@x.org"), ("", "c@x.org")]),
        ("{{data.none}} <{{data.none}}>", []),
        ("{{data.none}}", []),
        ("<{{data.a}}>", [("", "a@x.org")]),
        ("{{!-- a, b < c --}}{{data.a}}", [("", "a@x.org")]),
        ('{{default data.none "x@x.org, Bob"}} <{{data.a}}>', [("x@x.org, Bob", "a@x.org")]),
        ("{{data.local}}@docomo.ne.jp", [("", '"a.."@docomo.ne.jp')]),
        ("{{{data.name}}} <{{{data.a}}}>", [("L, A", "a@x.org")]),
        ("Ada <a@x.org>, b@x.org", [("Ada", "a@x.org"), ("", "b@x.org")]),
    ],
)
def test_mailboxes_end_where_the_template_ends_them(
    source: str, expected: list[tuple[str, str]]
) -> None:
    team = [{"name": "L, A", "email": "a@x.org"}, {"name": "B", "email": "b@x.org"}]
    found = boxes(source, a="a@x.org", b="b@x.org", name="L, A", team=team, local="a..")
    assert found == expected


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("{{data.v}}", "a@b.test,evil@x.test"),
        ("{{data.v}}", "a@b.test, Bob <evil@x.test>, c@x.test"),
        ("{{data.v}}", ["a@b.test", "evil@x.test"]),
        ("{{data.v}}", "a@b.test\nevil@x.test"),
        ("{{data.v}}", "a@b.test evil@x.test"),
        ("Ada <{{data.v}}>", "a@b.test,evil@x.test"),
        ("Ada <{{data.v}}>", "a@b.test>, <evil@x.test"),
        ("Ada <{{data.v}}>", "a@b.test> evil@x.test"),
        ("{{data.v}} <ada@x.org", "x"),
        ("{{data.v}} > <ada@x.org>", "x"),
    ],
)
def test_a_value_never_becomes_two_addresses(source: str, value: object) -> None:
    with pytest.raises(RenderError, match=r"^to: "):
        boxes(source, v=value)


def test_values_with_several_addresses_need_many() -> None:
    expected = [("", "a@x.org"), ("B, C", "b@x.org")]
    assert boxes("{{data.v}}", many=True, v='a@x.org, "B, C" <b@x.org>') == expected
    assert boxes("{{data.v}}", many=True, v=["a@x.org", "b@x.org"])[1] == ("", "b@x.org")
    # a name is a name all the same
    assert boxes(NAMED, many=True, name="c@x.org, D", email="a@x.org") == [
        ("c@x.org, D", "a@x.org")
    ]


async def test_many_is_a_key_of_the_step() -> None:
    config = {"from": "hi@example.com", "to": "{{data.v}}", "subject": "x", "text": "x"}
    async with smtp_server() as server:
        made = email_runner(f"smtp://{HOST}:{server.port}")
        one = task(v="a@x.org, b@x.org")
        (refused,) = await made.run(made.compile(config), [one])
        (sent,) = await made.run(made.compile(config | {"many": True}), [one])
        await made.close()
    assert isinstance(refused, Failed)
    assert (refused.permanent, refused.asked) == (True, False)
    assert isinstance(sent, Answer)
    assert [message.rcpt_tos for message in server.messages] == [["a@x.org", "b@x.org"]]


@given(st.text(max_size=60) | st.text('ab,<>"\\ @x.\r\n', max_size=60))
def test_any_name_gives_one_recipient(name: str) -> None:
    for source in (NAMED, '"{{data.name}}" <{{data.email}}>', "{{data.name}}<{{data.email}}>"):
        try:
            (box,) = compile_addresses("to", source).render(
                {"data": {"name": name, "email": "a@x.org"}}
            )
            written = mime.message([mime.address_header("To", [box])], "x", None, "=_1")
        except RenderError:
            assert any("\ud800" <= character <= "\udfff" for character in name)
            continue
        assert box.address == "a@x.org"
        message = message_from_bytes(written, policy=policy.default)
        assert [address.addr_spec for address in message["To"].addresses] == ["a@x.org"]
        assert message.keys()[:2] == ["To", "MIME-Version"]


@pytest.mark.parametrize("source", ["{{data.email", "a@", "Ada <a@x.org", '"Ada <a@x.org>'])
def test_errors_of_addresses_quote_the_template(source: str) -> None:
    with pytest.raises(DefinitionError) as raised:
        compile_addresses("to", source)
    assert "\ue000" not in str(raised.value)
