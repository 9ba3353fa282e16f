"""The conversion methods by name. `register` adds a method. There is no other list."""

from typing import TypeVar

from ladimo.convert.methods.base import Method
from ladimo.convert.recipe import AUTO, SECTIONS

METHODS: dict[str, Method] = {}

Kind = TypeVar("Kind", bound=type[Method])


def register(kind: Kind) -> Kind:
    """A class decorator that registers a method by its name, and its options as the recipe's table of this name."""
    assert kind.name not in METHODS, f"two methods are called {kind.name}"
    METHODS[kind.name] = kind()
    if kind.options is not None:
        SECTIONS[kind.name] = kind.options
    return kind


def get_method(name: str) -> Method:
    """The method of this name. Raises ValueError with the known names."""
    try:
        return METHODS[name]
    except KeyError:
        raise ValueError(f"method {name!r} is unknown; known: {', '.join(sorted((AUTO, *METHODS)))}") from None
