// The CUDA driver API, as far as the crate uses it, on the host's memory.

#include <stdio.h>
#include <stdlib.h>

#include <tuple>
#include <utility>

#include "driver.hpp"

#include "vec128.cuh"

// ---- Kernels ----

extern "C" {
void dot(TableArgs, BlenderArgs, ObservationArgs, uint32_t);
void blend(TableArgs, BlenderArgs, ObservationArgs, uint32_t);
void dot_blend(TableArgs, BlenderArgs, ObservationArgs, uint32_t);
void observe(BlenderArgs, ObservationArgs);
void reweight(BlenderArgs);
void reset(BlenderArgs);
void set_weights(BlenderArgs, Weights);

// Of benches/kernels/naive.cu.
#define NAIVE(dtype) \
    void difference_##dtype(uint64_t, uint64_t, uint64_t, uint64_t); \
    void scale_##dtype(float, uint64_t, uint64_t, uint64_t); \
    void axpy_##dtype(float, uint64_t, uint64_t, uint64_t); \
    void product_##dtype(uint64_t, uint64_t, uint64_t, uint64_t); \
    void total_##dtype(uint64_t, uint64_t, uint64_t, uint64_t);
NAIVE(f32)
NAIVE(f16)
NAIVE(bf16)
#undef NAIVE
void read_units(uint64_t, uint64_t, uint64_t);
}

