// Gradient-Blending of a late-fusion network on real data, in C++ and without a framework.
//
//     cargo rustc --release --features capi --crate-type cdylib
//     c++ -std=c++17 -O3 -Iinclude examples/cpp/late_fusion.cpp -Ltarget/release -lgradblend -ldl -o target/cpp_late_fusion
//     LD_LIBRARY_PATH=target/release target/cpp_late_fusion [--help]
//
// Each handwritten digit gets noise and is seen in two views: "top", the 32 pixels of its upper half, and "bottom", the
// 8 column sums and 4 row sums of its lower half.
//
//     top    -> encoder 0 -+-> head 0 -> L_0
//                          +-> fusion 0 -.
//                                        +-> fused head -> L_2
//                          +-> fusion 1 -'
//     bottom -> encoder 1 -+-> head 1 -> L_1
//
// To see how a trainer is linked to gradblend, read from Memory on.

#include "gradblend.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <deque>
#include <fstream>
#include <functional>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::size_t CLASSES = 10, PIXELS = 64, HIDDEN = 64, BATCH = 50;
constexpr std::size_t K = 3, FUSED = 2; // losses; the last one is the fused loss
constexpr std::size_t TRAIN = 500, HELD_OUT = 100, TEST = 500, SAMPLES = TRAIN + HELD_OUT + TEST;
using Floats = std::vector<float>;
using Weights = std::array<double, K>;
using Clock = std::chrono::steady_clock;

[[noreturn]] void fail(const std::string &message) { throw std::runtime_error(message); }

double seconds_since(Clock::time_point begun) { return std::chrono::duration<double>(Clock::now() - begun).count(); }

// ---- Data ----

// Written out, because the standard's distributions differ from library to library.
class Random {
public:
    Random(std::uint64_t seed, std::uint64_t purpose) : engine_(seed * 1000 + purpose) {}
    std::size_t below(std::size_t len) { return engine_() % len; }
    float uniform() { return static_cast<float>(engine_() >> 40) * 0x1p-24F; }
    float normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.2831853F * uniform()); }

private:
    std::mt19937_64 engine_;
};

struct Sample {
    std::array<Floats, 2> views;
    std::size_t label;
};
using Batch = std::vector<const Sample *>;

// Pixels in the first view.
std::vector<Sample> read_images(const std::string &path) {
    std::ifstream file(path);
    if (!file) {
        fail("cannot read " + path + ": run in the folder of the repository, or give --data FILE");
    }
    std::vector<Sample> images;
    for (std::string line; std::getline(file, line);) {
        std::replace(line.begin(), line.end(), ',', ' ');
        std::istringstream fields(line);
        Sample image{{Floats(PIXELS), {}}, 0};
        for (float &pixel : image.views[0]) {
            fields >> pixel;
        }
        if (!(fields >> image.label) || image.label >= CLASSES || !(fields >> std::ws).eof()) {
            fail(path + ", line " + std::to_string(images.size() + 1) + ": expected 64 pixels and a digit");
        }
        images.push_back(image);
    }
    if (images.size() < SAMPLES) {
        fail(path + ": expected at least " + std::to_string(SAMPLES) + " digits, got " + std::to_string(images.size()));
    }
    return images;
}

// The samples of a seed: first those to train on, then those held out, then those to test on.
std::vector<Sample> draw(std::vector<Sample> samples, std::uint64_t seed) {
    Random random(seed, 0);
    for (std::size_t s = 0; s < SAMPLES; s++) {
        std::swap(samples[s], samples[s + random.below(samples.size() - s)]);
    }
    samples.resize(SAMPLES);
    for (auto &[views, label] : samples) {
        // Noise is drawn once a digit, so that it can be learned by heart.
        std::for_each(views[0].begin(), views[0].end(), [&](float &pixel) { pixel += 6 * random.normal(); });
        views[1].resize(8 + 4);
        for (std::size_t i = PIXELS / 2; i < PIXELS; i++) {
            views[1][i % 8] += views[0][i];
            views[1][8 + i / 8 - 4] += views[0][i];
        }
        views[0].resize(PIXELS / 2);
    }
    // Each feature gets mean 0 and variance 1 over the samples to train on.
    for (std::size_t view = 0; view < 2; view++) {
        for (std::size_t i = 0; i < samples[0].views[view].size(); i++) {
            double sum = 0, squares = 0;
            for (std::size_t s = 0; s < TRAIN; s++) {
                sum += samples[s].views[view][i];
                squares += std::pow(samples[s].views[view][i], 2);
            }
            const double mean = sum / TRAIN, deviation = std::sqrt(squares / TRAIN - mean * mean);
            for (Sample &sample : samples) {
                sample.views[view][i] = static_cast<float>((sample.views[view][i] - mean) / deviation);
            }
        }
    }
    return samples;
}

