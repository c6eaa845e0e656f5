/*
 * Drives the whole C ABI from bytes: a little interpreter whose input is a list of operations on a few places for
 * blenders, plans and saved states, and an arena that gradients lie in. Anything a caller can get wrong without lying
 * about memory is tried: raw bytes as configurations, states and DLPack records, handles that are stale or of another
 * kind, addresses that are misaligned or overlap, in any order.
 *
 * A small model knows which calls must be refused and which must not. After each call the status is one of the header's
 * and never INTERNAL, an error has a message, and what a blender knows is finite.
 *
 * A target for libFuzzer: tests/fuzz/run builds and runs it.
 */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../c/dlpack.h"
#include "gradblend.h"

#define MAX_K GRADBLEND_MAX_MODALITIES
enum { SLOTS = 3, ARENA = 2048, MAX_TENSORS = 4, MAX_OPERATIONS = 48, MAX_DIMENSIONS = 4 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define DEMAND(what) ((what) ? (void)0 : broken(__LINE__, #what))
static void broken(int line, const char *what)
{
    char message[256];
    gradblend_last_error(message, sizeof message);
    fprintf(stderr, "abi.c:%d: broken: %s\n    last error: %s\n", line, what, message);
    abort();
}

/* The input. What is not there reads as 0. */
static const uint8_t *input;
static size_t input_left;

static void take_bytes(void *to, size_t bytes)
{
    size_t given = bytes < input_left ? bytes : input_left;
    memset(to, 0, bytes);
    if (given > 0) {
        memcpy(to, input, given);
    }
    input += given;
    input_left -= given;
}

static uint8_t take(void)
{
    uint8_t byte;
    take_bytes(&byte, 1);
    return byte;
}

static uint32_t take_below(uint32_t n)
{
    return take() % n;
}

static uint64_t take_u64(void)
{
    uint64_t number;
    take_bytes(&number, sizeof number);
    return number;
}

/* Small numbers mostly, and any bits. */
static double take_double(void)
{
    static const double some[] = {0, -0.0, 1, -1, 0.5, 1e-12, 0.99, 1e300, -1e300, 5e-324, 1e154, INFINITY, NAN, 3};
    uint8_t byte = take();
    if (byte >= 0xf0) {
        uint64_t bits = take_u64();
        double number;
        memcpy(&number, &bits, sizeof number);
        return number;
    }
    return byte & 1 ? (byte - 120) / 16.0 : some[(byte >> 1) % (sizeof some / sizeof *some)];
}

typedef struct {
    gradblend_blender *handle;
    bool alive;
    uint32_t k;
    uint64_t number; /* differs between blenders that had one place after the other */
} blender_slot;

typedef struct {
    gradblend_plan *handle;
    bool alive;
    uint32_t k;
    uint64_t blender;
    uint64_t count;
    uint64_t len[MAX_TENSORS];
    int32_t dtype[MAX_TENSORS];
} plan_slot;

typedef struct {
    unsigned char *bytes;
    size_t size;
} saved_slot;

static blender_slot blenders[SLOTS];
static plan_slot plans[SLOTS];
static saved_slot saved[SLOTS];
static unsigned char *arena;
static uint64_t blenders_made;
static gradblend_tensor tensors[MAX_TENSORS];
static const void *addresses[MAX_TENSORS][MAX_K];
static const size_t SIZES[] = {4, 2, 2};

/* What holds after every call. */
static gradblend_status told(gradblend_status status)
{
    DEMAND(status >= GRADBLEND_OK && status < GRADBLEND_INTERNAL);
    if (status != GRADBLEND_OK) {
        char message[512];
        size_t length = gradblend_last_error(message, sizeof message);
        DEMAND(length > 0);
        DEMAND(strlen(message) == (length < sizeof message ? length : sizeof message - 1));
    }
    return status;
}

/* A call that must be done, or refused for its arguments. */
#define must(call, good) outcome(call, good, __LINE__, #call)
static bool outcome(gradblend_status status, bool good, int line, const char *call)
{
    if (told(status) != (good ? GRADBLEND_OK : GRADBLEND_INVALID_ARGUMENT)) {
        fprintf(stderr, "%s, which must %s\n", gradblend_status_name(status), good ? "be done" : "be refused");
        broken(line, call);
    }
    return good;
}

/* A handle that was never given out: any number but those that are. */
static uintptr_t take_garbage(void)
{
    uintptr_t number = (uintptr_t)take_u64();
    for (size_t i = 0; i < SLOTS; i++) {
        if (number == (uintptr_t)blenders[i].handle || number == (uintptr_t)plans[i].handle) {
            return 0;
        }
    }
    return number;
}

/* A blender of a slot, alive or not; now and then what is none. `slot` is NULL for that. */
static gradblend_blender *take_blender(blender_slot **slot)
{
    uint8_t byte = take();
    *slot = NULL;
    if (byte < 0xf0) {
        blender_slot *found = &blenders[byte % SLOTS];
        *slot = found->alive ? found : NULL;
        return found->handle;
    }
    return byte < 0xf8 ? (gradblend_blender *)plans[byte % SLOTS].handle : (gradblend_blender *)take_garbage();
}

static gradblend_plan *take_plan(plan_slot **slot)
{
    uint8_t byte = take();
    *slot = NULL;
    if (byte < 0xf0) {
        plan_slot *found = &plans[byte % SLOTS];
        *slot = found->alive ? found : NULL;
        return found->handle;
    }
    return byte < 0xf8 ? (gradblend_plan *)blenders[byte % SLOTS].handle : (gradblend_plan *)take_garbage();
}

/* The CPU ignores streams. */
static void *take_stream(void)
{
    return take() ? NULL : (void *)(uintptr_t)take_u64();
}

/* What a live blender knows is finite, whatever it went through. */
static void check_blender(const blender_slot *slot)
{
    gradblend_report report;
    static double s[MAX_K * MAX_K];
    DEMAND(gradblend_get_report(slot->handle, &report, NULL) == GRADBLEND_OK);
    DEMAND(gradblend_get_second_moments(slot->handle, s, NULL) == GRADBLEND_OK);
    DEMAND(report.size == sizeof report && report.modalities == slot->k && report.flags <= 7);
    DEMAND((uint64_t)report.nonfinite >> slot->k == 0);
    const float *weights = NULL;
    DEMAND(gradblend_device_weights(slot->handle, &weights) == GRADBLEND_OK && weights);
    for (uint32_t k = 0; k < slot->k; k++) {
        DEMAND(isfinite(report.weights[k]) && isfinite(weights[k]));
        DEMAND(weights[k] == (float)report.weights[k]);
        DEMAND(memcmp(&s[k * slot->k + k], &report.second_moment[k], sizeof *s) == 0);
    }
    for (uint32_t i = 0; i < slot->k * slot->k; i++) {
        DEMAND(isfinite(report.mean[i / slot->k]) && isfinite(s[i]) && (s[i] >= 0 || i % (slot->k + 1) != 0));
    }
}

/* Raw bytes, or the defaults with some changed. Threads take time to start: few are asked for, or more than can be. */
static gradblend_config take_config(void)
{
    gradblend_config config;
    uint8_t kind = take();
    if (kind % 8 == 0) {
        take_bytes(&config, sizeof config);
    } else {
        uint32_t k = 1 + take_below(kind % 8 == 1 ? MAX_K + 3 : 5);
        if (told(gradblend_config_default(k, &config)) != GRADBLEND_OK) {
            DEMAND(k > MAX_K);
            memset(&config, 0, sizeof config);
        }
        uint8_t bits = take();
        config.average = bits & 1;
        config.overfitting = bits >> 1 & 1;
        config.negative = bits >> 2 & 1;
        config.cadence = bits >> 3 & 1;
        config.threads = bits & 16 ? 2 : 1;
        if (bits & 32) {
            config.decay = take_double();
        }
        if (bits & 64) {
            config.damping = take_double();
        }
        if (bits & 128) {
            ((uint8_t *)&config)[take_below(sizeof config)] ^= take();
        }
    }
    if (config.threads > 3 && config.threads <= 4096) {
        config.threads = 3;
    }
    return config;
}

static bool good_config(const gradblend_config *config)
{
    bool codes = (config->average & ~1) == 0 && (config->overfitting & ~1) == 0 && (config->negative & ~1) == 0 &&
                 (config->cadence & ~1) == 0;
    bool decay = config->average == GRADBLEND_MEAN || (config->decay >= 0 && config->decay < 1);
    return config->size == sizeof *config && config->reserved == 0 && config->modalities >= 1 &&
           config->modalities <= MAX_K && codes && decay && config->damping >= 0 && isfinite(config->damping);
}

static void create_blender(void)
{
    blender_slot *slot = &blenders[take_below(SLOTS)];
    gradblend_config config = take_config();
    uint8_t bits = take();
    if (slot->alive) {
        gradblend_blender_destroy(slot->handle);
        slot->alive = false;
    }
    gradblend_blender *made = NULL;
    unsigned char shifted[sizeof config + 8];
    memcpy(shifted + 1, &config, sizeof config);
    switch (bits) {
    case 255: must(gradblend_blender_create(GRADBLEND_CPU, NULL, &made), false); break;
    case 254: must(gradblend_blender_create(GRADBLEND_CPU, &config, NULL), false); break;
    case 253: must(gradblend_blender_create(-2 - take(), &config, &made), false); break;
    case 252: must(gradblend_blender_create(GRADBLEND_CPU, (gradblend_config *)(shifted + 1), &made), false); break;
    default:
        if (must(gradblend_blender_create(GRADBLEND_CPU, &config, &made),
                 good_config(&config) && config.threads <= 4096)) {
            DEMAND(made);
            *slot = (blender_slot){made, true, config.modalities, ++blenders_made};
            check_blender(slot);
            return;
        }
    }
    DEMAND(!made);
}

static void destroy_blender(void)
{
    blender_slot *slot;
    gradblend_blender *handle = take_blender(&slot);
    gradblend_blender_destroy(handle);
    if (slot) {
        slot->alive = false;
    }
}

/* An address in the arena, NULL, or, as the input likes, aligned to nothing. */
static void *take_address(void)
{
    uint8_t byte = take();
    if (byte < 64) {
        return NULL;
    }
    return arena + (byte % 128) * 16 + (byte >= 0xf8 ? take_below(16) : 0);
}

static uint64_t start_of(const void *address)
{
    return (uint64_t)(uintptr_t)address;
}

/*
 * Tensors for a blender of K modalities, at most MAX_TENSORS of them. Lengths keep every list within the arena, or are
 * so long that no list of them fits into memory. Says whether they are as a plan needs them, but for overlaps.
 */
static bool take_tensors(uint32_t k, uint64_t *count)
{
    bool good = true;
    *count = take_below(MAX_TENSORS + 1);
    for (uint64_t i = 0; i < *count; i++) {
        gradblend_tensor *tensor = &tensors[i];
        uint8_t shape = take();
        tensor->dtype = shape % 3;
        if (shape >= 0xfc) {
            take_bytes(&tensor->dtype, sizeof tensor->dtype);
        }
        bool known = tensor->dtype >= GRADBLEND_F32 && tensor->dtype <= GRADBLEND_BF16;
        size_t size = known ? SIZES[tensor->dtype] : 4;
        tensor->train = take_address();
        tensor->valid = take() < 0xe0 && tensor->train ? arena + take_below(128) * 16 : take_address();
        uint8_t which = take();
        for (uint32_t j = 0; j < k; j++) {
            addresses[i][j] = which & 128 ? take_address() : arena + 16 * ((j * (which & 31) + i * 32) % 128);
        }
        tensor->modalities = addresses[i];
        switch (take_below(4)) {
        case 0: tensor->blended = NULL; break;
        case 1: tensor->blended = (void *)addresses[i][take() % k]; break;
        default: tensor->blended = take_address();
        }
        if (shape == 0xfb) {
            tensor->modalities = take() & 1 ? NULL : (const void *const *)((const char *)addresses[i] + 4);
            good = false;
        }
        const void *lists[MAX_K + 3] = {tensor->train, tensor->valid, tensor->blended};
        memcpy(lists + 3, addresses[i], k * sizeof *lists);
        uint64_t room = ARENA / size;
        for (uint32_t j = 0; j < k + 3; j++) {
            if (lists[j]) {
                uint64_t behind = (ARENA - (start_of(lists[j]) - start_of(arena))) / size;
                room = behind < room ? behind : room;
                good = good && start_of(lists[j]) % size == 0;
            }
        }
        uint8_t len = take();
        /* Up to the end of the arena often, where reading on is seen. */
        tensor->len = len < 0xc0 ? len % (room + 1) : len < 0xf0 ? room : (uint64_t)1 << 62 | take_u64();
        good = good && known && len < 0xf0 && !tensor->train == !tensor->valid;
    }
    return good;
}

static bool overlap(uint64_t a, const void *one, uint64_t b, const void *other)
{
    uint64_t bytes[] = {tensors[a].len * SIZES[tensors[a].dtype], tensors[b].len * SIZES[tensors[b].dtype]};
    return one && other && bytes[0] > 0 && bytes[1] > 0 && start_of(one) < start_of(other) + bytes[1] &&
           start_of(other) < start_of(one) + bytes[0];
}

/* Whether a blended gradient shares memory with another list, but for one modality gradient that it is the whole of. */
static bool blends_overlap(uint32_t k, uint64_t count)
{
    for (uint64_t a = 0; a < count; a++) {
        uint32_t in_place = 0;
        for (uint64_t b = 0; b < count; b++) {
            if ((a != b && overlap(a, tensors[a].blended, b, tensors[b].blended)) ||
                overlap(a, tensors[a].blended, b, tensors[b].train) ||
                overlap(a, tensors[a].blended, b, tensors[b].valid)) {
                return true;
            }
            for (uint32_t j = 0; j < k; j++) {
                if (overlap(a, tensors[a].blended, b, addresses[b][j])) {
                    in_place++;
                    if (a != b || tensors[a].blended != addresses[b][j] || in_place > 1) {
                        return true;
                    }
                }
            }
        }
    }
    return false;
}

static void keep_plan(plan_slot *slot, const blender_slot *blender, gradblend_plan *made, uint64_t count)
{
    DEMAND(made);
    *slot = (plan_slot){.handle = made, .alive = true, .k = blender->k, .blender = blender->number, .count = count};
    for (uint64_t i = 0; i < count; i++) {
        slot->len[i] = tensors[i].len;
        slot->dtype[i] = tensors[i].dtype;
    }
}

static plan_slot *free_plan(void)
{
    plan_slot *slot = &plans[take_below(SLOTS)];
    if (slot->alive) {
        gradblend_plan_destroy(slot->handle);
        slot->alive = false;
    }
    return slot;
}

static void create_plan(void)
{
    plan_slot *slot = free_plan();
    blender_slot *blender;
    gradblend_blender *handle = take_blender(&blender);
    uint32_t k = blender ? blender->k : 1;
    uint64_t count;
    bool good = take_tensors(k, &count) && !blends_overlap(k, count);
    gradblend_plan *made = NULL;
    uint8_t bits = take();
    if (bits < 0xf8) {
        const gradblend_tensor *list = count == 0 && bits & 1 ? NULL : tensors;
        if (must(gradblend_plan_create(handle, list, count, &made), blender && good)) {
            keep_plan(slot, blender, made, count);
            return;
        }
    } else if (bits < 0xfa) {
        must(gradblend_plan_create(handle, tensors, (uint64_t)1 << 58 | take_u64(), &made), false);
    } else if (bits < 0xfc) {
        must(gradblend_plan_create(handle, NULL, count + 1, &made), false);
    } else if (bits < 0xfe) {
        must(gradblend_plan_create(handle, (gradblend_tensor *)((char *)tensors + 1), 1, &made), false);
    } else {
        must(gradblend_plan_create(handle, tensors, count, NULL), false);
    }
    DEMAND(!made);
}

static void update_plan(void)
{
    plan_slot *slot;
    gradblend_plan *handle = take_plan(&slot);
    uint32_t k = slot ? slot->k : 1;
    uint64_t count;
    uint8_t bits = take();
    bool good = take_tensors(k, &count);
    if (slot && bits & 3) {
        /* Mostly the right count, dtypes, and lengths, as far as the arena has room for these. */
        good = good && count >= slot->count;
        count = good ? slot->count : count;
        for (uint64_t i = 0; good && i < count; i++) {
            good = tensors[i].dtype == slot->dtype[i] && tensors[i].len >= slot->len[i];
            tensors[i].len = good ? slot->len[i] : tensors[i].len;
        }
    }
    for (uint64_t i = 0; slot && i < count; i++) {
        good = good && count == slot->count && tensors[i].dtype == slot->dtype[i] && tensors[i].len == slot->len[i];
    }
    good = good && slot && count == slot->count && !blends_overlap(k, count);
    gradblend_status status = told(gradblend_plan_update(handle, tensors, count, take_stream()));
    DEMAND((status == GRADBLEND_OK) == good);
}

static void destroy_plan(void)
{
    plan_slot *slot;
    gradblend_plan *handle = take_plan(&slot);
    gradblend_plan_destroy(handle);
    if (slot) {
        slot->alive = false;
    }
}

static void run_pass(void)
{
    blender_slot *blender;
    plan_slot *plan;
    gradblend_blender *handle = take_blender(&blender);
    gradblend_plan *list = take_plan(&plan);
    uint8_t bits = take();
    uint32_t what = bits < 0xf0 ? bits % 16 : (uint32_t)take_u64();
    bool good = blender && plan && plan->blender == blender->number;
    bool bits_good = what > 0 && what < 16 && ((what & GRADBLEND_BLEND) || !(what & GRADBLEND_ACCUMULATE));
    void *stream = take_stream();
    switch (take_below(8)) {
    case 0: must(gradblend_dot(handle, list, stream), good); break;
    case 1: must(gradblend_blend(handle, list, stream), good); break;
    case 2: must(gradblend_step(handle, list, stream), good); break;
    default: must(gradblend_pass(handle, list, what, stream), good && bits_good);
    }
}

static void run_blender(void)
{
    blender_slot *slot;
    gradblend_blender *handle = take_blender(&slot);
    switch (take_below(3)) {
    case 0: must(gradblend_observe(handle, take_stream()), slot); break;
    case 1: must(gradblend_reweight(handle, take_stream()), slot); break;
    default: must(gradblend_reset(handle, take_stream()), slot);
    }
}

static void set_weights(void)
{
    blender_slot *slot;
    gradblend_blender *handle = take_blender(&slot);
    double weights[MAX_K];
    uint8_t bits = take();
    uint32_t count = bits < 0xf0 && slot ? slot->k : take();
    bool good = slot && count == slot->k;
    for (uint32_t k = 0; k < MAX_K; k++) {
        weights[k] = k < count ? take_double() : 0;
        /* Halfway between the largest f32 and the power of two behind it, and beyond, rounds to infinity. */
        good = good && fabs(weights[k]) < 0x1.ffffffp127;
    }
    const double *list = bits == 0xfe ? NULL : bits == 0xff ? (double *)((char *)weights + 4) : weights;
    /* The other counts are refused before anything is read. */
    must(gradblend_set_weights(handle, list, count, take_stream()), good && list == weights);
}

static void set_grad_scale(void)
{
    blender_slot *slot;
    gradblend_blender *handle = take_blender(&slot);
    unsigned char *address = take() & 1 ? take_address() : arena + take_below(64) * 4;
    must(gradblend_set_grad_scale(handle, (const float *)(void *)address), slot && start_of(address) % 4 == 0);
}

static void read_blender(void)
{
    blender_slot *slot;
    gradblend_blender *handle = take_blender(&slot);
    union {
        gradblend_report report;
        double s[MAX_K * MAX_K];
        char bytes[8];
    } room;
    const float *weights = NULL;
    double *sums = NULL;
    uint32_t count = 0;
    const float **to = take() & 1 ? &weights : NULL;
    switch (take_below(8)) {
    case 0: must(gradblend_get_report(handle, NULL, take_stream()), false); break;
    case 1: must(gradblend_get_second_moments(handle, NULL, take_stream()), false); break;
    case 2: must(gradblend_get_report(handle, (gradblend_report *)(room.bytes + 4), NULL), false); break;
    case 3: must(gradblend_device_weights(handle, to), slot && to); break;
    case 4: must(gradblend_pending_sums(handle, &sums, NULL), false); break;
    case 5: must(gradblend_get_second_moments(handle, room.s, take_stream()), slot); break;
    case 6: must(gradblend_get_report(handle, &room.report, take_stream()), slot); break;
    default:
        if (must(gradblend_pending_sums(handle, &sums, &count), slot)) {
            DEMAND(count == 2 * slot->k);
            sums[take_below(count)] = take_double();
        }
    }
}

static void save_state(void)
{
    blender_slot *slot;
    gradblend_blender *handle = take_blender(&slot);
    saved_slot *to = &saved[take_below(SLOTS)];
    size_t needed = 7;
    if (!must(gradblend_save(handle, NULL, &needed, take_stream()), slot)) {
        DEMAND(needed == 7);
        return;
    }
    uint8_t bits = take();
    unsigned char *bytes = malloc(needed);
    if (!bytes) {
        return;
    }
    size_t room = bits < 0xf0 ? needed : take_u64() % needed;
    bool good = room == needed;
    if (bits == 0xff) {
        must(gradblend_save(handle, bytes, NULL, NULL), false);
    }
    must(gradblend_save(handle, bytes, &room, take_stream()), good);
    DEMAND(room == needed);
    if (good) {
        free(to->bytes);
        *to = (saved_slot){bytes, needed};
    } else {
        free(bytes);
    }
}

/* The checksum that ends a saved state, so that what is behind it is reached. */
static void seal(unsigned char *bytes, size_t size)
{
    uint32_t crc = UINT32_MAX;
    for (size_t i = 0; i + 4 < size; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
        }
    }
    for (size_t i = 0; i < 4 && size >= 4; i++) {
        bytes[size - 4 + i] = (unsigned char)(~crc >> 8 * i);
    }
}

static void load_state(void)
{
    blender_slot *slot;
    gradblend_blender *handle = take_blender(&slot);
    const saved_slot *from = &saved[take_below(SLOTS)];
    uint8_t bits = take();
    size_t size = bits & 1 ? take() * 4u : from->size;
    unsigned char *bytes = malloc(size + 1);
    if (!bytes) {
        return;
    }
    memset(bytes, 0, size + 1);
    memcpy(bytes, from->bytes ? from->bytes : bytes, from->size < size ? from->size : size);
    if (bits & 2 && size > 0) {
        for (uint32_t flips = take_below(16); flips > 0; flips--) {
            uint32_t at = take() | (uint32_t)(take() & 63) << 8;
            bytes[at % size] = take();
        }
    }
    if (bits & 4) {
        seal(bytes, size);
    }
    if (bits == 0xff) {
        must(gradblend_load(handle, NULL, size, NULL), false);
    }
    gradblend_status status = told(gradblend_load(handle, bytes, size, take_stream()));
    DEMAND(status == GRADBLEND_OK || status == GRADBLEND_INVALID_ARGUMENT || status == GRADBLEND_CORRUPT_STATE);
    DEMAND(slot || status == GRADBLEND_INVALID_ARGUMENT);
    free(bytes);
}

static void solve_numbers(void)
{
    static double numerator[MAX_K], s[MAX_K * MAX_K], in_force[MAX_K], weights[MAX_K];
    gradblend_config config = take_config();
    uint8_t bits = take();
    bool good = good_config(&config);
    uint32_t k = good ? config.modalities : 1;
    for (uint32_t i = 0; i < k; i++) {
        numerator[i] = take_double();
        in_force[i] = bits & 4 ? take_double() : 1;
        good = good && isfinite(numerator[i]) && isfinite(in_force[i]);
    }
    for (uint32_t i = 0; i < k * k; i++) {
        s[i] = bits & 2 || i % (k + 1) == 0 ? take_double() : 0;
        good = good && isfinite(s[i]) && (s[i] >= 0 || i % (k + 1) != 0);
    }
    const double none = -7;
    uint32_t flags = 77;
    weights[0] = none;
    if (bits < 16) {
        must(gradblend_solve(bits < 8 ? &config : NULL, bits & 1 ? numerator : NULL, bits & 2 ? s : NULL, NULL,
                             bits & 4 ? weights : NULL, bits >= 4 ? NULL : &flags), false);
    } else if (must(gradblend_solve(&config, numerator, s, bits & 4 ? in_force : NULL, bits & 8 ? numerator : weights,
                                    &flags), good)) {
        const double *got = bits & 8 ? numerator : weights;
        DEMAND(flags <= 7 && !(flags & GRADBLEND_FLAG_NONFINITE));
        double sum = 0, size = 0;
        for (uint32_t i = 0; i < k; i++) {
            DEMAND(isfinite(got[i]));
            DEMAND(config.negative == GRADBLEND_SIGNED || got[i] >= 0 || flags & GRADBLEND_FLAG_HELD);
            sum += got[i];
            size += fabs(got[i]);
        }
        DEMAND(flags & GRADBLEND_FLAG_HELD || fabs(sum - 1) <= ldexp(4.0 * k * size, -53));
        return;
    }
    DEMAND(weights[0] == none && flags == 77);
}

/* Records whose fields are the input's, but for pointers, which are NULL or as the field beside them says. */
typedef struct {
    DLManagedTensor managed;
    DLManagedTensorVersioned versioned;
    int64_t shape[MAX_DIMENSIONS], strides[MAX_DIMENSIONS];
} record;

static int64_t take_dimension(void)
{
    uint8_t byte = take();
    return byte < 0xe0 ? byte % 24 : byte < 0xf0 ? byte - 0xe4 : (int64_t)take_u64();
}

static void never_managed(DLManagedTensor *self)
{
    (void)self;
    broken(__LINE__, "no deleter is called");
}

static void never_versioned(DLManagedTensorVersioned *self)
{
    (void)self;
    broken(__LINE__, "no deleter is called");
}

static void take_record(record *record, gradblend_dlpack *to)
{
    uint8_t kind = take();
    DLTensor tensor = {.data = take_address(), .device = {kDLCPU, 0}, .dtype = {kDLFloat, 32, 1}};
    uint8_t form = take();
    if (form & 1) {
        tensor.dtype.bits = 16;
        tensor.dtype.code = form & 2 ? kDLBfloat : kDLFloat;
    }
    if (form >= 0xf0) {
        take_bytes(&tensor.dtype, sizeof tensor.dtype);
    }
    if (form % 16 == 4) {
        take_bytes(&tensor.device, sizeof tensor.device);
    }
    tensor.byte_offset = form % 16 == 5 ? take_u64() : form % 16 == 6 ? take() : 0;
    tensor.ndim = form % 16 == 7 ? -(int32_t)take() : (int32_t)(form >> 4) % (MAX_DIMENSIONS + 1);
    for (int32_t i = 0; i < MAX_DIMENSIONS; i++) {
        record->shape[i] = take_dimension();
    }
    int64_t stride = 1;
    for (int32_t i = tensor.ndim; i-- > 0;) {
        record->strides[i] = kind & 16 ? take_dimension() : stride;
        stride = (int64_t)((uint64_t)stride * (uint64_t)record->shape[i]);
    }
    tensor.shape = kind == 0xff ? NULL : record->shape;
    tensor.strides = kind & 32 ? record->strides : NULL;
    record->managed = (DLManagedTensor){tensor, NULL, never_managed};
    record->versioned = (DLManagedTensorVersioned){{1, take()}, NULL, never_versioned, 0, tensor};
    if (kind & 64) {
        record->versioned.version.major = take();
        record->versioned.flags = take_u64();
    }
    to->managed = kind % 4 == 0 || kind % 4 == 3 ? &record->managed : NULL;
    to->versioned = kind % 4 == 1 || kind % 16 == 3 ? &record->versioned : NULL;
}

static void from_dlpack(void)
{
    static record records[MAX_K + 3];
    static gradblend_dlpack lists[MAX_K + 3];
    plan_slot *slot = free_plan();
    blender_slot *blender;
    gradblend_blender *handle = take_blender(&blender);
    uint8_t bits = take();
    uint32_t k = blender && bits < 0xf0 ? blender->k : take();
    uint32_t given = k <= MAX_K ? k : 1;
    /* One record for all, or one for each. */
    for (uint32_t i = 0; i < given + 3; i++) {
        if (bits & 1 && i > 0) {
            lists[i] = lists[0];
        } else {
            take_record(&records[i], &lists[i]);
        }
    }
    int32_t device = bits & 64 ? (int32_t)take() - 8 : GRADBLEND_CPU;
    memset(tensors, 0, sizeof *tensors);
    tensors->len = 77;
    gradblend_status status = told(gradblend_tensor_from_dlpack(
        device, k, bits & 2 ? lists + given : NULL, bits & 2 ? lists + given + 1 : NULL, bits & 4 ? NULL : lists,
        bits & 8 ? lists + given + 2 : NULL, bits & 32 && bits & 16 ? NULL : addresses[0], tensors));
    DEMAND(status == GRADBLEND_OK || status == GRADBLEND_INVALID_ARGUMENT);
    if (status != GRADBLEND_OK) {
        DEMAND(tensors->len == 77);
        return;
    }
    DEMAND(k >= 1 && k <= MAX_K && device >= -1 && !(bits & 4) && tensors->modalities == addresses[0]);
    DEMAND(tensors->dtype >= GRADBLEND_F32 && tensors->dtype <= GRADBLEND_BF16);
    /* Records may describe what is not there. What they say is used where it is the arena's. */
    const void *all[MAX_K + 3] = {tensors->train, tensors->valid, tensors->blended};
    memcpy(all + 3, addresses[0], k * sizeof *all);
    bool there = tensors->len <= ARENA;
    for (uint32_t i = 0; i < k + 3; i++) {
        uint64_t at = start_of(all[i]) - start_of(arena);
        there = there && (!all[i] || (at <= ARENA && tensors->len * SIZES[tensors->dtype] <= ARENA - at));
        DEMAND(start_of(all[i]) % SIZES[tensors->dtype] == 0);
    }
    gradblend_plan *made = NULL;
    if (there && blender && blender->k == k &&
        must(gradblend_plan_create(handle, tensors, 1, &made),
             !tensors->train == !tensors->valid && !blends_overlap(k, 1))) {
        keep_plan(slot, blender, made, 1);
    }
}

static void fill_arena(void)
{
    uint8_t at = take(), bytes = take(), kind = take_below(4);
    for (uint32_t i = 0; i + 4 <= bytes && at * 8u + i + 4 <= ARENA; i += 4) {
        float number = (float)take_double();
        if (kind == 0) {
            take_bytes(&number, sizeof number);
        }
        memcpy(arena + at * 8u + i, &number, sizeof number);
    }
}

static void ask(void)
{
    char buffer[8] = "UUUUUUU";
    size_t room = take_below(8);
    size_t length = gradblend_last_error(buffer, room);
    DEMAND(room == 0 || strlen(buffer) <= room - 1);
    DEMAND(buffer[room] == 'U' || room == 7);
    DEMAND(gradblend_last_error(NULL, room) == length);
    DEMAND(*gradblend_status_name((gradblend_status)take_u64()));
    gradblend_config config;
    uint32_t k = (uint32_t)take_u64();
    must(gradblend_config_default(k, &config), k >= 1 && k <= MAX_K);
    must(gradblend_config_default(k, NULL), false);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const operations[])(void) = {
        create_blender, create_plan, run_pass,   run_pass,     run_blender,   set_weights, set_grad_scale, read_blender,
        save_state,     load_state,  load_state, solve_numbers, from_dlpack,  fill_arena,  ask,            update_plan,
        destroy_blender, destroy_plan, create_plan, run_blender,
    };
    input = data;
    input_left = size;
    arena = malloc(ARENA);
    DEMAND(arena);
    memset(arena, 0x3f, ARENA);
    for (int done = 0; done < MAX_OPERATIONS && input_left > 0; done++) {
        operations[take() % (sizeof operations / sizeof *operations)]();
        for (size_t i = 0; i < SLOTS; i++) {
            if (blenders[i].alive) {
                check_blender(&blenders[i]);
            }
        }
    }
    for (size_t i = 0; i < SLOTS; i++) {
        /* Twice, and stale ones too: nothing happens. */
        gradblend_plan_destroy(plans[i].handle);
        gradblend_blender_destroy(blenders[i].handle);
        gradblend_plan_destroy(plans[i].handle);
        gradblend_blender_destroy(blenders[i].handle);
        free(saved[i].bytes);
    }
    memset(plans, 0, sizeof plans);
    memset(blenders, 0, sizeof blenders);
    memset(saved, 0, sizeof saved);
    free(arena);
    return 0;
}
