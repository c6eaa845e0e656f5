// gradblend_torch.hpp against plain recomputation from PyTorch's own gradients.

#include "gradblend_torch.hpp"

#include <cstdio>
#include <cstring>

namespace {

using gradblend::torch::GradBlend;
using gradblend::torch::GradBlendConfig;
using torch::Tensor;

int failures = 0;

#define EXPECT(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            std::printf("line %d: %s\n", __LINE__, #condition);                                                        \
            failures++;                                                                                                \
        }                                                                                                              \
    } while (false)

// Two encoders and three heads: head 0 on modality 0, head 1 on modality 1, and a parameter that no loss reaches. Operations
// are elementwise: the bits of a matrix product can depend on where its operands are.
struct Toy {
    std::vector<Tensor> vars;
    torch::ScalarType dtype;

    explicit Toy(torch::ScalarType dtype = torch::kFloat) : dtype(dtype) {
        double phase = 0;
        for (const std::vector<std::int64_t> &shape : {std::vector<std::int64_t>{7, 5}, {5, 7}, {7, 5}, {1}, {2, 2}}) {
            const std::int64_t count = c10::multiply_integers(shape);
            const Tensor values = torch::sin(torch::arange(count, torch::kDouble) * 0.7 + phase++).reshape(shape);
            vars.push_back(values.to(dtype).requires_grad_(true));
        }
    }

    // L_0, L_1 and the fused loss. The second parameter is used transposed.
    std::vector<Tensor> losses(int batch) const {
        const Tensor x = torch::cos(torch::arange(35, torch::kDouble) * 1.3 + batch).reshape({7, 5}).to(dtype);
        const Tensor first = torch::tanh(vars[0] * x), second = torch::tanh(vars[1].t() * x);
        const auto loss = [](const Tensor &x) { return x.square().mean(); };
        return {loss((first - 0.3) * vars[2]), loss(second + 0.2), loss(first * second - vars[3])};
    }

    Tensor fused(int batch) const { return losses(batch)[2]; }

    std::vector<Tensor> gradients(const Tensor &loss) const {
        return torch::autograd::grad({loss}, vars, {}, true, false, true);
    }

    void clear() {
        for (Tensor &var : vars) {
            var.mutable_grad() = Tensor();
        }
    }
};

Tensor values(const Tensor &gradient, const Tensor &var) {
    return (gradient.defined() ? gradient : torch::zeros_like(var)).detach().to(torch::kDouble).reshape(-1);
}

GradBlendConfig config() { return GradBlendConfig(3).average(GRADBLEND_MEAN); }

// Weights and gradients equal those recomputed in f64, at each of several steps.
void recompute(torch::ScalarType dtype, double epsilon, bool independent) {
    Toy toy(dtype);
    GradBlend gb(toy.vars, config());
    Tensor m = torch::zeros(3, torch::kDouble), s = torch::zeros({3, 3}, torch::kDouble);
    std::vector<double> w(3, 1.0 / 3);
    for (int step = 0; step < 4; step++) {
        std::vector<std::vector<Tensor>> all;
        for (const Tensor &loss : toy.losses(step)) {
            all.push_back(toy.gradients(loss));
        }
        const auto valid = toy.gradients(toy.fused(step + 100)), other = toy.gradients(toy.fused(step + 50));
        toy.clear();
        const auto held_out = [&] { return toy.fused(step + 100); };
        EXPECT(gb.backward(toy.losses(step), held_out,
                          independent ? GradBlend::Closure([&] { return toy.fused(step + 50); }) : nullptr));
        Tensor c = torch::zeros(3, torch::kDouble), d = torch::zeros(3, torch::kDouble);
        for (std::size_t i = 0; i < toy.vars.size(); i++) {
            const Tensor &var = toy.vars[i];
            const Tensor t = values(independent ? other[i] : all[2][i], var), g = values(valid[i], var);
            EXPECT(var.grad().defined() == (i < 4));
            // One step of the smallest numbers of float16.
            Tensor blended = torch::zeros_like(t), bound = torch::full_like(t, dtype == torch::kHalf ? 6e-8 : 0);
            for (std::size_t k = 0; k < 3; k++) {
                const Tensor v = values(all[k][i], var);
                blended += w[k] * v;
                bound += 4 * epsilon * (w[k] * v).abs();
                c[static_cast<std::int64_t>(k)] += g.dot(v);
                d[static_cast<std::int64_t>(k)] += (t - g).dot(v);
            }
            EXPECT(((values(var.grad(), var) - blended).abs() <= bound).all().item<bool>());
        }
        m += (c - m) / (step + 1);
        s += (torch::outer(d, d) - s) / (step + 1);
        const auto vector = [](const Tensor &x) {
            const Tensor flat = x.contiguous();
            return std::vector<double>(flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel());
        };
        w = gradblend::solve(gradblend::config(3), vector(m), vector(s), w).weights;
        const gradblend_report report = gb.report();
        const Tensor weights = gb.weights();
        for (std::size_t k = 0; k < 3; k++) {
            EXPECT(std::abs(report.weights[k] - w[k]) < 1e-4);
            EXPECT(weights[static_cast<std::int64_t>(k)].item<float>() == static_cast<float>(report.weights[k]));
        }
        EXPECT(report.observed == static_cast<std::uint64_t>(step) + 1);
    }
    EXPECT(gb.copied() == 0);
}

