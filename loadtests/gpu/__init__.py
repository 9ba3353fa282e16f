"""What the GPU suite measures, and benchmarks of single kernels."""
