"""Measures what a multiply-add of a prompt costs at each number of bits, on one layer of the model's shape with random weights.

The server does this when it starts, so its figures are those of the machine that serves.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from ladimo.model.backends.choose import choose_backend
from ladimo.model.config import ModelConfig
from ladimo.model.inputs import PrefillSegment, RoutingTables, StepInputs
from ladimo.model.precision import NESTED_BITS
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import LayerRule, RoutingPolicy
from ladimo.prefill.costs import PROMPT, FormCosts
from ladimo.prefill.processor import processor_name
from ladimo.prefill.random_weights import nest_randomly, random_model

BLOCK = 16  # tokens of a KV cache block
VOCABULARY = 256
ROUNDS = 7
LOW, HIGH = NESTED_BITS

logger = logging.getLogger(__name__)


def measure_form_costs(
    config: ModelConfig,
    stored: torch.dtype,
    device: str = "auto",
    dtype: str = "auto",
    tokens: int = PROMPT,
    clock: Callable[[], float] = time.perf_counter,
) -> FormCosts:
    """The costs for a nested model on the device and in the dtype that would serve it; see `choose_backend`.

    tokens: of the prompt. It takes about 30 times as long as one layer takes for a prompt. Raises ValueError for a device or
    dtype that is not available.
    """
    assert config.nested_bits
    layer = next(layer for layer in config.layers if layer is not None)
    small = replace(config, vocab_size=VOCABULARY, num_hidden_layers=1, layers=(layer,), nested_top_bits=None)
    backend = choose_backend(small, stored, device, dtype)
    model = random_model(small, backend.dtype, backend.device)
    nest_randomly(model)
    backend.prepare(model)
    full = LayerRule.full(layer)
    rules = [replace(full, bits=bits, attention_bits=bits) for bits in (None, HIGH, LOW)]
    rules.append(replace(rules[-1], refine=0.0))  # every neuron
    threads = torch.get_num_threads()  # a step may change them
    policies = [RoutingPolicy("", "", (rule,), rule.bits) for rule in rules]
    whole, high, low, refined = fastest_steps(model, policies, tokens, clock)
    torch.set_num_threads(threads)
    costs = FormCosts(
        processor=processor_name(backend.device, backend.num_threads),
        dtype=str(backend.dtype).removeprefix("torch."),
        bits4=low / whole,
        bits8=high / whole,
        # Only the rows of the FFN were refined.
        refined=max(refined - low, 0.0) / whole * small.dense_parameters / small.ffn_parameters,
    )
    logger.info(
        "in prompts, a multiply-add takes %.2f of its time with %s weights at 8 bits, %.2f at 4 bits, and %.2f more with a "
        "refined row: %s",
        *(costs.bits8, costs.dtype, costs.bits4, costs.refined, costs.processor),
    )
    return costs


@torch.inference_mode()
def fastest_steps(
    model: MoeTransformer, policies: list[RoutingPolicy], tokens: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The seconds of a step that computes one prompt of so many tokens, under each policy: the fastest of ROUNDS, because other
    work on the machine only adds time."""
    config, backend = model.config, model.backend
    device, blocks = backend.device, -(-tokens // BLOCK)
    cache = backend.allocate_cache(config, blocks + 1, BLOCK)
    tables = RoutingTables.empty(len(policies) + 1, config.num_hidden_layers, config.max_num_experts, device)
    for row, policy in enumerate(policies, start=1):
        tables.write(row, *policy.to_rows(config.max_num_experts))
    places = torch.arange(tokens, device=device)
    inputs = StepInputs(
        input_ids=places % config.vocab_size,
        positions=places,
        policy_ids=places,
        slot_mapping=places + BLOCK,
        block_table=torch.arange(1, blocks + 1, device=device).unsqueeze(0),
        context_lens=torch.tensor([tokens], device=device),
        prefill=(PrefillSegment(0, 0, tokens, tokens),),
        logit_indices=places[-1:],
    )
    best = [float("inf")] * len(policies)
    for _ in range(ROUNDS):
        for row in range(len(policies)):
            backend.begin_step(tokens)
            started = clock()
            step = replace(inputs, policy_ids=torch.full_like(places, row + 1))
            model.step(step, cache, tables).logits.cpu()  # waits for the device
            best[row] = min(best[row], clock() - started)
    return best
