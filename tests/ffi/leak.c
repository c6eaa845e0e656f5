/*
 * Makes and destroys thousands of times, good ones and refused ones. What is not given back grows the heap, the threads
 * or the address space; and a leak checker that runs this program sees it too.
 */
#include <malloc.h>
#include <unistd.h>

#include "check.h"

enum { K = 3, LEN = 700 };

/* Bytes of the heap in use, without what the allocator keeps. */
static size_t heap(void)
{
    struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
}

/* A number that the system tells of this process, as "Threads" and "VmSize"; -1 where it tells none. */
static long told(const char *name)
{
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    long number = -1;
    while (file && fgets(line, sizeof line, file)) {
        size_t length = strlen(name);
        if (strncmp(line, name, length) == 0 && line[length] == ':') {
            number = strtol(line + length + 1, NULL, 10);
        }
    }
    if (file) {
        fclose(file);
    }
    return number;
}

static float *memory;

static void turn(unsigned i)
{
    const void *modalities[K] = {memory, i % 2 ? memory : NULL, memory + LEN};
    gradblend_tensor tensor = {LEN, GRADBLEND_F32, memory, memory + LEN, modalities, memory + 2 * LEN};
    gradblend_config config = config_of(K);
    config.threads = i % 16 ? 1 : 3;
    gradblend_blender *blender = blender_of(&config);
    gradblend_plan *plan, *other, *none = NULL;
    OK(gradblend_plan_create(blender, &tensor, 1, &plan));
    OK(gradblend_plan_create(blender, NULL, 0, &other));
    OK(gradblend_step(blender, plan, NULL));
    OK(gradblend_plan_update(plan, &tensor, 1, NULL));
    size_t bytes;
    unsigned char *saved = saved_of(blender, &bytes);
    OK(gradblend_load(blender, saved, bytes, NULL));
    saved[i % bytes] ^= 1;
    RETURNS(GRADBLEND_CORRUPT_STATE, gradblend_load(blender, saved, bytes, NULL));
    free(saved);
    tensor.blended = memory + 1;
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_plan_create(blender, &tensor, 1, &none));
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_plan_update(plan, &tensor, 1, NULL));
    config.decay = 2;
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_blender_create(device, &config, &blender));
    if (i % 2) {
        gradblend_plan_destroy(plan);
    }
    gradblend_blender_destroy(blender);
    if (i % 2 == 0) {
        gradblend_plan_destroy(plan);
    }
    gradblend_plan_destroy(other);
    gradblend_plan_destroy(other);
    gradblend_blender_destroy(blender);
}

int main(int count, char **args)
{
    set_up(count, args);
    /* Threads share one heap, so that all of it is counted, and none is made for a thread that comes later. */
    mallopt(M_ARENA_MAX, 1);
    memory = memory_new(3 * LEN * sizeof *memory);
    memset(memory, 0, 3 * LEN * sizeof *memory);
    unsigned turns = rounds(10000);
    /* What is set up once is there after a few; stacks of threads that have ended are kept for the next. */
    for (unsigned i = 0; i < 32; i++) {
        turn(i);
    }
    size_t heap_before = heap();
    long threads_before = told("Threads"), size_before = told("VmSize");
    CHECK(threads_before > 0 && size_before > 0);
    for (unsigned i = 0; i < turns; i++) {
        turn(i);
    }
    long kilobytes = (long)(heap() / 1024) - (long)(heap_before / 1024);
    long threads = told("Threads") - threads_before, size = told("VmSize") - size_before;
    try_case("%ld kB of the heap, %ld threads, %ld kB in all, after %u turns", kilobytes, threads, size, turns);
    /* Under 8 bytes a turn, which is less than anything that could leak, and what the allocator keeps in its caches.
     * Sanitizers and valgrind, which see leaks for themselves, give 0 for the heap and keep memory that was freed. */
    CHECK(kilobytes <= 64 + (long)turns * 8 / 1024);
    CHECK(threads <= 0);
    CHECK(size <= 1024 + (long)turns * 8 / 1024 || heap_before == 0);
    memory_free(memory);
    printf("leak: %u turns; %ld kB, %ld threads, %ld kB in all\n", turns, kilobytes, threads, size);
    return 0;
}
