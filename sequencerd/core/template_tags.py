"""Splits a template into texts and tags, by handlebars' lexer and its whitespace control.

dotpromptz-handlebars has a splitter of its own, which takes blanks between two tags for the end
of a line ("{{#each l}} {{this}}{{/each}}" loses them) and lets some malformed tags pass.
Rules: handlebars-parser, spec/handlebars.l and lib/whitespace-control.js.
"""

from __future__ import annotations

import re
from typing import NoReturn

from dotpromptz_handlebars import TagToken

from sequencerd.core.model import DefinitionError

Part = str | TagToken

# Possessive repetition (*+) keeps the time linear for whatever stands in a template.
_QUOTED = r"\"(?:\\\"|[^\"])*+\"|'(?:\\'|[^'])*+'|\[(?:\\\]|[^\]])*+\]"
_WORDS = rf"(?:{_QUOTED}|[^\"'\[\]{{}}~])*+"
_TAG = re.compile(
    r"\{\{(?P<before>~?)(?:"
    r"(?P<comment>!)(?:(?=--).*?--|(?!--).*?)(?P<after_comment>~?)\}\}"
    r"|(?P<inverse>\s*else\s*|\^\s*)(?P<after_inverse>~?)\}\}"
    rf"|\{{(?P<triple>{_WORDS})\}}(?:(?P<after_triple>~)\}}\}}|\}}\}}(?!\}}))"
    rf"|(?P<body>{_WORDS})(?:(?P<after>~)\}}\}}|\}}\}}(?!\}}))"
    r")",
    re.DOTALL,
)
_INDEX = re.compile(rf"({_QUOTED})|(?<=.[./])([0-9]++)(?=[./])", re.DOTALL)
_CHAIN = re.compile(r"else\b\s*(if|unless|)\b\s*(.*)", re.DOTALL)
_PARAMS = re.compile(r"\sas\s+\|(?!\s*[^\s|][^|]*\|\s*$)", re.DOTALL)


def split(source: str) -> list[Part]:
    """The texts and tags of a template, whitespace control applied.

    Raises DefinitionError, with the line, for a tag that is not closed or can't be one.
    """
    parts: list[Part] = []
    start, at = 0, source.find("{{")
    while at >= 0:
        before = source[start:at]
        escaped = before.endswith("\\") and not before.endswith("\\\\")
        # \{{ is text; \\{{ is a backslash and a tag.
        parts.append(before.removesuffix("\\"))
        if escaped:
            start, at = at, source.find("{{", at + 2)
            continue
        tag = _TAG.match(source, at)
        if tag is None:
            _refuse(source, at, "the tag is malformed or not closed")
        parts.append(_token(tag, source))
        start = tag.end()
        at = source.find("{{", start)
    parts.append(source[start:])
    return _control_whitespace([part for part in parts if part != ""])


def _token(tag: re.Match[str], source: str) -> TagToken:
    before = tag["before"] == "~"
    if tag["comment"]:
        return TagToken("!", strip_before=before, strip_after=tag["after_comment"] == "~")
    if tag["inverse"] is not None:
        return TagToken("else", strip_before=before, strip_after=tag["after_inverse"] == "~")
    if tag["triple"] is not None:
        body = _bracket_indexes(tag["triple"].strip())
        after = tag["after_triple"] == "~"
        return TagToken(body, triple=True, strip_before=before, strip_after=after)
    body = tag["body"]
    if body[:1].isspace() and body.lstrip()[:1] in ("#", "/", "^", ">", "&", "!"):
        _refuse(source, tag.start(), "no blank may follow {{ here")
    body = body.strip()
    if chain := _CHAIN.fullmatch(body):
        if not chain[1]:
            _refuse(source, tag.start(), "write {{else}}{{#...}}...{{/...}}, or {{else if ...}}")
        body = f"else {chain[1]} {chain[2]}"
    if body.startswith(("#", "^")) and _PARAMS.search(body):
        _refuse(source, tag.start(), "write block parameters as in {{#each list as |item index|}}")
    return TagToken(_bracket_indexes(body), strip_before=before, strip_after=tag["after"] == "~")


def _bracket_indexes(body: str) -> str:
    """`items.0.name` → `items.[0].name`, the form that the package reads."""
    return _INDEX.sub(lambda found: found[1] or f"[{found[2]}]", body)


def _refuse(source: str, at: int, message: str) -> NoReturn:
    line = source.count("\n", 0, at) + 1
    shown = source[at : at + 30].split("\n", maxsplit=1)[0]
    raise DefinitionError(f"line {line} of the template, at {shown!r}: {message}")


def _control_whitespace(parts: list[Part]) -> list[Part]:
    """`~` takes all whitespace beside a tag; a block's tag alone on its line takes the line.

    So do {{else}} and comments. Which tags are alone is decided by the original text.
    """
    controlled = list(parts)
    for index, tag in enumerate(parts):
        if isinstance(tag, str):
            continue
        alone = _may_be_alone(tag) and _starts_line(parts, index) and _ends_line(parts, index)
        before = controlled[index - 1] if index else None
        if isinstance(before, str) and (alone or tag.strip_before):
            controlled[index - 1] = before.rstrip() if tag.strip_before else before.rstrip(" \t")
        after = controlled[index + 1] if index + 1 < len(parts) else None
        if isinstance(after, str) and tag.strip_after:
            controlled[index + 1] = after.lstrip()
        elif isinstance(after, str) and alone:
            controlled[index + 1] = re.sub(r"\A[ \t]*\r?\n?", "", after)
    return controlled


def _may_be_alone(tag: TagToken) -> bool:
    block = tag.body.startswith(("#", "/", "^", "!", ">", "else ")) or tag.body == "else"
    return block and not tag.triple


def _starts_line(parts: list[Part], index: int) -> bool:
    """Only blanks before it up to a line's start, or up to the template's."""
    if index == 0:
        return True
    before = parts[index - 1]
    if not isinstance(before, str):
        return False
    rest = before.rstrip()
    return "\n" in before[len(rest) :] or (index == 1 and not rest)


def _ends_line(parts: list[Part], index: int) -> bool:
    """Only blanks after it up to a line's end, or up to the template's."""
    if index == len(parts) - 1:
        return True
    after = parts[index + 1]
    if not isinstance(after, str):
        return False
    rest = after.lstrip()
    return "\n" in after[: len(after) - len(rest)] or (index == len(parts) - 2 and not rest)
