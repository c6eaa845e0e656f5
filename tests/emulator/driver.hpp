// What the driver knows, and how its functions answer. driver.cpp has devices, kernels and memory; streams.cpp has
// streams, events and graphs.
#pragma once

#include <algorithm>
#include <chrono>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace standin {

// ---- Results ----

#define RESULTS(X) \
    X(CUDA_SUCCESS, 0, "no error") \
    X(CUDA_ERROR_INVALID_VALUE, 1, "invalid argument") \
    X(CUDA_ERROR_OUT_OF_MEMORY, 2, "out of memory") \
    X(CUDA_ERROR_NOT_INITIALIZED, 3, "initialization error") \
    X(CUDA_ERROR_STUB_LIBRARY, 34, "CUDA driver is a stub library") \
    X(CUDA_ERROR_NO_DEVICE, 100, "no CUDA-capable device is detected") \
    X(CUDA_ERROR_INVALID_DEVICE, 101, "invalid device ordinal") \
    X(CUDA_ERROR_INVALID_IMAGE, 200, "device kernel image is invalid") \
    X(CUDA_ERROR_INVALID_CONTEXT, 201, "invalid device context") \
    X(CUDA_ERROR_NO_BINARY_FOR_GPU, 209, "no kernel image is available for execution on the device") \
    X(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, 222, "the provided PTX was compiled with an unsupported toolchain.") \
    X(CUDA_ERROR_INVALID_HANDLE, 400, "invalid resource handle") \
    X(CUDA_ERROR_ILLEGAL_STATE, 401, "the operation cannot be performed in the present state") \
    X(CUDA_ERROR_NOT_FOUND, 500, "named symbol not found") \
    X(CUDA_ERROR_NOT_READY, 600, "device not ready") \
    X(CUDA_ERROR_ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered") \
    X(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, 701, "too many resources requested for launch") \
    X(CUDA_ERROR_CONTEXT_IS_DESTROYED, 709, "context is destroyed") \
    X(CUDA_ERROR_LAUNCH_FAILED, 719, "unspecified launch failure") \
    X(CUDA_ERROR_NOT_PERMITTED, 800, "operation not permitted") \
    X(CUDA_ERROR_NOT_SUPPORTED, 801, "operation not supported") \
    X(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 900, "operation not permitted when stream is capturing") \
    X(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, 901, "operation failed due to a previous error during capture") \
    X(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, 905, "dependency created on uncaptured work in another stream") \
    X(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, 906, "operation would make the legacy stream depend on a capturing stream") \
    X(CUDA_ERROR_CAPTURED_EVENT, 907, "operation not permitted on an event last recorded in a capturing stream") \
    X(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, 908, "attempt to terminate a capture sequence from another thread") \
    X(CUDA_ERROR_UNKNOWN, 999, "unknown error")

#define X(name, code, text) name = code,
enum : int { RESULTS(X) };
#undef X

// ---- Objects. A handle is the address of one. ----

using Work = std::function<void()>;

// What a node of a graph is, in the driver's numbers.
enum : int { KERNEL_NODE = 0, COPY_NODE = 1, MEMSET_NODE = 2, WAIT_NODE = 6, RECORD_NODE = 7 };

struct Node {
    int type;
    Work work;
};

enum : int { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

struct Context {
    int device;
    unsigned retained = 0;
};

struct Capture {
    int mode;
    std::thread::id thread;
    bool invalid = false;
    std::vector<Node> nodes;
};

// Operations are numbered in the order of the calls, across all streams.
struct Operation {
    uint64_t number;
    uint64_t after;  // that it waits for, of another stream; 0: none
    Work work;
};

struct Stream {
    enum Kind { CREATED, LEGACY, PER_THREAD };
    Context *context;
    Kind kind;
    bool blocking;  // the legacy stream waits for it, and it for that
    std::thread::id thread;
    std::deque<Operation> queue;
    std::shared_ptr<Capture> capture;
};

struct Event {
    using Time = std::chrono::steady_clock::time_point;
    Context *context;
    bool timed;
    uint64_t number = 0;  // of the operation that recorded it; 0: none
    std::shared_ptr<Time> time = std::make_shared<Time>();
    std::shared_ptr<Capture> capture;  // that it was last recorded in
};

struct Module {
    Context *context;
};

struct Kernel {
    const char *name;
    // Copies the parameters, as a launch does, and says what one thread does with them.
    Work (*bind)(void **parameters);
};

struct Function {
    Context *context;
    const Module *module;
    const Kernel *kernel;
};

struct Graph {
    Context *context;
    std::vector<Node> nodes;
};

struct Allocation {
    Context *context;
    size_t bytes;
    bool host;
};

// Never destroyed: another thread of the process may still be calling when it ends.
struct Driver {
    std::mutex mutex;  // held by every call, and by the kernels that run in one
    bool initialised = false;
    uint64_t issued = 0;
    std::map<int, Context> contexts;  // by device
    std::list<Stream> streams;
    std::list<Event> events;
    std::list<Module> modules;
    std::list<Function> functions;
    std::list<Graph> graphs, executables;
    std::map<uintptr_t, Allocation> allocations;
    uint64_t live[2] = {};  // bytes in them, on the device and on the host

    struct Fault {
        int code;
        int64_t after;
    };
    std::map<std::string, int64_t> settings;
    std::map<std::string, Fault> faults;
    std::map<std::string, uint64_t> counters;

    Driver() { restore_settings(); }
    void restore_settings();
};
inline Driver &driver = *new Driver;

inline thread_local std::vector<Context *> current;  // the innermost last
inline thread_local int capture_mode = GLOBAL;

// ---- Answers ----

[[noreturn]] inline void refuse(int code) { throw code; }

inline void demand(bool condition, int otherwise) {
    if (!condition) {
        refuse(otherwise);
    }
}

// Writes to an address that the caller gave.
template <class T>
void give(T *to, std::common_type_t<T> value) {
    demand(to != nullptr, CUDA_ERROR_INVALID_VALUE);
    *to = value;
}

// Adds an object and hands out its handle.
template <class T>
void give_new(T **handle, std::list<T> &all, T object) {
    demand(handle != nullptr, CUDA_ERROR_INVALID_VALUE);
    *handle = &all.emplace_back(std::move(object));
}

// The object that a handle stands for.
template <class T>
T &the(std::list<T> &all, const void *handle) {
    const auto found = std::find_if(all.begin(), all.end(), [&](const T &one) { return &one == handle; });
    demand(found != all.end(), CUDA_ERROR_INVALID_HANDLE);
    return *found;
}

template <class T>
void destroy(std::list<T> &all, const void *handle) {
    const T &object = the(all, handle);
    all.remove_if([&](const T &one) { return &one == &object; });
}

inline int setting(const char *name) { return static_cast<int>(driver.settings.at(name)); }

inline void count(const char *name, uint64_t more = 1) { driver.counters[name] += more; }

enum Needs { NOTHING, DRIVER, CONTEXT };

// What every function of the API does around its own work, which says no by `refuse`.
template <class Body>
int call(const char *function, Needs needs, Body body) {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    try {
        count(function);
        const auto fault = driver.faults.find(function);
        if (fault != driver.faults.end() && fault->second.after-- == 0) {
            const int code = fault->second.code;
            driver.faults.erase(fault);
            refuse(code);
        }
        demand(needs == NOTHING || driver.initialised, CUDA_ERROR_NOT_INITIALIZED);
        demand(needs != CONTEXT || !current.empty(), CUDA_ERROR_INVALID_CONTEXT);
        demand(needs != CONTEXT || current.back()->retained > 0, CUDA_ERROR_CONTEXT_IS_DESTROYED);
        body();
    } catch (int code) {
        return code;
    }
    return CUDA_SUCCESS;
}

// A function of one statement, given after its parameters.
#define ANSWER(function, needs, parameters, ...) \
    EXPORT int function parameters { \
        return call(#function, needs, [&] { __VA_ARGS__; }); \
    }

// ---- streams.cpp ----

// The default streams come into being when they are first asked for.
Stream &the_stream(void *handle);
// Queues work, or makes it a node of the graph that the stream captures.
void submit(Stream &stream, Node node, uint64_t after = 0);
// Runs what is queued, up to an operation.
void drain(Stream &stream, uint64_t last);
// Runs all that is queued in a context.
bool busy(const Context *context);  // whether any of its streams has work left
void drain_all(const Context *context);
// Refuses a call that is not allowed during some captures. Having tried spoils them.
void refuse_during(const std::function<bool(const Stream &)> &during, int code);
// For calls that might wait, or change memory that a capture uses.
void refuse_if_unsafe();

}  // namespace standin
