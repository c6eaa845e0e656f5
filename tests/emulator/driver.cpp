// The CUDA driver API as far as the crate uses it, on the host's memory.

#include <stdio.h>
#include <stdlib.h>

#include "driver.hpp"

namespace emulator {
namespace {

// ---- Results and memory ----

const std::map<int, const char *> RESULT_NAMES = {
#define X(name, code) {code, "CUDA_" #name},
    RESULTS(X)
#undef X
};

const char *result_name(int code) {
    const auto found = RESULT_NAMES.find(code);
    require(found != RESULT_NAMES.end(), CUDA_ERROR_INVALID_VALUE);
    return found->second;
}

uint64_t memory_size() { return static_cast<uint64_t>(driver.settings.at("memory")); }

// Device addresses are host addresses, so functions take them as pointers.
uintptr_t number(const void *address) { return reinterpret_cast<uintptr_t>(address); }

// The allocation that contains all of these bytes, or the end.
auto containing(const void *address, size_t bytes) {
    auto found = driver.allocations.upper_bound(number(address));
    if (found == driver.allocations.begin()) {
        return driver.allocations.end();
    }
    --found;
    return number(address) - found->first + bytes <= found->second.bytes ? found : driver.allocations.end();
}

// Frees an allocation; returns the next one.
auto free_allocation(std::map<uintptr_t, Allocation>::iterator found) {
    driver.live[found->second.host] -= found->second.bytes;
    free(reinterpret_cast<void *>(found->first));
    return driver.allocations.erase(found);
}

void allocate(void **memory, size_t bytes, bool host) {
    require(memory != nullptr && bytes != 0, CUDA_ERROR_INVALID_VALUE);
    reject_if_unsafe();
    require(host || driver.live[false] + bytes <= memory_size(), CUDA_ERROR_OUT_OF_MEMORY);
    // Exactly `bytes`, so that AddressSanitizer detects an access to the first byte after them.
    require(posix_memalign(memory, 256, bytes) == 0, CUDA_ERROR_OUT_OF_MEMORY);
    scramble(*memory, bytes);
    driver.allocations[number(*memory)] = {current.back(), bytes, host};
    driver.live[host] += bytes;
    count("allocations");
}

void release(void *memory, bool host) {
    const auto found = driver.allocations.find(number(memory));
    require(found != driver.allocations.end() && found->second.host == host, CUDA_ERROR_INVALID_VALUE);
    reject_if_unsafe();
    if (busy(found->second.context)) {
        // A device synchronizes here; the crate must not rely on it.
        count("busy_frees");
        drain_all(found->second.context);
    }
    free_allocation(found);
    count("frees");
}

// Checks that a device can access these bytes.
template <class T>
T *on_device(T *address, size_t bytes) {
    const bool known = setting("pageable") != 0 || containing(address, bytes) != driver.allocations.end();
    require(bytes == 0 || (address != nullptr && known), CUDA_ERROR_INVALID_VALUE);
    return address;
}

template <class T>
T *on_host(T *address, size_t bytes) {
    require(bytes == 0 || address != nullptr, CUDA_ERROR_INVALID_VALUE);
    return address;
}

void copy_later(void *to, const void *from, size_t bytes, Stream &stream) {
    submit(stream, [=] { memcpy(to, from, bytes); });
    count("copies");
}

void copy_now(void *to, const void *from, size_t bytes) {
    reject_if_unsafe();
    Stream &legacy = get_stream(nullptr);
    copy_later(to, from, bytes, legacy);
    count("waits");
    drain(legacy, driver.issued);
}

int check_device(int ordinal) {
    require(ordinal >= 0 && ordinal < setting("devices"), CUDA_ERROR_INVALID_DEVICE);
    return ordinal;
}

Context *check_context(Context *context) {
    const auto found = std::find_if(driver.contexts.begin(), driver.contexts.end(),
                                    [&](const auto &entry) { return &entry.second == context; });
    require(found != driver.contexts.end() && context->retained > 0, CUDA_ERROR_INVALID_CONTEXT);
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
        at = its(at->second) ? free_allocation(at) : std::next(at);
    }
}

}  // namespace

