"""Other engines on the dense model, for the same work in the same run. One that cannot run here says why."""

import importlib.util
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

# Prompts and tokens to generate for each -> seconds from the first token on.
Peer = Callable[[Sequence[Sequence[int]], int], float]


class Unavailable(Exception):
    """Why a peer cannot be measured here."""


def dense_llama(fields: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' LLaMA of a shape, with random weights made on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def generate(model: Any, **options: Any) -> Peer:
    """`generate`: the time for all tokens less the time for one. `options` are generate's own."""

    @torch.inference_mode()
    def run(prompts: Sequence[Sequence[int]], tokens: int) -> float:
        ids = torch.tensor(prompts, device=model.device)

        def seconds(count: int) -> float:
            started = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        return seconds(tokens) - seconds(1)

    return run


@torch.inference_mode()
def forward_seconds(model: Any, prompts: Sequence[Sequence[int]]) -> float:
    """Until the first token of the prompts is known."""
    ids = torch.tensor(prompts, device=model.device)
    started = time.perf_counter()
    model(ids, logits_to_keep=1).logits.argmax(dim=-1).tolist()
    return time.perf_counter() - started


def static_cache(model: Any) -> Peer:
    """`generate` with a cache of fixed size; on a CUDA device transformers compiles the forward pass by itself."""
    return generate(model, cache_implementation="static")


def continuous_batching(model: Any) -> Peer:
    """`generate_batch`, timed by its own time stamps of the tokens, so that its start does not count. Raises Unavailable."""
    if model.device.type != "cuda":
        raise Unavailable("continuous batching of transformers is measured on CUDA devices only")
    method = getattr(model, "generate_batch", None)
    if method is None:
        raise Unavailable("this transformers has no generate_batch")
    known = inspect.signature(method).parameters
    if "record_timestamps" not in known:
        raise Unavailable("generate_batch of this transformers keeps no time stamps")
    options = {"record_timestamps": True, "persistent_manager": True, "progress_bar": False}
    kept = {name: value for name, value in options.items() if name in known}

    def run(prompts: Sequence[Sequence[int]], tokens: int) -> float:
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        done = method(inputs=[list(prompt) for prompt in prompts], generation_config=config, **kept)
        stamps = sorted(stamp for output in done.values() for stamp in output.timestamps or ())
        if len(stamps) != len(prompts) * tokens:
            raise Unavailable(f"generate_batch gave {len(stamps)} tokens instead of {len(prompts) * tokens}")
        seconds: float = stamps[-1] - stamps[0]
        return seconds

    return run


def llama_cpp(file: Path | None, threads: int) -> Peer:
    """llama.cpp on a GGUF file of the dense model, one sequence at a time. Raises Unavailable."""
    if file is None:
        raise Unavailable("no GGUF file was given")
    if importlib.util.find_spec("llama_cpp") is None:
        raise Unavailable("llama-cpp-python is not installed")
    import llama_cpp as library

    llama = library.Llama(str(file), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(prompts: Sequence[Sequence[int]], tokens: int) -> float:
        if len(prompts) != 1:
            raise Unavailable("the Python binding runs one sequence at a time")
        llama.reset()
        llama.eval(list(prompts[0]))
        token = llama.sample(temp=0.0)
        started = time.perf_counter()
        for _ in range(tokens - 1):
            llama.eval([token])
            token = llama.sample(temp=0.0)
        return time.perf_counter() - started

    return run
