// Threads of a block as fibers. Which of them runs next is drawn from a seeded generator at every barrier and every
// warp operation, so that code that lacks one comes to another result, or to none.

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include "cuda.hpp"

// Where __shared__ variables lie. The linker defines these where there is such a section.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_shared_memory[], __stop_shared_memory[];

// Leaves the stack that is in use, noting its pointer in `*leave`, and goes on with the one that was left at `enter`.
extern "C" __attribute__((visibility("hidden"))) void standin_switch(void **leave, void *enter);

// Registers that a function must keep, below the address to return to.
#if defined(__x86_64__)
asm(R"(
    .text
    .hidden standin_switch
    .globl standin_switch
    .type standin_switch, @function
standin_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size standin_switch, . - standin_switch
)");
// A new stack ends with what the switch pops, and a return address that nothing returns to.
constexpr size_t FRAME = 8, RETURN = 6;
#elif defined(__aarch64__)
asm(R"(
    .text
    .hidden standin_switch
    .globl standin_switch
    .type standin_switch, %function
standin_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size standin_switch, . - standin_switch
)");
constexpr size_t FRAME = 20, RETURN = 11;
#else
#error "standin_switch is written for x86-64 and aarch64"
#endif

namespace standin {
namespace {

constexpr unsigned MAX_THREADS = 1024;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif

struct Fiber {
    void *pointer = nullptr;          // of its stack, while it does not run
    const char *operation = nullptr;  // that it waits at
    Place place = {};
    bool ended = false;
    // What AddressSanitizer wants to be told.
    const void *bottom = nullptr;
    size_t size = 0;
    void *fake = nullptr;
};

// Threads that wait for each other: those of a block, or of a warp.
struct Meeting {
    unsigned first = 0, size = 0, arrived = 0, round = 0;
    const char *operation = nullptr;  // of the first that arrived
    Place place = {};
    // Of this round and the one before: a thread may arrive again before another has looked at what it brought.
    uint64_t values[2][warpSize] = {};
    bool any[2] = {};
};

struct Warp {
    Meeting meeting;
    unsigned ready[warpSize], ready_count = 0;  // its threads that could go on
};

const char *kernel = nullptr;
const std::function<void()> *body;
std::vector<Fiber> fibers;
Fiber outside;  // the stack that a kernel is run from
Fiber *running = &outside, *left;
Meeting block;
Warp warps[MAX_THREADS / warpSize];
unsigned warp_count, ready_count, ended;
// The warp that runs, and for how many turns on average while others could. Some blocks let a warp get far ahead, which
// a fair choice among all threads hardly ever does.
unsigned favoured, patience;
uint64_t generator;

uint64_t random() {
    // SplitMix64.
    uint64_t x = generator += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

void arrive_at_stack() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(running->fake, &left->bottom, &left->size);
#endif
}

void go_on_with(Fiber &next) {
    left = running;
    running = &next;
#ifdef __SANITIZE_ADDRESS__
    left->fake = nullptr;
    __sanitizer_start_switch_fiber(left->ended ? nullptr : &left->fake, next.bottom, next.size);
#endif
    standin_switch(&left->pointer, next.pointer);
    arrive_at_stack();
}

// What each thread of a meeting is at, those alike together.
std::string account(const Meeting &meeting) {
    std::string text;
    const auto at = [](const Fiber &fiber) {
        return fiber.ended       ? std::string("ended")
               : fiber.operation ? std::string("at ") + fiber.operation + " (" + fiber.place.file + ":" +
                                       std::to_string(fiber.place.line) + ")"
                                 : std::string("not there yet");
    };
    for (unsigned first = meeting.first, end; first < meeting.first + meeting.size; first = end) {
        const std::string here = at(fibers[first]);
        for (end = first + 1; end < meeting.first + meeting.size && at(fibers[end]) == here; ++end) {
        }
        text += "\n    threads " + std::to_string(first) + " to " + std::to_string(end - 1) + ": " + here;
    }
    return text;
}

// Apart from its callers: AddressSanitizer would move the variables of one that ends a fiber away from its stack.
[[noreturn]] __attribute__((noinline)) void diverged(const char *how, const Meeting &meeting) {
    fail("divergence: threads %s%s", how, account(meeting).c_str());
}

void make_ready(unsigned thread) {
    Warp &warp = warps[thread / warpSize];
    warp.ready[warp.ready_count++] = thread;
    ++ready_count;
}

void run_another() {
    if (ready_count == 0) {
        if (ended != block.size) {
            diverged("wait for others that will not come", block);
        }
        go_on_with(outside);
        return;
    }
    if (warps[favoured].ready_count == 0 || below(patience) == 0) {
        favoured = below(warp_count);
        while (warps[favoured].ready_count == 0) {
            favoured = (favoured + 1) % warp_count;
        }
    }
    Warp &warp = warps[favoured];
    const unsigned place = below(warp.ready_count), next = warp.ready[place];
    warp.ready[place] = warp.ready[--warp.ready_count];
    --ready_count;
    threadIdx.x = next;
    if (&fibers[next] != running) {
        go_on_with(fibers[next]);
    }
}

bool same(const char *a, const char *b) { return a == b || strcmp(a, b) == 0; }

// Waits for all threads of a meeting; the place among `values` and `any` that this round has.
unsigned meet(Meeting &meeting, const char *operation, Place place, uint64_t value) {
    Fiber &self = fibers[threadIdx.x];
    self.operation = operation;
    self.place = place;
    if (meeting.arrived == 0) {
        meeting.operation = operation;
        meeting.place = place;
    } else if (!same(meeting.operation, operation) || meeting.place.line != place.line ||
               !same(meeting.place.file, place.file)) {
        diverged("that should meet are at different operations", meeting);
    }
    const unsigned round = meeting.round % 2;
    meeting.values[round][threadIdx.x % warpSize] = value;
    meeting.any[round] |= value != 0;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        ++meeting.round;
        meeting.any[meeting.round % 2] = false;
        for (unsigned thread = meeting.first; thread < meeting.first + meeting.size; ++thread) {
            fibers[thread].operation = nullptr;
            make_ready(thread);
        }
    }
    run_another();
    return round;
}

// A fiber lives on from block to block. It never returns, and must not leave anything poisoned behind.
__attribute__((no_sanitize_address)) void live() {
    arrive_at_stack();
    for (;;) {
        (*body)();
        running->ended = true;
        ++ended;
        run_another();
    }
}

Fiber make_fiber(unsigned number) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void *memory = mmap(nullptr, page + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
        fail("no memory for the stacks");
    }
    char *bottom = static_cast<char *>(memory) + page;
    // Stacks that start at different places in a page do not all compete for the same lines of the cache.
    void **frame = reinterpret_cast<void **>(bottom + STACK - number % 16 * 256) - FRAME;
    frame[RETURN] = reinterpret_cast<void *>(live);
    Fiber fiber;
    fiber.pointer = frame;
    fiber.bottom = bottom;
    fiber.size = STACK;
    return fiber;
}