Batch draw_batch(const Sample *samples, std::size_t len, Random &random) {
    Batch batch(BATCH);
    std::generate(batch.begin(), batch.end(), [&] { return samples + random.below(len); });
    return batch;
}

// ---- The network and its optimiser ----

// A linear layer. Its parameters are `inputs` rows of `outputs`, and a row of biases.
struct Layer {
    std::size_t inputs, outputs;
    std::array<bool, K> reached; // by which losses
    std::size_t len() const { return (inputs + 1) * outputs; }
};

enum : std::size_t { ENCODER = 0, HEAD = 2, FUSION = 4, FUSED_HEAD = 6, LAYERS = 7 };
constexpr std::array<Layer, LAYERS> NETWORK = {{
    {PIXELS / 2, HIDDEN, {true, false, true}},
    {8 + 4, HIDDEN, {false, true, true}},
    {HIDDEN, CLASSES, {true, false, false}},
    {HIDDEN, CLASSES, {false, true, false}},
    {HIDDEN, HIDDEN, {false, false, true}},
    {HIDDEN, HIDDEN, {false, false, true}},
    {HIDDEN, CLASSES, {false, false, true}},
}};
using Parameters = std::array<Floats, LAYERS>;
// Where the gradient of each layer lies; nullptr for one that no loss in question reaches.
using Gradients = std::array<float *, LAYERS>;

Parameters first_parameters(std::uint64_t seed) {
    Random random(seed, 1);
    Parameters parameters;
    for (std::size_t p = 0; p < LAYERS; p++) {
        const float bound = 1 / std::sqrt(static_cast<float>(NETWORK[p].inputs));
        parameters[p].resize(NETWORK[p].len());
        std::generate(parameters[p].begin(), parameters[p].end(), [&] { return bound * (2 * random.uniform() - 1); });
    }
    return parameters;
}

void add(Floats &to, const Floats &values) {
    std::transform(to.begin(), to.end(), values.begin(), to.begin(), std::plus<>());
}

void relu(Floats &values) {
    std::replace_if(values.begin(), values.end(), [](float value) { return value < 0; }, 0.0F);
}

// From the gradient at the outputs of a relu to that at its inputs.
void relu_backward(const Floats &outputs, Floats &gradient) {
    std::transform(gradient.begin(), gradient.end(), outputs.begin(), gradient.begin(),
                   [](float at_output, float output) { return output > 0 ? at_output : 0; });
}

// What a sample's forward pass leaves for its backward passes.
struct Activations {
    std::array<Floats, 2> features;
    Floats fused = Floats(HIDDEN);
    std::array<Floats, K> logits;
};

Activations forward(const Parameters &parameters, const Sample &sample) {
    const auto linear = [&](std::size_t p, const Floats &x) {
        const auto [inputs, outputs, reached] = NETWORK[p];
        Floats y(parameters[p].end() - static_cast<std::ptrdiff_t>(outputs), parameters[p].end());
        for (std::size_t i = 0; i < inputs; i++) {
            for (std::size_t o = 0; o < outputs; o++) {
                y[o] += x[i] * parameters[p][i * outputs + o];
            }
        }
        return y;
    };
    Activations after;
    for (std::size_t view = 0; view < 2; view++) {
        after.features[view] = linear(ENCODER + view, sample.views[view]);
        relu(after.features[view]);
        after.logits[view] = linear(HEAD + view, after.features[view]);
        add(after.fused, linear(FUSION + view, after.features[view]));
    }
    relu(after.fused);
    after.logits[FUSED] = linear(FUSED_HEAD, after.fused);
    return after;
}

