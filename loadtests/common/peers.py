"""Other engines, which do the same work on the dense model in the same run. An engine that cannot run here says why."""

import importlib.util
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from ladimo.export.gguf import write_gguf

if TYPE_CHECKING:
    from loadtests.common.llama_cpp_peer import LlamaCpp

# A function from prompts and the number of tokens to generate to the seconds after the first token.
Peer = Callable[[Sequence[Sequence[int]], int], float]


class Unavailable(Exception):
    """The engine cannot be measured here. The message says why."""


def dense_llama(fields: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' LLaMA with these config fields and random weights, made on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def generate(model: Any, **options: Any) -> Peer:
    """transformers' `generate`: the time for all tokens minus the time for one. `options` are those of `generate`."""

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
    """Seconds until the first token of each prompt is known."""
    ids = torch.tensor(prompts, device=model.device)
    started = time.perf_counter()
    model(ids, logits_to_keep=1).logits.argmax(dim=-1).tolist()
    return time.perf_counter() - started


def static_cache(model: Any) -> Peer:
    """`generate` with a cache of fixed size. On a CUDA device transformers then compiles the forward pass."""
    return generate(model, cache_implementation="static")


def continuous_batching(model: Any) -> Peer:
    """transformers' `generate_batch`. It is timed by its own time stamps, so its start does not count. Raises Unavailable."""
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


def llama_cpp(model: Any, weights: str, threads: int, sequences: int, context: int) -> "LlamaCpp":
    """llama.cpp with the same dense weights, for `sequences` sequences of `context` tokens.

    `weights`: the type of its matrices, which is F32, BF16, Q8_0 or Q4_0. Raises Unavailable.
    """
    if missing := [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]:
        raise Unavailable(f"{missing[0]} is not installed (pip install '.[bench]')")
    from loadtests.common.llama_cpp_peer import LlamaCpp

    with TemporaryDirectory() as directory:
        file = Path(directory) / "dense.gguf"
        write_gguf(file, model.config.to_dict(), model.state_dict().items(), weights)
        return LlamaCpp(file, threads, sequences, context)  # mapped, so it stays readable after its removal
