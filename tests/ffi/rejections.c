/*
 * Errors that only a C caller can cause. Each call runs once with valid arguments, then with one argument or field
 * invalid. After each rejection the status is the documented one, the message names the fault, and nothing has changed:
 * the state of all blenders, the gradients, the inputs, and the memory behind out-parameters.
 */
#include <stddef.h>

#include "check.h"

enum { TENSORS = 3, LEN = 4, ROOM = 16, GUARD = 0xa5 };
enum { TRAIN, VALID, FIRST, SECOND, BLENDED, BUFFERS }; /* buffers of a tensor of two modalities */

/* The memory behind out-parameters. */
typedef struct {
    gradblend_config config;
    gradblend_blender *blender;
    gradblend_plan *plan;
    double weights[2], second_moment[4];
    uint32_t flags, count;
    gradblend_report report;
    const float *device_weights;
    double *sums;
    unsigned char buffer[512];
    size_t bytes;
} outputs;

/* The memory behind in-parameters. */
typedef struct {
    gradblend_config config;
    double numerator[2], second_moment[4], in_force[2], weights[3];
    gradblend_tensor tensors[TENSORS];
    const void *modalities[TENSORS][2];
    unsigned char saved[512];
} inputs;

/* The arguments of all calls. */
typedef struct {
    uint32_t modalities, what, weights_count;
    int32_t device;
    gradblend_config *to_config;
    const gradblend_config *config;
    const double *numerator, *second_moment, *in_force, *weights;
    double *to_weights, *to_second_moment;
    uint32_t *to_flags, *to_count;
    gradblend_blender **to_blender, *blender;
    const gradblend_tensor *tensors;
    uint64_t count;
    gradblend_plan **to_plan, *plan;
    const float *scale, **to_device_weights;
    gradblend_report *to_report;
    double **to_sums;
    void *buffer;
    size_t *bytes, saved_bytes;
    const void *saved;
} arguments;

/* Every call that returns a status, except tensor_from_dlpack, by its name. */
#define CALLS(CALL)                                                                                                    \
    CALL(config_default, a->modalities, a->to_config)                                                                  \
    CALL(solve, a->config, a->numerator, a->second_moment, a->in_force, a->to_weights, a->to_flags)                    \
    CALL(blender_create, a->device, a->config, a->to_blender)                                                          \
    CALL(plan_create, a->blender, a->tensors, a->count, a->to_plan)                                                    \
    CALL(plan_update, a->plan, a->tensors, a->count, NULL)                                                             \
    CALL(pass, a->blender, a->plan, a->what, NULL)                                                                     \
    CALL(dot, a->blender, a->plan, NULL)                                                                               \
    CALL(blend, a->blender, a->plan, NULL)                                                                             \
    CALL(step, a->blender, a->plan, NULL)                                                                              \
    CALL(observe, a->blender, NULL)                                                                                    \
    CALL(reweight, a->blender, NULL)                                                                                   \
    CALL(reset, a->blender, NULL)                                                                                      \
    CALL(set_weights, a->blender, a->weights, a->weights_count, NULL)                                                  \
    CALL(set_grad_scale, a->blender, a->scale)                                                                         \
    CALL(get_report, a->blender, a->to_report, NULL)                                                                   \
    CALL(get_second_moments, a->blender, a->to_second_moment, NULL)                                                    \
    CALL(device_weights, a->blender, a->to_device_weights)                                                             \
    CALL(pending_sums, a->blender, a->to_sums, a->to_count)                                                            \
    CALL(save, a->blender, a->buffer, a->bytes, NULL)                                                                  \
    CALL(load, a->blender, a->saved, a->saved_bytes, NULL)

typedef struct {
    const char *name, *arguments;
    gradblend_status (*run)(const arguments *);
} call;

