"""Templates: handlebars' rules, the helpers, and what bounds a rendering."""

from __future__ import annotations

import html
import json
import re
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.calendar.date_format import compile_format
from sequencerd.core.faults import DefinitionError, EvaluationError
from sequencerd.core.javascript import templates
from sequencerd.core.javascript.templates import (
    MAX_SOURCE,
    MAX_TAGS,
    compile_template,
    with_renamed_keys,
)
from sequencerd.core.view import View

CONTEXT: dict[str, object] = {
    "name": "Ada & Co",
    "n": 1.0,
    "zero": 0,
    "yes": True,
    "no": False,
    "nothing": None,
    "list": ["a", "b"],
    "empty": [],
    "object": {"b": 1, "2": 2, "1": 3, "x y": 4},
    "people": [{"name": "A", "tags": ["x"]}, {"name": "B", "tags": []}],
    "unknown": "sr-RS",
    "own": "constructor",
    "german": " de_AT\n",
    "smile": "a😀",
    "due": "2024-03-01T23:30:00Z",
    "timezone": "Europe/Berlin",
}

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def render(source: str, context: object = CONTEXT, *, escape: bool = False) -> str:
    assert isinstance(context, dict)
    return compile_template(source, escape=escape).render(context)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("plain", "plain"),
        ("{{name}}", "Ada & Co"),
        ("{{missing}}{{missing.deeper}}{{nothing}}", ""),
        ("{{people.0.name}}{{people.[1].name}}", "AB"),
        ("{{object.[x y]}}", "4"),
        ("{{list.length}} {{smile.length}} {{name.[0]}}", "2 3 A"),
        ("{{n}} {{zero}} {{yes}} {{list}} {{object}}", "1 0 true a,b [object Object]"),
        ('{{"name"}}', "Ada & Co"),
        ("\\{{name}} \\\\{{n}}", "{{name}} \\1"),
        ("{{! no }}{{!-- {{no}} --}}yes", "yes"),
    ],
)
def test_a_path_prints_as_in_javascript(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{#if zero}}a{{else}}b{{/if}}", "b"),
        ("{{#if zero includeZero=true}}a{{^}}b{{/if}}", "a"),
        ("{{#if empty}}a{{else if object}}b{{/if}}", "b"),
        ("{{#unless no}}a{{/unless}}", "a"),
        ("{{#with zero}}{{this}}{{/with}}{{#with empty}}a{{else}}b{{/with}}", "0b"),
        ("{{#each list}}{{@index}}{{this}}{{#unless @last}},{{/unless}}{{/each}}", "0a,1b"),
        ("{{#each object}}{{@key}}={{this}};{{/each}}", "1=3;2=2;b=1;x y=4;"),
        ("{{#each empty}}a{{else}}b{{/each}}", "b"),
        ("{{#each list as |item i|}}{{i}}{{item}}{{/each}}", "0a1b"),
        ("{{#each people}}{{#if tags}}{{../n}}{{@root.zero}}{{name}}{{/if}}{{/each}}", "10A"),
        ("{{#each people}}{{#each tags}}{{@../index}}{{../name}}{{/each}}{{/each}}", "0A"),
        ("{{#people}}{{name}}{{/people}}{{^no}}no{{/no}}{{#yes}}{{n}}{{/yes}}", "ABno1"),
        ('{{lookup object "x y"}}{{lookup list 1}}{{lookup (lookup people 0) "name"}}', "4bA"),
    ],
)
def test_blocks_follow_handlebars(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{#each list}}\n- {{this}}\n{{/each}}\nend", "- a\n- b\nend"),
        ("{{#each list}} {{this}}{{/each}}", " a b"),
        ("  {{#if yes}}  \r\n  x\r\n  {{/if}}\r\ny", "  x\r\ny"),
        ("a\n{{~#if yes~}}\n b \n{{~/if}}\nc", "abc"),
        ("a {{~n~}} b", "a1b"),
        ("a\n{{n}}\nb", "a\n1\nb"),
    ],
)
def test_a_block_alone_on_its_line_leaves_no_line(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(
    ("source", "tag"),
    [
        ("Hello {{data.name}},", "data.name"),
        ("{{data.user.name}}", "data.user.name"),
        ("{{data.nothing}}", "data.nothing"),
        ("{{{data.name}}}", "data.name"),
        ("{{@root.data.name}}", "@root.data.name"),
        ("{{capitalize data.name}}", "{{capitalize data.name}}"),
        ("{{#each data.items}}{{name}}{{/each}}", "name"),
        ("{{#if data.yes}}{{data.code}}{{/if}}", "data.code"),
    ],
)
def test_strict_a_missing_value_is_an_error(source: str, tag: str) -> None:
    view: dict[str, object] = {"data": {"nothing": None, "items": [{}], "yes": True}}
    template = compile_template(source, escape=False, strict=True)
    with pytest.raises(EvaluationError, match=re.escape(f"{tag}: the value is missing")) as error:
        template.render(view)
    assert error.value.failure == "bad_data"
    assert "missing" not in compile_template(source, escape=False).render(view)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{#if data.user.vip}}VIP{{else}}plain{{/if}}", "plain"),
        ("{{#if data.no}}{{data.code}}{{/if}}", ""),
        ('{{default data.user.name "you"}}', "you"),
        ("{{#each data.none}}{{name}}{{/each}}", ""),
        ("{{data.zero}} {{data.nope}} {{data.empty}}", "0 false "),
    ],
)
def test_strict_templates_may_test_missing_values(source: str, expected: str) -> None:
    view: dict[str, object] = {"data": {"zero": 0, "nope": False, "empty": ""}}
    assert compile_template(source, escape=False, strict=True).render(view) == expected


