// Threads that share the work of a call.
//
// The work is done in phases. A phase has a number of chunks. Each thread has a range of them, which it takes in order, so that it
// reads memory in order, too. A thread whose range is empty takes chunks of the others. The calling thread takes part. A phase ends
// when all its chunks are done. It does not wait for every thread, so a thread that the system has suspended
// delays the phase only if it has taken a chunk. Between the phases of a step, helpers first spin for some microseconds and then
// yield. Between steps they sleep.

#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

typedef void (*Chunk)(const void *job, int64_t chunk);

#define MOST_HELPERS 255

typedef struct Engine Engine;
typedef struct {
    Engine *engine;
    int number;  // of its range: 1, 2, ...; the calling thread has range 0
    pthread_t thread;
} Helper;

// Low half: chunks of a range that are not taken yet. High half: the number of the phase, so that a late thread cannot take a chunk
// of a new phase for one of an old phase. Each range has a line of the cache for itself.
typedef struct {
    _Alignas(64) _Atomic uint64_t left;
} Tickets;

struct Engine {
    Tickets tickets[MOST_HELPERS + 1];
    _Alignas(64) _Atomic int64_t left;  // chunks that are not done yet
    _Alignas(64) Chunk run;
    const void *job;
    int64_t count;  // chunks of the phase
    _Atomic int awake, stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int num_helpers;
    Helper helpers[MOST_HELPERS];
    void *scratch;
    size_t scratch_size;
};

Engine *ladimo_create(int64_t threads);
void ladimo_destroy(Engine *engine);

#pragma GCC visibility push(hidden)

// Run the chunks 0 to count - 1 and wait until they are done. Helpers take part if they are awake.
void run(Engine *engine, Chunk chunk, const void *job, int64_t count);
// Wake the helpers, or let them sleep.
void set_awake(Engine *engine, int awake);

// Memory for one call, at least `size` bytes. The next call overwrites it. NULL if there is not enough memory.
void *scratch(Engine *engine, size_t size);

#pragma GCC visibility pop
