"""Prepares JSON schemas for the grammar library.

Members that the library would silently ignore are refused. String formats that it does not know are removed.
"""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

# Formats that the library enforces. It refuses all others, although the standard treats them as annotations.
FOLLOWED_FORMATS = {
    *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"),
}
# Members that the library ignores silently. The first three are from old drafts. The last has the library's own options, and
# one of these makes it lenient. For all other members that it does not support, the library raises an error itself.
IGNORED_MEMBERS = ("divisibleBy", "disallow", "extends", "x-guidance")

INDEX = re.compile(r"[0-9]{1,9}")
HOLDS_SCHEMA = {
    *("additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not", "propertyNames"),
    *("then", "unevaluatedItems", "unevaluatedProperties"),
}
HOLDS_LIST = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
HOLDS_MAP = {"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"}


def readable(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy of the schema that the library can read.

    Only keywords of schemas are checked, not names of properties or constant data. Raises ValueError naming a member that the
    library would ignore, and for a schema that is nested too deeply.
    """
    try:
        root: dict[str, Any] = json.loads(json.dumps(schema))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        ignored = [member for member in IGNORED_MEMBERS if member in node]
        if ignored:
            raise ValueError(f"{ignored[0]!r} is not supported")
        if isinstance(name := node.get("format"), str) and name not in FOLLOWED_FORMATS:
            del node["format"]
        waiting += _schemas_in(node)
        target = _at(root, node.get("$ref"))
        if isinstance(target, dict):
            waiting.append(target)
    return root


def _schemas_in(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, value in node.items():
        values: Any = ()
        if name in HOLDS_MAP and isinstance(value, dict):
            values = value.values()
        elif name in HOLDS_LIST and isinstance(value, list):
            values = value
        elif name in HOLDS_SCHEMA:
            values = (value,)
        yield from (each for each in values if isinstance(each, dict))


def _at(root: Any, reference: object) -> object:
    """The value that a JSON pointer inside this document points to; None if there is none or it points elsewhere."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    place = root
    for part in reference[2:].split("/"):
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(place, list):
            place = dict(enumerate(place)).get(int(name)) if INDEX.fullmatch(name) else None
        elif isinstance(place, dict) and name in place:
            place = place[name]
        else:
            return None
    return place
