"""The decode step can be captured in a CUDA graph: no data-dependent shape, no host synchronisation. Shown without a GPU.

Under FakeTensorMode tensors have a device and a shape but no content, so whatever needs the content on the host raises. A
copy between host and device does not need it, so two more modes refuse those.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ladimo.checkpoint import load_model, read_config, read_policies
from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.config import ModelConfig
from ladimo.model.experts import MAX_GATHERED, apply_experts_grouped
from ladimo.model.inputs import RoutingTables, StepInputs, StepOutput
from ladimo.model.quantization.layers import quantize_model
from ladimo.model.transformer import MoeTransformer
from tests.factories import make_moe
from tests.ladimo.model.families.test_families import FAMILIES
from tests.ladimo.stepping import Row, Stepper, make_tables

# Any device but the CPU: a torch built without CUDA cannot index a fake tensor that claims to be on a GPU.
DEVICE = torch.device("meta")
BLOCK_SIZE, NUM_BLOCKS, BLOCKS_PER_ROW, NUM_POLICIES = 16, 32, 6, 5


class HostCopy(Exception):
    """A captured step must not move data between host and device."""


class NoHostCopies(TorchDispatchMode):
    """Refuses operations with tensors on two devices."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            raise HostCopy(str(func))
        return result


class NoHostValues(TorchFunctionMode):
    """Refuses tensors made of Python values: on a real device that is a copy too, which the fake one does not show."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            raise HostCopy(str(func))
        return func(*args, **(kwargs or {}))


class DecodeStep:
    """A model, its cache, its tables and one step's inputs, all on the fake device."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        dtype: torch.dtype = torch.bfloat16,
        format: str | None = None,
        budgets: bool = False,
        backend: type[TorchBackend] = TorchBackend,
    ) -> None:
        with DEVICE:
            self.model = MoeTransformer(config)
        weights = {n: torch.empty(p.shape, dtype=dtype, device=DEVICE) for n, p in self.model.named_parameters()}
        self.model.load_state_dict(weights, assign=True)
        if format is not None:
            quantize_model(self.model, format)
        self.model.rotary.table = torch.empty(config.max_position_embeddings, 2, config.rotary_dim, device=DEVICE)
        self.backend = backend(DEVICE, dtype)
        self.backend.prepare(self.model)
        self.backend.lay_out(self.model)
        self.kv_cache = self.backend.allocate_cache(config, NUM_BLOCKS, BLOCK_SIZE)
        self.tables = RoutingTables.empty(NUM_POLICIES, config.num_hidden_layers, config.max_num_experts, DEVICE, budgets)
        self.inputs = StepInputs(
            input_ids=torch.zeros(batch, dtype=torch.int64, device=DEVICE),
            positions=torch.zeros(batch, dtype=torch.int64, device=DEVICE),
            policy_ids=torch.zeros(batch, dtype=torch.int64, device=DEVICE),
            slot_mapping=torch.zeros(batch, dtype=torch.int64, device=DEVICE),
            block_table=torch.zeros(batch, BLOCKS_PER_ROW, dtype=torch.int64, device=DEVICE),
            context_lens=torch.zeros(batch, dtype=torch.int64, device=DEVICE),
            num_decode=batch,
        )

    @torch.no_grad()
    def run(self) -> StepOutput:
        with NoHostValues(), NoHostCopies():  # type: ignore[no-untyped-call]
            out: StepOutput = self.model(self.inputs, self.kv_cache, self.tables)
            if out.expert_ids is not None:
                self.backend.record(self.tables, out.expert_ids, self.inputs.policy_ids)
        return out


@contextmanager
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield


