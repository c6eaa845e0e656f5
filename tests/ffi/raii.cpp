// What gradblend.hpp promises, with exceptions and with -fno-exceptions: two functions below hide which it is.
//
//     g++ -std=c++17 -Iinclude tests/c/raii.cpp -L<where libgradblend is> -lgradblend && ./a.out

#include "gradblend.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1); \
        } \
    } while (false)

static std::size_t allocations = 0;

// To count: what is said to allocate nothing must not. Never inlined, so that valgrind can put its own in place of all.
__attribute__((noinline)) void *operator new(std::size_t bytes) {
    allocations++;
    void *const memory = std::malloc(bytes == 0 ? 1 : bytes);
    CHECK(memory != nullptr);
    return memory;
}
__attribute__((noinline)) void operator delete(void *memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void *memory, std::size_t) noexcept { std::free(memory); }

namespace {

using gradblend::Blender;
using gradblend::Plan;
using gradblend::Tensors;

// What became of a call.
struct Outcome {
    gradblend_status status;
    std::string message;
};

#if defined(__cpp_exceptions)

template <typename Call>
Outcome outcome(Call call) {
    try {
        static_cast<void>(call());
    } catch (const gradblend::Error &error) {
        const std::runtime_error &base = error;
        return {error.status(), base.what()};
    }
    return {GRADBLEND_OK, ""};
}

template <typename T>
T value(T result) {
    return result;
}

#else

template <typename Call>
Outcome outcome(Call call) {
    const auto result = call();
    CHECK(result.has_value() == (result.error().status() == GRADBLEND_OK) && bool(result) == result.has_value());
    return {result.error().status(), result.error().what()};
}

template <typename T>
T value(gradblend::Result<T> result) {
    CHECK(result.has_value());
    const gradblend::Result<T> &same = result;
    CHECK(&same.value() == &result.value());
    return std::move(result).value();
}

#endif

template <typename Call>
bool works(Call call) {
    return outcome(call).status == GRADBLEND_OK;
}

// Whether a call is an error of this status, and its message has all of these words.
template <typename Call>
bool fails(Call call, gradblend_status status, const std::vector<std::string> &words) {
    const Outcome got = outcome(call);
    bool named = got.status == status && got.message.find(gradblend_status_name(status)) == 0;
    for (const std::string &word : words) {
        named = named && got.message.find(word) != std::string::npos;
    }
    if (!named) {
        std::fprintf(stderr, "got status %d: %s\n", static_cast<int>(got.status), got.message.c_str());
    }
    return named;
}

template <typename Call>
bool refused(Call call) {
    return fails(call, GRADBLEND_INVALID_ARGUMENT, {});
}

bool near(double got, double expected) {
    return std::abs(got - expected) <= 1e-9 * std::abs(expected);
}

// <g, v> = 1.5 for both modalities, <t - g, v> = 0.5 and 1: the weights are as 1 / 0.25 to 1 / 1, that is 0.8 and 0.2.
struct Gradients {
    std::vector<float> train = {1, 2}, valid = {1, 1}, video = {1, 0.5F}, audio = {0.5F, 1}, blended = {0, 0};

    Tensors tensors() {
        Tensors tensors(2);
        CHECK(works([&] { return add(tensors); }));
        return tensors;
    }

