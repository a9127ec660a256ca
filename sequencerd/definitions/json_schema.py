"""Make the JSON Schema of sequence files from the models, for editors and authors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from sequencerd.core.enrollment import MAX_NAME
from sequencerd.core.step_types import BUILT_IN, is_message
from sequencerd.core.step_types.effects import EffectConfig
from sequencerd.definitions.files import FileSequence
from sequencerd.runners.addressed import RecipientConfig

DRAFT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def make() -> Schema:
    """Return the schema of a document. Everything that `check` accepts is valid, but not the
    reverse.
    """
    defs: Schema = {}
    root = _of(FileSequence, defs)
    step = defs["FileStep"]
    configs = {name: _of(type_.config, defs) for name, type_ in BUILT_IN.items()}
    for name in filter(is_message, BUILT_IN):
        configs[name] = _with_effect(configs[name], defs)
    own = {"type": "object", "description": "The config of your runner.", **_recipient(defs)}
    custom = _with_effect(own, defs)
    step["properties"]["type"] = {
        "description": step["properties"]["type"]["description"],
        "anyOf": [
            *({"const": name, "description": one["description"]} for name, one in configs.items()),
            {"type": "string", "minLength": 1, "maxLength": MAX_NAME},
        ],
    }
    step["allOf"] = [
        *(_bind({"const": name}, name, config) for name, config in configs.items()),
        _bind({"not": {"enum": list(configs)}}, "Custom", custom),
    ]
    # the names of models contain no dot, so none of them is replaced
    defs |= {f"step.{name}": config for name, config in {**configs, "Custom": custom}.items()}
    schema: Schema = _tidy({"$schema": DRAFT, **root, "$defs": defs})
    return schema


def _of(model: type[BaseModel], defs: Schema) -> Schema:
    """Return the schema of a model; definitions that it refers to are added to `defs`."""
    made = model.model_json_schema(by_alias=True)
    defs |= made.pop("$defs", {})
    return made


def _with_effect(own: Schema, defs: Schema) -> Schema:
    """Return a config with the keys that all side effects have."""
    common = _of(EffectConfig, defs)["properties"]
    return {**own, "properties": {**own.get("properties", {}), **common}}


def _recipient(defs: Schema) -> Schema:
    """Return the rule for custom steps: both recipient keys together name a recipient."""
    recipient = _of(RecipientConfig, defs)
    return {
        "if": {"required": recipient["required"]},
        "then": {"properties": recipient["properties"]},
    }


def _bind(type_: Schema, name: str, config: Schema) -> Schema:
    """Return the rule that a step of this type has this config."""
    bound: Schema = {"properties": {"config": {"$ref": f"#/$defs/step.{name}"}}}
    if config.get("required") or config.get("anyOf"):
        bound["required"] = ["config"]
    return {"if": {"properties": {"type": type_}, "required": ["type"]}, "then": bound}


def _tidy(schema: Any) -> Any:
    """Remove titles, which repeat the keys, and null defaults, which an editor would insert."""
    match schema:
        case dict():
            return {
                key: _tidy(value)
                for key, value in schema.items()
                if (key, value) != ("default", None)
                and not (key == "title" and isinstance(value, str))
            }
        case list():
            return [_tidy(item) for item in schema]
    return schema
