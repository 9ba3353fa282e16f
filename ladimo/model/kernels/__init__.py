"""Triton kernels of the hot path, for `backends.triton_backend`. Each public function has the name, signature and meaning of a
torch reference in the plain modules beside this package. CUDA builds of torch bring Triton along; elsewhere these modules are
never imported.

All launches are fit for capture in a CUDA graph: shapes and tile sizes follow from the arguments' shapes alone, counts stay on
the device, and nothing is tuned at run time.
"""
