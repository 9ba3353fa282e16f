"""What computes a model: one object, chosen once when the model is loaded.

A back end owns the device, the dtype, the form of the weights, the cache's memory, the threads and the kernels. `torch_backend`
is the reference and runs anywhere; `triton_backend` runs on GPUs; `native_backend` runs whole steps as compiled code on CPUs.
`choose` says which one a machine and a model get.
"""
