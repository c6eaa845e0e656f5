/*
 * Threads: each with its own blender gets the bits that one alone gets, and its own last error; const pointers are
 * shared; a blender that threads fight over, against the rules, still crashes nothing; and a forked process is refused
 * what its parent made.
 */
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

enum { THREADS = 4, K = 3, LEN = 2000, STEPS = 20 };

/* Starts THREADS threads and waits for them. */
static void together(void *(*body)(void *), void *arguments, size_t size)
{
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_create(&threads[i], NULL, body, (char *)arguments + (size_t)i * size) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
}

static void enter(void)
{
    if (cuda.library) {
        cuda_enter();
    }
}

/* One tensor of random gradients, all in one piece of memory. */
typedef struct {
    float *memory;
    const void *modalities[K];
    gradblend_tensor tensor;
} work;

static void work_new(work *work, uint64_t seed)
{
    random_state random = {seed};
    work->memory = memory_new((K + 3) * LEN * sizeof(float));
    for (int i = 0; i < (K + 3) * LEN; i++) {
        work->memory[i] = (float)random_number(&random);
    }
    for (int k = 0; k < K; k++) {
        work->modalities[k] = work->memory + (2 + k) * LEN;
    }
    work->tensor = (gradblend_tensor){LEN, GRADBLEND_F32, work->memory, work->memory + LEN, work->modalities,
                                      work->memory + (2 + K) * LEN};
}

typedef struct {
    uint64_t seed;
    unsigned char *saved;
    size_t bytes;
} own;

static void *train(void *argument)
{
    own *own = argument;
    enter();
    gradblend_config config = config_of(K);
    config.cadence = GRADBLEND_EVERY_OBSERVATION;
    config.threads = 2;
    work work;
    work_new(&work, own->seed);
    gradblend_blender *blender = blender_of(&config);
    gradblend_plan *plan;
    OK(gradblend_plan_create(blender, &work.tensor, 1, &plan));
    for (unsigned step = 0; step < rounds(STEPS); step++) {
        OK(gradblend_step(blender, plan, NULL));
        OK(gradblend_plan_update(plan, &work.tensor, 1, NULL));
        /* An error of each thread's own, between others' errors. */
        char message[256], want[32];
        uint32_t bad = 100 + (uint32_t)own->seed;
        snprintf(want, sizeof want, "%" PRIu32, bad);
        RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_config_default(bad, &config));
        OK(gradblend_reweight(blender, NULL));
        gradblend_last_error(message, sizeof message);
        CHECK(strstr(message, want));
    }
    own->saved = saved_of(blender, &own->bytes);
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);
    memory_free(work.memory);
    return NULL;
}

static void each_its_own(void)
{
    own alone[THREADS], threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        alone[i] = threads[i] = (own){(uint64_t)i, NULL, 0};
        train(&alone[i]);
    }
    together(train, threads, sizeof *threads);
    for (int i = 0; i < THREADS; i++) {
        CHECK(alone[i].bytes == threads[i].bytes);
        CHECK(memcmp(alone[i].saved, threads[i].saved, alone[i].bytes) == 0);
        free(alone[i].saved);
        free(threads[i].saved);
    }
}

static void *no_error_yet(void *argument)
{
    (void)argument;
    char message[8] = "x";
    CHECK(gradblend_last_error(message, sizeof message) == 0 && *message == 0);
    return NULL;
}

static gradblend_blender *shared;
static work shared_work;

/* What takes a const blender, from all threads at once. */
static void *share(void *argument)
{
    (void)argument;
    enter();
    const float *first_weights = NULL;
    double *first_sums = NULL;
    for (unsigned i = 0; i < rounds(1000); i++) {
        const float *weights = NULL;
        double *sums = NULL;
        uint32_t count = 0;
        gradblend_plan *plan = NULL;
        OK(gradblend_device_weights(shared, &weights));
        OK(gradblend_pending_sums(shared, &sums, &count));
        OK(gradblend_plan_create(shared, &shared_work.tensor, 1, &plan));
        CHECK(count == 2 * K && plan);
        CHECK(i == 0 || (weights == first_weights && sums == first_sums));
        first_weights = weights;
        first_sums = sums;
        gradblend_plan_destroy(plan);
    }
    return NULL;
}

static void const_is_shared(void)
{
    gradblend_config config = config_of(K);
    shared = blender_of(&config);
    work_new(&shared_work, 5);
    char nothing[THREADS];
    together(share, nothing, 1);
    gradblend_blender_destroy(shared);
    memory_free(shared_work.memory);
}

static gradblend_plan *shared_plan;

/*
 * Everything at once on one blender and one plan, which a caller must not do. Whatever comes of it is a status; two
 * threads even destroy and make, so that the others' handles go stale under them. Only what the library itself guards
 * is in play: nothing reads or writes the gradients or the addresses that it gives out meanwhile.
 */
