// The processor's matrix units (Intel AMX): their instructions, or plain code in their place.
//
// A tile has up to 16 rows of 64 bytes. One product multiplies 16 tokens with 16 rows of weights, and adds the result to 16 x 16 sums.
// A packed panel is such a factor as it lies in memory, and so are the activations. Products of bf16 weights are in matrix_floats.h,
// those of integer weights in matrix_integers.h. With few tokens, vector kernels compute, and they sum in the same order. So a token
// has the same bits with few others and with many.
//
// Before the unit is used, a child process tries it (matrix_trial.h). With EMULATE_MATRIX_UNITS, plain code takes the place of the
// unit, so that the rest can be tested on any processor.

#pragma once

#include "numbers.h"

#ifdef HAS_MATRIX_UNITS

#define UNIT_ROWS 16      // rows of a tile: tokens, or rows of weights
#define UNIT_LEAST 9      // with fewer tokens, reading the weights takes the time, and vector instructions read faster
#define UNIT_STRETCH 512  // columns whose activations are gathered at a time

// Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} UnitShapes;

// The shapes for products that take `bytes` of each token.
static inline UnitShapes unit_shapes(int bytes) {
    UnitShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? bytes : 64);
        shapes.rows[i] = (uint8_t)(i < 6 ? UNIT_ROWS : bytes / 4);
    }
    return shapes;
}

#ifdef EMULATE_MATRIX_UNITS
int64_t emulated_products;  // how many were computed, for tests
static _Thread_local UnitShapes emulated_shapes;
static _Thread_local uint32_t emulated_tiles[8][16][16];
static void emulate_load(int tile, const void *from, int64_t stride) {
    for (int i = 0; i < emulated_shapes.rows[tile]; i++)
        memcpy(emulated_tiles[tile][i], (const char *)from + i * stride, emulated_shapes.row_bytes[tile]);
}
static void emulate_store(int tile, void *to, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy((char *)to + i * stride, emulated_tiles[tile][i], 64);
}
static __attribute__((noinline)) void emulate_product(int out, int a, int b) {
    __atomic_fetch_add(&emulated_products, 1, __ATOMIC_RELAXED);
    for (int m = 0; m < 16; m++) {
        float even[16] = {0}, odd[16] = {0}, *total = (float *)emulated_tiles[out][m];
        for (int k = 0; k < emulated_shapes.rows[b]; k++) {
            float x = widen_one((uint16_t)emulated_tiles[a][m][k]), y = widen_one((uint16_t)(emulated_tiles[a][m][k] >> 16));
            for (int n = 0; n < 16; n++) {
                even[n] += widen_one((uint16_t)emulated_tiles[b][k][n]) * x;
                odd[n] += widen_one((uint16_t)(emulated_tiles[b][k][n] >> 16)) * y;
            }
        }
        for (int n = 0; n < 16; n++) total[n] += even[n] + odd[n];
    }
}
static void emulate_integer_product(int out, int a, int b) {
    __atomic_fetch_add(&emulated_products, 1, __ATOMIC_RELAXED);
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < emulated_shapes.rows[b]; k++)
            for (int n = 0; n < 16; n++)
                for (int i = 0; i < 32; i += 8)
                    emulated_tiles[out][m][n] += (uint32_t)((int8_t)(emulated_tiles[a][m][k] >> i) * (int32_t)(emulated_tiles[b][k][n] >> i & 255));
}
#define UNIT_ZERO(tile) memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile])
#define UNIT_LOAD(tile, from, stride) emulate_load(tile, from, stride)
#define UNIT_STORE(tile, to, stride) emulate_store(tile, to, stride)
#define UNIT_PRODUCT(out, a, b) emulate_product(out, a, b)
#define UNIT_INTEGER_PRODUCT(out, a, b) emulate_integer_product(out, a, b)
static void configure_unit(int bytes) { emulated_shapes = unit_shapes(bytes); }
static void release_unit(void) {}
static int may_use_unit(void) { return 1; }
#else
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
// Inline assembly, because the intrinsics of gcc 12 do not tell the compiler that memory is read.
#define UNIT_LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"((const void *)(from)), "r"((int64_t)(stride)) : "memory")
#define UNIT_STORE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"((void *)(to)), "r"((int64_t)(stride)) : "memory")
#define UNIT_ZERO(tile) _tile_zero(tile)
#define UNIT_PRODUCT(out, a, b) _tile_dpbf16ps(out, a, b)
#define UNIT_INTEGER_PRODUCT(out, a, b) _tile_dpbsud(out, a, b)  // signed activations, unsigned weights
// Inline assembly, because the intrinsic of gcc 12 tells the compiler that only the first bytes of the structure are read.
static void configure_unit(int bytes) {
    UnitShapes shapes = unit_shapes(bytes);
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
}
static void release_unit(void) { _tile_release(); }
// Ask the system for the unit's registers, for all threads of the process (Linux, arch_prctl ARCH_REQ_XCOMP_PERM).
static int may_use_unit(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#endif

#endif