namespace standin {
namespace {

template <auto KERNEL>
struct Bind;
template <class... P, void (*KERNEL)(P...)>
struct Bind<KERNEL> {
    template <size_t... I>
    static Work copy(void **parameters, std::index_sequence<I...>) {
        return [copies = std::tuple<P...>(*static_cast<const P *>(parameters[I])...)] { std::apply(KERNEL, copies); };
    }
    static Work bind(void **parameters) { return copy(parameters, std::index_sequence_for<P...>()); }
};

const Kernel KERNELS[] = {
#define X(kernel) {#kernel, Bind<kernel>::bind},
#define NAIVE(dtype) X(difference_##dtype) X(scale_##dtype) X(axpy_##dtype) X(product_##dtype) X(total_##dtype)
    X(dot) X(blend) X(dot_blend) X(observe) X(reweight) X(reset) X(set_weights)
    NAIVE(f32) NAIVE(f16) NAIVE(bf16) X(read_units)
#undef NAIVE
#undef X
};

// ---- Results and memory ----

struct Result {
    int code;
    const char *name, *text;
};
const Result RESULT_TABLE[] = {
#define X(name, code, text) {code, #name, text},
    RESULTS(X)
#undef X
};

const Result &the_result(int code) {
    const auto its = [&](const Result &one) { return one.code == code; };
    const auto found = std::find_if(std::begin(RESULT_TABLE), std::end(RESULT_TABLE), its);
    demand(found != std::end(RESULT_TABLE), CUDA_ERROR_INVALID_VALUE);
    return *found;
}

uint64_t memory_size() { return static_cast<uint64_t>(driver.settings.at("memory")); }

// A device address is one of the host's, so the functions take it as a pointer.
uintptr_t number(const void *address) { return reinterpret_cast<uintptr_t>(address); }

// The allocation that has all of these bytes, or the end.
auto containing(const void *address, size_t bytes) {
    auto found = driver.allocations.upper_bound(number(address));
    if (found == driver.allocations.begin()) {
        return driver.allocations.end();
    }
    --found;
    return number(address) - found->first + bytes <= found->second.bytes ? found : driver.allocations.end();
}

// Takes an allocation off the list and gives its memory back; returns the one behind it.
auto forget(std::map<uintptr_t, Allocation>::iterator found) {
    driver.live[found->second.host] -= found->second.bytes;
    free(reinterpret_cast<void *>(found->first));
    return driver.allocations.erase(found);
}

void allocate(void **memory, size_t bytes, bool host) {
    demand(memory != nullptr && bytes != 0, CUDA_ERROR_INVALID_VALUE);
    refuse_if_unsafe();
    demand(host || driver.live[false] + bytes <= memory_size(), CUDA_ERROR_OUT_OF_MEMORY);
    // No byte more than asked for, so that AddressSanitizer sees the first one beyond.
    demand(posix_memalign(memory, 256, bytes) == 0, CUDA_ERROR_OUT_OF_MEMORY);
    scramble(*memory, bytes);
    driver.allocations[number(*memory)] = {current.back(), bytes, host};
    driver.live[host] += bytes;
    count("allocations");
}

void release(void *memory, bool host) {
    const auto found = driver.allocations.find(number(memory));
    demand(found != driver.allocations.end() && found->second.host == host, CUDA_ERROR_INVALID_VALUE);
    refuse_if_unsafe();
    if (busy(found->second.context)) {
        // A device waits here, but nobody should have to rely on it.
        count("busy_frees");
        drain_all(found->second.context);
    }
    forget(found);
    count("frees");
}

// An address, once it is clear that a device can reach all of these bytes.
template <class T>
T *on_device(T *address, size_t bytes) {
    const bool known = setting("pageable") != 0 || containing(address, bytes) != driver.allocations.end();
    demand(bytes == 0 || (address != nullptr && known), CUDA_ERROR_INVALID_VALUE);
    return address;
}

template <class T>
T *on_host(T *address, size_t bytes) {
    demand(bytes == 0 || address != nullptr, CUDA_ERROR_INVALID_VALUE);
    return address;
}

void copy_later(void *to, const void *from, size_t bytes, Stream &stream) {
    submit(stream, {COPY_NODE, [=] { memcpy(to, from, bytes); }});
    count("copies");
}

void copy_now(void *to, const void *from, size_t bytes) {
    refuse_if_unsafe();
    Stream &legacy = the_stream(nullptr);
    copy_later(to, from, bytes, legacy);
    count("waits");
    drain(legacy, driver.issued);
}

int the_device(int ordinal) {
    demand(ordinal >= 0 && ordinal < setting("devices"), CUDA_ERROR_INVALID_DEVICE);
    return ordinal;
}

Context *the_context(Context *context) {
    const auto found = std::find_if(driver.contexts.begin(), driver.contexts.end(),
                                    [&](const auto &entry) { return &entry.second == context; });
    demand(found != driver.contexts.end() && context->retained > 0, CUDA_ERROR_INVALID_CONTEXT);
    return context;
}

void clear(Context *context) {
    drain_all(context);
    const auto its = [&](const auto &one) { return one.context == context; };
    driver.streams.remove_if(its);
    driver.events.remove_if(its);
    driver.modules.remove_if(its);
    driver.functions.remove_if(its);
    driver.graphs.remove_if(its);
    driver.executables.remove_if(its);
    for (auto at = driver.allocations.begin(); at != driver.allocations.end();) {
        at = its(at->second) ? forget(at) : std::next(at);
    }
}

}  // namespace

void Driver::restore_settings() {
    settings = {
        {"devices", 1}, {"multiprocessors", 3}, {"blocks_per_multiprocessor", 2}, {"major", 9}, {"minor", 0},
        {"driver_version", 13000}, {"pageable", 1}, {"memory", int64_t(16) << 30}, {"seed", 0}, {"image", CUDA_SUCCESS},
    };
    for (const auto &[variable, name] : {std::pair("GRADBLEND_STANDIN_SEED", "seed"),
                                         std::pair("GRADBLEND_STANDIN_MULTIPROCESSORS", "multiprocessors")}) {
        if (const char *value = getenv(variable)) {
            settings[name] = atoll(value);
        }
    }
    seed(static_cast<uint64_t>(settings["seed"]));
}

}  // namespace standin

using namespace standin;

// ---- Devices and contexts ----

EXPORT int cuInit(unsigned) {
    return call(__func__, NOTHING, [&] {
        demand(setting("devices") > 0, CUDA_ERROR_NO_DEVICE);
        driver.initialised = true;
    });
}

ANSWER(cuDriverGetVersion, NOTHING, (int *version), give(version, setting("driver_version")))
ANSWER(cuGetErrorName, NOTHING, (int code, const char **name), give(name, the_result(code).name))
ANSWER(cuGetErrorString, NOTHING, (int code, const char **text), give(text, the_result(code).text))
ANSWER(cuDeviceGetCount, DRIVER, (int *devices), give(devices, setting("devices")))
ANSWER(cuDeviceGet, DRIVER, (int *device, int ordinal), give(device, the_device(ordinal)))

