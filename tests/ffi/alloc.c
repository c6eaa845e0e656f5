/*
 * Run calls and updates allocate nothing and free nothing. The allocator of glibc is wrapped in this program, for all
 * threads; so the program is one of its own, and cannot be built with sanitizers or run under valgrind, which bring an
 * allocator of theirs, nor with a C library that has no __libc_malloc; nor on a CUDA device, whose driver allocates for
 * itself. tests/c/run says when it is left out.
 */
#include "check.h"

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *memory, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *memory);

static unsigned long calls;

static void counted(void)
{
    __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
}

void *malloc(size_t size)
{
    counted();
    return __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
    counted();
    return __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size)
{
    counted();
    return __libc_realloc(memory, size);
}

void *memalign(size_t alignment, size_t size)
{
    counted();
    return __libc_memalign(alignment, size);
}

void *aligned_alloc(size_t alignment, size_t size)
{
    return memalign(alignment, size);
}

int posix_memalign(void **memory, size_t alignment, size_t size)
{
    *memory = memalign(alignment, size);
    return *memory ? 0 : 12;
}

void free(void *memory)
{
    if (memory) {
        counted();
    }
    __libc_free(memory);
}

enum { K = 5, TENSORS = 8, LEN = 30000 };

static void run_calls(gradblend_blender *blender, gradblend_plan *plan, const gradblend_tensor *tensors,
                      const float *scale, int turns)
{
    static const double weights[K] = {1, 2, 3, 4, 5};
    while (turns-- > 0) {
        OK(gradblend_step(blender, plan, NULL));
        OK(gradblend_dot(blender, plan, NULL));
        OK(gradblend_blend(blender, plan, NULL));
        OK(gradblend_pass(blender, plan, GRADBLEND_BLEND | GRADBLEND_ACCUMULATE, NULL));
        OK(gradblend_set_grad_scale(blender, scale));
        OK(gradblend_observe(blender, NULL));
        OK(gradblend_reweight(blender, NULL));
        OK(gradblend_set_weights(blender, weights, K, NULL));
        OK(gradblend_plan_update(plan, tensors, TENSORS, NULL));
        OK(gradblend_set_grad_scale(blender, NULL));
        OK(gradblend_reset(blender, NULL));
    }
}

int main(int count, char **args)
{
    set_up(count, args);
    for (uint32_t threads = 1; threads <= 3; threads++) {
        gradblend_config config = config_of(K);
        config.overfitting = GRADBLEND_CORRELATED;
        config.cadence = GRADBLEND_EVERY_OBSERVATION;
        config.threads = threads;
        gradblend_blender *blender = blender_of(&config);
        /* All tensors read the same memory, and each has a place of its own for its blend. */
        size_t floats = (K + 3 + TENSORS) * LEN;
        float *memory = memory_new(floats * sizeof *memory), *scale = memory_new(sizeof *scale);
        random_state random = {51};
        for (size_t i = 0; i < floats; i++) {
            memory[i] = (float)random_number(&random);
        }
        *scale = 2;
        gradblend_tensor tensors[2][TENSORS];
        const void *modalities[K];
        for (int k = 0; k < K; k++) {
            modalities[k] = memory + (2 + k) * LEN;
        }
        for (int i = 0; i < TENSORS; i++) {
            float *blended = memory + (K + 3 + i) * LEN;
            tensors[0][i] = (gradblend_tensor){(uint64_t)(LEN / TENSORS * i), i % 3, memory, memory + LEN, modalities,
                                               blended};
            tensors[1][i] = tensors[0][i];
            tensors[1][i].blended = i % 2 ? NULL : blended + 1;
        }
        gradblend_plan *plan;
        OK(gradblend_plan_create(blender, tensors[0], TENSORS, &plan));
        /* Locks and conditions of the system set themselves up at their first use. */
        run_calls(blender, plan, tensors[1], scale, 1);
        finish();
        unsigned long before = __atomic_load_n(&calls, __ATOMIC_SEQ_CST);
        run_calls(blender, plan, tensors[1], scale, 10);
        finish();
        unsigned long after = __atomic_load_n(&calls, __ATOMIC_SEQ_CST);
        try_case("%" PRIu32 " threads: %lu calls of the allocator", threads, after - before);
        CHECK(after == before);
        /* The count counts. */
        size_t bytes;
        free(saved_of(blender, &bytes));
        CHECK(__atomic_load_n(&calls, __ATOMIC_SEQ_CST) > after + 2);
        gradblend_plan_destroy(plan);
        gradblend_blender_destroy(blender);
        memory_free(memory);
        memory_free(scale);
    }
    printf("alloc: none\n");
    return 0;
}