    gradblend::Return<void> add(Tensors &tensors) {
        return tensors.add(2, train.data(), valid.data(), {video.data(), audio.data()}, blended.data());
    }
};

Blender blender_of(std::uint32_t modalities) {
    return value(Blender::create(GRADBLEND_CPU, value(gradblend::config(modalities))));
}

bool has_weights(Blender &blender, double first, double second) {
    const gradblend_report report = value(blender.report());
    return near(report.weights[0], first) && near(report.weights[1], second);
}

void configures() {
    const gradblend_config config = value(gradblend::config(3));
    CHECK(config.size == sizeof config && config.modalities == 3 && near(config.decay, 0.99));
    CHECK(config.average == GRADBLEND_EMA && config.cadence == GRADBLEND_ON_REQUEST);
    CHECK(refused([] { return gradblend::config(0); }));
    CHECK(refused([] { return gradblend::config(33); }));
    // Of which kind depends on the library and the machine.
    CHECK(!works([&] { return Blender::create(9999, config); }));
    gradblend_config bad = config;
    bad.decay = 1;
    CHECK(fails([&] { return Blender::create(GRADBLEND_CPU, bad); }, GRADBLEND_INVALID_ARGUMENT, {"decay"}));
}

void solves() {
    const gradblend_config config = value(gradblend::config(2));
    const gradblend::Solution solution = value(gradblend::solve(config, {1, 1}, {1, 0, 0, 3}));
    CHECK(near(solution.weights.at(0), 0.75) && near(solution.weights.at(1), 0.25) && solution.flags == 0);
    const gradblend::Solution clamped = value(gradblend::solve(config, {1, -1}, {1, 0, 0, 1}));
    CHECK(near(clamped.weights.at(0), 1) && clamped.flags == GRADBLEND_FLAG_CLAMPED);
    const gradblend::Solution held = value(gradblend::solve(config, {0, 0}, {1, 0, 0, 1}, {0.3, 0.7}));
    CHECK(near(held.weights.at(0), 0.3) && (held.flags & GRADBLEND_FLAG_HELD) != 0);
    const gradblend::Solution uniform = value(gradblend::solve(config, {0, 0}, {1, 0, 0, 1}));
    CHECK(near(uniform.weights.at(0), 0.5));
    // The C function cannot see how long arrays are.
    CHECK(fails([&] { return gradblend::solve(config, {1}, {1, 0, 0, 1}); }, GRADBLEND_INVALID_ARGUMENT, {"1", "2"}));
    CHECK(fails([&] { return gradblend::solve(config, {1, 1}, {1, 0, 0}); }, GRADBLEND_INVALID_ARGUMENT, {"3", "4"}));
    CHECK(refused([&] { return gradblend::solve(config, {1, 1}, {1, 0, 0, 1}, {1}); }));
    CHECK(refused([&] { return gradblend::solve(config, {1, NAN}, {1, 0, 0, 1}); }));
}

void steps() {
    Gradients gradients;
    Blender blender = blender_of(2);
    CHECK(blender && blender.get() != nullptr && blender.modalities() == 2);
    // The builder may go once the plan is made.
    const Plan plan = value(blender.plan(gradients.tensors()));
    CHECK(plan && plan.get() != nullptr);
    CHECK(has_weights(blender, 0.5, 0.5));
    CHECK(works([&] { return blender.step(plan); }));
    CHECK(gradients.blended == std::vector<float>({0.75F, 0.75F}));
    CHECK(has_weights(blender, 0.5, 0.5));
    CHECK(works([&] { return blender.reweight(); }));
    CHECK(has_weights(blender, 0.8, 0.2));
    const gradblend_report report = value(blender.report());
    CHECK(report.size == sizeof report && report.modalities == 2 && report.observed == 1 && report.flags == 0);
    CHECK(near(report.mean[0], 1.5) && near(report.mean[1], 1.5));
    CHECK(near(report.second_moment[0], 0.25) && near(report.second_moment[1], 1));
    const std::vector<double> moments = value(blender.second_moments());
    CHECK(moments.size() == 4 && near(moments[0], 0.25) && near(moments[1], 0.5) && near(moments[2], 0.5));
    CHECK(near(moments[3], 1));
    const float *weights = value(blender.device_weights());
    CHECK(weights[0] == 0.8F && weights[1] == 0.2F);
    CHECK(works([&] { return blender.blend(plan); }));
    CHECK(std::abs(gradients.blended[0] - 0.9F) < 1e-6F && std::abs(gradients.blended[1] - 0.6F) < 1e-6F);

    // The same as three calls, then as passes, with what is pending between them.
    CHECK(works([&] { return blender.reset(); }));
    CHECK(value(blender.report()).observed == 0 && has_weights(blender, 0.8, 0.2));
    CHECK(works([&] { return blender.dot(plan); }));
    const gradblend::PendingSums pending = value(blender.pending_sums());
    CHECK(pending.count == 4);
    CHECK(pending.sums[0] == 1.5 && pending.sums[1] == 1.5 && pending.sums[2] == 0.5 && pending.sums[3] == 1);
    CHECK(works([&] { return blender.observe(); }));
    CHECK(pending.sums[0] == 0 && value(blender.report()).observed == 1);
    CHECK(works([&] { return blender.set_weights({1, 3}); }));
    CHECK(has_weights(blender, 1, 3));
    CHECK(works([&] { return blender.pass(plan, GRADBLEND_DOT | GRADBLEND_BLEND | GRADBLEND_OBSERVE); }));
    CHECK(gradients.blended == std::vector<float>({2.5F, 3.5F}));
    CHECK(works([&] { return blender.pass(plan, GRADBLEND_BLEND | GRADBLEND_ACCUMULATE); }));
    CHECK(gradients.blended == std::vector<float>({5, 7}));
    CHECK(value(blender.report()).observed == 2);

    CHECK(refused([&] { return blender.pass(plan, 0); }));
    CHECK(refused([&] { return blender.pass(plan, GRADBLEND_ACCUMULATE); }));
    CHECK(refused([&] { return blender.set_weights({1}); }));
    CHECK(refused([&] { return blender.set_weights({1, INFINITY}); }));
    CHECK(has_weights(blender, 1, 3));
    Blender other = blender_of(2);
    CHECK(refused([&] { return other.step(plan); }));
}

void scales() {
    Gradients gradients;
    Blender blender = blender_of(2);
    const Plan plan = value(blender.plan(gradients.tensors()));
    float scale = 2;
    CHECK(works([&] { return blender.set_grad_scale(&scale); }));
    CHECK(works([&] { return blender.step(plan); }));
    CHECK(near(value(blender.report()).mean[0], 1.5 / 4));
    scale = 0;
    CHECK(works([&] { return blender.step(plan); }));
    const gradblend_report report = value(blender.report());
    CHECK(report.observed == 1 && report.skipped == 1 && report.flags == GRADBLEND_FLAG_NONFINITE);
    CHECK(report.nonfinite == 3);
    CHECK(works([&] { return blender.set_grad_scale(nullptr); }));
    CHECK(works([&] { return blender.step(plan); }));
    CHECK(value(blender.report()).observed == 2);
}

void saves() {
    Gradients gradients;
    Blender blender = blender_of(2), other = blender_of(2), larger = blender_of(3);
    const Plan plan = value(blender.plan(gradients.tensors()));
    CHECK(works([&] { return blender.step(plan); }) && works([&] { return blender.reweight(); }));
    std::vector<unsigned char> state = value(blender.save());
    CHECK(!state.empty());
    CHECK(works([&] { return other.load(state); }));
    CHECK(has_weights(other, 0.8, 0.2) && value(other.report()).observed == 1);
    CHECK(value(other.save()) == state);
    CHECK(fails([&] { return larger.load(state); }, GRADBLEND_INVALID_ARGUMENT, {}));
    CHECK(fails([&] { return other.load(state.data(), state.size() - 1); }, GRADBLEND_CORRUPT_STATE, {}));
    state.at(state.size() / 2) ^= 1;
    CHECK(fails([&] { return other.load(state); }, GRADBLEND_CORRUPT_STATE, {}));
    CHECK(!works([&] { return other.load({}); }));
    CHECK(has_weights(other, 0.8, 0.2));
}

// Every call but assignment and the destructor.
void refuse_all(Blender &blender, const Plan &plan, Tensors &tensors) {
    CHECK(!blender && blender.get() == nullptr);
    CHECK(refused([&] { return blender.plan(tensors); }));
    CHECK(refused([&] { return blender.plan(tensors.data(), tensors.size()); }));
    CHECK(refused([&] { return blender.pass(plan, GRADBLEND_DOT); }));
    CHECK(refused([&] { return blender.dot(plan); }));
    CHECK(refused([&] { return blender.observe(); }));
    CHECK(refused([&] { return blender.reweight(); }));
    CHECK(refused([&] { return blender.blend(plan); }));
    CHECK(refused([&] { return blender.step(plan); }));
    CHECK(refused([&] { return blender.reset(); }));
    CHECK(refused([&] { return blender.set_weights({0.5, 0.5}); }));
    CHECK(refused([&] { return blender.set_grad_scale(nullptr); }));
    CHECK(refused([&] { return blender.report(); }));
    CHECK(refused([&] { return blender.second_moments(); }));
    CHECK(refused([&] { return blender.device_weights(); }));
    CHECK(refused([&] { return blender.pending_sums(); }));
    CHECK(refused([&] { return blender.save(); }));
    CHECK(refused([&] { return blender.load({1, 2, 3}); }));
}

void moves() {
    static_assert(!std::is_copy_constructible_v<Blender> && !std::is_copy_assignable_v<Blender>);
    static_assert(!std::is_copy_constructible_v<Plan> && !std::is_copy_assignable_v<Plan>);
    static_assert(!std::is_copy_constructible_v<Tensors> && !std::is_copy_assignable_v<Tensors>);
    static_assert(std::is_nothrow_move_constructible_v<Blender> && std::is_nothrow_move_assignable_v<Blender>);
    static_assert(std::is_nothrow_move_constructible_v<Plan> && std::is_nothrow_move_assignable_v<Plan>);
    static_assert(std::is_nothrow_move_constructible_v<Tensors> && std::is_nothrow_move_assignable_v<Tensors>);

    Gradients gradients;
    Tensors tensors = gradients.tensors();
    Blender first = blender_of(2);
    Plan plan = value(first.plan(tensors));

    Blender second = std::move(first);
    CHECK(works([&] { return second.step(plan); }));
    refuse_all(first, plan, tensors);
    Blender empty;
    refuse_all(empty, plan, tensors);

    // Over a live one, which is destroyed, and over an empty one.
    Blender third = blender_of(2);
    gradblend_blender *const gone = third.get();
    third = std::move(second);
    CHECK(gradblend_reweight(gone, nullptr) == GRADBLEND_INVALID_ARGUMENT);
    CHECK(!second && works([&] { return third.step(plan); }));
    second = std::move(third);
    CHECK(second && !third && works([&] { return second.step(plan); }));
    Blender &same = second;
    second = std::move(same);
    CHECK(second && works([&] { return second.step(plan); }));
    std::swap(second, third);
    CHECK(third && !second && value(third.report()).observed == 4);

    Plan moved = std::move(plan);
    CHECK(!plan && plan.get() == nullptr && moved);
    CHECK(refused([&] { return third.step(plan); }) && refused([&] { return plan.update(tensors); }));
    CHECK(refused([&] { return plan.update(tensors.data(), tensors.size()); }));
    CHECK(works([&] { return third.step(moved); }));
    Plan live = value(third.plan(tensors));
    gradblend_plan *const gone_too = live.get();
    live = std::move(moved);
    CHECK(gradblend_plan_update(gone_too, tensors.data(), 1, nullptr) == GRADBLEND_INVALID_ARGUMENT);
    Plan &same_plan = live;
    live = std::move(same_plan);
    CHECK(live && works([&] { return third.step(live); }));

    // A plan outlives its blender, and is of no more use.
    third = Blender();
    Blender late = blender_of(2);
    CHECK(refused([&] { return late.step(live); }));
}

void updates() {
    Gradients gradients, others;
    others.video = {3, 1};
    Blender blender = blender_of(2);
    Tensors tensors = gradients.tensors();
    Plan plan = value(blender.plan(tensors));
    tensors.clear();
    CHECK(tensors.size() == 0);
    CHECK(works([&] { return others.add(tensors); }));
    CHECK(works([&] { return plan.update(tensors); }));
    CHECK(works([&] { return blender.blend(plan); }));
    CHECK(others.blended == std::vector<float>({1.75F, 1}) && gradients.blended == std::vector<float>({0, 0}));

    // An update that is refused leaves the plan as it was.
    CHECK(works([&] { return others.add(tensors); }));
    CHECK(refused([&] { return plan.update(tensors); }));
    CHECK(refused([&] { return plan.update(nullptr, 1); }));
    CHECK(works([&] { return blender.step(plan); }));
}

void names_the_culprit() {
    Gradients gradients;
    Blender blender = blender_of(2);
    Tensors tensors = gradients.tensors();
    const char *odd = reinterpret_cast<const char *>(gradients.video.data()) + 1;
    CHECK(works([&] {
        return tensors.add(1, GRADBLEND_F32, gradients.train.data(), gradients.valid.data(),
                           {gradients.video.data(), odd});
    }));
    CHECK(fails([&] { return blender.plan(tensors); }, GRADBLEND_INVALID_ARGUMENT, {"tensor 1", "modality 1"}));
    Tensors unpaired(2);
    CHECK(works([&] { return unpaired.add(2, gradients.train.data(), nullptr, {gradients.video.data(), nullptr}); }));
    CHECK(fails([&] { return blender.plan(unpaired); }, GRADBLEND_INVALID_ARGUMENT, {"tensor 0"}));

    // What the C functions cannot see: how many addresses there are.
    CHECK(fails([&] { return tensors.add(2, nullptr, nullptr, {gradients.video.data()}); }, GRADBLEND_INVALID_ARGUMENT,
                {"tensor 2", "expected 2", "got 1"}));
    CHECK(tensors.size() == 2);
    Tensors three(3);
    CHECK(works([&] { return three.add(2, nullptr, nullptr, {nullptr, nullptr, nullptr}); }));
    CHECK(fails([&] { return blender.plan(three); }, GRADBLEND_INVALID_ARGUMENT, {"expected 2", "got 3"}));
    Plan plan = value(blender.plan(gradients.tensors()));
    CHECK(fails([&] { return plan.update(three); }, GRADBLEND_INVALID_ARGUMENT, {"expected 2", "got 3"}));
}

void builds_tensors() {
    // Many more than a page, with absent gradients: modality p mod 4 is there, of 3, and so is none for every fourth.
    constexpr std::uint32_t modalities = 3;
    constexpr std::size_t count = 1000;
    std::vector<float> gradients(count), blended(count, -1);
    Tensors tensors(modalities);
    std::vector<const void *const *> arrays;
    for (std::size_t p = 0; p < count; p++) {
        gradients[p] = static_cast<float>(p + 1);
        const void *addresses[modalities] = {};
        const float *floats[modalities] = {};
        if (p % 4 < modalities) {
            addresses[p % 4] = floats[p % 4] = &gradients[p];
        }
        CHECK(works([&] {
            const float *const own = &gradients[p];
            return p % 2 == 0 ? tensors.add(1, own, own, floats, modalities, &blended[p])
                              : tensors.add(1, GRADBLEND_F32, own, own, addresses, modalities, &blended[p]);
        }));
        arrays.push_back(tensors.data()[p].modalities);
    }
    CHECK(tensors.size() == count && tensors.modalities() == modalities);
    Tensors moved = std::move(tensors);
    for (std::size_t p = 0; p < count; p++) {
        CHECK(moved.data()[p].modalities == arrays[p]);
        for (std::size_t k = 0; k < modalities; k++) {
            CHECK(arrays[p][k] == (k == p % 4 ? &gradients[p] : nullptr));
        }
    }
    Blender blender = blender_of(modalities);
    Plan plan = value(blender.plan(moved));
    CHECK(works([&] { return blender.set_weights({1, 2, 4}); }) && works([&] { return blender.blend(plan); }));
    for (std::size_t p = 0; p < count; p++) {
        const float weights[] = {1, 2, 4, 0};
        CHECK(blended[p] == weights[p % 4] * gradients[p]);
    }
    // Filled again, it uses the memory it has.
    const std::size_t before = allocations;
    moved.clear();
    for (std::size_t p = 0; p < count; p++) {
        CHECK(works([&] { return moved.add(1, nullptr, nullptr, {nullptr, &gradients[p], nullptr}, &blended[p]); }));
        CHECK(moved.data()[p].modalities == arrays[p]);
    }
    CHECK(works([&] { return plan.update(moved); }) && works([&] { return blender.step(plan); }));
    CHECK(allocations == before);
    CHECK(blended[0] == 2 && blended[999] == 2000);

    // Nothing at all is a plan too, and 16-bit numbers come by address only.
    const std::uint16_t half[] = {0x3c00, 0x4000};
    std::uint16_t out[] = {0, 0};
    CHECK(works([&] { return blender.plan(nullptr, 0); }) && works([&] { return blender.plan(Tensors(3)); }));
    moved.clear();
    CHECK(works([&] { return moved.add(2, GRADBLEND_F16, nullptr, nullptr, {half, nullptr, nullptr}, out); }));
    plan = value(blender.plan(moved));
    CHECK(works([&] { return blender.blend(plan); }) && std::memcmp(half, out, sizeof half) == 0);
}

} // namespace

