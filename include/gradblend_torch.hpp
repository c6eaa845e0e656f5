/*
 * Gradient-Blending in a training loop of libtorch: backward takes the place of loss.backward(). Header only, C++17 or later,
 * with exceptions; built against PyTorch with or without CUDA.
 *
 *     gradblend::torch::GradBlend gb(model->named_parameters(), gradblend::torch::GradBlendConfig(3).every(10));
 *     ...
 *     optimizer.zero_grad();
 *     gb.backward({audio_loss, video_loss, fused_loss}, [&] { return fused_loss_of(next_held_out_batch()); });
 *     optimizer.step();
 *
 * Names and defaults are those of the Python package, whose README and docs/method.md say what each option is for. Errors
 * are gradblend::Error; they name the loss or the parameter, and .grad and the state have not changed. Exceptions of held_out,
 * train and hooks pass through. Graphs that backward passes have run through are used up, and calls that do not observe leave
 * .grad to autograd. The namespace is called torch, so `using namespace gradblend` hides the other one.
 *
 * Licence: MIT OR Apache-2.0.
 */
#ifndef GRADBLEND_TORCH_HPP
#define GRADBLEND_TORCH_HPP

#include "gradblend.hpp"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/torch.h>

#include <functional>
#include <set>
#include <sstream>

