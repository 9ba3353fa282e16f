"""Samples text from a dense model. It serves to convert and evaluate a model if its training text is not available.

    python -m loadtests.common.sample_text MODEL OUT.txt [--tokens 200000] [--seed 0]

Each window is sampled from BOS at temperature 1 and becomes one paragraph. The perplexity on this text is the model's own
entropy.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ladimo.auto import load_tokenizer
from ladimo.checkpoint import write_text


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    length = model.config.max_position_embeddings - 1
    start = torch.full((64, 1), tokenizer.bos_token_id)
    texts: list[str] = []
    while len(texts) * length < args.tokens:
        ids = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=length, do_sample=True, top_k=0, pad_token_id=0
        )
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    write_text(args.out, "\n\n".join(texts))


if __name__ == "__main__":
    main()