EXPORT int cuDeviceGetName(char *name, int size, int device) {
    return call(__func__, DRIVER, [&] {
        demand(name != nullptr && size > 0, CUDA_ERROR_INVALID_VALUE);
        snprintf(name, static_cast<size_t>(size), "Stand-in %d", the_device(device));
    });
}

ANSWER(cuDeviceTotalMem_v2, DRIVER, (size_t *bytes, int device), give((the_device(device), bytes), memory_size()))

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    return call(__func__, DRIVER, [&] {
        the_device(device);
        const std::map<int, int> values = {
            {1, 1024}, {2, 1024}, {3, 1024}, {4, 64},     // threads of a block, and in each of its dimensions
            {5, INT32_MAX}, {6, 65535}, {7, 65535},       // blocks of a grid in each dimension
            {8, 48 << 10}, {10, 32}, {12, 65536},         // shared memory of a block, threads of a warp, registers
            {16, setting("multiprocessors")}, {39, 2048},  // multiprocessors, and threads of one
            {31, 1}, {40, 1}, {41, 1},                    // kernels beside each other, beside copies; one address space
            {38, 50 << 20},                               // second-level cache
            {75, setting("major")}, {76, setting("minor")}, {88, setting("pageable")},
        };
        const auto found = values.find(attribute);
        give(value, found == values.end() ? 0 : found->second);
    });
}

EXPORT int cuDevicePrimaryCtxRetain(Context **context, int device) {
    return call(__func__, DRIVER, [&] {
        give(context, &driver.contexts.try_emplace(device, Context{the_device(device)}).first->second);
        ++(*context)->retained;
    });
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    return call(__func__, DRIVER, [&] {
        const auto found = driver.contexts.find(the_device(device));
        demand(found != driver.contexts.end() && found->second.retained > 0, CUDA_ERROR_INVALID_CONTEXT);
        if (found->second.retained == 1) {
            clear(&found->second);
        }
        --found->second.retained;
    });
}

ANSWER(cuCtxGetCurrent, DRIVER, (Context **context), give(context, current.empty() ? nullptr : current.back()))

EXPORT int cuCtxSetCurrent(Context *context) {
    return call(__func__, DRIVER, [&] {
        if (context != nullptr) {
            the_context(context);
        }
        if (!current.empty()) {
            current.pop_back();
        }
        if (context != nullptr) {
            current.push_back(context);
        }
    });
}

ANSWER(cuCtxPushCurrent_v2, DRIVER, (Context *context), current.push_back(the_context(context)))

EXPORT int cuCtxPopCurrent_v2(Context **context) {
    return call(__func__, DRIVER, [&] {
        demand(!current.empty(), CUDA_ERROR_INVALID_CONTEXT);
        if (context != nullptr) {
            *context = current.back();
        }
        current.pop_back();
    });
}

ANSWER(cuCtxGetDevice, CONTEXT, (int *device), give(device, current.back()->device))

