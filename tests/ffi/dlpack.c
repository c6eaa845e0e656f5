/* Tensors from DLPack: every shape, dtype and device that is taken, every fault that is not, in both structs. */
#include <stddef.h>

#include "check.h"
#include "dlpack.h"

enum { K = 2, GIVEN = K + 3, DIMENSIONS = 4, ROOM = 256, GUARD = 0xa5 };
enum { TRAIN, VALID, FIRST, SECOND, BLENDED };
static const char *const NAMES[] = {"train", "valid", "modality 0", "modality 1", "blended"};

static void never_managed(DLManagedTensor *self)
{
    (void)self;
    fail(__FILE__, __LINE__, "a deleter was called");
}

static void never_versioned(DLManagedTensorVersioned *self)
{
    (void)self;
    fail(__FILE__, __LINE__, "a deleter was called");
}

/* An array as a framework has it. */
typedef struct {
    int64_t shape[DIMENSIONS], strides[DIMENSIONS];
    DLTensor tensor;
    uint32_t major;
    uint64_t flags;
    bool versioned;
    DLManagedTensor as_managed;
    DLManagedTensorVersioned as_versioned;
} array;

static array arrays[GIVEN];
static gradblend_dlpack lists[GIVEN];
static bool given[GIVEN];
static char *memory;

/* Six numbers of f32 on the device under test, in each list that is given. */
static void fresh(void)
{
    memset(lists, 0, sizeof lists);
    for (int i = 0; i < GIVEN; i++) {
        arrays[i] = (array){.shape = {2, 3}, .strides = {3, 1}, .major = 1};
        arrays[i].tensor = (DLTensor){
            .data = memory + i * ROOM,
            .device = {device == GRADBLEND_CPU ? kDLCPU : kDLCUDA, device == GRADBLEND_CPU ? 0 : device},
            .ndim = 2, .dtype = {kDLFloat, 32, 1}, .shape = arrays[i].shape, .strides = arrays[i].strides};
        given[i] = true;
    }
}

static gradblend_tensor tensor;
static const void *addresses[K + 1];

static gradblend_status convert_for(int32_t on)
{
    for (int i = 0; i < GIVEN; i++) {
        array *a = &arrays[i];
        a->as_managed = (DLManagedTensor){a->tensor, NULL, never_managed};
        a->as_versioned = (DLManagedTensorVersioned){{a->major, 7}, NULL, never_versioned, a->flags, a->tensor};
        lists[i] = (gradblend_dlpack){NULL, NULL};
        if (given[i] && a->versioned) {
            lists[i].versioned = &a->as_versioned;
        } else if (given[i]) {
            lists[i].managed = &a->as_managed;
        }
    }
    memset(&tensor, GUARD, sizeof tensor);
    memset(addresses, GUARD, sizeof addresses);
    return gradblend_tensor_from_dlpack(on, K, &lists[TRAIN], &lists[VALID], &lists[FIRST], &lists[BLENDED], addresses,
                                        &tensor);
}

static gradblend_status convert(void)
{
    return convert_for(device);
}

static bool guarded(const void *memory, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        if (((const unsigned char *)memory)[i] != GUARD) {
            return false;
        }
    }
    return true;
}

/* Refused, with a message that names the list, and with nothing written. */
static void check_refused(gradblend_status status, const char *name)
{
    char message[512];
    check_status(status, GRADBLEND_INVALID_ARGUMENT, "tensor_from_dlpack", __FILE__, __LINE__);
    CHECK(gradblend_last_error(message, sizeof message) > 0);
    if (!strstr(message, name)) {
        fail(__FILE__, __LINE__, "the message does not name %s", name);
    }
    CHECK(guarded(&tensor, sizeof tensor) && guarded(addresses, sizeof addresses));
}

static const void *address_of(int list)
{
    switch (list) {
    case TRAIN: return tensor.train;
    case VALID: return tensor.valid;
    case BLENDED: return tensor.blended;
    default: return addresses[list - FIRST];
    }
}

static void check_taken(uint64_t len, int32_t dtype)
{
    CHECK(tensor.len == len && tensor.dtype == dtype && tensor.modalities == addresses);
    CHECK(guarded(&addresses[K], sizeof *addresses));
    for (int i = 0; i < GIVEN; i++) {
        bool there = given[i] && len > 0;
        CHECK(address_of(i) == (there ? (char *)arrays[i].tensor.data + arrays[i].tensor.byte_offset : NULL));
    }
}