def test_adjacent_expressions_are_written_in_order() -> None:
    assert render("{{{a}}}{{{b}}}", {"a": 1, "b": 2}) == "12"


def test_only_html_is_escaped() -> None:
    context = {"x": '<a href="b">\'&`</a>'}
    escaped = "&lt;a href&#x3D;&quot;b&quot;&gt;&#x27;&amp;&#x60;&lt;/a&gt;"
    assert render("{{x}}", context, escape=True) == escaped
    assert render("{{{x}}}{{&x}}", context, escape=True) == context["x"] * 2
    assert render("{{x}}", context) == context["x"]


@pytest.mark.parametrize(
    "path",
    [
        "name.__class__",
        "name.upper",
        "object.items",
        "object.__dict__",
        "list.append",
        "n.real",
        "@root.__init__",
        "constructor",
        "this.__proto__",
        "@_parent",
    ],
)
def test_only_data_can_be_reached(path: str) -> None:
    assert render(f"{{{{{path}}}}}") == ""
    assert render(f'{{{{lookup this "{path}"}}}}') == ""


@pytest.mark.parametrize(
    "source",
    [
        "{{name",
        "{{name}",
        "{{name}}}",
        "{{{name}}",
        "{{{name}}}}",
        "{{}}",
        "{{/}}",
        "{{/if}}",
        "{{#if x}}",
        "{{#if x}}{{/each}}",
        "{{#if x}}{{else}}{{else}}{{/if}}",
        "{{else}}",
        "{{#if}}{{/if}}",
        "{{#if a b}}{{/if}}",
        "{{if a}}",
        "{{#each list as ||}}{{/each}}",
        "{{#each list as |a.b|}}{{/each}}",
        "{{list.0}}",
        "{{a.this}}",
        "{{a..b}}",
        "{{a.}}",
        "{{a+b}}",
        "{{a=b}}",
        "{{ #if a}}{{/if}}",
        "{{> partial}}",
        "{{lookup object}}",
        "{{default}}{{default name x=1}}",
        "{{json a b}}",
        '{{date due form="D"}}',
        '{{date due format="DDDD"}}',
        '{{date due zone="Europe/Berlim"}}',
        "{{#date due}}{{/date}}",
        '{{default (lookup) "x"}}',
    ],
)
def test_a_malformed_template_is_refused(source: str) -> None:
    with pytest.raises(DefinitionError):
        compile_template(source, escape=True)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{#if no}}\n{{dat due x=1}}{{/if}}", "line 2: .*unknown helper 'dat'.*did you mean date"),
        ("\n\n{{name.x y}}", "line 3: .*unknown helper 'name.x': a path takes no arguments"),
        ("{{#each list as |item|}}\n{{item 1}}{{/each}}", "line 2: .*unknown helper 'item'"),
        ("{{#each list as |date|}}\n{{date date}}{{/each}}", "line 2: 'date' is a block parameter"),
        ("a\n{{> footer}}", "line 2: .*no partial 'footer'"),
        ("{{#if a}}\n\n{{/each}}", "line 1: the block if is closed by {{/each}}: write {{/if}}"),
        ("a\n{{#if a}}{{#each b}}{{/each}}\n{{c}}\n", "line 2: the block if is not closed"),
        ("{{! {{#if a}} }}{{#> layout}}\\{{/layout}}", "line 1: the block layout is not closed"),
        ("{{#if a}}{{#else}}{{/if}}", "line 1: write {{else}} without #"),
        ("{{#if a}}{{elseif b}}{{/if}}", "line 1: .*'elseif': write {{else if value}}"),
        ("{{#if a}}{{else}}{{else}}{{/if}}", "a block may have only one {{else}}"),
        ("{{#if a}}{{else}}{{else if b}}{{/if}}", "{{else}} must be the last part"),
        ("{{else}}", "{{else}} belongs into a block"),
        ("{{else if a}}", "{{else}} belongs into a block"),
        ("{{#if a}}", "line 1: the block if is not closed: write {{/if}}$"),
        ("a\n{{/if}}", "line 2: .* there is no block to close"),
        ("{{name", "the tag is not closed: write }}"),
        ("{{name}", "the tag is not closed: write }}"),
        ('{{default name "x}}', "'\"x}}' is not expected here"),
        ("{{{name}} {{x}}", "as many braces"),
        ("{{name}}}", "as many braces"),
        ("{{}}", "the tag has no name"),
        ("{{upper (lower a}}", "a parenthesis is not closed"),
        ("{{#each a as |b}}{{/each}}", "names between two bars"),
        ("{{!-- a }}", "the comment or the raw block is not closed"),
        ("{{{{raw}}}} a", "the comment or the raw block is not closed"),
        ("{{#eq a b}}{{/eq}}", "eq is not a block"),
        ('{{date due locale="xx"}}', "'xx' is not a known locale"),
        ("{{* x}}", "not a decorator"),
        ("a\n{{date due locale=5}}", "line 2: locale must be a text, not 5"),
        ("{{date due zone=true}}", "line 1: zone must be a text, not true"),
        ("{{date due format=1}}", "line 1: format must be a text, not 1"),
        ("{{#if no}}\n{{date '2026-02-30'}}{{/if}}", 'line 2: "2026-02-30" is not a date'),
        ("{{date 20260201}}", "line 1: 20260201 is not a date, write an ISO 8601 text"),
        ("{{number 'two'}}", 'line 1: "two" is not a number'),
        ("{{number '1_000'}}", 'line 1: "1_000" is not a number'),
        ("{{number true}}", "line 1: true is not a number"),
        ("{{number n locale=1}}", "line 1: locale must be a text, not 1"),
        ("{{#if (number n decimals=21)}}{{/if}}", "decimals: .* from 0 to 20, not 21"),
        ("{{number n decimals=-1}}", "decimals: .* from 0 to 20, not -1"),
        ("{{number n decimals=1.5}}", "decimals: .* from 0 to 20, not 1.5"),
        ("{{number n decimals='2'}}", 'decimals: .* from 0 to 20, not "2"'),
    ],
)
def test_an_error_is_reported_with_its_line(source: str, words: str) -> None:
    with pytest.raises(DefinitionError, match=f"(?s){words}"):
        compile_template(source, escape=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{number ' 1.5e3 '}}{{number '0x10'}}{{number '.5'}}{{number -7}}",
        "{{number '1e21'}}{{number n decimals=undefined locale=null}}{{number n decimals=20}}",
        "{{date '2026-02-28' zone=null locale=undefined format=null}}{{date due format=''}}",
    ],
)
def test_what_can_be_rendered_is_not_refused(source: str) -> None:
    assert render(source, {"n": 1, "due": "2026-01-01"})


