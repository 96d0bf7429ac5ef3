"""Which JSON schemas can be kept to, every word of them.

xgrammar passes over keywords that it does not know, in whole or where they are combined. An output
would then break the schema, so such schemas are refused here, by the place and the keyword.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 64

IGNORED = frozenset(
    {
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "minContains",
        "not",
        "then",
        "uniqueItems",
    }
)
# They say what may follow by themselves; what stands beside them would be passed over.
COMBINERS = frozenset({"$ref", "allOf", "anyOf", "oneOf"})
# Keywords about values of one type, which do nothing if the type is not said.
OF_TYPE = {
    "string": {"format", "maxLength", "minLength", "pattern"},
    "number": {"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"},
    "array": {"maxItems", "minItems"},
    "object": {"maxProperties", "minProperties", "propertyNames", "required"},
}
# With these the type is known.
TYPED_BY = {"array": {"items", "prefixItems"}, "object": {"additionalProperties", "properties"}}
CONSTRAINING = frozenset().union(*OF_TYPE.values(), *TYPED_BY.values(), {"patternProperties"})
# Where schemas are in schemas: by themselves, in lists, and as the values of objects.
SCHEMA_FIELDS = ("additionalProperties", "items", "propertyNames", "unevaluatedItems",
                 "unevaluatedProperties")  # fmt: skip
SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SCHEMA_MAPS = ("$defs", "definitions", "patternProperties", "properties")


def check_schema(schema: Any, field: str) -> None:
    """Raises ValueError, naming the field, for a schema that outputs can't be made to keep to."""
    waiting: list[tuple[str, Any, int]] = [("$", schema, 1)]
    while waiting:
        place, found, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"{field} is not allowed: its schemas may be nested {MAX_DEPTH} deep")
        if isinstance(found, dict):
            reason = _reason_against(found)
            if reason is not None:
                raise ValueError(f"{field} is not allowed: at {place}, {reason}")
            waiting += [(f"{place}.{name}", inner, depth + 1) for name, inner in _inner(found)]


def _reason_against(schema: dict[str, Any]) -> str | None:
    """What can't be kept to in this schema, not counting those in it."""
    ignored = {name for name in IGNORED & schema.keys() if schema[name] is not False}
    if ignored:
        return f"{min(ignored)} is not supported"
    combiners = sorted(COMBINERS & schema.keys())
    beside = sorted(CONSTRAINING & schema.keys())
    if combiners and (beside or len(combiners) > 1):
        other = (beside or combiners[1:])[0]
        return f"{combiners[0]} is not supported together with {other}"
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        return "allOf of more than one schema is not supported"
    if "pattern" in schema and schema.keys() & {"minLength", "maxLength"}:
        return "pattern is not supported together with minLength or maxLength"
    if not schema.keys() & {"type", "enum", "const"}:
        for type_name, keywords in OF_TYPE.items():
            found = sorted(keywords & schema.keys())
            if found and not schema.keys() & TYPED_BY.get(type_name, set()):
                return f'{found[0]} without a type is not supported: add "type": "{type_name}"'
    return None


def _inner(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas in this one, with their places in it."""
    for name in SCHEMA_FIELDS:
        if name in schema:
            yield name, schema[name]
    for name in SCHEMA_LISTS:
        items = schema.get(name)
        if isinstance(items, list):
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(items))
    for name in SCHEMA_MAPS:
        values = schema.get(name)
        if isinstance(values, dict):
            yield from ((f"{name}.{key}", value) for key, value in values.items())