/* Only this list, in one of the forms, so that others do not hide what is made of it. */
static void fresh_one(int list, bool versioned)
{
    fresh();
    for (int i = 0; i < GIVEN; i++) {
        given[i] = i == list;
    }
    arrays[list].versioned = versioned;
}

/* One field of the DLTensor, and whether the value is taken. */
typedef struct {
    const char *name;
    size_t field, bytes;
    int64_t value;
} field_fault;

#define FIELD(field, value) {#field, offsetof(DLTensor, field), sizeof((DLTensor *)0)->field, value}

static const field_fault FIELD_FAULTS[] = {
    FIELD(data, 0), FIELD(shape, 0), FIELD(ndim, -1), FIELD(ndim, INT32_MIN), FIELD(byte_offset, 1),
    FIELD(byte_offset, 2), FIELD(byte_offset, 1023), FIELD(byte_offset, -1), FIELD(byte_offset, INT64_MIN + 2),
    FIELD(device.device_type, 0), FIELD(device.device_type, 4), FIELD(device.device_type, 7),
    FIELD(device.device_type, 10), FIELD(device.device_type, 12), FIELD(device.device_type, 14),
    FIELD(device.device_type, 16), FIELD(device.device_type, -1), FIELD(dtype.lanes, 0), FIELD(dtype.lanes, 2),
    FIELD(dtype.lanes, 257), FIELD(dtype.bits, 0), FIELD(dtype.bits, 8), FIELD(dtype.bits, 31), FIELD(dtype.bits, 64),
    FIELD(dtype.code, 0), FIELD(dtype.code, 1), FIELD(dtype.code, 3), FIELD(dtype.code, 4), FIELD(dtype.code, 5),
    FIELD(dtype.code, 6), FIELD(dtype.code, 255),
};

static void spoil_fields(void)
{
    for (int list = 0; list < GIVEN; list++) {
        for (int versioned = 0; versioned < 2; versioned++) {
            for (size_t i = 0; i < COUNT(FIELD_FAULTS); i++) {
                const field_fault *fault = &FIELD_FAULTS[i];
                fresh_one(list, versioned);
                try_case("%s, versioned %d, %s = %" PRId64, NAMES[list], versioned, fault->name, fault->value);
                /* The numbers are little-endian, as are all machines that this runs on. */
                memcpy((char *)&arrays[list].tensor + fault->field, &fault->value, fault->bytes);
                check_refused(convert(), NAMES[list]);
            }
            fresh_one(list, versioned);
            try_case("%s, versioned %d, all is well", NAMES[list], versioned);
            OK(convert());
            check_taken(6, GRADBLEND_F32);
            arrays[list].tensor.byte_offset = 8;
            OK(convert());
            check_taken(6, GRADBLEND_F32);
            /* The first element is what must be aligned. */
            arrays[list].tensor.data = (char *)arrays[list].tensor.data + 2;
            arrays[list].tensor.byte_offset = 6;
            OK(convert());
            check_taken(6, GRADBLEND_F32);
            arrays[list].tensor.byte_offset = 8;
            check_refused(convert(), NAMES[list]);
            fresh_one(list, versioned);
            arrays[list].tensor.byte_offset = 0 - (uint64_t)(uintptr_t)arrays[list].tensor.data;
            check_refused(convert(), NAMES[list]);
            fresh_one(list, versioned);
            arrays[list].tensor.shape = (int64_t *)((char *)arrays[list].shape + 4);
            check_refused(convert(), NAMES[list]);
            fresh_one(list, versioned);
            arrays[list].tensor.strides = (int64_t *)((char *)arrays[list].strides + 4);
            check_refused(convert(), NAMES[list]);
        }
        for (uint32_t major = 0; major < 4; major++) {
            fresh_one(list, true);
            try_case("%s of version %" PRIu32, NAMES[list], major);
            arrays[list].major = major;
            if (major == 1) {
                OK(convert());
            } else {
                check_refused(convert(), NAMES[list]);
            }
        }
        /* Bit 1 is that the array was copied, and others are to come. */
        for (uint64_t flags = 0; flags < 8; flags++) {
            fresh_one(list, true);
            try_case("%s of flags %" PRIu64, NAMES[list], flags);
            arrays[list].flags = flags;
            if (list == BLENDED && flags & DLPACK_FLAG_READ_ONLY) {
                check_refused(convert(), NAMES[list]);
            } else {
                OK(convert());
            }
        }
        fresh_one(list, false);
        try_case("%s twice", NAMES[list]);
        OK(convert());
        memset(&tensor, GUARD, sizeof tensor);
        memset(addresses, GUARD, sizeof addresses);
        lists[list].versioned = &arrays[list].as_versioned;
        const char *names[] = {"train", "valid", "0", "1", "blended"};
        check_refused(gradblend_tensor_from_dlpack(device, K, &lists[TRAIN], &lists[VALID], &lists[FIRST],
                                                   &lists[BLENDED], addresses, &tensor), names[list]);
        lists[list] = (gradblend_dlpack){(const DLManagedTensor *)((const char *)&arrays[list].as_managed + 4), NULL};
        check_refused(gradblend_tensor_from_dlpack(device, K, &lists[TRAIN], &lists[VALID], &lists[FIRST],
                                                   &lists[BLENDED], addresses, &tensor), names[list]);
    }
}

