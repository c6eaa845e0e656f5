/*
 * Everything the header says is refused: each call is made once with good arguments, then with one of them spoilt.
 * After each refusal the status is the one that the header names, the message says what was wrong, and nothing has
 * changed: what blenders know, gradients, inputs, and whatever out parameters point to.
 */
#include <float.h>
#include <stddef.h>

#include "check.h"

enum { TENSORS = 3, LEN = 4, LISTS = 5, ROOM = 64, GUARD = 0xa5 };
enum { TRAIN, VALID, FIRST, SECOND, BLENDED }; /* lists of a tensor of two modalities */

/* What calls write to. */
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

/* What they read. */
typedef struct {
    gradblend_config config;
    double numerator[2], second_moment[4], in_force[2], weights[3];
    gradblend_tensor tensors[TENSORS + 1];
    const void *modalities[TENSORS + 1][2];
    unsigned char saved[600];
    float scale;
} inputs;

/* The arguments of all calls; each call takes those that it has. */
typedef struct {
    uint32_t modalities;
    gradblend_config *to_config;
    const gradblend_config *config;
    const double *numerator, *second_moment, *in_force;
    double *to_weights;
    uint32_t *to_flags;
    int32_t device;
    gradblend_blender **to_blender;
    gradblend_blender *blender;
    const gradblend_tensor *tensors;
    uint64_t count;
    gradblend_plan **to_plan;
    gradblend_plan *plan;
    uint32_t what;
    const double *weights;
    uint32_t weights_count;
    const float *scale;
    gradblend_report *to_report;
    double *to_second_moment;
    const float **to_device_weights;
    double **to_sums;
    uint32_t *to_count;
    void *buffer;
    size_t *bytes;
    const void *saved;
    size_t saved_bytes;
} arguments;

typedef enum {
    CONFIG_DEFAULT, SOLVE, BLENDER_CREATE, PLAN_CREATE, PLAN_UPDATE, PASS, DOT, OBSERVE, REWEIGHT, BLEND, STEP, RESET,
    SET_WEIGHTS, SET_GRAD_SCALE, GET_REPORT, GET_SECOND_MOMENTS, DEVICE_WEIGHTS, PENDING_SUMS, SAVE, LOAD, CALLS
} call;

static gradblend_status make(call call, const arguments *a)
{
    switch (call) {
    case CONFIG_DEFAULT: return gradblend_config_default(a->modalities, a->to_config);
    case SOLVE:
        return gradblend_solve(a->config, a->numerator, a->second_moment, a->in_force, a->to_weights, a->to_flags);
    case BLENDER_CREATE: return gradblend_blender_create(a->device, a->config, a->to_blender);
    case PLAN_CREATE: return gradblend_plan_create(a->blender, a->tensors, a->count, a->to_plan);
    case PLAN_UPDATE: return gradblend_plan_update(a->plan, a->tensors, a->count, NULL);
    case PASS: return gradblend_pass(a->blender, a->plan, a->what, NULL);
    case DOT: return gradblend_dot(a->blender, a->plan, NULL);
    case OBSERVE: return gradblend_observe(a->blender, NULL);
    case REWEIGHT: return gradblend_reweight(a->blender, NULL);
    case BLEND: return gradblend_blend(a->blender, a->plan, NULL);
    case STEP: return gradblend_step(a->blender, a->plan, NULL);
    case RESET: return gradblend_reset(a->blender, NULL);
    case SET_WEIGHTS: return gradblend_set_weights(a->blender, a->weights, a->weights_count, NULL);
    case SET_GRAD_SCALE: return gradblend_set_grad_scale(a->blender, a->scale);
    case GET_REPORT: return gradblend_get_report(a->blender, a->to_report, NULL);
    case GET_SECOND_MOMENTS: return gradblend_get_second_moments(a->blender, a->to_second_moment, NULL);
    case DEVICE_WEIGHTS: return gradblend_device_weights(a->blender, a->to_device_weights);
    case PENDING_SUMS: return gradblend_pending_sums(a->blender, a->to_sums, a->to_count);
    case SAVE: return gradblend_save(a->blender, a->buffer, a->bytes, NULL);
    case LOAD: return gradblend_load(a->blender, a->saved, a->saved_bytes, NULL);
    case CALLS: break;
    }
    fail(__FILE__, __LINE__, "no such call");
}

static const char *const NAMES[CALLS] = {
    "config_default", "solve", "blender_create", "plan_create", "plan_update", "pass", "dot", "observe", "reweight",
    "blend", "step", "reset", "set_weights", "set_grad_scale", "get_report", "get_second_moments", "device_weights",
    "pending_sums", "save", "load",
};

static outputs out, out_before;
static inputs in, in_before;
static arguments good;
static float *memory, memory_before[TENSORS * LISTS * ROOM / 4];
static gradblend_blender *own, *other;
static gradblend_plan *own_plan, *other_plan;
static unsigned char *own_saved, *other_saved;
static size_t saved_bytes;
static float *scale_memory;
static unsigned refusals;

/* The place of a list: ROOM bytes each, of which LEN floats are its own. */
static float *place(int tensor, int list)
{
    return memory + (tensor * LISTS + list) * ROOM / 4;
}