// The bits of a tensor in the order of its memory.
std::vector<std::uint32_t> bits(const Tensor &x) {
    std::vector<std::uint32_t> bits(static_cast<std::size_t>(x.numel()));
    std::memcpy(bits.data(), x.data_ptr<float>(), bits.size() * sizeof(float));
    return bits;
}

void a_run_equals_the_raw_operations() {
    Toy own, other;
    GradBlend gb(own.vars, config());
    gradblend_config raw = gradblend::config(3);
    raw.average = GRADBLEND_MEAN;
    raw.cadence = GRADBLEND_EVERY_OBSERVATION;
    gradblend::Blender blender(GRADBLEND_CPU, raw);
    for (int step = 0; step < 6; step++) {
        own.clear();
        gb.backward(own.losses(step), [&] { return own.fused(step + 100); });
        std::vector<std::vector<Tensor>> all;
        for (const Tensor &loss : other.losses(step)) {
            all.push_back(other.gradients(loss));
        }
        const std::vector<Tensor> valid = other.gradients(other.fused(step + 100));
        gradblend::Tensors tensors(3);
        std::vector<Tensor> blended;
        // autograd gives .grad the layout of the parameter, and `grad` that of the operation.
        const auto plain = [](const Tensor &x) { return x.defined() ? x.contiguous() : x; };
        std::vector<Tensor> alive;
        for (std::size_t i = 0; i < 5; i++) {
            const auto address = [&](const Tensor &x) {
                alive.push_back(plain(x));
                return x.defined() ? alive.back().data_ptr<float>() : nullptr;
            };
            blended.push_back(torch::zeros_like(other.vars[i]));
            const Tensor &t = all[2][i];
            const Tensor zeros = torch::zeros_like(other.vars[i]);
            const bool reached = all[0][i].defined() || all[1][i].defined() || t.defined();
            const bool product = reached && (t.defined() || valid[i].defined());
            tensors.add(static_cast<std::uint64_t>(other.vars[i].numel()), product ? address(t.defined() ? t : zeros) : nullptr,
                        product ? address(valid[i].defined() ? valid[i] : zeros) : nullptr,
                        {address(all[0][i]), address(all[1][i]), address(t)}, blended[i].data_ptr<float>());
        }
        blender.step(blender.plan(tensors));
        const torch::NoGradGuard no_grad;
        for (std::size_t i = 0; i < 4; i++) {
            EXPECT(bits(own.vars[i].grad().contiguous()) == bits(blended[i]));
            own.vars[i].sub_(own.vars[i].grad() * 0.1);
            other.vars[i].sub_(blended[i] * 0.1);
        }
    }
    const gradblend_report one = gb.report(), two = blender.report();
    EXPECT(std::memcmp(one.weights, two.weights, sizeof one.weights) == 0 && one.observed == two.observed);
}

