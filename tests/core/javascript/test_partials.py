"""Partials and layouts of templates."""

from __future__ import annotations

import pytest

from sequencerd.core.faults import DefinitionError, EvaluationError
from sequencerd.core.javascript.templates import (
    called_partials,
    check_partial,
    compile_template,
    missing_layouts,
    surely_used,
)

PARTIALS = {
    "footer": "-- {{data.name}} {{{data.name}}}",
    "layout": "<h1>{{> @partial-block}}</h1>{{> footer}}",
    "page": "[{{> content}}]",
    "tree": "({{n}}{{#each kids}}{{> tree}}{{/each}})",
    "due": "{{upper (date data.due format='D MMMM')}}",
    "strict": "\n  {{data.missing}}",
    "a": "{{#if data.name}}{{> b}}{{/if}}",
    "b": "{{> a}}",
}
BROKEN = {**PARTIALS, "broken": "x\n{{#if}}"}
VIEW = {
    "data": {"name": "<b>", "due": "2026-03-01", "which": "footer"},
    "n": 1,
    "kids": [{"n": 2, "kids": [{"n": 3}]}, {"n": 4}],
}


def rendered(source: str, *, escape: bool = True, strict: bool = False) -> str:
    template = compile_template(source, escape=escape, strict=strict, partials=PARTIALS)
    first = template.render(VIEW)
    assert template.render(VIEW) == first  # the first rendering prepares others
    return first


def test_partials_are_escaped_like_the_template_around_them() -> None:
    assert rendered("{{> footer}}") == "-- &lt;b&gt; <b>"
    assert rendered("{{> footer}}", escape=False) == "-- <b> <b>"
    layout = "{{#> layout}}{{data.name}}{{/layout}}"
    assert rendered(layout) == "<h1>&lt;b&gt;</h1>-- &lt;b&gt; <b>"
    assert rendered(layout, escape=False) == "<h1><b></h1>-- <b> <b>"


def test_partials_as_in_handlebars() -> None:
    assert rendered("{{> tree}}") == "(1(2(3))(4))"
    assert rendered("{{> due}}") == "1 MARCH"  # a date that is asked, and helpers of its own
    assert rendered('{{#*inline "content"}}C{{/inline}}{{> page}}') == "[C]"
    assert rendered("{{> (lookup data 'which')}}") == "-- &lt;b&gt; <b>"
    assert rendered("{{> footer data=kids.[0]}}").startswith("-- ")
    assert rendered("{{#> layout}}{{#> layout}}x{{/layout}}{{/layout}}").count("<h1>") == 2


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x\n{{> foter}}", "^line 2: .* no partial 'foter': did you mean 'footer'"),
        ("{{> nothing}}", 'write it under partials, or {{#\\*inline "nothing"}}'),
        ("{{> page}}", "^partial 'page': line 1: .* no partial 'content'"),
        ("{{> broken}}", "^partial 'broken': line 2: the block if is not closed"),
        ("{{#> layout}}{{> broken}}{{/layout}}", "^partial 'broken': line 2"),
    ],
)
def test_missing_and_broken_partials_are_refused(source: str, says: str) -> None:
    with pytest.raises(DefinitionError, match=says):
        compile_template(source, escape=True, partials=BROKEN)


def test_a_partial_by_itself() -> None:
    check_partial("no tags")
    check_partial(PARTIALS["page"])  # what it lacks may be defined by a template
    with pytest.raises(DefinitionError, match="line 2: the block if is not closed"):
        check_partial(BROKEN["broken"])
    with pytest.raises(DefinitionError, match="write at most"):
        check_partial("x" * 300_000)


def test_a_missing_layout_renders_the_block() -> None:
    source = "a\n{{#> layuot}}x{{/layuot}}"
    assert rendered(source) == "a\nx"
    (told,) = missing_layouts(source, PARTIALS)
    assert told.startswith("line 2: the template has no partial 'layuot': did you mean 'layout'?")
    assert not missing_layouts("{{#> layout}}{{/layout}}", PARTIALS)


def test_errors_in_a_partial_name_the_partial() -> None:
    with pytest.raises(EvaluationError, match=r"^partial 'strict': data\.missing: the value"):
        rendered("x\ny {{> strict}}", strict=True)
    with pytest.raises(EvaluationError, match="could not be found"):
        rendered("{{> (lookup data 'name')}}")


def test_partials_that_contain_themselves_end() -> None:
    with pytest.raises(EvaluationError, match="nested too deep"):
        rendered("{{> a}}")
    assert rendered("{{> footer}}")  # the next one is as good as any


def test_which_partials_a_template_uses() -> None:
    used = compile_template("{{#> layout}}{{> due}}{{/layout}}", escape=True, partials=PARTIALS)
    assert "data.due" in used.reads
    assert called_partials("{{#> layout}}{{> due}}{{/layout}}", PARTIALS) == {
        "layout",
        "footer",
        "due",
    }
    assert called_partials("{{> broken}}{{> footer}}", BROKEN) == {"broken", "footer"}
    assert called_partials("{{> (lookup data 'x')}}", {"x": "1"}) == {"x"}
    assert surely_used("{{> layout}}{{#each kids}}{{> tree}}{{/each}}", PARTIALS) == {
        "layout",
        "footer",
    }


def test_a_strict_template_can_be_rendered_any_number_of_times() -> None:
    template = compile_template("{{data.name}}", escape=True, strict=True)
    for _ in range(5000):
        assert template.render('{"data":{"name":"Ada"}}') == "Ada"


def test_css_needs_no_escapes() -> None:
    css = "<style>@media print{.a{color:{{data.name}}}.b{top:{{{data.which}}}}</style>"
    made = rendered(css, escape=False)
    assert made == "<style>@media print{.a{color:<b>}.b{top:footer}</style>"
    nested = "<STYLE>@media print{.a{color:{{data.name}}}}</STYLE>"
    assert rendered(nested, escape=False) == "<STYLE>@media print{.a{color:<b>}}</STYLE>"
    with pytest.raises(DefinitionError, match="malformed"):
        rendered("<style></style>{{data.name}}}")
