// The classes of gradblend.hpp on the CPU, with exceptions and without; `status_of` and `value` hide the difference.

// Declared ahead, as the header says.
namespace gradblend {
#if defined(__cpp_exceptions)
inline namespace with_exceptions {
#else
inline namespace without_exceptions {
#endif
class Blender;
} // namespace
} // namespace gradblend

#include "gradblend.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                               \
            std::exit(1);                                                                                              \
        }                                                                                                              \
    } while (false)

// Calls of operator new, which is replaced. Not inlined, so that valgrind can replace it again.
static std::size_t allocations = 0;
__attribute__((noinline)) void *operator new(std::size_t bytes) {
    allocations++;
    void *const memory = std::malloc(bytes == 0 ? 1 : bytes);
    CHECK(memory != nullptr);
    return memory;
}
__attribute__((noinline)) void operator delete(void *memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void *memory, std::size_t) noexcept { std::free(memory); }

// DLPack's unversioned struct, which a framework defines.
struct DLManagedTensor {
    void *data;
    std::int32_t device_type, device_id, ndim;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
    void *manager_ctx;
    void (*deleter)(DLManagedTensor *);
};

namespace {

using gradblend::Blender;
using gradblend::Plan;
using gradblend::Tensors;

std::string message; // of the last error

#if defined(__cpp_exceptions)

template <typename Call>
gradblend_status status_of(Call call) {
    try {
        static_cast<void>(call());
    } catch (const gradblend::Error &error) {
        const std::runtime_error &base = error;
        message = base.what();
        return error.status();
    }
    return GRADBLEND_OK;
}

template <typename T>
T value(T result) {
    return result;
}

#else

template <typename Call>
gradblend_status status_of(Call call) {
    const auto result = call();
    CHECK(result.has_value() == (result.error().status() == GRADBLEND_OK) && bool(result) == result.has_value());
    message = result.error().what();
    return result.error().status();
}

template <typename T>
T value(gradblend::Result<T> result) {
    CHECK(result.has_value());
    const gradblend::Result<T> &same = result;
    CHECK(&same.value() == &result.value());
    return std::move(result).value();
}

#endif

#define OK(call) CHECK(status_of([&] { return call; }) == GRADBLEND_OK)
#define REJECTS(words, call) CHECK(status_of([&] { return call; }) == GRADBLEND_INVALID_ARGUMENT && message_has(words))

// Whether the message starts with the status name and has all words, which `|` separates.
bool message_has(const std::string &words) {
    std::istringstream stream(words);
    bool found = message.find("GRADBLEND_INVALID_ARGUMENT: ") == 0;
    for (std::string word; std::getline(stream, word, '|');) {
        found = found && message.find(word) != std::string::npos;
    }
    return found;
}

bool near(double got, double expected) { return std::abs(got - expected) <= 1e-6 * std::abs(expected); }

// <g, v> = 1.5 for both modalities, <t - g, v> = 0.5 and 1: the weights are as 1 / 0.25 to 1 / 1, that is 0.8 and 0.2.
struct Gradients {
    std::vector<float> train = {1, 2}, valid = {1, 1}, video = {1, 0.5F}, audio = {0.5F, 1}, blended = {0, 0};

