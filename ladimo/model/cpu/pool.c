#include "pool.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#define SHARE 16  // a thread takes 1 / SHARE of the chunks that are left of a range at once: many small ones, or one large one

// Wait a moment: first spin, later give the core to other threads.
static inline void relax(int *spins) {
    if (++*spins < 1000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    } else {
        sched_yield();
    }
}

// The first chunk of a range. The number of ranges is a range number, too: its first chunk would be the one behind the last.
static inline int64_t first_chunk(const Engine *engine, int64_t range) { return range * engine->count / (engine->num_helpers + 1); }

// Take some chunks of the phase and compute them, from the own range if it has any left. Returns 0 if no chunk is left.
static int take(Engine *engine, int own) {
    int ranges = engine->num_helpers + 1;
    for (int i = 0; i < ranges; i++) {
        int range = own + i < ranges ? own + i : own + i - ranges;
        uint64_t seen = atomic_load_explicit(&engine->tickets[range].left, memory_order_acquire);
        while ((uint32_t)seen) {
            int64_t left = (uint32_t)seen, count = left / SHARE > 1 ? left / SHARE : 1;
            if (!atomic_compare_exchange_weak(&engine->tickets[range].left, &seen, seen - (uint64_t)count)) continue;
            int64_t chunk = first_chunk(engine, range + 1) - left;
            for (int64_t last = chunk + count; chunk < last; chunk++) engine->run(engine->job, chunk);
            atomic_fetch_sub(&engine->left, count);
            return 1;
        }
    }
    return 0;
}

// The main function of a helper thread.
static void *help(void *argument) {
    const Helper *self = argument;
    Engine *engine = self->engine;
    for (;;) {
        pthread_mutex_lock(&engine->mutex);
        while (!engine->awake && !engine->stop) pthread_cond_wait(&engine->wake, &engine->mutex);
        pthread_mutex_unlock(&engine->mutex);
        if (engine->stop) return NULL;
        int spins = 0;
        while (atomic_load_explicit(&engine->awake, memory_order_relaxed)) {
            if (take(engine, self->number)) spins = 0;
            else relax(&spins);
        }
    }
}

void run(Engine *engine, Chunk chunk, const void *job, int64_t count) {
    if (count <= 1 || !engine->awake) {
        for (int64_t i = 0; i < count; i++) chunk(job, i);
        return;
    }
    engine->run = chunk;
    engine->job = job;
    engine->count = count;
    atomic_store(&engine->left, count);
    uint64_t phase = (atomic_load(&engine->tickets[0].left) >> 32) + 1;
    for (int range = 0; range <= engine->num_helpers; range++) {
        uint64_t chunks = (uint64_t)(first_chunk(engine, range + 1) - first_chunk(engine, range));
        atomic_store_explicit(&engine->tickets[range].left, phase << 32 | chunks, memory_order_release);
    }
    while (take(engine, 0)) {}
    int spins = 0;
    while (atomic_load_explicit(&engine->left, memory_order_acquire)) relax(&spins);
}

void set_awake(Engine *engine, int awake) {
    if (!engine->num_helpers || engine->awake == awake) return;
    pthread_mutex_lock(&engine->mutex);
    engine->awake = awake;
    if (awake) pthread_cond_broadcast(&engine->wake);
    pthread_mutex_unlock(&engine->mutex);
}

void ladimo_destroy(Engine *engine) {
    pthread_mutex_lock(&engine->mutex);
    engine->stop = 1;
    pthread_cond_broadcast(&engine->wake);
    pthread_mutex_unlock(&engine->mutex);
    for (int i = 0; i < engine->num_helpers; i++) pthread_join(engine->helpers[i].thread, NULL);
    pthread_cond_destroy(&engine->wake);
    pthread_mutex_destroy(&engine->mutex);
    free(engine->scratch);
    free(engine);
}

Engine *ladimo_create(int64_t threads) {
    Engine *engine = aligned_alloc(_Alignof(Engine), sizeof *engine);
    if (!engine) return NULL;
    memset(engine, 0, sizeof *engine);
    pthread_mutex_init(&engine->mutex, NULL);
    pthread_cond_init(&engine->wake, NULL);
    while (engine->num_helpers < threads - 1 && engine->num_helpers < MOST_HELPERS) {
        Helper *helper = &engine->helpers[engine->num_helpers];
        *helper = (Helper){.engine = engine, .number = engine->num_helpers + 1};
        if (pthread_create(&helper->thread, NULL, help, helper)) break;  // fewer threads are enough
        engine->num_helpers++;
    }
    return engine;
}

void *scratch(Engine *engine, size_t size) {
    if (size > engine->scratch_size) {
        free(engine->scratch);
        engine->scratch = aligned_alloc(64, (size + 63) / 64 * 64);
        engine->scratch_size = engine->scratch ? size : 0;
    }
    return engine->scratch;
}
