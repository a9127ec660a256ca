"""Which text a subject reads."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from sequencerd.core.languages import LanguageText, choose, fallback, read_locale


@pytest.mark.parametrize(
    ("languages", "locale", "chosen"),
    [
        ("en de", "de", "de"),
        ("en de", "de-AT", "de"),
        ("en de", "DE_at", "de"),
        ("en de de-AT", "de-AT", "de-AT"),
        ("en de de_at", "de-AT-1996", "de_at"),
        ("en de zh-Hant", "zh-Hant-TW", "zh-Hant"),
        ("en zh-Hant", "zh", "en"),  # a lookup, no search for the nearest
        ("en de", "de-x-formal", "de"),
        ("en de de-x", "de-x-formal", "de"),
        ("en de", "fr", "en"),
        ("de en default", "fr", "default"),
        ("en de default", "en-GB", "en"),
        ("de", "fr", "de"),
        ("en de", None, "en"),
        ("en de", 7, "en"),
        ("en de", ["de"], "en"),
        ("en de", "", "en"),
        ("en de", " de ", "de"),
        ("en de", "-", "en"),
        ("en de", "default", "en"),
    ],
)
def test_a_lookup_by_rfc_4647(languages: str, locale: object, chosen: str) -> None:
    texts = {language: f"in {language}" for language in languages.split()}
    assert choose(texts, locale) == (chosen, f"in {chosen}")
    assert choose(dict(reversed(texts.items())), locale)[0] == chosen  # the order means nothing


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({}, "text for all other languages is missing"),
        ({"de": "", "fr": ""}, "write it as default or en"),
        ({"en-GB": "", "de": ""}, "write it as default or en"),
        ({"en": "", "german!": ""}, "'german!' is not a language"),
        ({"en": "", "EN": ""}, "'en' and 'EN' are the same language"),
        ({"file": "x.html"}, "file is read by check, plan and apply"),
        ({"en": 7}, "valid string"),
        (7, "valid string"),
    ],
)
def test_texts_that_are_rejected(texts: object, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TypeAdapter(LanguageText).validate_python(texts)


def test_the_text_for_all_others() -> None:
    assert fallback(["de", "default", "en"]) == "default"
    assert fallback(["de", "EN"]) == "EN"
    assert fallback(["de", "fr"]) is None


def test_where_a_language_is_read() -> None:
    view = {"data": {"user": {"language": "de"}, "list": ["de"]}, "external": {}}
    assert read_locale(view, "data.user.language") == "de"
    for path in ("data.locale", "data.user.language.x", "data.list.0", "external.a.b"):
        assert read_locale(view, path) is None