/* Shapes, and how many elements they have; -1 for those that are refused. */
typedef struct {
    int32_t ndim;
    int64_t shape[DIMENSIONS];
    bool strided;
    int64_t strides[DIMENSIONS];
    int64_t len;
} shape_case;

static const shape_case SHAPES[] = {
    {0, {0}, false, {0}, 1}, {0, {0}, true, {5}, 1}, {1, {6}, false, {0}, 6}, {1, {6}, true, {1}, 6},
    {1, {6}, true, {2}, -1}, {1, {6}, true, {0}, -1}, {1, {6}, true, {-1}, -1}, {1, {1}, true, {99}, 1},
    {1, {1}, true, {INT64_MIN}, 1}, {1, {0}, false, {0}, 0}, {1, {0}, true, {77}, 0}, {1, {-1}, false, {0}, -1},
    {1, {INT64_MIN}, false, {0}, -1}, {1, {INT64_MAX}, false, {0}, -1}, {1, {(int64_t)1 << 61}, false, {0}, -1},
    {2, {2, 3}, true, {3, 1}, 6}, {2, {2, 3}, true, {1, 2}, -1}, {2, {2, 3}, true, {4, 1}, -1},
    {2, {2, 3}, true, {3, 2}, -1}, {2, {2, 3}, true, {0, 1}, -1}, {2, {2, 3}, true, {-3, 1}, -1},
    {2, {1, 6}, true, {99, 1}, 6}, {2, {6, 1}, true, {1, -7}, 6}, {2, {2, 0}, true, {8, 8}, 0},
    {2, {0, -1}, false, {0}, -1}, {2, {-2, -3}, false, {0}, -1}, {2, {3, -2}, true, {-2, 1}, -1},
    {2, {(int64_t)1 << 32, (int64_t)1 << 32}, false, {0}, -1},
    {2, {(int64_t)1 << 32, (int64_t)1 << 32}, true, {(int64_t)1 << 32, 1}, -1},
    {3, {(int64_t)1 << 62, 4, 0}, false, {0}, 0}, {3, {2, 1, 3}, true, {3, 1000, 1}, 6},
    {4, {1, 2, 1, 3}, true, {0, 3, 0, 1}, 6}, {4, {2, 3, 2, 2}, true, {12, 4, 2, 1}, 24},
    {4, {2, 3, 2, 2}, true, {12, 2, 4, 1}, -1}, {4, {1, 1, 1, 1}, true, {-1, 0, 7, 9}, 1},
};

static void shapes(void)
{
    for (size_t i = 0; i < COUNT(SHAPES); i++) {
        const shape_case *shape = &SHAPES[i];
        for (int list = 0; list < 2 * GIVEN; list++) {
            array *a = &arrays[list / 2];
            fresh_one(list / 2, list % 2);
            try_case("shape %zu, %s, versioned %d", i, NAMES[list / 2], list % 2);
            memcpy(a->shape, shape->shape, sizeof a->shape);
            memcpy(a->strides, shape->strides, sizeof a->strides);
            a->tensor.ndim = shape->ndim;
            a->tensor.shape = shape->ndim > 0 ? a->shape : NULL;
            a->tensor.strides = shape->strided ? a->strides : NULL;
            if (shape->len < 0) {
                check_refused(convert(), NAMES[list / 2]);
            } else {
                OK(convert());
                check_taken((uint64_t)shape->len, GRADBLEND_F32);
            }
            /* An array of nothing lies nowhere. */
            if (shape->len == 0) {
                a->tensor.data = NULL;
                OK(convert());
                check_taken(0, GRADBLEND_F32);
            }
        }
    }
}

