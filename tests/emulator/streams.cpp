// Streams, events, captures and graphs. Work on a stream is deferred: it is queued, and runs when something waits for
// it. A caller that forgets to wait sees what was there before.

#include "driver.hpp"

namespace standin {

namespace {

bool tied(const Stream &a, const Stream &b) {
    const bool legacy = (a.kind == Stream::LEGACY && b.blocking) || (b.kind == Stream::LEGACY && a.blocking);
    return legacy && a.context == b.context;
}

Stream *holder(uint64_t number) {
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
    // Each waits for lower numbers alone, so this ends.
    for (Stream &other : driver.streams) {
        if (tied(stream, other)) {
            drain(other, operation.number);
        }
    }
    if (Stream *other = operation.after == 0 ? nullptr : holder(operation.after)) {
        drain(*other, operation.after);
    }
    operation.work();
}

Stream *behind(Stream &stream) {
    for (Stream &other : driver.streams) {
        if (!other.queue.empty() && (&other == &stream || (stream.kind == Stream::LEGACY && tied(stream, other)))) {
            return &other;
        }
    }
    return nullptr;
}

void refuse_if_implied(const Stream &stream) {
    refuse_during([&](const Stream &other) { return stream.kind == Stream::LEGACY && tied(stream, other); },
                  CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
}

Stream &the_stream_to_wait_for(void *handle) {
    Stream &stream = the_stream(handle);
    refuse_if_implied(stream);
    refuse_during([&](const Stream &other) { return &other == &stream; }, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    return stream;
}

Event &the_event_to_ask(Event *handle) {
    Event &event = the(driver.events, handle);
    demand(event.capture == nullptr, CUDA_ERROR_CAPTURED_EVENT);
    refuse_if_unsafe();
    return event;
}

float milliseconds_between(Event *start, Event *end) {
    for (Event *handle : {start, end}) {
        const Event &event = the_event_to_ask(handle);
        demand(event.timed && event.number != 0, CUDA_ERROR_INVALID_HANDLE);
        demand(holder(event.number) == nullptr, CUDA_ERROR_NOT_READY);
    }
    return std::chrono::duration<float, std::milli>(*end->time - *start->time).count();
}

}  // namespace

Stream &the_stream(void *handle) {
    const uintptr_t number = reinterpret_cast<uintptr_t>(handle);
    if (number > 2) {
        return the(driver.streams, handle);
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

void submit(Stream &stream, Node node, uint64_t after) {
    demand(stream.context == current.back(), CUDA_ERROR_INVALID_HANDLE);
    refuse_if_implied(stream);
    if (stream.capture == nullptr) {
        stream.queue.push_back({++driver.issued, after, std::move(node.work)});
        return;
    }
    demand(!stream.capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    stream.capture->nodes.push_back(std::move(node));
}

void refuse_during(const std::function<bool(const Stream &)> &during, int code) {
    bool any = false;
    for (const Stream &stream : driver.streams) {
        if (stream.capture != nullptr && during(stream)) {
            stream.capture->invalid = any = true;
        }
    }
    demand(!any, code);
}

void refuse_if_unsafe() {
    refuse_during(
        [](const Stream &stream) {
            const Capture &capture = *stream.capture;
            return capture.mode != RELAXED && capture_mode != RELAXED &&
                   (capture.thread == std::this_thread::get_id() || (capture.mode == GLOBAL && capture_mode == GLOBAL));
        },
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

}  // namespace standin

using namespace standin;

// ---- Streams and events ----

EXPORT int cuStreamCreate(Stream **stream, unsigned flags) {
    return call(__func__, CONTEXT, [&] {
        demand(flags <= 1, CUDA_ERROR_INVALID_VALUE);
        give_new(stream, driver.streams, Stream{current.back(), Stream::CREATED, flags == 0, {}, {}, nullptr});
    });
}

EXPORT int cuStreamDestroy_v2(Stream *handle) {
    return call(__func__, CONTEXT, [&] {
        Stream &stream = the(driver.streams, handle);
        drain(stream, driver.issued);
        destroy(driver.streams, handle);
    });
}

EXPORT int cuStreamSynchronize(void *handle) {
    return call(__func__, CONTEXT, [&] {
        Stream &stream = the_stream_to_wait_for(handle);
        count("waits");
        while (Stream *next = behind(stream)) {
            run_next(*next);
        }
    });
}

EXPORT int cuStreamQuery(void *handle) {
    return call(__func__, CONTEXT, [&] {
        if (Stream *next = behind(the_stream_to_wait_for(handle))) {
            // Time goes by between two questions.
            run_next(*next);
            refuse(CUDA_ERROR_NOT_READY);
        }
    });
}

EXPORT int cuEventCreate(Event **event, unsigned flags) {
    return call(__func__, CONTEXT, [&] {
        Event made;
        made.context = current.back();
        made.timed = (flags & 2) == 0;
        give_new(event, driver.events, std::move(made));
    });
}

ANSWER(cuEventDestroy_v2, CONTEXT, (Event *event), destroy(driver.events, event))

EXPORT int cuEventRecord(Event *handle, void *stream_handle) {
    return call(__func__, CONTEXT, [&] {
        Event &event = the(driver.events, handle);
        Stream &stream = the_stream(stream_handle);
        demand(stream.context == event.context, CUDA_ERROR_INVALID_HANDLE);
        if (stream.capture == nullptr) {
            submit(stream, {RECORD_NODE, [time = event.time] { *time = std::chrono::steady_clock::now(); }});
            event.number = driver.issued;
        } else {
            demand(!stream.capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        event.capture = stream.capture;
    });
}

EXPORT int cuStreamWaitEvent(void *stream_handle, Event *handle, unsigned) {
    return call(__func__, CONTEXT, [&] {
        Stream &stream = the_stream(stream_handle);
        const Event &event = the(driver.events, handle);
        // A capture is of one stream here, in order already; a device would let an event take others into it.
        const bool never = event.capture == nullptr && event.number == 0;
        if (never || (stream.capture != nullptr && stream.capture == event.capture)) {
            return;
        }
        refuse_during([&](const Stream &other) { return &other == &stream; }, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
        demand(event.capture == nullptr, CUDA_ERROR_NOT_SUPPORTED);
        submit(stream, {WAIT_NODE, [] {}}, event.number);
    });
}

EXPORT int cuEventQuery(Event *event) {
    return call(__func__, CONTEXT, [&] {
        if (Stream *stream = holder(the_event_to_ask(event).number)) {
            run_next(*stream);
            refuse(CUDA_ERROR_NOT_READY);
        }
    });
}

EXPORT int cuEventSynchronize(Event *event) {
    return call(__func__, CONTEXT, [&] {
        const uint64_t number = the_event_to_ask(event).number;
        count("waits");
        if (Stream *stream = holder(number)) {
            drain(*stream, number);
        }
    });
}

ANSWER(cuEventElapsedTime, CONTEXT, (float *milliseconds, Event *start, Event *end),
       give(milliseconds, milliseconds_between(start, end)))
ANSWER(cuEventElapsedTime_v2, CONTEXT, (float *milliseconds, Event *start, Event *end),
       give(milliseconds, milliseconds_between(start, end)))

// ---- Captures and graphs ----

EXPORT int cuThreadExchangeStreamCaptureMode(int *mode) {
    return call(__func__, DRIVER, [&] {
        demand(mode != nullptr && *mode >= GLOBAL && *mode <= RELAXED, CUDA_ERROR_INVALID_VALUE);
        std::swap(*mode, capture_mode);
    });
}

EXPORT int cuStreamBeginCapture_v2(void *handle, int mode) {
    return call(__func__, CONTEXT, [&] {
        Stream &stream = the_stream(handle);
        demand(mode >= GLOBAL && mode <= RELAXED, CUDA_ERROR_INVALID_VALUE);
        demand(stream.kind != Stream::LEGACY, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        demand(stream.capture == nullptr, CUDA_ERROR_ILLEGAL_STATE);
        stream.capture = std::make_shared<Capture>(Capture{mode, std::this_thread::get_id(), false, {}});
    });
}

EXPORT int cuStreamIsCapturing(void *handle, int *status) {
    return call(__func__, CONTEXT, [&] {
        const Stream &stream = the_stream(handle);
        refuse_if_implied(stream);
        give(status, stream.capture == nullptr ? 0 : stream.capture->invalid ? 2 : 1);
    });
}

EXPORT int cuStreamEndCapture(void *handle, Graph **graph) {
    return call(__func__, CONTEXT, [&] {
        Stream &stream = the_stream(handle);
        demand(stream.capture != nullptr, CUDA_ERROR_ILLEGAL_STATE);
        const bool mine = stream.capture->mode == RELAXED || stream.capture->thread == std::this_thread::get_id();
        demand(mine, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        give(graph, nullptr);
        const std::shared_ptr<Capture> capture = std::move(stream.capture);
        demand(!capture->invalid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        give_new(graph, driver.graphs, Graph{stream.context, std::move(capture->nodes)});
    });
}

EXPORT int cuGraphGetNodes(Graph *handle, void **nodes, size_t *number) {
    return call(__func__, CONTEXT, [&] {
        Graph &graph = the(driver.graphs, handle);
        demand(number != nullptr, CUDA_ERROR_INVALID_VALUE);
        for (size_t i = 0; nodes != nullptr && i < *number; ++i) {
            nodes[i] = i < graph.nodes.size() ? &graph.nodes[i] : nullptr;
        }
        *number = nodes == nullptr ? graph.nodes.size() : std::min(*number, graph.nodes.size());
    });
}

EXPORT int cuGraphNodeGetType(const Node *handle, int *type) {
    return call(__func__, CONTEXT, [&] {
        for (const Graph &graph : driver.graphs) {
            for (const Node &node : graph.nodes) {
                if (&node == handle) {
                    return give(type, node.type);
                }
            }
        }
        refuse(CUDA_ERROR_INVALID_VALUE);
    });
}

ANSWER(cuGraphInstantiateWithFlags, CONTEXT, (Graph **executable, Graph *graph, unsigned long long),
       give_new(executable, driver.executables, the(driver.graphs, graph)))

EXPORT int cuGraphLaunch(Graph *executable, void *stream) {
    return call(__func__, CONTEXT, [&] {
        for (const Node &node : the(driver.executables, executable).nodes) {
            submit(the_stream(stream), node);
        }
        count("graph_launches");
    });
}

ANSWER(cuGraphExecDestroy, CONTEXT, (Graph *executable), destroy(driver.executables, executable))
ANSWER(cuGraphDestroy, CONTEXT, (Graph *graph), destroy(driver.graphs, graph))