EXPORT int cuCtxSynchronize() {
    return call(__func__, CONTEXT, [&] {
        refuse_during([](const Stream &stream) { return stream.context == current.back(); },
                      CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        count("waits");
        drain_all(current.back());
    });
}

// ---- Modules and launches ----

EXPORT int cuModuleLoadData(Module **module, const void *image) {
    return call(__func__, CONTEXT, [&] {
        demand(image != nullptr, CUDA_ERROR_INVALID_VALUE);
        refuse_if_unsafe();
        // The kernels are in this library, but what would be no image for a device is none here. How a fat binary
        // starts, the wrapper of one, an ELF file, and PTX with a comment in front or without.
        const auto starts = {"\x50\xed\x55\xba", "\xb1\x43\x62\x46", "\x7f" "ELF", "//", ".ver"};
        const auto matches = [&](const char *start) { return memcmp(image, start, strlen(start)) == 0; };
        demand(std::any_of(starts.begin(), starts.end(), matches), CUDA_ERROR_INVALID_IMAGE);
        demand(setting("image") == CUDA_SUCCESS, setting("image"));
        give_new(module, driver.modules, Module{current.back()});
    });
}

EXPORT int cuModuleUnload(Module *handle) {
    return call(__func__, CONTEXT, [&] {
        const Module &module = the(driver.modules, handle);
        refuse_if_unsafe();
        driver.functions.remove_if([&](const Function &function) { return function.module == &module; });
        destroy(driver.modules, handle);
    });
}

EXPORT int cuModuleGetFunction(Function **function, Module *handle, const char *name) {
    return call(__func__, CONTEXT, [&] {
        const Module &module = the(driver.modules, handle);
        demand(name != nullptr, CUDA_ERROR_INVALID_VALUE);
        const auto named = [&](const Kernel &kernel) { return strcmp(kernel.name, name) == 0; };
        const auto kernel = std::find_if(std::begin(KERNELS), std::end(KERNELS), named);
        demand(kernel != std::end(KERNELS), CUDA_ERROR_NOT_FOUND);
        give_new(function, driver.functions, Function{module.context, &module, kernel});
    });
}

EXPORT int cuFuncGetAttribute(int *value, int attribute, Function *function) {
    return call(__func__, CONTEXT, [&] {
        the(driver.functions, function);
        // Threads of a block, registers, and the versions that the kernel was made for.
        const int version = 10 * setting("major") + setting("minor");
        give(value, attribute == 0 ? 1024 : attribute == 4 ? 128 : attribute == 5 || attribute == 6 ? version : 0);
    });
}

ANSWER(cuFuncSetAttribute, CONTEXT, (Function *function, int, int), the(driver.functions, function))

EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, Function *function, int threads, size_t) {
    return call(__func__, CONTEXT, [&] {
        the(driver.functions, function);
        demand(threads >= 1 && threads <= 1024, CUDA_ERROR_INVALID_VALUE);
        give(blocks, setting("blocks_per_multiprocessor"));
    });
}

EXPORT int cuLaunchKernel(Function *handle, unsigned blocks, unsigned blocks_y, unsigned blocks_z, unsigned threads,
                          unsigned threads_y, unsigned threads_z, unsigned shared, void *stream, void **parameters,
                          void **extra) {
    return call(__func__, CONTEXT, [&] {
        const Function &function = the(driver.functions, handle);
        demand(function.context == current.back(), CUDA_ERROR_INVALID_HANDLE);
        // The kernels have one dimension, and declare all their shared memory.
        demand(blocks_y == 1 && blocks_z == 1 && threads_y == 1 && threads_z == 1, CUDA_ERROR_INVALID_VALUE);
        demand(blocks >= 1 && threads >= 1 && threads <= 1024 && shared == 0, CUDA_ERROR_INVALID_VALUE);
        demand(parameters != nullptr && extra == nullptr, CUDA_ERROR_INVALID_VALUE);
        const Kernel &kernel = *function.kernel;
        const auto launch = [=, name = kernel.name, body = kernel.bind(parameters)] {
            count("blocks", blocks);
            run(name, body, blocks, threads);
        };
        submit(the_stream(stream), {KERNEL_NODE, launch});
        count("launches");
    });
}

// A launch of what another library takes for a kernel. Its code must stay loaded.
EXPORT int standin_launch(void *stream, const Work *work) {
    return call(__func__, CONTEXT, [&] {
        submit(the_stream(stream), {KERNEL_NODE, *work});
        count("launches");
    });
}

// ---- Memory ----

ANSWER(cuMemAlloc_v2, CONTEXT, (void **memory, size_t bytes), allocate(memory, bytes, false))
ANSWER(cuMemHostAlloc, CONTEXT, (void **memory, size_t bytes, unsigned), allocate(memory, bytes, true))
ANSWER(cuMemFree_v2, CONTEXT, (void *memory), release(memory, false))
ANSWER(cuMemFreeHost, CONTEXT, (void *memory), release(memory, true))

EXPORT int cuMemGetInfo_v2(size_t *left, size_t *total) {
    return call(__func__, CONTEXT, [&] {
        give(left, memory_size() - driver.live[false]);
        give(total, memory_size());
    });
}

