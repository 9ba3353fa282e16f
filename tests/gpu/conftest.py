"""A fault of the device, such as an illegal access, breaks its process for good."""

import os
import time
from collections.abc import Generator

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Under pytest-xdist, end a broken process after its report was sent. A new one takes the remaining tests."""
    result = yield
    if torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            time.sleep(1)
            os._exit(3)
        torch.cuda.empty_cache()  # other processes need memory, too
    return result
