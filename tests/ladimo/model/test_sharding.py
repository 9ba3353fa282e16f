"""The parts of a model compute together what the whole model computes. Here each part is a thread."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from ladimo.checkpoint import load_model, read_config, read_policies, write_policy
from ladimo.checkpoint.sharded import load_shard
from ladimo.model.inputs import StepInputs, StepOutput
from ladimo.model.sharding import Shard
from ladimo.model.transformer import MoeTransformer
from tests.factories import PHI2, VOCAB_SIZE, make_dense, make_moe, make_nested
from tests.ladimo.stepping import make_tables

CPU = torch.device("cpu")
IDS = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(3))
DENSE: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "phi3": {"model_type": "phi3"},
    "phi": {"model_type": "phi"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
}


def make_reduce(size: int) -> Callable[[Tensor], None]:
    """Adds tensors of `size` threads up, in place."""
    barrier, given = Barrier(size), list[Tensor]()

    def reduce(tensor: Tensor) -> None:
        given.append(tensor.clone())
        barrier.wait(30)
        tensor.copy_(torch.stack(given).sum(dim=0))
        if barrier.wait(30) == 0:
            given.clear()
        barrier.wait(30)

    return reduce


def run(model: MoeTransformer, directory: Path) -> StepOutput:
    """The first half of the sequences under policy `full`, the rest under another."""
    policies = read_policies(directory, read_config(directory))
    tables = make_tables(model, [policies["full"], policies[min(policies)]])
    inputs = StepInputs.whole_sequences(IDS)
    inputs.policy_ids[IDS.numel() // 2 :] = 2
    with torch.inference_mode():
        return model.forward(inputs, None, tables)


def size_of(model: MoeTransformer) -> int:
    """The numbers in weights and planes."""
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))


def run_parts(directory: Path, size: int) -> list[StepOutput]:
    reduce = make_reduce(size)
    parts = [load_shard(directory, torch.float32, CPU, Shard(rank, size), reduce) for rank in range(size)]
    whole = size_of(load_model(directory, torch.float32, CPU))
    assert all(size_of(part) < whole for part in parts)
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda part: run(part, directory), parts))


@pytest.mark.parametrize("name", DENSE)
def test_two_parts_are_the_whole(name: str, tmp_path: Path) -> None:
    directory = make_dense(tmp_path / "model", **DENSE[name])
    whole = run(load_model(directory, torch.float32, CPU), directory)
    for part in run_parts(directory, 2):
        torch.testing.assert_close(part.logits, whole.logits, rtol=1e-4, atol=1e-4)
        if whole.expert_ids is not None:
            assert part.expert_ids is not None and torch.equal(part.expert_ids, whole.expert_ids)


@pytest.mark.parametrize(
    ("router", "model_type"), [("mlp", "llama"), ("glu", "llama"), ("linear", "phi")], ids=["mlp", "glu", "no gate"]
)
def test_four_parts_of_a_converted_model_are_the_whole(router: str, model_type: str, tmp_path: Path) -> None:
    layer = {"router": router, **({"router_hidden_size": 8} if router == "mlp" else {})}
    directory = make_moe(tmp_path / "model", layer=layer, num_key_value_heads=4, model_type=model_type)
    whole = run(load_model(directory, torch.float32, CPU), directory)
    for part in run_parts(directory, 4):
        torch.testing.assert_close(part.logits, whole.logits, rtol=1e-4, atol=1e-4)
        assert part.expert_ids is not None and whole.expert_ids is not None
        assert torch.equal(part.expert_ids, whole.expert_ids)


@pytest.mark.parametrize(
    ("config", "size", "complaint"),
    [
        ({}, 3, "tensor_parallel_size 3: num_attention_heads is 4, which cannot be divided by 3"),
        ({}, 4, "num_key_value_heads is 2"),
        ({"intermediate_size": 95}, 2, "intermediate_size is 95"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "intermediate_size": 33, "num_experts_per_tok": 1},
            2,
            "moe_intermediate_size is 33",
        ),
        ({"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2}, 2, "norms all heads of a token together"),
    ],
)
def test_models_that_cannot_be_divided_are_refused_by_name(
    config: dict[str, Any], size: int, complaint: str, tmp_path: Path
) -> None:
    directory = make_dense(tmp_path / "model", **config)
    with pytest.raises(ValueError, match=complaint):
        load_shard(directory, torch.float32, CPU, Shard(0, size), lambda tensor: None)


@pytest.mark.parametrize("own", [{"tie_word_embeddings": True}, {}, PHI2], ids=["tied head", "head of its own", "no gate"])
@pytest.mark.parametrize("top_bits", [16, 8], ids=["whole weights", "planes alone"])
def test_two_parts_of_a_nested_model_are_the_whole(top_bits: int, own: dict[str, Any], tmp_path: Path) -> None:
    """Under every policy. What a token refines depends on the mean of all neurons, and all of them are counted."""
    fields: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, **own}
    directory = make_nested(tmp_path / "model", top_bits=top_bits, num_experts=2, **fields)
    policies = read_policies(directory, read_config(directory))
    if top_bits == 16:
        rules = tuple(rule and replace(rule, refine=1.5) for rule in policies["fast"].layers)
        write_policy(directory, replace(policies["fast"], name="a", layers=rules, head_refine=2.0))
    else:
        write_policy(directory, replace(policies["fast"], name="a", head_refine=2.0))
    whole = run(load_model(directory, torch.float32, CPU), directory)
    assert whole.refined is not None
    assert whole.refined[-1].any() and whole.refined[0].any() == (top_bits == 16)
    for part in run_parts(directory, 2):
        torch.testing.assert_close(part.logits, whole.logits, rtol=1e-4, atol=1e-4)
        assert part.refined is not None
        assert torch.equal(part.refined, whole.refined)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "tensor_parallel_size 2: a part has 16 columns of o_proj, .* groups of 32"),
        ({"hidden_size": 64}, "a part has 12 columns of down_proj"),
    ],
)
def test_groups_of_columns_are_not_divided(config: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        Shard(0, 2).config(read_config(make_nested(tmp_path / "model", **config)))
