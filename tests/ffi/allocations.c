/*
 * Run calls and updates neither allocate nor free. This program replaces glibc's allocator for all threads, so it cannot
 * run with sanitizers or valgrind, which replace it too, nor on a CUDA device, whose driver allocates.
 */
#include "check.h"

static unsigned long allocator_calls;

#define COUNTED(type, name, parameters, arguments)                                                                     \
    type __libc_##name parameters;                                                                                     \
    type name parameters                                                                                               \
    {                                                                                                                  \
        __atomic_add_fetch(&allocator_calls, 1, __ATOMIC_SEQ_CST);                                                     \
        return __libc_##name arguments;                                                                                \
    }
COUNTED(void *, malloc, (size_t size), (size))
COUNTED(void *, calloc, (size_t count, size_t size), (count, size))
COUNTED(void *, realloc, (void *memory, size_t size), (memory, size))
COUNTED(void *, memalign, (size_t alignment, size_t size), (alignment, size))

void __libc_free(void *memory);
void free(void *memory)
{
    __atomic_add_fetch(&allocator_calls, memory != NULL, __ATOMIC_SEQ_CST);
    __libc_free(memory);
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

enum { TENSORS = 8, LEN = 30000 };

static void run_calls(gradblend_blender *blender, gradblend_plan *plan, const gradblend_tensor *tensors,
                      const float *scale)
{
    static const double weights[K] = {1, 2, 3};
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

int main(int count, char **args)
{
    start(count, args);
    gradients gradients;
    gradients_new(&gradients, LEN, 51);
    /* All tensors read the same memory; each has its own `blended`. */
    float *blended = memory_random((TENSORS + 1) * LEN, 52);
    gradblend_tensor tensors[2][TENSORS];
    for (int i = 0; i < TENSORS; i++) {
        tensors[0][i] = tensors[1][i] = gradients.tensor;
        tensors[0][i].len = tensors[1][i].len = (uint64_t)(LEN / TENSORS * i);
        tensors[0][i].dtype = tensors[1][i].dtype = i % 3;
        tensors[0][i].blended = blended + i * LEN;
        tensors[1][i].blended = i % 2 ? NULL : blended + i * LEN + 1;
    }
    for (uint32_t threads = 1; threads <= 3; threads++) {
        gradblend_config config = config_new(K, threads);
        config.overfitting = GRADBLEND_CORRELATED;
        config.cadence = GRADBLEND_EVERY_OBSERVATION;
        gradblend_blender *blender = blender_new(&config);
        gradblend_plan *plan = plan_new(blender, tensors[0], TENSORS);
        /* Locks and condition variables allocate at their first use. */
        run_calls(blender, plan, tensors[1], gradients.memory);
        unsigned long before = __atomic_load_n(&allocator_calls, __ATOMIC_SEQ_CST);
        for (int i = 0; i < 10; i++) {
            run_calls(blender, plan, tensors[1], gradients.memory);
        }
        unsigned long after = __atomic_load_n(&allocator_calls, __ATOMIC_SEQ_CST);
        begin_case("%" PRIu32 " threads: %lu calls of the allocator", threads, after - before);
        CHECK(after == before);
        /* The counter works. */
        size_t bytes;
        free(saved_state(blender, &bytes));
        CHECK(__atomic_load_n(&allocator_calls, __ATOMIC_SEQ_CST) > after + 2);
        gradblend_plan_destroy(plan);
        gradblend_blender_destroy(blender);
    }
    memory_free(gradients.memory);
    memory_free(blended);
    puts("allocations: none");
    return 0;
}
