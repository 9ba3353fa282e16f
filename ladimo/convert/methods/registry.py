"""The conversion methods by name. A method enters with `register`; nothing else lists them."""

from typing import TypeVar

from ladimo.convert.methods.base import Method
from ladimo.convert.recipe import SECTIONS

METHODS: dict[str, Method] = {}

Kind = TypeVar("Kind", bound=type[Method])


def register(kind: Kind) -> Kind:
    """Class decorator: the method is known by its name, and its options by the table of that name in a recipe."""
    assert kind.name not in METHODS, f"two methods are called {kind.name}"
    METHODS[kind.name] = kind()
    if kind.options is not None:
        SECTIONS[kind.name] = kind.options
    return kind


def get_method(name: str) -> Method:
    """Raises ValueError naming the known methods."""
    try:
        return METHODS[name]
    except KeyError:
        raise ValueError(f"method {name!r} is unknown; known: {', '.join(sorted(METHODS))}") from None
