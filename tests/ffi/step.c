/*
 * Random problems: every pass against the oracle, and against the same work done apart, bit for bit; on other threads,
 * at other addresses, and after a stop and a start from a saved state.
 */
#include "problem.h"

static gradblend_config random_config(random_state *random)
{
    static const uint32_t likely[] = {1, 2, 2, 3, 3, 4, 5, 6, 8, 9};
    static const double decays[] = {0, 0.5, 0.9, 0.99, 0.999999};
    uint32_t k = random_below(random, 8) ? likely[random_below(random, COUNT(likely))]
                                         : 1 + (uint32_t)random_below(random, MAX_K);
    gradblend_config config = config_of(k);
    config.average = (int32_t)random_below(random, 2);
    config.overfitting = (int32_t)random_below(random, 2);
    config.negative = (int32_t)random_below(random, 2);
    config.cadence = (int32_t)random_below(random, 2);
    /* Most blenders work alone: starting threads takes longer than most of these problems. */
    config.threads = random_below(random, 8) ? 1 : 2 + (uint32_t)random_below(random, 2);
    config.decay = decays[random_below(random, COUNT(decays))];
    config.damping = random_below(random, 2) ? 1e-12 : 0.1;
    return config;
}

/* One of two that are to stay equal: one does all in one pass, the other everything apart. */
typedef struct {
    gradblend_config config;
    gradblend_blender *blender;
    gradblend_plan *plan;
    problem *problem;
} side;

static side side_new(gradblend_config config, uint64_t seed)
{
    side side = {config, blender_of(&config), NULL, problem_new(seed, config.modalities)};
    OK(gradblend_plan_create(side.blender, side.problem->tensors, side.problem->count, &side.plan));
    CHECK(side.plan);
    return side;
}

static void side_free(side *side, bool plan_first)
{
    if (plan_first) {
        gradblend_plan_destroy(side->plan);
    }
    gradblend_blender_destroy(side->blender);
    if (!plan_first) {
        gradblend_plan_destroy(side->plan);
    }
    problem_free(side->problem);
}

static void check_same_blends(const side *one, const side *other)
{
    finish();
    for (uint64_t i = 0; i < one->problem->count; i++) {
        const gradblend_tensor *a = &one->problem->tensors[i], *b = &other->problem->tensors[i];
        CHECK(!a->blended == !b->blended);
        for (uint64_t e = 0; a->blended && e < a->len; e++) {
            double x = list_get(a->dtype, a->blended, e), y = list_get(b->dtype, b->blended, e);
            /* Payloads of NaNs are not promised. */
            CHECK((isnan(x) && isnan(y)) || (x == y && signbit(x) == signbit(y)));
        }
    }
}

/* Stops one side and goes on from its saved state in another blender, which may have another number of threads. The
 * scale is not part of the state. */
static void stop_and_start(side *side, random_state *random, const float *scale)
{
    size_t bytes;
    unsigned char *saved = saved_of(side->blender, &bytes);
    gradblend_plan_destroy(side->plan);
    gradblend_blender_destroy(side->blender);
    side->config.threads = 1 + (uint32_t)random_below(random, 2);
    side->blender = blender_of(&side->config);
    OK(gradblend_load(side->blender, saved, bytes, NULL));
    OK(gradblend_set_grad_scale(side->blender, scale));
    OK(gradblend_plan_create(side->blender, side->problem->tensors, side->problem->count, &side->plan));
    size_t again;
    unsigned char *reread = saved_of(side->blender, &again);
    CHECK(again == bytes && memcmp(saved, reread, bytes) == 0);
    free(reread);
    free(saved);
}

