/* gradblend_solve: closed forms, published rows, a naive oracle on random moments, and reweight as the same solver. */
#include "check.h"

typedef struct {
    const char *name;
    uint32_t k;
    double numerator[3], second_moment[9]; /* of the latter, the first K are the diagonal */
    int32_t overfitting, negative;
    double damping;
    double weights[3]; /* what to expect, where `flags` has no HELD */
    uint32_t flags;
} closed_form;

/* Published: audio, RGB, fused, with equal gains, or equal overfitting, that lead to the weights of the paper. */
static const closed_form FORMS[] = {
    {"one", 1, {3}, {7}, 0, 0, 1e-12, {1}, 0},
    {"overfitting of 1 and 3", 2, {1, 1}, {1, 3}, 0, 0, 1e-12, {0.75, 0.25}, 0},
    {"gains of 2 and 1", 2, {2, 1}, {1, 1}, 0, 0, 1e-12, {2 / 3.0, 1 / 3.0}, 0},
    {"a gain of 0", 3, {2, 3, 0}, {4, 3, 1}, 0, 0, 1e-12, {1 / 3.0, 2 / 3.0, 0}, 0},
    {"no overfitting", 2, {1, 3}, {0, 0}, 0, 0, 1e-12, {0.25, 0.75}, 0},
    {"Kinetics", 3, {1, 1, 1}, {1 / .014, 1 / .630, 1 / .356}, 0, 0, 1e-12, {.014, .630, .356}, 0},
    {"mini-Sports", 3, {1, 1, 1}, {1 / .06, 1 / .65, 1 / .29}, 0, 1, 1e-12, {.06, .65, .29}, 0},
    {"mini-AudioSet", 3, {.24, .38, .38}, {1, 1, 1}, 1, 0, 1e-12, {.24, .38, .38}, 0},
    {"the same, signed", 3, {.24, .38, .38}, {1, 1, 1}, 1, 1, 1e-12, {.24, .38, .38}, 0},
    {"clamped", 3, {.7, -2, -.4}, {.5, 2, .9}, 0, 0, 1e-12, {1, 0, 0}, GRADBLEND_FLAG_CLAMPED},
    {"clamped, correlated", 3, {.7, -2, -.4}, {.5, 2, .9}, 1, 0, 1e-12, {1, 0, 0}, GRADBLEND_FLAG_CLAMPED},
    {"signed, up-hill", 3, {.7, -2, -.4}, {.5, 2, .9}, 0, 1, 1e-12, {0}, GRADBLEND_FLAG_HELD},
    {"signed", 2, {3, -1}, {1, 1}, 0, 1, 1e-12, {1.5, -0.5}, 0},
    {"all negative", 2, {-1, -2}, {1, 1}, 0, 0, 1e-12, {0}, GRADBLEND_FLAG_HELD | GRADBLEND_FLAG_CLAMPED},
    {"no gain", 2, {0, 0}, {1, 1}, 0, 0, 1e-12, {0}, GRADBLEND_FLAG_HELD},
    {"nothing at all", 2, {0, 0}, {0, 0}, 0, 0, 0, {0}, GRADBLEND_FLAG_HELD},
    {"damping is relative", 2, {1, 1}, {0, 2}, 0, 0, 0.5, {5 / 6.0, 1 / 6.0}, 0},
    {"no damping", 2, {1, 1}, {0, 2}, 0, 0, 0, {0}, GRADBLEND_FLAG_HELD},
};

