"""Finds the texts that end the phases of a request, while its tokens come. Runs on the engine thread."""

from collections.abc import Callable, Sequence


class PhaseEnds:
    """The ends of one answer's phases, in order. Each is looked for after the one before. How the text is divided into tokens
    makes no difference. A special token counts with its name, although it is not in the text that the client gets.

    `token_bytes`: the UTF-8 bytes that a token adds to the text.
    """

    def __init__(self, ends: Sequence[str], token_bytes: Callable[[int], bytes]) -> None:
        assert all(ends)
        self._ends = [end.encode("utf-8", "surrogatepass") for end in ends]
        self._token_bytes = token_bytes
        self._tail = b""  # the end of the text so far, as far as it may be the beginning of an end

    def read(self, token_id: int) -> int:
        """Take the next token. Returns how many phases end with it."""
        text, passed = self._tail + self._token_bytes(token_id), 0
        while self._ends and (found := text.find(self._ends[0])) >= 0:
            text = text[found + len(self._ends.pop(0)) :]
            passed += 1
        kept = len(self._ends[0]) - 1 if self._ends else 0
        self._tail = text[max(0, len(text) - kept) :]
        return passed
