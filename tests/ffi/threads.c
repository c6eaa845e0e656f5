/*
 * The thread rule of the header: a blender on each thread gives the bits of one thread alone, errors are per thread,
 * const pointers can be shared, calls that break the rule return a status, and a forked process cannot use its parent's
 * objects.
 */
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

enum { THREADS = 4, LEN = 2000, STEPS = 20 };

static gradblend_blender *shared;
static gradblend_plan *shared_plan;
static gradients shared_gradients;

/* Runs `body` on THREADS threads, each with its own element of `arguments`. */
static void run_threads(void *(*body)(void *), void *arguments, size_t size) {
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_create(&threads[i], NULL, body, (char *)arguments + (size_t)i * size) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
}

typedef struct {
    unsigned seed;
    unsigned char *saved;
    size_t bytes;
} training;

static void *train(void *argument) {
    training *training = argument;
    cuda_enter_thread();
    char message[256], want[32];
    gradblend_config config = config_new(K, 2);
    config.cadence = GRADBLEND_EVERY_OBSERVATION;
    gradients gradients;
    gradients_new(&gradients, LEN, training->seed);
    gradblend_blender *blender = blender_new(&config);
    gradblend_plan *plan = plan_new(blender, &gradients.tensor, 1);
    for (unsigned step = 0; step < rounds(STEPS); step++) {
        OK(gradblend_step(blender, plan, NULL));
        OK(gradblend_plan_update(plan, &gradients.tensor, 1, NULL));
        /* An error on each thread, while others get theirs. */
        uint32_t modalities = 100 + training->seed;
        snprintf(want, sizeof want, "got %" PRIu32, modalities);
        RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_config_default(modalities, &config));
        OK(gradblend_reweight(blender, NULL));
        gradblend_last_error(message, sizeof message);
        CHECK(strstr(message, want));
    }
    training->saved = saved_state(blender, &training->bytes);
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);
    memory_free(gradients.memory);
    return NULL;
}

static void one_blender_a_thread(void) {
    training alone[THREADS], together[THREADS];
    for (int i = 0; i < THREADS; i++) {
        alone[i] = together[i] = (training){(unsigned)i, NULL, 0};
        train(&alone[i]);
    }
    run_threads(train, together, sizeof *together);
    for (int i = 0; i < THREADS; i++) {
        CHECK(alone[i].bytes == together[i].bytes);
        CHECK(memcmp(alone[i].saved, together[i].saved, alone[i].bytes) == 0);
        free(alone[i].saved);
        free(together[i].saved);
    }
}

/* The functions that take a const blender. */
static void *use_const(void *argument) {
    const float *weights = NULL, **first_weights = argument;
    double *sums = NULL;
    uint32_t count = 0;
    char message[2] = "x";
    /* This thread has no error, whatever others had. */
    CHECK(gradblend_last_error(message, sizeof message) == 0 && *message == 0);
    cuda_enter_thread();
    for (unsigned i = 0; i < rounds(1000); i++) {
        OK(gradblend_device_weights(shared, &weights));
        OK(gradblend_pending_sums(shared, &sums, &count));
        CHECK(weights && sums && count == 2 * K && (i == 0 || weights == *first_weights));
        *first_weights = weights;
        gradblend_plan_destroy(plan_new(shared, &shared_gradients.tensor, 1));
    }
    return NULL;
}

/*
 * Every call at once on one blender and one plan, against the rule; some threads destroy and create both, so that the
 * handles of others go stale. The gradients and the addresses that the library returns are not touched meanwhile.
 */