void other_calls_add_the_gradient_of_the_weighted_loss() {
    Toy toy;
    const std::vector<Tensor> given(toy.vars.begin(), toy.vars.begin() + 3);
    GradBlend gb(given, config().every(3));
    gb.set_grad_scale(8);
    std::vector<Tensor> sums;
    for (int step = 0; step < 3; step++) {
        const Tensor weights = gb.weights();
        Tensor total = torch::zeros({});
        const std::vector<Tensor> losses = toy.losses(step);
        for (std::size_t k = 0; k < 3; k++) {
            total = total + 8 * weights[static_cast<std::int64_t>(k)] * losses[k];
        }
        const std::vector<Tensor> plain = toy.gradients(total);
        bool asked = false;
        const bool observed = gb.backward(losses, [&] { return asked = true, toy.fused(100); });
        EXPECT(observed == (step == 0) && asked == observed);
        // Micro-batches: .grad is not cleared.
        for (std::size_t i = 0; i < 3; i++) {
            const Tensor gradient = values(plain[i], toy.vars[i]);
            step == 0 ? sums.push_back(gradient) : void(sums[i] += gradient);
            EXPECT((values(toy.vars[i].grad(), toy.vars[i]) - sums[i]).abs().max().item<double>() < 1e-5);
        }
    }
    EXPECT(!toy.vars[3].grad().defined()); // was not given
    EXPECT(gb.observations() == 1);
    // The moments are not scaled.
    Toy plain;
    GradBlend unscaled(std::vector<Tensor>(plain.vars.begin(), plain.vars.begin() + 3), config());
    unscaled.backward(plain.losses(0), [&] { return plain.fused(100); });
    EXPECT(torch::allclose(unscaled.weights(), gb.weights(), 1e-5));
}

// A function that gets the sums of products: here it adds those of another rank, which has the same gradients.
void sums_over_ranks() {
    Toy toy, copy;
    GradBlend alone(toy.vars, config()), ranks(copy.vars, config());
    int called = 0;
    ranks.on_sums([&](Tensor sums) {
        EXPECT(sums.dtype() == torch::kDouble && sums.numel() == 6);
        called++;
        sums.mul_(2);
    });
    alone.backward(toy.losses(0), [&] { return toy.fused(100); });
    ranks.backward(copy.losses(0), [&] { return copy.fused(100); });
    EXPECT(called == 1 && torch::allclose(alone.weights(), ranks.weights(), 1e-6));
    const gradblend_report one = alone.report(), two = ranks.report();
    for (int k = 0; k < 3; k++) {
        EXPECT(two.mean[k] == 2 * one.mean[k] && two.second_moment[k] == 4 * one.second_moment[k]);
    }
    const std::vector<unsigned char> before = ranks.save();
    const Tensor grad = copy.vars[0].grad().clone();
    ranks.on_sums([](Tensor) { throw std::runtime_error("a rank is gone"); });
    try {
        ranks.backward(copy.losses(1), [&] { return copy.fused(101); });
        EXPECT(false);
    } catch (const std::runtime_error &error) {
        EXPECT(std::string(error.what()) == "a rank is gone");
    }
    EXPECT(ranks.save() == before && torch::equal(grad, copy.vars[0].grad()));
}

void schedules() {
    Toy toy;
    const auto held_out = [&] { return toy.fused(100); };
    GradBlend offline(toy.vars, config().offline());
    offline.set_weights({0, 2, 0});
    EXPECT(!offline.backward(toy.losses(0), nullptr));
    const Tensor twice = values(toy.gradients(toy.losses(0)[1] * 2)[1], toy.vars[1]);
    EXPECT(torch::allclose(values(toy.vars[1].grad(), toy.vars[1]), twice) && !toy.vars[0].grad().defined());
    GradBlend online(toy.vars, config().online(2, 1));
    for (int epoch = 0; epoch < 2; epoch++) {
        online.backward(toy.losses(epoch), held_out);
        EXPECT(online.weights()[0].item<float>() == 1.0F / 3);
        const auto report = online.end_epoch(epoch);
        EXPECT(report.has_value() == (epoch == 1) && (!report || report->observed == 2));
    }
    EXPECT(online.weights()[0].item<float>() != 1.0F / 3 && online.report().observed == 0);
}

void states() {
    Toy toy, copy;
    GradBlend one(toy.vars, config().every(2)), other(copy.vars, config().every(2));
    for (int step = 0; step < 3; step++) {
        one.backward(toy.losses(step), [&] { return toy.fused(100 + step); });
    }
    const std::vector<unsigned char> saved = one.save();
    other.load(saved);
    toy.clear();
    for (int step = 3; step < 6; step++) {
        EXPECT(one.backward(toy.losses(step), [&] { return toy.fused(100 + step); }) ==
              other.backward(copy.losses(step), [&] { return copy.fused(100 + step); }));
    }
    EXPECT(one.save() == other.save() && torch::equal(toy.vars[0].grad(), copy.vars[0].grad()));
    for (std::size_t at = 0; at < saved.size(); at++) {
        std::vector<unsigned char> damaged = saved;
        damaged[at] ^= 4;
        bool rejected = false;
        try {
            other.load(damaged);
        } catch (const gradblend::Error &error) {
            rejected = error.status() == GRADBLEND_CORRUPT_STATE;
        }
        EXPECT(rejected);
    }
    EXPECT(one.save() == other.save());
}

