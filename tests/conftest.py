"""Shared fixtures: tiny checkpoints, written once per run. Read them, never change them; `tests.factories` makes your own."""

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.factories import make_dense, make_moe, make_tokenizer


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense LLaMA in fp32: grouped-query attention, untied embeddings, 3 layers."""
    return make_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def moe_dir(dense_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense_dir` converted: 4 experts, 2 per token, layer 1 dense; policies full, quality, balanced, fast and a frontier."""
    return make_moe(tmp_path_factory.mktemp("moe"), dense=dense_dir)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; BOS is 256, EOS 257."""
    return make_tokenizer()


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist keep our order of files. Its own puts files of few tests last, and some of those take longest."""
    if config.pluginmanager.hasplugin("xdist"):
        config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported lives until the end, so the garbage collector need not look at it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Servers that ran in this process have frozen their objects, too. Hypothesis, which reports now, looks for its own."""
    gc.unfreeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests run first, so that no worker is left with a long file at the end. The order in a file stays. Long
    tests run only with LONG_TESTS set."""
    if not os.environ.get("LONG_TESTS"):
        skip = pytest.mark.skip(reason="a long test; set LONG_TESTS")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
