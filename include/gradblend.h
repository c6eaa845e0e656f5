/*
 * gradblend: loss weights of a multi-modal network from how each modality overfits, and the gradients blended by them.
 * Source: Wang, Tran, Feiszli, CVPR 2020 (arXiv 1905.12681); letters and formulas as in docs/method.md.
 *
 *     t     train gradient, of the fused loss                    m_k  running mean of c_k
 *     g     validation gradient, of the fused loss               S    running mean of d_j d_k, K x K; sigma^2_k = S_kk
 *     v_k   gradient of modality k's loss                        w_k  weight: (1/Z) m_k / sigma^2_k, summing to 1
 *     c_k = <g, v_k>, d_k = <t - g, v_k>                         OGR  overfitting-to-generalisation ratio
 *
 * Status.    Every call that can fail returns a gradblend_status, GRADBLEND_OK being 0. Arguments are checked before
 *            any work: after GRADBLEND_INVALID_ARGUMENT nothing has changed, and gradblend_last_error names the culprit,
 *            tensor and modality (both counted from 0). After any error the out parameters point to what they did before
 *            (but for `*bytes` of gradblend_save): a handle that is to be destroyed in any case starts as NULL.
 * Threads.   A const pointer may be shared between threads, any other is one thread at a time: it is not used beside the
 *            const one either. Calls that break this on one blender or plan wait for each other. The library's own CPU
 *            threads have the signal mask of the thread that created the blender. In a forked process what the parent
 *            created is refused, and _destroy leaves it alone. Fork while no call runs.
 * NULL.      Every pointer may be NULL without harm: an error where nothing else is said, and for _destroy nothing. What
 *            cannot be told of a pointer, how much memory is behind it, is the caller's promise.
 * Handles.   A blender or plan that was destroyed is refused like NULL. A handle is a number: do not look behind it. One
 *            that is never destroyed stays known to the library, so leak checkers do not report it.
 * Numbers.   The caller's floating-point environment (rounding, flushing to zero, traps) has no effect and stays as it
 *            is, on x86-64 and, but for the flags of exceptions, on AArch64; elsewhere it must be the default one.
 * Ownership. gradients, streams and everything else that is passed in stay the caller's. Arrays and structs are read
 *            before a call returns and may go away then; the gradients that a tensor names must stay where they are
 *            until the plan is updated or destroyed and the work before that is done.
 * Streams.   `stream` is a cudaStream_t / CUstream of the blender's device, borrowed, NULL being the legacy default
 *            stream; the CPU ignores it, and its work is done when a call returns. On a CUDA device calls put work on
 *            the stream and return; only those that say so wait. The work of one blender is ordered by using one
 *            stream, or by the caller's events. The caller's current device is left as it was.
 * Graphs.    pass, dot, observe, reweight, blend, step, reset and set_weights can be captured in a CUDA graph.
 *            gradblend_plan_update and what waits cannot: they return GRADBLEND_INVALID_ARGUMENT. A graph must not be
 *            launched once its blender or one of its plans is destroyed.
 *
 * Valid as C11 and C++17. gradblend.hpp has classes for C++.
 * Licence: MIT OR Apache-2.0.
 */
#ifndef GRADBLEND_H
#define GRADBLEND_H

#include <stddef.h>
#include <stdint.h>

#define GRADBLEND_VERSION_MAJOR 0
#define GRADBLEND_VERSION_MINOR 1
#define GRADBLEND_VERSION_PATCH 0
/* Of this header, composed as gradblend_version() composes that of the library. */
#define GRADBLEND_VERSION (GRADBLEND_VERSION_MAJOR << 16 | GRADBLEND_VERSION_MINOR << 8 | GRADBLEND_VERSION_PATCH)