static void set_up_world(void)
{
    random_state random = {61};
    memory = memory_new(sizeof memory_before);
    scale_memory = memory_new(sizeof *scale_memory);
    *scale_memory = 2;
    for (size_t i = 0; i < COUNT(memory_before); i++) {
        memory[i] = (float)random_number(&random);
    }
    in.config = config_of(2);
    own = blender_of(&in.config);
    other = blender_of(&in.config);
    for (int i = 0; i < TENSORS; i++) {
        in.modalities[i][0] = place(i, FIRST);
        in.modalities[i][1] = place(i, SECOND);
        in.tensors[i] = (gradblend_tensor){LEN, GRADBLEND_F32, place(i, TRAIN), place(i, VALID), in.modalities[i],
                                           place(i, BLENDED)};
    }
    in.tensors[TENSORS] = (gradblend_tensor){.modalities = in.modalities[TENSORS]};
    OK(gradblend_plan_create(own, in.tensors, TENSORS, &own_plan));
    OK(gradblend_plan_create(other, in.tensors, TENSORS, &other_plan));
    /* A state of which every part is something. */
    for (int i = 0; i < 3; i++) {
        OK(gradblend_step(own, own_plan, NULL));
        OK(gradblend_step(other, other_plan, NULL));
    }
    OK(gradblend_reweight(own, NULL));
    OK(gradblend_dot(own, own_plan, NULL));
    own_saved = saved_of(own, &saved_bytes);
    other_saved = saved_of(other, &saved_bytes);
    finish();
    memcpy(memory_before, memory, sizeof memory_before);
    CHECK(saved_bytes <= sizeof in.saved - 16 && saved_bytes <= sizeof out.buffer);
    memcpy(in.saved, own_saved, saved_bytes);
    memcpy(in.numerator, (double[]){1, 2}, sizeof in.numerator);
    memcpy(in.second_moment, (double[]){1, 0.5, 0.5, 2}, sizeof in.second_moment);
    memcpy(in.in_force, (double[]){0.75, 0.25}, sizeof in.in_force);
    memcpy(in.weights, (double[]){0.25, 0.75, 1}, sizeof in.weights);
    good = (arguments){
        .modalities = 2, .to_config = &out.config, .config = &in.config, .numerator = in.numerator,
        .second_moment = in.second_moment, .in_force = in.in_force, .to_weights = out.weights, .to_flags = &out.flags,
        .device = device, .to_blender = &out.blender, .blender = own, .tensors = in.tensors, .count = TENSORS,
        .to_plan = &out.plan, .plan = own_plan, .what = GRADBLEND_DOT, .weights = in.weights, .weights_count = 2,
        .scale = scale_memory, .to_report = &out.report, .to_second_moment = out.second_moment,
        .to_device_weights = &out.device_weights, .to_sums = &out.sums, .to_count = &out.count, .buffer = out.buffer,
        .bytes = &out.bytes, .saved = in.saved, .saved_bytes = saved_bytes,
    };
    memset(&out, GUARD, sizeof out);
    out.bytes = sizeof out.buffer;
    out_before = out;
    in_before = in;
}

/* Puts back what a call that was done has changed. */
static void undo(void)
{
    OK(gradblend_set_grad_scale(own, NULL));
    OK(gradblend_load(own, own_saved, saved_bytes, NULL));
    memcpy(&in, &in_before, sizeof in);
    OK(gradblend_plan_update(own_plan, in.tensors, TENSORS, NULL));
    finish();
    memcpy(memory, memory_before, sizeof memory_before);
    memcpy(&out, &out_before, sizeof out);
}

static void check_unchanged(void)
{
    size_t bytes;
    CHECK(memcmp(&out, &out_before, sizeof out) == 0);
    unsigned char *saved = saved_of(own, &bytes);
    CHECK(bytes == saved_bytes && memcmp(saved, own_saved, bytes) == 0);
    free(saved);
    saved = saved_of(other, &bytes);
    CHECK(bytes == saved_bytes && memcmp(saved, other_saved, bytes) == 0);
    free(saved);
    finish();
    CHECK(memcmp(memory, memory_before, sizeof memory_before) == 0);
}

/* Whether the message has every one of the words, which `|` separates. */
static bool message_has(const char *words)
{
    char message[512], word[128];
    gradblend_last_error(message, sizeof message);
    while (*words) {
        size_t length = strcspn(words, "|");
        CHECK(length < sizeof word);
        memcpy(word, words, length);
        word[length] = 0;
        if (!strstr(message, word)) {
            return false;
        }
        words += length + (words[length] == '|');
    }
    return *message;
}

/* A call that is refused. Before it, another error is the last one, so that its message is not mistaken. */
static void refuse(call call, const arguments *spoilt, gradblend_status want, const char *words)
{
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_config_default(99, &out.config));
    inputs before = in;
    check_status(make(call, spoilt), want, NAMES[call], __FILE__, __LINE__);
    if (!message_has(words)) {
        fail(__FILE__, __LINE__, "the message does not say %s", words);
    }
    CHECK(!message_has("got 99"));
    CHECK(memcmp(&before, &in, sizeof in) == 0);
    check_unchanged();
    refusals++;
}

static void good_arguments_are_taken(void)
{
    for (call call = 0; call < CALLS; call++) {
        try_case("%s with good arguments", NAMES[call]);
        OK(make(call, &good));
        if (call == BLENDER_CREATE) {
            gradblend_blender_destroy(out.blender);
        }
        if (call == PLAN_CREATE) {
            gradblend_plan_destroy(out.plan);
        }
        undo();
        check_unchanged();
    }
}

typedef struct {
    call call;
    size_t argument; /* offset in `arguments` */
    const char *name;
    size_t alignment; /* what the address must be aligned to; 0 for a handle, 1 for bytes */
} pointer;

#define POINTER(call, argument, alignment) {call, offsetof(arguments, argument), #argument, alignment}
#define HANDLE(call, argument) POINTER(call, argument, 0)

