"""The compiled CPU step: one call of C code computes a whole step. `backends.native_backend` uses it.

`step.c` and its headers compute the step. `draw.c` draws the next tokens. `pool.c` has the threads for both. `build` compiles
these files on the machine where they run. `packing` lays out the weights. `native_step` and `native_draw` call the C code.
"""