static void *misuse(void *argument) {
    unsigned thread = *(unsigned *)argument, seed = thread;
    gradblend_config config = config_new(K, 1);
    cuda_enter_thread();
    for (unsigned i = 0; i < rounds(5000); i++) {
        gradblend_report report = {.size = sizeof report};
        gradblend_status status = GRADBLEND_OK;
        unsigned char buffer[1024];
        size_t bytes = sizeof buffer;
        static const double weights[K] = {1, 2, 3};
        gradblend_blender *blender = __atomic_load_n(&shared, __ATOMIC_SEQ_CST);
        gradblend_plan *plan = __atomic_load_n(&shared_plan, __ATOMIC_SEQ_CST), *created;
        switch (rand_r(&seed) % 10) {
        case 0: status = gradblend_step(blender, plan, NULL); break;
        case 1: status = gradblend_dot(blender, plan, NULL); break;
        case 2: status = gradblend_plan_update(plan, &shared_gradients.tensor, 1, NULL); break;
        case 3: status = gradblend_get_report(blender, &report, NULL); break;
        case 4: status = gradblend_save(blender, buffer, &bytes, NULL); break;
        case 5: status = gradblend_set_weights(blender, weights, K, NULL); break;
        case 6: status = gradblend_reweight(blender, NULL); break;
        case 7: status = gradblend_reset(blender, NULL); break;
        default:
            if (thread == 0 && i % 8 == 0) {
                gradblend_blender_destroy(blender);
                __atomic_store_n(&shared, blender_new(&config), __ATOMIC_SEQ_CST);
            } else if (thread != 0) {
                status = gradblend_plan_create(blender, &shared_gradients.tensor, 1, &created);
                if (status == GRADBLEND_OK) {
                    /* The thread that takes a plan out destroys it. */
                    gradblend_plan_destroy(__atomic_exchange_n(&shared_plan, created, __ATOMIC_SEQ_CST));
                }
            }
        }
        CHECK(status == GRADBLEND_OK || status == GRADBLEND_INVALID_ARGUMENT);
    }
    return NULL;
}

static void check_forked(gradblend_status status) {
    char message[256];
    gradblend_last_error(message, sizeof message);
    CHECK(status == GRADBLEND_INVALID_ARGUMENT && strstr(message, "forked"));
}

/* Calls on the parent's objects are errors, destroying them does not wait for threads that the child lacks, and new
 * objects work. The alarm ends a child that hangs. */
static void run_child(const gradblend_config *config) {
    gradblend_plan *none = NULL;
    alarm(300);
    check_forked(gradblend_step(shared, shared_plan, NULL));
    check_forked(gradblend_set_weights(shared, (double[K]){1, 2, 3}, K, NULL));
    check_forked(gradblend_plan_create(shared, &shared_gradients.tensor, 1, &none));
    check_forked(gradblend_plan_update(shared_plan, &shared_gradients.tensor, 1, NULL));
    gradblend_plan_destroy(shared_plan);
    gradblend_blender_destroy(shared);
    /* A CUDA context does not survive a fork. */
    if (!cuda.library) {
        gradblend_blender *own = blender_new(config);
        gradblend_plan *plan = plan_new(own, &shared_gradients.tensor, 1);
        check_forked(gradblend_step(own, shared_plan, NULL));
        OK(gradblend_step(own, plan, NULL));
        gradblend_plan_destroy(plan);
        gradblend_blender_destroy(own);
    }
    /* Not exit: leak checkers would look for memory of threads that the child lacks. */
    execl("/bin/sh", "sh", "-c", ":", (char *)NULL);
    CHECK(!"no /bin/sh");
}

int main(int count, char **args) {
    start(count, args);
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_config_default(0, NULL));
    one_blender_a_thread();

    gradblend_config config = config_new(K, 2);
    gradients_new(&shared_gradients, LEN, 5);
    shared = blender_new(&config);
    shared_plan = plan_new(shared, &shared_gradients.tensor, 1);
    run_threads(use_const, (const float *[THREADS]){NULL}, sizeof(float *));

    OK(gradblend_step(shared, shared_plan, NULL));
    fflush(NULL);
    pid_t process = fork();
    CHECK(process >= 0);
    if (process == 0) {
        run_child(&config);
    }
    int status = -1;
    CHECK(waitpid(process, &status, 0) == process && status == 0);
    OK(gradblend_step(shared, shared_plan, NULL));

    run_threads(misuse, (unsigned[THREADS]){0, 1, 2, 3}, sizeof(unsigned));
    gradblend_plan_destroy(shared_plan);
    gradblend_blender_destroy(shared);
    memory_free(shared_gradients.memory);
    puts("threads: done");
    return 0;
}