/* Every pointer of every function, but `in_force` and `scale`, which may be NULL; streams, which all may; and
 * `buffer`, without which save tells the size. */
static const pointer POINTERS[] = {
    POINTER(CONFIG_DEFAULT, to_config, 8), POINTER(SOLVE, config, 8), POINTER(SOLVE, numerator, 8),
    POINTER(SOLVE, second_moment, 8), POINTER(SOLVE, to_weights, 8), POINTER(SOLVE, to_flags, 4),
    POINTER(BLENDER_CREATE, config, 8), POINTER(BLENDER_CREATE, to_blender, 8), HANDLE(PLAN_CREATE, blender),
    POINTER(PLAN_CREATE, tensors, 8), POINTER(PLAN_CREATE, to_plan, 8), HANDLE(PLAN_UPDATE, plan),
    POINTER(PLAN_UPDATE, tensors, 8), HANDLE(PASS, blender), HANDLE(PASS, plan), HANDLE(DOT, blender),
    HANDLE(DOT, plan), HANDLE(OBSERVE, blender), HANDLE(REWEIGHT, blender), HANDLE(BLEND, blender), HANDLE(BLEND, plan),
    HANDLE(STEP, blender), HANDLE(STEP, plan), HANDLE(RESET, blender), HANDLE(SET_WEIGHTS, blender),
    POINTER(SET_WEIGHTS, weights, 8), HANDLE(SET_GRAD_SCALE, blender), HANDLE(GET_REPORT, blender),
    POINTER(GET_REPORT, to_report, 8), HANDLE(GET_SECOND_MOMENTS, blender),
    POINTER(GET_SECOND_MOMENTS, to_second_moment, 8), HANDLE(DEVICE_WEIGHTS, blender),
    POINTER(DEVICE_WEIGHTS, to_device_weights, 8), HANDLE(PENDING_SUMS, blender), POINTER(PENDING_SUMS, to_sums, 8),
    POINTER(PENDING_SUMS, to_count, 4), HANDLE(SAVE, blender), POINTER(SAVE, bytes, 8), HANDLE(LOAD, blender),
    POINTER(LOAD, saved, 1),
};

static void spoil_pointers(void)
{
    gradblend_blender *gone = blender_of(&in.config), *heir;
    gradblend_plan *gone_plan, *orphan;
    OK(gradblend_plan_create(gone, in.tensors, TENSORS, &gone_plan));
    OK(gradblend_plan_create(gone, in.tensors, TENSORS, &orphan));
    gradblend_plan_destroy(gone_plan);
    gradblend_blender_destroy(gone);
    /* It may have the memory, or the number, of the one that is gone. */
    heir = blender_of(&in.config);

    for (size_t i = 0; i < COUNT(POINTERS); i++) {
        const pointer *pointer = &POINTERS[i];
        bool plan = pointer->argument == offsetof(arguments, plan);
        /* What to put there. The first, NULL, is for all, and the second for addresses that must be aligned. */
        uintptr_t address;
        memcpy(&address, (const char *)&good + pointer->argument, sizeof address);
        const uintptr_t spoilt[] = {
            0,
            address + pointer->alignment / 2,
            (uintptr_t)(plan ? (void *)gone_plan : (void *)gone),
            (uintptr_t)(plan ? (void *)own : (void *)own_plan),
            (uintptr_t)&in,
            1,
            UINTPTR_MAX,
            address ^ (uintptr_t)1 << 40,
            address + 16 * 1000,
        };
        size_t count = pointer->alignment == 0 ? COUNT(spoilt) : pointer->alignment == 1 ? 1 : 2;
        for (size_t j = 0; j < count; j++) {
            if (j == 1 && pointer->alignment == 0) {
                continue;
            }
            try_case("%s with %s %#" PRIxPTR, NAMES[pointer->call], pointer->name, spoilt[j]);
            arguments arguments = good;
            memcpy((char *)&arguments + pointer->argument, &spoilt[j], sizeof address);
            refuse(pointer->call, &arguments, GRADBLEND_INVALID_ARGUMENT, j == 0 ? "NULL" : "");
        }
    }
    /* Destroying what is not there, twice what was, and one kind as the other, does nothing. */
    gradblend_blender_destroy(NULL);
    gradblend_plan_destroy(NULL);
    gradblend_blender_destroy(gone);
    gradblend_plan_destroy(gone_plan);
    gradblend_blender_destroy((gradblend_blender *)own_plan);
    gradblend_plan_destroy((gradblend_plan *)own);
    gradblend_blender_destroy((gradblend_blender *)&in);
    check_unchanged();
    OK(gradblend_observe(heir, NULL));
    OK(gradblend_step(own, own_plan, NULL));
    undo();

    /* A plan of another blender: one beside it, one of another K, one that is gone, one that came in its place. */
    gradblend_config config = config_of(3);
    gradblend_blender *three = blender_of(&config);
    const struct {
        const char *name;
        gradblend_blender *blender;
        gradblend_plan *plan;
    } foreign[] = {{"beside it", own, other_plan}, {"of another K", three, own_plan}, {"that is gone", own, orphan},
                   {"before it", heir, orphan}};
    for (size_t i = 0; i < COUNT(foreign); i++) {
        for (call call = PASS; call <= STEP; call++) {
            if (call == OBSERVE || call == REWEIGHT) {
                continue;
            }
            try_case("%s with the plan of a blender %s", NAMES[call], foreign[i].name);
            arguments arguments = good;
            arguments.blender = foreign[i].blender;
            arguments.plan = foreign[i].plan;
            refuse(call, &arguments, GRADBLEND_INVALID_ARGUMENT, "plan|another blender");
        }
    }
    /* An update of it may be taken or refused: nothing is said of that, and nothing runs on it in either case. */
    gradblend_status status = gradblend_plan_update(orphan, in.tensors, TENSORS, NULL);
    CHECK(status == GRADBLEND_OK || status == GRADBLEND_INVALID_ARGUMENT);
    gradblend_plan_destroy(orphan);
    gradblend_plan_destroy(orphan);
    gradblend_blender_destroy(heir);
    gradblend_blender_destroy(three);
}