#define DEFINE(name, ...)                                                                                              \
    static gradblend_status run_##name(const arguments *a) { return gradblend_##name(__VA_ARGS__); }                   \
    static const call name = {#name, #__VA_ARGS__ ",", run_##name};
CALLS(DEFINE)

#define ADDRESS(name, ...) &name,
static const call *const ALL[] = {CALLS(ADDRESS)};

static outputs out, out_before;
static inputs in = {.numerator = {1, 2}, .second_moment = {1, 0.5, 0.5, 2}, .in_force = {0.75, 0.25},
                    .weights = {0.25, 0.75, 1}}, in_before;
static arguments valid;
static float *memory, memory_before[TENSORS * BUFFERS * ROOM];
static gradblend_blender *own, *other;
static gradblend_plan *own_plan, *other_plan;
static unsigned char *own_saved, *other_saved;
static size_t saved_bytes;
static unsigned rejections;

static float *buffer_of(int tensor, int buffer) {
    return memory + (tensor * BUFFERS + buffer) * ROOM;
}

static void prepare(void) {
    memory = memory_random(COUNT(memory_before), 61);
    in.config = config_new(2, 1);
    own = blender_new(&in.config);
    other = blender_new(&in.config);
    for (int i = 0; i < TENSORS; i++) {
        in.modalities[i][0] = buffer_of(i, FIRST);
        in.modalities[i][1] = buffer_of(i, SECOND);
        in.tensors[i] = (gradblend_tensor){LEN, GRADBLEND_F32, buffer_of(i, TRAIN), buffer_of(i, VALID),
                                           in.modalities[i], buffer_of(i, BLENDED)};
    }
        own_plan = plan_new(own, in.tensors, TENSORS);
    other_plan = plan_new(other, in.tensors, TENSORS);
    /* States in which no part is zero. */
    for (int i = 0; i < 3; i++) {
        OK(gradblend_step(own, own_plan, NULL));
        OK(gradblend_step(other, other_plan, NULL));
    }
    OK(gradblend_reweight(own, NULL));
    OK(gradblend_dot(own, own_plan, NULL));
    own_saved = saved_state(own, &saved_bytes);
    other_saved = saved_state(other, &saved_bytes);
    synchronize();
    memcpy(memory_before, memory, sizeof memory_before);
    CHECK(saved_bytes <= sizeof in.saved && saved_bytes < sizeof out.buffer);
    memcpy(in.saved, own_saved, saved_bytes);
    valid = (arguments){
        .modalities = 2, .to_config = &out.config, .config = &in.config, .numerator = in.numerator,
        .second_moment = in.second_moment, .in_force = in.in_force, .to_weights = out.weights, .to_flags = &out.flags,
        .device = device, .to_blender = &out.blender, .blender = own, .tensors = in.tensors, .count = TENSORS,
        .to_plan = &out.plan, .plan = own_plan, .what = GRADBLEND_DOT, .weights = in.weights, .weights_count = 2,
        .scale = memory, .to_report = &out.report, .to_second_moment = out.second_moment,
        .to_device_weights = &out.device_weights, .to_sums = &out.sums, .to_count = &out.count, .buffer = out.buffer,
        .bytes = &out.bytes, .saved = in.saved, .saved_bytes = saved_bytes,
    };
    memset(&out, GUARD, sizeof out);
    out.bytes = sizeof out.buffer;
    out_before = out;
    in_before = in;
}

/* Restores everything that a successful call changes. */
static void restore(void) {
    OK(gradblend_set_grad_scale(own, NULL));
    OK(gradblend_load(own, own_saved, saved_bytes, NULL));
    in = in_before;
    OK(gradblend_plan_update(own_plan, in.tensors, TENSORS, NULL));
    synchronize();
    memcpy(memory, memory_before, sizeof memory_before);
    memcpy(&out, &out_before, sizeof out);
}

static void check_unchanged(void) {
    size_t bytes;
    CHECK(memcmp(&out, &out_before, sizeof out) == 0);
    unsigned char *saved = saved_state(own, &bytes);
    CHECK(bytes == saved_bytes && memcmp(saved, own_saved, bytes) == 0);
    free(saved);
    saved = saved_state(other, &bytes);
    CHECK(bytes == saved_bytes && memcmp(saved, other_saved, bytes) == 0);
    free(saved);
    synchronize();
    CHECK(memcmp(memory, memory_before, sizeof memory_before) == 0);
}

/* Checks that the last message has each of the words, which `|` separates. */
static void check_message(const char *words) {
    char message[512], word[64];
    CHECK(gradblend_last_error(message, sizeof message) > 0);
    for (int used; sscanf(words, "%63[^|]%n", word, &used) == 1; words += used + (words[used] == '|')) {
        if (!strstr(message, word)) {
            fail(__FILE__, __LINE__, "the message does not contain \"%s\"", word);
        }
    }
}

/* A call is INVALID_ARGUMENT with these words in the message, and changes nothing. */
static void reject(const call *call, const arguments *arguments, const char *words) {
    /* Another error first, so that its message cannot be taken for the one under test. */
    char message[512];
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_config_default(99, &out.config));
    inputs before = in;
    check_status(call->run(arguments), GRADBLEND_INVALID_ARGUMENT, call->name, __LINE__);
    check_message(words);
    gradblend_last_error(message, sizeof message);
    CHECK(!strstr(message, "got 99") && memcmp(&before, &in, sizeof in) == 0);
    check_unchanged();
    rejections++;
}

