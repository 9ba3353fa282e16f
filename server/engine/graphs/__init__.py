"""Decode steps captured as CUDA graphs, and the memory that they use."""
