"""The forward pass on CPU cores as one call of compiled code per step, for `backends.native_backend`.

`step.c` and the headers that it includes are the step. `draw.c` chooses the next tokens. `pool.c` holds the threads of both.
`build` compiles them where they run. `packing` lays weights out; `native_step` and `native_draw` make the calls.
"""