static void accepts_valid_arguments(void) {
    for (size_t i = 0; i < COUNT(ALL); i++) {
        begin_case("%s with valid arguments", ALL[i]->name);
        OK(ALL[i]->run(&valid));
        if (ALL[i] == &blender_create) {
            gradblend_blender_destroy(out.blender);
        } else if (ALL[i] == &plan_create) {
            gradblend_plan_destroy(out.plan);
        }
        restore();
        check_unchanged();
    }
}

/* Every pointer argument. */
#define POINTER(argument, alignment, nullable) {offsetof(arguments, argument), "a->" #argument ",", alignment, nullable}
static const struct {
    size_t offset;
    const char *name;
    size_t alignment; /* required alignment of the address; 0 for a handle */
    bool nullable;
} POINTERS[] = {
    POINTER(blender, 0, false), POINTER(plan, 0, false), POINTER(config, 8, false), POINTER(numerator, 8, false),
    POINTER(second_moment, 8, false), POINTER(in_force, 8, true), POINTER(tensors, 8, false),
    POINTER(weights, 8, false), POINTER(scale, 4, true), POINTER(buffer, 1, true), POINTER(saved, 1, false),
    POINTER(bytes, 8, false), POINTER(to_config, 8, false), POINTER(to_weights, 8, false), POINTER(to_flags, 4, false),
    POINTER(to_blender, 8, false), POINTER(to_plan, 8, false), POINTER(to_report, 8, false),
    POINTER(to_second_moment, 8, false), POINTER(to_device_weights, 8, false), POINTER(to_sums, 8, false),
    POINTER(to_count, 4, false),
};