std::vector<Activations> forward(const Parameters &parameters, const Batch &batch) {
    std::vector<Activations> after;
    for (const Sample *sample : batch) {
        after.push_back(forward(parameters, *sample));
    }
    return after;
}

// Writes the gradient of sum_k w_k L_k, L_k being the mean cross-entropy of the batch.
void backward(const Parameters &parameters, const Batch &batch, const std::vector<Activations> &activations,
              const Weights &weights, const Gradients &gradients) {
    // Adds to the gradient of a layer's parameters, and returns that at its inputs.
    const auto linear = [&](std::size_t p, const Floats &x, const Floats &at_outputs) {
        const std::size_t outputs = NETWORK[p].outputs;
        Floats at_inputs(x.size());
        if (gradients[p] == nullptr) {
            return at_inputs;
        }
        for (std::size_t i = 0; i < x.size(); i++) {
            float *const to = gradients[p] + i * outputs;
            for (std::size_t o = 0; o < outputs; o++) {
                to[o] += x[i] * at_outputs[o];
            }
            const float *const row = &parameters[p][i * outputs];
            at_inputs[i] = std::inner_product(row, row + outputs, at_outputs.begin(), 0.0F);
        }
        float *const biases = gradients[p] + x.size() * outputs;
        std::transform(at_outputs.begin(), at_outputs.end(), biases, biases, std::plus<>());
        return at_inputs;
    };
    for (std::size_t p = 0; p < LAYERS; p++) {
        std::fill_n(gradients[p], gradients[p] == nullptr ? 0 : NETWORK[p].len(), 0.0F);
    }
    for (std::size_t s = 0; s < batch.size(); s++) {
        const Activations &after = activations[s];
        const auto loss = [&](std::size_t k) {
            Floats at_logits = after.logits[k];
            const float most = *std::max_element(at_logits.begin(), at_logits.end());
            const float scale = static_cast<float>(weights[k] / static_cast<double>(batch.size()));
            float sum = 0;
            std::for_each(at_logits.begin(), at_logits.end(), [&](float &at) { sum += at = std::exp(at - most); });
            std::for_each(at_logits.begin(), at_logits.end(), [&](float &at) { at *= scale / sum; });
            at_logits[batch[s]->label] -= scale;
            return at_logits;
        };
        Floats at_fused = linear(FUSED_HEAD, after.fused, loss(FUSED));
        relu_backward(after.fused, at_fused);
        for (std::size_t view = 0; view < 2; view++) {
            Floats at_features = linear(HEAD + view, after.features[view], loss(view));
            add(at_features, linear(FUSION + view, after.features[view], at_fused));
            relu_backward(after.features[view], at_features);
            linear(ENCODER + view, batch[s]->views[view], at_features);
        }
    }
}

class Adam {
public:
    void step(Parameters &parameters, const Gradients &gradients) {
        steps_++;
        const float first = 1 - std::pow(0.9F, steps_), second = 1 - std::pow(0.999F, steps_);
        for (std::size_t p = 0; p < LAYERS; p++) {
            m_[p].resize(parameters[p].size());
            v_[p].resize(parameters[p].size());
            for (std::size_t i = 0; i < parameters[p].size(); i++) {
                const float gradient = gradients[p][i];
                m_[p][i] = 0.9F * m_[p][i] + 0.1F * gradient;
                v_[p][i] = 0.999F * v_[p][i] + 0.001F * gradient * gradient;
                parameters[p][i] -= 1e-3F * (m_[p][i] / first) / (std::sqrt(v_[p][i] / second) + 1e-8F);
            }
        }
    }

private:
    Parameters m_, v_;
    float steps_ = 0;
};

// ---- Blending ----

// Floats that the trainer works on, and their address where the blender works.
struct List {
    Floats host;
    void *device;
};