void memory() {
    // The gradients of both terms of a sum are one tensor for autograd; each .grad has memory of its own.
    const auto var = [] { return torch::ones({4, 4}).requires_grad_(true); };
    const Tensor a = var(), b = var();
    GradBlend gb(std::vector<Tensor>{a, b, a}, GradBlendConfig(2)); // a tied parameter counts once
    const auto loss = [&] { return (a + b).square().sum(); };
    gb.backward({loss(), loss()}, loss);
    EXPECT(a.grad().data_ptr() != b.grad().data_ptr() && a.grad().sum().item<float>() == 64);
    const void *const before = a.grad().data_ptr();
    gb.backward({loss(), loss()}, loss);
    EXPECT(a.grad().data_ptr() == before && a.grad().sum().item<float>() == 128);
    // One v_k is blended in place: the first that is not t as well, in the layout of the parameter.
    const Tensor c = torch::ones({4, 3, 2, 2}).contiguous(torch::MemoryFormat::ChannelsLast).requires_grad_(true);
    GradBlend last(std::vector<Tensor>{c}, GradBlendConfig(2));
    const auto squares = [&] { return c.square().sum(); };
    last.backward({squares(), squares()}, squares);
    EXPECT(c.grad().strides() == c.strides() && last.copied() == 0 && c.grad().max().item<float>() == 2);
    // A gradient with its elements in another order is copied.
    const Tensor d = torch::ones({3, 2}).requires_grad_(true);
    d.register_hook([](const Tensor &gradient) { return gradient.t().contiguous().t(); });
    GradBlend mixed(std::vector<Tensor>{d}, GradBlendConfig(1).every(2));
    bool transposed = false;
    d.register_hook([&](const Tensor &gradient) { return transposed ? gradient : gradient.contiguous(); });
    const Tensor x = torch::arange(6, torch::kFloat).reshape({3, 2});
    mixed.backward({(d * x).sum()}, [&] { return transposed = true, (d * x * 2).sum(); });
    EXPECT(torch::equal(d.grad(), x));
    const gradblend_report report = mixed.report();
    EXPECT(report.observed == 1 && report.mean[0] == 2 * x.square().sum().item<double>());
    // Frozen at first and trained later, and the other way round.
    const Tensor e = torch::ones({2}), f = torch::ones({2}).requires_grad_(true);
    GradBlend unfrozen(std::vector<Tensor>{e, f, torch::ones({2}, torch::kDouble)}, GradBlendConfig(1));
    const auto both = [&] { return (e * 3 + f).sum(); };
    unfrozen.backward({both()}, both);
    EXPECT(!e.grad().defined() && f.grad().defined());
    e.requires_grad_(true);
    unfrozen.backward({both()}, both);
    EXPECT(e.grad().sum().item<float>() == 6);
    b.requires_grad_(false);
    b.mutable_grad() = Tensor();
    gb.backward({loss(), loss()}, loss);
    EXPECT(!b.grad().defined());
}

template <typename Function>
std::string message(const Function &function) {
    try {
        function();
        return "no error";
    } catch (const std::exception &error) {
        return error.what();
    }
}

