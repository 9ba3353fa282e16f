"""Values that are dear to load, kept in memory as far as they fit."""

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """By number, up to `limit` bytes in all. What came first stays: passes go over layers in order, again and again, so that
    dropping the oldest for the newest would never hit.
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
