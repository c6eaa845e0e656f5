/*
 * A program that the header of version 0.1.0 (with OLD) and this one compile, and that runs with this library and with
 * one that has the ABI of 0.1.0. It accesses no byte of a record that the other side does not know.
 */
#ifdef OLD
#include "0.1.0/gradblend.h"
#else
#include "gradblend.h"
#endif

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 0xa5, ROOM = 4096 };
static const size_t FIRST_CONFIG = 48, FIRST_REPORT = 1072;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            char message[512] = "";                                                                                    \
            gradblend_last_error(message, sizeof message);                                                             \
            fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #condition, message);                   \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* A record in front of guard bytes. */
typedef union {
    gradblend_config config;
    gradblend_report report;
    unsigned char bytes[ROOM];
} record;

/* Whether the guard bytes from `size` on are there. */
static int guarded(const record *record, size_t size) {
    while (size < ROOM && record->bytes[size] == GUARD) size++;
    return size == ROOM;
}

/* A blender with weights 0.8 and 0.2. */
static gradblend_blender *blender_new(const gradblend_config *config) {
    static float t[] = {1, 2}, g[] = {1, 1}, video[] = {1, 0.5f}, audio[] = {0.5f, 1}, blended[2];
    static const void *const v[] = {video, audio};
    const gradblend_tensor tensor = {2, GRADBLEND_F32, t, g, v, blended};
    gradblend_blender *blender;
    gradblend_plan *plan;
    CHECK(gradblend_blender_create(GRADBLEND_CPU, config, &blender) == GRADBLEND_OK);
    CHECK(gradblend_plan_create(blender, &tensor, 1, &plan) == GRADBLEND_OK);
    CHECK(gradblend_step(blender, plan, NULL) == GRADBLEND_OK && gradblend_reweight(blender, NULL) == GRADBLEND_OK);
    return blender;
}

int main(void) {
    static record config, report, before;
    memset(&config, GUARD, sizeof config);
    CHECK(gradblend_config_default(2, &config.config) == GRADBLEND_OK);
#ifdef OLD
    const size_t config_bytes = FIRST_CONFIG, report_bytes = FIRST_REPORT;
#else
    const int new_library = gradblend_version() > (1u << 8);
    const size_t config_bytes = new_library ? sizeof(gradblend_config) : FIRST_CONFIG;
    const size_t report_bytes = new_library ? sizeof(gradblend_report) : FIRST_REPORT;
#endif
    CHECK(config.config.size == config_bytes && guarded(&config, config_bytes));
    static const double m[] = {1, 1}, s[] = {1, 0, 0, 4};
    double weights[2];
    uint32_t flags = 77;
    CHECK(gradblend_solve(&config.config, m, s, NULL, weights, &flags) == GRADBLEND_OK && flags == 0);
    CHECK(fabs(weights[0] - 0.8) < 1e-9 && fabs(weights[1] - 0.2) < 1e-9);
    gradblend_blender *blender = blender_new(&config.config);

    /* What a program of version 0.1.0 has in `size` is anything. */
    static const uint32_t sizes[] = {0, 1, 0xa5a5a5a5, sizeof(gradblend_report)};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        memset(&report, GUARD, sizeof report);
        report.report.size = sizes[i];
        before = report;
        gradblend_status status = gradblend_get_report(blender, &report.report, NULL);
        if (config_bytes > FIRST_CONFIG && sizes[i] < FIRST_REPORT) {
            CHECK(status == GRADBLEND_INVALID_ARGUMENT && memcmp(&report, &before, sizeof report) == 0);
            continue;
        }
        CHECK(status == GRADBLEND_OK && report.report.size == report_bytes && guarded(&report, report_bytes));
        CHECK(fabs(report.report.weights[0] - 0.8) < 1e-9 && report.report.observed == 1);
    }

#ifndef OLD
    if (new_library) {
        /* A record of any size gets as many bytes, and none past it. */
        record whole = {.report = {.size = sizeof whole.report}};
        CHECK(gradblend_get_report(blender, &whole.report, NULL) == GRADBLEND_OK && whole.report.effective == 1);
        for (uint32_t size = 0; size < sizeof(gradblend_report) + 64; size++) {
            memset(&report, GUARD, sizeof report);
            report.report.size = size;
            before = report;
            const int fits = size >= FIRST_REPORT;
            CHECK(gradblend_get_report(blender, &report.report, NULL) == (fits ? GRADBLEND_OK : GRADBLEND_INVALID_ARGUMENT));
            if (fits) {
                const uint32_t written = report.report.size;
                CHECK(written <= size && written + 8 > (size < sizeof whole.report ? size : sizeof whole.report));
                CHECK(guarded(&report, written) && memcmp(report.bytes + 4, whole.bytes + 4, written - 4) == 0);
            } else {
                CHECK(memcmp(&report, &before, sizeof report) == 0);
            }
        }
        /* Least weights are read, unless the record says that it has none. */
        const uint32_t read[] = {sizeof(gradblend_config), (uint32_t)FIRST_CONFIG};
        for (int i = 0; i < 2; i++) {
            gradblend_config floors = config.config;
            floors.min_weight[1] = 0.5;
            floors.size = read[i];
            gradblend_blender *other = blender_new(&floors);
            report.report.size = sizeof report.report;
            CHECK(gradblend_get_report(other, &report.report, NULL) == GRADBLEND_OK);
            CHECK(fabs(report.report.weights[1] - (i == 0 ? 0.5 : 0.2)) < 1e-9);
            CHECK(report.report.flags == (i == 0 ? (uint32_t)GRADBLEND_FLAG_FLOORED : 0));
            CHECK(i != 0 || report.report.floored == 2);
            gradblend_blender_destroy(other);
            CHECK(gradblend_solve(&floors, m, s, NULL, weights, &flags) == GRADBLEND_OK);
            CHECK(fabs(weights[1] - (i == 0 ? 0.5 : 0.2)) < 1e-9 && flags == report.report.flags);
        }
        /* Any other size is rejected, by name, before the record is read. */
        for (uint32_t size = 0; size < sizeof(gradblend_config) + 64; size++) {
            if (size == FIRST_CONFIG || size == sizeof(gradblend_config)) continue;
            gradblend_config wrong = config.config;
            wrong.size = size;
            gradblend_blender *other = NULL;
            char message[256] = "";
            CHECK(gradblend_solve(&wrong, m, s, NULL, weights, &flags) == GRADBLEND_INVALID_ARGUMENT);
            gradblend_last_error(message, sizeof message);
            CHECK(strstr(message, "size"));
            CHECK(gradblend_blender_create(GRADBLEND_CPU, &wrong, &other) == GRADBLEND_INVALID_ARGUMENT && !other);
        }
    }
#endif
    gradblend_blender_destroy(blender);
    printf("%zu bytes of a configuration, %zu of a report\n", config_bytes, report_bytes);
    return 0;
}
