"""The checkpoint's tokenizer and chat template. Encoding runs on a thread of its own, off the event loop."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer

from server.text.detokenizer import REPLACEMENT
from server.text.grammar import GrammarCompiler

DEFAULT_CHAT_TEMPLATE = Path(__file__).with_name("default_chat.jinja")

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's byte fallback

T = TypeVar("T")


def _byte_symbols() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as (GPT-2's `bytes_to_unicode`): printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_SYMBOL = _byte_symbols()


class Tokenizer:
    """Raises ValueError when the directory holds no tokenizer that loads without running its code."""

    def __init__(self, directory: Path) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many unrelated types; all mean the same to the operator
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{directory}: no tokenizer can be loaded ({type(error).__name__}: {reason})") from error
        own = self._tokenizer.chat_template
        self.chat_template: str = own if isinstance(own, str) else DEFAULT_CHAT_TEMPLATE.read_text(encoding="utf-8")
        self._pieces: dict[int, bytes] = {}
        self._anchor = self._tokenizer.encode("a", add_special_tokens=False)[-1:]
        vocabulary = self._tokenizer.get_vocab()
        special = self._tokenizer.all_special_tokens
        self._special: dict[int, str] = {vocabulary[token]: token for token in special if token in vocabulary}
        self._longest_token = max(map(len, vocabulary), default=1)
        # One thread: the tokenizer is not safe to use from several at once.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return await self.run(lambda: self._encode(text, add_special_tokens))

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Render the messages, the beginning of the answer included, and encode. Raises ValueError when the template
        refuses them. Templates run in transformers' immutable sandbox."""
        return await self.run(lambda: self._encode(self._render(messages), add_special_tokens=False))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text: UTF-8, of which a token of byte-level vocabularies may be a part only. The name of a
        special token; nothing for an id that no token has."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._token_bytes(token_id)
        return piece

    def token_text(self, token_id: int) -> str:
        """The token as text; "bytes:\\xe2\\x82", as OpenAI writes it, where it is no whole number of characters."""
        piece = self.token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def cannot_fit(self, text: str, max_tokens: int) -> bool:
        """Whether a text is too long for so many tokens by its length alone; False leaves it to `encode`."""
        return len(text) > max_tokens * self._longest_token

    def grammar_compiler(self, vocab_size: int) -> GrammarCompiler:
        return GrammarCompiler(self._tokenizer, vocab_size)

    async def run(self, work: Callable[[], T]) -> T:
        """Run on the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

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
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
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
