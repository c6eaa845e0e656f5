/*
 * Run calls and updates call no allocator, and thousands of objects and errors leave no memory and no thread behind.
 * The program counts the calls of glibc's allocator. Sanitizers and valgrind replace the allocator and find leaks
 * themselves, so with NO_COUNT it only creates and destroys. Also on a CUDA device, whose driver allocates.
 */
#include <time.h>

#include "check.h"

/* Calls of the allocator, and blocks in use. */
static long allocator_calls, blocks;

#ifndef NO_COUNT
static void count(int delta) {
    __atomic_add_fetch(&allocator_calls, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&blocks, delta, __ATOMIC_SEQ_CST);
}

#define COUNTED(type, name, parameters, arguments, delta)                                                              \
    type __libc_##name parameters;                                                                                     \
    type name parameters                                                                                               \
    {                                                                                                                  \
        count(delta);                                                                                                  \
        return __libc_##name arguments;                                                                                \
    }
COUNTED(void *, malloc, (size_t size), (size), 1)
COUNTED(void *, calloc, (size_t number, size_t size), (number, size), 1)
COUNTED(void *, realloc, (void *old, size_t size), (old, size), old == NULL)
COUNTED(void *, memalign, (size_t alignment, size_t size), (alignment, size), 1)

void __libc_free(void *old);
void free(void *old) {
    count(old ? -1 : 0);
    __libc_free(old);
}

void *aligned_alloc(size_t alignment, size_t size) {
    return memalign(alignment, size);
}

int posix_memalign(void **memory, size_t alignment, size_t size) {
    *memory = memalign(alignment, size);
    return *memory ? 0 : 12;
}
#endif

enum { TENSORS = 8, LEN = 30000 };

static void run_calls(gradblend_blender *blender, gradblend_plan *plan, const gradblend_tensor *tensors,
                      const float *scale) {
    OK(gradblend_step(blender, plan, NULL));
    OK(gradblend_dot(blender, plan, NULL));
    OK(gradblend_blend(blender, plan, NULL));
    OK(gradblend_pass(blender, plan, GRADBLEND_BLEND | GRADBLEND_ACCUMULATE, NULL));
    OK(gradblend_set_grad_scale(blender, scale));
    OK(gradblend_observe(blender, NULL));
    OK(gradblend_reweight(blender, NULL));
    OK(gradblend_set_weights(blender, (double[K]){1, 2, 3}, K, NULL));
    OK(gradblend_plan_update(plan, tensors, TENSORS, NULL));
    OK(gradblend_set_grad_scale(blender, NULL));
    OK(gradblend_reset(blender, NULL));
}

static void run_calls_allocate_nothing(const gradients *gradients, uint32_t threads) {
    /* All tensors read the same memory; each has its own `blended`. */
    float *blended = memory_random((TENSORS + 1) * LEN, 52);
    gradblend_tensor tensors[2][TENSORS];
    for (int i = 0; i < TENSORS; i++) {
        tensors[0][i] = gradients->tensor;
        tensors[0][i].len = (uint64_t)(LEN / TENSORS * i);
        tensors[0][i].dtype = i % 3;
        tensors[0][i].blended = blended + i * LEN;
        tensors[1][i] = tensors[0][i];
        tensors[1][i].blended = i % 2 ? NULL : blended + i * LEN + 1;
    }
    gradblend_config config = config_new(K, threads);
    config.overfitting = GRADBLEND_CORRELATED;
    config.cadence = GRADBLEND_EVERY_OBSERVATION;
    gradblend_blender *blender = blender_new(&config);
    gradblend_plan *plan = plan_new(blender, tensors[0], TENSORS);
    /* Locks and condition variables allocate at their first use. */
    run_calls(blender, plan, tensors[1], gradients->memory);
    long before = __atomic_load_n(&allocator_calls, __ATOMIC_SEQ_CST);
    for (int i = 0; i < 10; i++) {
        run_calls(blender, plan, tensors[1], gradients->memory);
    }
    long calls = __atomic_load_n(&allocator_calls, __ATOMIC_SEQ_CST) - before;
    begin_case("%" PRIu32 " threads: %ld calls of the allocator", threads, calls);
    CHECK(calls == 0);
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);
    memory_free(blended);
}

static void create_and_destroy(const gradients *gradients, unsigned i) {
    gradblend_tensor tensor = gradients->tensor;
    tensor.len = 700;
    gradblend_config config = config_new(K, i % 16 ? 1 : 3);
    gradblend_blender *blender = blender_new(&config);
    gradblend_plan *plan = plan_new(blender, &tensor, 1), *empty = plan_new(blender, NULL, 0), *none = NULL;
    OK(gradblend_step(blender, plan, NULL));
    OK(gradblend_plan_update(plan, &tensor, 1, NULL));
    size_t bytes;
    unsigned char *saved = saved_state(blender, &bytes);
    OK(gradblend_load(blender, saved, bytes, NULL));
    saved[i % bytes] ^= 1;
    RETURNS(GRADBLEND_CORRUPT_STATE, gradblend_load(blender, saved, bytes, NULL));
    free(saved);
    tensor.blended = gradients->memory + 1;
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_plan_create(blender, &tensor, 1, &none));
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_plan_update(plan, &tensor, 1, NULL));
    config.decay = 2;
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_blender_create(device, &config, &blender));
    /* In either order, and twice. */
    gradblend_plan_destroy(i % 2 ? plan : NULL);
    gradblend_blender_destroy(blender);
    gradblend_plan_destroy(plan);
    gradblend_plan_destroy(empty);
    gradblend_plan_destroy(empty);
    gradblend_blender_destroy(blender);
}

/* A number of /proc/self/status. */
static long process_status(const char *name) {
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    long number = 0;
    CHECK(file);
    while (fgets(line, sizeof line, file)) {
        number = strncmp(line, name, strlen(name)) == 0 ? strtol(line + strlen(name), NULL, 10) : number;
    }
    fclose(file);
    CHECK(number > 0);
    return number;
}

int main(int argc, char **args) {
    start(argc, args);
    gradients gradients;
    gradients_new(&gradients, LEN, 51);
    for (uint32_t threads = 1; threads <= 3; threads++) {
        run_calls_allocate_nothing(&gradients, threads);
    }
    /* The first rounds allocate what the process keeps: handle tables, stacks of ended threads. */
    unsigned number = rounds(10000);
    for (unsigned i = 0; i < 32; i++) {
        create_and_destroy(&gradients, i);
    }
    long threads = process_status("Threads:"), kilobytes = process_status("VmSize:");
    long before = __atomic_load_n(&blocks, __ATOMIC_SEQ_CST);
    for (unsigned i = 0; i < number; i++) {
        create_and_destroy(&gradients, i);
    }
    long more = __atomic_load_n(&blocks, __ATOMIC_SEQ_CST) - before;
    /* The kernel counts a thread for a moment after it was joined. */
    for (int i = 0; process_status("Threads:") > threads && i < 1000; i++) {
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
    threads = process_status("Threads:") - threads;
    kilobytes = process_status("VmSize:") - kilobytes;
    begin_case("%u rounds left %ld blocks, %ld threads, %ld kB of address space", number, more, threads, kilobytes);
    /* Handle tables and arenas grow now and then; a leak is more than 8 bytes a round. Sanitizers keep freed memory. */
    CHECK(more <= 64 && threads <= 0);
#ifndef NO_COUNT
    CHECK(kilobytes <= 1024 + (long)number * 8 / 1024);
#endif
    memory_free(gradients.memory);
    printf("memory: %ld calls of the allocator; %s\n", allocator_calls, test_case);
    return 0;
}