static void closed_forms(void)
{
    for (size_t i = 0; i < COUNT(FORMS); i++) {
        const closed_form *form = &FORMS[i];
        try_case("%s", form->name);
        gradblend_config config = config_of(form->k);
        config.overfitting = form->overfitting;
        config.negative = form->negative;
        config.damping = form->damping;
        double s[9] = {0}, in_force[3] = {7, -8, 9}, weights[3], trace = 0, least = INFINITY;
        for (uint32_t k = 0; k < form->k; k++) {
            double diagonal = s[k * form->k + k] = form->second_moment[k];
            trace += diagonal;
            least = diagonal > 0 ? fmin(least, diagonal) : least;
        }
        /* The forms leave a damping of 1e-12 out; it moves a weight by as much as it adds to S, twice. */
        double bound = ldexp(8, -53) + (form->damping < 0.1 ? 2 * form->damping * trace / form->k / least : 0);
        for (int given = 0; given < 2; given++) {
            uint32_t flags = 77;
            OK(gradblend_solve(&config, form->numerator, s, given ? in_force : NULL, weights, &flags));
            CHECK(flags == form->flags);
            double sum = 0;
            for (uint32_t k = 0; k < form->k; k++) {
                bool held = flags & GRADBLEND_FLAG_HELD;
                double want = !held ? form->weights[k] : given ? in_force[k] : 1.0 / form->k;
                CHECK_NEAR(weights[k], want, held ? 0 : bound);
                sum += weights[k];
            }
            CHECK(flags & GRADBLEND_FLAG_HELD || fabs(sum - 1) <= ldexp(4, -53));
        }
    }
}

/*
 * The naive solver in long double. Says whether the outcome is beyond doubt: whether no decision hangs on a rounding.
 * `size` is sum |a| / sum a: how much of the sum cancels.
 */
static bool oracle_solve(const gradblend_config *config, const double *m, const double *s, double *weights,
                         uint32_t *flags, double *size)
{
    uint32_t k = config->modalities, left[MAX_K], count = k;
    long double trace = 0, a[MAX_K] = {0};
    bool sure = true, correlated = config->overfitting == GRADBLEND_CORRELATED;
    for (uint32_t i = 0; i < k; i++) {
        trace += s[i * k + i];
        left[i] = i;
    }
    *flags = 0;
    long double damping = trace > 0 ? config->damping * trace / k : 1;
    while (true) {
        static long double rows[MAX_K][MAX_K + 1];
        long double largest = 0;
        for (uint32_t i = 0; i < count; i++) {
            for (uint32_t j = 0; j < count; j++) {
                uint32_t p = left[i], q = left[j];
                bool counts = i == j || correlated;
                rows[i][j] = counts ? ((long double)s[p * k + q] + s[q * k + p]) / 2 + (i == j ? damping : 0) : 0;
            }
            rows[i][count] = m[left[i]];
        }
        /* Gauss and Jordan; the matrix is positive definite. */
        for (uint32_t i = 0; i < count; i++) {
            for (uint32_t r = 0; r < count; r++) {
                long double factor = r == i ? 0 : rows[r][i] / rows[i][i];
                for (uint32_t c = 0; factor != 0 && c <= count; c++) {
                    rows[r][c] -= factor * rows[i][c];
                }
            }
        }
        memset(a, 0, sizeof a);
        for (uint32_t i = 0; i < count; i++) {
            a[left[i]] = rows[i][count] / rows[i][i];
            largest = fmaxl(largest, fabsl(a[left[i]]));
        }
        uint32_t kept = 0;
        for (uint32_t i = 0; i < count; i++) {
            sure = sure && fabsl(a[left[i]]) > 1e-6L * largest;
            if (config->negative == GRADBLEND_SIGNED || a[left[i]] >= 0) {
                left[kept++] = left[i];
            } else {
                a[left[i]] = 0;
            }
        }
        if (kept < count) {
            *flags |= GRADBLEND_FLAG_CLAMPED;
        }
        bool done = kept == count || !correlated;
        count = kept;
        if (done) {
            break;
        }
    }
    long double sum = 0, magnitude = 0;
    for (uint32_t i = 0; i < k; i++) {
        sum += a[i];
        magnitude += fabsl(a[i]);
    }
    if (sum <= 0) {
        *flags |= GRADBLEND_FLAG_HELD;
    }
    for (uint32_t i = 0; i < k; i++) {
        weights[i] = (double)(a[i] / sum);
    }
    *size = (double)(magnitude / fabsl(sum));
    return sure && (magnitude == 0 || fabsl(sum) > 1e-6L * magnitude);
}

