// Streams, events, captures and graphs. Operations on a stream are queued, and run when something synchronizes with
// them: a caller that lacks a synchronization sees the previous contents of memory.

#include "driver.hpp"

namespace emulator {

namespace {

bool synchronized(const Stream &a, const Stream &b) {
    const bool legacy = (a.kind == Stream::LEGACY && b.blocking) || (b.kind == Stream::LEGACY && a.blocking);
    return legacy && a.context == b.context;
}

// The stream in which an operation is queued, or NULL.
Stream *queue_of(uint64_t number) {
    for (Stream &stream : driver.streams) {
        const auto its = [&](const Operation &operation) { return operation.number == number; };
        if (std::any_of(stream.queue.begin(), stream.queue.end(), its)) {
            return &stream;
        }
    }
    return nullptr;
}

void run_next(Stream &stream) {
    const Operation operation = std::move(stream.queue.front());
    stream.queue.pop_front();
    // An operation waits for lower numbers only, so this ends.
    for (Stream &other : driver.streams) {
        if (synchronized(stream, other)) {
            drain(other, operation.number);
        }
    }
    if (Stream *other = operation.after == 0 ? nullptr : queue_of(operation.after)) {
        drain(*other, operation.after);
    }
    operation.task();
}

// A stream with operations that synchronizing with `stream` must wait for, or NULL.
Stream *pending_for(Stream &stream) {
    for (Stream &other : driver.streams) {
        if (!other.queue.empty() &&
            (&other == &stream || (stream.kind == Stream::LEGACY && synchronized(stream, other)))) {
            return &other;
        }
    }
    return nullptr;
}

void reject_if_implied(const Stream &stream) {
    reject_during_capture(
        [&](const Stream &other) { return stream.kind == Stream::LEGACY && synchronized(stream, other); },
        CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
}

Stream &get_stream_to_synchronize(void *handle) {
    Stream &stream = get_stream(handle);
    reject_if_implied(stream);
    reject_during_capture([&](const Stream &other) { return &other == &stream; },
                          CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    return stream;
}

Event &get_event_to_query(Event *handle) {
    Event &event = get(driver.events, handle);
    require(event.capture == nullptr, CUDA_ERROR_CAPTURED_EVENT);
    reject_if_unsafe();
    return event;
}

float milliseconds_between(Event *start, Event *end) {
    for (Event *handle : {start, end}) {
        const Event &event = get_event_to_query(handle);
        require(event.timed && event.number != 0, CUDA_ERROR_INVALID_HANDLE);
        require(queue_of(event.number) == nullptr, CUDA_ERROR_NOT_READY);
    }
    return std::chrono::duration<float, std::milli>(*end->time - *start->time).count();
}

}  // namespace

Stream &get_stream(void *handle) {
    const uintptr_t number = reinterpret_cast<uintptr_t>(handle);
    if (number > 2) {
        return get(driver.streams, handle);
    }
    const Stream::Kind kind = number == 2 ? Stream::PER_THREAD : Stream::LEGACY;
    const auto thread = kind == Stream::PER_THREAD ? std::this_thread::get_id() : std::thread::id();
    for (Stream &stream : driver.streams) {
        if (stream.context == current.back() && stream.kind == kind && stream.thread == thread) {
            return stream;
        }
    }
    return driver.streams.emplace_back(Stream{current.back(), kind, kind == Stream::PER_THREAD, thread, {}, nullptr});
}

void drain(Stream &stream, uint64_t last) {
    while (!stream.queue.empty() && stream.queue.front().number <= last) {
        run_next(stream);
    }
}

bool busy(const Context *context) {
    return std::any_of(driver.streams.begin(), driver.streams.end(),
                       [&](const Stream &stream) { return stream.context == context && !stream.queue.empty(); });
}

void drain_all(const Context *context) {
    for (;;) {
        std::vector<Stream *> waiting;
        for (Stream &stream : driver.streams) {
            if (stream.context == context && !stream.queue.empty()) {
                waiting.push_back(&stream);
            }
        }
        if (waiting.empty()) {
            return;
        }
        run_next(*waiting[below(static_cast<uint32_t>(waiting.size()))]);
    }
}

void submit(Stream &stream, Task task, uint64_t after) {
    require(stream.context == current.back(), CUDA_ERROR_INVALID_HANDLE);
    reject_if_implied(stream);
    if (stream.capture == nullptr) {
        stream.queue.push_back({++driver.issued, after, std::move(task)});
        return;
    }
    require(!stream.capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    stream.capture->nodes.push_back(std::move(task));
}

void reject_during_capture(const std::function<bool(const Stream &)> &during, int code) {
    bool any = false;
    for (const Stream &stream : driver.streams) {
        if (stream.capture != nullptr && during(stream)) {
            stream.capture->invalid = any = true;
        }
    }
    require(!any, code);
}

void reject_if_unsafe() {
    reject_during_capture(
        [](const Stream &stream) {
            const Capture &capture = *stream.capture;
            return capture.mode != RELAXED && capture_mode != RELAXED &&
                   (capture.thread == std::this_thread::get_id() || (capture.mode == GLOBAL && capture_mode == GLOBAL));
        },
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

}  // namespace emulator

using namespace emulator;

// ---- Streams and events ----

EXPORT int cuStreamCreate(Stream **stream, unsigned flags) {
    return call(__func__, CONTEXT, [&] {
        require(flags <= 1, CUDA_ERROR_INVALID_VALUE);
        return_new(stream, driver.streams, Stream{current.back(), Stream::CREATED, flags == 0, {}, {}, nullptr});
    });
}

EXPORT int cuStreamDestroy_v2(Stream *handle) {
    return call(__func__, CONTEXT, [&] {
        Stream &stream = get(driver.streams, handle);
        drain(stream, driver.issued);
        destroy(driver.streams, handle);
    });
}

EXPORT int cuStreamSynchronize(void *handle) {
    return call(__func__, CONTEXT, [&] {
        Stream &stream = get_stream_to_synchronize(handle);
        count("waits");
        while (Stream *next = pending_for(stream)) {
            run_next(*next);
        }
    });
}

EXPORT int cuEventCreate(Event **event, unsigned flags) {
    return call(__func__, CONTEXT, [&] {
        Event made;
        made.context = current.back();
        made.timed = (flags & 2) == 0;
        return_new(event, driver.events, std::move(made));
    });
}

API(cuEventDestroy_v2, CONTEXT, (Event *event), destroy(driver.events, event))

EXPORT int cuEventRecord(Event *handle, void *stream_handle) {
    return call(__func__, CONTEXT, [&] {
        Event &event = get(driver.events, handle);
        Stream &stream = get_stream(stream_handle);
        require(stream.context == event.context, CUDA_ERROR_INVALID_HANDLE);
        if (stream.capture == nullptr) {
            submit(stream, [time = event.time] { *time = std::chrono::steady_clock::now(); });
            event.number = driver.issued;
        } else {
            require(!stream.capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        event.capture = stream.capture;
    });
}

EXPORT int cuStreamWaitEvent(void *stream_handle, Event *handle, unsigned) {
    return call(__func__, CONTEXT, [&] {
        Stream &stream = get_stream(stream_handle);
        const Event &event = get(driver.events, handle);
        // A capture has one stream here, which is in order. On a device, an event can add other streams to it.
        const bool never = event.capture == nullptr && event.number == 0;
        if (never || (stream.capture != nullptr && stream.capture == event.capture)) {
            return;
        }
        reject_during_capture([&](const Stream &other) { return &other == &stream; },
                              CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
        require(event.capture == nullptr, CUDA_ERROR_NOT_SUPPORTED);
        submit(stream, [] {}, event.number);
    });
}

EXPORT int cuEventQuery(Event *event) {
    return call(__func__, CONTEXT, [&] {
        if (Stream *stream = queue_of(get_event_to_query(event).number)) {
            run_next(*stream);
            fail_with(CUDA_ERROR_NOT_READY);
        }
    });
}

EXPORT int cuEventSynchronize(Event *event) {
    return call(__func__, CONTEXT, [&] {
        const uint64_t number = get_event_to_query(event).number;
        count("waits");
        if (Stream *stream = queue_of(number)) {
            drain(*stream, number);
        }
    });
}

API(cuEventElapsedTime, CONTEXT, (float *milliseconds, Event *start, Event *end),
    set_out(milliseconds, milliseconds_between(start, end)))
API(cuEventElapsedTime_v2, CONTEXT, (float *milliseconds, Event *start, Event *end),
    set_out(milliseconds, milliseconds_between(start, end)))

// ---- Captures and graphs ----

EXPORT int cuThreadExchangeStreamCaptureMode(int *mode) {
    return call(__func__, DRIVER, [&] {
        require(mode != nullptr && *mode >= GLOBAL && *mode <= RELAXED, CUDA_ERROR_INVALID_VALUE);
        std::swap(*mode, capture_mode);
    });
}

EXPORT int cuStreamBeginCapture_v2(void *handle, int mode) {
    return call(__func__, CONTEXT, [&] {
        Stream &stream = get_stream(handle);
        require(mode >= GLOBAL && mode <= RELAXED, CUDA_ERROR_INVALID_VALUE);
        require(stream.kind != Stream::LEGACY, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        require(stream.capture == nullptr, CUDA_ERROR_ILLEGAL_STATE);
        stream.capture = std::make_shared<Capture>(Capture{mode, std::this_thread::get_id(), false, {}});
    });
}

EXPORT int cuStreamIsCapturing(void *handle, int *status) {
    return call(__func__, CONTEXT, [&] {
        const Stream &stream = get_stream(handle);
        reject_if_implied(stream);
        set_out(status, stream.capture == nullptr ? 0 : stream.capture->invalid ? 2 : 1);
    });
}

EXPORT int cuStreamEndCapture(void *handle, Graph **graph) {
    return call(__func__, CONTEXT, [&] {
        Stream &stream = get_stream(handle);
        require(stream.capture != nullptr, CUDA_ERROR_ILLEGAL_STATE);
        const bool allowed = stream.capture->mode == RELAXED || stream.capture->thread == std::this_thread::get_id();
        require(allowed, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        set_out(graph, nullptr);
        const std::shared_ptr<Capture> capture = std::move(stream.capture);
        require(!capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        return_new(graph, driver.graphs, Graph{stream.context, std::move(capture->nodes)});
    });
}

API(cuGraphInstantiateWithFlags, CONTEXT, (Graph **executable, Graph *graph, unsigned long long),
    return_new(executable, driver.executables, get(driver.graphs, graph)))

EXPORT int cuGraphLaunch(Graph *executable, void *stream) {
    return call(__func__, CONTEXT, [&] {
        for (const Task &task : get(driver.executables, executable).nodes) {
            submit(get_stream(stream), task);
        }
        count("graph_launches");
    });
}

API(cuGraphExecDestroy, CONTEXT, (Graph *executable), destroy(driver.executables, executable))
API(cuGraphDestroy, CONTEXT, (Graph *graph), destroy(driver.graphs, graph))
