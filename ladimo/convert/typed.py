"""Makes dataclasses from the plain values of TOML and JSON. Values are checked by the type hints. Errors name the field."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def build(kind: type[T], raw: object, path: str = "", *, closed: bool) -> T:
    """Make an object of the dataclass `kind` from a mapping. path: the mapping's place, for errors. closed: refuse keys without
    a field; otherwise they are skipped. Raises ValueError with the name of the first wrong, missing or unknown field."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path or 'the record'}: must be a table of names and values, got {_short(raw)}")
    hints, known = get_type_hints(kind), {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    if closed and (unknown := [name for name in raw if name not in known]):
        raise ValueError(f"{_join(path, unknown[0])}: unknown key; known: {', '.join(sorted(known))}")
    values = {}
    for name, item in known.items():
        if name in raw:
            values[name] = _value(hints[name], raw[name], _join(path, name), closed)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{_join(path, name)}: is missing")
    return kind(**values)


def _value(hint: Any, value: object, path: str, closed: bool) -> Any:
    """A value of the type `hint`: a dataclass, a scalar, a list, tuple or dict of these, or a union with None."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, path, closed=closed)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [argument for argument in arguments if argument is not type(None)]
        for choice in choices[:-1]:
            try:
                return _value(choice, value, path, closed)
            except ValueError:
                continue
        return _value(choices[-1], value, path, closed)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path}: must be a list, got {_short(value)}")
        return origin(_value(arguments[0], item, f"{path}[{number}]", closed) for number, item in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: must be a table of names and values, got {_short(value)}")
        return {key: _value(arguments[1], item, _join(path, key), closed) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{path}: must be of type {getattr(hint, '__name__', hint)}, got {_short(value)}")
    return value


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
