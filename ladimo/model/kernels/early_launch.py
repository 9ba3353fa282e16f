"""Kernels that start before the kernel in front of them has ended: NVIDIA's programmatic dependent launch, from Hopper on.

A decode step has hundreds of kernels of a few microseconds. Between two of them the device would be idle for about one. So a
kernel is launched early: its programs take their places as soon as there is room, and wait for the results of the kernels in
front of them inside (`wait_for_inputs`). What is read before the wait must be constant, as weights are.
"""

from functools import cache

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # releases of Triton before 3.4
    gdc_launch_dependents = gdc_wait = None

LEAST_CAPABILITY = 90


@cache
def early_launch() -> dict[str, bool]:
    """Arguments of a launch of any kernel with the constant EARLY."""
    if gdc_wait is None or isinstance(wait_for_inputs, InterpretedFunction):
        return {"EARLY": False}
    target = triton.runtime.driver.active.get_current_target()
    early = target.backend == "cuda" and target.arch >= LEAST_CAPABILITY
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Let the next kernel start, and wait until the kernels in front have ended. Every kernel with EARLY must call it once."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