/* A random second-moment matrix of the outer products of `n` random d; `skew` makes it asymmetric by that much. */
static void random_moments(random_state *random, uint32_t k, uint32_t n, double skew, double *m, double *s)
{
    double sizes[MAX_K];
    memset(s, 0, k * k * sizeof *s);
    for (uint32_t i = 0; i < k; i++) {
        sizes[i] = ldexp(1, (int)random_below(random, 5));
        m[i] = random_number(random) + 0.5;
    }
    for (; n > 0; n--) {
        double d[MAX_K];
        for (uint32_t i = 0; i < k; i++) {
            d[i] = sizes[i] * random_number(random);
        }
        for (uint32_t i = 0; i < k * k; i++) {
            s[i] += d[i / k] * d[i % k];
        }
    }
    for (uint32_t i = 0; i < k; i++) {
        for (uint32_t j = 0; j < i; j++) {
            double more = skew * random_number(random);
            s[i * k + j] += more;
            s[j * k + i] -= more;
        }
    }
}

static void random_against_oracle(void)
{
    random_state random = {41};
    unsigned sure = 0, all = rounds(4000), clamped = 0, held = 0;
    for (unsigned round = 0; round < all; round++) {
        gradblend_config config = config_of(1 + (uint32_t)random_below(&random, round % 8 ? 6 : MAX_K));
        uint32_t k = config.modalities;
        config.overfitting = (int32_t)random_below(&random, 2);
        config.negative = (int32_t)random_below(&random, 2);
        config.damping = random_below(&random, 2) ? 1e-12 : 0.25;
        double m[MAX_K], s[MAX_K * MAX_K], want[MAX_K], got[MAX_K], in_force[MAX_K], size;
        random_moments(&random, k, 3 * k, random_below(&random, 2), m, s);
        uint32_t flags, want_flags;
        bool decided = oracle_solve(&config, m, s, want, &want_flags, &size);
        try_case("round %u, K = %" PRIu32 ", overfitting %d, negative %d", round, k, config.overfitting,
                 config.negative);
        for (uint32_t i = 0; i < k; i++) {
            in_force[i] = i + 7;
        }
        OK(gradblend_solve(&config, m, s, in_force, got, &flags));
        if (!decided) {
            continue;
        }
        sure++;
        clamped += (flags & GRADBLEND_FLAG_CLAMPED) != 0;
        held += (flags & GRADBLEND_FLAG_HELD) != 0;
        CHECK(flags == want_flags);
        for (uint32_t i = 0; i < k; i++) {
            if (flags & GRADBLEND_FLAG_HELD) {
                CHECK(got[i] == in_force[i]);
            } else if (config.overfitting == GRADBLEND_UNCORRELATED) {
                /* A few roundings of each a_k, and of the sum, in which the a_k may cancel. */
                CHECK_NEAR(got[i], want[i], ldexp((k + 8) * (1 + size) * fabs(want[i]), -53));
            } else {
                CHECK((got[i] == 0) == (want[i] == 0));
            }
        }
        /* Correlated: (S + damping) w is parallel to m on the modalities that are left, as far as a solver that is
         * backward stable comes: its error is that of a matrix changed by K^2 roundings of its size. */
        if (config.overfitting == GRADBLEND_CORRELATED && !(flags & GRADBLEND_FLAG_HELD)) {
            double trace = 0, largest = 0, along = 0, square = 0, product[MAX_K];
            for (uint32_t i = 0; i < k; i++) {
                trace += s[i * k + i];
                largest = fmax(largest, fabs(got[i]));
            }
            for (uint32_t i = 0; i < k; i++) {
                product[i] = config.damping * trace / k * got[i];
                for (uint32_t j = 0; j < k; j++) {
                    product[i] += (s[i * k + j] + s[j * k + i]) / 2 * got[j];
                }
                if (got[i] != 0) {
                    along += product[i] * m[i];
                    square += m[i] * m[i];
                }
            }
            for (uint32_t i = 0; i < k; i++) {
                if (got[i] != 0) {
                    double bound = ldexp(8.0 * (k * k + 8) * (1 + config.damping) * trace * largest, -53);
                    CHECK_NEAR(product[i], along / square * m[i], bound);
                }
            }
        }
    }
    try_case("-");
    /* Else the rounds show little. */
    CHECK(all < 1000 || (sure > all / 2 && clamped > all / 20 && held > all / 50));
}