void Driver::restore_settings() {
    settings = {
        {"devices", 1}, {"sms", 3}, {"blocks_per_sm", 2}, {"major", 9}, {"minor", 0},
        {"driver_version", 13000}, {"pageable", 1}, {"memory", int64_t(16) << 30}, {"seed", 0}, {"image", CUDA_SUCCESS},
    };
    for (const auto &[variable, name] : {std::pair("GRADBLEND_EMULATOR_SEED", "seed"),
                                         std::pair("GRADBLEND_EMULATOR_SMS", "sms")}) {
        if (const char *value = getenv(variable)) {
            settings[name] = atoll(value);
        }
    }
    seed(static_cast<uint64_t>(settings["seed"]));
}

}  // namespace emulator

using namespace emulator;

// ---- Devices and contexts ----

EXPORT int cuInit(unsigned) {
    return call(__func__, NOTHING, [&] {
        require(setting("devices") > 0, CUDA_ERROR_NO_DEVICE);
        driver.initialised = true;
    });
}

API(cuDriverGetVersion, NOTHING, (int *version), set_out(version, setting("driver_version")))
API(cuGetErrorName, NOTHING, (int code, const char **name), set_out(name, result_name(code)))
API(cuGetErrorString, NOTHING, (int code, const char **text), set_out(text, result_name(code)))
API(cuDeviceGetCount, DRIVER, (int *devices), set_out(devices, setting("devices")))
API(cuDeviceGet, DRIVER, (int *device, int ordinal), set_out(device, check_device(ordinal)))

EXPORT int cuDeviceGetName(char *name, int size, int device) {
    return call(__func__, DRIVER, [&] {
        require(name != nullptr && size > 0, CUDA_ERROR_INVALID_VALUE);
        snprintf(name, static_cast<size_t>(size), "Emulator %d", check_device(device));
    });
}

API(cuDeviceTotalMem_v2, DRIVER, (size_t *bytes, int device), set_out((check_device(device), bytes), memory_size()))

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    return call(__func__, DRIVER, [&] {
        check_device(device);
        // CUdevice_attribute: threads of a block; its dimensions; dimensions of a grid; shared memory of a block, warp size,
        // registers; SMs, threads of an SM; concurrent kernels, copy engines, unified addressing; second-level cache;
        // compute capability, pageable memory access.
        const std::map<int, int> values = {
            {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, INT32_MAX}, {6, 65535}, {7, 65535}, {8, 48 << 10}, {10, 32},
            {12, 65536}, {16, setting("sms")}, {39, 2048}, {31, 1}, {40, 1}, {41, 1}, {38, 50 << 20},
            {75, setting("major")}, {76, setting("minor")}, {88, setting("pageable")},
        };
        const auto found = values.find(attribute);
        set_out(value, found == values.end() ? 0 : found->second);
    });
}

EXPORT int cuDevicePrimaryCtxRetain(Context **context, int device) {
    return call(__func__, DRIVER, [&] {
        set_out(context, &driver.contexts.try_emplace(device, Context{check_device(device)}).first->second);
        ++(*context)->retained;
    });
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    return call(__func__, DRIVER, [&] {
        const auto found = driver.contexts.find(check_device(device));
        require(found != driver.contexts.end() && found->second.retained > 0, CUDA_ERROR_INVALID_CONTEXT);
        if (found->second.retained == 1) {
            clear(&found->second);
        }
        --found->second.retained;
    });
}

API(cuCtxGetCurrent, DRIVER, (Context **context), set_out(context, current.empty() ? nullptr : current.back()))

EXPORT int cuCtxSetCurrent(Context *context) {
    return call(__func__, DRIVER, [&] {
        if (context != nullptr) {
            check_context(context);
        }
        if (!current.empty()) {
            current.pop_back();
        }
        if (context != nullptr) {
            current.push_back(context);
        }
    });
}

API(cuCtxPushCurrent_v2, DRIVER, (Context *context), current.push_back(check_context(context)))

EXPORT int cuCtxPopCurrent_v2(Context **context) {
    return call(__func__, DRIVER, [&] {
        require(!current.empty(), CUDA_ERROR_INVALID_CONTEXT);
        if (context != nullptr) {
            *context = current.back();
        }
        current.pop_back();
    });
}