static void rejects_pointers(void) {
    gradblend_blender *destroyed = blender_new(&in.config);
    gradblend_plan *destroyed_plan = plan_new(destroyed, in.tensors, TENSORS);
    gradblend_plan *orphan = plan_new(destroyed, in.tensors, TENSORS);
    gradblend_plan_destroy(destroyed_plan);
    gradblend_blender_destroy(destroyed);
    /* It may reuse the memory or the slot of the destroyed one. */
    gradblend_blender *successor = blender_new(&in.config);

    for (size_t pair = 0; pair < COUNT(POINTERS) * COUNT(ALL); pair++) {
        size_t i = pair / COUNT(ALL), alignment = POINTERS[i].alignment;
        const call *call = ALL[pair % COUNT(ALL)];
        if (!strstr(call->arguments, POINTERS[i].name)) {
            continue;
        }
        bool plan = POINTERS[i].offset == offsetof(arguments, plan);
        uintptr_t address;
        memcpy(&address, (const char *)&valid + POINTERS[i].offset, sizeof address);
        const uintptr_t values[] = {
            0,
            address + alignment / 2, /* not for handles */
            (uintptr_t)(plan ? (void *)destroyed_plan : (void *)destroyed),
            (uintptr_t)(plan ? (void *)own : (void *)own_plan),
            (uintptr_t)&in,
            1,
            UINTPTR_MAX,
            address ^ (uintptr_t)1 << 40,
            address + 16 * 1000,
        };
        size_t count = alignment == 0 ? COUNT(values) : alignment == 1 ? 1 : 2;
        for (size_t j = POINTERS[i].nullable; j < count; j += j == 0 && alignment == 0 ? 2 : 1) {
            begin_case("%s with %s %#" PRIxPTR, call->name, POINTERS[i].name, values[j]);
            arguments arguments = valid;
            memcpy((char *)&arguments + POINTERS[i].offset, &values[j], sizeof address);
            reject(call, &arguments, j == 0 ? "NULL" : "");
        }
    }
    begin_case("load of NULL and 0 bytes");
    arguments nothing = valid;
    nothing.saved = NULL;
    nothing.saved_bytes = 0;
    reject(&load, &nothing, "NULL");

    begin_case("destroy of NULL, of a destroyed handle, of a handle of the other type, of no handle");
    gradblend_blender_destroy(NULL);
    gradblend_plan_destroy(NULL);
    gradblend_blender_destroy(destroyed);
    gradblend_plan_destroy(destroyed_plan);
    gradblend_blender_destroy((gradblend_blender *)own_plan);
    gradblend_plan_destroy((gradblend_plan *)own);
    gradblend_blender_destroy((gradblend_blender *)&in);
    check_unchanged();
    OK(gradblend_observe(successor, NULL));
    OK(gradblend_step(own, own_plan, NULL));
    restore();

    const struct {
        const char *name;
        gradblend_blender *blender;
        gradblend_plan *plan;
    } foreign[] = {{"a plan of another blender", own, other_plan}, {"a plan of a destroyed blender", own, orphan},
                   {"a plan of its predecessor", successor, orphan}};
    const call *const passes[] = {&pass, &dot, &blend, &step};
    for (size_t i = 0; i < COUNT(foreign) * COUNT(passes); i++) {
        const call *call = passes[i % COUNT(passes)];
        begin_case("%s with %s", call->name, foreign[i / COUNT(passes)].name);
        arguments arguments = valid;
        arguments.blender = foreign[i / COUNT(passes)].blender;
        arguments.plan = foreign[i / COUNT(passes)].plan;
        reject(call, &arguments, "plan|another blender");
    }
    gradblend_plan_destroy(orphan);
    gradblend_plan_destroy(orphan);
    gradblend_blender_destroy(successor);
}

/* A field of a record or of `arguments`, and an invalid integer for it. */
typedef struct {
    const call *calls[2];
    void *record;
    size_t offset, bytes;
    const char *name, *words;
    uint64_t value;
} integer;

static arguments invalid;

