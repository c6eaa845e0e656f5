/*
 * Online Gradient-Blending from C: a small network of two encoders, whose gradients are made up here, blended at each
 * step. On the CPU by default; with --device N on a CUDA device, whose memory is taken from the driver.
 *
 *     cargo rustc --release --features capi --crate-type cdylib
 *     cc -std=c11 -Iinclude examples/c/step.c -Ltarget/release -lgradblend -ldl -lm -o target/c_step
 *     LD_LIBRARY_PATH=target/release target/c_step [--device N]
 */
#include <gradblend.h>

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Modalities: video, audio, and both fused. */
enum { VIDEO, AUDIO, FUSED, K };
/* Parameter tensors: the video encoder, which the audio loss does not reach, the audio encoder, and the fused head. */
enum { TENSORS = 3, STEPS = 200 };
static const uint64_t LEN[TENSORS] = {3000, 1000, 500};
static const int REACHES[TENSORS][K] = {{1, 0, 1}, {0, 1, 1}, {0, 0, 1}};
/* How noisy the gradient of each loss is: the noisier it is, the more its step overfits. */
static const double NOISE[K] = {0.5, 2.0, 1.0};

/* What a program does with a status. */
static void check(gradblend_status status, const char *what) {
    char message[256];
    if (status == GRADBLEND_OK) return;
    gradblend_last_error(message, sizeof message);
    fprintf(stderr, "%s: %s (%s)\n", what, message, gradblend_status_name(status));
    exit(1);
}

/* The driver's functions that a CUDA device needs, and nothing else of CUDA. A trainer has its memory anyway. */
static struct {
    int (*init)(unsigned);
    int (*device)(int *, int);
    int (*retain)(void **, int);
    int (*current)(void *);
    int (*alloc)(unsigned long long *, size_t);
    int (*release)(unsigned long long);
    int (*to_device)(unsigned long long, const void *, size_t);
    int (*to_host)(void *, unsigned long long, size_t);
} cuda;

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (found == NULL) {
        fprintf(stderr, "the CUDA driver has no %s\n", name);
        exit(1);
    }
    return found;
}

static void driver(int result, const char *call) {
    if (result != 0) {
        fprintf(stderr, "%s failed: %d\n", call, result);
        exit(1);
    }
}

static void load_driver(int device) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    void *context;
    int ordinal;
    if (library == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    /* ISO C has no cast from an object to a function; POSIX says that the bits are the same. */
    *(void **)&cuda.init = symbol(library, "cuInit");
    *(void **)&cuda.device = symbol(library, "cuDeviceGet");
    *(void **)&cuda.retain = symbol(library, "cuDevicePrimaryCtxRetain");
    *(void **)&cuda.current = symbol(library, "cuCtxSetCurrent");
    *(void **)&cuda.alloc = symbol(library, "cuMemAlloc_v2");
    *(void **)&cuda.release = symbol(library, "cuMemFree_v2");
    *(void **)&cuda.to_device = symbol(library, "cuMemcpyHtoD_v2");
    *(void **)&cuda.to_host = symbol(library, "cuMemcpyDtoH_v2");
    driver(cuda.init(0), "cuInit");
    driver(cuda.device(&ordinal, device), "cuDeviceGet");
    driver(cuda.retain(&context, ordinal), "cuDevicePrimaryCtxRetain");
    driver(cuda.current(context), "cuCtxSetCurrent");
}

/* A list of floats on the host, and the same on the device; on the CPU they are one. */
typedef struct {
    float *host;
    void *device;
    size_t bytes;
} list;

static list new_list(uint64_t len, int on_device) {
    list l = {calloc(len, sizeof(float)), NULL, len * sizeof(float)};
    unsigned long long address;
    if (l.host == NULL) exit(1);
    l.device = l.host;
    if (on_device) {
        driver(cuda.alloc(&address, l.bytes), "cuMemAlloc");
        l.device = (void *)(uintptr_t)address;
    }
    return l;
}

static void send(const list *l) {
    if (l->device != l->host) driver(cuda.to_device((uintptr_t)l->device, l->host, l->bytes), "cuMemcpyHtoD");
}

static void fetch(const list *l) {
    if (l->device != l->host) driver(cuda.to_host(l->host, (uintptr_t)l->device, l->bytes), "cuMemcpyDtoH");
}

static void free_list(list *l) {
    if (l->device != l->host) driver(cuda.release((uintptr_t)l->device), "cuMemFree");
    free(l->host);
}

/* Uniform in [-1, 1): the SplitMix64 generator of Steele, Lea and Flood (2014). */
static double noise(void) {
    static uint64_t state = 1905;
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) / 4503599627370496.0 - 1.0;
}

/* The number of a CUDA device, or -1 for a text that is none. */
static int32_t ordinal(const char *text) {
    char *end;
    long number = strtol(text, &end, 10);
    return end != text && *end == '\0' && number >= 0 && number <= INT32_MAX ? (int32_t)number : -1;
}

