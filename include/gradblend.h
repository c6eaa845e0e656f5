/*
 * gradblend: Gradient-Blending. Loss weights of a multi-modal network from how much each modality overfits, and the
 * gradients blended with these weights.
 * Source: Wang, Tran, Feiszli, CVPR 2020 (arXiv 1905.12681). Letters and formulas are those of docs/method.md.
 *
 *     t     train gradient, of the fused loss                    m_k  running mean of c_k
 *     g     validation gradient, of the fused loss               S    running mean of d_j d_k, K x K; sigma^2_k = S_kk
 *     v_k   gradient of modality k's loss                        w_k  weight: (1/Z) m_k / sigma^2_k, summing to 1
 *     c_k = <g, v_k>, d_k = <t - g, v_k>                         OGR  overfitting-to-generalisation ratio
 *
 * Status.    Every function that can fail returns a gradblend_status; GRADBLEND_OK is 0. Arguments are checked before
 *            any work. After GRADBLEND_INVALID_ARGUMENT nothing has changed, and gradblend_last_error names the tensor
 *            and the modality at fault (both counted from 0). After any error the memory behind the out-parameters is
 *            unchanged (except `*bytes` of gradblend_save), so a handle that is destroyed in any case starts as NULL.
 * Threads.   A const pointer may be shared between threads. Any other pointer is used by one thread at a time, and not
 *            while another thread uses the same object through a const pointer. Calls that break this rule on one
 *            blender or plan run one after the other. The library's CPU threads have the signal mask of the thread that
 *            created the blender. A forked process cannot use what its parent created: calls return an error, and
 *            _destroy does nothing. Fork while no call runs.
 * Versions.  A program compiled with this header runs with any library of the same major and minor version, and the
 *            reverse. Records with a `size` only grow, at the end: each side leaves alone what the other does not know.
 * NULL.      Every pointer may be NULL: an error where nothing else is stated, and no effect for _destroy. The library
 *            cannot check how much memory is behind a pointer; the caller guarantees it.
 * Handles.   A destroyed blender or plan is rejected as NULL is. A handle is a number and must not be dereferenced. The
 *            library keeps a reference to each live handle, so leak checkers do not report one that is never destroyed.
 * Numbers.   On x86-64 and AArch64 the caller's floating-point environment (rounding, flushing to zero, traps) has no
 *            effect on results and is restored, on AArch64 except for the exception flags. Elsewhere it must be the
 *            default one.
 * Ownership. Gradients, streams and all other arguments stay the caller's. Arrays and structs are read before a call
 *            returns and may be freed then. The gradients that a tensor names must stay valid until the plan is updated
 *            or destroyed and the work enqueued before that is complete.
 * Streams.   `stream` is a cudaStream_t / CUstream of the blender's device, borrowed; NULL is the legacy default
 *            stream. The CPU ignores it, and its work is complete when a call returns. On a CUDA device calls enqueue
 *            work on the stream and return; only those that say "Synchronizes" block. The work of one blender is
 *            ordered by one stream, or by the caller's events. The caller's current device is restored.
 * Graphs.    pass, dot, observe, reweight, blend, step, reset and set_weights can be captured in a CUDA graph.
 *            gradblend_plan_update and functions that synchronize cannot: they return GRADBLEND_INVALID_ARGUMENT. A
 *            graph must not be launched after its blender or one of its plans is destroyed.
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
#define GRADBLEND_VERSION_PATCH 1
/* The version of this header, encoded as gradblend_version() encodes the version of the library. */
#define GRADBLEND_VERSION (GRADBLEND_VERSION_MAJOR << 16 | GRADBLEND_VERSION_MINOR << 8 | GRADBLEND_VERSION_PATCH)