void errors() {
    Toy toy;
    const auto made = [](const std::vector<Tensor> &vars, const GradBlendConfig &config) {
        return message([&] { GradBlend(vars, config); });
    };
    const std::string invalid = "GRADBLEND_INVALID_ARGUMENT: ";
    EXPECT(made({}, config()) == invalid + "there is no parameter to train");
    EXPECT(made({toy.vars[0], torch::zeros(3, torch::kDouble).requires_grad_(true)}, config()) ==
          invalid + "parameter 1 is Double [3] on cpu, expected float32, float16 or bfloat16");
    EXPECT(made({toy.vars[0] * 2}, config()) == invalid + "parameter 0 is computed from other tensors, expected a leaf");
    EXPECT(made(toy.vars, config().every(0)) == invalid + "every is 0, expected at least 1");
    EXPECT(made(toy.vars, config().min_weight({0.5})) == invalid + "min_weight has 1 numbers, expected 3");
    EXPECT(made(toy.vars, config().online(0, 1)) == invalid + "a super-epoch has at least 1 epoch");

    torch::OrderedDict<std::string, Tensor> named;
    for (std::size_t i = 0; i < toy.vars.size(); i++) {
        named.insert("layer" + std::to_string(i), toy.vars[i]);
    }
    GradBlend gb(named, config());
    gb.backward(toy.losses(0), [&] { return toy.fused(100); });
    const std::vector<unsigned char> before = gb.save();
    const Tensor grad = toy.vars[0].grad().clone();
    const Tensor constant = torch::ones(1).requires_grad_(true).sum();
    const auto held_out = [&] { return toy.fused(101); };
    const auto call = [&](std::size_t k, const Tensor &loss) {
        std::vector<Tensor> losses = toy.losses(1);
        losses[k] = loss;
        return message([&] { gb.backward(losses, held_out); });
    };
    const auto given = [&](const GradBlend::Closure &function) {
        return message([&] { gb.backward(toy.losses(1), function); });
    };
    EXPECT(message([&] { gb.backward({constant}, held_out); }) == invalid + "there are 1 losses, expected 3");
    EXPECT(given([&] { return gb.backward(toy.losses(1), held_out), toy.fused(101); }) ==
           invalid + "backward was called by held_out or train of another call: return the loss instead");
    EXPECT(call(1, toy.vars[0]) == invalid + "losses[1] is Float [7, 5] on cpu, expected a floating-point scalar");
    EXPECT(call(2, torch::ones({}, torch::kLong)) == invalid + "losses[2] is Long [] on cpu, expected a floating-point scalar");
    EXPECT(call(0, torch::ones({})) == invalid + "losses[0] has no graph: it is detached, or was computed without gradients");
    EXPECT(call(0, constant) == invalid + "losses[0] reaches no parameter");
    const Tensor used = (toy.vars[0] * 2).square().sum();
    used.backward();
    toy.clear();
    toy.vars[0].mutable_grad() = grad.clone();
    EXPECT(call(0, used).rfind(invalid + "losses[0]: Trying to backward through the graph a second time", 0) == 0);
    EXPECT(given(nullptr) == invalid + "this call observes (call 1, every 1): held_out is missing");
    EXPECT(given([&] { return constant; }) == invalid + "held_out reaches no parameter");
    EXPECT(given([&] { return toy.vars[0]; }) ==
          invalid + "the loss that held_out returned is Float [7, 5] on cpu, expected a floating-point scalar");
    EXPECT(given([]() -> Tensor { throw std::runtime_error("no batch is left"); }) == "no batch is left");
    EXPECT(gb.save() == before && torch::equal(toy.vars[0].grad(), grad));
    toy.vars[1].mutable_grad() = torch::ones({1, 1}).expand({5, 7});
    EXPECT(given(held_out) == invalid + "layer1.grad cannot be added to: it is expanded, or an inference tensor");
    toy.vars[1].mutable_grad() = Tensor();
    std::uint64_t seen = 0;
    gb.on_observation([&](const gradblend_report &report) { seen = report.observed; });
    gb.backward(toy.losses(1), held_out);
    EXPECT(seen == 2);
    const std::vector<Tensor> losses = toy.losses(1);
    toy.vars[0].set_data(torch::zeros({3}));
    EXPECT(message([&] { gb.backward(losses, held_out); }) == invalid + "layer0 was Float [7, 5] on cpu and is Float [3] on cpu");
}

} // namespace

int main() {
    torch::set_num_threads(1);
    for (const bool independent : {false, true}) {
        recompute(torch::kFloat, 1.2e-7, independent);
        recompute(torch::kHalf, 1e-3, independent);
        recompute(torch::kBFloat16, 8e-3, independent);
    }
    a_run_equals_the_raw_operations();
    other_calls_add_the_gradient_of_the_weighted_loss();
    sums_over_ranks();
    schedules();
    states();
    memory();
    errors();
    std::printf(failures == 0 ? "all passed\n" : "%d checks failed\n", failures);
    return failures == 0 ? 0 : 1;
}
