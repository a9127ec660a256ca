"""The text part that is made of HTML."""

from __future__ import annotations

import subprocess
import sys
from time import process_time

import pytest

from sequencerd.core.task import Answer
from sequencerd.runners.email.plain import MAX_HTML_LENGTH, plain_text
from tests.helpers.runners import email_runner
from tests.helpers.servers import HOST, smtp_server, task

HTML = """<html><head><title>T</title><style>a{b:c}</style></head><body>
<div style="display:none">preview</div><h1>Hello  Ada &amp; Co</h1>
<p>See <a href="https://example.com/a?b=c">your order</a>, or
<a href="https://example.com">https://example.com</a>,
<a href="mailto:a@example.com">a@example.com</a>.</p><ul><li>one</li><li>two</li></ul>


<table><tr><td>Sum</td><td>12</td></tr></table><script>x()</script></body></html>"""


def test_the_text_of_html() -> None:
    assert plain_text(HTML) == (
        "Hello Ada & Co\n\n"
        "See [your order](https://example.com/a?b=c), or https://example.com, a@example.com.\n\n"
        "  * one\n  * two\nSum  12"
    )


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ('<a href="https://x.org"><img src=a alt="Buy now"></a>', "[Buy now](https://x.org)"),
        ('<a href="https://x.org"><img src=a alt="https://x.org"></a>', "https://x.org"),
        (
            '<a href="https://x.org"> <img src=a></a><a href="https://y.org"></a>',
            "<https://x.org><https://y.org>",
        ),
        ('<img src=a alt="Logo"> Hi<img src=pixel alt="">', "[Logo] Hi"),
    ],
)
def test_images_are_represented_by_their_alternative_texts(html: str, text: str) -> None:
    assert plain_text(html) == text


@pytest.mark.parametrize(
    "html", ["", "  ", "<img src=x>", "<!-- x -->", "x" * (MAX_HTML_LENGTH + 1)]
)
def test_no_text_where_there_is_none(html: str) -> None:
    assert plain_text(html) is None


def test_nonsense_ends() -> None:
    for html in ("<div>" * 5000 + "x", "<p>a" * 2000, "</b></table><", "\x00a", "\ud800"):
        plain_text(html)


def test_many_blanks_take_little_time() -> None:
    plain_text("x")
    before = process_time()
    plain_text(f"<pre>{' ' * 60_000}x</pre>")
    assert process_time() - before < 2  # seconds, in which nothing else is done


async def test_a_message_with_html_alone_has_both_parts() -> None:
    config = {"from": "a@x.org", "to": "b@x.org", "subject": "x", "html": "<p>{{data.name}}</p>"}
    async with smtp_server() as server:
        runner = email_runner(f"smtp://{HOST}:{server.port}")
        tasks = [task(name="<Ada> & Co"), task(name="")]
        results = await runner.run(runner.compile(config), tasks)
        await runner.close()
        assert all(isinstance(result, Answer) for result in results)
        found = sorted((server.parsed(n) for n in range(2)), key=lambda one: not one.is_multipart())
    text, html = found[0].iter_parts()
    assert text.get_content().strip() == "<Ada> & Co"
    assert html.get_content().strip() == "<p>&lt;Ada&gt; &amp; Co</p>"
    assert found[1].get_content_type() == "text/html"  # nothing to say in plain text


def test_the_library_is_imported_when_it_is_needed() -> None:
    program = "import sys, sequencerd.runners.email.runner; assert 'inscriptis' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
