/* Random lists of tensors, and the oracle: naive loops in double that share nothing with the library. */
#ifndef PROBLEM_H
#define PROBLEM_H

#include "check.h"

/* A list in memory of its own, which starts a few elements in. */
typedef struct {
    void *memory;
    uint32_t offset;
    double *exact; /* what its elements are, read by problem_read */
} list;

/* Lists of one tensor: train, valid, the K modality gradients, blended. */
enum { TRAIN = 0, VALID = 1, MODALITY = 2, BLENDED = MODALITY + MAX_K, LISTS = BLENDED + 1 };

typedef struct {
    list lists[LISTS];
    const void *addresses[MAX_K];
    int over; /* modality that is blended over, or -1 */
    double *before; /* what was in `blended` when it was read last */
} grads;

typedef struct {
    uint32_t k;
    uint64_t count;
    grads *grads;
    gradblend_tensor *tensors;
} problem;

/* What is before the start of a list, which nothing may write to. */
enum { GUARD = 0xa5 };

static inline void *list_start(const list *list, int32_t dtype)
{
    return list->memory ? (char *)list->memory + list->offset * DTYPES[dtype].bytes : NULL;
}

static inline void list_make(list *list, int32_t dtype, uint64_t len, uint32_t offset)
{
    size_t size = DTYPES[dtype].bytes;
    list->memory = memory_new((len + offset) * size);
    list->offset = offset;
    memset(list->memory, GUARD, offset * size);
}

static inline void list_free(list *list)
{
    if (list->memory) {
        memory_free(list->memory);
        free(list->exact);
    }
}

static inline void list_check_guard(const list *list, int32_t dtype)
{
    for (size_t i = 0; list->memory && i < list->offset * DTYPES[dtype].bytes; i++) {
        CHECK(((unsigned char *)list->memory)[i] == GUARD);
    }
}

/* The tensor as the library is to see it. */
static inline void problem_bind(problem *problem, uint64_t index)
{
    grads *grads = &problem->grads[index];
    gradblend_tensor *tensor = &problem->tensors[index];
    tensor->train = list_start(&grads->lists[TRAIN], tensor->dtype);
    tensor->valid = list_start(&grads->lists[VALID], tensor->dtype);
    for (uint32_t k = 0; k < problem->k; k++) {
        grads->addresses[k] = list_start(&grads->lists[MODALITY + k], tensor->dtype);
    }
    tensor->modalities = grads->addresses;
    list *blended = &grads->lists[grads->over >= 0 ? MODALITY + grads->over : BLENDED];
    tensor->blended = list_start(blended, tensor->dtype);
}

/* Lengths at which something changes: of vectors and, rarely, of chunks. */
static inline uint64_t random_length(random_state *random, uint32_t k)
{
    static const uint16_t lengths[] = {0, 0, 1, 1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33, 63, 65, 127, 255, 257, 511, 1023};
    if (random_below(random, 40 * k) == 0) {
        return 65535 + random_below(random, 3);
    }
    return lengths[random_below(random, COUNT(lengths))];
}

/*
 * Up to 6 tensors of mixed dtypes and lengths, lists misaligned by elements; modalities absent here and there, blended
 * apart, in place, or not at all, with and without train and validation gradients. One seed makes the same lists.
 */