// Owns lists: on the CPU the floats themselves, on a CUDA device a copy of each. (A trainer on the GPU has its
// gradients there and copies nothing.)
class Memory {
public:
    explicit Memory(std::int32_t device) {
        if (device == GRADBLEND_CPU) {
            return;
        }
        driver_ = dlopen("libcuda.so.1", RTLD_NOW);
        int ordinal = 0;
        void *context = nullptr;
        must<unsigned>("cuInit", 0);
        must<int *, int>("cuDeviceGet", &ordinal, device);
        // The primary context is the one that the blender uses. The process keeps it until it ends.
        must<void **, int>("cuDevicePrimaryCtxRetain", &context, ordinal);
        must<void *>("cuCtxSetCurrent", context);
    }

    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    ~Memory() {
        for (const List &list : lists_) {
            if (driver_ != nullptr) {
                call<Address>("cuMemFree_v2", address(list));
            }
        }
    }

    List *list(std::size_t len) {
        List &list = lists_.emplace_back(List{Floats(len), nullptr});
        list.device = list.host.data();
        if (driver_ != nullptr) {
            Address address = 0;
            must<Address *, std::size_t>("cuMemAlloc_v2", &address, bytes(list));
            list.device = reinterpret_cast<void *>(address);
        }
        return &list;
    }

    void to_device(const List *list) const {
        if (driver_ != nullptr && list != nullptr) {
            const void *host = list->host.data();
            must<Address, const void *, std::size_t>("cuMemcpyHtoD_v2", address(*list), host, bytes(*list));
        }
    }

    // Waits for what was put on the legacy default stream before.
    void to_host(List *list) const {
        if (driver_ != nullptr && list != nullptr) {
            must<void *, Address, std::size_t>("cuMemcpyDtoH_v2", list->host.data(), address(*list), bytes(*list));
        }
    }

private:
    using Address = unsigned long long;
    static Address address(const List &list) { return reinterpret_cast<std::uintptr_t>(list.device); }
    static std::size_t bytes(const List &list) { return list.host.size() * sizeof(float); }

    template <typename... Arguments>
    int call(const char *name, Arguments... arguments) const {
        const auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(driver_, name));
        return function == nullptr ? -1 : function(arguments...);
    }

    template <typename... Arguments>
    void must(const char *name, Arguments... arguments) const {
        if (const int code = call<Arguments...>(name, arguments...)) {
            fail(std::string(name) + " failed with code " + std::to_string(code));
        }
    }

    void *driver_ = nullptr;
    std::deque<List> lists_; // never moves one
};

// A blender, and its plan over the gradients of a step. Those stay where they are, so one plan is enough.
class Blending {
public:
    explicit Blending(std::int32_t device) : blender_(device, config()), memory_(device) {
        gradblend::Tensors tensors(K);
        for (std::size_t p = 0; p < LAYERS; p++) {
            const auto [inputs, outputs, reached] = NETWORK[p];
            for (std::size_t list = 0; list < lists_.size(); list++) {
                // Of a loss that does not reach the layer there is no gradient.
                const bool present = list == BLENDED || reached[list == G ? FUSED : list];
                lists_[list][p] = present ? memory_.list(NETWORK[p].len()) : nullptr;
            }
            const auto at = [&, p](std::size_t list) {
                return lists_[list][p] == nullptr ? nullptr : static_cast<float *>(lists_[list][p]->device);
            };
            // t is v_fused: from the same batch. docs/method.md says what an independent one would change.
            tensors.add(NETWORK[p].len(), at(FUSED), at(G), {at(0), at(1), at(FUSED)}, at(BLENDED));
        }
        plan_ = blender_.plan(tensors);
    }

    // What lists_ has: v_0 to v_K-1, and these.
    enum : std::size_t { G = K, BLENDED };

    // Where backward passes write, and the optimiser reads.
    Gradients gradients(std::size_t list) const {
        Gradients gradients{};
        std::transform(lists_[list].begin(), lists_[list].end(), gradients.begin(),
                       [](List *of_layer) { return of_layer == nullptr ? nullptr : of_layer->host.data(); });
        return gradients;
    }

