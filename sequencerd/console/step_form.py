"""The form that changes how long a step waits, or the texts of its message. It changes the YAML,
which is then planned and applied as in the editor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sequencerd.console import editing
from sequencerd.console.context import context_of, query_of, render
from sequencerd.console.query import NotFoundError, Query, WrongQueryError
from sequencerd.console.stored_sequence import read_stored, read_yaml
from sequencerd.core.faults import KeyPath
from sequencerd.definitions import yaml_edit, yaml_reader
from sequencerd.definitions.form_fields import UNITS, FormField, fields

FIELD_PREFIX = "config."
"""The prefix of the form's field names."""


async def ask(request: Request) -> Response:
    """Show the form for a step of the stored definition."""
    query = query_of(request)
    name = query.must("sequence")
    stored = await read_stored(context_of(request), name)
    text = await read_yaml(context_of(request), name, None)
    return await _form(request, query, text, stored.base)


async def of_edited(request: Request) -> Response:
    """Show the form for a step in a text that is being edited."""
    query = Query(request.state.form)
    return await _form(request, query, editing.text_of(query), query.must("base"))


async def _form(
    request: Request,
    query: Query,
    text: str,
    base: str,
    wrong: str | None = None,
) -> Response:
    step = query.must("step")
    _, type_, found = await asyncio.to_thread(_fields, text, step)
    given = request.state.form if request.method == "POST" else {}
    return render(
        request,
        "step_form.html",
        422 if wrong else 200,
        title=f"Change {step}",
        name=query.must("sequence"),
        step=step,
        type=type_,
        text=text,
        base=base,
        fields=[
            {
                "id": f"{FIELD_PREFIX}{field.name}",
                "label": ", ".join("HTML" if key == "html" else str(key) for key in field.path),
                "kind": field.kind,
                "value": given.get(f"{FIELD_PREFIX}{field.name}", field.value),
                "units": [*UNITS, *({field.value} - {*UNITS})],
                "rows": min(24, str(field.value).count("\n") + 3),
            }
            for field in found
        ],
        wrong=wrong,
    )


def _fields(text: str, step: str) -> tuple[int, str, list[FormField]]:
    """Return the number of a step in a text, its type, and the values that can be changed."""
    try:
        documents = [document.value for document in yaml_reader.parse(text)]
    except yaml_reader.DocumentError as error:
        raise WrongQueryError(f"line {error.line} of the YAML: {error}") from error
    value = documents[0] if documents else None
    steps = value.get("steps") if isinstance(value, dict) else None
    for number, one in enumerate(steps if isinstance(steps, list) else ()):
        if isinstance(one, dict) and one.get("name") == step:
            type_ = str(one.get("type"))
            return number, type_, fields(type_, one.get("config"))
    raise NotFoundError(f"There is no step {step} in the sequence.")


async def change(request: Request) -> Response:
    """Change the YAML according to the form, and plan the change."""
    query = Query(request.state.form)
    text = editing.text_of(query)
    number, _, found = await asyncio.to_thread(_fields, text, query.must("step"))
    values = _changed(request.state.form, number, found)
    try:
        edited = await asyncio.to_thread(yaml_edit.set_values, text, values)
    except yaml_edit.EditError as error:
        wrong = f"Use the editor: {error}."
        return await _form(request, query, text, query.must("base"), wrong)
    request.state.form = {**request.state.form, "text": edited, "action": "plan"}
    return await editing.change(request)


def _changed(form: Mapping[str, str], step: int, found: list[FormField]) -> dict[KeyPath, Any]:
    """Return the values that a user has changed, by their paths in the document."""
    values: dict[KeyPath, Any] = {}
    for field in found:
        given = form.get(f"{FIELD_PREFIX}{field.name}")
        if given is not None and (value := field.read(given.replace("\r\n", "\n"))) != field.value:
            values["steps", step, "config", *field.path] = value
    return values
