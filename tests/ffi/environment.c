/*
 * The caller's floating-point environment changes no bit of a result, on any thread, raises no trap, and is restored.
 * CPU only.
 */
#include "check.h"

#include <fenv.h>

static void leave(void) {}

static void round_up(void) {
    CHECK(fesetround(FE_UPWARD) == 0);
}

static void trap(void) {
    CHECK(feenableexcept(FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW | FE_UNDERFLOW) != -1);
}

#if defined(__x86_64__)
#include <xmmintrin.h>
static void flush_to_zero(void) {
    _mm_setcsr(_mm_getcsr() | 0x8040); /* subnormal results and operands */
}
static unsigned control(void) {
    return _mm_getcsr() & ~0x3fu; /* without the exception flags */
}
#elif defined(__aarch64__)
static unsigned control(void) {
    uint64_t fpcr;
    __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
    return (unsigned)fpcr;
}
static void flush_to_zero(void) {
    uint64_t fpcr = control() | 1u << 24; /* FZ: subnormal results and operands */
    __asm__ volatile("msr fpcr, %0" : : "r"(fpcr));
}
#else
#define NO_FLUSH_TO_ZERO
static unsigned control(void) {
    return (unsigned)fegetround();
}
#endif

/* Large enough that two threads share the work. */
enum { LEN = 1 << 19, STEPS = 4 };

typedef struct {
    float blended[LEN];
    double pending[2 * K];
    gradblend_report report;
} results;

/* Every computation, on numbers of which many products and each blend are subnormal. */
static void compute(void (*set_environment)(void), results *out) {
    gradients gradients;
    gradients_new(&gradients, LEN, 7);
    for (size_t i = 0; i < K * LEN; i++) {
        gradients.memory[2 * LEN + i] = 1e-39f * (float)(1 + i % 11);
    }
    gradblend_config config = config_new(K, 2);
    gradblend_blender *blender = blender_new(&config);
    gradblend_plan *plan = plan_new(blender, &gradients.tensor, 1);
    double *sums;
    uint32_t count;
    OK(gradblend_pending_sums(blender, &sums, &count));
    out->report.size = sizeof out->report;
    fenv_t caller;
    CHECK(fegetenv(&caller) == 0);
    set_environment();
    unsigned before = control();
    /* Before the first observation the ratios are 0 / 0. */
    OK(gradblend_get_report(blender, &out->report, NULL));
    for (int step = 0; step < STEPS; step++) {
        OK(gradblend_dot(blender, plan, NULL));
        memcpy(out->pending, sums, sizeof out->pending);
        OK(gradblend_blend(blender, plan, NULL));
        OK(gradblend_observe(blender, NULL));
        OK(gradblend_reweight(blender, NULL));
    }
    OK(gradblend_get_report(blender, &out->report, NULL));
    CHECK(control() == before);
    CHECK(fesetenv(&caller) == 0);
    memcpy(out->blended, gradients.tensor.blended, sizeof out->blended);
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);
    memory_free(gradients.memory);
}

int main(void) {
    static results want, got;
#ifdef NO_FLUSH_TO_ZERO
    void (*const environments[])(void) = {leave, round_up, trap};
    puts("left out: flush to zero, on this processor");
#else
    void (*const environments[])(void) = {leave, round_up, trap, flush_to_zero};
#endif
    compute(leave, &want);
    CHECK(want.blended[0] != 0 && fabsf(want.blended[0]) < 1.1e-38f && want.report.observed == STEPS);
    for (size_t i = 0; i < 3 * COUNT(environments); i++) {
        begin_case("environment %zu", i % COUNT(environments));
        compute(environments[i % COUNT(environments)], &got);
        CHECK(memcmp(&got, &want, sizeof got) == 0);
    }
    puts("environment: the same bits in each");
    return 0;
}
