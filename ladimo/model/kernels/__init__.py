"""Triton kernels for the hot path, used by `backends.triton_backend`.

Each public function has the name, signature and meaning of a torch function in `ladimo.model`, which is its reference. Triton
comes with the CUDA builds of torch. Without Triton, these modules are never imported.

A CUDA graph can capture every launch: shapes and tile sizes depend only on the shapes of the arguments, counts stay on the
device, and nothing is tuned at run time.
"""
