/*
 * RAII classes for gradblend.h, which documents the functions and letters. Header only, C++17 or later.
 *
 *     gradblend::Blender blender = gradblend::Blender::create(GRADBLEND_CPU, gradblend::config(2));
 *     gradblend::Tensors tensors(2);
 *     tensors.add(len, t, g, {audio, video}, blended);
 *     gradblend::Plan plan = blender.plan(tensors);
 *     blender.step(plan, stream);
 *
 * Errors.    With exceptions, as above, functions throw Error. With -fno-exceptions they return a Result: a value or an
 *            Error. Return<T> is T or Result<T>. The two variants live in inline namespaces of different names, so that
 *            translation units of both kinds can be linked into one program. To declare a class ahead, name its namespace:
 *            namespace gradblend { inline namespace with_exceptions { class Blender; } }. Each method only calls the C
 *            function; the header allocates memory for vectors and error messages alone.
 * Ownership. A Blender and a Plan own their handle and nothing else. Gradients and streams stay the caller's, and
 *            gradients must stay valid until the plan is updated or destroyed. A plan and its blender may be destroyed
 *            in either order.
 * Moving.    A moved-from or default-constructed Blender or Plan is empty: it may be assigned to and destroyed, and every
 *            operation on it is the error GRADBLEND_INVALID_ARGUMENT.
 * Threads.   Const methods may run at the same time on one object; any other method runs alone. Functions: any thread.
 * Streams.   As in gradblend.h; the default is the legacy default stream, and the CPU ignores it.
 *
 * Licence: MIT OR Apache-2.0.
 */
#ifndef GRADBLEND_HPP
#define GRADBLEND_HPP

#if __cplusplus < 201703L && !(defined(_MSVC_LANG) && _MSVC_LANG >= 201703L)
#error "gradblend.hpp needs C++17 or later"
#endif

#include "gradblend.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace gradblend {