def test_all_errors_of_a_template_are_reported() -> None:
    with pytest.raises(DefinitionError) as caught:
        compile_template("{{dat a b}}{{> c}}\n{{json}}{{json a b}}", escape=True)
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{#if no}}{{else each list}}{{this}}{{/if}}", "ab"),
        ("{{#with nothing}}{{else with object}}{{b}}{{/with}}", "1"),
        ('{{#*inline "line"}}- {{this}};{{/inline}}{{#each list}}{{> line}}{{/each}}', "- a;- b;"),
        ('{{#*inline "p"}}{{name}}{{x}}{{/inline}}{{> p people.[1] x=1}}', "B1"),
        ("{{#> footer}}none{{/footer}}", "none"),
        (
            "{{#each list as |a i|}}{{#each @root.list as |b|}}{{a}}{{b}}{{i}} {{/each}}{{/each}}",
            "aa0 ab0 ba1 bb1 ",
        ),
        ("{{#if (and yes (not no) (gt 2 n))}}a{{/if}}", "a"),
        ("{{{{raw}}}}{{x}}{{{{/raw}}}}", ""),
        ("{{upper (default missing (lower name))}}", "ADA & CO"),
    ],
)
def test_all_syntax_of_handlebars_is_supported(source: str, expected: str) -> None:
    assert render(source) == expected


