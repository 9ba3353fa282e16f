"""The model on kernels is the model, and kernels stand in only where they can."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ladimo.checkpoint import load_model, read_policies
from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.inputs import StepInputs, StepOutput
from ladimo.model.quantization.layers import quantize_model
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import PHI2, make_moe, make_nested
from tests.ladimo.stepping import Row, Stepper, make_tables

pytest.importorskip("triton")
from ladimo.model.backends.triton_backend import TritonBackend, unless_trained

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this model lives on the CPU; tests/gpu has one that does not")
@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({}, None),
        pytest.param({}, "int4", marks=pytest.mark.long),
        pytest.param({"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 1}, None, marks=pytest.mark.long),
        ({"layer": {"router": "table", "router_hidden_size": 5, "expert_weight": "one"}, "num_hidden_layers": 1}, None),
        pytest.param(
            {**PHI2, "num_hidden_layers": 1, "dense_layers": ()},
            "int4",
            marks=pytest.mark.long,
        ),
    ],
    ids=["", "int4", "qwen3", "table router", "phi2"],
)
def test_a_model_on_kernels_is_the_model(fields: dict[str, Any], format: str | None, tmp_path: Path) -> None:
    """A prompt and decoding steps of mixed policies, one of them padding, through every kernel at once."""
    moe_dir = make_moe(tmp_path, **fields)
    model = load_model(moe_dir, torch.float32, torch.device("cpu"))
    if format is not None:
        quantize_model(model, format)
    policies = list(read_policies(moe_dir, model.config).values())
    results = []
    for backend in (TorchBackend(), TritonBackend()):
        backend.prepare(model)
        backend.lay_out(model)
        steps = Stepper(model, make_tables(model, policies))
        rows = [Row(list(range(10 * policy, 10 * policy + 20)), policy) for policy in (1, 2, 3, 4)]
        logits = steps.step(prefill=[(row, 7 + row.policy) for row in rows])
        logits += steps.step(decode=rows[:1])
        inputs = steps.inputs(decode=rows)
        assert inputs.context_lens is not None
        inputs.policy_ids[2], inputs.context_lens[2] = 0, 1
        with torch.no_grad():
            out = model(inputs, steps.kv_cache, steps.tables)
        assert out.expert_ids is not None
        assert (out.expert_ids[:, 2] == -1).all()
        backend.record(steps.tables, out.expert_ids, inputs.policy_ids)
        results.append((torch.cat([*logits, out.logits]), out.expert_ids, steps.tables))
    (expected, expected_ids, expected_tables), (logits_of_kernels, ids, tables) = results
    torch.testing.assert_close(logits_of_kernels, expected, rtol=0, atol=2e-4)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(tables.expert_tokens, expected_tables.expert_tokens)
    assert torch.equal(tables.distinct_experts, expected_tables.distinct_experts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this model lives on the CPU; tests/gpu has one that does not")
@pytest.mark.parametrize("fields", [{}, PHI2], ids=["", "no gate"])
def test_a_nested_model_on_kernels_is_the_model(fields: dict[str, Any], tmp_path: Path) -> None:
    """A token at each precision, a refined one and padding in one step."""
    directory = make_nested(tmp_path, num_experts=1, num_hidden_layers=1, vocab_size=60, **fields)
    names = ("full", "balanced", "refined")
    model = load_model(directory, torch.float32, torch.device("cpu"))
    rule = LayerRule(1, renormalize=False, bits=4, attention_bits=4, refine=1.0)
    known = {**read_policies(directory, model.config), "refined": RoutingPolicy("refined", "", (rule,), 4, 2.0)}
    tables = make_tables(model, [known[name] for name in names])
    count = len(names)
    inputs = replace(StepInputs.whole_sequences(torch.arange(count + 1).view(-1, 1)), policy_ids=torch.arange(count + 1))
    results: list[StepOutput] = []
    for backend in (TorchBackend(), TritonBackend()):
        backend.prepare(model)
        backend.prepare(model)  # whoever loads a model to serve it does so, too
        with torch.no_grad():
            results.append(model(inputs, None, tables))
    expected, out = results
    torch.testing.assert_close(out.logits[1:], expected.logits[1:], rtol=0, atol=2e-4)
    assert out.refined is not None and expected.refined is not None
    assert torch.equal(out.refined[:, 1:], expected.refined[:, 1:])
    assert [int(total) > 0 for total in out.refined.sum(dim=(0, 2))] == [False, *(name == "refined" for name in names)]


def test_kernels_are_not_for_training() -> None:
    """A kernel has no gradient, so whoever wants one gets torch's operation."""
    computed = unless_trained(lambda weight: "kernel", lambda weight: "torch")
    assert computed(torch.zeros(2)) == "kernel"
    trained = torch.zeros(2, requires_grad=True)
    assert computed(trained) == "torch"
    with torch.no_grad():
        assert computed(trained) == "kernel"


def test_every_operation_has_a_kernel() -> None:
    """`apply_refined` is a part of `apply_nested` in torch, and has no use on its own."""
    operations = {name for name, value in vars(TorchBackend).items() if isinstance(value, staticmethod)}
    assert operations - {"apply_refined"} == {
        name for name, value in vars(TritonBackend).items() if isinstance(value, staticmethod)
    }
    assert {"nested_linear", "apply_nested", "nested_logits"} <= vars(TritonBackend).keys()


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """Types, layouts and the machine's limits at the sizes of a 7B model: what the interpreter does not know. Batches between
    the smallest and the largest are compiled with LONG_TESTS only."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "loadtests.gpu.kernel_compile", *([] if os.environ.get("LONG_TESTS") else ["--few"])]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert {
        "_select_kernel",
        "_apply_batch_budget_kernel",
        "_matvec_down_kernel",
        "_grouped_down_kernel",
        "_attend_part_kernel",
    } < {k["kernel"] for k in compiled}
    both = {"_matvec_gate_up_kernel", "_matvec_down_kernel", "_grouped_gate_up_kernel", "_grouped_down_kernel"}
    integers = {"_matvec_kernel", "_matmul_kernel", "_whole_kernel"}
    assert {"_direct_kernel", "_product_kernel"} < {k["kernel"] for k in compiled}
    bits = {(k["kernel"], k["constants"]["BITS"]) for k in compiled if "BITS" in k["constants"]}
    assert bits == {(name, 16) for name in (*both, "_matvec_kernel")} | {
        (name, width) for name in both | integers for width in (4, 8)
    }
    for kernel in compiled:
        assert kernel["shared"] <= 227 * 1024, kernel  # what a block may have on compute capability 9.0
        assert kernel["spilled"] <= 8, kernel  # of a thread; two registers cost nothing


def test_keys_that_are_narrower_than_values_are_read_in_torch() -> None:
    """Pruned queries and keys: the kernel has one number of channels for all."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((2, 4, 6), (8, 4, 2, 6), (8, 4, 2, 8)))
    tables, lengths = torch.tensor([[1, 2], [5, 3]]), torch.tensor([6, 3])
    found = TritonBackend.attend_decode(q, k, v, tables, lengths)
    assert found.shape == (2, 4, 8)
    torch.testing.assert_close(found, TorchBackend.attend_decode(q, k, v, tables, lengths))