static void dtypes(void)
{
    unsigned taken = 0;
    for (unsigned code = 0; code < 256; code++) {
        for (unsigned bits = 0; bits < 256; bits += code < 8 ? 8 : 16) {
            fresh_one((int)(code % GIVEN), bits % 64);
            array *a = &arrays[code % GIVEN];
            a->tensor.dtype = (DLDataType){(uint8_t)code, (uint8_t)bits, 1};
            try_case("code %u, %u bits", code, bits);
            int32_t dtype = code == kDLFloat && bits == 32    ? GRADBLEND_F32
                            : code == kDLFloat && bits == 16  ? GRADBLEND_F16
                            : code == kDLBfloat && bits == 16 ? GRADBLEND_BF16
                                                              : -1;
            if (dtype < 0) {
                check_refused(convert(), NAMES[code % GIVEN]);
                continue;
            }
            OK(convert());
            check_taken(6, dtype);
            taken++;
        }
    }
    CHECK(taken == 3);
}

/* By the device asked for: where an array may lie. No device has to be there. */
static void devices(void)
{
    const struct {
        int32_t on;
        DLDevice at;
        bool taken;
    } cases[] = {
        {GRADBLEND_CPU, {kDLCPU, 0}, true}, {GRADBLEND_CPU, {kDLCUDA, 0}, false},
        {GRADBLEND_CPU, {kDLCUDAHost, 0}, true}, {GRADBLEND_CPU, {kDLCUDAManaged, 3}, true},
        {GRADBLEND_CPU, {kDLCUDA, -1}, false}, {0, {kDLCPU, 0}, false}, {0, {kDLCUDA, 0}, true},
        {0, {kDLCUDA, 1}, false}, {0, {kDLCUDAHost, 0}, true}, {0, {kDLCUDAManaged, 0}, true},
        {1, {kDLCUDA, 0}, false}, {1, {kDLCUDA, 1}, true}, {1, {kDLCUDA, -1}, false}, {0, {10, 0}, false},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        for (int list = 0; list < 2 * GIVEN; list++) {
            fresh_one(list / 2, list % 2);
            try_case("device %" PRId32 ", %s on type %" PRId32 ", id %" PRId32, cases[i].on, NAMES[list / 2],
                     cases[i].at.device_type, cases[i].at.device_id);
            arrays[list / 2].tensor.device = cases[i].at;
            if (cases[i].taken) {
                OK(convert_for(cases[i].on));
                check_taken(6, GRADBLEND_F32);
            } else {
                check_refused(convert_for(cases[i].on), NAMES[list / 2]);
            }
        }
    }
    static const int32_t none[] = {-2, INT32_MIN};
    for (size_t i = 0; i < COUNT(none); i++) {
        fresh();
        try_case("device %" PRId32, none[i]);
        check_refused(convert_for(none[i]), "device");
    }
}

/* Lists that do not fit together; the one that is named is the one that differs from those before it. */
static void lists_that_differ(void)
{
    for (int list = 1; list < GIVEN; list++) {
        for (int versioned = 0; versioned < 2; versioned++) {
            fresh();
            arrays[list].versioned = versioned;
            try_case("%s of another length", NAMES[list]);
            arrays[list].shape[0] = 1;
            check_refused(convert(), NAMES[list]);
            /* Also where it is empty, which has no address. */
            arrays[list].shape[0] = 0;
            check_refused(convert(), NAMES[list]);
            try_case("%s of another dtype", NAMES[list]);
            arrays[list].shape[0] = 2;
            arrays[list].tensor.dtype.bits = 16;
            check_refused(convert(), NAMES[list]);
            try_case("%s of another shape", NAMES[list]);
            arrays[list].tensor.dtype.bits = 32;
            arrays[list].shape[0] = 6;
            arrays[list].tensor.ndim = 1;
            arrays[list].tensor.strides = NULL;
            OK(convert());
            check_taken(6, GRADBLEND_F32);
        }
    }
    fresh();
    memset(given, 0, sizeof given);
    try_case("no list at all");
    check_refused(convert(), "absent");
}