#ifdef __cplusplus
extern "C" {
#endif

/* 0 or a positive code. Codes are fixed for ever, and retired ones are never used again. */
typedef int32_t gradblend_status;
enum {
    GRADBLEND_OK = 0,
    GRADBLEND_INVALID_ARGUMENT = 1,   /* an argument is NULL, out of range, or does not fit the others */
    GRADBLEND_NOT_BUILT = 2,          /* a CUDA device was asked for, and this library was built without CUDA */
    GRADBLEND_NO_DRIVER = 3,          /* no CUDA driver on this machine, or one without a function that is needed */
    GRADBLEND_NO_DEVICE = 4,          /* no CUDA device with this ordinal */
    GRADBLEND_UNSUPPORTED_DEVICE = 5, /* the device or its driver is too old for this build */
    GRADBLEND_OUT_OF_MEMORY = 6,      /* for a plan or for threads on the host, or on the device. Where the host lacks
                                         the few KB that any call but a run call may need, the process ends */
    GRADBLEND_CUDA = 7,               /* the CUDA driver failed: a launch, a copy, or work put on the stream before */
    GRADBLEND_CORRUPT_STATE = 8,      /* a saved state is foreign, truncated, altered, or of an unknown version */
    GRADBLEND_INTERNAL = 9            /* a bug of this library; what it was changing refuses all calls but _destroy */
};

enum { GRADBLEND_F32 = 0, GRADBLEND_F16 = 1, GRADBLEND_BF16 = 2 }; /* gradblend_tensor.dtype */
enum { GRADBLEND_CPU = -1 };                                       /* device: this, or a CUDA ordinal from 0 */
enum { GRADBLEND_MEAN = 0, GRADBLEND_EMA = 1 };                    /* gradblend_config.average */
enum { GRADBLEND_UNCORRELATED = 0, GRADBLEND_CORRELATED = 1 };     /* gradblend_config.overfitting */
enum { GRADBLEND_CLAMP = 0, GRADBLEND_SIGNED = 1 };                /* gradblend_config.negative */
enum { GRADBLEND_ON_REQUEST = 0, GRADBLEND_EVERY_OBSERVATION = 1 }; /* gradblend_config.cadence */
enum { GRADBLEND_DOT = 1, GRADBLEND_BLEND = 2, GRADBLEND_ACCUMULATE = 4, GRADBLEND_OBSERVE = 8 }; /* gradblend_pass */
enum { GRADBLEND_FLAG_HELD = 1, GRADBLEND_FLAG_NONFINITE = 2, GRADBLEND_FLAG_CLAMPED = 4 }; /* gradblend_report.flags */
#define GRADBLEND_MAX_MODALITIES 32

/* How a blender averages, solves and runs. Fill it with gradblend_config_default, then change what should differ. */
typedef struct {
    uint32_t size;       /* sizeof(gradblend_config), set by gradblend_config_default */
    uint32_t modalities; /* K, from 1 to 32, the fused loss included */
    int32_t average;     /* GRADBLEND_EMA, or GRADBLEND_MEAN: the plain mean since the last reset */
    int32_t overfitting; /* GRADBLEND_UNCORRELATED: w_k ~ m_k / S_kk, or GRADBLEND_CORRELATED: w ~ S^-1 m */
    int32_t negative;    /* GRADBLEND_CLAMP: no negative weights, or GRADBLEND_SIGNED */
    int32_t cadence;     /* when to reweight: GRADBLEND_ON_REQUEST, or GRADBLEND_EVERY_OBSERVATION */
    uint32_t threads;    /* of the CPU, the caller's included, up to 4096; 0 is all. No result depends on it */
    uint32_t reserved;   /* 0 */
    double decay;        /* b of the EMA, in [0, 1); 0.99 by default. Not used with GRADBLEND_MEAN */
    double damping;      /* times trace(S) / K, added to the diagonal of S; finite and at least 0; 1e-12 by default */
} gradblend_config;

/*
 * The gradients of one parameter tensor: lists of `len` elements of one dtype, each contiguous, on the blender's device,
 * aligned to its element and no further. `train` and `valid` may both be NULL: the tensor adds nothing to the products
 * and is only blended. `blended` may be exactly one of this tensor's own modality gradients (in place), else it
 * overlaps no list of any tensor. Other lists may overlap each other. `len` may be 0.
 */
typedef struct {
    uint64_t len;                  /* elements, not bytes */
    int32_t dtype;                 /* GRADBLEND_F32, GRADBLEND_F16 or GRADBLEND_BF16 */
    const void *train, *valid;     /* t and g */
    const void *const *modalities; /* K addresses v_k; NULL for one that is absent: its loss does not reach the tensor */
    void *blended;                 /* where to write sum_k w_k v_k; NULL to write nothing */
} gradblend_tensor;

/* What a blender knows. Entries of modalities from K on are 0. This record never grows: what is new gets another. */
typedef struct {
    uint32_t size;       /* set by the call to sizeof(gradblend_report) */
    uint32_t modalities; /* K */
    uint64_t observed;   /* n: observations in the moments since the last reset */
    uint64_t skipped;    /* observations since the last reset that were skipped, for a product that was not finite */
    uint32_t flags;      /* HELD and CLAMPED of the latest reweight, NONFINITE of the latest observation */
    uint32_t nonfinite;  /* bit k: modality k made the latest observation not finite */
    double weights[GRADBLEND_MAX_MODALITIES];       /* w_k in force; 1/K until there are others */
    double mean[GRADBLEND_MAX_MODALITIES];          /* m_k; 0 before the first observation */
    double second_moment[GRADBLEND_MAX_MODALITIES]; /* sigma^2_k = S_kk; 0 before the first observation */
    double ogr[GRADBLEND_MAX_MODALITIES];           /* sqrt(S_kk) / |m_k|; 0 / 0 is NaN */
    double ogr_blend;                               /* sqrt(w'Sw) / |w'm| with the weights in force */
    double ogr_uniform;                             /* the same with w_k = 1/K */
} gradblend_report;

/* The moments, the weights, and where they live. Destroyed by whoever created it. */
typedef struct gradblend_blender gradblend_blender;
/* A checked list of tensors, for the blender that it was made for alone. Destroyed by whoever created it, before or
 * after its blender. */
typedef struct gradblend_plan gradblend_plan;

/*
 * Version of the library: major << 16 | minor << 8 | patch. It fits this header if it is GRADBLEND_VERSION but for the
 * patch: gradblend_version() >> 8 == GRADBLEND_VERSION >> 8. Any thread.
 */
uint32_t gradblend_version(void);

/* Name of a status, as "GRADBLEND_CUDA"; "unknown" for a code that is none. Static, never NULL. Any thread. */
const char *gradblend_status_name(gradblend_status status);

/*
 * Copies the message of this thread's last error to `buffer`: as much of it as fits into `bytes`, always with a
 * terminating 0 if `bytes` is not 0. Returns the length of the whole message without that 0, and 0 if no call failed
 * on this thread yet. A call that succeeds leaves the message as it is. `buffer` may be NULL: only the length.
 */
size_t gradblend_last_error(char *buffer, size_t bytes);

/*
 * Fills `config` with the defaults for K = `modalities`: GRADBLEND_EMA of decay 0.99, GRADBLEND_UNCORRELATED,
 * GRADBLEND_CLAMP, GRADBLEND_ON_REQUEST, damping 1e-12, all threads. Any thread.
 * Errors: INVALID_ARGUMENT for a K that is not from 1 to 32.
 */
gradblend_status gradblend_config_default(uint32_t modalities, gradblend_config *config);

/*
 * Writes to `weights` the K weights that minimise w'Sw / (w'm)^2 under sum w = 1, by the overfitting, negative and
 * damping of `config`: the solver behind gradblend_reweight, for moments that come from elsewhere. From losses, the
 * numerator is dG_k and the second moment has dO_k^2 on its diagonal. Of `second_moment`, row-major, the symmetric part
 * is used, and only the diagonal where the overfitting is UNCORRELATED. With e = damping * trace(S) / K, weights come from
 *   UNCORRELATED  a_k = m_k / (S_kk + e), or a_k = m_k where the diagonal of S is zero; with CLAMP, negative ones become 0;
 *   CORRELATED    a = (S + e I)^-1 m; with CLAMP, negative ones are left out and the rest is solved again, until none is
 *                 negative. An S + e I that is not positive definite is solved as UNCORRELATED,
 * and are w_k = a_k / sum a. Where that sum is not positive, or a w_k not finite, there is nothing to go by: the weights
 * are `in_force` (NULL: 1/K each), and `flags` has HELD. It has CLAMPED where a modality lost its weight for its sign.
 * The arrays may overlap. No stream, any thread.
 * Errors: INVALID_ARGUMENT, also for an entry that is not finite or a negative one on the diagonal.
 */
gradblend_status gradblend_solve(const gradblend_config *config, const double *numerator /* K */,
                                 const double *second_moment /* K x K */, const double *in_force /* K, or NULL */,
                                 double *weights /* K */, uint32_t *flags);

/*
 * Makes a blender with weights of 1/K and no observation, on GRADBLEND_CPU or a CUDA device. `*blender` is the caller's,
 * to be destroyed by gradblend_blender_destroy. Allocates, starts CPU threads, and on a CUDA device waits for a private
 * stream. Any thread. Threads that the system has no room for are OUT_OF_MEMORY.
 * Errors: INVALID_ARGUMENT, NOT_BUILT, NO_DRIVER, NO_DEVICE, UNSUPPORTED_DEVICE, OUT_OF_MEMORY, CUDA.
 */
gradblend_status gradblend_blender_create(int32_t device, const gradblend_config *config, gradblend_blender **blender);

/* Waits for the blender's pending work and frees it. Its plans stay, to be destroyed: no blender takes them any more. */
void gradblend_blender_destroy(gradblend_blender *blender);

/*
 * Checks `count` tensors and makes a plan of them; no gradient is read. `count` may be 0, `tensors` may be NULL then.
 * `*plan` is the caller's, to be destroyed by gradblend_plan_destroy. Allocates memory for each tensor, and for each
 * 65,536 elements, and on a CUDA device waits for a private stream.
 * Errors: INVALID_ARGUMENT for an unknown dtype, `train` without `valid` or the reverse, an address that is not aligned
 * to its element, a list that reaches past the end of memory, a `blended` that overlaps what it must not, on a CUDA
 * device an address that the driver does not know; OUT_OF_MEMORY, CUDA.
 */
gradblend_status gradblend_plan_create(const gradblend_blender *blender, const gradblend_tensor *tensors,
                                       uint64_t count, gradblend_plan **plan);

/*
 * Takes other addresses, and other choices of which are NULL, for the same count, lengths and dtypes. Allocates nothing
 * and does not wait: on a CUDA device the new table is copied on `stream`, after what was put there before, and graphs
 * captured earlier see it. Cannot be captured itself.
 * Errors: as gradblend_plan_create, and INVALID_ARGUMENT for another count, length or dtype. The plan is then as it
 * was; but after CUDA from a copy it takes no pass until it is updated again.
 */
gradblend_status gradblend_plan_update(gradblend_plan *plan, const gradblend_tensor *tensors, uint64_t count,
                                       void *stream);

/* Waits for the plan's pending work and frees it. */
void gradblend_plan_destroy(gradblend_plan *plan);

/*
 * One pass over memory and one launch that does what `what` says, any of
 *   GRADBLEND_DOT         adds <g, v_k> and <t - g, v_k>, summed over the tensors, to the pending sums;
 *   GRADBLEND_BLEND       writes sum_k w_k v_k, with the weights in force at entry, to each `blended`;
 *   GRADBLEND_ACCUMULATE  (with BLEND) adds to `blended` instead of replacing it, in place too;
 *   GRADBLEND_OBSERVE     then does what gradblend_observe does.
 * No allocation, no wait.
 * Errors: INVALID_ARGUMENT for other bits, none, ACCUMULATE without BLEND, or a plan of another blender; CUDA.
 */
gradblend_status gradblend_pass(gradblend_blender *blender, const gradblend_plan *plan, uint32_t what, void *stream);

/* gradblend_pass with DOT. May be called many times before an observe: per layer, per modality, per shard. */
gradblend_status gradblend_dot(gradblend_blender *blender, const gradblend_plan *plan, void *stream);

/*
 * Closes the pending sums as one observation and zeroes them: n, m and S are updated, and weights solved for if the
 * cadence says so. Sums of zero count as an observation too. If a c_k or the square of a d_k is not finite, after
 * division by the gradient scale squared, the observation is skipped: only `skipped`, a flag and `nonfinite` change. No
 * allocation, no wait.
 * Errors: INVALID_ARGUMENT, CUDA.
 */
gradblend_status gradblend_observe(gradblend_blender *blender, void *stream);

/*
 * Puts in force what gradblend_solve makes of the moments. Before the first observation, or where it finds nothing to go
 * by, the weights stay and HELD is set. CORRELATED with fewer than K observations solves UNCORRELATED. No allocation,
 * no wait.
 * Errors: INVALID_ARGUMENT, CUDA.
 */
gradblend_status gradblend_reweight(gradblend_blender *blender, void *stream);

/* gradblend_pass with BLEND. Sums in f32, rounds once; zeros where no modality is present. */
gradblend_status gradblend_blend(gradblend_blender *blender, const gradblend_plan *plan, void *stream);

/* gradblend_pass with DOT, BLEND and OBSERVE: the same bits as the three in this order, in one pass over memory. */
gradblend_status gradblend_step(gradblend_blender *blender, const gradblend_plan *plan, void *stream);

/*
 * Starts a new super-epoch: forgets n, m, S, `skipped`, the flags and the pending sums, and keeps the weights.
 * Errors: INVALID_ARGUMENT, CUDA.
 */
gradblend_status gradblend_reset(gradblend_blender *blender, void *stream);

/*
 * Puts `weights` in force as given, whatever their signs and sum, as offline blending does.
 * Errors: INVALID_ARGUMENT for a `count` other than K or a weight that is not finite as f32; CUDA.
 */
gradblend_status gradblend_set_weights(gradblend_blender *blender, const double *weights, uint32_t count,
                                       void *stream);

/*
 * Sets where to read the factor that all gradients of an observation were scaled by, as mixed-precision trainers do: an
 * address on the blender's device that is read at each observe and stays the caller's; NULL is a factor of 1. c and d
 * are divided by its square. A factor of 0, or one that is not finite, makes the observation not finite. Not part of
 * the saved state. A graph keeps the address it was captured with.
 * Errors: INVALID_ARGUMENT for an address that is not aligned to a float or, on a CUDA device, not known to the driver.
 */
gradblend_status gradblend_set_grad_scale(gradblend_blender *blender, const float *scale);

/* Reads what the blender knows. Waits for `stream`. Errors: INVALID_ARGUMENT, CUDA. */
gradblend_status gradblend_get_report(gradblend_blender *blender, gradblend_report *report, void *stream);

/* Reads S, K x K, row-major; zeros before the first observation. Waits for `stream`. Errors: INVALID_ARGUMENT, CUDA. */
gradblend_status gradblend_get_second_moments(gradblend_blender *blender, double *second_moment /* K x K */,
                                              void *stream);

/*
 * Gives the address of the K weights in force, as float, where the device can read them: to weight losses by, and run
 * one backward pass. It is the blender's and the same for its life. Read it only while no call on the blender runs.
 * Errors: INVALID_ARGUMENT.
 */
gradblend_status gradblend_device_weights(const gradblend_blender *blender, const float **weights);

/*
 * Gives the address on the device of the 2K pending sums, c_0 .. c_K-1 then d_0 .. d_K-1, and 2K. It is the blender's
 * and the same for its life. A sharded trainer adds these up across its shards between DOT and OBSERVE.
 * Errors: INVALID_ARGUMENT.
 */
gradblend_status gradblend_pending_sums(const gradblend_blender *blender, double **sums, uint32_t *count);

/*
 * Copies the whole state, bit for bit, to `buffer`, and sets `*bytes`, the room there, to the bytes written. With a NULL
 * `buffer` it only sets `*bytes` to the size needed. Any blender of the same K, average and decay can load it, on the
 * CPU or on a GPU. Waits for `stream`.
 * Errors: INVALID_ARGUMENT; with too little room `*bytes` is set to the size needed; CUDA.
 */
gradblend_status gradblend_save(gradblend_blender *blender, void *buffer, size_t *bytes, void *stream);

/*
 * Goes on from a saved state of exactly `bytes` bytes.
 * Errors: CORRUPT_STATE; INVALID_ARGUMENT for the state of another K, average or decay; CUDA. The blender is then as it
 * was.
 */
gradblend_status gradblend_load(gradblend_blender *blender, const void *buffer, size_t bytes, void *stream);

/* DLPack, the exchange format of array libraries. Its own header, dlpack.h, has these structs; it is not needed here. */
struct DLManagedTensor;
struct DLManagedTensorVersioned;

/* One array as DLPack hands it over: one of the two, or neither for a list that is absent. */
typedef struct {
    const struct DLManagedTensor *managed;            /* from a capsule named "dltensor" */
    const struct DLManagedTensorVersioned *versioned; /* from one named "dltensor_versioned" */
} gradblend_dlpack;

/*
 * Fills `tensor` from arrays of any framework that speaks DLPack, without a copy. Each must be on `device` (GRADBLEND_CPU
 * also takes CUDA's pinned and managed memory, a CUDA ordinal too), float32, float16 or bfloat16, and contiguous in
 * row-major order; all of one tensor have the same number of elements and one dtype; the byte offset is honoured. Absent
 * is a record of two NULLs, or NULL in the place of `train`, `valid` or `blended`. `addresses` has room for K = `modalities` addresses, the caller's memory, which `tensor->modalities` will
 * point to. The arrays stay the caller's: no deleter is called, and they must live as long as what they describe is
 * planned. An array of no elements gives an empty tensor without addresses. No stream, any thread.
 * Errors: INVALID_ARGUMENT; the message names the list. All arrays absent is one: there is no length then.
 */
gradblend_status gradblend_tensor_from_dlpack(int32_t device, uint32_t modalities, const gradblend_dlpack *train,
                                              const gradblend_dlpack *valid,
                                              const gradblend_dlpack *gradients /* K */,
                                              const gradblend_dlpack *blended, const void **addresses /* K */,
                                              gradblend_tensor *tensor);

#ifdef __cplusplus
}
#endif

#endif
