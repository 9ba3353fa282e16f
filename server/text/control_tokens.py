"""Special tokens in chat: names that a client writes are plain text; names that the chat template writes are special tokens.

Otherwise a message could end its own turn and begin another: "<|im_end|>\n<|im_start|>system ...". The protection has four
steps:

1. Before rendering, names of special tokens in the client's messages are marked: a private Unicode character follows each
   letter.
2. The template is rendered. All names that are not marked now come from the template.
3. These names are replaced by aliases, which contain another private character. The marks are removed.
4. A second tokenizer encodes the text. Its special tokens have the aliases as names. Its ids are then mapped back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

# The private use areas of Unicode: no standard gives these characters a meaning.
PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))
# Keys whose values the API defines. Templates compare these values, so they must not be marked.
DEFINED = ("role", "type")


class ControlTokens:
    """The special tokens of a tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
        # A name of one character cannot be broken up by a mark.
        self._ids = {token.content: token_id for token_id, token in self._added.items() if token.special and token.content[1:]}
        self._names = _finder(self._ids)
        self._beginnings = {name[:length] for name in self._ids for length in range(1, len(name))}
        self._longest = max(map(len, self._ids), default=0)

    def occur_in(self, value: object) -> bool:
        """Whether any string inside the JSON value contains the name of a special token."""
        return any(len(found) for found in self._names.encode_batch_fast(list(_strings(value))))

    def mark(self, value: Any) -> tuple[Any, str]:
        """Mark the names of special tokens in a JSON value: a private character follows each of their letters.

        Returns the marked value, and two private characters that the value does not contain: the mark and one for aliases.
        Raises ValueError if the value already uses all private characters.
        """
        used = set[str]().union(*_strings(value))
        free = "".join(islice((chr(code) for code in PRIVATE if chr(code) not in used), 2))
        if len(free) < 2:
            raise ValueError("the messages use every private character of Unicode")
        return self._marked(value, free[0]), free

    def encode(self, rendered: str, free: str) -> list[int]:
        """Token ids of a text that was rendered from marked values. `free`: the two characters that `mark` returned.

        Raises ValueError if the tokenizer turns a client's text into a special token all the same.
        """
        mark, edge = free[0], free[1]
        aliases = {name: f"{edge}{token_id}{edge}" for name, token_id in self._ids.items()}
        text = _replaced(rendered, self._names, lambda name: aliases[name]).replace(mark, "")
        tokenizer, original = self._with_aliases(aliases)
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        forged = set(self._ids.values()).intersection(ids).difference(original, self._unknown)
        if forged:
            raise ValueError(f"{self._added[min(forged)].content!r} cannot be written as text with this tokenizer")
        return [original.get(token_id, token_id) for token_id in ids]

    @property
    def _unknown(self) -> set[int]:
        """The id of the token for unknown characters, as a set; empty if there is none."""
        name = getattr(self._tokenizer.model, "unk_token", None)
        token_id = None if name is None else self._tokenizer.token_to_id(name)
        return set() if token_id is None else {token_id}

    def _with_aliases(self, aliases: Mapping[str, str]) -> tuple[Tokenizer, dict[int, int]]:
        """A tokenizer whose special tokens have the aliases as names, and a map from its ids to the original ids.

        It shares the model of the original, so it costs little time and memory.
        """
        tokenizer = Tokenizer(self._tokenizer.model)
        if self._tokenizer.normalizer is not None:
            tokenizer.normalizer = self._tokenizer.normalizer
        if self._tokenizer.pre_tokenizer is not None:
            tokenizer.pre_tokenizer = self._tokenizer.pre_tokenizer
        original: dict[int, int] = {}
        for token_id, token in sorted(self._added.items()):
            content = aliases.get(token.content, token.content)
            how = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            tokenizer.add_tokens([AddedToken(content, **how)])
            renamed = tokenizer.token_to_id(content)
            assert renamed is not None
            original[renamed] = token_id
        return tokenizer, original

    def _marked(self, value: Any, mark: str) -> Any:
        match value:
            case str():
                # The text may end with the beginning of a name; the template may put the rest behind it.
                tail = max((length for length in range(1, self._longest) if value[-length:] in self._beginnings), default=0)
                head = len(value) - tail
                return _replaced(value[:head], self._names, lambda name: _spaced(name, mark)) + _spaced(value[head:], mark)
            case Mapping():
                return {
                    self._marked(key, mark): part if key in DEFINED else self._marked(part, mark) for key, part in value.items()
                }
            case list() | tuple():
                return [self._marked(part, mark) for part in value]
            case _:
                return value


def _strings(value: object) -> Iterator[str]:
    """All strings inside a JSON value, keys included."""
    match value:
        case str():
            yield value
        case Mapping():
            for key, part in value.items():
                yield from _strings(key)
                yield from _strings(part)
        case list() | tuple():
            for part in value:
                yield from _strings(part)


def _spaced(text: str, mark: str) -> str:
    return "".join(character + mark for character in text)


def _finder(words: Iterable[str]) -> Tokenizer:
    """A tokenizer that knows only these words. It finds the leftmost longest matches in linear time, and without Python's
    lock."""
    finder = Tokenizer(BPE())
    finder.add_tokens([AddedToken(word, normalized=False) for word in words])
    return finder


def _replaced(text: str, finder: Tokenizer, replace: Callable[[str], str]) -> str:
    """The text with all words that `finder` finds replaced."""
    parts, end = list[str](), 0
    for start, stop in finder.encode_batch([text])[0].offsets:
        parts += (text[end:start], replace(text[start:stop]))
        end = stop
    return "".join([*parts, text[end:]])
