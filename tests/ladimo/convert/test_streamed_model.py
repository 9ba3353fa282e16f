"""The streamed model: what stays loaded, and that it makes no difference to what is computed."""

from functools import partial
from pathlib import Path

import torch

from ladimo.convert.kept import Kept
from ladimo.convert.streamed_model import StreamedModel

CPU = torch.device("cpu")


def test_layers_are_loaded_once_as_far_as_they_fit(source: Path) -> None:
    whole, nothing = StreamedModel(source, CPU), StreamedModel(source, CPU, kept_bytes=0)
    assert whole.layer(1) is whole.layer(1)
    assert whole.ffn(1) is whole.layer(1).mlp
    assert nothing.layer(1) is not nothing.layer(1)
    blocks = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(whole.ffn_data(blocks, [0, 2]), nothing.ffn_data(blocks, [0, 2]), strict=True):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[2], theirs[2]) and torch.equal(mine[3], theirs[3])


def test_what_came_first_stays_where_there_is_no_room_for_all() -> None:
    loads: list[int] = []

    def load(number: int) -> str:
        loads.append(number)
        return "x" * 10

    kept: Kept[str] = Kept(25, len)
    for _ in range(3):
        for number in range(4):
            kept.get(number, partial(load, number))
    assert loads == [0, 1, 2, 3, 2, 3, 2, 3]
