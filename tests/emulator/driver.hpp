// The state of the emulated driver, and what all of its functions share. driver.cpp has devices, modules, launches and
// memory; streams.cpp has streams, events and graphs.
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

namespace emulator {

// ---- Results: those of CUresult that the emulator returns, and those that tests make it return ----

#define RESULTS(X) \
    X(SUCCESS, 0) X(ERROR_INVALID_VALUE, 1) X(ERROR_OUT_OF_MEMORY, 2) X(ERROR_NOT_INITIALIZED, 3) \
    X(ERROR_STUB_LIBRARY, 34) X(ERROR_NO_DEVICE, 100) X(ERROR_INVALID_DEVICE, 101) X(ERROR_INVALID_IMAGE, 200) \
    X(ERROR_INVALID_CONTEXT, 201) X(ERROR_NO_BINARY_FOR_GPU, 209) X(ERROR_UNSUPPORTED_PTX_VERSION, 222) \
    X(ERROR_INVALID_HANDLE, 400) X(ERROR_ILLEGAL_STATE, 401) X(ERROR_NOT_FOUND, 500) X(ERROR_NOT_READY, 600) \
    X(ERROR_ILLEGAL_ADDRESS, 700) X(ERROR_LAUNCH_OUT_OF_RESOURCES, 701) X(ERROR_CONTEXT_IS_DESTROYED, 709) \
    X(ERROR_LAUNCH_FAILED, 719) X(ERROR_NOT_PERMITTED, 800) X(ERROR_NOT_SUPPORTED, 801) \
    X(ERROR_STREAM_CAPTURE_UNSUPPORTED, 900) X(ERROR_STREAM_CAPTURE_INVALIDATED, 901) \
    X(ERROR_STREAM_CAPTURE_ISOLATION, 905) X(ERROR_STREAM_CAPTURE_IMPLICIT, 906) X(ERROR_CAPTURED_EVENT, 907) \
    X(ERROR_STREAM_CAPTURE_WRONG_THREAD, 908) X(ERROR_UNKNOWN, 999)

#define X(name, code) CUDA_##name = code,
enum : int { RESULTS(X) };
#undef X

// ---- Objects. A handle is the address of one ----

using Task = std::function<void()>;

// CUstreamCaptureMode.
enum : int { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

struct Context {
    int device;
    unsigned retained = 0;
};

struct Capture {
    int mode;
    std::thread::id thread;
    bool invalid = false;
    std::vector<Task> nodes;
};

// Operations are numbered in the order of the calls, across all streams.
struct Operation {
    uint64_t number;
    uint64_t after;  // the operation of another stream that it waits for; 0: none
    Task task;
};

struct Stream {
    enum Kind { CREATED, LEGACY, PER_THREAD };
    Context *context;
    Kind kind;
    bool blocking;  // synchronizes with the legacy stream
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
    // Copies the parameters, as a launch does, and returns what one thread runs.
    Task (*bind)(void **parameters);
};

struct Function {
    Context *context;
    const Module *module;
    const Kernel *kernel;
};

struct Graph {
    Context *context;
    std::vector<Task> nodes;
};

struct Allocation {
    Context *context;
    size_t bytes;
    bool host;
};

// Never destroyed: another thread may still call when the process ends.
struct Driver {
    std::mutex mutex;  // locked by every call, and while kernels run
    bool initialised = false;
    uint64_t issued = 0;
    std::map<int, Context> contexts;  // by device
    std::list<Stream> streams;
    std::list<Event> events;
    std::list<Module> modules;
    std::list<Function> functions;
    std::list<Graph> graphs, executables;
    std::map<uintptr_t, Allocation> allocations;
    uint64_t live[2] = {};  // allocated bytes, of the device and of the host

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

inline thread_local std::vector<Context *> current;  // the stack of contexts, the current one last
inline thread_local int capture_mode = GLOBAL;

// ---- Functions of the API ----

[[noreturn]] inline void fail_with(int code) { throw code; }

inline void require(bool condition, int code) {
    if (!condition) {
        fail_with(code);
    }
}

template <class T>
void set_out(T *to, std::common_type_t<T> value) {
    require(to != nullptr, CUDA_ERROR_INVALID_VALUE);
    *to = value;
}

// Adds an object and returns its handle to the caller.
template <class T>
void return_new(T **handle, std::list<T> &all, T object) {
    require(handle != nullptr, CUDA_ERROR_INVALID_VALUE);
    *handle = &all.emplace_back(std::move(object));
}

// The object of a handle.
template <class T>
T &get(std::list<T> &all, const void *handle) {
    const auto found = std::find_if(all.begin(), all.end(), [&](const T &one) { return &one == handle; });
    require(found != all.end(), CUDA_ERROR_INVALID_HANDLE);
    return *found;
}

template <class T>
void destroy(std::list<T> &all, const void *handle) {
    const T &object = get(all, handle);
    all.remove_if([&](const T &one) { return &one == &object; });
}

inline int setting(const char *name) { return static_cast<int>(driver.settings.at(name)); }

inline void count(const char *name, uint64_t more = 1) { driver.counters[name] += more; }

enum Needs { NOTHING, DRIVER, CONTEXT };

// Runs the body of a function of the API: counts the call, applies faults, and checks what the function needs. Returns the
// code of `fail_with`.
template <class Body>
int call(const char *function, Needs needs, Body body) {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    try {
        count(function);
        const auto fault = driver.faults.find(function);
        if (fault != driver.faults.end() && fault->second.after-- == 0) {
            const int code = fault->second.code;
            driver.faults.erase(fault);
            fail_with(code);
        }
        require(needs == NOTHING || driver.initialised, CUDA_ERROR_NOT_INITIALIZED);
        require(needs != CONTEXT || !current.empty(), CUDA_ERROR_INVALID_CONTEXT);
        require(needs != CONTEXT || current.back()->retained > 0, CUDA_ERROR_CONTEXT_IS_DESTROYED);
        body();
    } catch (int code) {
        return code;
    }
    return CUDA_SUCCESS;
}

// Defines a function of the API: its name, what it needs, its parameters, its statements.
#define API(function, needs, parameters, ...) \
    EXPORT int function parameters { \
        return call(#function, needs, [&] { __VA_ARGS__; }); \
    }

// ---- kernels.cpp ----

// The kernel with this name, or NULL.
const Kernel *find_kernel(const char *name);

// ---- streams.cpp ----

// Default streams are created at their first use.
Stream &get_stream(void *handle);
// Queues a task, or makes it a node of the graph that the stream captures.
void submit(Stream &stream, Task task, uint64_t after = 0);
// Runs the queued operations up to number `last`.
void drain(Stream &stream, uint64_t last);
// Whether any stream of a context has operations left.
bool busy(const Context *context);
// Runs all queued operations of a context.
void drain_all(const Context *context);
// Rejects a call that some captures do not allow, and invalidates these captures.
void reject_during_capture(const std::function<bool(const Stream &)> &during, int code);
// For calls that might synchronize, or change memory that a capture uses.
void reject_if_unsafe();

}  // namespace emulator