static inline problem *problem_new(uint64_t seed, uint32_t k)
{
    random_state random = {seed};
    problem *problem = calloc(1, sizeof *problem);
    CHECK(problem);
    problem->k = k;
    problem->count = random_below(&random, 7);
    problem->grads = calloc(problem->count + 1, sizeof *problem->grads);
    problem->tensors = calloc(problem->count + 1, sizeof *problem->tensors);
    CHECK(problem->grads && problem->tensors);
    for (uint64_t index = 0; index < problem->count; index++) {
        grads *grads = &problem->grads[index];
        gradblend_tensor *tensor = &problem->tensors[index];
        tensor->len = random_length(&random, k);
        tensor->dtype = (int32_t)random_below(&random, 3);
        bool dots = random_below(&random, 5) != 0;
        uint64_t absent = random_below(&random, 3) == 0 ? 3 : 1000;
        double size = ldexp(1, (int)random_below(&random, 5) - 3);
        grads->over = -1;
        for (uint32_t which = 0; which < LISTS; which++) {
            list *list = &grads->lists[which];
            bool there = which < MODALITY ? dots : which != BLENDED ? which < MODALITY + k : true;
            if (which >= MODALITY && which < BLENDED && random_below(&random, absent) == 0) {
                there = false;
            }
            /* A third is blended in place, and a sixth not at all, as far as the modality drawn is there. */
            uint64_t draw = random_below(&random, 6);
            if (which == BLENDED && draw < 3) {
                uint32_t over = (uint32_t)random_below(&random, k);
                grads->over = draw > 0 && grads->lists[MODALITY + over].memory ? (int)over : -1;
                there = false;
            }
            if (!there) {
                continue;
            }
            list_make(list, tensor->dtype, tensor->len, (uint32_t)random_below(&random, 5));
            list->exact = calloc(tensor->len + 1, sizeof *list->exact);
            CHECK(list->exact);
            for (uint64_t i = 0; i < tensor->len; i++) {
                list_set(tensor->dtype, list_start(list, tensor->dtype), i, size * random_number(&random));
            }
        }
        /* Now and then something that is not finite. */
        list *spoilt = &grads->lists[random_below(&random, MODALITY + k)];
        if (random_below(&random, 60) == 0 && spoilt->memory && tensor->len > 0) {
            double bad = random_below(&random, 2) ? (double)NAN : -(double)INFINITY;
            list_set(tensor->dtype, list_start(spoilt, tensor->dtype), random_below(&random, tensor->len), bad);
        }
        grads->before = calloc(tensor->len + 1, sizeof *grads->before);
        CHECK(grads->before);
        problem_bind(problem, index);
    }
    return problem;
}

/* Reads what the lists hold, for the oracle, and checks that nothing wrote before a list. */
static inline void problem_read(problem *problem)
{
    finish();
    for (uint64_t index = 0; index < problem->count; index++) {
        grads *grads = &problem->grads[index];
        const gradblend_tensor *tensor = &problem->tensors[index];
        for (uint32_t which = 0; which < LISTS; which++) {
            list *list = &grads->lists[which];
            list_check_guard(list, tensor->dtype);
            for (uint64_t i = 0; list->memory && i < tensor->len; i++) {
                list->exact[i] = list_get(tensor->dtype, list_start(list, tensor->dtype), i);
            }
        }
        for (uint64_t i = 0; tensor->blended && i < tensor->len; i++) {
            grads->before[i] = list_get(tensor->dtype, tensor->blended, i);
        }
    }
}

/* Moves every list to other memory, at another offset. */
static inline void problem_move(problem *problem, random_state *random)
{
    finish();
    for (uint64_t index = 0; index < problem->count; index++) {
        grads *grads = &problem->grads[index];
        const gradblend_tensor *tensor = &problem->tensors[index];
        for (uint32_t which = 0; which < LISTS; which++) {
            list *from = &grads->lists[which], to = *from;
            if (from->memory) {
                list_make(&to, tensor->dtype, tensor->len, (uint32_t)random_below(random, 5));
                size_t bytes = tensor->len * DTYPES[tensor->dtype].bytes;
                memcpy(list_start(&to, tensor->dtype), list_start(from, tensor->dtype), bytes);
                /* Whoever still reads or writes there is not let alone. */
                memset(from->memory, GUARD, bytes);
                memory_free(from->memory);
                *from = to;
            }
        }
        problem_bind(problem, index);
    }
}

/* Makes the train and validation gradients, or a modality, of a tensor NULL. */
static inline void problem_drop(problem *problem, uint64_t index, uint32_t which)
{
    finish();
    grads *grads = &problem->grads[index];
    uint32_t last = which < MODALITY ? VALID : which;
    for (which = which < MODALITY ? TRAIN : which; which <= last; which++) {
        list *list = &grads->lists[which];
        if ((int)which - MODALITY == grads->over) {
            grads->over = -1;
        }
        list_free(list);
        memset(list, 0, sizeof *list);
    }
    problem_bind(problem, index);
}

static inline void problem_free(problem *problem)
{
    finish();
    for (uint64_t index = 0; index < problem->count; index++) {
        grads *grads = &problem->grads[index];
        for (uint32_t which = 0; which < LISTS; which++) {
            list_check_guard(&grads->lists[which], problem->tensors[index].dtype);
            list_free(&grads->lists[which]);
        }
        free(grads->before);
    }
    free(problem->grads);
    free(problem->tensors);
    free(problem);
}