static void spoil_arguments(void)
{
    fresh();
    OK(convert());
    memset(&tensor, GUARD, sizeof tensor);
    memset(addresses, GUARD, sizeof addresses);
    const gradblend_dlpack *t = &lists[TRAIN], *g = &lists[VALID], *v = &lists[FIRST], *b = &lists[BLENDED];
    const gradblend_dlpack *off = (const gradblend_dlpack *)((const char *)lists + 4);
    const struct {
        const char *name;
        uint32_t k;
        const gradblend_dlpack *t, *g, *v, *b;
        const void **addresses;
        gradblend_tensor *tensor;
    } cases[] = {
        {"modalities", 0, t, g, v, b, addresses, &tensor}, {"modalities", 33, t, g, v, b, addresses, &tensor},
        {"modalities", UINT32_MAX, t, g, v, b, addresses, &tensor}, {"gradients", K, t, g, NULL, b, addresses, &tensor},
        {"addresses", K, t, g, v, b, NULL, &tensor}, {"tensor", K, t, g, v, b, addresses, NULL},
        {"train", K, off, g, v, b, addresses, &tensor}, {"valid", K, t, off, v, b, addresses, &tensor},
        {"gradients", K, t, g, off, b, addresses, &tensor}, {"blended", K, t, g, v, off, addresses, &tensor},
        {"addresses", K, t, g, v, b, (const void **)((char *)addresses + 4), &tensor},
        {"tensor", K, t, g, v, b, addresses, (gradblend_tensor *)((char *)&tensor + 4)},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        try_case("%s, argument case %zu", cases[i].name, i);
        check_refused(gradblend_tensor_from_dlpack(device, cases[i].k, cases[i].t, cases[i].g, cases[i].v, cases[i].b,
                                                   cases[i].addresses, cases[i].tensor), cases[i].name);
    }
    /* NULL for a list is a list that is absent. */
    try_case("NULL lists");
    OK(gradblend_tensor_from_dlpack(device, K, NULL, NULL, v, NULL, addresses, &tensor));
    given[TRAIN] = given[VALID] = given[BLENDED] = false;
    check_taken(6, GRADBLEND_F32);
}

/* What comes out works: the same bits as from a tensor that was filled by hand. */
static void tensors_work(void)
{
    static const DLDataType types[] = {{kDLFloat, 32, 1}, {kDLFloat, 16, 1}, {kDLBfloat, 16, 1}};
    random_state random = {7};
    for (unsigned round = 0; round < 60; round++) {
        gradblend_config config = config_of(K);
        gradblend_blender *one = blender_of(&config), *two = blender_of(&config);
        int32_t dtype = (int32_t)round % 3;
        try_case("round %u", round);
        fresh();
        uint64_t offset = random_below(&random, 8) * DTYPES[dtype].bytes;
        for (int i = 0; i < GIVEN; i++) {
            arrays[i].tensor.dtype = types[dtype];
            arrays[i].tensor.byte_offset = offset;
            arrays[i].shape[0] = (int64_t)(round / 3 % 4);
            arrays[i].versioned = random_below(&random, 2);
            arrays[i].tensor.strides = random_below(&random, 2) ? arrays[i].strides : NULL;
            given[i] = i < FIRST || random_below(&random, 4) != 0;
            for (uint64_t e = 0; e < 30; e++) {
                list_set(dtype, memory + i * ROOM, e, random_number(&random));
            }
        }
        OK(convert());
        check_taken(3 * (round / 3 % 4), dtype);
        const void *v[K] = {NULL, NULL};
        gradblend_tensor by_hand = {3 * (round / 3 % 4), dtype, NULL, NULL, v, NULL};
        if (by_hand.len > 0) {
            by_hand.train = memory + TRAIN * ROOM + offset;
            by_hand.valid = memory + VALID * ROOM + offset;
            v[0] = given[FIRST] ? memory + FIRST * ROOM + offset : NULL;
            v[1] = given[SECOND] ? memory + SECOND * ROOM + offset : NULL;
            by_hand.blended = given[BLENDED] ? memory + BLENDED * ROOM + offset : NULL;
        }
        char blends[2][ROOM];
        gradblend_plan *plan;
        OK(gradblend_plan_create(one, &tensor, 1, &plan));
        OK(gradblend_step(one, plan, NULL));
        finish();
        memcpy(blends[0], memory + BLENDED * ROOM, ROOM);
        gradblend_plan_destroy(plan);
        OK(gradblend_plan_create(two, &by_hand, 1, &plan));
        OK(gradblend_step(two, plan, NULL));
        finish();
        memcpy(blends[1], memory + BLENDED * ROOM, ROOM);
        gradblend_plan_destroy(plan);
        CHECK(memcmp(blends[0], blends[1], ROOM) == 0 && same_state(one, two));
        gradblend_blender_destroy(one);
        gradblend_blender_destroy(two);
    }
}

int main(int count, char **args)
{
    set_up(count, args);
    memory = memory_new(GIVEN * ROOM);
    memset(memory, 0, GIVEN * ROOM);
    spoil_fields();
    shapes();
    dtypes();
    devices();
    lists_that_differ();
    spoil_arguments();
    tensors_work();
    memory_free(memory);
    printf("dlpack: %zu shapes, %zu faults\n", COUNT(SHAPES), COUNT(FIELD_FAULTS));
    return 0;
}