namespace gradblend {
inline namespace with_exceptions {
namespace torch {

using at::Tensor;

// Options of a GradBlend.
class GradBlendConfig {
public:
    // K losses, of which the last is the fused one.
    explicit GradBlendConfig(std::uint32_t num_losses) : blender_(gradblend::config(num_losses)) {}

    // Observe at the first call, then at each `every`-th.
    GradBlendConfig &every(std::int64_t every) { return every_ = every, *this; }
    // Reweight at the end of a super-epoch, in end_epoch: the first has `warm_up` epochs, the others `super_epoch`.
    GradBlendConfig &online(std::int64_t warm_up, std::int64_t super_epoch) {
        return online_ = {warm_up, super_epoch}, scheduled_ = true, *this;
    }
    // No call observes: the weights are those of set_weights.
    GradBlendConfig &offline() { return online_.reset(), scheduled_ = true, *this; }
    // K least weights. They bound the weights that are found; the first weights are 1/K.
    GradBlendConfig &min_weight(std::vector<double> least) { return min_weight_ = std::move(least), *this; }
    // GRADBLEND_UNCORRELATED or GRADBLEND_CORRELATED.
    GradBlendConfig &overfitting(std::uint32_t overfitting) { return blender_.overfitting = overfitting, *this; }
    // GRADBLEND_CLAMP or GRADBLEND_SIGNED.
    GradBlendConfig &negative(std::uint32_t negative) { return blender_.negative = negative, *this; }
    GradBlendConfig &damping(double damping) { return blender_.damping = damping, *this; }
    // GRADBLEND_EMA or GRADBLEND_MEAN.
    GradBlendConfig &average(std::uint32_t average) { return blender_.average = average, *this; }
    GradBlendConfig &decay(double decay) { return blender_.decay = decay, *this; }
    // GRADBLEND_EVERY_OBSERVATION, the default without a schedule, or GRADBLEND_ON_REQUEST: in reweight.
    GradBlendConfig &cadence(std::uint32_t cadence) { return cadence_ = cadence, *this; }
    // CPU threads; by default those of PyTorch.
    GradBlendConfig &threads(std::uint32_t threads) { return threads_ = threads, *this; }

private:
    friend class GradBlend;
    gradblend_config blender_;
    std::int64_t every_ = 1;
    bool scheduled_ = false;
    std::optional<std::pair<std::int64_t, std::int64_t>> online_;
    std::vector<double> min_weight_;
    std::optional<std::uint32_t> cadence_, threads_;
};

// Weights the K losses of a multi-modal network by how each overfits, and leaves the blended gradient in .grad.
//
// An observing call (the first, then each every-th) runs one backward pass for each loss and one for the held-out loss, blends
// with the weights in force, and updates the moments and the weights. Any other call runs one backward pass on sum_k w_k L_k,
// without the losses of weight 0. Either adds to .grad as backward does.
class GradBlend {
public:
    using Closure = std::function<Tensor()>;
    using OnObservation = std::function<void(const gradblend_report &)>;
    using OnSums = std::function<void(Tensor)>;

    // `parameters` are leaves of float32, float16 or bfloat16 on one device. Frozen ones are left alone as long as they are frozen.
    GradBlend(const ::torch::OrderedDict<std::string, Tensor> &parameters, const GradBlendConfig &config)
        : GradBlend(named(parameters), config) {}
    GradBlend(const std::vector<Tensor> &parameters, const GradBlendConfig &config)
        : GradBlend(numbered(parameters), config) {}

    // Adds the gradient of sum_k w_k L_k to .grad. Returns whether the call observed.
    //
    // `losses` are K scalars with graphs; the last is the fused loss, whose graph is freed. `held_out` computes the fused loss on
    // a held-out batch, `train` on a training batch drawn independently of that of `losses`; observing calls alone call them.
    // Without `train` t is the gradient of the fused loss in `losses`: cheaper, but the noise of that batch counts as
    // overfitting of the fused loss, which lowers its weight.
    bool backward(const std::vector<Tensor> &losses, const Closure &held_out, const Closure &train = nullptr) {
        require(!running_, "backward was called by held_out or train of another call: return the loss instead");
        const Running running(running_);
        require(losses.size() == modalities(), "there are ", losses.size(), " losses, expected ", modalities());
        for (std::size_t k = 0; k < losses.size(); k++) {
            check_loss("losses[" + std::to_string(k) + "]", losses[k]);
        }
        const std::vector<Tensor> trained = check_parameters();
        // As backward does, also where gradients are switched off.
        const at::AutoGradMode enabled(true);
        const bool observes = this->observes();
        if (observes) {
            observe(losses, held_out, train, trained);
        } else {
            weighted(losses, trained);
        }
        calls_ += 1;
        observations_ += observes;
        if (observes && on_observation_) {
            on_observation_(report());
        }
        return observes;
    }

    // Whether the next call observes.
    bool observes() const { return !(scheduled_ && !online_) && calls_ % static_cast<std::uint64_t>(every_) == 0; }
    std::uint32_t modalities() const { return blender_.modalities(); }
    // Calls that observed, skipped observations included.
    std::uint64_t observations() const { return observations_; }
    // Gradients that were copied so far: those of one parameter that are not dense, or differ in their strides.
    std::uint64_t copied() const { return copied_; }
    // The operations that this object is made of.
    Blender &blender() { return host_ = Tensor(), blender_; }
    // Calls `function` with a report after each observation. On CUDA the report synchronizes the stream.
    void on_observation(OnObservation function) { on_observation_ = std::move(function); }

    // On several ranks: calls `function` in each observing call with the 2K products, a float64 tensor in the blender's memory, for
    // an all-reduce between the ranks. On CUDA it submits work to the current stream. If it throws, nothing is observed.
    void on_sums(OnSums function) { on_sums_ = std::move(function); }

    // w_k in force: a new float32 tensor of shape [K] on the parameters' device. Call it on the stream of the training loop.
    Tensor weights() const { return in_force().clone(); }

    // Moments, weights, ratios and counters. On CUDA it synchronizes the stream.
    gradblend_report report() { return blender_.report(stream()); }

    // Puts K weights in force as given, until the next reweight: with offline(), for good.
    void set_weights(const std::vector<double> &weights) { blender_.set_weights(weights, stream()), host_ = Tensor(); }

    // Solves for the weights of the moments now.
    void reweight() { blender_.reweight(stream()), host_ = Tensor(); }

    // Tells the schedule that this epoch, counted from 0, has ended. At the end of a super-epoch reweights from its
    // observations, starts the next one, and returns the report of the one that ended, with the new weights.
    std::optional<gradblend_report> end_epoch(std::int64_t epoch) {
        require(epoch >= 0, "epoch is ", epoch, ", expected at least 0");
        if (!online_ || epoch + 1 < online_->first || (epoch + 1 - online_->first) % online_->second != 0) {
            return std::nullopt;
        }
        reweight();
        const gradblend_report ended = report();
        blender_.reset(stream());
        return ended;
    }

    // Multiplies losses by this factor before their backward passes, for gradients of 16 bits. Those in .grad are scaled by it,
    // and the moments are not.
    void set_grad_scale(float scale) {
        require(std::isfinite(scale) && scale != 0, "grad_scale is ", scale, ", expected a finite number other than 0");
        scale_ = scale;
        scale_tensor_ = at::full({}, scale, at::TensorOptions(device_).dtype(at::kFloat));
        blender_.set_grad_scale(scale_tensor_.const_data_ptr<float>());
    }

    // The moments, the weights and the position among calls: load continues bit for bit.
    std::vector<unsigned char> save() {
        std::vector<unsigned char> saved = blender_.save(stream());
        append(saved, calls_, 8);
        append(saved, checksum(saved.data(), saved.size()), 4);
        return saved;
    }

    // Restores a state of save, of any device. After an error nothing has changed.
    void load(const std::vector<unsigned char> &saved) {
        const std::size_t size = saved.size();
        const bool whole = size > 12 && read(&saved[size - 4], 4) == checksum(saved.data(), size - 4);
        require<GRADBLEND_CORRUPT_STATE>(whole, "not a saved state of a GradBlend");
        blender_.load(saved.data(), size - 12, stream());
        calls_ = read(&saved[size - 12], 8);
        host_ = Tensor();
    }

private:
    // One gradient for each parameter, undefined where a loss does not reach it.
    using Gradients = std::vector<Tensor>;
    using Named = std::vector<std::pair<std::string, Tensor>>;

    template <gradblend_status status = GRADBLEND_INVALID_ARGUMENT, typename... Part>
    static void require(bool condition, const Part &...parts) {
        if (!condition) {
            std::ostringstream message;
            (message << ... << parts);
            throw Error(status, message.str());
        }
    }

    // Sets a flag as long as a call runs.
    struct Running {
        bool &flag;
        explicit Running(bool &flag) : flag(flag) { flag = true; }
        ~Running() { flag = false; }
    };

    // Whether a tensor is like a parameter was when it was given.
    bool like(const Tensor &tensor, std::size_t i) const {
        return tensor.scalar_type() == given_[i].scalar_type() && tensor.device() == device_ &&
               tensor.sizes() == given_[i].sizes();
    }

    static std::string described(const Tensor &tensor) {
        std::ostringstream text;
        text << tensor.scalar_type() << ' ' << tensor.sizes() << " on " << tensor.device();
        return text.str();
    }

    static Named named(const ::torch::OrderedDict<std::string, Tensor> &parameters) {
        Named all;
        for (const auto &item : parameters) {
            all.emplace_back(item.key(), item.value());
        }
        return all;
    }

    static Named numbered(const std::vector<Tensor> &parameters) {
        Named all;
        for (const Tensor &parameter : parameters) {
            all.emplace_back("parameter " + std::to_string(all.size()), parameter);
        }
        return all;
    }

    static std::int32_t dtype(const Tensor &tensor) {
        switch (tensor.scalar_type()) {
        case at::kFloat:
            return GRADBLEND_F32;
        case at::kHalf:
            return GRADBLEND_F16;
        case at::kBFloat16:
            return GRADBLEND_BF16;
        default:
            return -1;
        }
    }

    GradBlend(const Named &all, const GradBlendConfig &config)
        : every_(config.every_), scheduled_(config.scheduled_), online_(config.online_) {
        bool any = false;
        for (const auto &[name, parameter] : all) {
            require(parameter.defined(), name, " is undefined");
            if (parameter.requires_grad() && !any) {
                device_ = parameter.device();
                any = true;
            }
        }
        require(any, "there is no parameter to train");
        require(device_.is_cpu() || device_.is_cuda(), "the parameters are on ", device_, ", expected the CPU or a CUDA device");
        std::set<const void *> seen; // a tied parameter counts once
        for (const auto &[name, parameter] : all) {
            if (!seen.insert(parameter.unsafeGetTensorImpl()).second) {
                continue;
            }
            if (parameter.requires_grad()) {
                check_trainable(name, parameter);
            }
            if (trainable(parameter)) {
                names_.push_back(name);
                parameters_.push_back(parameter);
                // Its shape and dtype, without its memory.
                given_.push_back(at::empty(parameter.sizes(), parameter.options().device(at::kMeta).requires_grad(false)));
            } else {
                frozen_.emplace_back(name, parameter);
            }
        }
        require(every_ > 0, "every is ", every_, ", expected at least 1");
        require(!online_ || (online_->first > 0 && online_->second > 0), "a super-epoch has at least 1 epoch");
        gradblend_config blender = config.blender_;
        const std::size_t least = config.min_weight_.size();
        require(least == 0 || least == blender.modalities, "min_weight has ", least, " numbers, expected ", blender.modalities);
        std::copy(config.min_weight_.begin(), config.min_weight_.end(), blender.min_weight);
        const std::uint32_t by_schedule = scheduled_ ? GRADBLEND_ON_REQUEST : GRADBLEND_EVERY_OBSERVATION;
        blender.cadence = config.cadence_.value_or(by_schedule);
        blender.threads = config.threads_.value_or(static_cast<std::uint32_t>(at::get_num_threads()));
        blender_ = Blender(device_.is_cuda() ? device_.index() : GRADBLEND_CPU, blender);
    }

    // PyTorch's current stream, whose handle needs no header of CUDA.
    void *stream() const {
        return device_.is_cuda() ? c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(device_).native_handle() : nullptr;
    }

    // The weights in the blender's memory.
    Tensor in_force() const {
        const auto options = at::TensorOptions(device_).dtype(at::kFloat);
        return at::from_blob(const_cast<float *>(blender_.device_weights()), {modalities()}, options);
    }

    bool trainable(const Tensor &parameter) const {
        return parameter.is_leaf() && parameter.layout() == at::kStrided && dtype(parameter) >= 0 && parameter.device() == device_;
    }

    void check_trainable(const std::string &name, const Tensor &parameter) const {
        require(parameter.is_leaf(), name, " is computed from other tensors, expected a leaf");
        require(parameter.layout() == at::kStrided, name, " is sparse, expected a dense tensor");
        require(dtype(parameter) >= 0, name, " is ", described(parameter), ", expected float32, float16 or bfloat16");
        require(parameter.device() == device_, name, " is on ", parameter.device(), ", expected ", device_, " as the first one");
    }

    // What a gradient of parameter i is, in words.
    std::string expected(std::size_t i) const {
        std::ostringstream text;
        text << given_[i].scalar_type() << ' ' << given_[i].sizes() << " on " << device_;
        return text.str();
    }

    // Rejects a .grad that cannot be added to.
    void check_grad(std::size_t i, const Tensor &grad) const {
        const auto expanded = [&] {
            for (std::int64_t d = 0; d < grad.dim(); d++) {
                if (grad.stride(d) == 0 && grad.size(d) > 1) {
                    return true;
                }
            }
            return false;
        };
        require(grad.layout() == at::kStrided, names_[i], ".grad is sparse, expected a dense tensor");
        require(like(grad, i), names_[i], ".grad is ", described(grad), ", expected ", expected(i));
        require(!grad.is_inference() && !expanded(), names_[i],
                ".grad cannot be added to: it is expanded, or an inference tensor");
    }

    static void check_loss(const std::string &what, const Tensor &loss) {
        require(loss.defined(), what, " is undefined");
        require(loss.numel() == 1 && loss.is_floating_point(), what, " is ", described(loss), ", expected a floating-point scalar");
        require(loss.requires_grad(), what, " has no graph: it is detached, or was computed without gradients");
    }

    std::vector<Tensor> check_parameters() const {
        for (const auto &[name, parameter] : frozen_) {
            if (parameter.requires_grad()) {
                check_trainable(name, parameter);
            }
        }
        std::vector<Tensor> trained;
        for (std::size_t i = 0; i < parameters_.size(); i++) {
            require(like(parameters_[i], i), names_[i], " was ", expected(i), " and is ", described(parameters_[i]));
            if (parameters_[i].requires_grad()) {
                trained.push_back(parameters_[i]);
            }
        }
        require(!trained.empty(), "no parameter requires a gradient");
        return trained;
    }

    void weighted(const std::vector<Tensor> &losses, const std::vector<Tensor> &trained) {
        if (!host_.defined()) {
            host_ = in_force().cpu(); // synchronizes on CUDA, once after each change
        }
        const Tensor weights = in_force();
        std::vector<Tensor> terms;
        for (std::size_t k = 0; k < losses.size(); k++) {
            if (host_[static_cast<std::int64_t>(k)].item<float>() != 0) { // 0 times an infinity is NaN
                terms.push_back(losses[k].reshape({}).to(device_) * (weights[static_cast<std::int64_t>(k)] * scale_));
            }
        }
        if (!terms.empty()) {
            run_backward("the weighted sum of the losses", at::stack(terms).sum(), trained, false);
            require(any_defined(grads()), "the weighted sum of the losses reaches no parameter");
        }
    }

    Gradients grads() const {
        Gradients all;
        for (const Tensor &parameter : parameters_) {
            all.push_back(parameter.grad());
        }
        return all;
    }

    void set_grads(const Gradients &all) {
        for (std::size_t i = 0; i < parameters_.size(); i++) {
            parameters_[i].mutable_grad() = all[i];
        }
    }

    static bool any_defined(const Gradients &all) {
        return std::any_of(all.begin(), all.end(), [](const Tensor &gradient) { return gradient.defined(); });
    }

    void observe(const std::vector<Tensor> &losses, const Closure &held_out, const Closure &train,
                 const std::vector<Tensor> &trained) {
        require(static_cast<bool>(held_out), "this call observes (call ", calls_, ", every ", every_, "): held_out is missing");
        const Gradients before = grads();
        for (std::size_t i = 0; i < before.size(); i++) {
            if (before[i].defined()) {
                check_grad(i, before[i]);
            }
        }
        Gradients after = before;
        // Whatever happens, .grad is what it was, or the sum.
        struct Restore {
            GradBlend &gb;
            const Gradients &after;
            ~Restore() { gb.set_grads(after); }
        } restore{*this, after};
        set_grads(Gradients(parameters_.size()));

        std::vector<Gradients> v;
        for (std::size_t k = 0; k < losses.size(); k++) {
            v.push_back(pass("losses[" + std::to_string(k) + "]", losses[k], trained, k + 1 < losses.size()));
        }
        const Gradients g = closure("held_out", held_out, trained);
        const Gradients t = train ? closure("train", train, trained) : v.back();
        std::vector<Gradients> bound;
        Gradients blended = bind(v, t, g, bound);
        step();
        host_ = Tensor();
        const at::NoGradGuard no_grad;
        for (std::size_t i = 0; i < blended.size(); i++) {
            after[i] = !before[i].defined() ? blended[i] : blended[i].defined() ? Tensor(before[i]).add_(blended[i]) : before[i];
        }
    }

    // Blends and observes; the products go to on_sums between.
    void step() {
        if (!on_sums_) {
            blender_.step(plan_, stream());
            return;
        }
        blender_.pass(plan_, GRADBLEND_DOT | GRADBLEND_BLEND, stream());
        const gradblend::PendingSums pending = blender_.pending_sums();
        const auto options = at::TensorOptions(device_).dtype(at::kDouble);
        const Tensor tensor = at::from_blob(pending.sums, {static_cast<std::int64_t>(pending.count)}, options);
        try {
            on_sums_(tensor);
        } catch (...) {
            tensor.zero_();
            throw;
        }
        blender_.observe(stream());
    }

    Gradients closure(const std::string &name, const Closure &function, const std::vector<Tensor> &trained) {
        const Tensor loss = function();
        check_loss("the loss that " + name + " returned", loss);
        set_grads(Gradients(parameters_.size())); // that a backward pass inside the function has left
        return pass(name, loss, trained, false);
    }

    static void run_backward(const std::string &what, const Tensor &root, const std::vector<Tensor> &trained, bool retain) {
        try {
            ::torch::autograd::backward({root}, {}, retain, false, trained);
        } catch (const c10::Error &error) {
            throw Error(GRADBLEND_INVALID_ARGUMENT, what + ": " + error.what_without_backtrace());
        }
    }

    // The gradient of a loss for each parameter, by way of .grad: autograd gives each a buffer in the parameter's layout.
    Gradients pass(const std::string &what, const Tensor &loss, const std::vector<Tensor> &trained, bool retain) {
        run_backward(what, scale_ == 1 ? loss : loss * scale_, trained, retain);
        Gradients all = grads();
        set_grads(Gradients(parameters_.size()));
        require(any_defined(all), what, " reaches no parameter");
        for (std::size_t i = 0; i < all.size(); i++) {
            if (all[i].defined() && (all[i].layout() != at::kStrided || !like(all[i], i))) {
                require(false, names_[i], ": the gradient of ", what, " is ", described(all[i]),
                        all[i].layout() != at::kStrided ? ", sparse" : "", ", expected ", expected(i));
            }
        }
        return all;
    }

    // Binds the gradients to the plan. Returns where each blended one will be; `bound` keeps all that is bound alive.
    Gradients bind(const std::vector<Gradients> &v, const Gradients &t, const Gradients &g, std::vector<Gradients> &bound) {
        Tensors tensors(modalities());
        Gradients blended;
        for (std::size_t i = 0; i < parameters_.size(); i++) {
            // t, g, v_1 .. v_K.
            Gradients row{t[i], g[i]};
            for (const Gradients &gradients : v) {
                row.push_back(gradients[i]);
            }
            const bool reached = any_defined(Gradients(row.begin() + 2, row.end()));
            if (!reached) {
                row[0] = row[1] = Tensor(); // the held-out loss alone does not make a product
            } else if (row[0].defined() != row[1].defined()) {
                (row[0].defined() ? row[1] : row[0]) = at::zeros_like(row[0].defined() ? row[0] : row[1]);
            }
            in_one_order(row);
            blended.push_back(reached ? output(row) : Tensor());
            std::vector<const void *> addresses;
            for (const Tensor &gradient : row) {
                addresses.push_back(gradient.defined() && gradient.numel() > 0 ? gradient.const_data_ptr() : nullptr);
            }
            void *const out = reached && blended[i].numel() > 0 ? blended[i].data_ptr() : nullptr;
            const auto len = static_cast<std::uint64_t>(parameters_[i].numel());
            tensors.add(len, dtype(parameters_[i]), addresses[0], addresses[1], addresses.data() + 2, v.size(), out);
            bound.push_back(std::move(row));
        }
        if (plan_) {
            plan_.update(tensors, stream());
        } else {
            plan_ = blender_.plan(tensors);
        }
        return blended;
    }

    // A v_k that is not t as well and whose memory nobody else has, or new memory.
    static Tensor output(const Gradients &row) {
        const Tensor *any = nullptr;
        for (auto v = row.begin() + 2; v != row.end(); v++) {
            if (v->defined()) {
                any = &*v;
                if (!v->is_same(row[0]) && v->storage().use_count() == 1) {
                    return *v;
                }
            }
        }
        return at::empty_like(*any);
    }

    // Copies the gradients of one parameter if they are not dense with their elements in the same order.
    void in_one_order(Gradients &row) {
        const Tensor *first = nullptr;
        bool same = true, contiguous = true;
        for (const Tensor &gradient : row) {
            if (gradient.defined()) {
                first = first ? first : &gradient;
                same = same && gradient.strides() == first->strides() && !gradient.is_neg();
                contiguous = contiguous && gradient.is_contiguous() && !gradient.is_neg();
            }
        }
        if (contiguous || (same && first->is_non_overlapping_and_dense())) {
            return;
        }
        const bool shared = row[0].defined() && row[0].is_same(row.back());
        for (auto gradient = row.begin() + (shared ? 1 : 0); gradient != row.end(); gradient++) {
            if (gradient->defined() && (!gradient->is_contiguous() || gradient->is_neg())) {
                // The bit of a lazy negation stays in a contiguous view, and addresses do not show it.
                *gradient = gradient->resolve_neg().contiguous();
                copied_ += 1;
            }
        }
        if (shared) {
            row[0] = row.back();
        }
    }

    static void append(std::vector<unsigned char> &bytes, std::uint64_t value, int count) {
        for (int i = 0; i < count; i++) {
            bytes.push_back(static_cast<unsigned char>(value >> (8 * i)));
        }
    }

    static std::uint64_t read(const unsigned char *bytes, int count) {
        std::uint64_t value = 0;
        for (int i = 0; i < count; i++) {
            value |= static_cast<std::uint64_t>(bytes[i]) << (8 * i);
        }
        return value;
    }

    // CRC-32 (IEEE 802.3), bit by bit: a state has a few kilobytes.
    static std::uint32_t checksum(const unsigned char *bytes, std::size_t count) {
        std::uint32_t crc = 0xFFFFFFFF;
        for (std::size_t i = 0; i < count; i++) {
            crc ^= bytes[i];
            for (int bit = 0; bit < 8; bit++) {
                crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320 : 0);
            }
        }
        return ~crc;
    }

    std::vector<std::string> names_;
    std::vector<Tensor> parameters_, given_;
    // Those that can only stay frozen.
    Named frozen_;
    OnObservation on_observation_;
    OnSums on_sums_;
    bool running_ = false;
    c10::Device device_ = c10::kCPU;
    std::int64_t every_;
    bool scheduled_;
    std::optional<std::pair<std::int64_t, std::int64_t>> online_;
    std::uint64_t calls_ = 0, observations_ = 0, copied_ = 0;
    float scale_ = 1;
    Tensor scale_tensor_;
    // The weights on the host; undefined when they may have changed.
    Tensor host_;
    // The plan is destroyed before its blender.
    Blender blender_;
    Plan plan_;
};

} // namespace torch
} // inline namespace with_exceptions
} // namespace gradblend

#endif
