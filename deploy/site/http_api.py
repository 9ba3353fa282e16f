"""The page of the HTTP API, made from the server's OpenAPI description."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from fastapi import FastAPI

import ladimo
from deploy.site.tables import cell, table
from server.api.fields.completions import ErrorBody
from server.app import ROUTERS

Schema = Mapping[str, Any]


@cache
def description() -> dict[str, Any]:
    """The server's routes as OpenAPI describes them, without a server."""
    app = FastAPI(
        title="LaDiMo", version=ladimo.__version__, responses={"default": {"model": ErrorBody, "description": "An error"}}
    )
    for router in ROUTERS:
        app.include_router(router)
    return app.openapi()


def http_page() -> str:
    """Every route with its parameters and the fields of its body, then the objects that fields consist of."""
    found = description()
    text = (
        f"# HTTP API\n\nMade from the OpenAPI description of version {found['info']['version']}. A server has it at "
        "`/openapi.json`, and a page to try it at `/docs`. [API](../api.md) explains it by subject. An error has the form of "
        "[ErrorBody](#errorbody).\n\nFields that take only their default are known from other servers and not supported here. "
        "Another value is answered with a 400 that names the field.\n"
    )
    objects = found["components"]["schemas"]
    bodies: set[str] = set()
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            text += f"\n## {method.upper()} {path}\n\n"
            text += "\n\n".join(cell(part) for part in operation.get("description", "").split("\n\n") if part) + "\n\n"
            parameters = [(f"`{each['name']}`", each["in"], _kind(each["schema"])) for each in operation.get("parameters", [])]
            text += table(("parameter", "place", "type"), parameters) + "\n" if parameters else ""
            for content in operation.get("requestBody", {}).get("content", {}).values():
                names = list(_references(content["schema"]))
                for name in names:
                    if name not in bodies:
                        text += _fields(objects[name], f"Body ({name}):" if len(names) > 1 else "Body:")
                bodies |= set(names)
    text += "\n## Objects\n"
    for name, schema in objects.items():
        if name not in bodies:
            text += f"\n### {name}\n\n{cell(schema.get('description', ''))}\n\n{_fields(schema, '')}"
    return text


def _fields(schema: Schema, title: str) -> str:
    needed = schema.get("required", [])
    rows, refused = [], []
    for name, field in schema.get("properties", {}).items():
        if _kind(field) == "any" and "description" not in field:
            refused.append(f"`{name}`")
        else:
            default = field.get("default")
            shown = "needed" if name in needed else f"`{json.dumps(default)}`" if default not in (None, "", [], {}) else ""
            rows.append((f"`{name}`", _kind(field), shown, cell(field.get("description", ""))))
    text = f"{title}\n\n" if title else ""
    text += table(("field", "type", "default", "meaning"), rows) + "\n" if rows else ""
    return text + (f"Take only their default: {', '.join(refused)}.\n\n" if refused else "")


def _kind(schema: Schema) -> str:
    """A schema's type in words, with its limits."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(each) for each in schema["anyOf"] if each.get("type") != "null"))
    if "const" in schema or "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    limits = [f"{word} {schema[key]:g}" for key, word in _LIMITS.items() if abs(schema.get(key, 2**31)) < 2**31]
    return " ".join([schema.get("type", "any"), ", ".join(limits)]).strip()


_LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


def _references(schema: Schema) -> Iterator[str]:
    """The objects that a body may be."""
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    for each in schema.get("anyOf", []):
        yield from _references(each)