    // Blends with the weights in force, observes, and reweights: one pass over memory.
    void step() {
        const auto begun = Clock::now();
        for (std::size_t list = 0; list < BLENDED; list++) {
            std::for_each(lists_[list].begin(), lists_[list].end(), [&](List *from) { memory_.to_device(from); });
        }
        blender_.step(plan_);
        std::for_each(lists_[BLENDED].begin(), lists_[BLENDED].end(), [&](List *to) { memory_.to_host(to); });
        seconds += seconds_since(begun);
    }

    Weights weights() {
        const gradblend_report report = blender_.report();
        return {report.weights[0], report.weights[1], report.weights[FUSED]};
    }

    // Compares the last step with the plain sum in double. On the way from a v_k to the blend there are K + 1 roundings
    // to float, of the weight, the product and the sums: each of 2^-24 at most, or 2^-150 if what is rounded is tiny.
    void check(const Weights &in_force) const {
        for (std::size_t p = 0; p < LAYERS; p++) {
            for (std::size_t i = 0; i < NETWORK[p].len(); i++) {
                double sum = 0, size = 0;
                for (std::size_t k = 0; k < K; k++) {
                    const double term = lists_[k][p] == nullptr ? 0 : in_force[k] * double{lists_[k][p]->host[i]};
                    sum += term;
                    size += std::abs(term);
                }
                const double got = lists_[BLENDED][p]->host[i];
                if (!(std::abs(got - sum) <= (K + 1) * (1.001 * 0x1p-24 * size + 0x1p-150))) {
                    fail("the blend is " + std::to_string(got) + " where it should be " + std::to_string(sum));
                }
            }
        }
    }

    double seconds = 0;

private:
    static gradblend_config config() {
        gradblend_config config = gradblend::config(K); // an EMA of decay 0.99
        config.cadence = GRADBLEND_EVERY_OBSERVATION;
        config.threads = 1; // gradients as small as these are not worth waking another
        return config;
    }

    // The plan is destroyed first, and waits for work on the memory.
    gradblend::Blender blender_;
    Memory memory_;
    std::array<std::array<List *, LAYERS>, K + 2> lists_{};
    gradblend::Plan plan_;
};

// ---- Training ----

struct Run {
    Weights weights;
    double accuracy, library, training; // of the fused head; seconds
};

Weights only(std::size_t k) {
    Weights weights{};
    weights[k] = 1;
    return weights;
}

// Trains on the weighted loss, or if `blends` on the blended gradients, and tests.
Run train(const std::vector<Sample> &samples, std::uint64_t seed, Weights weights, bool blends, std::int32_t device) {
    // All ways see the same samples, first parameters and batches.
    Parameters parameters = first_parameters(seed), plain = parameters;
    Random batches(seed, 2), held_out(seed, 3);
    Gradients gradients{};
    std::transform(plain.begin(), plain.end(), gradients.begin(), [](Floats &layer) { return layer.data(); });
    Adam adam;
    Blending blending(device);
    const auto begun = Clock::now();
    for (std::size_t left = 40 * TRAIN / BATCH; left > 0; left--) {
        const Batch batch = draw_batch(&samples[0], TRAIN, batches);
        const std::vector<Activations> after = forward(parameters, batch);
        if (!blends) {
            backward(parameters, batch, after, weights, gradients);
            adam.step(parameters, gradients);
            continue;
        }
        for (std::size_t k = 0; k < K; k++) {
            backward(parameters, batch, after, only(k), blending.gradients(k));
        }
        const Batch valid = draw_batch(&samples[TRAIN], HELD_OUT, held_out);
        backward(parameters, valid, forward(parameters, valid), only(FUSED), blending.gradients(Blending::G));
        if (left == 1) {
            weights = blending.weights();
        }
        blending.step();
        adam.step(parameters, blending.gradients(Blending::BLENDED));
    }
    Run run{weights, 0, blending.seconds, seconds_since(begun)};
    if (blends) {
        blending.check(weights);
        run.weights = blending.weights();
    }
    for (std::size_t s = TRAIN + HELD_OUT; s < SAMPLES; s++) {
        const Floats logits = forward(parameters, samples[s]).logits[FUSED];
        const auto most = std::max_element(logits.begin(), logits.end()) - logits.begin();
        run.accuracy += most == static_cast<std::ptrdiff_t>(samples[s].label) ? 1.0 / TEST : 0;
    }
    return run;
}

