/*
 * The caller's floating-point environment changes no bit of a result, whichever thread computes it, raises no trap, and
 * is left as it was.
 */
#include "check.h"

#include <fenv.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
/* Flush results to zero, and take subnormal numbers as zero. */
static void flush(void)
{
    _mm_setcsr(_mm_getcsr() | 0x8040);
}
static unsigned control(void)
{
    return _mm_getcsr() & ~0x3fu; /* without the exceptions that were raised */
}
#else
static void flush(void)
{
    puts("left out: flushing to zero, which is set on x86-64 only");
}
static unsigned control(void)
{
    return (unsigned)fegetround();
}
#endif

/* More than a thread takes at a time, so that two threads share it. */
enum { LEN = 1 << 19, K = 2, STEPS = 4 };

typedef struct {
    float blended[LEN];
    double pending[2 * K];
    gradblend_report report;
} results;

static void plain(void)
{
}

static void upwards(void)
{
    CHECK(fesetround(FE_UPWARD) == 0);
}

static void traps(void)
{
#ifdef __GLIBC__
    CHECK(feenableexcept(FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW | FE_UNDERFLOW) != -1);
#endif
}

/* All that a blender computes, on numbers of which many products, and each blend, are subnormal. */
static void compute(void (*disturb)(void), results *out)
{
    static float t[LEN], g[LEN], v[K][LEN], blended[LEN];
    for (size_t i = 0; i < LEN; i++) {
        t[i] = (float)(1 + i % 7) / 3;
        g[i] = 1 / (float)(1 + i % 5);
        v[0][i] = 1e-39f * (float)(1 + i % 3);
        v[1][i] = 1e-39f / (float)(1 + i % 11);
    }
    const void *addresses[K] = {v[0], v[1]};
    gradblend_tensor tensor = {.len = LEN, .dtype = GRADBLEND_F32, .train = t, .valid = g, .modalities = addresses,
                               .blended = blended};
    gradblend_config config = config_of(K);
    gradblend_plan *plan;
    config.threads = 2;
    gradblend_blender *blender = blender_of(&config);
    OK(gradblend_plan_create(blender, &tensor, 1, &plan));
    fenv_t callers;
    CHECK(fegetenv(&callers) == 0);
    disturb();
    unsigned before = control();
    /* Before the first observation, 0 / 0. */
    OK(gradblend_get_report(blender, &out->report, NULL));
    for (int step = 0; step < STEPS; step++) {
        OK(gradblend_dot(blender, plan, NULL));
        double *sums;
        uint32_t count;
        OK(gradblend_pending_sums(blender, &sums, &count));
        memcpy(out->pending, sums, sizeof out->pending);
        OK(gradblend_blend(blender, plan, NULL));
        OK(gradblend_observe(blender, NULL));
        OK(gradblend_reweight(blender, NULL));
    }
    OK(gradblend_get_report(blender, &out->report, NULL));
    CHECK(control() == before);
    CHECK(fesetenv(&callers) == 0);
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);
    memcpy(out->blended, blended, sizeof blended);
}

int main(void)
{
    static results want, got;
    static const struct {
        const char *name;
        void (*disturb)(void);
    } cases[] = {{"plain", plain}, {"flush to zero", flush}, {"round upwards", upwards}, {"traps", traps}};
    compute(plain, &want);
    CHECK(want.blended[0] != 0 && want.blended[0] < 1.2e-38f && want.report.observed == STEPS);
    for (size_t i = 0; i < COUNT(cases); i++) {
        for (int again = 0; again < 3; again++) {
            try_case("%s", cases[i].name);
            compute(cases[i].disturb, &got);
            CHECK(memcmp(&got, &want, sizeof got) == 0);
        }
    }
    puts("environment: the same bits in every one");
    return 0;
}