static void *misuse(void *argument)
{
    random_state random = {*(uint64_t *)argument};
    enter();
    for (unsigned i = 0; i < rounds(5000); i++) {
        gradblend_report report;
        gradblend_status status = GRADBLEND_OK;
        unsigned char buffer[1024];
        size_t bytes = sizeof buffer;
        double weights[K] = {1, 2, 3};
        gradblend_blender *blender = __atomic_load_n(&shared, __ATOMIC_SEQ_CST);
        gradblend_plan *plan = __atomic_load_n(&shared_plan, __ATOMIC_SEQ_CST);
        switch (random_below(&random, 10)) {
        case 0: status = gradblend_step(blender, plan, NULL); break;
        case 1: status = gradblend_dot(blender, plan, NULL); break;
        case 2: status = gradblend_plan_update(plan, &shared_work.tensor, 1, NULL); break;
        case 3: status = gradblend_get_report(blender, &report, NULL); break;
        case 4: status = gradblend_save(blender, buffer, &bytes, NULL); break;
        case 5: status = gradblend_set_weights(blender, weights, K, NULL); break;
        case 6: status = gradblend_reweight(blender, NULL); break;
        case 7: status = gradblend_reset(blender, NULL); break;
        default:
            if (*(uint64_t *)argument % 2 == 0 && i % 8 == 0) {
                gradblend_config config = config_of(K);
                gradblend_blender_destroy(blender);
                __atomic_store_n(&shared, blender_of(&config), __ATOMIC_SEQ_CST);
            } else if (*(uint64_t *)argument % 2 == 1) {
                gradblend_plan *made;
                status = gradblend_plan_create(blender, &shared_work.tensor, 1, &made);
                if (status == GRADBLEND_OK) {
                    /* Whichever thread takes a plan out destroys it. */
                    gradblend_plan_destroy(__atomic_exchange_n(&shared_plan, made, __ATOMIC_SEQ_CST));
                }
            }
        }
        CHECK(status == GRADBLEND_OK || status == GRADBLEND_INVALID_ARGUMENT);
    }
    return NULL;
}

static void misuse_crashes_nothing(void)
{
    gradblend_config config = config_of(K);
    uint64_t seeds[THREADS] = {0, 1, 3, 5};
    shared = blender_of(&config);
    work_new(&shared_work, 6);
    OK(gradblend_plan_create(shared, &shared_work.tensor, 1, &shared_plan));
    together(misuse, seeds, sizeof *seeds);
    gradblend_plan_destroy(shared_plan);
    gradblend_blender_destroy(shared);
    memory_free(shared_work.memory);
}

static void refused(gradblend_status status)
{
    char message[256];
    gradblend_last_error(message, sizeof message);
    CHECK(status == GRADBLEND_INVALID_ARGUMENT && strstr(message, "forked"));
}

/* In a forked process: what the parent made is refused, and left alone by _destroy, which would wait for threads that
 * stayed behind; what the child makes works. A child that hangs is ended by its alarm, and fails. */
static void child(gradblend_blender *blender, gradblend_plan *plan, const work *work)
{
    double weights[K] = {1, 2, 3};
    gradblend_plan *made = NULL;
    alarm(300);
    refused(gradblend_step(blender, plan, NULL));
    refused(gradblend_set_weights(blender, weights, K, NULL));
    refused(gradblend_plan_create(blender, &work->tensor, 1, &made));
    refused(gradblend_plan_update(plan, &work->tensor, 1, NULL));
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);
    /* A CUDA context does not outlive a fork. */
    if (!cuda.library) {
        gradblend_config config = config_of(K);
        config.threads = 2;
        gradblend_blender *own = blender_of(&config);
        OK(gradblend_plan_create(own, &work->tensor, 1, &made));
        refused(gradblend_step(own, plan, NULL));
        OK(gradblend_step(own, made, NULL));
        gradblend_plan_destroy(made);
        gradblend_blender_destroy(own);
    }
    /* To exit would have leak checkers look for what the parent's threads hold, which are not here. */
    execl("/bin/sh", "sh", "-c", ":", (char *)NULL);
    CHECK(!"no /bin/sh");
}

static void forked(void)
{
    gradblend_config config = config_of(K);
    config.threads = 2;
    work work;
    work_new(&work, 7);
    gradblend_blender *blender = blender_of(&config);
    gradblend_plan *plan;
    OK(gradblend_plan_create(blender, &work.tensor, 1, &plan));
    OK(gradblend_step(blender, plan, NULL));
    fflush(NULL);
    pid_t process = fork();
    CHECK(process >= 0);
    if (process == 0) {
        child(blender, plan, &work);
    }
    int status = -1;
    CHECK(waitpid(process, &status, 0) == process && status == 0);
    /* Nothing that the child did is the parent's. */
    OK(gradblend_step(blender, plan, NULL));
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);
    memory_free(work.memory);
}

int main(int count, char **args)
{
    set_up(count, args);
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_config_default(0, NULL));
    char nothing[THREADS];
    together(no_error_yet, nothing, 1);
    each_its_own();
    const_is_shared();
    misuse_crashes_nothing();
    forked();
    printf("thread: %d threads\n", THREADS);
    return 0;
}
