"""JSON schemas, before the grammar library reads them: what it would ignore in silence is refused, what it need not know is
left out."""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

# The library refuses any other, where the standard has an annotation.
FOLLOWED_FORMATS = {
    *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"),
}
# Of old drafts, and the library's own options, one of which makes it lenient. What else it cannot follow it names itself.
IGNORED_MEMBERS = ("divisibleBy", "disallow", "extends", "x-guidance")

INDEX = re.compile(r"[0-9]{1,9}")
HOLDS_SCHEMA = {
    *("additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not", "propertyNames"),
    *("then", "unevaluatedItems", "unevaluatedProperties"),
}
HOLDS_LIST = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
HOLDS_MAP = {"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"}


def readable(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy for the library. A member counts where it is a keyword of a schema, not where it names a property or is data.

    Raises ValueError naming a member that the library would ignore.
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
    """What a JSON pointer within the document points to, wherever that is; None when it is nothing or elsewhere."""
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