void run_block(unsigned threads) {
    scramble(__start_shared_memory, static_cast<size_t>(__stop_shared_memory - __start_shared_memory));
    block = {};
    block.size = threads;
    ended = ready_count = 0;
    warp_count = (threads + warpSize - 1) / warpSize;
    favoured = below(warp_count);
    patience = 1u << below(8);
    for (unsigned thread = 0; thread < threads; ++thread) {
        Warp &warp = warps[thread / warpSize];
        if (thread % warpSize == 0) {
            warp = {};
            warp.meeting.first = thread;
        }
        ++warp.meeting.size;
        fibers[thread].operation = nullptr;
        fibers[thread].ended = false;
        make_ready(thread);
    }
    run_another();
}

}  // namespace

void fail(const char *format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (kernel != nullptr) {
        fprintf(stderr, "stand-in: kernel %s, block %u of %u, thread %u: %s\n", kernel, blockIdx.x, gridDim.x,
                threadIdx.x, text);
    } else {
        fprintf(stderr, "stand-in: %s\n", text);
    }
    abort();
}

void seed(uint64_t value) { generator = value; }

uint32_t below(uint32_t end) { return static_cast<uint32_t>((random() >> 32) * end >> 32); }

// Writes between the variables too, where AddressSanitizer would have nobody write. A quarter of the words are zeros:
// garbage that looks like an answer is the worst.
__attribute__((no_sanitize_address)) void scramble(void *memory, size_t bytes) {
    char *at = static_cast<char *>(memory);
    uint64_t state = random();
    for (; bytes > 0; bytes -= std::min(bytes, sizeof state), at += sizeof state) {
        state = state * 6364136223846793005 + 1442695040888963407;
        const uint64_t word = state >> 62 == 0 ? 0 : state ^ state >> 31;
        if (bytes >= sizeof word) {
            __builtin_memcpy(at, &word, sizeof word);
        } else {
            for (size_t i = 0; i < bytes; ++i) {
                at[i] = static_cast<char>(word >> 8 * i);
            }
        }
    }
}

bool meet_block(const char *operation, Place place, bool value) {
    return block.any[meet(block, operation, place, value)];
}

const uint64_t *meet_warp(const char *operation, Place place, unsigned mask, uint64_t value) {
    if (mask != 0xffffffffu) {
        fail("%s with mask %08x: only whole warps meet here", operation, mask);
    }
    Meeting &warp = warps[threadIdx.x / warpSize].meeting;
    return warp.values[meet(warp, operation, place, value)];
}

void run(const char *name, const std::function<void()> &thread_body, unsigned blocks, unsigned threads) {
    kernel = name;
    body = &thread_body;
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
    while (fibers.size() < threads) {
        fibers.push_back(make_fiber(static_cast<unsigned>(fibers.size())));
    }
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    for (unsigned i = blocks; i > 1; --i) {
        std::swap(order[i - 1], order[below(i)]);
    }
    for (const unsigned index : order) {
        blockIdx.x = index;
        run_block(threads);
    }
    kernel = nullptr;
}

}  // namespace standin
