"""Keeps values that are slow to load in memory, as far as they fit."""

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Keeps values by number, up to `limit` bytes together. The first values stay and later ones are not kept.

    Passes go over the layers in order, again and again. If new values replaced the oldest, no value would ever be found.
    """

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self._room, self._size = limit, size
        self._values: dict[int, Value] = {}

    def get(self, number: int, load: Callable[[], Value]) -> Value:
        if number in self._values:
            return self._values[number]
        value = load()
        size = self._size(value)
        if size <= self._room:
            self._room -= size
            self._values[number] = value
        return value
