"""Back ends: the object that computes a model. It is chosen once, when the model is loaded.

A back end owns the device, the dtype, the form of the weights, the memory of the KV cache, the threads and the kernels.
`torch_backend` is the reference and runs anywhere. `triton_backend` runs on GPUs. `native_backend` runs whole steps as compiled
code on CPUs. `choose` picks the back end for a machine and a model.
"""