@pytest.mark.parametrize("batch", [1, 2, MAX_GATHERED // 4, MAX_GATHERED // 4 + 1, 64])
def test_decode_step_of_moe(moe_dir: Path, batch: int) -> None:
    """Sizes on both sides of the choice of expert kernel, counting included."""
    config = read_config(moe_dir)
    with fake():
        step = DecodeStep(config, batch, budgets=batch > 1)
        logits, expert_ids, _ = step.run()
        assert logits.shape == (batch, config.vocab_size)
        assert expert_ids is not None
        assert expert_ids.shape == (config.num_hidden_layers, batch, config.max_num_experts)
        assert logits.device.type == expert_ids.device.type == DEVICE.type


@pytest.mark.parametrize("family", ["qwen3", "phi4_mini", "phi2"])
def test_decode_step_of_families(family: str, tmp_path: Path) -> None:
    """Converted; also where experts have no gate."""
    config = read_config(make_moe(tmp_path, **FAMILIES[family]))
    with fake():
        for batch in (1, 64):
            assert DecodeStep(config, batch).run().logits.shape == (batch, config.vocab_size)


@pytest.mark.parametrize(
    ("batch", "format"), [(1, None), (2, None), (64, None), (600, None), (1, "int8"), (64, "int4"), (600, "int4")]
)
def test_decode_step_of_moe_on_kernels(moe_dir: Path, monkeypatch: pytest.MonkeyPatch, batch: int, format: str | None) -> None:
    """What the kernels' launchers do beside launching is as free of the host: the launches are left out, as nothing can run on
    fake tensors."""
    pytest.importorskip("triton")
    from ladimo.model.backends.triton_backend import TritonBackend
    from ladimo.model.kernels import attention, expert_grouped, expert_matvec, linear, norm_activation, routing

    launched = set()

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(type(size) is int and size > 0 for size in grid)
            return lambda *args, **options: launched.add(self.name)

    for module in (attention, expert_grouped, expert_matvec, linear, norm_activation, routing):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launch(name))
    config = read_config(moe_dir)
    with fake():
        logits, expert_ids, _ = DecodeStep(config, batch, format=format, budgets=batch == 64, backend=TritonBackend).run()
        assert logits.shape == (batch, config.vocab_size)
        assert expert_ids is not None and expert_ids.shape[1] == batch
    names = {
        "_select_kernel",
        "_record_kernel",
        "_rms_norm_kernel",
        "_silu_mul_kernel",
        "_rotate_kernel",
        "_attend_part_kernel",
    }
    assert names < launched
    assert ("_apply_batch_budget_kernel" in launched) == (batch == 64)
    assert ("_matvec_down_kernel" in launched) == (batch == 1)
    assert ("_grouped_down_kernel" in launched) == (batch > 1)
    dense = "_matvec_kernel" if batch == 1 else "_matmul_kernel" if batch < linear.WHOLE_ROWS else "_whole_kernel"
    # torch multiplies several rows by weights as they are.
    assert launched & {"_matvec_kernel", "_matmul_kernel", "_whole_kernel"} == ({dense} if format or batch == 1 else set())


def test_decode_step_of_dense_model(dense_dir: Path) -> None:
    with fake():
        logits, expert_ids, _ = DecodeStep(read_config(dense_dir), 4).run()
        assert logits.shape[0] == 4
        assert expert_ids is None


class Grouped(TorchBackend):
    """The CPU's way of running experts, which reads counts on the host."""

    apply_experts = staticmethod(apply_experts_grouped)  # type: ignore[assignment]


def test_grouped_experts_are_caught(moe_dir: Path) -> None:
    """The check can fail."""
    with fake(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        DecodeStep(read_config(moe_dir), 4, backend=Grouped).run()


@pytest.mark.parametrize(
    ("culprit", "caught"),
    [
        (lambda ids: ids.max().item(), DataDependentOutputException),
        (lambda ids: ids.tolist(), DataDependentOutputException),
        (lambda ids: bool((ids >= 0).any()), DataDependentOutputException),
        (lambda ids: ids[ids >= 0], DynamicOutputShapeException),
        (lambda ids: ids.nonzero(), DynamicOutputShapeException),
        (lambda ids: ids.unique(), DynamicOutputShapeException),
        (lambda ids: ids.cpu(), HostCopy),
        (lambda ids: torch.empty_like(ids).copy_(torch.zeros(ids.shape)), HostCopy),
        (lambda ids: torch.tensor([1.0], device=ids.device), HostCopy),
    ],
)
def test_host_synchronisation_is_caught(
    moe_dir: Path, monkeypatch: pytest.MonkeyPatch, culprit: Callable[[Tensor], object], caught: type[Exception]
) -> None:
    """Slipped into the counting of a step, each of these is found."""

    def record(self: RoutingTables, expert_ids: Tensor, policy_ids: Tensor) -> None:
        culprit(expert_ids)

    monkeypatch.setattr(RoutingTables, "record", record)
    with fake(), pytest.raises(caught):
        DecodeStep(read_config(moe_dir), 4).run()


def test_padded_rows_run_nothing_and_disturb_nobody(moe_dir: Path) -> None:
    """What capture needs of padding, with real numbers: rows of policy 0 on the null block beside rows of mixed policies."""
    model = load_model(moe_dir, torch.float32, torch.device("cpu"))
    policies = list(read_policies(moe_dir, model.config).values())
    steps = Stepper(model, make_tables(model, policies))
    rows = [Row(list(range(30, 60)), policy) for policy in (1, 2, 3, 4)]
    for row, computed in zip(rows, (3, 9, 16, 29), strict=True):
        steps.step(prefill=[(row, computed)])
    bare = steps.inputs(decode=rows)
    assert bare.slot_mapping is not None and bare.block_table is not None and bare.context_lens is not None
    padded = StepInputs(
        input_ids=F.pad(bare.input_ids, (0, 3)),
        positions=F.pad(bare.positions, (0, 3)),
        policy_ids=F.pad(bare.policy_ids, (0, 3)),
        slot_mapping=F.pad(bare.slot_mapping, (0, 3)),
        block_table=F.pad(bare.block_table, (0, 0, 0, 3)),
        context_lens=F.pad(bare.context_lens, (0, 3), value=1),
        num_decode=7,
    )
    with torch.no_grad():
        expected = model(bare, steps.kv_cache, steps.tables)
        out = model(padded, steps.kv_cache, steps.tables)
    torch.testing.assert_close(out.logits[:4], expected.logits, rtol=0, atol=1e-5)
    assert out.logits.isfinite().all()
    assert torch.equal(out.expert_ids[:, :4], expected.expert_ids)
    assert (out.expert_ids[:, 4:] == -1).all()
    steps.tables.record(out.expert_ids, padded.policy_ids)
    assert (steps.tables.expert_tokens[0] == 0).all()
    assert steps.tables.expert_tokens.sum() == (expected.expert_ids >= 0).sum() > 0
