"""The forward pass on CPU cores as one call of compiled code per step: `pack` gives a model its `NativeStep`.

`step.c` is the kernel, `build` compiles it where it runs, `packing` lays weights out for it, `native_step` is the bridge. Where
there is no compiler, or a model has something the kernel does not know, torch computes as before. `draw.c` chooses the next
tokens (`native_draw`), `pool.c` holds the threads of both, and `lanes.h` what both do with vectors.
"""
