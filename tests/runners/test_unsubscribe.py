"""Links to unsubscribe with: in messages, and what their tokens are good for."""

from __future__ import annotations

from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.faults import DefinitionError
from sequencerd.core.model import NOTHING_SHARED, MessageContext
from sequencerd.core.task import Task
from sequencerd.runners.email.runner import write
from sequencerd.runners.unsubscribe import Subscription, UnsubscribeLinks
from tests.helpers.runners import email_runner, sms_runner

OLD, NEW = "o" * 32, "n" * 32
LINKS = UnsubscribeLinks("https://mail.example.com/", [NEW, OLD])
MAIL = {
    "from": "shop@example.com",
    "to": "{{data.email}}",
    "subject": "Offer",
    "html": '<a href="{{unsubscribe_url}}">Stop</a>',
}
SMS = {"from": "+15005550006", "to": "{{data.phone}}", "message": "Stop: {{unsubscribe_url}}"}


def token(link: str) -> str:
    return link.removeprefix("https://mail.example.com/unsubscribe/")


def task(topic: str | None = "news", **data: Any) -> Task:
    return Task("7:1:x", {"subject": "user-7", "data": data}, None, topic)


def headers(
    config: dict[str, Any], one: Task, shared: MessageContext = NOTHING_SHARED, **options: Any
) -> dict[str, str]:
    """The headers and the text of a message, as one mapping."""
    made = email_runner("smtp://localhost", **{"links": LINKS, **options})
    content = write(made.compile(config, shared), one, datetime.now(UTC)).content
    message = message_from_bytes(content, policy=policy.default)
    assert isinstance(message, EmailMessage)
    html = message.get_body(("html",))
    assert html is not None
    return {**message, "html": html.get_content()}


@given(st.builds(Subscription, *[st.text(max_size=20)] * 4))
def test_a_token_contains_the_subscription(subscription: Subscription) -> None:
    made = token(LINKS.link(subscription))
    assert LINKS.read(made) == subscription
    assert made.isascii()
    assert not set(made) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def test_the_first_key_signs_and_all_verify() -> None:
    subscription = Subscription("email", "ada@x.org", "news", "de")
    before = token(UnsubscribeLinks("https://x.org", [OLD]).link(subscription)).rpartition("/")[2]
    assert LINKS.read(before) == subscription  # an older key verifies
    signed = token(LINKS.link(subscription))
    assert (
        UnsubscribeLinks("https://x.org", [NEW]).read(signed) == subscription
    )  # the first one signs
    assert UnsubscribeLinks("https://x.org", [OLD]).read(signed) is None
    assert "ada" not in signed


def test_no_token_can_be_changed() -> None:
    made = token(LINKS.link(Subscription("email", "ada@x.org", "news")))
    for number, one in enumerate(made):
        other = "A" if one != "A" else "Z"
        changed = LINKS.read(made[:number] + other + made[number + 1 :])
        # the last characters of base64 have bits that mean nothing
        assert changed is None or changed == LINKS.read(made)
    for wrong in ("", ".", made[:-1], made + "x" * 2000, f"{made}.{made}", "\u00fc"):
        assert LINKS.read(wrong) is None


@pytest.mark.parametrize(
    "behind",
    [
        ".",
        ",",
        ")",
        ">",
        ">.",
        "\u201d",
        "!",
        "=",
        "*",
        " ",
        "...",
        "/",
        "/x",
        "&gt;",
        "&utm_id=x.y",
    ],
)
def test_a_link_may_be_copied_with_what_follows_it(behind: str) -> None:
    subscription = Subscription("sms", "+49151123456", "news")
    assert LINKS.read(token(LINKS.link(subscription)) + behind) == subscription


