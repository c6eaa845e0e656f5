// Detects data races between the threads of a block, in shared and in device memory. -fsanitize=thread makes the
// kernels call a function of this file before each access to memory that might be shared. ThreadSanitizer's own
// library, which does not know CUDA's barriers, is not linked.
//
// Two accesses of different threads to the same bytes, at least one a write and not both atomic, must have a
// __syncthreads between them, or in one warp a __syncwarp. In CUDA's memory model votes and shuffles order no memory,
// and two writes of the same value race too.

#include <dlfcn.h>
#include <stdio.h>

#include <algorithm>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda.hpp"

// Of this library, by the linker: its first byte, and its zero-initialised variables, of which kernels access threadIdx
// and the counters.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], __bss_start[], _end[];

namespace emulator {
namespace {

enum Kind { READ, WRITE, ATOMIC };

// The accesses to some bytes that a later one can race with: the last write, and the reads since. When a write is
// ordered after earlier accesses, whatever is ordered after the write is ordered after them.
struct Cell {
    uint32_t written, read;      // times of the last ones; 0: never
    uint32_t write_at, read_at;  // offsets in this library of the instructions after them
    // The warps that read since the last barrier of the block. If it is one, also its lanes that read since its last
    // barrier; if there are more, any write is a race.
    uint32_t warps, lanes;
    uint16_t writer;  // a thread
    bool atomic;      // the write
};

constexpr uintptr_t PAGE = 1024;
constexpr size_t MAX_PAGES = 1 << 12;  // kept from block to block: up to 64 MiB of cells

// The cells of PAGE bytes, 1 << shift bytes each. They are split when an access has a smaller part of one.
struct Page {
    unsigned shift = 4;
    std::vector<Cell> cells = std::vector<Cell>(PAGE >> 4);