/* A field of the configuration, an integer or a double, and what it may not be. */
typedef struct {
    const char *name;
    size_t field;
    bool integer;
    double value;
} config_fault;

#define FIELD(field, integer, value) {#field, offsetof(gradblend_config, field), integer, value}

static const config_fault CONFIG_FAULTS[] = {
    FIELD(size, true, 0), FIELD(size, true, sizeof(gradblend_config) - 1), FIELD(size, true, 56),
    FIELD(size, true, UINT32_MAX), FIELD(modalities, true, 0), FIELD(modalities, true, 33),
    FIELD(modalities, true, UINT32_MAX), FIELD(average, true, 2), FIELD(average, true, UINT32_MAX),
    FIELD(overfitting, true, 2), FIELD(overfitting, true, UINT32_MAX), FIELD(negative, true, 2),
    FIELD(negative, true, 1u << 31), FIELD(cadence, true, 2), FIELD(cadence, true, UINT32_MAX),
    FIELD(reserved, true, 1), FIELD(reserved, true, 1u << 31), FIELD(decay, false, 1), FIELD(decay, false, -1e-9),
    FIELD(decay, false, 1.5), FIELD(decay, false, NAN), FIELD(decay, false, INFINITY), FIELD(damping, false, -1e-300),
    FIELD(damping, false, NAN), FIELD(damping, false, INFINITY), FIELD(damping, false, -INFINITY),
};

static void spoil_config(void)
{
    for (size_t i = 0; i < COUNT(CONFIG_FAULTS); i++) {
        const config_fault *fault = &CONFIG_FAULTS[i];
        uint32_t integer = fault->integer ? (uint32_t)fault->value : 0;
        void *field = (char *)&in.config + fault->field;
        memcpy(field, fault->integer ? (const void *)&integer : (const void *)&fault->value, fault->integer ? 4 : 8);
        for (call call = SOLVE; call <= BLENDER_CREATE; call++) {
            try_case("%s with a config of %s %g", NAMES[call], fault->name, fault->value);
            refuse(call, &good, GRADBLEND_INVALID_ARGUMENT, fault->name);
        }
        in.config = in_before.config;
    }
    /* A mean has no decay that could be wrong. */
    in.config.average = GRADBLEND_MEAN;
    in.config.decay = NAN;
    OK(make(SOLVE, &good));
    undo();
    in.config.threads = 4097;
    try_case("4097 threads");
    if (device == GRADBLEND_CPU) {
        refuse(BLENDER_CREATE, &good, GRADBLEND_INVALID_ARGUMENT, "threads|4097");
    }
    undo();
    for (uint32_t k = 0; k < 100; k = k ? k + 1 : 33) {
        try_case("config_default for K = %" PRIu32, k);
        arguments arguments = good;
        arguments.modalities = k == 99 ? UINT32_MAX : k;
        refuse(CONFIG_DEFAULT, &arguments, GRADBLEND_INVALID_ARGUMENT, "modalities");
    }
    static const int32_t devices[] = {-2, -3, INT32_MIN};
    for (size_t i = 0; i < COUNT(devices); i++) {
        try_case("device %" PRId32, devices[i]);
        arguments arguments = good;
        arguments.device = devices[i];
        refuse(BLENDER_CREATE, &arguments, GRADBLEND_INVALID_ARGUMENT, "device");
    }
    /* Not there in any case; what is missing differs. */
    arguments arguments = good;
    arguments.device = 1000;
    gradblend_status status = make(BLENDER_CREATE, &arguments);
    CHECK(status == GRADBLEND_NOT_BUILT || status == GRADBLEND_NO_DRIVER || status == GRADBLEND_NO_DEVICE);
    CHECK(device == GRADBLEND_CPU || status == GRADBLEND_NO_DEVICE);
    CHECK(message_has("") && (status == GRADBLEND_NO_DRIVER || message_has("1000")));
    check_unchanged();
}

/* One list of tensor 1, and where to move it: to another list's place, by some bytes; or to an address. */
typedef struct {
    const char *name;
    int list;
    int tensor, to; /* whose place; `tensor` -1: the address is all of it */
    uintptr_t bytes;
    const char *words;
} list_fault;

