"""Train the embedded demo model: a small dense LLaMA on the sources of Python's standard library.

    python -m ladimo.demo.train OUT [--minutes 60] [--seed 0]

Writes a Hugging Face directory: config, bf16 safetensors, byte-level BPE tokenizer and a card. All random numbers are seeded.
But the result also depends on the Python release whose library is read, and on the order of floating-point sums. So a second
run gives an equivalent model, not the same bytes. Ctrl-C ends the training, and the best evaluated weights are kept. On a CPU,
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 in the environment avoids page faults and saves a third of the time.
"""

import argparse
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ladimo.demo.corpus import is_held_out, library_sources

CONTEXT = 1024
SHORT_CONTEXT = 256  # for most of the training: it is faster, and a token of Python mostly depends on nearby tokens
BATCH_TOKENS = 8192
VOCAB = 4096
BOS, EOS = "<|bos|>", "<|eos|>"
# Llama 3's pattern for words. A line break and the next line's indentation are never in one token, so a prompt may end with a
# line break.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# The demo model is no chat model. A user's message is rendered as a module's docstring, and the answer is the module.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}\n\n"
    '{% else %}"""{{ message[\'content\'] | replace(\'"\', "\'") }}"""\n\n{% endif %}{% endfor %}'
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. It has no unknown token, and decoding gives back every string."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """The token ids of all texts in one sequence, each text between BOS and EOS."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)


def epochs(stream: torch.Tensor, context: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields batches [BATCH_TOKENS / context, context + 1] without end. Each epoch has another offset and another order."""
    batch = BATCH_TOKENS // context
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        windows = stream[offset:].unfold(0, context + 1, context)
        order = torch.randperm(len(windows), generator=generator)
        for rows in order.split(batch):
            if len(rows) == batch:
                yield windows[rows]


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu" if batch.device.type == "cpu" else "cuda", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, device: torch.device, limit: int | None = None) -> float:
    """Mean negative log-likelihood in nats per token, over the first `limit` windows of the held-out stream (None: all)."""
    windows = stream.unfold(0, CONTEXT + 1, CONTEXT)[:limit]
    losses = [loss_of(model, rows.to(device)).item() * len(rows) for rows in windows.split(BATCH_TOKENS // CONTEXT)]
    return sum(losses) / len(windows)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms. AdamW alone needs about twice the tokens."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    other = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inside, lr=0.02, weight_decay=0.05, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(other, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.95)),
    ]


def card(
    *,
    seconds: float,
    device: str,
    tokens: int,
    library: int,
    files: int,
    tests: int,
    held_out: int,
    loss: float,
    bytes_per_token: float,
) -> str:
    return f"""# LaDiMo's embedded demo model

A dense LLaMA (hidden 256, intermediate 1024, 6 layers, 4 heads over 2 key/value heads, vocabulary {VOCAB}, context
{CONTEXT}, tied embeddings; 6.9 M parameters) trained by `python -m ladimo.demo.train`, so that the project works where no
model hub can be reached.

- **Data.** Sources of Python {platform.python_version()}'s standard library without generated tables and vendored packages:
  {files} modules, {library:,} tokens ({bytes_per_token:.2f} bytes per token), and {tests} test files, read half as often. One
  module in 25, chosen by a hash of its name, was held out.
- **Training.** {tokens:,} tokens in {seconds / 60:.0f} minutes on {device}, bf16 autocast, Muon and AdamW; windows of
  {SHORT_CONTEXT} tokens for the first four fifths of the time, then of {CONTEXT}.
- **Held-out perplexity** ({held_out:,} tokens, windows of {CONTEXT}): **{math.exp(loss):.3f}** per token,
  {loss / math.log(2) / bytes_per_token:.3f} bits per byte.
- **Use.** Demonstration and tests. It writes plausible Python; it knows nothing and follows no instructions.
- **Licence.** Weights Apache-2.0, as the project; the text it learned from is under the PSF licence.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60, help="training time; the learning rate falls until its end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    sources = library_sources()
    train_texts = [text for name, text in sources.items() if not is_held_out(name)]
    held_out_texts = [text for name, text in sources.items() if is_held_out(name)]
    test_texts = list(library_sources(tests=True).values())
    tokenizer = train_tokenizer(train_texts)
    library, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    # Tests are read once and modules twice, because the model is meant to write modules.
    train = torch.cat((library, encode(tokenizer, test_texts), library))
    bytes_per_token = sum(len(text.encode()) for text in held_out_texts) / len(held_out)
    print(
        f"{len(train_texts)} modules, {len(library):,} tokens; {len(test_texts)} tests; {len(train):,} tokens a pass; "
        f"held out {len(held_out_texts)} modules, {len(held_out):,} tokens",
        flush=True,
    )

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    optimizers = make_optimizers(model)
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)

    compiled_loss = torch.compile(loss_of)
    generator = torch.Generator().manual_seed(args.seed)
    short, long = epochs(train, SHORT_CONTEXT, generator), epochs(train, CONTEXT, generator)
    started, tokens, step = time.monotonic(), 0, 0
    best = (math.inf, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    progress = tqdm(total=100, unit="%", disable=not sys.stderr.isatty())
    try:
        while (done := (time.monotonic() - started) / (60 * args.minutes)) < 1:
            # Warm up over 100 steps, then hold, then fall linearly over the last 60 % of the time.
            scale = min(1.0, (step + 1) / 100, (1 - done) / 0.6)
            for group, base in zip((g for o in optimizers for g in o.param_groups), base_rates, strict=True):
                group["lr"] = base * max(scale, 0.01)
            loss = compiled_loss(model, next(short if done < 0.8 else long).to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            tokens += BATCH_TOKENS
            step += 1
            progress.update(100 * done - progress.n)
            if step % 100 == 0:
                value = held_out_loss(model, held_out, device, limit=32)
                rate = tokens / (time.monotonic() - started)
                print(
                    f"step {step} tokens {tokens:,} train {loss.item():.3f} held-out {value:.3f} {rate:,.0f} tok/s", flush=True
                )
                if value < best[0]:
                    best = (value, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    except KeyboardInterrupt:
        print("stopped; keeping the best weights so far", flush=True)
    seconds = time.monotonic() - started
    if held_out_loss(model, held_out, device, limit=32) > best[0]:
        model.load_state_dict(best[1])

    model.to(torch.bfloat16)
    final = held_out_loss(model.float(), held_out, device)
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    text = card(
        seconds=seconds,
        device=name,
        tokens=tokens,
        library=len(library),
        files=len(train_texts),
        tests=len(test_texts),
        held_out=len(held_out),
        loss=final,
        bytes_per_token=bytes_per_token,
    )
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(f"held-out perplexity {math.exp(final):.3f}, {tokens:,} tokens, {seconds:.0f} s -> {args.out}", flush=True)


if __name__ == "__main__":
    main()