def test_an_unknown_helper_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(DefinitionError, match=r"'dat'.*did you mean date"):
        compile_template('{{dat due format="D"}}', escape=False)


def test_a_malformed_tag_is_shown_with_its_line() -> None:
    with pytest.raises(DefinitionError, match=r"line 3: .*\{\{name\}"):
        compile_template("a\nb\n{{name}", escape=False)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("{{data.items.0}}", r"as in \{\{data\.items\.\[0\]\}\}"),
        ("{{#if data.items.0}}x{{/if}}", "write an index or a key in brackets"),
        ("{{data.items[0].name}}", "write an index or a key in brackets"),
        ("{{data['a']}}", "write an index or a key in brackets"),
        ("a\n{{#if data.a == 'x'}}y{{/if}}", r"line 2: .*; there are no operators: .*\(eq "),
        ("{{data.name | upcase}}", "there are no operators"),
        ("{{#if !data.a}}y{{/if}}", "there are no operators"),
        ("{{data.a + 1}}", "there are no operators"),
        ("{{#if (eq data.a 1}}x{{/if}}", "a parenthesis is not closed$"),
        ("{{data.", "the tag is not closed"),
    ],
)
def test_a_syntax_error_says_what_to_write(source: str, hint: str) -> None:
    with pytest.raises(DefinitionError, match=hint):
        compile_template(source, escape=False)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('{{date due format="D MMMM YYYY"}}', "2 March 2024"),
        (
            '{{date due format="dddd, Do MMM YY [at] HH:mm" zone="UTC"}}',
            "Friday, 1st Mar 24 at 23:30",
        ),
        ("{{date due}}", "2024-03-02T00:30:00+01:00"),
        ('{{#each list}}{{date @root.due format="M/D" zone="UTC"}} {{/each}}', "3/1 3/1 "),
        ('{{default missing nothing "there"}}', "there"),
        ('{{default zero "there"}} {{default empty no "there"}}', "0 there"),
        ("{{json object}}", '{"1":3,"2":2,"b":1,"x y":4}'),
        ("{{log name}}", ""),
        ("{{eq n 1}} {{eq n '1'}} {{ne n 1}} {{eq missing nothing}}", "true false false false"),
        ("{{gt n 0}} {{gte n 1}} {{lt n 1}} {{lte n 1}}", "true true false true"),
        ("{{and yes empty}} {{or no empty zero}} {{not zero}}", "false false true"),
        ('{{includes list "b"}} {{includes name "Ada"}} {{includes nothing 1}}', "true true false"),
        ("{{url name}} {{url smile}}{{url missing}}", "Ada%20%26%20Co a%F0%9F%98%80"),
        (
            '{{number 1234567.891 decimals=2}} {{number "0.5"}} {{number zero decimals=1}}',
            "1,234,567.89 0.5 0.0",
        ),
        ('{{number 1234567.891 decimals=2 locale="de"}}', "1.234.567,89"),
        ('{{number -1234 locale="es"}} {{number -12345 locale="es-ES"}}', "-1234 -12.345"),
        ("{{number 1.005 decimals=2}} {{number -0.001 decimals=2}}", "1.01 0.00"),
        (
            "{{upper name}} {{lower name}} [{{trim '  a b '}}] {{capitalize 'élan'}}",
            "ADA & CO ada & co [a b] Élan",
        ),
        ('{{date due format="D MMMM YYYY, dddd" locale="de"}}', "2 März 2024, Samstag"),
        (
            '{{date due format="D MMMM" locale="ru"}} {{date due format="MMMM" locale="ru"}}',
            "2 марта март",
        ),
        ('{{date due format="Do MMMM" locale="fr-CA"}}', "2 mars"),
        (
            '{{date due format="D MMMM" locale=unknown}} {{number 1.5 locale=unknown}}',
            "2 March 1.5",
        ),
        ('{{date due format="D MMMM" locale=own}} {{number 1.5 locale=own}}', "2 March 1.5"),
        ('{{date due format="D MMMM" locale=german}} {{number 1.5 locale=german}}', "2 März 1,5"),
        ('{{date due format="YYYY年MMMMDo h:mm A" locale="ja"}}', "2024年3月2日 12:30 午前"),
        ('{{#if (eq (date due format="YYYY") "2024")}}leap{{/if}}', "leap"),
        ('{{upper (date due format="ddd")}}', "SAT"),
        ('{{date (date due format="YYYY-MM-DD") format="D" zone="UTC"}}', "2"),
    ],
)
def test_helpers_render(source: str, expected: str) -> None:
    assert render(source) == expected


