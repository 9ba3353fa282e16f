"""What it costs a nested model when one part of a layer reads 4 bits: estimated for all layers from one pass back.

The damage is the KL divergence of the next tokens from those of the whole model, to second order; `sensitivity` explains it. A
rule here changes the bits of the attention or of the FFN, so the error is that of the layer's output.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ladimo.convert.ffn.expert_layer import run_rule
from ladimo.convert.policies.backward import Chunk, Visit, run_backward
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule

SAMPLES = 2


def precision_damages(
    model: StreamedModel, rules: Mapping[int, Sequence[LayerRule]], blocks: Tensor, samples: int = SAMPLES
) -> tuple[dict[int, dict[LayerRule, float]], dict[int, dict[LayerRule, float]]]:
    """By layer and rule, on token blocks [B, S]: the damage of the rule in nats per token when all other layers are whole, and
    the neurons that a token refines under it."""
    damages: dict[int, dict[LayerRule, float]] = {}
    refined: dict[int, dict[LayerRule, float]] = {}
    scored = samples * blocks[:, 1:].numel()

    def begin(index: int) -> Visit:
        damages[index], refined[index] = dict.fromkeys(rules[index], 0.0), dict.fromkeys(rules[index], 0.0)

        def visit(chunk: Chunk) -> None:
            whole = chunk.attended + chunk.ffn_outputs
            for bits in dict.fromkeys(rule.attention_bits for rule in rules[index]):
                ((_, attended, ffn_inputs),) = model.attend(chunk.layer, chunk.hidden_states, bits)
                for rule in rules[index]:
                    if rule.attention_bits == bits:
                        mlp = chunk.layer.mlp
                        assert isinstance(mlp, ExpertLayer)
                        out, _, neurons = run_rule(mlp, ffn_inputs, rule)
                        error = attended + out - whole
                        damages[index][rule] += 0.5 * float(chunk.products(error).sum()) / scored
                        refined[index][rule] += 0 if neurons is None else int(neurons.sum()) / blocks.numel()

        return visit

    run_backward(model, blocks, samples, 0, begin)
    return damages, refined
