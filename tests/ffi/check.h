/*
 * Shared by the test programs: checks that print file, line and case; random numbers; memory on the device under test.
 * Every program accepts
 *     --device N          the device under test: a CUDA ordinal; the CPU (-1) by default
 *     --rounds-divisor N  run 1/N of the rounds
 */
#ifndef CHECK_H
#define CHECK_H

#include <dlfcn.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gradblend.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static int32_t device = GRADBLEND_CPU;
static unsigned rounds_divisor = 1;
/* The case under test, printed by a check that fails. */
static _Thread_local char test_case[256];

__attribute__((format(printf, 1, 2))) static inline void begin_case(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(test_case, sizeof test_case, format, args);
    va_end(args);
}

__attribute__((format(printf, 3, 4))) _Noreturn static inline void fail(const char *file, int line,
                                                                        const char *format, ...) {
    char message[512];
    gradblend_last_error(message, sizeof message);
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n    case: %s\n    last error: %s\n", test_case, message);
    va_end(args);
    fflush(NULL);
    _Exit(1);
}

#define CHECK(condition) ((condition) ? (void)0 : fail(__FILE__, __LINE__, "%s", #condition))

static inline void check_status(gradblend_status got, gradblend_status want, const char *call, int line) {
    if (got != want) {
        fail("status", line, "%s is %s, expected %s", call, gradblend_status_name(got), gradblend_status_name(want));
    }
}
#define RETURNS(want, call) check_status(call, want, #call, __LINE__)
#define OK(call) RETURNS(GRADBLEND_OK, call)

/*
 * Memory that the device works on and that the host reads after a synchronize: malloc on the CPU, managed memory on a
 * CUDA device, and malloc where the driver has no managed memory (the emulator, which works on host memory).
 */
static struct {
    void *library, *context;
    int (*set_current)(void *);
    int (*alloc_managed)(uint64_t *, size_t, unsigned);
    int (*release)(uint64_t);
    int (*synchronize)(void *);
} cuda;

static inline void cuda_function(void *function, const char *name, bool required) {
    void *symbol = dlsym(cuda.library, name);
    CHECK(symbol || !required);
    memcpy(function, &symbol, sizeof symbol);
}

/* Makes the device's context current on this thread. */
static inline void cuda_enter_thread(void) {
    CHECK(!cuda.library || cuda.set_current(cuda.context) == 0);
}

static inline void cuda_open(void) {
    int (*init)(unsigned), (*retain)(void **, int);
    cuda.library = dlopen("libcuda.so.1", RTLD_NOW);
    CHECK(cuda.library);
    cuda_function(&init, "cuInit", true);
    cuda_function(&retain, "cuDevicePrimaryCtxRetain", true);
    cuda_function(&cuda.set_current, "cuCtxSetCurrent", true);
    cuda_function(&cuda.alloc_managed, "cuMemAllocManaged", false);
    cuda_function(&cuda.release, "cuMemFree_v2", true);
    cuda_function(&cuda.synchronize, "cuStreamSynchronize", true);
    CHECK(init(0) == 0 && retain(&cuda.context, device) == 0);
    cuda_enter_thread();
}

static inline void *memory_new(size_t bytes) {
    uint64_t address = 0;
    CHECK(!cuda.alloc_managed || cuda.alloc_managed(&address, bytes, 1) == 0);
    void *memory = cuda.alloc_managed ? (void *)(uintptr_t)address : malloc(bytes);
    CHECK(memory);
    return memory;
}

static inline void memory_free(void *memory) {
    if (cuda.alloc_managed) {
        CHECK(cuda.release((uint64_t)(uintptr_t)memory) == 0);
    } else {
        free(memory);
    }
}

/* Random floats from -1 to 1. */
static inline float *memory_random(size_t floats, unsigned seed) {
    float *memory = memory_new(floats * sizeof *memory);
    for (size_t i = 0; i < floats; i++) {
        memory[i] = (float)rand_r(&seed) / ((float)RAND_MAX / 2) - 1;
    }
    return memory;
}

/* One f32 tensor of three modalities, random, in one allocation: t, g, v_0, v_1, v_2, blended. */
enum { K = 3 };
typedef struct {
    float *memory;
    const void *modalities[K];
    gradblend_tensor tensor;
} gradients;

static inline void gradients_new(gradients *g, uint64_t len, unsigned seed) {
    g->memory = memory_random((K + 3) * len, seed);
    for (int k = 0; k < K; k++) {
        g->modalities[k] = g->memory + (2 + (size_t)k) * len;
    }
    g->tensor = (gradblend_tensor){len, GRADBLEND_F32, g->memory, g->memory + len, g->modalities,
                                   g->memory + (2 + K) * len};
}

/* Synchronizes the default stream. */
static inline void synchronize(void) {
    CHECK(!cuda.library || cuda.synchronize(NULL) == 0);
}

static inline void start(int count, char **args) {
    CHECK(count % 2 == 1);
    for (int i = 1; i < count; i += 2) {
        long value = strtol(args[i + 1], NULL, 10);
        if (strcmp(args[i], "--device") == 0) {
            device = (int32_t)value;
        } else if (strcmp(args[i], "--rounds-divisor") == 0 && value > 0) {
            rounds_divisor = (unsigned)value;
        } else {
            fail(__FILE__, __LINE__, "unknown argument %s", args[i]);
        }
    }
    CHECK(gradblend_version() == GRADBLEND_VERSION);
    if (device != GRADBLEND_CPU) {
        cuda_open();
    }
}

/* The number of rounds for this run. */
static inline unsigned rounds(unsigned all) {
    return (all + rounds_divisor - 1) / rounds_divisor;
}

static inline gradblend_config config_new(uint32_t modalities, uint32_t threads) {
    gradblend_config config;
    OK(gradblend_config_default(modalities, &config));
    config.threads = threads;
    return config;
}

static inline gradblend_blender *blender_new(const gradblend_config *config) {
    gradblend_blender *blender = NULL;
    OK(gradblend_blender_create(device, config, &blender));
    CHECK(blender);
    return blender;
}

static inline gradblend_plan *plan_new(const gradblend_blender *blender, const gradblend_tensor *tensors,
                                       uint64_t count) {
    gradblend_plan *plan = NULL;
    OK(gradblend_plan_create(blender, tensors, count, &plan));
    CHECK(plan);
    return plan;
}

/* The saved state of a blender, to be freed. */
static inline unsigned char *saved_state(gradblend_blender *blender, size_t *bytes) {
    OK(gradblend_save(blender, NULL, bytes, NULL));
    unsigned char *saved = malloc(*bytes);
    CHECK(saved);
    size_t room = *bytes;
    OK(gradblend_save(blender, saved, &room, NULL));
    CHECK(room == *bytes);
    return saved;
}

#endif