def test_a_helpers_name_without_arguments_is_a_field() -> None:
    context = {"date": "today", "json": "x", "links": [{"url": "a", "number": 0}], "and": [1, 2]}
    assert render("{{date}} {{json}}", context) == "today x"
    assert (
        render("{{#each links}}{{url}}{{number}}{{/each}}{{#and}}{{this}}{{/and}}", context)
        == "a012"
    )
    assert (
        render("{{#each links as |url|}}{{url.url}}{{url}}{{/each}}", context) == "a[object Object]"
    )


LOCALES = "de fr es it nl pt pl sv da fi nb cs tr ru uk ja zh".split()  # noqa: SIM905 -- shorter


@pytest.mark.parametrize("locale", LOCALES)
def test_months_and_days_have_names_in_each_language(locale: str) -> None:
    months, days = set(), set()
    for month in range(1, 13):
        context = {"due": f"2024-{month:02}-{month:02}T12:00:00Z"}
        months.add(render(f'{{{{date due format="D MMMM" locale="{locale}"}}}}', context))
    for day in range(1, 8):
        context = {"due": f"2024-01-{day:02}"}
        days.add(render(f'{{{{date due format="dddd" locale="{locale}"}}}}', context))
    assert len(months) == 12
    assert len(days) == 7
    english = {
        render('{{date due format="D MMMM"}}', {"due": f"2024-{n:02}-{n:02}"}) for n in range(1, 13)
    }
    assert months != english