#if defined(__cpp_exceptions)
inline namespace with_exceptions {

// The error of a call: its status, and a what() of the status name and the library's message.
class Error : public std::runtime_error {
public:
    Error(gradblend_status status, const std::string &message)
        : std::runtime_error(gradblend_status_name(status) + (": " + message)), status_(status) {}
    gradblend_status status() const noexcept { return status_; }

private:
    gradblend_status status_;
};

// The return type of a function with a result of type T.
template <typename T>
using Return = T;

#else
inline namespace without_exceptions {

// The error of a call: its status, and a what() of the status name and the library's message. By default no error:
// GRADBLEND_OK and an empty text.
class Error {
public:
    Error() = default;
    Error(gradblend_status status, const std::string &message)
        : status_(status), what_(gradblend_status_name(status) + (": " + message)) {}
    gradblend_status status() const noexcept { return status_; }
    const char *what() const noexcept { return what_.c_str(); }

private:
    gradblend_status status_ = GRADBLEND_OK;
    std::string what_;
};

// Success or an Error; error() of a success is a default Error.
template <typename T>
class Result;

template <>
class [[nodiscard]] Result<void> {
public:
    Result() = default;
    Result(Error error) : error_(std::move(error)) {}
    bool has_value() const noexcept { return error_.status() == GRADBLEND_OK; }
    explicit operator bool() const noexcept { return has_value(); }
    const Error &error() const noexcept { return error_; }
    // Prints an error and aborts the process if there is one.
    void value() const {
        if (!has_value()) {
            std::fprintf(stderr, "%s\n", error_.what());
            std::abort();
        }
    }

private:
    Error error_;
};

// A value or an Error; value() of an Error prints it and aborts the process.
template <typename T>
class [[nodiscard]] Result : public Result<void> {
public:
    Result(T value) : value_(std::move(value)) {}
    Result(Error error) : Result<void>(std::move(error)) {}
    T &value() & { return Result<void>::value(), value_.value(); }
    const T &value() const & { return Result<void>::value(), value_.value(); }
    T &&value() && { return std::move(value()); }

private:
    std::optional<T> value_;
};

// The return type of a function with a result of type T.
template <typename T>
using Return = Result<T>;

#endif

namespace detail {

template <typename T>
Return<T> fail(gradblend_status status, const std::string &message) {
#if defined(__cpp_exceptions)
    throw Error(status, message);
#else
    return Error(status, message);
#endif
}

// The message of the last call on this thread that failed.
inline std::string last_error() {
    std::string message(gradblend_last_error(nullptr, 0), '\0');
    // A std::string has one more byte for the terminating 0 that the library writes.
    gradblend_last_error(message.data(), message.size() + 1);
    return message;
}

// Converts a status to the return type. `value` is a reference: the call that returns the status writes to it.
inline Return<void> outcome(gradblend_status status) {
    return status == GRADBLEND_OK ? Return<void>() : fail<void>(status, last_error());
}

template <typename T>
Return<T> outcome(gradblend_status status, T &value) {
    return status == GRADBLEND_OK ? Return<T>(std::move(value)) : fail<T>(status, last_error());
}

// The C functions do not know the length of arrays; these checks do.
template <typename T>
Return<T> wrong_count(const std::string &what, std::size_t got, std::size_t expected) {
    return fail<T>(GRADBLEND_INVALID_ARGUMENT,
                   what + ": expected " + std::to_string(expected) + ", got " + std::to_string(got));
}

struct Destroy {
    void operator()(gradblend_blender *blender) const noexcept { gradblend_blender_destroy(blender); }
    void operator()(gradblend_plan *plan) const noexcept { gradblend_plan_destroy(plan); }
};

} // namespace detail

// The defaults for K = `modalities`. Errors: INVALID_ARGUMENT.
[[nodiscard]] inline Return<gradblend_config> config(std::uint32_t modalities) {
    gradblend_config defaults{};
    return detail::outcome(gradblend_config_default(modalities, &defaults), defaults);
}

// K weights, and GRADBLEND_FLAG_*.
struct Solution {
    std::vector<double> weights;
    std::uint32_t flags;
};

// gradblend_solve for K numerators and a K x K second moment. `in_force` has the K weights to return with HELD, or is
// empty for 1/K each. Errors: INVALID_ARGUMENT.
[[nodiscard]] inline Return<Solution> solve(const gradblend_config &config, const std::vector<double> &numerator,
                                            const std::vector<double> &second_moment,
                                            const std::vector<double> &in_force = {}) {
    const std::size_t modalities = config.modalities;
    if (numerator.size() != modalities) {
        return detail::wrong_count<Solution>("numerators", numerator.size(), modalities);
    }
    if (second_moment.size() != modalities * modalities) {
        return detail::wrong_count<Solution>("second moments", second_moment.size(), modalities * modalities);
    }
    if (!in_force.empty() && in_force.size() != modalities) {
        return detail::wrong_count<Solution>("weights in force", in_force.size(), modalities);
    }
    Solution solution{std::vector<double>(modalities), 0};
    const gradblend_status status =
        gradblend_solve(&config, numerator.data(), second_moment.data(), in_force.empty() ? nullptr : in_force.data(),
                        solution.weights.data(), &solution.flags);
    return detail::outcome(status, solution);
}

// Collects the tensors of a plan, and owns the address arrays that they point to; gradients stay the caller's. data() is
// valid until the next add; the address arrays do not move until destruction, whatever is added or moved. A plan copies
// what it needs, so the builder may be destroyed, or cleared and filled again for an update. Errors: INVALID_ARGUMENT
// for a number of modality gradients other than K; nothing is added then.
class Tensors {
public:
    explicit Tensors(std::uint32_t modalities) : modalities_(modalities) {}
    Tensors(Tensors &&) noexcept = default;
    Tensors &operator=(Tensors &&) noexcept = default;

    // Adds one tensor: `len` elements of `dtype`, t, g, the K addresses v_k, and the output. nullptr is absent.
    Return<void> add(std::uint64_t len, std::int32_t dtype, const void *train, const void *valid,
                     std::initializer_list<const void *> modalities, void *blended = nullptr) {
        return push(len, dtype, train, valid, modalities.begin(), modalities.size(), blended);
    }

    // The same with an array of `count` addresses, which is copied.
    Return<void> add(std::uint64_t len, std::int32_t dtype, const void *train, const void *valid,
                     const void *const *modalities, std::size_t count, void *blended) {
        return push(len, dtype, train, valid, modalities, count, blended);
    }

    // The same for floats.
    Return<void> add(std::uint64_t len, const float *train, const float *valid,
                     std::initializer_list<const float *> modalities, float *blended = nullptr) {
        return push(len, GRADBLEND_F32, train, valid, modalities.begin(), modalities.size(), blended);
    }

    // The same for floats, with an array of `count` addresses.
    Return<void> add(std::uint64_t len, const float *train, const float *valid, const float *const *modalities,
                     std::size_t count, float *blended) {
        return push(len, GRADBLEND_F32, train, valid, modalities, count, blended);
    }

    // The same from DLPack arrays of any framework, without a copy; each may be absent. The arrays stay the caller's.
    Return<void> from_dlpack(std::int32_t device, const gradblend_dlpack *train, const gradblend_dlpack *valid,
                             const gradblend_dlpack *gradients, std::size_t count,
                             const gradblend_dlpack *blended = nullptr) {
        if (count != modalities_) {
            return wrong_count(count);
        }
        gradblend_tensor tensor{};
        const gradblend_status status = gradblend_tensor_from_dlpack(device, modalities_, train, valid, gradients,
                                                                     blended, next_addresses(), &tensor);
        if (status == GRADBLEND_OK) {
            tensors_.push_back(tensor);
        }
        return detail::outcome(status);
    }

    // Removes the tensors and keeps the memory: adding as many again allocates nothing.
    void clear() noexcept { tensors_.clear(); }
    const gradblend_tensor *data() const noexcept { return tensors_.data(); }
    std::size_t size() const noexcept { return tensors_.size(); }
    // K.
    std::uint32_t modalities() const noexcept { return modalities_; }

private:
    template <typename Address>
    Return<void> push(std::uint64_t len, std::int32_t dtype, const void *train, const void *valid,
                      const Address *modalities, std::size_t count, void *blended) {
        if (count != modalities_) {
            return wrong_count(count);
        }
        const void **addresses = next_addresses();
        std::copy(modalities, modalities + count, addresses);
        tensors_.push_back({len, dtype, train, valid, addresses, blended});
        return Return<void>();
    }

    Return<void> wrong_count(std::size_t count) const {
        const std::string tensor = "tensor " + std::to_string(size());
        return detail::wrong_count<void>(tensor + ": modality gradients", count, modalities_);
    }

    // Memory for K addresses, in pages that never move: tensors point to it, and a growing array would be reallocated.
    const void **next_addresses() {
        const std::size_t page = size() / page_len, at = size() % page_len;
        if (page == pages_.size()) {
            pages_.emplace_back(page_len * modalities_);
        }
        return pages_[page].data() + at * modalities_;
    }

    static constexpr std::size_t page_len = 64;
    std::uint32_t modalities_;
    std::vector<gradblend_tensor> tensors_;
    std::vector<std::vector<const void *>> pages_;
};

// A checked list of tensors, for the blender that created it.
class Plan {
public:
    Plan() noexcept = default;

    // Replaces the addresses for the same count, lengths and dtypes. Does not allocate or synchronize. Errors:
    // INVALID_ARGUMENT, naming tensor and modality, and the plan is unchanged; CUDA.
    Return<void> update(const gradblend_tensor *tensors, std::uint64_t count, void *stream = nullptr) {
        return detail::outcome(gradblend_plan_update(handle_.get(), tensors, count, stream));
    }

    Return<void> update(const Tensors &tensors, void *stream = nullptr) {
        if (handle_ && tensors.modalities() != modalities_) {
            return detail::wrong_count<void>("K of the tensors", tensors.modalities(), modalities_);
        }
        return update(tensors.data(), tensors.size(), stream);
    }

    // False for an empty object.
    explicit operator bool() const noexcept { return handle_ != nullptr; }
    // The handle, for the functions of gradblend.h; this object keeps the ownership.
    gradblend_plan *get() const noexcept { return handle_.get(); }

private:
    friend class Blender;
    Plan(gradblend_plan *handle, std::uint32_t modalities) noexcept : handle_(handle), modalities_(modalities) {}

    std::unique_ptr<gradblend_plan, detail::Destroy> handle_;
    std::uint32_t modalities_ = 0;
};

// Device address of the 2K pending sums: c_0 .. c_K-1, then d_0 .. d_K-1.
struct PendingSums {
    double *sums;
    std::uint32_t count;
};

// Estimates the weights of K losses from their gradients, and blends the gradients with these weights. Each method
// calls the function of gradblend.h of the same name and has its errors. The destructor waits for pending work.
class Blender {
public:
    Blender() noexcept = default;

    // Creates a blender with weights of 1/K and no observation, on GRADBLEND_CPU or a CUDA device.
    [[nodiscard]] static Return<Blender> create(std::int32_t device, const gradblend_config &config) {
        gradblend_blender *blender = nullptr;
        const gradblend_status status = gradblend_blender_create(device, &config, &blender);
        Blender made(blender, config.modalities);
        return detail::outcome(status, made);
    }

#if defined(__cpp_exceptions)
    Blender(std::int32_t device, const gradblend_config &config) : Blender(create(device, config)) {}
#endif

    // Checks `count` tensors and creates a plan for them. Errors name tensor and modality.
    [[nodiscard]] Return<Plan> plan(const gradblend_tensor *tensors, std::uint64_t count) const {
        gradblend_plan *plan = nullptr;
        const gradblend_status status = gradblend_plan_create(handle_.get(), tensors, count, &plan);
        Plan made(plan, modalities_);
        return detail::outcome(status, made);
    }

    [[nodiscard]] Return<Plan> plan(const Tensors &tensors) const {
        if (handle_ && tensors.modalities() != modalities_) {
            return detail::wrong_count<Plan>("K of the tensors", tensors.modalities(), modalities_);
        }
        return plan(tensors.data(), tensors.size());
    }

    // One pass over memory; `what` is any combination of GRADBLEND_DOT, _BLEND, _ACCUMULATE (with _BLEND) and _OBSERVE.
    Return<void> pass(const Plan &plan, std::uint32_t what, void *stream = nullptr) {
        return detail::outcome(gradblend_pass(handle_.get(), plan.get(), what, stream));
    }

    Return<void> dot(const Plan &plan, void *stream = nullptr) {
        return detail::outcome(gradblend_dot(handle_.get(), plan.get(), stream));
    }

    Return<void> observe(void *stream = nullptr) { return detail::outcome(gradblend_observe(handle_.get(), stream)); }
    Return<void> reweight(void *stream = nullptr) { return detail::outcome(gradblend_reweight(handle_.get(), stream)); }

    Return<void> blend(const Plan &plan, void *stream = nullptr) {
        return detail::outcome(gradblend_blend(handle_.get(), plan.get(), stream));
    }

    // dot, blend with the weights in force at entry, observe: one pass over memory.
    Return<void> step(const Plan &plan, void *stream = nullptr) {
        return detail::outcome(gradblend_step(handle_.get(), plan.get(), stream));
    }

    // Starts a new super-epoch: zeroes all state except the weights.
    Return<void> reset(void *stream = nullptr) { return detail::outcome(gradblend_reset(handle_.get(), stream)); }

    // Puts K weights in force as given, with any signs and any sum.
    Return<void> set_weights(const std::vector<double> &weights, void *stream = nullptr) {
        const auto count = static_cast<std::uint32_t>(std::min<std::size_t>(weights.size(), UINT32_MAX));
        return detail::outcome(gradblend_set_weights(handle_.get(), weights.data(), count, stream));
    }

    // Sets the device address (the caller's memory) of the factor by which gradients are scaled. nullptr is 1.
    Return<void> set_grad_scale(const float *scale) {
        return detail::outcome(gradblend_set_grad_scale(handle_.get(), scale));
    }

    // The state of the blender. Synchronizes `stream`.
    [[nodiscard]] Return<gradblend_report> report(void *stream = nullptr) {
        gradblend_report report{};
        report.size = sizeof report;
        // A library of 0.1.0 does not write them.
        std::fill_n(report.standard_error, GRADBLEND_MAX_MODALITIES, std::numeric_limits<double>::infinity());
        return detail::outcome(gradblend_get_report(handle_.get(), &report, stream), report);
    }

    // S, K x K, row-major. Synchronizes `stream`.
    [[nodiscard]] Return<std::vector<double>> second_moments(void *stream = nullptr) {
        std::vector<double> moments(std::size_t{modalities()} * modalities());
        return detail::outcome(gradblend_get_second_moments(handle_.get(), moments.data(), stream), moments);
    }

    // Device address of the K weights in force: the blender's memory. gradblend.h says when it may be read.
    [[nodiscard]] Return<const float *> device_weights() const {
        const float *weights = nullptr;
        return detail::outcome(gradblend_device_weights(handle_.get(), &weights), weights);
    }

    // The pending sums, the blender's memory, which a sharded trainer all-reduces between dot and observe.
    [[nodiscard]] Return<PendingSums> pending_sums() const {
        PendingSums pending{};
        return detail::outcome(gradblend_pending_sums(handle_.get(), &pending.sums, &pending.count), pending);
    }

    // The whole state. Synchronizes `stream`.
    [[nodiscard]] Return<std::vector<unsigned char>> save(void *stream = nullptr) {
        std::size_t bytes = 0;
        gradblend_status status = gradblend_save(handle_.get(), nullptr, &bytes, stream);
        std::vector<unsigned char> state(bytes);
        if (status == GRADBLEND_OK) {
            status = gradblend_save(handle_.get(), state.data(), &bytes, stream);
        }
        return detail::outcome(status, state);
    }

    // Restores a state written by save. After an error the blender is unchanged.
    Return<void> load(const void *state, std::size_t bytes, void *stream = nullptr) {
        return detail::outcome(gradblend_load(handle_.get(), state, bytes, stream));
    }

    Return<void> load(const std::vector<unsigned char> &state, void *stream = nullptr) {
        // The data() of an empty vector may be nullptr; the error must be CORRUPT_STATE, not a NULL argument.
        static const unsigned char nothing = 0;
        return load(state.empty() ? &nothing : state.data(), state.size(), stream);
    }

    // False for an empty object.
    explicit operator bool() const noexcept { return handle_ != nullptr; }
    // The handle, for the functions of gradblend.h; this object keeps the ownership.
    gradblend_blender *get() const noexcept { return handle_.get(); }
    // K; 0 for an empty object.
    std::uint32_t modalities() const noexcept { return handle_ ? modalities_ : 0; }

private:
    Blender(gradblend_blender *handle, std::uint32_t modalities) noexcept : handle_(handle), modalities_(modalities) {}

    std::unique_ptr<gradblend_blender, detail::Destroy> handle_;
    std::uint32_t modalities_ = 0;
};

} // inline namespace with_exceptions or without_exceptions
} // namespace gradblend

#endif