#define CONFIG(field, value)                                                                                           \
    {{&solve, &blender_create}, &in.config, offsetof(gradblend_config, field), 4, #field, #field, value}
#define TENSOR(field, words, value)                                                                                    \
    {{&plan_create, &plan_update}, &in.tensors[1], offsetof(gradblend_tensor, field),                                  \
     sizeof in.tensors[1].field, #field, words, value}
#define ARGUMENT(call, field, words, value)                                                                            \
    {{&call, NULL}, &invalid, offsetof(arguments, field), sizeof invalid.field, #field, words, value}

/* The bits of a double. */
#define FLOOR(k, words, bits)                                                                                          \
    {{&solve, &blender_create}, &in.config, offsetof(gradblend_config, min_weight) + 8 * (k), 8, "min_weight", words, bits}
#define HALF UINT64_C(0x3fe0000000000000)

static const integer INTEGERS[] = {
    FLOOR(0, "min_weight of modality 0|at least 0 and below 1", UINT64_C(0x3ff0000000000000)),
    FLOOR(1, "min_weight of modality 1|at least 0 and below 1", UINT64_C(1) << 63 | 1),
    FLOOR(1, "min_weight of modality 1|at least 0 and below 1", UINT64_C(0x7ff8000000000000)),
    FLOOR(2, "min_weight of modality 2|does not exist", HALF), FLOOR(31, "min_weight of modality 31|does not exist", HALF),
    CONFIG(size, 0), CONFIG(size, sizeof(gradblend_config) - 1), CONFIG(size, UINT32_MAX), CONFIG(modalities, 0),
    CONFIG(modalities, 33), CONFIG(modalities, UINT32_MAX), CONFIG(average, 2), CONFIG(average, UINT32_MAX),
    CONFIG(overfitting, 2), CONFIG(overfitting, UINT32_MAX), CONFIG(negative, 2), CONFIG(negative, 1u << 31),
    CONFIG(cadence, 2), CONFIG(cadence, UINT32_MAX), CONFIG(reserved, 1), CONFIG(reserved, 1u << 31),
    TENSOR(dtype, "tensor 1|dtype", UINT32_MAX), TENSOR(dtype, "tensor 1|dtype", 3),
    TENSOR(dtype, "tensor 1|dtype", 1u << 31), TENSOR(len, "tensor 1", UINT64_C(1) << 61),
    TENSOR(len, "tensor 1", UINT64_MAX), TENSOR(modalities, "tensor 1|modalities|NULL", 0),
    TENSOR(modalities, "tensor 1|modalities|aligned", 4), TENSOR(train, "tensor 1|train", 0),
    ARGUMENT(config_default, modalities, "modalities", 0), ARGUMENT(config_default, modalities, "modalities", 33),
    ARGUMENT(config_default, modalities, "modalities", UINT32_MAX), ARGUMENT(blender_create, device, "device", -2u),
    ARGUMENT(blender_create, device, "device", 1u << 31), ARGUMENT(plan_create, count, "", UINT64_MAX),
    ARGUMENT(plan_create, count, "", UINT64_MAX / sizeof(gradblend_tensor) + 1), ARGUMENT(plan_update, count, "", 0),
    ARGUMENT(plan_update, count, "", UINT64_MAX), ARGUMENT(pass, what, "pass", UINT32_MAX),
    ARGUMENT(set_weights, weights_count, "weights|2", 0), ARGUMENT(set_weights, weights_count, "weights|2", UINT32_MAX),
};

static void rejects_integers(void) {
    for (size_t i = 0; i < COUNT(INTEGERS); i++) {
        const integer *integer = &INTEGERS[i];
        invalid = valid;
        /* Little-endian, as all supported machines are. */
        memcpy((char *)integer->record + integer->offset, &integer->value, integer->bytes);
        for (size_t j = 0; j < 2 && integer->calls[j]; j++) {
            begin_case("%s with %s = %#" PRIx64, integer->calls[j]->name, integer->name, integer->value);
            reject(integer->calls[j], &invalid, integer->words);
        }
        in = in_before;
    }
    begin_case("least weights of signed weights");
    in.config.negative = GRADBLEND_SIGNED;
    in.config.min_weight[1] = 0.25;
    reject(&blender_create, &valid, "min_weight of modality 1|negative");
    in = in_before;
    begin_case("least weights with a sum of 1");
    in.config.min_weight[0] = in.config.min_weight[1] = 0.5;
    reject(&blender_create, &valid, "min_weight sums to 1");
    in = in_before;
    if (device == GRADBLEND_CPU) {
        begin_case("4097 threads");
        in.config.threads = 4097;
        reject(&blender_create, &valid, "threads|4097");
        in = in_before;
    }
    begin_case("device 1000");
    invalid = valid;
    invalid.device = 1000;
    gradblend_status status = blender_create.run(&invalid);
    CHECK(status == GRADBLEND_NO_DEVICE ||
          (device == GRADBLEND_CPU && (status == GRADBLEND_NOT_BUILT || status == GRADBLEND_NO_DRIVER)));
    check_message(status == GRADBLEND_NO_DRIVER ? "" : "1000");
    check_unchanged();

    begin_case("no tensors");
    gradblend_plan *empty = plan_new(own, NULL, 0);
    OK(gradblend_plan_update(empty, NULL, 0, NULL));
    OK(gradblend_step(own, empty, NULL));
    gradblend_plan_destroy(empty);
    restore();
}

static void save_needs_room(void) {
    for (size_t room = 0; room < saved_bytes; room++) {
        begin_case("save into %zu bytes", room);
        out.bytes = room;
        RETURNS(GRADBLEND_INVALID_ARGUMENT, save.run(&valid));
        CHECK(out.bytes == saved_bytes);
        check_message("bytes");
        out.bytes = out_before.bytes;
        check_unchanged();
        rejections++;
    }
    begin_case("save into more bytes than needed");
    OK(save.run(&valid));
    CHECK(out.bytes == saved_bytes && memcmp(out.buffer, own_saved, saved_bytes) == 0);
    CHECK(memcmp(out.buffer + saved_bytes, out_before.buffer + saved_bytes, sizeof out.buffer - saved_bytes) == 0);
    restore();
}

static void names_and_messages(void) {
    static const char *const names[] = {
        "GRADBLEND_OK", "GRADBLEND_INVALID_ARGUMENT", "GRADBLEND_NOT_BUILT", "GRADBLEND_NO_DRIVER",
        "GRADBLEND_NO_DEVICE", "GRADBLEND_UNSUPPORTED_DEVICE", "GRADBLEND_OUT_OF_MEMORY", "GRADBLEND_CUDA",
        "GRADBLEND_CORRUPT_STATE", "GRADBLEND_INTERNAL",
    };
    for (int32_t status = 0; status < (int32_t)COUNT(names); status++) {
        CHECK(strcmp(gradblend_status_name(status), names[status]) == 0);
    }
    static const int32_t unknown[] = {-1, 10, INT32_MIN, INT32_MAX};
    for (size_t i = 0; i < COUNT(unknown); i++) {
        CHECK(strcmp(gradblend_status_name(unknown[i]), "unknown") == 0);
    }
    char whole[512], part[512];
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_config_default(0, &out.config));
    size_t length = gradblend_last_error(whole, sizeof whole);
    CHECK(length > 0 && length < sizeof whole && strlen(whole) == length);
    /* A successful call does not change the message. */
    OK(gradblend_config_default(2, &out.config));
    CHECK(gradblend_last_error(NULL, 0) == length && gradblend_last_error(NULL, 5) == length);
    for (size_t bytes = 0; bytes < length + 3; bytes++) {
        memset(part, GUARD, sizeof part);
        CHECK(gradblend_last_error(part, bytes) == length);
        size_t copied = bytes == 0 ? 0 : bytes > length ? length : bytes - 1;
        CHECK(memcmp(part, whole, copied) == 0 && (bytes == 0 || part[copied] == 0));
        CHECK((unsigned char)part[bytes == 0 ? 0 : copied + 1] == GUARD);
    }
    restore();
}

int main(int count, char **args) {
    char message[2] = "x";
    CHECK(gradblend_last_error(message, sizeof message) == 0 && *message == 0);
    start(count, args);
    prepare();
    accepts_valid_arguments();
    rejects_pointers();
    rejects_integers();
    save_needs_room();
    names_and_messages();
    gradblend_plan_destroy(own_plan);
    gradblend_blender_destroy(own);
    gradblend_blender_destroy(other);
    gradblend_plan_destroy(other_plan);
    free(own_saved);
    free(other_saved);
    memory_free(memory);
    printf("rejections: %u\n", rejections);
    return 0;
}