API(cuCtxGetDevice, CONTEXT, (int *device), set_out(device, current.back()->device))

EXPORT int cuCtxSynchronize() {
    return call(__func__, CONTEXT, [&] {
        reject_during_capture([](const Stream &stream) { return stream.context == current.back(); },
                      CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        count("waits");
        drain_all(current.back());
    });
}

// ---- Modules and launches ----

EXPORT int cuModuleLoadData(Module **module, const void *image) {
    return call(__func__, CONTEXT, [&] {
        require(image != nullptr, CUDA_ERROR_INVALID_VALUE);
        reject_if_unsafe();
        // The kernels are in this library; an image is checked only for a valid start: of a fat binary, of its wrapper, of
        // an ELF file, or of PTX with or without a comment.
        const auto starts = {"\x50\xed\x55\xba", "\xb1\x43\x62\x46", "\x7f" "ELF", "//", ".ver"};
        const auto matches = [&](const char *start) { return memcmp(image, start, strlen(start)) == 0; };
        require(std::any_of(starts.begin(), starts.end(), matches), CUDA_ERROR_INVALID_IMAGE);
        require(setting("image") == CUDA_SUCCESS, setting("image"));
        return_new(module, driver.modules, Module{current.back()});
    });
}

EXPORT int cuModuleUnload(Module *handle) {
    return call(__func__, CONTEXT, [&] {
        const Module &module = get(driver.modules, handle);
        reject_if_unsafe();
        driver.functions.remove_if([&](const Function &function) { return function.module == &module; });
        destroy(driver.modules, handle);
    });
}

EXPORT int cuModuleGetFunction(Function **function, Module *handle, const char *name) {
    return call(__func__, CONTEXT, [&] {
        const Module &module = get(driver.modules, handle);
        require(name != nullptr, CUDA_ERROR_INVALID_VALUE);
        const Kernel *kernel = find_kernel(name);
        require(kernel != nullptr, CUDA_ERROR_NOT_FOUND);
        return_new(function, driver.functions, Function{module.context, &module, kernel});
    });
}

EXPORT int cuFuncGetAttribute(int *value, int attribute, Function *function) {
    return call(__func__, CONTEXT, [&] {
        get(driver.functions, function);
        // Threads of a block, registers, versions of PTX and of machine code.
        const int version = 10 * setting("major") + setting("minor");
        set_out(value, attribute == 0 ? 1024 : attribute == 4 ? 128 : attribute == 5 || attribute == 6 ? version : 0);
    });
}

API(cuFuncSetAttribute, CONTEXT, (Function *function, int, int), get(driver.functions, function))

EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, Function *function, int threads, size_t) {
    return call(__func__, CONTEXT, [&] {
        get(driver.functions, function);
        require(threads >= 1 && threads <= 1024, CUDA_ERROR_INVALID_VALUE);
        set_out(blocks, setting("blocks_per_sm"));
    });
}

EXPORT int cuLaunchKernel(Function *handle, unsigned blocks, unsigned blocks_y, unsigned blocks_z, unsigned threads,
                          unsigned threads_y, unsigned threads_z, unsigned shared, void *stream, void **parameters,
                          void **extra) {
    return call(__func__, CONTEXT, [&] {
        const Function &function = get(driver.functions, handle);
        require(function.context == current.back(), CUDA_ERROR_INVALID_HANDLE);
        // The kernels have one dimension and no dynamic shared memory.
        require(blocks_y == 1 && blocks_z == 1 && threads_y == 1 && threads_z == 1, CUDA_ERROR_INVALID_VALUE);
        require(blocks >= 1 && threads >= 1 && threads <= 1024 && shared == 0, CUDA_ERROR_INVALID_VALUE);
        require(parameters != nullptr && extra == nullptr, CUDA_ERROR_INVALID_VALUE);
        const Kernel &kernel = *function.kernel;
        const auto launch = [=, name = kernel.name, body = kernel.bind(parameters)] {
            count("blocks", blocks);
            run(name, body, blocks, threads);
        };
        submit(get_stream(stream), launch);
        count("launches");
    });
}