/* Sums of the oracle, c then d, with the sums of the magnitudes of their terms. */
typedef struct {
    double value[2 * MAX_K], size[2 * MAX_K];
    double elements;
} oracle_sums;

static inline void oracle_dot(oracle_sums *sums, const problem *problem)
{
    for (uint64_t index = 0; index < problem->count; index++) {
        const list *lists = problem->grads[index].lists;
        if (!lists[TRAIN].memory) {
            continue;
        }
        const double *t = lists[TRAIN].exact, *g = lists[VALID].exact;
        for (uint32_t k = 0; k < problem->k; k++) {
            const double *v = lists[MODALITY + k].exact;
            for (uint64_t i = 0; v && i < problem->tensors[index].len; i++) {
                double terms[2] = {g[i] * v[i], (t[i] - g[i]) * v[i]};
                for (uint32_t half = 0; half < 2; half++) {
                    sums->value[half * problem->k + k] += terms[half];
                    sums->size[half * problem->k + k] += fabs(terms[half]);
                }
            }
        }
        sums->elements += (double)problem->tensors[index].len;
    }
}

/* 2^-16 of the magnitudes is what the library promises, and 2^-149 an element for underflow. */
static inline void oracle_check_sums(const oracle_sums *sums, uint32_t k, const double *got)
{
    for (uint32_t i = 0; i < 2 * k; i++) {
        if (isfinite(sums->value[i])) {
            CHECK_NEAR(got[i], sums->value[i], ldexp(sums->size[i], -16) + ldexp(sums->elements, -149));
        } else {
            CHECK(!isfinite(got[i]));
        }
    }
}

/* Checks a blend: 2K roundings of f32, and one to the dtype. */
static inline void oracle_check_blend(const problem *problem, const float *weights, bool accumulate)
{
    finish();
    for (uint64_t index = 0; index < problem->count; index++) {
        const gradblend_tensor *tensor = &problem->tensors[index];
        const grads *grads = &problem->grads[index];
        for (uint64_t i = 0; tensor->blended && i < tensor->len; i++) {
            double want = accumulate ? grads->before[i] : 0, size = fabs(want);
            for (uint32_t k = 0; k < problem->k; k++) {
                const double *v = grads->lists[MODALITY + k].exact;
                double term = v ? weights[k] * v[i] : 0;
                want += term;
                size += fabs(term);
            }
            double got = list_get(tensor->dtype, tensor->blended, i);
            const dtype_facts *facts = &DTYPES[tensor->dtype];
            double sums = ldexp(2.0 * (problem->k + 1) * size, -24);
            double bound = sums + dtype_eps(tensor->dtype) * (fabs(want) + sums) + ldexp(1, facts->least);
            double largest = dtype_exact(tensor->dtype, facts->infinity - 1);
            if (!isfinite(want)) {
                CHECK(!isfinite(got));
            } else if (!(isinf(got) && signbit(got) == signbit(want) && fabs(want) + bound > largest)) {
                CHECK_NEAR(got, want, bound);
            }
        }
    }
}

/* The observations since the last reset, and what they come to, straight from the definitions. */
enum { MAX_SEEN = 64 };
typedef struct {
    uint32_t k, seen;
    uint64_t skipped;
    uint32_t nonfinite; /* modalities of the latest */
    double products[MAX_SEEN][2 * MAX_K];
} oracle_moments;

static inline void oracle_observe(oracle_moments *moments, const double *sums, double scale)
{
    uint32_t k = moments->k;
    double *products = moments->products[moments->seen];
    CHECK(moments->seen < MAX_SEEN);
    moments->nonfinite = 0;
    for (uint32_t i = 0; i < 2 * k; i++) {
        /* A factor that is not finite spoils the observation, which dividing by infinity would hide. */
        products[i] = isfinite(scale) ? sums[i] / (scale * scale) : (double)NAN;
        if (!isfinite(products[i])) {
            moments->nonfinite |= 1u << i % k;
        }
    }
    moments->seen += moments->nonfinite == 0;
    moments->skipped += moments->nonfinite != 0;
}

