"""Streams token ids as text. Incomplete characters are held back, and the text ends before the first stop string."""

import codecs
from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes, so an incomplete one has at most three.
MAX_INCOMPLETE = 3
PROMPT_CONTEXT_TOKENS = 4

_utf8 = codecs.getincrementaldecoder("utf-8")


class TokenDecoder(Protocol):
    """The part of a tokenizer that a detokenizer needs."""

    def decode(self, token_ids: Sequence[int], /) -> str: ...

    def text_bytes(self, token_id: int, /) -> bytes:
        """The UTF-8 bytes that the token adds to a decoded text; empty for a token that `decode` skips."""


class Detokenizer:
    """The text of one sequence, piece by piece. The joined pieces are the decoded text, without an incomplete last character.

    Decoders treat the first token of a text specially: SentencePiece drops its leading space. So each step decodes a short
    window that begins with tokens whose text was sent before. `prompt_ids`: the prompt that the output continues. A character
    that begins in the prompt and ends in the output belongs to the output.
    """

    def __init__(self, decoder: TokenDecoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._sent = 0  # how many characters of the window's text were sent
        self._start_window(list(prompt_ids[self._boundary(prompt_ids) :]))

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is complete now; may be empty."""
        if not self._decoder.text_bytes(token_id):
            return ""
        self._window.append(token_id)
        incomplete = self._incomplete_bytes(self._window)
        text = self._whole_characters(self._window, incomplete)
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        if not incomplete:
            self._start_window(self._window[self._context :])
        return piece

    def _start_window(self, context: list[int]) -> None:
        """Begin a new window with `context`, whose text was sent before."""
        self._window, self._context = context, len(context)
        self._sent = len(self._whole_characters(context, self._incomplete_bytes(context))) if context else 0

    def _whole_characters(self, token_ids: Sequence[int], incomplete: int) -> str:
        """The decoded text without the last `incomplete` bytes.

        A U+FFFD that the model wrote stays, and so does one that stands for invalid bytes.
        """
        if not incomplete:
            return self._decoder.decode(token_ids)
        # First drop the tokens that consist of incomplete bytes only. If a run of SentencePiece's byte tokens ends within a
        # character, its decoder would show U+FFFD for every byte of the run.
        kept = len(token_ids)
        while incomplete and (size := len(self._decoder.text_bytes(token_ids[kept - 1]))) <= incomplete:
            incomplete -= size
            kept -= 1
        text = self._decoder.decode(token_ids[:kept])
        return text.removesuffix(REPLACEMENT) if incomplete else text

    def _incomplete_bytes(self, token_ids: Sequence[int]) -> int:
        """How many bytes at the end belong to an incomplete character."""
        tail = b""
        for token_id in reversed(token_ids):
            tail = self._decoder.text_bytes(token_id) + tail
            if len(tail) >= MAX_INCOMPLETE:
                break
        decoder = _utf8("replace")
        decoder.decode(tail)
        held, _ = decoder.getstate()
        # Python also waits for the rest of a surrogate, but UTF-8 has no surrogates.
        return 0 if held[:1] == b"\xed" and held[1:] >= b"\xa0" else len(held)

    def _boundary(self, prompt_ids: Sequence[int]) -> int:
        """Where the prompt's last few tokens begin. Never inside a character, because its rest alone would decode
        differently."""
        start = max(0, len(prompt_ids) - PROMPT_CONTEXT_TOKENS)
        while start and self._incomplete_bytes(prompt_ids[max(0, start - MAX_INCOMPLETE) : start]):
            start -= 1
        return start


class StopStrings:
    """Cuts a text before the stop string that is complete first. The division of the text into pieces makes no difference."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = stops
        self._held = ""

    def push(self, piece: str, early: bool = False) -> tuple[str, bool]:
        """Return the text to send now, and whether a stop string has ended it. The rest of the text is then dropped.

        `early`: the answer may not end yet, so a stop string that ends in this piece counts as normal text. A stop string that
        begins in this piece and ends in a later one is still found.
        """
        if not self._stops:
            return piece, False
        text, before = self._held + piece, len(self._held)
        if not early:
            # Only matches that end in this piece count: the held text may contain a stop string that came early.
            starts = ((text.find(stop, max(0, before + 1 - len(stop))), stop) for stop in self._stops)
            # Take the match that ends first. If several end together, take the one that begins first.
            found = [(start + len(stop), start) for start, stop in starts if start >= 0]
            if found:
                self._held = ""
                return text[: min(found)[1]], True
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def flush(self) -> str:
        """Return the held text. It looked like the beginning of a stop string, but the answer has ended."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