static const list_fault LIST_FAULTS[] = {
    {"no train", TRAIN, -1, 0, 0, "tensor 1|train"},
    {"no valid", VALID, -1, 0, 0, "tensor 1|valid"},
    {"misaligned train", TRAIN, 1, TRAIN, 1, "tensor 1|train|aligned"},
    {"misaligned valid", VALID, 1, VALID, 2, "tensor 1|valid|aligned"},
    {"misaligned modality 0", FIRST, 1, FIRST, 3, "tensor 1|modality 0|aligned"},
    {"misaligned modality 1", SECOND, 1, SECOND, 1, "tensor 1|modality 1|aligned"},
    {"misaligned blended", BLENDED, 1, BLENDED, 2, "tensor 1|blended|aligned"},
    {"train ends with memory", TRAIN, -1, 0, UINTPTR_MAX - 15, "tensor 1|train"},
    {"modality past the end", SECOND, -1, 0, UINTPTR_MAX - 3, "tensor 1|modality 1"},
    {"blended past the end", BLENDED, -1, 0, UINTPTR_MAX - 11, "tensor 1|blended"},
    {"blended is train", BLENDED, 1, TRAIN, 0, "tensor 1|blended|overlaps|train"},
    {"blended is valid", BLENDED, 1, VALID, 0, "tensor 1|blended|overlaps|valid"},
    {"blended is part of train", BLENDED, 1, TRAIN, 12, "tensor 1|blended|overlaps|train"},
    {"blended is part of modality 0", BLENDED, 1, FIRST, 4, "tensor 1|blended|overlaps|modality 0"},
    {"blended begins before modality 1", BLENDED, 1, SECOND, (uintptr_t)-12, "tensor 1|blended|overlaps|modality 1"},
    {"blended is tensor 0's modality 1", BLENDED, 0, SECOND, 0, "tensor 1|blended|overlaps|modality 1|tensor 0"},
    {"blended is tensor 2's train", BLENDED, 2, TRAIN, 0, "tensor 1|blended|overlaps|train|tensor 2"},
    {"blended is tensor 0's", BLENDED, 0, BLENDED, 0, "tensor 0|tensor 1|blended|overlaps"},
    {"blended is part of tensor 2's", BLENDED, 2, BLENDED, 8, "tensor 1|tensor 2|blended|overlaps"},
    {"train is tensor 0's blended", TRAIN, 0, BLENDED, 0, "tensor 0|blended|overlaps|train|tensor 1"},
    {"modality 0 is part of tensor 2's blended", FIRST, 2, BLENDED, 12,
     "tensor 2|blended|overlaps|modality 0|tensor 1"},
    {"modality 1 begins before tensor 0's blended", SECOND, 0, BLENDED, (uintptr_t)-4,
     "tensor 0|blended|overlaps|modality 1|tensor 1"},
};

static void put_list(int list, void *address)
{
    switch (list) {
    case TRAIN: in.tensors[1].train = address; break;
    case VALID: in.tensors[1].valid = address; break;
    case BLENDED: in.tensors[1].blended = address; break;
    default: in.modalities[1][list - FIRST] = address;
    }
}

static void spoil_lists(void)
{
    for (size_t i = 0; i < COUNT(LIST_FAULTS); i++) {
        const list_fault *fault = &LIST_FAULTS[i];
        uintptr_t start = fault->tensor < 0 ? 0 : (uintptr_t)place(fault->tensor, fault->to);
        put_list(fault->list, (void *)(start + fault->bytes));
        for (call call = PLAN_CREATE; call <= PLAN_UPDATE; call++) {
            try_case("%s: %s", NAMES[call], fault->name);
            refuse(call, &good, GRADBLEND_INVALID_ARGUMENT, fault->words);
        }
        memcpy(&in, &in_before, sizeof in);
    }
    /* In place for two modalities at once, and then of one of the next tensor too. */
    try_case("two modalities are one, and blended over");
    put_list(FIRST, place(1, SECOND));
    put_list(BLENDED, place(1, SECOND));
    refuse(PLAN_CREATE, &good, GRADBLEND_INVALID_ARGUMENT, "tensor 1|blended|overlaps|modality 1");
    undo();

    /* What looks alike and is allowed: in place, right behind, inputs that share memory. The plan runs as it was
     * updated. */
    static const list_fault allowed[] = {
        {"in place of modality 0", BLENDED, 1, FIRST, 0, ""},
        {"in place of modality 1", BLENDED, 1, SECOND, 0, ""},
        {"right behind modality 1", BLENDED, 1, SECOND, 4 * LEN, ""},
        {"right behind tensor 0's blended", SECOND, 0, BLENDED, 4 * LEN, ""},
        {"valid is train", VALID, 1, TRAIN, 0, ""},
        {"modality 0 is part of train", FIRST, 1, TRAIN, 4, ""},
        {"modality 1 is tensor 0's", SECOND, 0, SECOND, 0, ""},
        {"modality 1 is absent", SECOND, -1, 0, 0, ""},
        {"not blended", BLENDED, -1, 0, 0, ""},
    };
    for (size_t i = 0; i < COUNT(allowed); i++) {
        uintptr_t start = allowed[i].tensor < 0 ? 0 : (uintptr_t)place(allowed[i].tensor, allowed[i].to);
        put_list(allowed[i].list, (void *)(start + allowed[i].bytes));
        try_case("%s", allowed[i].name);
        OK(make(PLAN_CREATE, &good));
        OK(make(PLAN_UPDATE, &good));
        OK(gradblend_step(own, own_plan, NULL));
        gradblend_plan_destroy(out.plan);
        undo();
    }
}