#ifdef __cplusplus
extern "C" {
#endif

/* 0 or a positive code. Codes never change, and retired ones are never reused. */
typedef int32_t gradblend_status;
enum {
    GRADBLEND_OK = 0,
    GRADBLEND_INVALID_ARGUMENT = 1,   /* an argument is NULL, out of range, or inconsistent with the others */
    GRADBLEND_NOT_BUILT = 2,          /* a CUDA device was requested, and this library was built without CUDA */
    GRADBLEND_NO_DRIVER = 3,          /* no CUDA driver on this machine, or one that lacks a required function */
    GRADBLEND_NO_DEVICE = 4,          /* no CUDA device with this ordinal */
    GRADBLEND_UNSUPPORTED_DEVICE = 5, /* the device or its driver is too old for this build */
    GRADBLEND_OUT_OF_MEMORY = 6,      /* a plan or threads on the host, or memory on the device, could not be allocated.
                                         If the few KB that a call other than a run call needs on the host cannot be
                                         allocated, the process ends */
    GRADBLEND_CUDA = 7,               /* the CUDA driver failed: a launch, a copy, or work enqueued earlier */
    GRADBLEND_CORRUPT_STATE = 8,      /* not a saved state, or truncated, altered, or of an unknown version */
    GRADBLEND_INTERNAL = 9            /* a bug of this library; the object then rejects all calls except _destroy */
};

enum { GRADBLEND_F32 = 0, GRADBLEND_F16 = 1, GRADBLEND_BF16 = 2 }; /* gradblend_tensor.dtype */
enum { GRADBLEND_CPU = -1 };                                       /* device: this, or a CUDA ordinal from 0 up */
enum { GRADBLEND_MEAN = 0, GRADBLEND_EMA = 1 };                    /* gradblend_config.average */
enum { GRADBLEND_UNCORRELATED = 0, GRADBLEND_CORRELATED = 1 };     /* gradblend_config.overfitting */
enum { GRADBLEND_CLAMP = 0, GRADBLEND_SIGNED = 1 };                /* gradblend_config.negative */
enum { GRADBLEND_ON_REQUEST = 0, GRADBLEND_EVERY_OBSERVATION = 1 }; /* gradblend_config.cadence */
enum { GRADBLEND_DOT = 1, GRADBLEND_BLEND = 2, GRADBLEND_ACCUMULATE = 4, GRADBLEND_OBSERVE = 8 }; /* gradblend_pass */
enum { /* gradblend_report.flags, of the latest reweight, or of the latest observation where it says so */
    GRADBLEND_FLAG_HELD = 1,      /* no observation yet, or no weights were found: those in force stay */
    GRADBLEND_FLAG_NONFINITE = 2, /* of the latest observation: a product was not finite, and it was skipped */
    GRADBLEND_FLAG_CLAMPED = 4,   /* a weight is 0 that would be negative without that bound. With HELD: a step on some
                                     modality raises the validation loss */
    GRADBLEND_FLAG_FLOORED = 8,   /* a weight is at its min_weight, above 0, and would be smaller without it */
    GRADBLEND_FLAG_INEXACT = 16   /* the weights may not be the minimum: the solver met a negative pivot, which a second
                                     moment does not have, or reached the bound of its steps */
};
#define GRADBLEND_MAX_MODALITIES 32

/* How a blender averages, solves and runs. Fill it with gradblend_config_default, then change fields as needed. */
typedef struct gradblend_config {
    uint32_t size;       /* bytes of this record that the library reads, set by gradblend_config_default */
    uint32_t modalities; /* K, from 1 to 32, the fused loss included */
    int32_t average;     /* GRADBLEND_EMA, or GRADBLEND_MEAN: the plain mean since the last reset */
    int32_t overfitting; /* GRADBLEND_UNCORRELATED: only the diagonal of S counts, or GRADBLEND_CORRELATED */
    int32_t negative;    /* GRADBLEND_CLAMP: w_k >= min_weight_k, or GRADBLEND_SIGNED: weights of any sign */
    int32_t cadence;     /* when to reweight: GRADBLEND_ON_REQUEST, or GRADBLEND_EVERY_OBSERVATION */
    uint32_t threads;    /* CPU threads, including the caller's, up to 4096; 0 is all. No result depends on it */
    uint32_t reserved;   /* 0 */
    double decay;        /* b of the EMA, in [0, 1); 0.99 by default. Unused with GRADBLEND_MEAN */
    double damping;      /* damping * trace(S) / K is added to the diagonal of S; finite, >= 0; 1e-12 by default */
    /* Since 0.1.1. Least weight of each modality: >= 0, with a sum below 1, and 0 from K on; all 0 by default and with
       GRADBLEND_SIGNED. It bounds what the solver returns, not weights that are held, set or loaded. */
    double min_weight[GRADBLEND_MAX_MODALITIES];
} gradblend_config;

/*
 * The gradients of one parameter tensor: buffers of `len` elements of one dtype, each contiguous, on the blender's
 * device and aligned to its element. `train` and `valid` may both be NULL: the tensor adds nothing to the products and
 * is only blended. `blended` is exactly one of this tensor's own modality gradients (in place), or overlaps no other
 * buffer of any tensor. Other buffers may overlap each other. `len` may be 0.
 */
typedef struct gradblend_tensor {
    uint64_t len;                  /* elements, not bytes */
    int32_t dtype;                 /* GRADBLEND_F32, GRADBLEND_F16 or GRADBLEND_BF16 */
    const void *train, *valid;     /* t and g */
    const void *const *modalities; /* K addresses v_k; NULL where absent: the loss does not depend on the tensor */
    void *blended;                 /* output: sum_k w_k v_k; NULL to write nothing */
} gradblend_tensor;

/* The state of a blender. Entries at index K and above are 0. */
typedef struct gradblend_report {
    uint32_t size;       /* set by the caller to sizeof(gradblend_report), and by the call to the bytes that it wrote */
    uint32_t modalities; /* K */
    uint64_t observed;   /* n: observations in the moments since the last reset */
    uint64_t skipped;    /* observations skipped since the last reset, because a product was not finite */
    uint32_t flags;      /* GRADBLEND_FLAG_* */
    uint32_t nonfinite;  /* bit k: a product of modality k was not finite in the latest observation */
    double weights[GRADBLEND_MAX_MODALITIES];       /* w_k in force; initially 1/K */
    double mean[GRADBLEND_MAX_MODALITIES];          /* m_k; 0 before the first observation */
    double second_moment[GRADBLEND_MAX_MODALITIES]; /* sigma^2_k = S_kk; 0 before the first observation */
    double ogr[GRADBLEND_MAX_MODALITIES];           /* sqrt(S_kk) / |m_k|; 0 / 0 is NaN */
    double ogr_blend;                               /* sqrt(w'Sw) / |w'm| with the weights in force */
    double ogr_uniform;                             /* the same with w_k = 1/K */
    /* Since 0.1.1; a library of 0.1.0 does not write what follows. */
    uint32_t floored;   /* bit k: the latest reweight gave modality k its min_weight, and less would give a smaller OGR */
    uint32_t reserved;  /* 0 */
    double effective;   /* n_eff: observations of equal weight whose mean is as uncertain as m_k; n, or for an EMA less */
    double standard_error[GRADBLEND_MAX_MODALITIES]; /* of m_k: sqrt((E[c_k^2] - m_k^2) / (n_eff - 1)); infinite where
                                                        n_eff is at most 1 or it is unknown. w_k is noise unless |m_k|
                                                        is well above it: docs/method.md */
} gradblend_report;

/* The moments and the weights, on one device. Destroyed by whoever created it. */
typedef struct gradblend_blender gradblend_blender;
/* A checked list of tensors, for the blender that it was made for. Destroyed by whoever created it, before or after its
 * blender. */
typedef struct gradblend_plan gradblend_plan;

/*
 * Version of the library: major << 16 | minor << 8 | patch. It is compatible with this header if all but the patch
 * agree: gradblend_version() >> 8 == GRADBLEND_VERSION >> 8. Any thread.
 */
uint32_t gradblend_version(void);

/* Name of a status, such as "GRADBLEND_CUDA"; "unknown" for any other code. Static, never NULL. Any thread. */
const char *gradblend_status_name(gradblend_status status);

/*
 * Copies the message of this thread's last error to `buffer`, truncated to `bytes` including a terminating 0. Returns
 * the length of the whole message without that 0, or 0 if no call has failed on this thread. A call that succeeds does
 * not change the message. With a NULL `buffer` it only returns the length.
 */
size_t gradblend_last_error(char *buffer, size_t bytes);

/*
 * Fills `config` with the defaults for K = `modalities`: GRADBLEND_EMA of decay 0.99, GRADBLEND_UNCORRELATED,
 * GRADBLEND_CLAMP, GRADBLEND_ON_REQUEST, damping 1e-12, all threads, no least weights. Any thread.
 * Errors: INVALID_ARGUMENT for a K outside 1 to 32.
 *
 * The library's function cannot know with which header its caller was compiled: it fills the fields of version 0.1.0, up
 * to `damping`. In C and C++ the inline function below takes its place and fills the others. A binding from another
 * language does the same: it sets `min_weight`, and `size` to the size of its record. With a library of version 0.1.0,
 * `size` stays smaller, and `min_weight` is not read.
 */
gradblend_status gradblend_config_default(uint32_t modalities, gradblend_config *config);

#ifndef __cplusplus
static
#endif
inline gradblend_status gradblend_config_default_all(uint32_t modalities, gradblend_config *config) {
    const gradblend_status status = gradblend_config_default(modalities, config);
    if (status == GRADBLEND_OK && gradblend_version() >= (1u << 8 | 1u)) {
        for (int k = 0; k < GRADBLEND_MAX_MODALITIES; k++) {
            config->min_weight[k] = 0;
        }
        config->size = (uint32_t)sizeof(gradblend_config);
    }
    return status;
}
#define gradblend_config_default gradblend_config_default_all

/*
 * Computes the K weights that minimise OGR^2 = w'Qw / (w'm)^2 under w'm > 0 and sum w = 1: the solver of
 * gradblend_reweight, for given moments. Q = S + damping * trace(S) / K * I. From losses, the numerator is dG_k and the second moment has dO_k^2 on its
 * diagonal. `second_moment` is row-major; its symmetric part is used, and with UNCORRELATED only its diagonal.
 *   CLAMP   w_k >= min_weight_k. With f = min_weight and B = I + f 1' / (1 - sum f), w is proportional to B u, where u
 *           minimises u'(B'QB)u / 2 - (B'm)'u under u >= 0. UNCORRELATED and without least weights that is
 *           u_k = max(m_k, 0) / Q_kk; where S is zero, u_k = max(m_k, 0). There are none if B'm has no positive entry.
 *   SIGNED  w is proportional to Q^-1 m (UNCORRELATED if Q is not positive definite), or to m where S is zero. There are
 *           none if its sum is not positive.
 * If there are none, or a w_k is not finite as float, the weights are `in_force` (NULL: 1/K each), which need not
 * respect min_weight, and `flags` has HELD. `flags` are GRADBLEND_FLAG_*, without NONFINITE.
 * The arrays may overlap. No stream, any thread.
 * Errors: INVALID_ARGUMENT, also for an entry that is not finite or a negative one on the diagonal.
 */
gradblend_status gradblend_solve(const gradblend_config *config, const double *numerator /* K */,
                                 const double *second_moment /* K x K */, const double *in_force /* K, or NULL */,
                                 double *weights /* K */, uint32_t *flags);

/*
 * Creates a blender with weights of 1/K and no observation, on GRADBLEND_CPU or a CUDA device. The caller destroys
 * `*blender` with gradblend_blender_destroy. Allocates, starts CPU threads, and on a CUDA device synchronizes a private
 * stream. Any thread. OUT_OF_MEMORY if the system cannot start the threads.
 * Errors: INVALID_ARGUMENT, NOT_BUILT, NO_DRIVER, NO_DEVICE, UNSUPPORTED_DEVICE, OUT_OF_MEMORY, CUDA.
 */
gradblend_status gradblend_blender_create(int32_t device, const gradblend_config *config, gradblend_blender **blender);

/* Waits for the blender's pending work and frees it. Its plans can then only be destroyed. */
void gradblend_blender_destroy(gradblend_blender *blender);

/*
 * Checks `count` tensors and creates a plan for them; reads no gradient. `tensors` may be NULL if `count` is 0. The
 * caller destroys `*plan` with gradblend_plan_destroy. Allocates memory for each tensor and for each 65,536 elements,
 * and on a CUDA device synchronizes a private stream.
 * Errors: INVALID_ARGUMENT for an unknown dtype, `train` without `valid` or the reverse, an address that is not aligned
 * to its element, a buffer that extends past the end of the address space, a `blended` with a forbidden overlap, or on
 * a CUDA device an address that the driver does not know; OUT_OF_MEMORY, CUDA.
 */
gradblend_status gradblend_plan_create(const gradblend_blender *blender, const gradblend_tensor *tensors,
                                       uint64_t count, gradblend_plan **plan);

/*
 * Replaces the addresses, which of them are NULL included, for the same count, lengths and dtypes. Does not allocate or
 * synchronize: on a CUDA device the new table is copied on `stream`, after the work enqueued there, and graphs captured
 * earlier use the new table. Cannot be captured itself.
 * Errors: as gradblend_plan_create, and INVALID_ARGUMENT for another count, length or dtype. The plan is then
 * unchanged; but after CUDA from a failed copy, passes reject it until it is updated again.
 */
gradblend_status gradblend_plan_update(gradblend_plan *plan, const gradblend_tensor *tensors, uint64_t count,
                                       void *stream);

/* Waits for the plan's pending work and frees it. */
void gradblend_plan_destroy(gradblend_plan *plan);

/*
 * One pass over memory and one launch. `what` is any combination of
 *   GRADBLEND_DOT         adds <g, v_k> and <t - g, v_k>, summed over the tensors, to the pending sums;
 *   GRADBLEND_BLEND       writes sum_k w_k v_k, with the weights in force at entry, to each `blended`; a v_k whose
 *                         weight as float is 0 counts as absent: infinities and NaN in it do not reach `blended`;
 *   GRADBLEND_ACCUMULATE  (with BLEND) adds to `blended` instead of replacing it, in place too;
 *   GRADBLEND_OBSERVE     then does what gradblend_observe does.
 * Does not allocate or synchronize.
 * Errors: INVALID_ARGUMENT for other bits, no bits, ACCUMULATE without BLEND, or a plan of another blender; CUDA.
 */
gradblend_status gradblend_pass(gradblend_blender *blender, const gradblend_plan *plan, uint32_t what, void *stream);

/* gradblend_pass with DOT. May be called many times before an observe: per layer, per modality, per shard. */
gradblend_status gradblend_dot(gradblend_blender *blender, const gradblend_plan *plan, void *stream);

/*
 * Takes the pending sums as one observation and zeroes them: updates n, m and S, and with EVERY_OBSERVATION reweights.
 * Sums of zero count as an observation too. If a c_k or the square of a d_k is not finite, after division by the
 * gradient scale squared, the observation is skipped: only `skipped`, the flags and `nonfinite` change. Does not
 * allocate or synchronize.
 * Errors: INVALID_ARGUMENT, CUDA.
 */
gradblend_status gradblend_observe(gradblend_blender *blender, void *stream);

/*
 * Replaces the weights in force by the solution of gradblend_solve for the moments. Before the first observation, or
 * where the solver sets HELD, the weights do not change. CORRELATED with fewer than K observations is solved as
 * UNCORRELATED. Does not allocate or synchronize.
 * Errors: INVALID_ARGUMENT, CUDA.
 */
gradblend_status gradblend_reweight(gradblend_blender *blender, void *stream);

/*
 * gradblend_pass with BLEND. Sums in f32 and rounds once; writes zeros where no modality is present. Does not read
 * gradients of weight 0.
 */
gradblend_status gradblend_blend(gradblend_blender *blender, const gradblend_plan *plan, void *stream);

/* gradblend_pass with DOT, BLEND and OBSERVE: bit for bit equal to the three in this order, in one pass over memory. */
gradblend_status gradblend_step(gradblend_blender *blender, const gradblend_plan *plan, void *stream);

/*
 * Starts a new super-epoch: zeroes n, m, S, `skipped`, the flags and the pending sums, and keeps the weights.
 * Errors: INVALID_ARGUMENT, CUDA.
 */
gradblend_status gradblend_reset(gradblend_blender *blender, void *stream);

/*
 * Puts `weights` in force as given, with any signs and any sum. For offline blending.
 * Errors: INVALID_ARGUMENT for a `count` other than K or a weight that is not finite as f32; CUDA.
 */
gradblend_status gradblend_set_weights(gradblend_blender *blender, const double *weights, uint32_t count,
                                       void *stream);

/*
 * Sets the address of the factor by which the gradients of an observation are scaled, as in mixed-precision training.
 * The factor is on the blender's device, is read at each observe and stays the caller's; NULL is a factor of 1. c and d
 * are divided by its square. A factor of 0, or one that is not finite, makes the observation not finite. The address is
 * not part of the saved state. A graph keeps the address that it was captured with.
 * Errors: INVALID_ARGUMENT for an address that is not aligned to a float or, on a CUDA device, unknown to the driver.
 */
gradblend_status gradblend_set_grad_scale(gradblend_blender *blender, const float *scale);

/*
 * Reads the state of the blender. `report->size` is set by the caller to the size of the record; nothing is written past
 * it. A larger record than the library knows is filled as far as the library goes, and `report->size` then says how far. A
 * program compiled with the header of 0.1.0 need not set it. Synchronizes `stream`.
 * Errors: INVALID_ARGUMENT, also for a `size` below that of version 0.1.0 (1,072); CUDA.
 */
gradblend_status gradblend_get_report(gradblend_blender *blender, gradblend_report *report, void *stream);

/* Reads S, row-major; zeros before the first observation. Synchronizes `stream`. Errors: INVALID_ARGUMENT, CUDA. */
gradblend_status gradblend_get_second_moments(gradblend_blender *blender, double *second_moment /* K x K */,
                                              void *stream);

/*
 * Returns the device address of the K weights in force, as float, for a backward pass on the weighted loss. Leave out
 * losses of weight 0, because 0 times an infinity is NaN. The memory is the blender's, and the address is the same for
 * its life. On a CUDA device, read it in work that is ordered after the blender's work, by its stream or by events; on
 * the CPU, while no call on the blender runs.
 * Errors: INVALID_ARGUMENT.
 */
gradblend_status gradblend_device_weights(const gradblend_blender *blender, const float **weights);

/*
 * Returns the device address of the 2K pending sums, c_0 .. c_K-1 then d_0 .. d_K-1, and 2K. The memory is the
 * blender's, and the address is the same for its life. A sharded trainer all-reduces them between DOT and OBSERVE.
 * Access them as the weights of gradblend_device_weights.
 * Errors: INVALID_ARGUMENT.
 */
gradblend_status gradblend_pending_sums(const gradblend_blender *blender, double **sums, uint32_t *count);

/*
 * Copies the whole state, bit for bit, to `buffer`. `*bytes` is the size of `buffer` and is set to the bytes written.
 * With a NULL `buffer` it only sets `*bytes` to the size needed. Any blender of the same K, average and decay can load
 * the state, on the CPU or on a GPU. Synchronizes `stream`.
 * Errors: INVALID_ARGUMENT; if `buffer` is too small, `*bytes` is set to the size needed; CUDA.
 */
gradblend_status gradblend_save(gradblend_blender *blender, void *buffer, size_t *bytes, void *stream);

/*
 * Restores a state written by gradblend_save of this or an earlier version, of exactly `bytes` bytes. Standard errors are
 * unknown (infinite) after a state of 0.1.0, until a reset.
 * Errors: CORRUPT_STATE; INVALID_ARGUMENT for the state of another K, average or decay; CUDA. The blender is then
 * unchanged.
 */
gradblend_status gradblend_load(gradblend_blender *blender, const void *buffer, size_t bytes, void *stream);

/* DLPack, the exchange format of array libraries. Its dlpack.h defines these structs and is not needed here. */
struct DLManagedTensor;
struct DLManagedTensorVersioned;

/* A DLPack array: one of the two pointers, or neither where the gradient is absent. */
typedef struct gradblend_dlpack {
    const struct DLManagedTensor *managed;            /* from a capsule named "dltensor" */
    const struct DLManagedTensorVersioned *versioned; /* from one named "dltensor_versioned" */
} gradblend_dlpack;

/*
 * Fills `tensor` from DLPack arrays of any framework, without a copy. Each array must be on `device` (CUDA's pinned
 * and managed memory is accepted for any device), of dtype float32, float16 or bfloat16, and dense: its
 * elements fill its memory in any order of the dimensions, transposed or with the channels last too. All arrays of a
 * tensor have one dtype, the same number of elements, and the same order of them in memory; mixed orders are an error.
 * An array from a capsule named "dltensor" cannot say that it is read-only: give as `blended` only one that may be
 * written to, and prefer "dltensor_versioned", of which a read-only one is an error.
 * The byte offset is honoured. A record of two NULLs is an absent gradient, and so is NULL for `train`, `valid` or
 * `blended`. `addresses` is the caller's memory for K = `modalities` addresses; `tensor->modalities` will point to it.
 * The arrays stay the caller's: no deleter is called, and they must stay valid while the tensor is part of a plan. An
 * array without elements gives an empty tensor without addresses. No stream, any thread.
 * Errors: INVALID_ARGUMENT; the message names the array. If all arrays are absent, the length is unknown: an error.
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
