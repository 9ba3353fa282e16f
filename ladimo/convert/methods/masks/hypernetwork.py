"""The network that makes the masks. It is the only part that is trained; the model's weights stay as they are.

A bidirectional GRU runs along the depth of the model. So it couples the layers. Its input is trained, too. For each masked
layer it gives an embedding of each expert. A head per layer turns an embedding into a logit for each neuron, and a router
chooses the expert of a token. ToMoE (arXiv 2501.15316) has several experts per layer, DISP-LLM (arXiv 2410.11988) has one.

Legend: L masked layers, A gated attentions, N experts, W embedding width, U units of an FFN (neurons, or blocks of neurons),
T tokens, D hidden_size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT, HIDDEN = 32, 64
WIDTH = 2 * HIDDEN
TEMPERATURE = 0.4
OFFSET = 3.0  # masks begin with nearly all neurons
# A unit is kept with probability 1 - exp(-exp(logit)), because the noise is one Gumbel variable. Here this is one half.
KEEP_FROM = math.log(math.log(2))


class MaskHead(nn.Module):
    """The masks of one layer. start: added to the logits [N, U]. unit: the neurons of a unit. unit_of: the unit of each neuron;
    None: the neuron itself."""

    start: Tensor

    def __init__(self, hidden_size: int, neurons: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden_size, experts, bias=False) if experts > 1 else None
        self.norm = nn.LayerNorm(WIDTH)
        self.decoder = nn.Linear(WIDTH, neurons, bias=False)
        self.register_buffer("start", torch.full((experts, neurons), OFFSET))
        self.unit = 1
        self.unit_of: Tensor | None = None

    def logits(self, embeddings: Tensor, choices: Tensor | None = None) -> Tensor:
        """The logits [N, U] of all experts from their embeddings [N, W], or with choices [T, N] those [T, U] of each token."""
        chosen, start = (embeddings, self.start) if choices is None else (choices @ embeddings, choices @ self.start)
        decoded: Tensor = self.decoder(F.gelu(self.norm(chosen)))
        return decoded + start

    def settle(self, partition: Tensor) -> None:
        """From now on, the units are blocks of neurons: partition [B, F], -1 for no neuron. A block's logit is the mean of its
        neurons'."""
        device = self.start.device
        used = (partition >= 0).to(device, torch.float32)
        share = used / used.sum(dim=1, keepdim=True)

        def mean(values: Tensor) -> Tensor:
            """[U, X] -> [B, X]."""
            return (F.pad(values, (0, 0, 0, 1))[partition.to(device)] * share.unsqueeze(-1)).sum(dim=1)

        rows = mean(self.decoder.weight.detach())
        self.start = mean(self.start.t()).t().contiguous()
        unit_of = torch.empty(self.decoder.out_features, dtype=torch.int64)
        unit_of[partition[partition >= 0]] = torch.arange(len(partition)).repeat_interleave((partition >= 0).sum(dim=1))
        self.decoder = nn.Linear(WIDTH, len(partition), bias=False, device=device)
        with torch.no_grad():
            self.decoder.weight.copy_(rows)
        self.unit, self.unit_of = partition.shape[1], unit_of.to(device)


class Hypernetwork(nn.Module):
    """neurons: of each masked layer. seed: of the weights before training. depth, layers: where attentions are gated, how
    many layers there are, and the numbers of those whose FFN is masked. The GRU then runs along the attention and the FFN of
    one layer after the other.
    """

    def __init__(
        self, hidden_size: int, neurons: Sequence[int], experts: int, seed: int, depth: int = 0, layers: Sequence[int] = ()
    ) -> None:
        super().__init__()
        parts = sorted([*((index, 0) for index in range(depth)), *((index, 1) for index in layers or range(len(neurons)))])
        self._ffns, self._attentions = ([place for place, part in enumerate(parts) if part[1] == kind] for kind in (1, 0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inputs = nn.Parameter(torch.randn(len(parts), experts, INPUT))
            self.gru = nn.GRU(INPUT, HIDDEN, bidirectional=True)
            self.shift = nn.Linear(WIDTH, 1)
            self.heads = nn.ModuleList(MaskHead(hidden_size, count, experts) for count in neurons)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Of the masked FFNs [L, N, W], and of the gated attentions [A, W], as a mean over experts."""
        found: Tensor = self.gru(self.inputs)[0]
        return found[self._ffns], found[self._attentions].mean(dim=1)

    def shifts(self, embeddings: Tensor, distance: float) -> Tensor:
        """By how much the logits of each layer are lower at a budget than at the largest one, [L]. `distance`: about as much.

        A layer's order of units is the same at every budget. So a smaller budget keeps a part of what a larger one keeps, and
        one stored order serves all budgets.
        """
        slope = F.softplus(self.shift(embeddings.mean(dim=1)).squeeze(-1))
        return distance * slope / math.log(2)


def sample_masks(logits: Tensor, soft: bool, generator: torch.Generator) -> Tensor:
    """Masks of the shape of the logits: a Gumbel-sigmoid. Rounded unless `soft`; the gradient passes through the rounding."""
    kept = ((logits + gumbel(logits.shape, generator)) / TEMPERATURE).sigmoid()
    return kept if soft else kept + (kept.round() - kept).detach()


def sample_choices(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One expert per token, as one-hot rows: logits [T, N] -> [T, N]. The gradient is that of a Gumbel-softmax."""
    soft = ((logits + gumbel(logits.shape, generator)) / TEMPERATURE).softmax(dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), logits.shape[-1]).to(soft)
    return soft + (hard - soft).detach()


def gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    drawn = torch.empty(shape, device=generator.device).exponential_(generator=generator)
    return -drawn.clamp(min=1e-20).log()
