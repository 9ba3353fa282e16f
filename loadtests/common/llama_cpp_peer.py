"""llama.cpp on a dense model: greedy, with several sequences per step. It uses the C interface of llama-cpp-python."""

import time
from collections.abc import Sequence
from pathlib import Path

import llama_cpp as library
import numpy as np
import torch
from torch import Tensor

STEP_TOKENS = 512  # tokens per call of the library, and per matrix product
# The library calls it as long as the process lives, so it must not die with an object.
QUIET = library.llama_log_callback(lambda level, text, data: None)

Row = tuple[int, int, int, bool]  # token, position, sequence, and whether its logits are wanted


class LlamaCpp:
    """One model file and one context for `sequences` sequences of at most `context` tokens each."""

    def __init__(self, file: Path, threads: int, sequences: int, context: int) -> None:
        library.llama_log_set(QUIET, None)
        library.llama_backend_init()
        model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
        if model is None:
            raise ValueError(f"llama.cpp could not read {file}")
        params = library.llama_context_default_params()
        params.n_ctx = sequences * context
        params.n_batch = params.n_ubatch = STEP_TOKENS
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        self.context = library.llama_init_from_model(model, params)
        assert self.context is not None
        self.sampler = library.llama_sampler_init_greedy()
        self.batch = library.llama_batch_init(STEP_TOKENS, 0, 1)

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Clear the cache and compute the prompts. Returns the first token of each."""
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        first: list[int] = []
        for begin in range(0, len(rows), STEP_TOKENS):
            first += self._step(rows[begin : begin + STEP_TOKENS])
        return first

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Seconds from the first tokens until each prompt has `tokens` tokens."""
        last = self.start(prompts)
        started = time.perf_counter()
        for done in range(tokens - 1):
            last = self._step(
                [(token, len(prompt) + done, i, True) for i, (token, prompt) in enumerate(zip(last, prompts, strict=True))]
            )
        return time.perf_counter() - started

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        """Seconds until every prompt has its first token."""
        started = time.perf_counter()
        self.start(prompts)
        return time.perf_counter() - started

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """The generated tokens, to check that the file gives the same tokens as the model."""
        found = self.start([prompt])
        while len(found) < tokens:
            found += self._step([(found[-1], len(prompt) + len(found) - 1, 0, True)])
        return found

    def logits(self, window: Sequence[int]) -> Tensor:
        """The logits after every token of a window [n, V], computed as one prompt of at most STEP_TOKENS tokens."""
        assert len(window) <= STEP_TOKENS
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        self._step([(token, position, 0, True) for position, token in enumerate(window)])
        vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(library.llama_get_model(self.context)))
        rows = (library.llama_get_logits_ith(self.context, place) for place in range(len(window)))
        return torch.stack([torch.from_numpy(np.ctypeslib.as_array(row, (vocab,)).copy()) for row in rows])

    def _step(self, rows: Sequence[Row]) -> list[int]:
        """Compute the rows. Returns the next token for each row whose logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        if library.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not run a step")
        return [
            library.llama_sampler_sample(self.sampler, self.context, index)
            for index, (_, _, _, wanted) in enumerate(rows)
            if wanted
        ]