    __attribute__((noinline)) void split(unsigned smaller) {
        std::vector<Cell> split;
        for (const Cell &cell : cells) {
            split.insert(split.end(), 1u << (shift - smaller), cell);
        }
        shift = smaller;
        cells.swap(split);
    }
};

// By number: address / PAGE. Never destroyed, as the driver is not. The recent ones are found without a search.
std::unordered_map<uintptr_t, Page> &pages = *new std::unordered_map<uintptr_t, Page>;
struct {
    uintptr_t number;
    Page *page;
} recent[1024];

Page &page_of(uintptr_t address) {
    const uintptr_t number = address / PAGE;
    auto &[kept, page] = recent[number % std::size(recent)];
    if (kept != number) {
        kept = number;
        page = &pages[number];
    }
    return *page;
}

// The source line before an instruction, and those that it was inlined into; the offset if addr2line finds none.
std::string source(uint32_t at) {
    char text[512];
    Dl_info library;
    dladdr(__ehdr_start, &library);
    snprintf(text, sizeof text, "addr2line -i -s -e '%s' %#x 2>&1", library.dli_fname, at - 1);
    std::string lines;
    if (FILE *pipe = popen(text, "r")) {
        while (fgets(text, sizeof text, pipe) != nullptr) {
            lines += (lines.empty() ? "" : " in ") + std::string(text, strcspn(text, " \n"));
        }
        pclose(pipe);
    }
    snprintf(text, sizeof text, " (%#x)", at);
    return lines + text;
}

[[noreturn]] __attribute__((noinline)) void race(uintptr_t address, const char *access, uint32_t at,
                                                 const char *earlier, const char *who, unsigned number, uint32_t there) {
    fail("data race at %#zx: no barrier orders its %s at %s after the %s by %s %u at %s",
         static_cast<size_t>(address), access, source(at).c_str(), earlier, who, number, source(there).c_str());
}

// Compares an access to the bytes of a cell with the earlier ones, and adds it to them.
template <Kind KIND>
inline void access(Cell &cell, uintptr_t address, const void *caller) {
    const unsigned thread = threadIdx.x, warp = thread / warpSize;
    const uint32_t warp_bit = 1u << warp, lane_bit = 1u << thread % warpSize;
    if (KIND == READ && cell.read == times.now && (cell.warps & warp_bit) && (cell.lanes & lane_bit)) {
        return;
    }
    const uint32_t at = static_cast<uint32_t>(static_cast<const char *>(caller) - __ehdr_start);
    const uint32_t warp_since = std::max(times.block, times.warps[warp]);
    if (cell.written >= times.block && cell.writer != thread && !(KIND == ATOMIC && cell.atomic) &&
        (cell.writer / warpSize != warp || cell.written >= warp_since)) {
        race(address, KIND == READ ? "read" : "write", at, "write", "thread", cell.writer, cell.write_at);
    }
    const uint32_t warps = cell.read >= times.block ? cell.warps : 0;
    const uint32_t lanes = cell.read >= warp_since ? cell.lanes : 0;
    if (KIND == READ) {
        cell.read = times.now;
        cell.read_at = at;
        cell.warps = warps | warp_bit;
        cell.lanes = lanes | lane_bit;
        return;
    }
    if (const uint32_t others = warps & ~warp_bit) {
        race(address, "write", at, "read", "warp", static_cast<unsigned>(__builtin_ctz(others)), cell.read_at);
    }
    if (const uint32_t others = lanes & ~lane_bit) {
        const unsigned reader = thread - thread % warpSize + static_cast<unsigned>(__builtin_ctz(others));
        race(address, "write", at, "read", "thread", reader, cell.read_at);
    }
    cell = {times.now, 0, at, 0, 0, 0, static_cast<uint16_t>(thread), KIND == ATOMIC};
}

// Compares an access to memory that other threads might use.
template <Kind KIND>
__attribute__((noinline)) void access(uintptr_t first, size_t bytes, const void *caller) {
    const unsigned alignment = static_cast<unsigned>(__builtin_ctzl(first | bytes | 16));
    for (uintptr_t address = first, step; address < first + bytes; address += step) {
        Page &page = page_of(address);
        if (page.shift > alignment) {
            page.split(alignment);
        }
        step = uintptr_t(1) << page.shift;
        access<KIND>(page.cells[address % PAGE >> page.shift], address, caller);
    }
}

// Leaves out the thread's own stack, which most accesses are to, and variables of the emulator.
template <Kind KIND>
__attribute__((always_inline)) inline void access(const void *memory, size_t bytes) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(memory), variables = reinterpret_cast<uintptr_t>(__bss_start);
    if (first - stack >= STACK && first - variables >= static_cast<size_t>(_end - __bss_start)) {
        access<KIND>(first, bytes, __builtin_return_address(0));
    }
}

}  // namespace

void atomic_access(const void *memory, size_t bytes) { access<ATOMIC>(memory, bytes); }

void forget_accesses() {
    if (pages.size() > MAX_PAGES) {
        pages.clear();
        memset(recent, 0, sizeof recent);
    }
}

}  // namespace emulator

// ---- What g++ calls ----

#define CALLED extern "C" __attribute__((visibility("hidden"))) void
#define ACCESS(name, kind, bytes) \
    CALLED __tsan_##name(const void *memory) { emulator::access<emulator::kind>(memory, bytes); }
#define ACCESSES(bytes) \
    ACCESS(read##bytes, READ, bytes) ACCESS(unaligned_read##bytes, READ, bytes) \
    ACCESS(write##bytes, WRITE, bytes) ACCESS(unaligned_write##bytes, WRITE, bytes)
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
CALLED __tsan_read_range(const void *memory, size_t bytes) { emulator::access<emulator::READ>(memory, bytes); }
CALLED __tsan_write_range(const void *memory, size_t bytes) { emulator::access<emulator::WRITE>(memory, bytes); }
CALLED __tsan_init() {}
CALLED __tsan_func_entry(const void *) {}
CALLED __tsan_func_exit() {}
