// All vector kernels: `TILES` has one for each kind of weights, number of panels and number of tokens.

#pragma once

#include "vector_floats.h"
#include "vector_integers.h"

#define DEFINE(kind, r, n) \
    static void tile_##kind##_##r##_##n(TILE_ARGUMENTS) { tile_##kind(r, n, w, low, scales, cols, x, out); }
#define DEFINE_PANELS(kind, r) \
    DEFINE(kind, r, 1) DEFINE(kind, r, 2) DEFINE(kind, r, 3) DEFINE(kind, r, 4) DEFINE(kind, r, 5) DEFINE(kind, r, 6)
#define DEFINE_KIND(kind) DEFINE_PANELS(kind, 1) DEFINE_PANELS(kind, 2) DEFINE_PANELS(kind, 3) DEFINE_PANELS(kind, 4)
DEFINE_KIND(fp32)
DEFINE_KIND(bf16)
DEFINE_KIND(int8)
DEFINE_KIND(int4)
DEFINE_KIND(high)
DEFINE_KIND(both)
#define LIST_PANELS(kind, r)                                                                                              \
    {                                                                                                                     \
        tile_##kind##_##r##_1, tile_##kind##_##r##_2, tile_##kind##_##r##_3, tile_##kind##_##r##_4, tile_##kind##_##r##_5, \
            tile_##kind##_##r##_6                                                                                         \
    }
#define LIST_KIND(kind) {LIST_PANELS(kind, 1), LIST_PANELS(kind, 2), LIST_PANELS(kind, 3), LIST_PANELS(kind, 4)}
static const Tile TILES[6][PANELS][TILE] = {
    LIST_KIND(fp32), LIST_KIND(bf16), LIST_KIND(int8), LIST_KIND(int4), LIST_KIND(high), LIST_KIND(both),
};