    gradblend::Return<void> add(Tensors &tensors) {
        return tensors.add(2, train.data(), valid.data(), {video.data(), audio.data()}, blended.data());
    }
    Tensors tensors() {
        Tensors tensors(2);
        OK(add(tensors));
        return tensors;
    }
};

Blender blender_of(std::uint32_t modalities) {
    return value(Blender::create(GRADBLEND_CPU, value(gradblend::config(modalities))));
}

bool has_weights(Blender &blender, double first, double second) {
    const gradblend_report report = value(blender.report());
    return near(report.weights[0], first) && near(report.weights[1], second);
}

void functions() {
    gradblend_config config = value(gradblend::config(2));
    CHECK(config.size == sizeof config && config.modalities == 2);
    REJECTS("", gradblend::config(0));
    const gradblend::Solution solution = value(gradblend::solve(config, {1, 1}, {1, 0, 0, 3}));
    CHECK(near(solution.weights.at(0), 0.75) && near(solution.weights.at(1), 0.25) && solution.flags == 0);
    const gradblend::Solution held = value(gradblend::solve(config, {0, 0}, {1, 0, 0, 1}, {0.3, 0.7}));
    CHECK(near(held.weights.at(0), 0.3) && (held.flags & GRADBLEND_FLAG_HELD) != 0);
    REJECTS("1|2", gradblend::solve(config, {1}, {1, 0, 0, 1}));
    REJECTS("3|4", gradblend::solve(config, {1, 1}, {1, 0, 0}));
    REJECTS("1|2", gradblend::solve(config, {1, 1}, {1, 0, 0, 1}, {1}));
    REJECTS("", gradblend::solve(config, {1, NAN}, {1, 0, 0, 1}));
    // Which error depends on the library and the machine.
    CHECK(status_of([&] { return Blender::create(9999, config); }) != GRADBLEND_OK);
    config.decay = 1;
    REJECTS("decay", Blender::create(GRADBLEND_CPU, config));
}

void methods() {
    Gradients gradients;
    Blender blender = blender_of(2);
    CHECK(blender && blender.get() != nullptr && blender.modalities() == 2);
    // The builder is destroyed before the plan is used.
    const Plan plan = value(blender.plan(gradients.tensors()));
    CHECK(plan && plan.get() != nullptr);
    OK(blender.step(plan));
    CHECK(gradients.blended == std::vector<float>({0.75F, 0.75F}) && has_weights(blender, 0.5, 0.5));
    OK(blender.reweight());
    CHECK(has_weights(blender, 0.8, 0.2) && value(blender.report()).observed == 1);
    const std::vector<double> moments = value(blender.second_moments());
    CHECK(moments.size() == 4 && near(moments[0], 0.25) && near(moments[1], 0.5) && near(moments[3], 1));
    CHECK(value(blender.device_weights())[0] == 0.8F);
    OK(blender.blend(plan));
    CHECK(near(gradients.blended[0], 0.9) && near(gradients.blended[1], 0.6));

    OK(blender.reset());
    OK(blender.dot(plan));
    const gradblend::PendingSums pending = value(blender.pending_sums());
    CHECK(pending.count == 4 && pending.sums[0] == 1.5 && pending.sums[2] == 0.5 && pending.sums[3] == 1);
    OK(blender.observe());
    CHECK(pending.sums[0] == 0 && value(blender.report()).observed == 1);
    OK(blender.set_weights({1, 3}));
    OK(blender.pass(plan, GRADBLEND_DOT | GRADBLEND_BLEND | GRADBLEND_OBSERVE));
    CHECK(gradients.blended == std::vector<float>({2.5F, 3.5F}) && value(blender.report()).observed == 2);
    float scale = 0;
    OK(blender.set_grad_scale(&scale));
    OK(blender.step(plan));
    OK(blender.set_grad_scale(nullptr));
    CHECK(value(blender.report()).skipped == 1);
    REJECTS("", blender.pass(plan, 0));
    REJECTS("", blender.set_weights({1}));

    Blender other = blender_of(2);
    REJECTS("another blender", other.step(plan));
    std::vector<unsigned char> state = value(blender.save());
    OK(other.load(state));
    CHECK(has_weights(other, 1, 3) && value(other.save()) == state);
    CHECK(status_of([&] { return other.load(state.data(), state.size() - 1); }) == GRADBLEND_CORRUPT_STATE);
    CHECK(status_of([&] { return other.load({}); }) == GRADBLEND_CORRUPT_STATE);
    REJECTS("", blender_of(3).load(state));
    CHECK(has_weights(other, 1, 3));
}

// Every method of an empty blender.
void check_empty(Blender &blender, const Plan &plan, Tensors &tensors) {
    CHECK(!blender && blender.get() == nullptr && blender.modalities() == 0);
    REJECTS("", blender.plan(tensors));
    REJECTS("", blender.plan(tensors.data(), tensors.size()));
    REJECTS("", blender.pass(plan, GRADBLEND_DOT));
    REJECTS("", blender.dot(plan));
    REJECTS("", blender.observe());
    REJECTS("", blender.reweight());
    REJECTS("", blender.blend(plan));
    REJECTS("", blender.step(plan));
    REJECTS("", blender.reset());
    REJECTS("", blender.set_weights({0.5, 0.5}));
    REJECTS("", blender.set_grad_scale(nullptr));
    REJECTS("", blender.report());
    REJECTS("", blender.second_moments());
    REJECTS("", blender.device_weights());
    REJECTS("", blender.pending_sums());
    REJECTS("", blender.save());
    REJECTS("", blender.load({1, 2, 3}));
}

template <typename T>
constexpr bool moves_only = !std::is_copy_constructible_v<T> && !std::is_copy_assignable_v<T> &&
                            std::is_nothrow_move_constructible_v<T> && std::is_nothrow_move_assignable_v<T>;

void moves() {
    static_assert(moves_only<Blender> && moves_only<Plan> && moves_only<Tensors>);
    Gradients gradients;
    Tensors tensors = gradients.tensors();
    Blender first = blender_of(2), empty;
    Plan plan = value(first.plan(tensors));
    Blender second = std::move(first);
    OK(second.step(plan));
    check_empty(first, plan, tensors);
    check_empty(empty, plan, tensors);

    // Assignment destroys what was there: a blender, nothing, itself.
    Blender third = blender_of(2);
    gradblend_blender *const destroyed = third.get();
    third = std::move(second);
    CHECK(gradblend_reweight(destroyed, nullptr) == GRADBLEND_INVALID_ARGUMENT && !second);
    second = std::move(third);
    Blender &same = second;
    second = std::move(same);
    OK(second.step(plan));
    std::swap(second, third);
    CHECK(third && !second && value(third.report()).observed == 2);

    Plan moved = std::move(plan);
    CHECK(!plan && plan.get() == nullptr && moved);
    REJECTS("", third.step(plan));
    REJECTS("", plan.update(tensors));
    Plan live = value(third.plan(tensors));
    gradblend_plan *const destroyed_plan = live.get();
    live = std::move(moved);
    CHECK(gradblend_plan_update(destroyed_plan, tensors.data(), 1, nullptr) == GRADBLEND_INVALID_ARGUMENT);
    OK(third.step(live));
    // A plan may be destroyed after its blender, and no other blender accepts it.
    third = Blender();
    Blender late = blender_of(2);
    REJECTS("", late.step(live));
}

void tensors() {
    // More tensors than a page of the builder; tensor p has modality p mod 4, so every fourth has none.
    constexpr std::size_t count = 1000;
    std::vector<float> gradients(count), blended(count, -1);
    Tensors building(3);
    std::vector<const void *const *> arrays;
    for (std::size_t p = 0; p < count; p++) {
        gradients[p] = static_cast<float>(p + 1);
        const void *addresses[3] = {};
        const float *floats[3] = {}, *const own = &gradients[p];
        if (p % 4 < 3) {
            addresses[p % 4] = floats[p % 4] = own;
        }
        OK(p % 2 == 0 ? building.add(1, own, own, floats, 3, &blended[p])
                      : building.add(1, GRADBLEND_F32, own, own, addresses, 3, &blended[p]));
        arrays.push_back(building.data()[p].modalities);
    }
    Tensors tensors = std::move(building);
    Blender blender = blender_of(3);
    Plan plan = value(blender.plan(tensors));
    OK(blender.set_weights({1, 2, 4}));
    OK(blender.blend(plan));
    for (std::size_t p = 0; p < count; p++) {
        const float weights[] = {1, 2, 4, 0};
        CHECK(tensors.data()[p].modalities == arrays[p] && blended[p] == weights[p % 4] * gradients[p]);
    }
    // Filled again it allocates nothing, nor do update and step.
    const std::size_t before = allocations;
    tensors.clear();
    for (std::size_t p = 0; p < count; p++) {
        OK(tensors.add(1, nullptr, nullptr, {nullptr, &gradients[p], nullptr}, &blended[p]));
    }
    OK(plan.update(tensors));
    OK(blender.step(plan));
    CHECK(allocations == before && blended[0] == 2 && blended[999] == 2000);

    // An update that is rejected leaves the plan unchanged. The number of addresses is checked here, the rest in C.
    OK(tensors.add(1, nullptr, nullptr, {nullptr, nullptr, nullptr}));
    REJECTS("", plan.update(tensors));
    REJECTS("", plan.update(nullptr, 1));
    REJECTS("expected 3|got 2", plan.update(Tensors(2)));
    REJECTS("expected 3|got 2", blender.plan(Tensors(2)));
    REJECTS("tensor 1001|expected 3|got 1", tensors.add(1, nullptr, nullptr, {&gradients[0]}));
    OK(blender.step(plan));
    OK(blender.plan(Tensors(3)));
    Tensors odd(3);
    OK(odd.add(1, GRADBLEND_F16, nullptr, nullptr, {nullptr, reinterpret_cast<char *>(&gradients[0]) + 1, nullptr}));
    REJECTS("tensor 0|modality 1", blender.plan(odd));

    DLManagedTensor array{&gradients[1], 1, 0, 0, 2, 32, 1, nullptr, nullptr, 0, nullptr, nullptr};
    const gradblend_dlpack lists[3] = {{}, {&array, nullptr}, {}};
    Tensors exchanged(3);
    OK(exchanged.from_dlpack(GRADBLEND_CPU, nullptr, nullptr, lists, 3));
    CHECK(exchanged.size() == 1 && exchanged.data()->modalities[1] == &gradients[1] && exchanged.data()->len == 1);
    REJECTS("", exchanged.from_dlpack(GRADBLEND_CPU, nullptr, nullptr, lists, 2));
    array.bits = 64;
    REJECTS("modality 1", exchanged.from_dlpack(GRADBLEND_CPU, nullptr, nullptr, lists, 3));
    CHECK(exchanged.size() == 1);
}

} // namespace

int main() {
    functions();
    methods();
    moves();
    tensors();
#if defined(__cpp_exceptions)
    CHECK(Blender(GRADBLEND_CPU, gradblend::config(2)).modalities() == 2);
    REJECTS("", Blender(GRADBLEND_CPU, gradblend_config{}));
    std::puts("raii: done, with exceptions");
#else
    std::puts("raii: done, without exceptions");
#endif
    return 0;
}
