"""Values that are changed in a YAML text, while all else stays as it is written."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sequencerd.core.faults import KeyPath
from sequencerd.definitions import yaml_reader
from sequencerd.definitions.form_fields import fields
from sequencerd.definitions.yaml_edit import EditError, set_values

TEXT = """\
# the trial
name:   trial   # its name

steps:
- name: wait          # not indented
  type: WaitForDuration
  config: {amount: 2, unit: "days"}   # two days
- name: mail
  type: Email
  config:
      subject:
        en: 'It''s time'
        de: Es ist Zeit: jetzt
      text: |
        Dear {{data.name}},

          come back.

      # the same for readers of mail in browsers
      html: >-
        <p>
        Dear
        </p>


      from:   a@example.com
- {name: last, type: WaitForDuration, config: {unit: hour, amount: "{{data.hours}}"}}
""".replace("Es ist Zeit: jetzt", '"Es ist Zeit: jetzt"')
WAIT: KeyPath = ("steps", 0, "config")
MAIL: KeyPath = ("steps", 1, "config")
LAST: KeyPath = ("steps", 2, "config")


@pytest.mark.parametrize(
    ("path", "value", "before", "after"),
    [
        ((*WAIT, "amount"), 10, "amount: 2,", "amount: 10,"),
        ((*WAIT, "amount"), 1.5, "amount: 2,", "amount: 1.5,"),
        ((*WAIT, "amount"), "{{data.n}}", "amount: 2,", "amount: '{{data.n}}',"),
        ((*WAIT, "unit"), "business days", '"days"', '"business days"'),
        ((*LAST, "unit"), "a, b]", "unit: hour", "unit: 'a, b]'"),
        ((*LAST, "amount"), 3, '"{{data.hours}}"', "3"),
        ((*MAIL, "subject", "en"), "It's über: all #1", "'It''s time'", "'It''s über: all #1'"),
        ((*MAIL, "subject", "de"), 'Ja "so"', '"Es ist Zeit: jetzt"', r'"Ja \"so\""'),
        (
            (*MAIL, "text"),
            "Hello,\n\n  you.\n",
            "|\n        Dear {{data.name}},\n\n          come back.\n\n",
            "|\n        Hello,\n\n          you.\n\n",
        ),
        (
            (*MAIL, "text"),
            "Short",
            "|\n        Dear {{data.name}},\n\n          come back.",
            "Short",
        ),
        (
            (*MAIL, "html"),
            "<b>\n  x\n</b>",
            ">-\n        <p>\n        Dear\n        </p>",
            "|-\n        <b>\n          x\n        </b>",
        ),
        ((*MAIL, "from"), "a\nb\n", "a@example.com", "|\n        a\n        b"),
        (
            (*MAIL, "text"),
            "a\n\n",
            "|\n        Dear {{data.name}},\n\n          come back.",
            r'"a\n\n"',
        ),
        ((*MAIL, "from"), "true", "a@example.com", "'true'"),
        ((*MAIL, "from"), "12", "a@example.com", '"12"'),
        ((*MAIL, "from"), "", "a@example.com", "''"),
        ((*MAIL, "from"), " x\ty", "a@example.com", '" x\\ty"'),
    ],
)
def test_one_value_changes(path: KeyPath, value: str | float, before: str, after: str) -> None:
    assert TEXT.count(before) == 1
    assert set_values(TEXT, {path: value}) == TEXT.replace(before, after)


def test_several_values_change_at_once() -> None:
    made = set_values(TEXT, {(*LAST, "unit"): "days", (*WAIT, "amount"): 100})
    assert made == TEXT.replace("amount: 2", "amount: 100").replace("unit: hour", "unit: days")
    assert set_values(TEXT, {}) == TEXT


@pytest.mark.slow
@given(
    st.sampled_from([(*WAIT, "unit"), (*MAIL, "text"), (*MAIL, "html"), (*MAIL, "subject", "en")]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
    | st.text("a \n'\"#:-{}[],&*!|>%@`\\\t", max_size=20),
)
@example((*MAIL, "text"), "a\n\n")
@example((*MAIL, "html"), " a\n")
@example((*MAIL, "subject", "en"), "\x7f")
def test_any_text_is_read_back(path: KeyPath, value: str) -> None:
    (document,) = yaml_reader.parse(set_values(TEXT, {path: value}))
    found = document.value
    for key in path:
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("a: &x 1\nb: *x", ("a",), "only the editor can change"),
        ("a: &x {c: 1}\nb: {<<: *x}", ("b", "c"), "is not written there"),
        ("a: 1", ("b",), "b is not written there"),
        ("a: {b: 1}", ("a",), "a is not a single value"),
        ("a: 1", ("a", 0), "a.0 is not written there"),
        ("a: 1\n---\nb: 1", ("a",), "there must be one sequence"),
        ("", ("a",), "there must be one sequence"),
    ],
)
def test_texts_that_cannot_be_edited(text: str, path: KeyPath, words: str) -> None:
    with pytest.raises(EditError, match=words):
        set_values(text, {path: 2})


def test_the_fields_of_a_step() -> None:
    def shown(type_: str, config: object) -> list[tuple[str, str, object]]:
        return [(field.name, field.kind, field.value) for field in fields(type_, config)]

    assert shown("WaitForDuration", {"amount": "{{data.n}}", "unit": "days"}) == [
        ("amount", "amount", "{{data.n}}"),
        ("unit", "unit", "days"),
    ]
    assert shown(
        "WaitForDate", {"date": "{{data.due}}", "offset": {"amount": -3, "unit": "d"}}
    ) == [
        ("date", "line", "{{data.due}}"),
        ("offset.amount", "amount", -3),
        ("offset.unit", "unit", "d"),
    ]
    collect = {"quiet": {"minutes": 10}, "most": {"amount": 1, "unit": "hours"}}
    assert [field.name for field in fields("Collect", collect)] == [
        "quiet.minutes",
        "most.amount",
        "most.unit",
    ]
    assert shown(
        "Email", {"subject": {"en": "a", "de": "b"}, "html": {"file": "x"}, "text": "c", "to": "d"}
    ) == [("subject.en", "line", "a"), ("subject.de", "line", "b"), ("text", "text", "c")]
    assert shown("Note", {"message": "m", "expires": {"hours": 1}}) == [("message", "text", "m")]
    assert fields("GoTo", {}) == fields("Email", None) == []


def test_values_of_fields() -> None:
    amount, unit = fields("WaitForDuration", {"amount": 1, "unit": "days"})
    assert [amount.read(text) for text in ("3", "-3", "1.5", "{{data.n}}", "x", "")] == [
        *(3, -3, 1.5, "{{data.n}}", "x", "")
    ]
    assert unit.read("3") == "3"
