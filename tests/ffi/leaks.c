/* Thousands of objects and errors leave no heap memory, thread or address space behind. */
#include <malloc.h>

#include "check.h"

enum { LEN = 700 };

/* Bytes of the heap in use; 0 under sanitizers and valgrind, which detect leaks themselves. */
static size_t heap_bytes(void)
{
    struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
}

/* A number of /proc/self/status. */
static long process_status(const char *name)
{
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    long number = -1;
    CHECK(file);
    while (fgets(line, sizeof line, file)) {
        if (strncmp(line, name, strlen(name)) == 0) {
            number = strtol(line + strlen(name), NULL, 10);
        }
    }
    fclose(file);
    CHECK(number > 0);
    return number;
}

static void create_and_destroy(gradients *gradients, unsigned i)
{
    gradblend_tensor *tensor = &gradients->tensor;
    gradblend_config config = config_new(K, i % 16 ? 1 : 3);
    gradblend_blender *blender = blender_new(&config);
    gradblend_plan *plan = plan_new(blender, tensor, 1), *empty = plan_new(blender, NULL, 0), *none = NULL;
    OK(gradblend_step(blender, plan, NULL));
    OK(gradblend_plan_update(plan, tensor, 1, NULL));
    size_t bytes;
    unsigned char *saved = saved_state(blender, &bytes);
    OK(gradblend_load(blender, saved, bytes, NULL));
    saved[i % bytes] ^= 1;
    RETURNS(GRADBLEND_CORRUPT_STATE, gradblend_load(blender, saved, bytes, NULL));
    free(saved);
    void *blended = tensor->blended;
    tensor->blended = gradients->memory + 1;
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_plan_create(blender, tensor, 1, &none));
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_plan_update(plan, tensor, 1, NULL));
    tensor->blended = blended;
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

int main(int count, char **args)
{
    start(count, args);
    /* One arena for all threads: mallinfo2 counts only the main one. */
    mallopt(M_ARENA_MAX, 1);
    gradients gradients;
    gradients_new(&gradients, LEN, 1);
    unsigned number = rounds(10000);
    /* The first rounds allocate what the process keeps: stacks of ended threads, the handle tables. */
    for (unsigned i = 0; i < 32; i++) {
        create_and_destroy(&gradients, i);
    }
    size_t heap_before = heap_bytes();
    long threads = process_status("Threads:"), kilobytes = process_status("VmSize:");
    for (unsigned i = 0; i < number; i++) {
        create_and_destroy(&gradients, i);
    }
    long heap = (long)(heap_bytes() / 1024) - (long)(heap_before / 1024);
    threads = process_status("Threads:") - threads;
    kilobytes = process_status("VmSize:") - kilobytes;
    begin_case("%ld kB of the heap, %ld threads, %ld kB of address space after %u rounds", heap, threads, kilobytes,
               number);
    /* Any leak is more than 8 bytes a round; the constants are caches of the allocator. */
    CHECK(heap <= 64 + (long)number * 8 / 1024);
    CHECK(threads <= 0);
    CHECK(kilobytes <= 1024 + (long)number * 8 / 1024 || heap_before == 0);
    memory_free(gradients.memory);
    printf("leaks: %s\n", test_case);
    return 0;
}