static void spoil_tensors(void)
{
    static const int32_t dtypes[] = {-1, 3, INT32_MIN, INT32_MAX};
    static const uint64_t lengths[] = {(uint64_t)1 << 61, (uint64_t)1 << 62, (uint64_t)1 << 63, UINT64_MAX};
    for (call call = PLAN_CREATE; call <= PLAN_UPDATE; call++) {
        for (size_t i = 0; i < COUNT(dtypes); i++) {
            try_case("%s: dtype %" PRId32, NAMES[call], dtypes[i]);
            in.tensors[1].dtype = dtypes[i];
            refuse(call, &good, GRADBLEND_INVALID_ARGUMENT, "tensor 1|dtype");
        }
        in.tensors[1].dtype = GRADBLEND_F32;
        for (size_t i = 0; i < COUNT(lengths); i++) {
            try_case("%s: length %" PRIu64, NAMES[call], lengths[i]);
            in.tensors[1].len = lengths[i];
            refuse(call, &good, GRADBLEND_INVALID_ARGUMENT, "tensor 1");
        }
        in.tensors[1].len = LEN;
        try_case("%s: modalities", NAMES[call]);
        in.tensors[1].modalities = NULL;
        refuse(call, &good, GRADBLEND_INVALID_ARGUMENT, "tensor 1|modalities|NULL");
        in.tensors[1].modalities = (const void *const *)((const char *)in.modalities + 4);
        refuse(call, &good, GRADBLEND_INVALID_ARGUMENT, "tensor 1|modalities|aligned");
        in.tensors[1].modalities = in.modalities[1];
        arguments arguments = good;
        static const uint64_t counts[] = {UINT64_MAX, (uint64_t)1 << 63, UINT64_MAX / sizeof(gradblend_tensor) + 1};
        for (size_t i = 0; i < COUNT(counts); i++) {
            try_case("%s: count %" PRIu64, NAMES[call], counts[i]);
            arguments.count = counts[i];
            refuse(call, &arguments, GRADBLEND_INVALID_ARGUMENT, "");
        }
    }
    /* What an update may not change. */
    try_case("update of another length");
    in.tensors[1].len = LEN - 1;
    refuse(PLAN_UPDATE, &good, GRADBLEND_INVALID_ARGUMENT, "tensor 1|3|4");
    in.tensors[1].len = 0;
    refuse(PLAN_UPDATE, &good, GRADBLEND_INVALID_ARGUMENT, "tensor 1|0|4");
    in.tensors[1].len = LEN;
    try_case("update of another dtype");
    in.tensors[1].dtype = GRADBLEND_BF16;
    refuse(PLAN_UPDATE, &good, GRADBLEND_INVALID_ARGUMENT, "tensor 1|bf16|f32");
    in.tensors[1].dtype = GRADBLEND_F32;
    for (uint64_t count = 0; count <= TENSORS + 1; count++) {
        try_case("update of %" PRIu64 " tensors", count);
        arguments arguments = good;
        arguments.count = count;
        if (count != TENSORS) {
            refuse(PLAN_UPDATE, &arguments, GRADBLEND_INVALID_ARGUMENT, "tensors");
        }
    }

    /* More memory than there is, as it must be told of before the work. */
    try_case("a plan for more than there is");
    in.tensors[0] = (gradblend_tensor){(uint64_t)1 << 60, GRADBLEND_F32, NULL, NULL, in.modalities[TENSORS], NULL};
    refuse(PLAN_CREATE, &good, GRADBLEND_OUT_OF_MEMORY, "memory");
    undo();
    try_case("no tensors");
    arguments arguments = good;
    arguments.count = 0;
    arguments.tensors = NULL;
    OK(make(PLAN_CREATE, &arguments));
    OK(gradblend_plan_update(out.plan, NULL, 0, NULL));
    OK(gradblend_step(own, out.plan, NULL));
    gradblend_plan_destroy(out.plan);
    undo();
}

/* A tensor of which every list is absent still has a length and a dtype. */
static void spoil_unlisted_tensors(void)
{
    in.modalities[1][0] = in.modalities[1][1] = NULL;
    in.tensors[1] = (gradblend_tensor){LEN, GRADBLEND_F32, NULL, NULL, in.modalities[1], NULL};
    try_case("update to no list");
    OK(make(PLAN_UPDATE, &good));
    OK(gradblend_step(own, own_plan, NULL));
    finish();
    CHECK(memcmp(place(1, BLENDED), &memory_before[(LISTS + BLENDED) * ROOM / 4], ROOM) == 0);
    OK(gradblend_load(own, own_saved, saved_bytes, NULL));
    memcpy(memory, memory_before, sizeof memory_before);
    try_case("update of another length, with no list there");
    in.tensors[1].len = LEN - 1;
    refuse(PLAN_UPDATE, &good, GRADBLEND_INVALID_ARGUMENT, "tensor 1");
    in.tensors[1].len = LEN;
    in.tensors[1].dtype = GRADBLEND_F16;
    try_case("update of another dtype, with no list there");
    refuse(PLAN_UPDATE, &good, GRADBLEND_INVALID_ARGUMENT, "tensor 1");
    in.tensors[1].dtype = GRADBLEND_F32;
    undo();
}

