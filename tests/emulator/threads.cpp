// The threads of a block as fibers. At each barrier and warp operation a seeded generator chooses which fiber runs
// next, so that a kernel that lacks a barrier computes another result, or none.

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

// The section of the __shared__ variables. The linker defines these symbols if there is such a section.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_shared_memory[], __stop_shared_memory[];

// Stores the pointer of the current stack in `*leave`, and continues on the stack that was left at `enter`.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void **leave, void *enter);

// Saves and restores the registers that a call preserves; the return address is above them.
#if defined(__x86_64__)
asm(R"(
    .text
    .hidden emulator_switch
    .globl emulator_switch
    .type emulator_switch, @function
emulator_switch:
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
    .size emulator_switch, . - emulator_switch
)");
// Words of a new stack's first frame, and the position of the return address in it.
constexpr size_t FRAME = 8, RETURN = 6;
#elif defined(__aarch64__)
asm(R"(
    .text
    .hidden emulator_switch
    .globl emulator_switch
    .type emulator_switch, %function
emulator_switch:
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
    .size emulator_switch, . - emulator_switch
)");
constexpr size_t FRAME = 20, RETURN = 11;
#else
#error "emulator_switch is written for x86-64 and aarch64"
#endif

namespace emulator {
namespace {

constexpr unsigned MAX_THREADS = 1024;

struct Fiber {
    void *pointer = nullptr;          // of its stack, while it does not run
    const char *operation = nullptr;  // that it waits at
    Location location = {};
    bool ended = false;
    // For AddressSanitizer.
    const void *bottom = nullptr;
    size_t size = 0;
    void *fake = nullptr;
};

// A barrier of a block or of a warp.
struct Barrier {
    unsigned first = 0, size = 0, arrived = 0, round = 0;
    const char *operation = nullptr;  // of the first that arrived
    Location location = {};
    uint32_t *ordered = nullptr;  // when it last ordered memory accesses
    // Of this round and the previous one: a thread may arrive again before another has read its value.
    uint64_t values[2][warpSize] = {};
};

struct Warp {
    Barrier barrier;
    unsigned ready[warpSize], ready_count = 0;  // threads that can run
};

const char *kernel = nullptr;
const std::function<void()> *body;
std::vector<Fiber> fibers;
Fiber outside;  // the stack that a kernel is run from
Fiber *running = &outside, *left;
Barrier block;
Warp warps[MAX_THREADS / warpSize];
unsigned warp_count, ready_count, ended;
// The warp that runs, and for how many switches on average although others could. In some blocks a warp gets far ahead,
// which a fair choice among all threads rarely does.
unsigned favoured, patience;
uint64_t generator;

uint64_t random() {
    // SplitMix64.
    uint64_t x = generator += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

void finish_switch() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(running->fake, &left->bottom, &left->size);
#endif
}

void switch_to(Fiber &next) {
    left = running;
    running = &next;
#ifdef __SANITIZE_ADDRESS__
    left->fake = nullptr;
    __sanitizer_start_switch_fiber(left->ended ? nullptr : &left->fake, next.bottom, next.size);
#endif
    emulator_switch(&left->pointer, next.pointer);
    finish_switch();
}

// The state of each thread of a barrier, equal neighbours together.
std::string describe(const Barrier &barrier) {
    std::string text;
    const auto at = [](const Fiber &fiber) {
        return fiber.ended       ? std::string("ended")
               : fiber.operation ? std::string("at ") + fiber.operation + " (" + fiber.location.file + ":" +
                                       std::to_string(fiber.location.line) + ")"
                                 : std::string("not there yet");
    };
    for (unsigned first = barrier.first, end; first < barrier.first + barrier.size; first = end) {
        const std::string here = at(fibers[first]);
        for (end = first + 1; end < barrier.first + barrier.size && at(fibers[end]) == here; ++end) {
        }
        text += "\n    threads " + std::to_string(first) + " to " + std::to_string(end - 1) + ": " + here;
    }
    return text;
}

// Not inlined: AddressSanitizer would move the variables of a caller that ends a fiber off its stack.
[[noreturn]] __attribute__((noinline)) void diverged(const char *how, const Barrier &barrier) {
    fail("divergence: threads %s%s", how, describe(barrier).c_str());
}

void make_ready(unsigned thread) {
    Warp &warp = warps[thread / warpSize];
    warp.ready[warp.ready_count++] = thread;
    ++ready_count;
}

void run_next() {
    if (ready_count == 0) {
        if (ended != block.size) {
            diverged("wait for others that do not come", block);
        }
        switch_to(outside);
        return;
    }
    if (warps[favoured].ready_count == 0 || below(patience) == 0) {
        favoured = below(warp_count);
        while (warps[favoured].ready_count == 0) {
            favoured = (favoured + 1) % warp_count;
        }
    }
    Warp &warp = warps[favoured];
    const unsigned index = below(warp.ready_count), next = warp.ready[index];
    warp.ready[index] = warp.ready[--warp.ready_count];
    --ready_count;
    threadIdx.x = next;
    stack = reinterpret_cast<uintptr_t>(fibers[next].bottom);
    if (&fibers[next] != running) {
        switch_to(fibers[next]);
    }
}

bool same(const char *a, const char *b) { return a == b || strcmp(a, b) == 0; }

// Waits for all threads of a barrier; returns their values.
const uint64_t *arrive_and_wait(Barrier &barrier, const char *operation, Location location, uint64_t value,
                                bool orders) {
    Fiber &self = fibers[threadIdx.x];
    self.operation = operation;
    self.location = location;
    if (barrier.arrived == 0) {
        barrier.operation = operation;
        barrier.location = location;
    } else if (!same(barrier.operation, operation) || barrier.location.line != location.line ||
               !same(barrier.location.file, location.file)) {
        diverged("of one barrier are at different operations", barrier);
    }
    const unsigned round = barrier.round % 2;
    barrier.values[round][threadIdx.x % warpSize] = value;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.round;
        if (orders) {
            *barrier.ordered = ++times.now;
        }
        for (unsigned thread = barrier.first; thread < barrier.first + barrier.size; ++thread) {
            fibers[thread].operation = nullptr;
            make_ready(thread);
        }
    }
    run_next();
    return barrier.values[round];
}

// What a fiber runs: the kernel, once for each block. It never returns, so it must leave no stack memory poisoned.
__attribute__((no_sanitize_address)) void run_fiber() {
    finish_switch();
    for (;;) {
        (*body)();
        running->ended = true;
        ++ended;
        run_next();
    }
}

Fiber make_fiber(unsigned number) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void *memory = mmap(nullptr, page + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
        fail("no memory for the stacks");
    }
    char *bottom = static_cast<char *>(memory) + page;
    // Stacks start at different offsets in a page, so that they do not compete for the same cache lines.
    void **frame = reinterpret_cast<void **>(bottom + STACK - number % 16 * 256) - FRAME;
    frame[RETURN] = reinterpret_cast<void *>(run_fiber);
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
    block.ordered = &times.block;
    times.block = ++times.now;
    forget_accesses();
    ended = ready_count = 0;
    warp_count = (threads + warpSize - 1) / warpSize;
    favoured = below(warp_count);
    patience = 1u << below(8);
    for (unsigned thread = 0; thread < threads; ++thread) {
        Warp &warp = warps[thread / warpSize];
        if (thread % warpSize == 0) {
            warp = {};
            warp.barrier.first = thread;
            warp.barrier.ordered = &times.warps[thread / warpSize];
        }
        ++warp.barrier.size;
        fibers[thread].operation = nullptr;
        fibers[thread].ended = false;
        make_ready(thread);
    }
    run_next();
}

}  // namespace

void fail(const char *format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "emulator: ");
    if (kernel != nullptr) {
        fprintf(stderr, "kernel %s, block %u of %u, thread %u: ", kernel, blockIdx.x, gridDim.x, threadIdx.x);
    }
    fprintf(stderr, "%s\n", text);
    abort();
}

void seed(uint64_t value) { generator = value; }

uint32_t below(uint32_t end) { return static_cast<uint32_t>((random() >> 32) * end >> 32); }

// Also writes between variables, where AddressSanitizer allows no writes. A quarter of the words are zeros: garbage
// that looks like a result is the hardest to notice.
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

void sync_block(const char *operation, Location location) { arrive_and_wait(block, operation, location, 0, true); }

const uint64_t *sync_warp(const char *operation, Location location, unsigned mask, uint64_t value, bool orders) {
    if (mask != 0xffffffffu) {
        fail("%s with mask %08x: only operations of whole warps are emulated", operation, mask);
    }
    return arrive_and_wait(warps[threadIdx.x / warpSize].barrier, operation, location, value, orders);
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

}  // namespace emulator
