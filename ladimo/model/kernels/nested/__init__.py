"""Triton kernels for nested weights, in which every token has its own number of bits."""