int main(int argc, char **argv) {
    int asked = argc == 3 && strcmp(argv[1], "--device") == 0;
    int32_t device = asked ? ordinal(argv[2]) : GRADBLEND_CPU;
    if (asked ? device < 0 : argc != 1) {
        int help = argc == 2 && strcmp(argv[1], "--help") == 0;
        fprintf(help ? stdout : stderr, "usage: %s [--device N]   (a CUDA device, from 0; else the CPU)\n", argv[0]);
        return help ? 0 : 2;
    }
    if (gradblend_version() >> 8 != GRADBLEND_VERSION >> 8) {
        fprintf(stderr, "library %#x is not of this header's version %#x\n", gradblend_version(), GRADBLEND_VERSION);
        return 1;
    }

    gradblend_config config;
    gradblend_blender *blender;
    check(gradblend_config_default(K, &config), "config");
    check(gradblend_blender_create(device, &config, &blender), "blender");
    if (device != GRADBLEND_CPU) load_driver(device);

    /* Memory as a trainer has it: t, g, the v_k that reach a tensor, and a place for the blend. */
    list train[TENSORS], valid[TENSORS], v[TENSORS][K], blended[TENSORS];
    const void *addresses[TENSORS][K];
    gradblend_tensor tensors[TENSORS];
    for (int p = 0; p < TENSORS; p++) {
        train[p] = new_list(LEN[p], device >= 0);
        valid[p] = new_list(LEN[p], device >= 0);
        blended[p] = new_list(LEN[p], device >= 0);
        for (int k = 0; k < K; k++) {
            v[p][k] = new_list(REACHES[p][k] ? LEN[p] : 0, device >= 0 && REACHES[p][k]);
            addresses[p][k] = REACHES[p][k] ? v[p][k].device : NULL;
        }
        tensors[p] = (gradblend_tensor){.len = LEN[p],
                                        .dtype = GRADBLEND_F32,
                                        .train = train[p].device,
                                        .valid = valid[p].device,
                                        .modalities = addresses[p],
                                        .blended = blended[p].device};
    }
    /* All checks happen here. The array `tensors` is not needed any more, the lists are. */
    gradblend_plan *plan;
    check(gradblend_plan_create(blender, tensors, TENSORS, &plan), "plan");

    double worst = 0.0;
    for (int step = 0; step < STEPS; step++) {
        gradblend_report before;
        check(gradblend_get_report(blender, &before, NULL), "report");
        /* Backward passes. All losses have the true gradient 1, plus noise of their own; t is drawn apart from v. */
        for (int p = 0; p < TENSORS; p++) {
            for (uint64_t i = 0; i < LEN[p]; i++) {
                train[p].host[i] = (float)(1.0 + noise());
                valid[p].host[i] = (float)(1.0 + 0.3 * noise());
                for (int k = 0; k < K; k++) {
                    if (REACHES[p][k]) v[p][k].host[i] = (float)(1.0 + 2.0 * NOISE[k] * noise());
                }
            }
            send(&train[p]);
            send(&valid[p]);
            for (int k = 0; k < K; k++) {
                if (REACHES[p][k]) send(&v[p][k]);
            }
        }
        /* Products, moments and the blend in one pass; then new weights for the next step. */
        check(gradblend_step(blender, plan, NULL), "step");
        check(gradblend_reweight(blender, NULL), "reweight");
        /* An optimiser would use the blend here. This one compares it with the sum that it should be. */
        for (int p = 0; p < TENSORS; p++) {
            fetch(&blended[p]);
            for (uint64_t i = 0; i < LEN[p]; i++) {
                double sum = 0.0;
                for (int k = 0; k < K; k++) {
                    if (REACHES[p][k]) sum += before.weights[k] * v[p][k].host[i];
                }
                worst = fmax(worst, fabs(blended[p].host[i] - sum));
            }
        }
    }

    gradblend_report report;
    check(gradblend_get_report(blender, &report, NULL), "report");
    static const char *const names[K] = {"video", "audio", "fused"};
    printf("after %d steps on %s:\n", STEPS, device == GRADBLEND_CPU ? "the CPU" : "a CUDA device");
    for (int k = 0; k < K; k++) printf("%s  weight %.3f  OGR %.3f\n", names[k], report.weights[k], report.ogr[k]);
    printf("OGR of the blend %.3f, of uniform weights %.3f; blend exact to %.1e\n", report.ogr_blend,
           report.ogr_uniform, worst);

    /* A plan and its blender may be destroyed in either order; both before the memory. */
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);
    for (int p = 0; p < TENSORS; p++) {
        free_list(&train[p]);
        free_list(&valid[p]);
        free_list(&blended[p]);
        for (int k = 0; k < K; k++) free_list(&v[p][k]);
    }
    /* v_k up to 5 in size, three roundings to f32 each: far below 1e-5. */
    double sum = report.weights[VIDEO] + report.weights[AUDIO] + report.weights[FUSED];
    int right = worst < 1e-5 && fabs(sum - 1.0) < 1e-12 && report.observed == STEPS &&
                report.ogr_blend <= report.ogr_uniform;
    return right ? 0 : 1;
}
