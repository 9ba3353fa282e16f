"""The checkpoint's tokenizer and chat template. Encoding runs on a thread of its own, off the event loop."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import AutoTokenizer

DEFAULT_CHAT_TEMPLATE = Path(__file__).with_name("default_chat.jinja")

T = TypeVar("T")


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
        # One thread: the tokenizer is not safe to use from several at once.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return await self._run(lambda: self._encode(text, add_special_tokens))

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Render the messages, the beginning of the answer included, and encode. Raises ValueError when the template
        refuses them. Templates run in transformers' immutable sandbox."""
        return await self._run(lambda: self._encode(self._render(messages), add_special_tokens=False))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

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
        except TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return text

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)
