// Threads that share the work of a call.
//
// A phase is a number of chunks that whoever is free takes. The caller's thread takes part, and a phase is over when its chunks
// are done, not when every thread has come by: a thread that the system has put aside holds up nobody unless it holds a chunk.
// Helpers spin for some microseconds between the phases of a step, then yield, and sleep between steps.

#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

typedef void (*Chunk)(const void *job, int64_t chunk);

typedef struct {
    _Atomic uint64_t ticket;  // low half: chunks not taken yet; high half: the phase's number, so that no chunk is taken for another's
    _Atomic int64_t left;     // chunks not done yet
    Chunk run;
    const void *job;
    _Atomic int awake, stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int num_helpers;
    pthread_t helpers[256];
    void *scratch;
    size_t scratch_size;
} Engine;

Engine *ladimo_create(int64_t threads);
void ladimo_destroy(Engine *engine);

#pragma GCC visibility push(hidden)

// Run chunks 0 to count - 1 and wait for them. The helpers take part while they are awake.
void run(Engine *engine, Chunk chunk, const void *job, int64_t count);
void set_awake(Engine *engine, int awake);

// Memory of the call, which the next one overwrites; NULL when there is none.
void *scratch(Engine *engine, size_t size);

#pragma GCC visibility pop