static void run_round(uint64_t seed)
{
    random_state random = {seed};
    gradblend_config config = random_config(&random);
    uint32_t k = config.modalities;
    side whole = side_new(config, seed), apart = side_new(config, seed);
    oracle_moments moments = {.k = k};
    oracle_sums pending = {.elements = 0};
    double got[2 * MAX_K], weights[MAX_K];
    float in_force[MAX_K];
    float *scale = memory_new(sizeof *scale), *scale_used = NULL;

    unsigned turns = 1 + (unsigned)random_below(&random, 4);
    for (unsigned turn = 0; turn < turns; turn++) {
        try_case("seed %" PRIu64 ", K = %" PRIu32 ", turn %u", seed, k, turn);
        if (random_below(&random, 4) == 0) {
            for (uint32_t i = 0; i < k; i++) {
                weights[i] = 2 * random_number(&random);
            }
            OK(gradblend_set_weights(whole.blender, weights, k, NULL));
            OK(gradblend_set_weights(apart.blender, weights, k, NULL));
            weights_of(apart.blender, k, in_force);
            for (uint32_t i = 0; i < k; i++) {
                CHECK(in_force[i] == (float)weights[i]);
            }
        }
        if (random_below(&random, 4) == 0) {
            static const float scales[] = {1, 3, 0.125f, -65536, 0, INFINITY, NAN};
            *scale = scales[random_below(&random, random_below(&random, 8) ? 4 : COUNT(scales))];
            scale_used = random_below(&random, 4) ? scale : NULL;
            OK(gradblend_set_grad_scale(whole.blender, scale_used));
            OK(gradblend_set_grad_scale(apart.blender, scale_used));
        }
        if (random_below(&random, 3) == 0 && apart.problem->count > 0) {
            if (random_below(&random, 2)) {
                uint64_t index = random_below(&random, apart.problem->count);
                uint32_t which = (uint32_t)random_below(&random, MODALITY + k);
                problem_drop(whole.problem, index, which);
                problem_drop(apart.problem, index, which);
                OK(gradblend_plan_update(whole.plan, whole.problem->tensors, whole.problem->count, NULL));
            }
            problem_move(apart.problem, &random);
            OK(gradblend_plan_update(apart.plan, apart.problem->tensors, apart.problem->count, NULL));
        }

        uint32_t what = 0;
        while (what == 0 || (what & (GRADBLEND_BLEND | GRADBLEND_ACCUMULATE)) == GRADBLEND_ACCUMULATE) {
            what = (uint32_t)random_below(&random, 16);
        }
        /* Half of the turns are steps. */
        if (random_below(&random, 2)) {
            what = GRADBLEND_DOT | GRADBLEND_BLEND | GRADBLEND_OBSERVE;
            OK(gradblend_step(whole.blender, whole.plan, NULL));
        } else {
            OK(gradblend_pass(whole.blender, whole.plan, what, NULL));
        }
        problem_read(apart.problem);
        if (what & GRADBLEND_DOT) {
            OK(gradblend_dot(apart.blender, apart.plan, NULL));
            oracle_dot(&pending, apart.problem);
        }
        sums_of(apart.blender, k, got);
        oracle_check_sums(&pending, k, got);
        if (what & GRADBLEND_BLEND) {
            weights_of(apart.blender, k, in_force);
            bool accumulate = what & GRADBLEND_ACCUMULATE;
            if (accumulate) {
                OK(gradblend_pass(apart.blender, apart.plan, GRADBLEND_BLEND | GRADBLEND_ACCUMULATE, NULL));
            } else {
                OK(gradblend_blend(apart.blender, apart.plan, NULL));
            }
            oracle_check_blend(apart.problem, in_force, accumulate);
        }
        if (what & GRADBLEND_OBSERVE) {
            OK(gradblend_observe(apart.blender, NULL));
            oracle_observe(&moments, got, scale_used ? *scale_used : 1);
            sums_of(apart.blender, k, got);
            for (uint32_t i = 0; i < 2 * k; i++) {
                CHECK(got[i] == 0);
            }
            memset(&pending, 0, sizeof pending);
        }
        if (random_below(&random, 6) == 0) {
            OK(gradblend_reweight(whole.blender, NULL));
            OK(gradblend_reweight(apart.blender, NULL));
        }
        if (random_below(&random, 12) == 0) {
            gradblend_report before, after;
            OK(gradblend_get_report(apart.blender, &before, NULL));
            OK(gradblend_reset(whole.blender, NULL));
            OK(gradblend_reset(apart.blender, NULL));
            OK(gradblend_get_report(apart.blender, &after, NULL));
            CHECK(after.flags == 0 && memcmp(before.weights, after.weights, sizeof before.weights) == 0);
            sums_of(apart.blender, k, got);
            for (uint32_t i = 0; i < 2 * k; i++) {
                CHECK(got[i] == 0);
            }
            moments = (oracle_moments){.k = k};
            memset(&pending, 0, sizeof pending);
        }
        oracle_check_report(&moments, &apart.config, apart.blender);
        CHECK(same_state(whole.blender, apart.blender));
        check_same_blends(&whole, &apart);
        if (random_below(&random, 4) == 0) {
            stop_and_start(&apart, &random, scale_used);
        }
    }
    side_free(&whole, random_below(&random, 2));
    side_free(&apart, random_below(&random, 2));
    memory_free(scale);
}

int main(int count, char **args)
{
    set_up(count, args);
    unsigned all = rounds(1500);
    for (unsigned round = 0; round < all; round++) {
        run_round(1 + round);
    }
    printf("step: %u problems\n", all);
    return 0;
}
