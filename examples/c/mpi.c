/*
 * Gradient-Blending of sharded gradients from C: each rank holds a part of every tensor, and MPI adds the sums up.
 *
 *     cargo rustc --release --features capi --crate-type cdylib
 *     mpicc -std=c11 -Iinclude examples/c/mpi.c -Ltarget/release -lgradblend -lm -o target/c_mpi
 *     LD_LIBRARY_PATH=target/release mpirun -n 4 target/c_mpi
 */
#include <gradblend.h>

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Losses: video, audio, and both fused. Buffers of a tensor: t, g, v_0 .. v_2, blended. */
enum { K = 3, BUFFERS = K + 3, BLENDED = K + 2, TENSORS = 4, STEPS = 200, ELEMENTS = 4503 };
/* Tensors: the video encoder, which the audio loss does not reach, the audio encoder, the fused head, and its bias. */
static const uint64_t LEN[TENSORS] = {3000, 1000, 500, 3};
static const int REACHES[TENSORS][K] = {{1, 0, 1}, {0, 1, 1}, {0, 0, 1}, {0, 0, 1}};
/* Amplitude of the noise on t, g and v_k, whose true value is 1. The noisier v_k is, the more it overfits. */
static const double NOISE[BLENDED] = {1.0, 0.3, 1.0, 4.0, 2.0};

static int rank, ranks;

/* Ends all ranks: one that ended alone would leave the others waiting. */
static void fail(const char *what, const char *why) {
    fprintf(stderr, "rank %d: %s: %s\n", rank, what, why);
    MPI_Abort(MPI_COMM_WORLD, 1);
    exit(1);
}

static void check(gradblend_status status) {
    char message[256];
    if (status != GRADBLEND_OK) {
        gradblend_last_error(message, sizeof message);
        fail(gradblend_status_name(status), message);
    }
}

/* By default MPI ends the job at an error; a program may have changed that. */
static void check_mpi(int code) {
    char message[MPI_MAX_ERROR_STRING] = "";
    int length;
    if (code != MPI_SUCCESS) {
        MPI_Error_string(code, message, &length);
        fail("MPI", message);
    }
}

/* Exits unless `value` is the same on all ranks: with another K, they would add up arrays of other lengths. */
static void check_same(const char *what, int value) {
    int least, most;
    check_mpi(MPI_Allreduce(&value, &least, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD));
    check_mpi(MPI_Allreduce(&value, &most, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD));
    if (least != most) fail(what, "differs between ranks");
}

/* Returns 1 if the numbers have the same bytes on all ranks, on all ranks. */
static int same_bytes(const double *numbers, size_t count) {
    unsigned char *all = malloc(count * sizeof *numbers * (size_t)ranks);
    int bytes = (int)(count * sizeof *numbers), same = 1;
    if (!all) fail("malloc", "out of memory");
    check_mpi(MPI_Allgather(numbers, bytes, MPI_BYTE, all, bytes, MPI_BYTE, MPI_COMM_WORLD));
    for (int other = 0; other < ranks; other++) {
        same = same && memcmp(all + (size_t)other * (size_t)bytes, numbers, (size_t)bytes) == 0;
    }
    free(all);
    return same;
}

int main(int argc, char **argv) {
    check_mpi(MPI_Init(&argc, &argv));
    check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, &rank));
    check_mpi(MPI_Comm_size(MPI_COMM_WORLD, &ranks));
    gradblend_config config;
    gradblend_blender *blender = NULL;
    check(gradblend_config_default(K, &config));
    config.threads = 1; /* each core has a process */
    check(gradblend_blender_create(GRADBLEND_CPU, &config, &blender));
    check_same("the number of modalities", (int)config.modalities);

    /* This rank's part of each tensor. A trainer has no more than that; here all ranks draw the same whole tensors. With
     * more ranks than elements, parts are empty. */
    static float whole[BUFFERS * ELEMENTS];
    gradblend_tensor tensors[TENSORS];
    const void *modalities[TENSORS][K];
    for (int p = 0, used = 0; p < TENSORS; used += BUFFERS * (int)LEN[p], p++) {
        uint64_t from = LEN[p] * (uint64_t)rank / (uint64_t)ranks, to = LEN[p] * ((uint64_t)rank + 1) / (uint64_t)ranks;
        float *first = whole + used + from;
        for (int k = 0; k < K; k++) modalities[p][k] = REACHES[p][k] ? first + (2 + (uint64_t)k) * LEN[p] : NULL;
        tensors[p] = (gradblend_tensor){to - from, GRADBLEND_F32, first, first + LEN[p], modalities[p],
                                        first + BLENDED * LEN[p]};
    }
    gradblend_plan *plan = NULL;
    check(gradblend_plan_create(blender, tensors, TENSORS, &plan));
    double *sums; /* at the same address for the blender's life */
    uint32_t count;
    check(gradblend_pending_sums(blender, &sums, &count));

    for (int step = 0; step < STEPS; step++) {
        /* In place of backward passes and a reduce-scatter. */
        for (int p = 0, used = 0; p < TENSORS; used += BUFFERS * (int)LEN[p], p++) {
            for (uint64_t i = 0; i < BLENDED * LEN[p]; i++) {
                whole[(uint64_t)used + i] = (float)(1 + NOISE[i / LEN[p]] * (2.0 * rand() / RAND_MAX - 1));
            }
        }
        /* Products of this rank's parts; their sums over ranks are the products of the whole gradients. */
        check(gradblend_pass(blender, plan, GRADBLEND_DOT | GRADBLEND_BLEND, NULL));
        check_mpi(MPI_Allreduce(MPI_IN_PLACE, sums, (int)count, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD));
        check(gradblend_observe(blender, NULL));
        check(gradblend_reweight(blender, NULL));
    }
    gradblend_report report = {.size = sizeof report};
    check(gradblend_get_report(blender, &report, NULL));
    static const char *const names[K] = {"video", "audio", "fused"};
    for (int k = 0; rank == 0 && k < K; k++) {
        printf("%s  weight %.6f  OGR %.3f\n", names[k], report.weights[k], report.ogr[k]);
    }
    int same = same_bytes(report.weights, K);
    if (!same && rank == 0) fprintf(stderr, "the weights of the ranks differ\n");
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);
    check_mpi(MPI_Finalize());
    return same && report.observed == STEPS ? 0 : 1;
}