def test_a_message_has_the_link_in_its_text_and_its_header() -> None:
    found = headers(MAIL, task(email="Ada@X.org", locale="de-AT"))
    link = found["List-Unsubscribe"].strip("<>")
    assert LINKS.read(token(link)) == Subscription("email", "Ada@X.org", "news", "de-AT")
    assert found["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert link in found["html"]


def test_the_language_is_at_the_path_of_the_sequence_also_without_translations() -> None:
    shared = MessageContext("data.language")
    data = {"email": "ada@x.org", "phone": "+49151123456", "language": "fr", "locale": "de"}
    for subject in ("Offer", {"default": "Offer", "fr": "Offre"}):
        found = headers({**MAIL, "subject": subject}, task(**data), shared)
        link = LINKS.read(token(found["List-Unsubscribe"].strip("<>")))
        assert link is not None
        assert link.language == "fr"
    made = sms_runner(links=LINKS)
    values = made.preview(made.compile(SMS, shared), task(**data))
    sms = LINKS.read(token(values["message"].removeprefix("Stop: ")))
    assert sms is not None
    assert sms.language == "fr"


def test_a_message_without_a_topic_unsubscribes_from_all() -> None:
    found = headers(MAIL, task(None, email="ada@x.org"))
    link = token(found["List-Unsubscribe"].strip("<>"))
    assert LINKS.read(link) == Subscription("email", "ada@x.org", "*")


def test_a_recipient_cannot_unsubscribe_another() -> None:
    found = headers({**MAIL, "to": ["{{data.email}}", "bob@x.org"]}, task(email="ada@x.org"))
    link = token(found["List-Unsubscribe"].strip("<>"))
    assert LINKS.read(link) == Subscription("email", "user-7", "news")


def test_a_step_and_a_setting_have_their_own_links() -> None:
    own = {**MAIL, "html": "x", "listUnsubscribe": "https://shop.example/{{subject}}"}
    found = headers(own, task(email="ada@x.org"))
    assert found["List-Unsubscribe"] == "<https://shop.example/user-7>"
    assert "List-Unsubscribe" not in headers({**own, "listUnsubscribe": ""}, task(email="a@x.org"))
    theirs = headers({**MAIL, "html": "x"}, task(email="a@x.org"), list_unsubscribe="https://y.org")
    assert theirs["List-Unsubscribe"] == "<https://y.org>"


def test_an_sms_has_a_link_for_its_number() -> None:
    made = sms_runner(links=LINKS)
    values = made.preview(made.compile(SMS), task(phone="+49 151 123456"))
    link = token(values["message"].removeprefix("Stop: "))
    assert LINKS.read(link) == Subscription("sms", "+49151123456", "news")


def test_the_host_of_a_link_is_in_ascii() -> None:
    link = UnsubscribeLinks("https://bücher.de/post", [NEW]).link(Subscription("email", "a@x.org"))
    assert link.startswith("https://xn--bcher-kva.de/post/unsubscribe/")


def test_without_the_setting_a_link_would_be_empty() -> None:
    with pytest.raises(DefinitionError, match="html: unsubscribe_url would be empty"):
        email_runner("smtp://localhost").compile(MAIL)
    with pytest.raises(DefinitionError, match="message: unsubscribe_url would be empty"):
        sms_runner().compile(SMS)
    assert "List-Unsubscribe" not in headers(
        {**MAIL, "html": "x"}, task(email="a@x.org"), links=None
    )


PARTIALS = (
    ("footer", "{{unsubscribe_url}}"),
    ("layout", "{{> @partial-block}}{{> footer}}"),
    ("page", "{{> menu}}{{> footer}}"),
    ("link", "{{url}}"),
)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"html": "{{> footer}}"}, "html"),
        ({"html": "x", "text": {"en": "x", "de": "{{#> layout}}x{{/layout}}"}}, "text"),
        ({"html": "{{#*inline 'menu'}}x{{/inline}}{{> page}}"}, "html"),
        ({"html": "x", "headers": {"List-Unsubscribe": "<{{unsubscribe_url}}>"}}, "headers"),
        ({"html": "{{> link}}{{#each data.lists}}{{> footer}}{{/each}}"}, None),  # of each list
    ],
)
def test_a_link_in_a_partial_or_a_header_would_be_empty(
    change: dict[str, Any], key: str | None
) -> None:
    def compiled(links: UnsubscribeLinks | None) -> object:
        made = email_runner("smtp://localhost", links=links)
        return made.compile({**MAIL, **change}, MessageContext(partials=PARTIALS))

    assert compiled(LINKS)
    if key is None:
        assert compiled(None)
        return
    with pytest.raises(DefinitionError, match=rf"^{key}.*: unsubscribe_url would be empty"):
        compiled(None)