/* The output may be any of the inputs; S only matters by its symmetric part, and uncorrelated by its diagonal. */
static void arrays_may_overlap(void)
{
    random_state random = {42};
    for (unsigned round = 0; round < rounds(200); round++) {
        gradblend_config config = config_of(1 + (uint32_t)random_below(&random, 6));
        uint32_t k = config.modalities, flags[3];
        config.overfitting = (int32_t)round % 2;
        double m[MAX_K], s[MAX_K * MAX_K], weights[MAX_K], in_force[MAX_K] = {0.5, 0.25, 0.25}, spoilt[MAX_K * MAX_K];
        random_moments(&random, k, 3 * k, 1, m, s);
        try_case("round %u", round);
        OK(gradblend_solve(&config, m, s, in_force, weights, &flags[0]));
        memcpy(spoilt, s, sizeof spoilt);
        for (uint32_t i = 0; i < k * k; i++) {
            spoilt[i] = config.overfitting == GRADBLEND_CORRELATED ? s[i % k * k + i / k]
                        : i / k == i % k                           ? s[i]
                                                                   : random_number(&random);
        }
        double others[MAX_K];
        OK(gradblend_solve(&config, m, spoilt, in_force, others, &flags[1]));
        CHECK(memcmp(weights, others, k * sizeof *weights) == 0 && flags[0] == flags[1]);
        OK(gradblend_solve(&config, m, s, in_force, in_force, &flags[2]));
        CHECK(memcmp(weights, in_force, k * sizeof *weights) == 0 && flags[0] == flags[2]);
        OK(gradblend_solve(&config, m, s, m, m, &flags[2]));
        double *over = s;
        CHECK(flags[0] & GRADBLEND_FLAG_HELD || memcmp(weights, m, k * sizeof *weights) == 0);
        OK(gradblend_solve(&config, others, over, over, over, &flags[2]));
    }
}

/* reweight puts in force what solve makes of the moments: of S, or of its diagonal before there are K observations. */
static void reweight_is_solve(void)
{
    random_state random = {43};
    for (unsigned round = 0; round < rounds(400); round++) {
        gradblend_config config = config_of(1 + (uint32_t)random_below(&random, round % 8 ? 6 : MAX_K));
        uint32_t k = config.modalities;
        config.average = (int32_t)random_below(&random, 2);
        config.overfitting = (int32_t)random_below(&random, 2);
        config.negative = (int32_t)random_below(&random, 2);
        config.cadence = (int32_t)random_below(&random, 2);
        gradblend_blender *blender = blender_of(&config);
        gradblend_report before, after;
        OK(gradblend_reweight(blender, NULL));
        OK(gradblend_get_report(blender, &before, NULL));
        CHECK(before.flags == GRADBLEND_FLAG_HELD);
        unsigned turns = 1 + (unsigned)random_below(&random, 2 * k);
        for (unsigned turn = 0; turn < turns; turn++) {
            try_case("round %u, K = %" PRIu32 ", turn %u", round, k, turn);
            double sums[2 * MAX_K], s[MAX_K * MAX_K], weights[MAX_K];
            for (uint32_t i = 0; i < 2 * k; i++) {
                sums[i] = random_number(&random) + (i < k ? 0.3 : 0);
            }
            put_sums(blender, k, sums);
            OK(gradblend_get_report(blender, &before, NULL));
            OK(gradblend_observe(blender, NULL));
            if (config.cadence == GRADBLEND_ON_REQUEST) {
                OK(gradblend_get_report(blender, &after, NULL));
                CHECK(memcmp(before.weights, after.weights, sizeof before.weights) == 0);
                OK(gradblend_reweight(blender, NULL));
            }
            OK(gradblend_get_report(blender, &after, NULL));
            OK(gradblend_get_second_moments(blender, s, NULL));
            gradblend_config used = config;
            if (after.observed < k) {
                used.overfitting = GRADBLEND_UNCORRELATED;
            }
            uint32_t flags;
            OK(gradblend_solve(&used, after.mean, s, before.weights, weights, &flags));
            CHECK(memcmp(weights, after.weights, k * sizeof *weights) == 0);
            CHECK(flags == after.flags);
        }
        gradblend_blender_destroy(blender);
    }
}

int main(int count, char **args)
{
    set_up(count, args);
    closed_forms();
    random_against_oracle();
    arrays_may_overlap();
    reweight_is_solve();
    printf("solve: %zu closed forms, %u random\n", COUNT(FORMS), rounds(4000));
    return 0;
}