EXPORT int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *handle) {
    return call(__func__, CONTEXT, [&] {
        on_device(to, bytes);
        on_host(from, bytes);
        Stream &stream = the_stream(handle);
        if (stream.capture != nullptr || containing(from, bytes) != driver.allocations.end()) {
            copy_later(to, from, bytes, stream);
            return;
        }
        // Ordinary host memory is read during the call.
        const char *first = static_cast<const char *>(from);
        auto copy = [=, staged = std::vector<char>(first, first + bytes)] { memcpy(to, staged.data(), bytes); };
        submit(stream, {COPY_NODE, std::move(copy)});
        count("copies");
    });
}

ANSWER(cuMemcpyDtoHAsync_v2, CONTEXT, (void *to, const void *from, size_t bytes, void *stream),
       copy_later(on_host(to, bytes), on_device(from, bytes), bytes, the_stream(stream)))
ANSWER(cuMemcpyDtoDAsync_v2, CONTEXT, (void *to, const void *from, size_t bytes, void *stream),
       copy_later(on_device(to, bytes), on_device(from, bytes), bytes, the_stream(stream)))
ANSWER(cuMemcpyHtoD_v2, CONTEXT, (void *to, const void *from, size_t bytes),
       copy_now(on_device(to, bytes), on_host(from, bytes), bytes))
ANSWER(cuMemcpyDtoH_v2, CONTEXT, (void *to, const void *from, size_t bytes),
       copy_now(on_host(to, bytes), on_device(from, bytes), bytes))
ANSWER(cuMemsetD8Async, CONTEXT, (void *to, unsigned char value, size_t bytes, void *stream),
       (on_device(to, bytes), submit(the_stream(stream), {MEMSET_NODE, [=] { memset(to, value, bytes); }})))

EXPORT int cuPointerGetAttribute(void *data, int attribute, void *address) {
    return call(__func__, CONTEXT, [&] {
        const auto found = containing(address, 1);
        demand(data != nullptr && found != driver.allocations.end(), CUDA_ERROR_INVALID_VALUE);
        const auto &[start, allocation] = *found;
        const auto write = [&](const auto &value) { memcpy(data, &value, sizeof value); };
        switch (attribute) {
            case 1: return write(allocation.context);
            case 2: return write(allocation.host ? 1u : 2u);  // type of memory
            case 3: return write(address);                    // address for a device
            case 8: return write(0u);                         // managed
            case 9: return write(allocation.context->device);
            case 11: return write(start);
            case 12: return write(allocation.bytes);
            default: refuse(CUDA_ERROR_INVALID_VALUE);
        }
    });
}

// ---- What tests set and ask ----

EXPORT void standin_set(const char *name, int64_t value) {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    const auto found = driver.settings.find(name);
    if (found == driver.settings.end()) {
        fail("no setting %s", name);
    }
    found->second = value;
    if (strcmp(name, "seed") == 0) {
        seed(static_cast<uint64_t>(value));
    }
}

EXPORT void standin_fail(const char *function, int code, int64_t after) {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    if (function == nullptr) {
        driver.faults.clear();
    } else {
        driver.faults[function] = {code, after};
    }
}

EXPORT uint64_t standin_count(const char *name) {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    uint64_t contexts = 0, streams = 0;
    for (const auto &[device, context] : driver.contexts) {
        contexts += context.retained;
    }
    for (const Stream &stream : driver.streams) {
        streams += stream.kind == Stream::CREATED;
    }
    std::map<std::string, uint64_t> counters = {
        {"loaded", loaded}, {"stored", stored}, {"table", table}, {"contexts", contexts}, {"streams", streams},
        {"modules", driver.modules.size()}, {"live", driver.allocations.size()},
        {"live_bytes", driver.live[false] + driver.live[true]},
        // Unless something has been counted.
        {"launches", 0}, {"graph_launches", 0}, {"blocks", 0}, {"copies", 0}, {"waits", 0}, {"allocations", 0},
        {"frees", 0}, {"busy_frees", 0},
    };
    for (const auto &[counted, value] : driver.counters) {
        counters[counted] = value;
    }
    const bool function = strncmp(name, "cu", 2) == 0;  // how often it was called
    if (!function && counters.count(name) == 0) {
        fail("no counter %s", name);
    }
    return counters[name];
}

EXPORT void standin_reset() {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    driver.counters.clear();
    driver.faults.clear();
    loaded = stored = table = 0;
    driver.restore_settings();
}