@given(value=st.floats(-1e15, 1e15), decimals=st.integers(0, 6), locale=st.sampled_from(LOCALES))
def test_a_number_reads_back(value: float, decimals: int, locale: str) -> None:
    written = render(f'{{{{number x decimals={decimals} locale="{locale}"}}}}', {"x": value})
    fraction = re.split(r"\D", written)[-1] if decimals else ""
    assert len(fraction) == decimals
    digits = re.sub(r"\D", "", written)
    assert int(digits) / 10**decimals == pytest.approx(abs(value), abs=10**-decimals, rel=1e-12)


@pytest.mark.parametrize("value", [None, "", "x", [1], {}, True])
def test_values_that_are_not_numbers_fail_with_their_tag(value: object) -> None:
    with pytest.raises(EvaluationError, match=r"\{\{number data\.sum\}\}: the value is"):
        render("{{number data.sum}}", {"data": {"sum": value}})


def test_the_view_of_an_enrollment_renders_as_its_text() -> None:
    data = '{"due": "2024-03-01T23:30:00Z", "sum": 1.10}'
    view = View.of({"data": json.loads(data), "timezone": "Europe/Berlin"}, data)
    for source in ('{{date data.due format="D.M."}} {{data.sum}}', "{{date @root.data.due}}"):
        template = compile_template(source, escape=True)
        assert template.render(view) == template.render(view.text) == template.render(dict(view))


def test_rendering_does_not_change_its_input() -> None:
    context = {"list": [3, 1], "o": {"a": 1}}
    source = (
        '{{#each list}}{{this}}{{/each}}{{json o}}{{> p o b=2}}{{#*inline "p"}}{{b}}{{/inline}}'
    )
    assert render(source, context) == render(source, context) == '31{"a":1}2'


def test_the_first_zone_that_does_not_exist_is_the_only_one_searched() -> None:
    """The search for a similar name takes a millisecond, and data may contain thousands."""
    zones = [f"Europe/Nowhere{number}" for number in range(1_000)]
    searched = templates._answer.cache_info().misses
    with pytest.raises(EvaluationError, match="'Europe/Nowhere0' is not a time zone"):
        render("{{#each zones}}{{date '2026-03-01' zone=this}}{{/each}}", {"zones": zones})
    assert templates._answer.cache_info().misses - searched < 10


def test_a_date_that_only_seemed_to_be_printed_cannot_fail() -> None:
    block = "{{#unless (eq (date '2026-03-01' format='D') '1')}}{{date due zone=bad}}{{/unless}}"
    assert render(f"{block}{{{{date due format='D'}}}}", {"due": "2026-03-02", "bad": "x"}) == "2"


def test_a_date_without_a_zone_is_in_utc() -> None:
    assert render('{{date due format="H:mm z"}}', {"due": "2024-03-01T23:30:00Z"}) == "23:30 UTC"


@pytest.mark.parametrize("value", [None, "", "soon", "June 8, 2018", 5, ["2024-01-01"], {}])
def test_values_that_are_not_dates_fail_with_their_path(value: object) -> None:
    with pytest.raises(EvaluationError, match=r"data\.due") as caught:
        render('{{date data.due format="D"}}', {"data": {"due": value}})
    assert caught.value.failure == "bad_data"


@given(value=JSON)
def test_json_is_safe_in_html_and_reads_back(value: object) -> None:
    in_script = render("{{{json x}}}", {"x": value}, escape=True)
    in_text = render("{{json x}}", {"x": value}, escape=True)
    assert not set("<>&") & set(in_script)
    for written in (in_script, html.unescape(in_text)):
        assert json.loads(written, parse_int=float) == json.loads(
            json.dumps(value), parse_int=float
        )


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("YYYY-MM-DDTHH:mm:ss.SSSZ", "2024-07-03T00:05:09.042+02:00"),
        ("YY M D d[ay]", None),
        ("ddd h:mm A / hh a", "Wed 12:05 AM / 12 am"),
        ("Do MMM, [Q]Q ZZ z", "3rd Jul, Q3 +0200 CEST"),
        ("H m s", "0 5 9"),
    ],
)
def test_formats_are_those_of_moment(pattern: str, expected: str | None) -> None:
    at = datetime(2024, 7, 3, 0, 5, 9, 42_000, tzinfo=ZoneInfo("Europe/Berlin"))
    if expected is None:
        with pytest.raises(DefinitionError, match="unknown token"):
            compile_format(pattern)
    else:
        assert compile_format(pattern)(at) == expected