static void spoil_numbers(void)
{
    static const uint32_t bits[] = {0, 4, 4 | 1, 4 | 8, 16, 16 | 3, 1u << 31, UINT32_MAX};
    for (size_t i = 0; i < COUNT(bits); i++) {
        try_case("pass %#" PRIx32, bits[i]);
        arguments arguments = good;
        arguments.what = bits[i];
        refuse(PASS, &arguments, GRADBLEND_INVALID_ARGUMENT, "pass");
    }
    static const uint32_t counts[] = {0, 1, 3, 32, 64, UINT32_MAX};
    for (size_t i = 0; i < COUNT(counts); i++) {
        try_case("%" PRIu32 " weights", counts[i]);
        arguments arguments = good;
        arguments.weights_count = counts[i];
        refuse(SET_WEIGHTS, &arguments, GRADBLEND_INVALID_ARGUMENT, "weights|2");
    }
    /* Finite as f32: halfway to 2^128 from the largest f32 is too much. */
    static const double too_large[] = {NAN, INFINITY, -INFINITY, 1e39, 0x1.ffffffp127, -0x1.ffffffp127, DBL_MAX};
    static const double large[] = {FLT_MAX, -FLT_MAX, 0x1.fffffefp127, 1e-300, 0, -3};
    for (size_t i = 0; i < COUNT(too_large); i++) {
        for (size_t k = 0; k < 2; k++) {
            try_case("weight %zu of %g", k, too_large[i]);
            in.weights[k] = too_large[i];
            refuse(SET_WEIGHTS, &good, GRADBLEND_INVALID_ARGUMENT, k ? "modality 1" : "modality 0");
            in.weights[k] = 1;
        }
    }
    for (size_t i = 0; i < COUNT(large); i++) {
        try_case("weight of %g", large[i]);
        in.weights[1] = large[i];
        OK(make(SET_WEIGHTS, &good));
        OK(gradblend_get_report(own, &out.report, NULL));
        CHECK(memcmp(out.report.weights, in.weights, 2 * sizeof(double)) == 0);
        undo();
    }
    static const double bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < COUNT(bad); i++) {
        for (size_t k = 0; k < 2; k++) {
            try_case("solve: numerator %zu of %g", k, bad[i]);
            in.numerator[k] = bad[i];
            refuse(SOLVE, &good, GRADBLEND_INVALID_ARGUMENT, k ? "modality 1" : "modality 0");
            in.numerator[k] = 1;
            try_case("solve: in_force %zu of %g", k, bad[i]);
            in.in_force[k] = bad[i];
            refuse(SOLVE, &good, GRADBLEND_INVALID_ARGUMENT, k ? "modality 1" : "modality 0");
            in.in_force[k] = 1;
        }
        for (size_t e = 0; e < 4; e++) {
            try_case("solve: second moment %zu of %g", e, bad[i]);
            in.second_moment[e] = bad[i];
            refuse(SOLVE, &good, GRADBLEND_INVALID_ARGUMENT, "second moment");
            in.second_moment[e] = e == 0 || e == 3 ? -1e-300 : -1e300;
            if (in.second_moment[e] > -1) {
                refuse(SOLVE, &good, GRADBLEND_INVALID_ARGUMENT, "second moment|diagonal");
            } else {
                OK(make(SOLVE, &good));
                memcpy(&out, &out_before, sizeof out);
            }
            in.second_moment[e] = in_before.second_moment[e];
        }
    }
    undo();
    for (uintptr_t shift = 1; shift < 4; shift++) {
        try_case("a scale that is off by %" PRIuPTR, shift);
        arguments arguments = good;
        arguments.scale = (const float *)((uintptr_t)scale_memory + shift);
        refuse(SET_GRAD_SCALE, &arguments, GRADBLEND_INVALID_ARGUMENT, "scale|aligned");
    }
    /* The scale in force is still that of before: none. */
    OK(gradblend_observe(own, NULL));
    OK(gradblend_observe(other, NULL));
    gradblend_report report;
    OK(gradblend_get_report(own, &report, NULL));
    CHECK(report.skipped == 0);
    undo();
    OK(gradblend_load(other, other_saved, saved_bytes, NULL));
}

/* The checksum that ends a saved state, so that what is behind it is reached. */
static void seal(unsigned char *bytes, size_t size)
{
    uint32_t crc = UINT32_MAX;
    for (size_t i = 0; i < size - 4; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
        }
    }
    for (size_t i = 0; i < 4; i++) {
        bytes[size - 4 + i] = (unsigned char)(~crc >> 8 * i);
    }
}

