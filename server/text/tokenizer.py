"""The checkpoint's tokenizer and chat template. Encoding runs on threads, where a short text never waits for a long one."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from transformers import PreTrainedTokenizerBase

from ladimo.auto import load_tokenizer
from server.text.control_tokens import ControlTokens
from server.text.detokenizer import REPLACEMENT
from server.text.grammar import GrammarCompiler
from server.text.lanes import Lanes

DEFAULT_CHAT_TEMPLATE = Path(__file__).with_name("default_chat.jinja")

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's byte fallback

# Normal text never has more characters per token on average. Only unusual text has more, such as lines of blanks.
MAX_CHARACTERS_PER_TOKEN = 16

T = TypeVar("T")


def _byte_symbols() -> dict[str, int]:
    """The byte that each character of a byte-level BPE vocabulary stands for: the inverse of GPT-2's `bytes_to_unicode`.

    Printable characters stand for themselves.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_SYMBOL = _byte_symbols()


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How messages are rendered. `add_generation_prompt`: the beginning of an answer follows the messages.
    `continue_final_message`: the last message stays open, and the model continues it. `variables`: further variables for the
    template. `tools`: functions in OpenAI's form; None: no tools."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None


# Names that `variables` must not use, besides special tokens: the server itself renders templates with these.
SET_BY_SERVER = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}


class Tokenizer:
    """The tokenizer in a checkpoint directory. Never runs code from the directory.

    `allow_special_tokens`: the name of a special token in a chat message is that token; otherwise it is plain text. In the
    prompt of a completion it is always the token, as in other servers. Raises ValueError if no tokenizer can be loaded.
    """

    def __init__(self, directory: Path, allow_special_tokens: bool = False) -> None:
        try:
            self._tokenizer = load_tokenizer(directory)
        except Exception as error:  # transformers raises many types of errors; all mean the same to the operator
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{directory}: no tokenizer can be loaded ({type(error).__name__}: {reason})") from error
        # Used directly, because transformers' own calls change its settings and so are not safe on several threads.
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{directory}: the tokenizer has no tokenizer.json")
        self._backend: tokenizers.Tokenizer = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._controls = None if allow_special_tokens else ControlTokens(self._backend)
        own = self._tokenizer.chat_template
        self.chat_template: str = own if isinstance(own, str) else DEFAULT_CHAT_TEMPLATE.read_text(encoding="utf-8")
        self._pieces: dict[int, bytes] = {}
        self._text_pieces: dict[int, bytes] = {}
        self._anchor = self._tokenizer.encode("a", add_special_tokens=False)[-1:]
        vocabulary = self._tokenizer.get_vocab()
        special = self._tokenizer.all_special_tokens
        self._special: dict[int, str] = {vocabulary[token]: token for token in special if token in vocabulary}
        self._longest_token = max(map(len, vocabulary), default=1)
        self._lanes = Lanes()

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text. `add_special_tokens`: add BOS and the like, as the checkpoint says, but never a second
        BOS."""
        return await self.run(lambda: self._encode(text, add_special_tokens), len(text))

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], form: ChatFormat = ChatFormat()) -> list[int]:
        """Render the messages with the chat template, and encode them. Templates run in transformers' immutable sandbox.

        Raises ValueError if the template refuses the messages.
        """
        size = sum(len(str(each)) for each in (*messages, *(form.tools or ())))
        return await self.run(lambda: self._encode_chat(messages, form), size)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a few tokens, decoded on the calling thread."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of many tokens, special ones included. Runs on a thread."""
        return await self.run(lambda: self._decode_long(token_ids), len(token_ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token adds to a text. They may be only a part of a character.

        A special token gives its name. An id without a token gives nothing.
        """
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._token_bytes(token_id)
        return piece

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to the text of an answer: as `token_bytes`, but nothing for a special token."""
        piece = self._text_pieces.get(token_id)
        if piece is None:
            shown = self.decode([*self._anchor, token_id]) != self.decode(self._anchor)
            piece = self._text_pieces[token_id] = self.token_bytes(token_id) if shown else b""
        return piece

    def token_text(self, token_id: int) -> str:
        """The token as text. A token with incomplete characters is written as OpenAI does it: "bytes:\\xe2\\x82"."""
        piece = self.token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def most_characters(self, max_tokens: int) -> int:
        """A text with more characters than this has more than `max_tokens` tokens, so it need not be encoded to find out."""
        return max_tokens * min(self._longest_token, MAX_CHARACTERS_PER_TOKEN)

    def grammar_compiler(self, vocab_size: int) -> GrammarCompiler:
        """A new compiler of grammars for this tokenizer. `vocab_size`: the model's."""
        return GrammarCompiler(self._tokenizer, vocab_size)

    async def run(self, work: Callable[[], T], size: int) -> T:
        """Run `work` on a thread and return its result. `size`: the characters or tokens that it handles."""
        return await self._lanes.run(work, size)

    @property
    def template_knows_tools(self) -> bool:
        """Whether the chat template uses the variable `tools`."""
        return re.search(r"\btools\b", self.chat_template) is not None

    @property
    def info(self) -> dict[str, Any]:
        """The tokenizer's class, special tokens, size and chat template, for clients that build prompts themselves."""
        tokenizer = self._tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
            "unk_token": tokenizer.unk_token,
            "vocab_size": len(tokenizer),
            "chat_template": self.chat_template,
        }

    def close(self) -> None:
        """Drop all waiting work and end the threads."""
        self._lanes.close()

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # A batch of one text: `encode` keeps Python's lock while it works, and would hold up all streams.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        bos = self._tokenizer.bos_token_id
        return ids[1:] if add_special_tokens and bos is not None and ids[:2] == [bos, bos] else ids

    def _decode_long(self, token_ids: Sequence[int]) -> str:
        (text,) = self._backend.decode_batch([list(token_ids)], skip_special_tokens=False)
        return str(text)

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]], form: ChatFormat) -> list[int]:
        given = (list(messages), form.tools, dict(form.variables))
        try:
            if self._controls is None or not self._controls.occur_in(given):
                return self._encode(self._render(given, form), add_special_tokens=False)
            marked, free = self._controls.mark(given)
        except RecursionError as error:
            raise ValueError("the messages are nested too deeply") from error
        return self._controls.encode(self._render(marked, form), free)

    def _render(self, given: Sequence[Any], form: ChatFormat) -> str:
        """Render the template. `given`: the messages, the tools and the further variables, plain or marked. Raises
        ValueError."""
        messages, tools, variables = given
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.chat_template,
                add_generation_prompt=form.add_generation_prompt,
                continue_final_message=form.continue_final_message,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # any error of a template or its sandbox is a fault of these messages
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return text

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special:
            return self._special[token_id].encode()
        # Decode it after another token, because decoders strip the space before a text's first token.
        before = self.decode(self._anchor, skip_special_tokens=False)
        text: str = self.decode([*self._anchor, token_id], skip_special_tokens=False).removeprefix(before)
        if REPLACEMENT not in text:
            return text.encode()
        token: str = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        if all(symbol in BYTE_OF_SYMBOL for symbol in token):
            return bytes(BYTE_OF_SYMBOL[symbol] for symbol in token)
        return text.encode()