def test_afternoons_have_twelve_hours() -> None:
    written = [
        compile_format("h A, hh a")(datetime(2024, 7, 3, hour, tzinfo=UTC)) for hour in (11, 12, 15)
    ]
    assert written == ["11 AM, 11 am", "12 PM, 12 pm", "3 PM, 03 pm"]


def test_a_long_format_is_rejected() -> None:
    assert compile_format("." * 100)(datetime(2024, 7, 3, tzinfo=UTC)) == "." * 100
    with pytest.raises(DefinitionError, match="longer than 100 characters"):
        compile_format("." * 101)


@given(at=st.datetimes(timezones=st.just(UTC)))
def test_the_default_format_is_iso_8601(at: datetime) -> None:
    written = compile_format("YYYY-MM-DDTHH:mm:ssZ")(at)
    assert datetime.fromisoformat(written) == at.replace(microsecond=0)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (100.0, "100"),
        (-0.0, "0"),
        (1e21, "1e+21"),
        (123456789012345680000, "123456789012345680000"),
        (9007199254740993, "9007199254740992"),
        (0.000001, "0.000001"),
        (1.5e-7, "1.5e-7"),
        (10**400, "Infinity"),
    ],
)
def test_numbers_print_as_in_javascript(number: float, expected: str) -> None:
    assert render("{{x}}", {"x": number}) == expected


@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_a_printed_number_reads_back(number: float) -> None:
    assert float(render("{{x}}", {"x": number})) == number


@pytest.mark.parametrize(
    "source",
    [
        "x" * (MAX_SOURCE + 1),
        "{{a}}" * (MAX_TAGS + 1),
        "{{#if a}}" * 200 + "{{/if}}" * 200,
        "{{" * 1000,
        '{{"' + '\\"' * 100_000,
        "{{a " + "(" * 100_000,
    ],
)
def test_an_oversized_template_is_refused(source: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        compile_template(source, escape=True)
    assert len(str(caught.value)) < 500


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{{#each l}}{{#each @root.l}}{{#each @root.l}}{{/each}}{{/each}}{{/each}}",
        "{{#each l}}{{@root.text}}{{/each}}",
        "{{#each l}}{{#if (json @root)}}{{/if}}{{/each}}",
        "{{#each l}}" + "{{!}}a" * 4_000 + "{{/each}}",
    ],
)
@pytest.mark.usefixtures("little_time")
def test_a_rendering_is_bounded(source: str) -> None:
    context = {"l": list(range(2_000)), "text": "é" * 2_000}
    with pytest.raises(EvaluationError) as caught:
        render(source, context)
    assert caught.value.failure == "bad_data"


def test_the_deepest_template_renders_from_a_deep_stack() -> None:
    depth = 99
    context: dict[str, object] = {}
    for _ in range(depth):
        context = {"l": [context]}
    source = "{{#each l}}" * depth + "x" + "{{/each}}" * depth

    def from_depth(frames: int) -> str:
        return render(source, context) if frames == 0 else from_depth(frames - 1)

    assert from_depth(200) == "x"


def outcome(source: str, context: dict[str, object]) -> str:
    """How a template ends: "refused", "rendered", or the failure of the enrollment."""
    try:
        compile_template(source, escape=True).render(context)
    except DefinitionError:
        return "refused"
    except EvaluationError as error:
        return error.failure
    return "rendered"


@given(source=st.text(alphabet=st.sampled_from("{}#/^~!&>@.[]()|\"'\\ \nab0=") | st.characters()))
def test_any_text_renders_or_is_refused_in_words(source: str) -> None:
    context: dict[str, object] = {"a": [1, {"b": "x"}], "b": "y"}
    assert outcome(source, context) in ("refused", "rendered", "bad_data")


@given(value=JSON)
def test_any_data_renders_or_fails_in_words(value: object) -> None:
    source = "{{x}}{{#each x}}{{@key}}{{this}}{{/each}}{{x.length}}{{#x}}{{a}}{{/x}}{{lookup x x}}"
    assert outcome(source, {"x": value}) in ("rendered", "bad_data")


@given(text=st.text().filter(lambda text: "{{" not in text))
def test_a_template_without_tags_is_its_own_text(text: str) -> None:
    template = compile_template(text, escape=True)
    assert template.is_literal
    assert template.render({}) == text


# without what PostgreSQL does not hold
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_escaped_html_reads_back(text: str) -> None:
    escaped = render("{{x}}", {"x": text}, escape=True)
    assert not set("<>\"'`=") & set(escaped)
    assert html.unescape(escaped) == text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("none", set()),
        ("{{data.email}} {{external.plan}}", {"data.email", "external.plan"}),
        ("{{#each data.list}}{{this}}{{@index}}{{/each}}", {"data.list"}),
        ("{{#each data.list as |item|}}{{item.price}}{{/each}}", {"data.list"}),
        ("{{#with data}}{{../external.plan}}{{/with}}", {"data", "external.plan"}),
        ("{{@root.external}} {{default (lookup data key) 1}}", {"external", "data", "key"}),
        ("{{json this}}", {"this"}),
        ("{{lookup @root subject}}", {"this", "subject"}),
    ],
)
def test_the_paths_that_a_template_reads_are_known(source: str, expected: set[str]) -> None:
    assert compile_template(source, escape=False).reads == expected


