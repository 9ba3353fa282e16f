"""The checkpoint's tokenizer and chat template. Encoding runs off the event loop, where no text waits for a much longer one."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.text.control_tokens import ControlTokens
from server.text.detokenizer import REPLACEMENT
from server.text.grammar import GrammarCompiler
from server.text.lanes import Lanes

DEFAULT_CHAT_TEMPLATE = Path(__file__).with_name("default_chat.jinja")

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's byte fallback

# No text that anybody sends has more characters per token on average; whole lines of blanks have.
MAX_CHARACTERS_PER_TOKEN = 16

T = TypeVar("T")


def _byte_symbols() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as (GPT-2's `bytes_to_unicode`): printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_SYMBOL = _byte_symbols()


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How messages are rendered: the beginning of an answer behind them, or the last one left open; further variables of the
    template's."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None


# What `variables` may not name, besides special tokens: the arguments that templates are rendered with.
SET_BY_SERVER = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}


class Tokenizer:
    """`allow_special_tokens`: the name of a special token within a chat message is that token; it is text otherwise. In the
    text of a completion it always is the token, as in other servers.

    Raises ValueError when the directory holds no tokenizer that loads without running its code."""

    def __init__(self, directory: Path, allow_special_tokens: bool = False) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many unrelated types; all mean the same to the operator
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{directory}: no tokenizer can be loaded ({type(error).__name__}: {reason})") from error
        # Used directly: transformers' own calls keep settings in it, so that only one thread could use them.
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
        """`add_special_tokens`: what the checkpoint puts around a text. A text that begins with BOS gets no second one."""
        return await self.run(lambda: self._encode(text, add_special_tokens), len(text))

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], form: ChatFormat = ChatFormat()) -> list[int]:
        """Render and encode. Raises ValueError when the template refuses the messages. Templates run in transformers'
        immutable sandbox."""
        size = sum(len(str(each)) for each in (*messages, *(form.tools or ())))
        return await self.run(lambda: self._encode_chat(messages, form), size)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of many tokens, special ones included."""
        return await self.run(lambda: self._decode_long(token_ids), len(token_ids))

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text: UTF-8, of which a token of byte-level vocabularies may be a part only. The name of a
        special token; nothing for an id that no token has."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._token_bytes(token_id)
        return piece

    def text_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text of an answer: as `token_bytes`, but nothing for a special token."""
        piece = self._text_pieces.get(token_id)
        if piece is None:
            shown = self.decode([*self._anchor, token_id]) != self.decode(self._anchor)
            piece = self._text_pieces[token_id] = self.token_bytes(token_id) if shown else b""
        return piece

    def token_text(self, token_id: int) -> str:
        """The token as text; "bytes:\\xe2\\x82", as OpenAI writes it, where it is no whole number of characters."""
        piece = self.token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def most_characters(self, max_tokens: int) -> int:
        """A text of more characters has more tokens than this: it need not be encoded to know."""
        return max_tokens * min(self._longest_token, MAX_CHARACTERS_PER_TOKEN)

    def grammar_compiler(self, vocab_size: int) -> GrammarCompiler:
        return GrammarCompiler(self._tokenizer, vocab_size)

    async def run(self, work: Callable[[], T], size: int) -> T:
        """Run on a thread, among works of like `size`: the characters or tokens that `work` deals with."""
        return await self._lanes.run(work, size)

    @property
    def template_knows_tools(self) -> bool:
        return re.search(r"\btools\b", self.chat_template) is not None

    @property
    def info(self) -> dict[str, Any]:
        """What clients need to know to build prompts themselves."""
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
        self._lanes.close()

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # A batch of one: `encode` keeps Python's lock while it works, and would hold up every stream.
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
        """`given`: the messages, the tools and the further variables, plain or marked."""
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
        except Exception as error:  # whatever a template does wrong, or its sandbox forbids, is about these messages
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return text

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special:
            return self._special[token_id].encode()
        # After another token, because decoders strip the space of a text's first one.
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
