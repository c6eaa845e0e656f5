/*
 * What the test programs share: checks that say where and why, random numbers, dtypes, and memory on the device under
 * test. Every program takes
 *     --device N   the device to test: -1, the default, is the CPU
 *     --thin N     does one N-th of the random rounds
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
#define MAX_K GRADBLEND_MAX_MODALITIES

static int32_t device = GRADBLEND_CPU;
static unsigned thin = 1;
/* What is being tried, for the message of a check that fails. */
static _Thread_local char trying[256];

#if defined(__GNUC__)
#define LIKE_PRINTF(at, rest) __attribute__((format(printf, at, rest)))
#else
#define LIKE_PRINTF(at, rest)
#endif

LIKE_PRINTF(1, 2) static inline void try_case(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(trying, sizeof trying, format, args);
    va_end(args);
}

LIKE_PRINTF(3, 4) _Noreturn static inline void fail(const char *file, int line, const char *format, ...)
{
    char message[512];
    gradblend_last_error(message, sizeof message);
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n    case: %s\n    last error: %s\n", *trying ? trying : "-", *message ? message : "-");
    va_end(args);
    fflush(NULL);
    _Exit(1);
}

#define CHECK(what) ((what) ? (void)0 : fail(__FILE__, __LINE__, "%s", #what))

static inline void check_near(double got, double want, double bound, const char *what, const char *file, int line)
{
    /* Written so that a NaN fails. */
    if (!(fabs(got - want) <= bound)) {
        fail(file, line, "%s is %.17g, expected %.17g +- %.3g", what, got, want, bound);
    }
}
#define CHECK_NEAR(got, want, bound) check_near(got, want, bound, #got, __FILE__, __LINE__)

static inline void check_status(gradblend_status got, gradblend_status want, const char *what, const char *file,
                                int line)
{
    if (got != want) {
        const char *names[] = {gradblend_status_name(got), gradblend_status_name(want)};
        fail(file, line, "%s is %s, expected %s", what, names[0], names[1]);
    }
}
#define RETURNS(want, call) check_status(call, want, #call, __FILE__, __LINE__)
#define OK(call) RETURNS(GRADBLEND_OK, call)

/* SplitMix64 (Steele, Lea, Flood 2014). */
typedef struct {
    uint64_t state;
} random_state;