@pytest.mark.parametrize(
    ("source", "renamed"),
    [
        ("{{id}} {{{ id }}} {{~id~}} {{[id]}}", "{{ID}} {{{ ID }}} {{~ID~}} {{[ID]}}"),
        ("{{this.id}} {{./id}} {{@root.id}}", "{{this.ID}} {{./ID}} {{@root.ID}}"),
        ("{{data.id}} {{idx}} \\{{id}} {{!-- {{id}} --}}",) * 2,
        ("{{#each data.l}}{{id}}{{../id}}{{/each}}", "{{#each data.l}}{{id}}{{../ID}}{{/each}}"),
        (
            "{{#data.l}}{{#if x}}{{../id}}{{/if}}{{^}}{{id}}{{/data.l}}",
            "{{#data.l}}{{#if x}}{{../ID}}{{/if}}{{^}}{{ID}}{{/data.l}}",
        ),
        (
            "{{#with external}}{{#each l}}{{../id}}{{../../id}}{{/each}}{{/with}}",
            "{{#with external}}{{#each l}}{{../id}}{{../../ID}}{{/each}}{{/with}}",
        ),
        ("{{#each data.l as |id|}}{{id}}{{/each}}",) * 2,
        ("{{#id}}{{#../id}}{{/../id}}{{/id}}", "{{#ID}}{{#../ID}}{{/../ID}}{{/ID}}"),
        ("{{~^ id ~}}x{{~/ id ~}} {{#[id]}}{{/id}}", "{{~^ ID ~}}x{{~/ ID ~}} {{#[ID]}}{{/ID}}"),
        ("{{#if x}}{{else id}}{{x}}{{/if}}", "{{#if x}}{{else ID}}{{x}}{{/if}}"),
        ("x" * 9_000 + "{{id}}" + "y" * 9_000, "x" * 9_000 + "{{ID}}" + "y" * 9_000),
        (
            "{{#if id}}\U0001f600{{id}}\n\r\n\u00e4{{eq id 'id'}}{{/if}}",
            "{{#if ID}}\U0001f600{{ID}}\n\r\n\u00e4{{eq ID 'id'}}{{/if}}",
        ),
    ],
)
def test_keys_of_the_view_are_renamed_where_they_are_read(source: str, renamed: str) -> None:
    assert with_renamed_keys(source, {"id": "ID"}) == renamed