// Launches a copy of `*task` as a kernel, for cublas.cpp. Its code must stay loaded.
EXPORT int emulator_launch(void *stream, const Task *task) {
    return call(__func__, CONTEXT, [&] {
        submit(get_stream(stream), *task);
        count("launches");
    });
}

// ---- Memory ----

API(cuMemAlloc_v2, CONTEXT, (void **memory, size_t bytes), allocate(memory, bytes, false))
API(cuMemHostAlloc, CONTEXT, (void **memory, size_t bytes, unsigned), allocate(memory, bytes, true))
API(cuMemFree_v2, CONTEXT, (void *memory), release(memory, false))
API(cuMemFreeHost, CONTEXT, (void *memory), release(memory, true))

EXPORT int cuMemGetInfo_v2(size_t *left, size_t *total) {
    return call(__func__, CONTEXT, [&] {
        set_out(left, memory_size() - driver.live[false]);
        set_out(total, memory_size());
    });
}

EXPORT int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *handle) {
    return call(__func__, CONTEXT, [&] {
        on_device(to, bytes);
        on_host(from, bytes);
        Stream &stream = get_stream(handle);
        if (stream.capture != nullptr || containing(from, bytes) != driver.allocations.end()) {
            copy_later(to, from, bytes, stream);
            return;
        }
        // Pageable host memory is read during the call.
        const char *first = static_cast<const char *>(from);
        auto copy = [=, staged = std::vector<char>(first, first + bytes)] { memcpy(to, staged.data(), bytes); };
        submit(stream, std::move(copy));
        count("copies");
    });
}

EXPORT int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *handle) {
    return call(__func__, CONTEXT, [&] {
        Stream &stream = get_stream(handle);
        copy_later(on_host(to, bytes), on_device(from, bytes), bytes, stream);
        if (stream.capture == nullptr && containing(to, bytes) == driver.allocations.end()) {
            // Pageable host memory is written during the call.
            drain(stream, driver.issued);
        }
    });
}

API(cuMemcpyDtoDAsync_v2, CONTEXT, (void *to, const void *from, size_t bytes, void *stream),
       copy_later(on_device(to, bytes), on_device(from, bytes), bytes, get_stream(stream)))
API(cuMemcpyHtoD_v2, CONTEXT, (void *to, const void *from, size_t bytes),
       copy_now(on_device(to, bytes), on_host(from, bytes), bytes))
API(cuMemcpyDtoH_v2, CONTEXT, (void *to, const void *from, size_t bytes),
       copy_now(on_host(to, bytes), on_device(from, bytes), bytes))
EXPORT int cuMemsetD8Async(void *to, unsigned char value, size_t bytes, void *stream) {
    return call(__func__, CONTEXT, [&] {
        on_device(to, bytes);
        submit(get_stream(stream), [=] { memset(to, value, bytes); });
        count("copies");
    });
}

EXPORT int cuPointerGetAttribute(void *data, int attribute, void *address) {
    return call(__func__, CONTEXT, [&] {
        const auto found = containing(address, 1);
        require(data != nullptr && found != driver.allocations.end(), CUDA_ERROR_INVALID_VALUE);
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
            default: fail_with(CUDA_ERROR_INVALID_VALUE);
        }
    });
}

// ---- Hooks for tests; README.md documents them ----

EXPORT void emulator_set(const char *name, int64_t value) {
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

EXPORT void emulator_fail(const char *function, int code, int64_t after) {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    if (function == nullptr) {
        driver.faults.clear();
    } else {
        driver.faults[function] = {code, after};
    }
}

EXPORT uint64_t emulator_count(const char *name) {
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
        // Zero unless counted.
        {"launches", 0}, {"graph_launches", 0}, {"blocks", 0}, {"copies", 0}, {"waits", 0}, {"allocations", 0},
        {"frees", 0}, {"busy_frees", 0},
    };
    for (const auto &[counted, value] : driver.counters) {
        counters[counted] = value;
    }
    const bool function = strncmp(name, "cu", 2) == 0;  // the number of its calls
    if (!function && counters.count(name) == 0) {
        fail("no counter %s", name);
    }
    return counters[name];
}

EXPORT void emulator_reset() {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    driver.counters.clear();
    driver.faults.clear();
    loaded = stored = table = 0;
    driver.restore_settings();
}
