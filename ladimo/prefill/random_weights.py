"""Models with random weights, made on the device. Speed depends on shapes, not on the values of weights."""

import torch
from torch import Tensor, nn

from ladimo.model.backends.choose import on_device
from ladimo.model.config import ModelConfig
from ladimo.model.moe import Experts
from ladimo.model.nested.layers import NestedExperts, NestedHead, NestedLinear
from ladimo.model.nested.weights import SCALE_DTYPE, STEPS
from ladimo.model.precision import GROUP
from ladimo.model.quantization import QuantizedWeights, find_format
from ladimo.model.router import weight_dtype
from ladimo.model.transformer import MoeTransformer


@torch.no_grad()
def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> MoeTransformer:
    """A model with normally distributed weights. Those of routers are larger, so that scores differ between tokens."""
    with torch.device("meta"):
        model = MoeTransformer(config)
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        weight = torch.empty(parameter.shape, dtype=weight_dtype(name, dtype), device=device)
        if parameter.ndim == 1:
            weight.fill_(1.0 if "norm" in name else 0.0)
        else:
            weight.normal_(0.0, 0.2 if ".gate." in name else 0.02, generator=generator)
        weights[name] = weight
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False)
    model.rotary.materialise(device)
    on_device(device, dtype).prepare(model)
    return model.eval()


def random_planes(*shape: int, device: torch.device, scale: float = 0.02) -> tuple[QuantizedWeights, QuantizedWeights]:
    """The high and the low plane of matrices [..., N, K] of this size, as a checkpoint's loader makes them."""
    *lead, cols = shape
    width, format = -(-cols // (2 * GROUP)) * GROUP, find_format("int4")
    # Integers are spread evenly over -8 .. 7, whose standard deviation is 4.6.
    steps = (torch.rand(*lead, 2 * width // GROUP, device=device) + 0.5).mul(scale / 4.6).to(SCALE_DTYPE).float()

    def plane(steps: Tensor) -> QuantizedWeights:
        data = torch.randint(-128, 128, (*lead, width), dtype=torch.int8, device=device)
        return QuantizedWeights(data, steps, cols, format)

    return plane(steps), plane(steps / STEPS)


@torch.no_grad()
def nest_randomly(model: MoeTransformer) -> None:
    """Give every matrix planes of four bits beside its whole weights, as method `nested` does, but drawn apart from these. The
    model's config must have `nested_bits` and no routers."""

    def nest(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                kind = NestedHead if name == "lm_head" else NestedLinear
                planes = random_planes(*child.weight.shape, device=child.weight.device)
                setattr(module, name, kind(child.weight, child.bias, planes))
            elif isinstance(child, Experts):
                parts = (random_planes(*part.shape, device=part.device) for part in (child.gate_up_proj, child.down_proj))
                setattr(module, name, NestedExperts(child, *parts))
            else:
                nest(child)

    nest(model)
    if model.lm_head is None:
        embedding = model.model.embed_tokens.weight
        model.lm_head = NestedHead(embedding, None, random_planes(*embedding.shape, device=embedding.device))
