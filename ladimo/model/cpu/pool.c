#include "pool.h"

#include <sched.h>
#include <stdlib.h>

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

// Take one chunk of the phase and compute it. Returns 0 if no chunk is left.
static int take(Engine *engine) {
    uint64_t seen = atomic_load_explicit(&engine->ticket, memory_order_acquire);
    while ((uint32_t)seen) {
        if (!atomic_compare_exchange_weak(&engine->ticket, &seen, seen - 1)) continue;
        engine->run(engine->job, (int64_t)(uint32_t)seen - 1);
        atomic_fetch_sub(&engine->left, 1);
        return 1;
    }
    return 0;
}

// The main function of a helper thread.
static void *help(void *argument) {
    Engine *engine = argument;
    for (;;) {
        pthread_mutex_lock(&engine->mutex);
        while (!engine->awake && !engine->stop) pthread_cond_wait(&engine->wake, &engine->mutex);
        pthread_mutex_unlock(&engine->mutex);
        if (engine->stop) return NULL;
        int spins = 0;
        while (atomic_load_explicit(&engine->awake, memory_order_relaxed)) {
            if (take(engine)) spins = 0;
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
    atomic_store(&engine->left, count);
    uint64_t phase = (atomic_load(&engine->ticket) >> 32) + 1;
    atomic_store_explicit(&engine->ticket, phase << 32 | (uint64_t)count, memory_order_release);
    while (take(engine)) {}
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
    for (int i = 0; i < engine->num_helpers; i++) pthread_join(engine->helpers[i], NULL);
    pthread_cond_destroy(&engine->wake);
    pthread_mutex_destroy(&engine->mutex);
    free(engine->scratch);
    free(engine);
}

Engine *ladimo_create(int64_t threads) {
    Engine *engine = calloc(1, sizeof *engine);
    if (!engine) return NULL;
    pthread_mutex_init(&engine->mutex, NULL);
    pthread_cond_init(&engine->wake, NULL);
    while (engine->num_helpers < threads - 1 && engine->num_helpers < 256) {
        if (pthread_create(&engine->helpers[engine->num_helpers], NULL, help, engine)) break;  // fewer threads are enough
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