static void spoil_saved_states(void)
{
    for (size_t bytes = 0; bytes < saved_bytes + 16; bytes++) {
        if (bytes != saved_bytes) {
            try_case("a state of %zu bytes", bytes);
            /* Of its own memory, so that reading on is seen. */
            unsigned char *saved = malloc(bytes ? bytes : 1);
            CHECK(saved);
            memset(saved, 0, bytes);
            memcpy(saved, own_saved, bytes < saved_bytes ? bytes : saved_bytes);
            arguments arguments = good;
            arguments.saved = saved;
            arguments.saved_bytes = bytes;
            refuse(LOAD, &arguments, GRADBLEND_CORRUPT_STATE, "state");
            free(saved);
        }
    }
    static const unsigned char flips[] = {1, 0x80, 0xff};
    for (size_t at = 0; at < saved_bytes; at++) {
        for (size_t i = 0; i < COUNT(flips); i++) {
            try_case("byte %zu ^ %#x", at, flips[i]);
            in.saved[at] ^= flips[i];
            refuse(LOAD, &good, GRADBLEND_CORRUPT_STATE, "state");
            in.saved[at] ^= flips[i];
        }
    }
    /* Sealed again after a change: a version from the future, a K that is none, flags that are none. */
    const struct {
        size_t at;
        unsigned char value;
    } words[] = {{8, 2}, {8, 0}, {11, 1}, {12, 0}, {12, 33}, {15, 1}, {16, 2}, {20, 8}, {24, 4}};
    for (size_t i = 0; i < COUNT(words); i++) {
        try_case("byte %zu = %u, sealed", words[i].at, words[i].value);
        in.saved[words[i].at] = words[i].value;
        seal(in.saved, saved_bytes);
        refuse(LOAD, &good, GRADBLEND_CORRUPT_STATE, "state");
        memcpy(in.saved, own_saved, saved_bytes);
    }
    /* And every number of it not finite in turn; pending sums may be that. */
    const size_t header = 8 + 5 * 4 + 4 * 8, pending = 2 * 2 * 8;
    for (size_t at = header + pending; at + 8 < saved_bytes; at += 8) {
        try_case("the number at %zu is NaN, sealed", at);
        double nan = NAN;
        memcpy(in.saved + at, &nan, sizeof nan);
        seal(in.saved, saved_bytes);
        refuse(LOAD, &good, GRADBLEND_CORRUPT_STATE, "state");
        memcpy(in.saved, own_saved, saved_bytes);
    }
    seal(in.saved, saved_bytes);
    CHECK(memcmp(in.saved, own_saved, saved_bytes) == 0);

    /* States of blenders that are not alike; what is not part of the state may differ. */
    const struct {
        const char *name, *words;
        uint32_t k;
        int32_t average;
        double decay;
    } others[] = {
        {"another K", "modalities|3|2", 3, GRADBLEND_EMA, 0.99},
        {"another average", "average|mean|ema", 2, GRADBLEND_MEAN, 0.99},
        {"another decay", "decay|0.5|0.99", 2, GRADBLEND_EMA, 0.5},
        {"a decay that is close", "decay", 2, GRADBLEND_EMA, 0x1.fae147ae147afp-1},
        {"another policy", NULL, 2, GRADBLEND_EMA, 0.99},
    };
    for (size_t i = 0; i < COUNT(others); i++) {
        try_case("the state of a blender of %s", others[i].name);
        gradblend_config config = config_of(others[i].k);
        config.average = others[i].average;
        config.decay = others[i].decay;
        config.overfitting = config.negative = config.cadence = 1;
        config.damping = 0.5;
        gradblend_blender *blender = blender_of(&config);
        arguments arguments = good;
        unsigned char *saved = saved_of(blender, &arguments.saved_bytes);
        arguments.saved = saved;
        if (others[i].words) {
            refuse(LOAD, &arguments, GRADBLEND_INVALID_ARGUMENT, others[i].words);
        } else {
            OK(make(LOAD, &arguments));
            undo();
        }
        free(saved);
        gradblend_blender_destroy(blender);
    }
    try_case("load of nothing");
    arguments arguments = good;
    arguments.saved = NULL;
    arguments.saved_bytes = 0;
    refuse(LOAD, &arguments, GRADBLEND_INVALID_ARGUMENT, "NULL");

    for (size_t room = 0; room < saved_bytes; room++) {
        try_case("save into %zu bytes", room);
        out.bytes = room;
        RETURNS(GRADBLEND_INVALID_ARGUMENT, make(SAVE, &good));
        CHECK(out.bytes == saved_bytes && message_has("bytes"));
        out.bytes = out_before.bytes;
        check_unchanged();
        refusals++;
    }
    try_case("save into more than is needed");
    OK(make(SAVE, &good));
    CHECK(out.bytes == saved_bytes && memcmp(out.buffer, own_saved, saved_bytes) == 0);
    for (size_t i = saved_bytes; i < sizeof out.buffer; i++) {
        CHECK(out.buffer[i] == GUARD);
    }
    undo();
}

static void names_and_messages(void)
{
    static const char *const names[] = {
        "GRADBLEND_OK", "GRADBLEND_INVALID_ARGUMENT", "GRADBLEND_NOT_BUILT", "GRADBLEND_NO_DRIVER",
        "GRADBLEND_NO_DEVICE", "GRADBLEND_UNSUPPORTED_DEVICE", "GRADBLEND_OUT_OF_MEMORY", "GRADBLEND_CUDA",
        "GRADBLEND_CORRUPT_STATE", "GRADBLEND_INTERNAL",
    };
    for (int32_t status = 0; status < (int32_t)COUNT(names); status++) {
        CHECK(strcmp(gradblend_status_name(status), names[status]) == 0);
    }
    static const int32_t none[] = {-1, 10, INT32_MIN, INT32_MAX};
    for (size_t i = 0; i < COUNT(none); i++) {
        CHECK(strcmp(gradblend_status_name(none[i]), "unknown") == 0);
    }
    char whole[512], part[512];
    RETURNS(GRADBLEND_INVALID_ARGUMENT, gradblend_config_default(0, &out.config));
    size_t length = gradblend_last_error(whole, sizeof whole);
    CHECK(length > 0 && length < sizeof whole && strlen(whole) == length);
    /* A call that succeeds leaves it as it is. */
    OK(gradblend_config_default(2, &out.config));
    CHECK(gradblend_last_error(NULL, 0) == length && gradblend_last_error(NULL, 5) == length);
    for (size_t bytes = 0; bytes < length + 3; bytes++) {
        memset(part, GUARD, sizeof part);
        CHECK(gradblend_last_error(part, bytes) == length);
        size_t copied = bytes == 0 ? 0 : bytes > length ? length : bytes - 1;
        CHECK(memcmp(part, whole, copied) == 0 && (bytes == 0 || part[copied] == 0));
        CHECK((unsigned char)part[bytes == 0 ? 0 : copied + 1] == GUARD);
    }
    memcpy(&out, &out_before, sizeof out);
}

int main(int count, char **args)
{
    char none[2] = "x";
    CHECK(gradblend_last_error(none, sizeof none) == 0 && *none == 0);
    set_up(count, args);
    set_up_world();
    good_arguments_are_taken();
    spoil_pointers();
    spoil_config();
    spoil_lists();
    spoil_tensors();
    spoil_numbers();
    spoil_saved_states();
    names_and_messages();
    spoil_unlisted_tensors();
    gradblend_plan_destroy(own_plan);
    gradblend_blender_destroy(own);
    gradblend_blender_destroy(other);
    gradblend_plan_destroy(other_plan);
    free(own_saved);
    free(other_saved);
    memory_free(memory);
    memory_free(scale_memory);
    printf("invalid: %u refusals\n", refusals);
    return 0;
}