static inline uint64_t random_next(random_state *random)
{
    uint64_t z = random->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Uniform in [-1, 1). */
static inline double random_number(random_state *random)
{
    return (double)(random_next(random) >> 11) / 4503599627370496.0 - 1.0;
}

static inline uint64_t random_below(random_state *random, uint64_t n)
{
    return random_next(random) % n;
}

/* A dtype as the oracle sees it. */
typedef struct {
    size_t bytes;
    int precision;     /* bits of a significand, the hidden one included */
    int least;         /* exponent of the smallest positive number */
    uint32_t infinity; /* its bits */
} dtype_facts;

static const dtype_facts DTYPES[] = {
    {4, 24, -149, 0x7f800000u}, /* GRADBLEND_F32 */
    {2, 11, -24, 0x7c00u},      /* GRADBLEND_F16 */
    {2, 8, -133, 0x7f80u},      /* GRADBLEND_BF16 */
};

/* Largest relative error of one rounding. */
static inline double dtype_eps(int32_t dtype)
{
    return ldexp(1, -DTYPES[dtype].precision);
}

/* To the nearest number of the dtype, ties to even, as bits. */
static inline uint32_t dtype_round(int32_t dtype, double x)
{
    const dtype_facts *facts = &DTYPES[dtype];
    uint32_t sign = signbit(x) ? 1u << (8 * facts->bytes - 1) : 0;
    if (isnan(x)) {
        return sign | facts->infinity | 1u << (facts->precision - 2);
    }
    if (isinf(x)) {
        return sign | facts->infinity;
    }
    int exponent;
    frexp(x, &exponent);
    int quantum = exponent - facts->precision;
    if (quantum < facts->least) {
        quantum = facts->least;
    }
    /* The hidden bit of the quotient adds 1 to the exponent's field; of a subnormal number there is none. */
    double bits = ldexp(quantum - facts->least, facts->precision - 1) + rint(ldexp(fabs(x), -quantum));
    return sign | (bits < facts->infinity ? (uint32_t)bits : facts->infinity);
}

static inline double dtype_exact(int32_t dtype, uint32_t bits)
{
    const dtype_facts *facts = &DTYPES[dtype];
    uint32_t sign = 1u << (8 * facts->bytes - 1), magnitude = bits & ~sign;
    uint32_t hidden = 1u << (facts->precision - 1), field = magnitude / hidden;
    double x = ldexp(magnitude, facts->least);
    if (magnitude >= facts->infinity) {
        x = magnitude == facts->infinity ? INFINITY : NAN;
    } else if (field > 0) {
        x = ldexp(magnitude % hidden + hidden, facts->least + (int)field - 1);
    }
    return bits & sign ? -x : x;
}

static inline void list_set(int32_t dtype, void *list, uint64_t i, double x)
{
    uint32_t bits = dtype_round(dtype, x);
    uint16_t half = (uint16_t)bits;
    size_t bytes = DTYPES[dtype].bytes;
    memcpy((char *)list + i * bytes, bytes == 4 ? (void *)&bits : (void *)&half, bytes);
}

static inline double list_get(int32_t dtype, const void *list, uint64_t i)
{
    uint32_t bits;
    uint16_t half;
    if (DTYPES[dtype].bytes == 4) {
        memcpy(&bits, (const char *)list + 4 * i, 4);
    } else {
        memcpy(&half, (const char *)list + 2 * i, 2);
        bits = half;
    }
    return dtype_exact(dtype, bits);
}

/*
 * Memory that the device works on and the host can read once the device is done: of malloc on the CPU, one allocation a
 * list, so that sanitizers see the bounds; managed memory on a CUDA device, and malloc where the driver has none: the
 * stand-in driver reads the memory of the host.
 */
static struct {
    void *library, *context;
    int (*set_current)(void *);
    int (*managed)(uint64_t *, size_t, unsigned);
    int (*release)(uint64_t);
    int (*to_host)(void *, uint64_t, size_t);
    int (*to_device)(uint64_t, const void *, size_t);
    int (*wait)(void *);
} cuda;

static inline void cuda_function(void *to, const char *name, bool needed)
{
    void *function = dlsym(cuda.library, name);
    if (!function && needed) {
        fail(__FILE__, __LINE__, "the driver has no %s", name);
    }
    memcpy(to, &function, sizeof function);
}

/* Makes the device's context current on this thread. */
static inline void cuda_enter(void)
{
    CHECK(cuda.set_current(cuda.context) == 0);
}

static inline void cuda_open(void)
{
    int (*init)(unsigned), (*retain)(void **, int);
    cuda.library = dlopen("libcuda.so.1", RTLD_NOW);
    CHECK(cuda.library);
    cuda_function(&init, "cuInit", true);
    cuda_function(&retain, "cuDevicePrimaryCtxRetain", true);
    cuda_function(&cuda.set_current, "cuCtxSetCurrent", true);
    cuda_function(&cuda.managed, "cuMemAllocManaged", false);
    cuda_function(&cuda.release, "cuMemFree_v2", true);
    cuda_function(&cuda.to_host, "cuMemcpyDtoH_v2", true);
    cuda_function(&cuda.to_device, "cuMemcpyHtoD_v2", true);
    cuda_function(&cuda.wait, "cuStreamSynchronize", true);
    CHECK(init(0) == 0 && retain(&cuda.context, device) == 0);
    cuda_enter();
}

static inline void *memory_new(size_t bytes)
{
    bytes += bytes == 0;
    if (cuda.managed) {
        uint64_t address;
        CHECK(cuda.managed(&address, bytes, 1) == 0);
        return (void *)(uintptr_t)address;
    }
    void *memory = malloc(bytes);
    CHECK(memory);
    return memory;
}

static inline void memory_free(void *memory)
{
    if (cuda.managed) {
        CHECK(cuda.release((uint64_t)(uintptr_t)memory) == 0);
    } else {
        free(memory);
    }
}

/* Waits for what was put on the default stream. */
static inline void finish(void)
{
    CHECK(!cuda.library || cuda.wait(NULL) == 0);
}

/* Reads memory of a blender, once its work is done. */
static inline void device_read(void *to, const void *from, size_t bytes)
{
    if (cuda.library) {
        finish();
        CHECK(cuda.to_host(to, (uint64_t)(uintptr_t)from, bytes) == 0);
    } else {
        memcpy(to, from, bytes);
    }
}

static inline void device_write(void *to, const void *from, size_t bytes)
{
    if (cuda.library) {
        CHECK(cuda.to_device((uint64_t)(uintptr_t)to, from, bytes) == 0);
        finish();
    } else {
        memcpy(to, from, bytes);
    }
}

static inline void set_up(int count, char **args)
{
    for (int i = 1; i + 1 < count; i += 2) {
        long value = strtol(args[i + 1], NULL, 10);
        if (strcmp(args[i], "--device") == 0) {
            device = (int32_t)value;
        } else if (strcmp(args[i], "--thin") == 0 && value > 0) {
            thin = (unsigned)value;
        } else {
            fail(__FILE__, __LINE__, "unknown argument %s", args[i]);
        }
    }
    CHECK(count % 2 == 1);
    CHECK(gradblend_version() == GRADBLEND_VERSION);
    if (device != GRADBLEND_CPU) {
        cuda_open();
    }
}

/* This many rounds, thinned. */
static inline unsigned rounds(unsigned all)
{
    return (all + thin - 1) / thin;
}

static inline gradblend_config config_of(uint32_t k)
{
    gradblend_config config;
    OK(gradblend_config_default(k, &config));
    config.threads = 1;
    return config;
}

static inline gradblend_blender *blender_of(const gradblend_config *config)
{
    gradblend_blender *blender = NULL;
    OK(gradblend_blender_create(device, config, &blender));
    CHECK(blender);
    return blender;
}

/* The saved state of a blender. The caller frees it. */
static inline unsigned char *saved_of(gradblend_blender *blender, size_t *bytes)
{
    OK(gradblend_save(blender, NULL, bytes, NULL));
    unsigned char *saved = (unsigned char *)malloc(*bytes);
    CHECK(saved);
    size_t room = *bytes;
    OK(gradblend_save(blender, saved, &room, NULL));
    CHECK(room == *bytes);
    return saved;
}

/* Whether two blenders know the same, bit for bit. */
static inline bool same_state(gradblend_blender *one, gradblend_blender *other)
{
    size_t bytes, other_bytes;
    unsigned char *saved = saved_of(one, &bytes), *other_saved = saved_of(other, &other_bytes);
    bool same = bytes == other_bytes && memcmp(saved, other_saved, bytes) == 0;
    free(saved);
    free(other_saved);
    return same;
}

/* The pending sums, c then d. */
static inline void sums_of(gradblend_blender *blender, uint32_t k, double *sums)
{
    double *address = NULL;
    uint32_t count = 0;
    OK(gradblend_pending_sums(blender, &address, &count));
    CHECK(address && count == 2 * k);
    device_read(sums, address, count * sizeof *sums);
}

/* Puts these in place of the pending sums, as a sharded trainer does. */
static inline void put_sums(gradblend_blender *blender, uint32_t k, const double *sums)
{
    double *address = NULL;
    uint32_t count = 0;
    OK(gradblend_pending_sums(blender, &address, &count));
    device_write(address, sums, 2 * k * sizeof *sums);
}

/* The weights in force as the device has them. */
static inline void weights_of(gradblend_blender *blender, uint32_t k, float *weights)
{
    const float *address = NULL;
    OK(gradblend_device_weights(blender, &address));
    CHECK(address);
    device_read(weights, address, k * sizeof *weights);
}

#endif