const char *const HELP = R"(Trains a late-fusion network on two noisy views of handwritten digits.

Its three losses are weighted in three ways:

  naive     the fused loss alone
  uniform   1/3 for each loss
  blended   Gradient-Blending, weights from the gradients at each step

  --data FILE   a digit a row: 64 pixels from 0 to 16 and the label (default: examples/data/digits.csv)
  --device N    blend on CUDA device N, not on the CPU
  --seeds N     runs of each, with other samples, first parameters and batches (default: 8)
  --quick       one seed
  --help        this text

Accuracy is the fused head's on samples not trained on, mean and standard deviation over seeds; weights are those at the
end, and seconds those of one run, mean over seeds. "library" is the time in gradblend, copies to and from the device
included; the rest that "blended" takes longer is that of K + 1 backward passes in place of one.
)";

void compare(const std::string &path, std::int32_t device, std::uint64_t seeds) {
    const std::vector<Sample> images = read_images(path);
    const Weights uniform = {1.0 / K, 1.0 / K, 1.0 / K};
    std::puts("| method  | test accuracy | weights (top, bottom, fused) | library s / training s |\n|---|---|---|---|");
    for (const auto &[name, weights, blends] :
         {std::tuple("naive", only(FUSED), false), {"uniform", uniform, false}, {"blended", uniform, true}}) {
        Run mean{};
        double squares = 0;
        for (std::uint64_t seed = 0; seed < seeds; seed++) {
            const Run run = train(draw(images, seed), seed, weights, blends, device);
            const double share = 1 / static_cast<double>(seeds);
            mean.accuracy += share * run.accuracy;
            squares += share * run.accuracy * run.accuracy;
            mean.library += share * run.library;
            mean.training += share * run.training;
            for (std::size_t k = 0; k < K; k++) {
                mean.weights[k] += share * run.weights[k];
            }
            // Also not so if one is not finite.
            const double sum = std::accumulate(run.weights.begin(), run.weights.end(), 0.0);
            if (!(std::abs(sum - 1) <= 1e-9)) {
                fail(std::string(name) + ": the weights sum to " + std::to_string(sum));
            }
        }
        std::printf("| %-7s | %.3f +- %.3f | %.2f, %.2f, %.2f | %.4f / %.2f |\n", name, mean.accuracy,
                    std::sqrt(std::max(0.0, squares - mean.accuracy * mean.accuracy)), mean.weights[0],
                    mean.weights[1], mean.weights[FUSED], mean.library, mean.training);
        std::fflush(stdout);
        if (!(mean.accuracy > 4.0 / CLASSES)) {
            fail(std::string(name) + ": hardly better than chance");
        }
    }
}

} // namespace

int main(int count, char **arguments) {
    try {
        std::string path = "examples/data/digits.csv";
        std::int32_t device = GRADBLEND_CPU;
        std::uint64_t seeds = 8;
        for (int i = 1; i < count; i++) {
            const std::string name = arguments[i];
            const auto value = [&] {
                if (++i == count) {
                    fail(name + " needs a value");
                }
                return std::string(arguments[i]);
            };
            const auto number = [&](unsigned long from) {
                const std::string text = value();
                const bool digits = text.find_first_not_of("0123456789") == std::string::npos;
                if (text.empty() || text.size() > 6 || !digits || std::stoul(text) < from) {
                    fail(name + ": expected a number from " + std::to_string(from) + ", got " + text);
                }
                return std::stoul(text);
            };
            if (name == "--help") {
                std::fputs(HELP, stdout);
                return 0;
            } else if (name == "--quick") {
                seeds = 1;
            } else if (name == "--data") {
                path = value();
            } else if (name == "--device") {
                device = static_cast<std::int32_t>(number(0));
            } else if (name == "--seeds") {
                seeds = number(1);
            } else {
                fail("unknown option " + name + "; see --help");
            }
        }
        compare(path, device, seeds);
        return 0;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
