"""The calculated memory of mask training is what real steps keep, to the byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ladimo.convert.distill.end_to_end import Network
from ladimo.convert.methods.masks.recipe import DispRecipe, MaskRecipe, TomoeRecipe
from ladimo.convert.methods.masks.training import Cost, MaskTraining
from ladimo.convert.streamed_model import StreamedModel
from loadtests.costs.mask_memory import activation_bytes, main, memory
from tests.factories import make_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No two sizes are equal."""
    sizes: dict[str, Any] = {"hidden_size": 40, "intermediate_size": 72, "head_dim": 12, "max_position_embeddings": 64}
    return make_dense(tmp_path_factory.mktemp("dense"), **sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("options", "experts"),
    [
        (TomoeRecipe(budgets=[0.6], steps=10), 8),
        (TomoeRecipe(budgets=[0.6], steps=10, token_noise=True, mask_once=False), 8),
        (DispRecipe(budgets=[0.6], steps=10), 1),
    ],
)
def test_every_byte_that_a_step_keeps_is_calculated(options: MaskRecipe, experts: int, dtype: str, dense: Path) -> None:
    network = Network(StreamedModel(dense, torch.device("cpu"), dtype))
    config = network.dense.config
    training = MaskTraining(network, range(config.num_hidden_layers), experts, options, Cost(0.2, 0.001), seed=0)
    embeddings, _ = training.hypernetwork.embeddings()
    shift = torch.tensor(0.0)
    for place, masked in enumerate(training.masked):
        masked.begin(embeddings[place], shift)
    modules = (training.hypernetwork, network.dense.ends, *network.layers)
    weights = [embeddings, shift, *(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))]
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.run(torch.randint(250, (2, 64)), training.masked)
    parts = activation_bytes(config, options, experts, 128, network.dense.dtype.itemsize)
    assert sum(parts.values()) == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    trained = memory(config, options, experts, 128, 4)["hypernetwork with AdamW"]
    assert trained == 16 * sum(weight.numel() for weight in training.hypernetwork.parameters())


def test_the_published_recipe_fits_a_gpu_of_80_gb(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--recipe", "ladimo/recipes/tomoe-published.toml"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 20e9 < sum(record["bytes"].values()) < 80e9
    assert record["bytes"]["frozen weights"] == pytest.approx(2 * 6.738e9, rel=0.01)
    with pytest.raises(SystemExit):
        main(["--recipe", "ladimo/recipes/llama2-7b.toml"])
    assert "not tomoe or disp" in capsys.readouterr().err
