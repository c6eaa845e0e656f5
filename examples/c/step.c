/*
 * Online Gradient-Blending from C, on random gradients of a network with two encoders: one gradblend_step a step.
 *
 *     cargo rustc --release --features capi --crate-type cdylib
 *     cc -std=c11 -Iinclude examples/c/step.c -Ltarget/release -lgradblend -ldl -lm -o target/c_step
 *     LD_LIBRARY_PATH=target/release target/c_step [--device N]     (-1: the CPU, the default)
 */
#include <gradblend.h>

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Losses: video, audio, and both fused. Buffers of a tensor: t, g, v_0 .. v_2, blended. */
enum { K = 3, BUFFERS = K + 3, BLENDED = K + 2, TENSORS = 3, STEPS = 200, ELEMENTS = 4500 };
/* Tensors: the video encoder, which the audio loss does not reach, the audio encoder, and the fused head. */
static const uint64_t LEN[TENSORS] = {3000, 1000, 500};
static const int REACHES[TENSORS][K] = {{1, 0, 1}, {0, 1, 1}, {0, 0, 1}};
/* Amplitude of the noise on t, g and v_k, whose true value is 1. The noisier v_k is, the more it overfits. */
static const double NOISE[BLENDED] = {1.0, 0.3, 1.0, 4.0, 2.0};

static void check(gradblend_status status) {
    char message[256];
    if (status != GRADBLEND_OK) {
        gradblend_last_error(message, sizeof message);
        fprintf(stderr, "%s: %s\n", gradblend_status_name(status), message);
        exit(1);
    }
}

/* Calls a function of the CUDA driver. A trainer has its gradients on the device and needs none of this. */
static void *driver;
#define CUDA(name, parameters, ...)                                                                                    \
    do {                                                                                                               \
        int(*call) parameters;                                                                                         \
        *(void **)&call = driver ? dlsym(driver, name) : NULL;                                                         \
        if (!call || call(__VA_ARGS__) != 0) {                                                                         \
            fprintf(stderr, "%s failed\n", name);                                                                      \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

int main(int argc, char **argv) {
    int device = GRADBLEND_CPU;
    char rest; /* after a number there is nothing */
    if (argc != 1 && (argc != 3 || strcmp(argv[1], "--device") != 0 || sscanf(argv[2], "%9d%c", &device, &rest) != 1)) {
        fprintf(stderr, "usage: %s [--device N]\n", argv[0]);
        return 2;
    }
    gradblend_config config;
    gradblend_blender *blender;
    check(gradblend_config_default(K, &config));
    check(gradblend_blender_create(device, &config, &blender));

    /* All buffers in one allocation, and the same on a CUDA device. */
    static float host[BUFFERS * ELEMENTS];
    unsigned long long memory = (uintptr_t)host;
    if (device != GRADBLEND_CPU) {
        void *context;
        driver = dlopen("libcuda.so.1", RTLD_NOW);
        CUDA("cuInit", (unsigned), 0);
        CUDA("cuDevicePrimaryCtxRetain", (void **, int), &context, device);
        CUDA("cuCtxSetCurrent", (void *), context);
        CUDA("cuMemAlloc_v2", (unsigned long long *, size_t), &memory, sizeof host);
    }
    gradblend_tensor tensors[TENSORS];
    const void *modalities[TENSORS][K];
    float *start[TENSORS]; /* of the tensor's buffers on the host */
    for (int p = 0, used = 0; p < TENSORS; used += BUFFERS * (int)LEN[p], p++) {
        float *first = (float *)(uintptr_t)memory + used;
        start[p] = host + used;
        for (int k = 0; k < K; k++) modalities[p][k] = REACHES[p][k] ? first + (2 + (uint64_t)k) * LEN[p] : NULL;
        tensors[p] = (gradblend_tensor){LEN[p], GRADBLEND_F32, first, first + LEN[p], modalities[p],
                                        first + BLENDED * LEN[p]};
    }
    /* All checks happen here. The records are not needed after this, the gradients are. */
    gradblend_plan *plan;
    check(gradblend_plan_create(blender, tensors, TENSORS, &plan));

    gradblend_report report = {.size = sizeof report};
    double error = 0;
    check(gradblend_get_report(blender, &report, NULL));
    for (int step = 0; step < STEPS; step++) {
        /* In place of backward passes. */
        for (int p = 0; p < TENSORS; p++) {
            for (uint64_t i = 0; i < BLENDED * LEN[p]; i++) {
                start[p][i] = (float)(1 + NOISE[i / LEN[p]] * (2.0 * rand() / RAND_MAX - 1));
            }
        }
        if (driver) CUDA("cuMemcpyHtoD_v2", (unsigned long long, const void *, size_t), memory, host, sizeof host);
        /* Products, moments and the blend in one pass over memory; then the weights for the next step. */
        check(gradblend_step(blender, plan, NULL));
        check(gradblend_reweight(blender, NULL));
        if (driver) CUDA("cuMemcpyDtoH_v2", (void *, unsigned long long, size_t), host, memory, sizeof host);
        /* In place of an optimiser: compare the blend with the sum in double. */
        for (int p = 0; p < TENSORS; p++) {
            for (uint64_t i = 0; i < LEN[p]; i++) {
                double sum = 0;
                for (int k = 0; k < K; k++) sum += REACHES[p][k] * report.weights[k] * start[p][(2 + k) * LEN[p] + i];
                error = fmax(error, fabs(start[p][BLENDED * LEN[p] + i] - sum));
            }
        }
        check(gradblend_get_report(blender, &report, NULL));
    }
    static const char *const names[K] = {"video", "audio", "fused"};
    for (int k = 0; k < K; k++) printf("%s  weight %.3f  OGR %.3f\n", names[k], report.weights[k], report.ogr[k]);
    printf("OGR of the blend %.3f, of uniform weights %.3f; largest error of the blend %.1e\n", report.ogr_blend,
           report.ogr_uniform, error);
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);
    if (driver) CUDA("cuMemFree_v2", (unsigned long long), memory);
    double sum = report.weights[0] + report.weights[1] + report.weights[2];
    /* |v_k| <= 5 and K + 1 roundings to f32: far below 1e-5. */
    return error < 1e-5 && fabs(sum - 1) < 1e-12 && report.ogr_blend <= report.ogr_uniform ? 0 : 1;
}