// The layout of DLPack's unversioned struct; frameworks hand it over ready-made.
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

DLManagedTensor array(std::vector<float> &values, std::int64_t *shape) {
    // The library calls no deleter: a call would end the test.
    const auto deleter = [](DLManagedTensor *managed) { CHECK(managed == nullptr); };
    return {values.data(), 1, 0, 1, 2, 32, 1, shape, nullptr, 0, nullptr, deleter};
}

void takes_dlpack() {
    Gradients gradients;
    std::int64_t shape = 2;
    DLManagedTensor arrays[] = {array(gradients.train, &shape), array(gradients.valid, &shape),
                                array(gradients.video, &shape), array(gradients.audio, &shape),
                                array(gradients.blended, &shape)};
    const gradblend_dlpack train{&arrays[0], nullptr}, valid{&arrays[1], nullptr}, blended{&arrays[4], nullptr};
    const gradblend_dlpack both[] = {{&arrays[2], nullptr}, {&arrays[3], nullptr}};
    const gradblend_dlpack one[] = {{nullptr, nullptr}, {&arrays[3], nullptr}};
    Blender blender = blender_of(2);
    Tensors tensors(2);
    CHECK(works([&] { return tensors.from_dlpack(GRADBLEND_CPU, &train, &valid, both, 2, &blended); }));
    CHECK(works([&] { return tensors.from_dlpack(GRADBLEND_CPU, nullptr, nullptr, one, 2); }));
    CHECK(tensors.size() == 2 && tensors.data()[0].modalities[1] == gradients.audio.data());
    CHECK(tensors.data()[1].modalities[0] == nullptr && tensors.data()[1].train == nullptr);
    const Plan plan = value(blender.plan(tensors));
    CHECK(works([&] { return blender.step(plan); }) && works([&] { return blender.reweight(); }));
    CHECK(has_weights(blender, 0.8, 0.2) && gradients.blended[0] == 0.75F);

    CHECK(refused([&] { return tensors.from_dlpack(GRADBLEND_CPU, &train, &valid, both, 1); }));
    arrays[3].bits = 64;
    CHECK(fails([&] { return tensors.from_dlpack(GRADBLEND_CPU, &train, &valid, both, 2); },
                GRADBLEND_INVALID_ARGUMENT, {"modality 1"}));
    CHECK(tensors.size() == 2);
}

} // namespace

int main() {
    configures();
    solves();
    steps();
    scales();
    saves();
    moves();
    updates();
    names_the_culprit();
    builds_tensors();
    takes_dlpack();
#if defined(__cpp_exceptions)
    CHECK(Blender(GRADBLEND_CPU, gradblend::config(2)).modalities() == 2);
    CHECK(refused([] { return Blender(GRADBLEND_CPU, gradblend_config{}); }));
    std::puts("raii: all well, with exceptions");
#else
    std::puts("raii: all well, without exceptions");
#endif
    return 0;
}
