// The kernels of the emulated device, by name. The parameters are deduced from the declarations.

#include <tuple>
#include <utility>

#include "abi.cuh"
#include "driver.hpp"

extern "C" {
void dot(TableArgs, BlenderArgs, ObservationArgs, uint32_t);
void blend(TableArgs, BlenderArgs, ObservationArgs, uint32_t);
void dot_blend(TableArgs, BlenderArgs, ObservationArgs, uint32_t);
void observe(BlenderArgs, ObservationArgs);
void reweight(BlenderArgs);
void reset(BlenderArgs);
void set_weights(BlenderArgs, Weights);

// Of benches/lab/kernels/naive.cu; weak, so that an emulator without them links.
#define NAIVE(dtype) \
    __attribute__((weak)) void difference_##dtype(uint64_t, uint64_t, uint64_t, uint64_t); \
    __attribute__((weak)) void scale_##dtype(float, uint64_t, uint64_t, uint64_t); \
    __attribute__((weak)) void axpy_##dtype(float, uint64_t, uint64_t, uint64_t); \
    __attribute__((weak)) void product_##dtype(uint64_t, uint64_t, uint64_t, uint64_t); \
    __attribute__((weak)) void total_##dtype(uint64_t, uint64_t, uint64_t, uint64_t);
NAIVE(f32)
NAIVE(f16)
NAIVE(bf16)
#undef NAIVE
__attribute__((weak)) void read_units(uint64_t, uint64_t, uint64_t);
}

namespace emulator {
namespace {

template <auto KERNEL>
struct Bind;
template <class... P, void (*KERNEL)(P...)>
struct Bind<KERNEL> {
    template <size_t... I>
    static Task copy(void **parameters, std::index_sequence<I...>) {
        return [copies = std::tuple<P...>(*static_cast<const P *>(parameters[I])...)] { std::apply(KERNEL, copies); };
    }
    static Task bind(void **parameters) { return copy(parameters, std::index_sequence_for<P...>()); }
};

const Kernel KERNELS[] = {
#define X(kernel) {#kernel, Bind<kernel>::bind},
#define NAIVE(dtype) X(difference_##dtype) X(scale_##dtype) X(axpy_##dtype) X(product_##dtype) X(total_##dtype)
    X(dot) X(blend) X(dot_blend) X(observe) X(reweight) X(reset) X(set_weights)
    NAIVE(f32) NAIVE(f16) NAIVE(bf16) X(read_units)
#undef NAIVE
#undef X
};

}  // namespace

const Kernel *find_kernel(const char *name) {
    const auto named = [&](const Kernel &kernel) { return strcmp(kernel.name, name) == 0; };
    const auto found = std::find_if(std::begin(KERNELS), std::end(KERNELS), named);
    return found == std::end(KERNELS) ? nullptr : found;
}

}  // namespace emulator
