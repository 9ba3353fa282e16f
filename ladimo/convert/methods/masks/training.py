"""Trains the hypernetwork on the whole model. The model's weights are frozen.

Legend: L masked layers, N experts, U units of an FFN, T tokens, D hidden_size, B sequences, S positions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.convert.distill.end_to_end import Network
from ladimo.convert.distill.layerwise import CURVE_POINTS
from ladimo.convert.methods.masks.blocks import block_size, cut_blocks
from ladimo.convert.methods.masks.gates import GatedAttention, PairGate, kept_pairs
from ladimo.convert.methods.masks.hypernetwork import KEEP_FROM, Hypernetwork, MaskHead, sample_choices, sample_masks
from ladimo.convert.methods.masks.recipe import MaskRecipe
from ladimo.convert.methods.masks.start import SPREAD, Start
from ladimo.convert.progress import track
from ladimo.model.attention.layer import Attention
from ladimo.model.layers import Ffn, GeluMLP

SNAPSHOT_STEPS = 25
ROUTER_SCALE = 4.0
SLACK = 1e-3  # added to both sides of a ratio in a penalty


@dataclass(frozen=True, slots=True)
class MaskPoint:
    """Means since the last point. loss: the distillation loss in nats per token, or the cross-entropy. ratio: sampled share of
    active parameters over the budget. union: the share of neurons that some expert holds."""

    step: int
    loss: float
    ratio: float
    union: float


class MaskedFfn(nn.Module):
    """A frozen FFN with sampled masks. `begin` must be called before each pass."""

    def __init__(self, mlp: Ffn, head: MaskHead, options: MaskRecipe, generator: torch.Generator) -> None:
        super().__init__()
        self.mlp, self.head, self.options, self.generator = mlp, head, options, generator
        self.embeddings: Tensor = torch.empty(0)
        self.shift: Tensor = torch.empty(0)
        self.imbalance: Tensor | None = None

    def begin(self, embeddings: Tensor, shift: Tensor) -> None:
        """embeddings [N, W]; shift: a scalar that is subtracted from all logits."""
        self.embeddings, self.shift, self.imbalance = embeddings, shift, None

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        head, choices = self.head, None
        if head.router is not None:
            choices = sample_choices(head.router(x.float()), self.generator)
            share = choices.mean(dim=0)
            self.imbalance = (share.detach() * share).sum()  # 1 / N if every expert gets as many tokens
        by_token = choices is not None and self.options.token_noise
        logits = head.logits(self.embeddings, choices if by_token else None) - self.shift
        mask = sample_masks(logits, self.options.soft, self.generator)
        if choices is not None and not by_token:
            mask = choices @ mask
        if head.unit_of is not None:
            mask = mask[:, head.unit_of]
        return run_masked(self.mlp, x, mask.to(x.dtype), self.options.mask_once)


def run_masked(mlp: Ffn, x: Tensor, mask: Tensor, once: bool = True) -> Tensor:
    """An FFN with some neurons: x [T, D], mask [T, neurons] -> [T, D]. once: see `MaskRecipe.mask_once`. Without a gate there
    is nothing else that the mask could multiply."""
    if isinstance(mlp, GeluMLP):
        some: Tensor = mlp.down_proj(F.gelu(mlp.up_proj(x), approximate="tanh") * mask)
        return some
    gate, up = F.silu(mlp.gate_proj(x)), mlp.up_proj(x)
    out: Tensor = mlp.down_proj(gate * up * mask if once else (gate * mask) * (up * mask))
    return out


def distance(share: Tensor, target: float) -> Tensor:
    """How far a share is from its target, on a logarithmic scale; 0 if they are equal."""
    return ((share + SLACK) / (target + SLACK)).log().abs()


class MaskTraining:
    """The state of a training, which can be saved after each step and continued.

    layers: the numbers of the masked layers. partitions: their blocks [B, F], once they are cut.
    """

    def __init__(
        self,
        network: Network,
        layers: Sequence[int],
        experts: int,
        options: MaskRecipe,
        cost: "Cost",
        seed: int,
    ) -> None:
        device = network.dense.device
        self.network, self.layers, self.options, self.cost = network, layers, options, cost
        self.generator = torch.Generator(device).manual_seed(seed)
        mlps = [network.dense.ffn(index) for index in layers]
        sizes = [mlp.up_proj.out_features for mlp in mlps]
        config = network.dense.config
        self.gated = self._gated_attentions() if options.qk < 1 else []
        embedded = len(self.gated) if options.qk_train else 0
        self.hypernetwork = Hypernetwork(config.hidden_size, sizes, experts, seed, embedded, layers).to(device)
        kept = kept_pairs(config, options.qk)
        self.gates = nn.ModuleList(PairGate(config, kept, options.qk_train) for _ in self.gated).to(device)
        self.masked = [MaskedFfn(mlp, head, options, self.generator) for mlp, head in zip(mlps, self._heads, strict=True)]
        self.partitions: list[Tensor] = []
        self.step = 0
        self.curve: list[MaskPoint] = []
        self._running: list[tuple[float, float, float]] = []
        self._order = torch.empty(0, dtype=torch.int64)
        self.optimizer = self._make_optimizer()

    @property
    def _pair_gates(self) -> list[PairGate]:
        return list(self.gates)  # type: ignore[arg-type]

    def _with_gates(self, embeddings: Tensor) -> list[tuple[PairGate, Tensor | None]]:
        """Every gate with its embedding, which only trained gates have."""
        gates = self._pair_gates
        return list(zip(gates, embeddings if self.options.qk_train else [None] * len(gates), strict=True))

    @property
    def _heads(self) -> list[MaskHead]:
        return list(self.hypernetwork.heads)  # type: ignore[arg-type]

    def run(self, fit: Tensor, save: Callable[["MaskTraining"], None]) -> None:
        """Train on token blocks fit [B, S] from the current step to the last one. `save` is called now and then.

        Raises ValueError if the loss diverges.
        """
        options = self.options
        for step in track(range(self.step + 1, options.steps + 1), "steps of mask training"):
            self.step = step
            if not self.partitions and self.step > round(options.steps * (1 - options.settle)):
                self.settle()
            self._train_step(fit)
            if self.step in {round(options.steps * (point + 1) / CURVE_POINTS) for point in range(CURVE_POINTS)}:
                means = [sum(values) / len(self._running) for values in zip(*self._running, strict=True)]
                self.curve.append(MaskPoint(self.step, *means))
                self._running.clear()
            if self.step % SNAPSHOT_STEPS == 0:
                save(self)
        if not self.partitions:
            self.settle()

    def begin(self, place: int, start: Start) -> None:
        """Set the masks and the router of the masked layer number `place` before training. Every layer keeps the same share of
        its neurons, as many as the largest budget allows."""
        head, target = self._heads[place], self.options.budgets[0]
        dropped = self.cost.share_of_neurons(1 - target)
        head.start.copy_(KEEP_FROM + SPREAD * (start.order - dropped))
        if head.router is not None and start.router is not None:
            with torch.no_grad():
                head.router.weight.copy_(start.router * ROUTER_SCALE)

    def begin_gates(self, start: Sequence[Tensor]) -> None:
        """Set the logits [G, P] of the gates before training."""
        for gate, logits in zip(self._pair_gates, start, strict=True):
            gate.start.copy_(logits)

    def settle(self) -> None:
        """Cut every layer's neurons into blocks, by their present masks. From now on blocks are kept or dropped as a whole."""
        logits = self.logits(self.options.budgets[len(self.options.budgets) // 2])
        self._check(all(bool(one.isfinite().all()) for one in logits))
        cutter = torch.Generator().manual_seed(self.generator.initial_seed())
        self._cut([cut_blocks(one, self.options.block or block_size(one.shape[1]), cutter) for one in logits])

    @torch.no_grad()
    def logits(self, target: float) -> list[Tensor]:
        """The logits [N, U] of every masked layer at a budget, on the host."""
        embeddings, _ = self.hypernetwork.embeddings()
        shifts = self._shifts(embeddings, target)
        return [(head.logits(embeddings[place]) - shifts[place]).cpu() for place, head in enumerate(self._heads)]

    @torch.no_grad()
    def pairs(self) -> Tensor:
        """The pairs that queries and keys keep in every layer, [layers, G, K], on the host. Only if they are gated."""
        _, embeddings = self.hypernetwork.embeddings()
        return torch.stack([gate.chosen(own) for gate, own in self._with_gates(embeddings)]).cpu()

    def routers(self) -> list[Tensor | None]:
        """The routers [N, D] of the masked layers, on the host; None where there is one expert."""
        return [None if head.router is None else head.router.weight.detach().cpu() for head in self._heads]

    def state(self) -> dict[str, Tensor]:
        """All that is needed to continue, as tensors by name."""
        tensors = {f"weights.{name}": weight for name, weight in self.hypernetwork.state_dict().items()}
        tensors |= {f"gates.{name}": weight for name, weight in self.gates.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
        tensors |= {f"partition.{place}": partition for place, partition in enumerate(self.partitions)}
        points = [astuple(point) for point in self.curve]
        return tensors | {
            "generator": self.generator.get_state(),
            "order": self._order,
            "step": torch.tensor(self.step),
            "curve": torch.tensor(points, dtype=torch.float64).view(-1, 4),
            "running": torch.tensor(self._running, dtype=torch.float64).view(-1, 3),
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        partitions = [tensors[name] for place in range(len(self.layers)) if (name := f"partition.{place}") in tensors]
        if partitions:
            self._cut(partitions)
        for prefix, module in (("weights.", self.hypernetwork), ("gates.", self.gates)):
            module.load_state_dict(
                {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                moments.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.generator.set_state(tensors["generator"])
        self._order, self.step = tensors["order"], int(tensors["step"])
        self.curve = [MaskPoint(int(step), *rest) for step, *rest in tensors["curve"].tolist()]
        self._running = [(loss, ratio, union) for loss, ratio, union in tensors["running"].tolist()]

    def _check(self, finite: bool) -> None:
        if not finite:
            raise ValueError(f"the training of masks diverged at step {self.step}; lower {self.options.name}.lr")

    def _cut(self, partitions: list[Tensor]) -> None:
        self.partitions = partitions
        for head, partition in zip(self._heads, partitions, strict=True):
            head.settle(partition)
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.AdamW:
        weights = [*self.hypernetwork.parameters(), *self.gates.parameters()]
        return torch.optim.AdamW(weights, lr=self.options.lr, weight_decay=self.options.weight_decay)

    def _gated_attentions(self) -> list[GatedAttention]:
        """One per layer of the model."""
        attentions = [layer.self_attn for layer in self.network.layers]
        return [GatedAttention(attention) for attention in attentions if isinstance(attention, Attention)]

    def _shifts(self, embeddings: Tensor, target: float) -> Tensor:
        """Zero at the largest budget, so a training for one budget has none."""
        largest = self.options.budgets[0]
        return self.hypernetwork.shifts(embeddings, SPREAD * self.cost.share_of_neurons(largest - target))

    def _train_step(self, fit: Tensor) -> None:
        options = self.options
        sequences = max(1, options.batch_tokens // fit.shape[1])
        if len(self._order) < min(sequences, len(fit)):
            self._order = torch.randperm(len(fit), generator=self.generator, device=self.generator.device).cpu()
        blocks, self._order = fit[self._order[:sequences]], self._order[sequences:]
        target = options.budgets[self.step % len(options.budgets)]
        ramp = min(1.0, self.step / max(1.0, options.ramp * options.steps))
        embeddings, of_attentions = self.hypernetwork.embeddings()
        shifts = self._shifts(embeddings, target)
        for attention, (gate, own) in zip(self.gated, self._with_gates(of_attentions), strict=True):
            attention.mask = gate.sample(own, self.generator)
        student: list[nn.Module | None] = [None] * self.network.dense.config.num_hidden_layers
        for place, (index, masked) in enumerate(zip(self.layers, self.masked, strict=True)):
            masked.begin(embeddings[place], shifts[place])
            student[index] = masked
        loss = self._loss(blocks, student)
        size, union, ratio, covered = self._penalties(embeddings, shifts, 1 - ramp * (1 - target))
        uneven = [masked.imbalance for masked in self.masked if masked.imbalance is not None]
        total = loss + options.size * size + options.union * union
        if uneven:
            total = total + options.balance * torch.stack(uneven).mean()
        total.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * self._factor()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._running.append((loss.item() / (options.distill or 1.0), ratio, covered))
        self._check(math.isfinite(self._running[-1][0]))

    def _loss(self, blocks: Tensor, student: Sequence[nn.Module | None]) -> Tensor:
        found = self.network.run(blocks, student, self.gated or None).log_probs
        if not self.options.distill:
            device = found.device
            scored = found.view(*blocks.shape, -1)[:, :-1].flatten(0, 1)
            return F.nll_loss(scored, blocks[:, 1:].flatten().to(device))
        with torch.no_grad():
            wanted = self.network.run(blocks, None).log_probs
        kl = F.kl_div(found, wanted, reduction="sum", log_target=True) / len(wanted)
        return self.options.distill * kl

    def _penalties(self, embeddings: Tensor, shifts: Tensor, target: float) -> tuple[Tensor, Tensor, float, float]:
        """The distance from the budget, that of the unions from one, and the sampled ratio and union. The masks are drawn apart
        from those of the pass. A layer counts with its widest expert."""
        widths, unions = [], []
        for place, head in enumerate(self._heads):
            kept = sample_masks(head.logits(embeddings[place]) - shifts[place], self.options.soft, self.generator)
            widths.append(kept.sum(dim=1).max() * head.unit)
            unions.append((1 - (1 - kept).prod(dim=0)).mean())
        ratio, covered = self.cost.ratio(torch.stack(widths)), torch.stack(unions)
        union = torch.stack([distance(one, 1.0) for one in unions]).mean()
        return distance(ratio, target), union, ratio.item() / target, covered.mean().item()

    def _factor(self) -> float:
        if not self.options.decay:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (self.step - 1) / self.options.steps))


@dataclass(frozen=True, slots=True)
class Cost:
    """Shares of active parameters. fixed: without the masked FFNs. per_neuron: of one neuron of a masked FFN."""

    fixed: float
    per_neuron: float

    def share_of_neurons(self, share: float) -> float:
        """The share of all masked neurons that costs so large a share of active parameters."""
        return share / (1 - self.fixed)

    def ratio(self, widths: Tensor) -> Tensor:
        """widths [L]: neurons of each masked layer."""
        return self.fixed + self.per_neuron * widths.sum()