/* The mean of a product, or of the product of two, with the mean of its magnitude. */
static inline double oracle_mean(const oracle_moments *moments, const gradblend_config *config, uint32_t i, int j,
                                 double *size)
{
    long double sum = 0, magnitude = 0, shares = 0, share = 1;
    for (uint32_t n = moments->seen; n-- > 0;) {
        const double *products = moments->products[n];
        long double product = (long double)products[i] * (j < 0 ? 1 : products[j]);
        sum += share * product;
        magnitude += share * fabsl(product);
        shares += share;
        share *= config->average == GRADBLEND_EMA ? (long double)config->decay : 1;
    }
    *size = moments->seen ? (double)(magnitude / shares) : 0;
    return moments->seen ? (double)(sum / shares) : 0;
}

/* sqrt(w'Sw) / |w'm| lies where the roundings of both allow. */
static inline void oracle_check_ratio(double got, const double *w, const double *m, const double *s, uint32_t k)
{
    double variance = 0, variance_size = 0, gain = 0, gain_size = 0, eps = ldexp(4.0 * (k * k + 4), -53);
    for (uint32_t i = 0; i < k; i++) {
        gain += w[i] * m[i];
        gain_size += fabs(w[i] * m[i]);
        for (uint32_t j = 0; j < k; j++) {
            variance += w[i] * w[j] * s[i * k + j];
            variance_size += fabs(w[i] * w[j] * s[i * k + j]);
        }
    }
    double low = sqrt(fmax(variance - eps * variance_size, 0)) / (fabs(gain) + eps * gain_size);
    double high = sqrt(fmax(variance + eps * variance_size, 0)) / fmax(fabs(gain) - eps * gain_size, 0);
    if (isnan(got)) {
        /* 0 / 0. */
        CHECK(variance <= eps * variance_size && fabs(gain) <= eps * gain_size);
    } else {
        CHECK(isnan(low) || got >= low * (1 - eps));
        CHECK(isnan(high) || got <= high * (1 + eps));
    }
}

/* Checks moments, counters and ratios of a report, and S, against the observations. */
static inline void oracle_check_report(const oracle_moments *moments, const gradblend_config *config,
                                       gradblend_blender *blender)
{
    uint32_t k = moments->k;
    gradblend_report report;
    double *s = calloc(k * k, sizeof *s), uniform[MAX_K];
    CHECK(s);
    memset(&report, GUARD, sizeof report);
    OK(gradblend_get_report(blender, &report, NULL));
    OK(gradblend_get_second_moments(blender, s, NULL));
    CHECK(report.size == sizeof report && report.modalities == k);
    CHECK(report.observed == moments->seen);
    CHECK(report.skipped == moments->skipped);
    CHECK(report.nonfinite == moments->nonfinite);
    CHECK(!(report.flags & GRADBLEND_FLAG_NONFINITE) == !moments->nonfinite);
    CHECK(report.flags <= 7);
    /* Every observation rounds a few times what is there. */
    double eps = ldexp(4.0 * (moments->seen + 4), -53);
    for (uint32_t i = 0; i < k; i++) {
        uniform[i] = 1.0 / k;
        double size, want = oracle_mean(moments, config, i, -1, &size);
        CHECK_NEAR(report.mean[i], want, eps * size);
        CHECK(memcmp(&report.second_moment[i], &s[i * k + i], sizeof *s) == 0);
        for (uint32_t j = 0; j < k; j++) {
            want = oracle_mean(moments, config, k + i, (int)(k + j), &size);
            CHECK_NEAR(s[i * k + j], want, eps * size);
        }
        double ogr = sqrt(s[i * k + i]) / fabs(report.mean[i]);
        CHECK((isnan(ogr) && isnan(report.ogr[i])) || report.ogr[i] == ogr ||
              fabs(report.ogr[i] - ogr) <= ldexp(ogr, -51));
    }
    for (uint32_t i = k; i < MAX_K; i++) {
        CHECK(report.weights[i] == 0 && report.mean[i] == 0 && report.second_moment[i] == 0 && report.ogr[i] == 0);
    }
    oracle_check_ratio(report.ogr_blend, report.weights, report.mean, s, k);
    oracle_check_ratio(report.ogr_uniform, uniform, report.mean, s, k);
    float weights[MAX_K];
    weights_of(blender, k, weights);
    for (uint32_t i = 0; i < k; i++) {
        CHECK(weights[i] == (float)report.weights[i]);
    }
    free(s);
}

#endif
