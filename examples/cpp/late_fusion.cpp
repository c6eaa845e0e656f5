// Gradient-Blending in a training loop in C++: a late-fusion network on two noisy views of handwritten digits.
//
//     cargo rustc --release --features capi --crate-type cdylib
//     c++ -std=c++17 -O3 -Iinclude examples/cpp/late_fusion.cpp -Ltarget/release -lgradblend -ldl -o target/cpp_late_fusion
//     LD_LIBRARY_PATH=target/release target/late_fusion [--device N] [--quick]
//
// View 0 is the 32 pixels of a digit's upper half, view 1 the 8 column sums and 4 row sums of its lower half.
//
//     view 0 -> encoder 0 -+-> head 0 -> L_0
//                          +-> fused head -> L_2
//     view 1 -> encoder 1 -+-> head 1 -> L_1
//
// The class Blending below is all that a trainer needs of gradblend.

#include "gradblend.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Floats = std::vector<float>;
constexpr std::size_t CLASSES = 10, HIDDEN = 64, VIEWS = 2, K = 3, FUSED = 2;
constexpr std::size_t TRAIN = 500, HELD_OUT = 100, TEST = 500, SAMPLES = TRAIN + HELD_OUT + TEST;
constexpr std::size_t BATCH = 50, STEPS = 400;
constexpr char DATA[] = "integrations/candle/examples/data/digits.csv"; // a line: 64 pixels from 0 to 16 and the digit
constexpr std::size_t INPUTS[VIEWS] = {32, 8 + 4};

// ---- The network ----

// A linear layer: `inputs` rows of `outputs` weights and a row of biases, from `offset` in the array of all parameters.
struct Layer {
    std::size_t inputs, outputs, offset;
    bool reached[K]; // by each loss
    constexpr std::size_t len() const { return (inputs + 1) * outputs; }
};
constexpr std::size_t ENCODER = 0, HEAD = VIEWS, LAYERS = VIEWS + K;
constexpr std::array<Layer, LAYERS> network() {
    std::array<Layer, LAYERS> layers = {{{INPUTS[0], HIDDEN, 0, {true, false, true}},
                                         {INPUTS[1], HIDDEN, 0, {false, true, true}},
                                         {HIDDEN, CLASSES, 0, {true, false, false}},
                                         {HIDDEN, CLASSES, 0, {false, true, false}},
                                         {VIEWS * HIDDEN, CLASSES, 0, {false, false, true}}}};
    for (std::size_t p = 1; p < LAYERS; p++) {
        layers[p].offset = layers[p - 1].offset + layers[p - 1].len();
    }
    return layers;
}
constexpr std::array<Layer, LAYERS> NETWORK = network();
constexpr std::size_t PARAMETERS = NETWORK.back().offset + NETWORK.back().len();

struct Sample {
    Floats views[VIEWS];
    std::ptrdiff_t label;
};

void linear(const Floats &parameters, const Layer &layer, const float *x, float *y) {
    const float *weights = &parameters[layer.offset];
    std::copy_n(weights + layer.inputs * layer.outputs, layer.outputs, y);
    for (std::size_t i = 0; i < layer.inputs; i++, weights += layer.outputs) {
        for (std::size_t o = 0; o < layer.outputs; o++) {
            y[o] += x[i] * weights[o];
        }
    }
}

// Adds to the gradient of the parameters, and writes the gradient at the inputs if `at_x` is not NULL.
void linear_backward(const Floats &parameters, const Layer &layer, const float *x, const float *at_y, float *gradient,
                     float *at_x) {
    for (std::size_t i = 0; i <= layer.inputs; i++) {
        for (std::size_t o = 0; o < layer.outputs; o++) {
            gradient[layer.offset + i * layer.outputs + o] += (i < layer.inputs ? x[i] : 1) * at_y[o];
        }
        if (at_x != nullptr && i < layer.inputs) {
            const float *weights = &parameters[layer.offset + i * layer.outputs];
            at_x[i] = std::inner_product(weights, weights + layer.outputs, at_y, 0.0F);
        }
    }
}

// The features of both views. Head k < FUSED reads those of view k, the fused head reads all.
Floats encode(const Floats &parameters, const Sample &sample) {
    Floats features(VIEWS * HIDDEN);
    for (std::size_t view = 0; view < VIEWS; view++) {
        linear(parameters, NETWORK[ENCODER + view], sample.views[view].data(), &features[view * HIDDEN]);
    }
    std::replace_if(features.begin(), features.end(), [](float feature) { return feature < 0; }, 0.0F);
    return features;
}

// Writes the gradient of loss k, the mean cross-entropy of head k over a random batch.
void backward(const Floats &parameters, const Sample *samples, std::size_t count, std::mt19937 batch, std::size_t k,
              Floats &gradient) {
    const Layer &head = NETWORK[HEAD + k];
    const std::size_t first = k == FUSED ? 0 : k * HIDDEN;
    std::fill(gradient.begin(), gradient.end(), 0.0F);
    for (std::size_t b = 0; b < BATCH; b++) {
        const Sample &sample = samples[batch() % count];
        const Floats features = encode(parameters, sample);
        Floats at_logits(CLASSES), at_features(VIEWS * HIDDEN);
        linear(parameters, head, &features[first], at_logits.data());
        const float largest = *std::max_element(at_logits.begin(), at_logits.end());
        float sum = 0;
        std::for_each(at_logits.begin(), at_logits.end(), [&](float &at) { sum += at = std::exp(at - largest); });
        std::for_each(at_logits.begin(), at_logits.end(), [&](float &at) { at /= sum * BATCH; });
        at_logits.begin()[sample.label] -= 1.0F / BATCH;
        linear_backward(parameters, head, &features[first], at_logits.data(), gradient.data(), &at_features[first]);
        for (std::size_t i = 0; i < features.size(); i++) {
            at_features[i] = features[i] > 0 ? at_features[i] : 0;
        }
        for (std::size_t view = 0; view < VIEWS; view++) {
            if (NETWORK[ENCODER + view].reached[k]) {
                linear_backward(parameters, NETWORK[ENCODER + view], sample.views[view].data(),
                                &at_features[view * HIDDEN], gradient.data(), nullptr);
            }
        }
    }
}

// ---- Gradient-Blending ----

// A gradient of all parameters on the host, and its address for the blender: the same memory, or a copy on a CUDA
// device. (A trainer on the GPU has its gradients there and copies nothing.)
class Buffer {
public:
    explicit Buffer(std::int32_t device) : host(PARAMETERS), address_(reinterpret_cast<std::uintptr_t>(host.data())) {
        void *context = nullptr;
        driver_ = device == GRADBLEND_CPU ? nullptr : dlopen("libcuda.so.1", RTLD_NOW);
        call<unsigned>("cuInit", 0);
        call<void **, int>("cuDevicePrimaryCtxRetain", &context, device);
        call<void *>("cuCtxSetCurrent", context);
        call<Address *, std::size_t>("cuMemAlloc_v2", &address_, bytes());
    }
    Buffer(Buffer &&) = delete;
    ~Buffer() { call<Address>("cuMemFree_v2", address_); }

    void to_device() { call<Address, void *, std::size_t>("cuMemcpyHtoD_v2", address_, host.data(), bytes()); }
    void to_host() { call<void *, Address, std::size_t>("cuMemcpyDtoH_v2", host.data(), address_, bytes()); }
    // The address of the gradient of one layer.
    float *at(const Layer &layer) const { return reinterpret_cast<float *>(address_) + layer.offset; }

    Floats host;

private:
    using Address = unsigned long long;
    static std::size_t bytes() { return PARAMETERS * sizeof(float); }

    // Calls a function of the CUDA driver; on the CPU does nothing.
    template <typename... Arguments>
    void call(const char *name, Arguments... arguments) const {
        if (driver_ == nullptr) {
            return;
        }
        const auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(driver_, name));
        if (function == nullptr || function(arguments...) != 0) {
            std::fprintf(stderr, "%s failed\n", name);
            std::exit(1);
        }
    }

    void *driver_ = nullptr;
    Address address_;
};

// A blender, the gradients of a step, and the plan for them. They do not move, so one plan is enough.
class Blending {
public:
    explicit Blending(std::int32_t device)
        : losses{Buffer(device), Buffer(device), Buffer(device)}, held_out(device), blended(device),
          blender_(device, config()) {
        gradblend::Tensors tensors(K);
        for (const Layer &layer : NETWORK) {
            const auto reached = [&](std::size_t k, const Buffer &from) {
                return layer.reached[k] ? from.at(layer) : nullptr; // NULL is absent
            };
            // t is v_fused of the same batch; docs/method.md compares it with the gradient of another batch. Where the
            // fused loss does not reach, t and g are absent.
            tensors.add(layer.len(), reached(FUSED, losses[FUSED]), reached(FUSED, held_out),
                        {reached(0, losses[0]), reached(1, losses[1]), reached(FUSED, losses[FUSED])},
                        blended.at(layer));
        }
        plan_ = blender_.plan(tensors);
    }

    // Blends with the weights in force, observes and reweights, in one pass over memory.
    void step() {
        std::for_each(std::begin(losses), std::end(losses), [](Buffer &loss) { loss.to_device(); });
        held_out.to_device();
        blender_.step(plan_);
        blended.to_host();
    }

    gradblend_report report() { return blender_.report(); }

    Buffer losses[K], held_out, blended;

private:
    static gradblend_config config() {
        gradblend_config config = gradblend::config(K);
        config.cadence = GRADBLEND_EVERY_OBSERVATION;
        config.threads = 1; // the gradients are small
        return config;
    }

    // The plan is destroyed first and waits for its work.
    gradblend::Blender blender_;
    gradblend::Plan plan_;
};

// ---- Training ----

// Reads the digits, adds noise to the pixels and scales the features to about -1 to 1.
std::vector<Sample> read_samples(std::mt19937 &random) {
    std::ifstream file(DATA);
    std::normal_distribution<float> noise(0, 6);
    std::vector<Sample> samples;
    for (std::string line; std::getline(file, line);) {
        Sample sample{{Floats(INPUTS[0]), Floats(INPUTS[1])}, 0};
        const char *field = line.c_str();
        // The next number of the line, which is from 0 to `limit`.
        const auto number = [&](float limit) {
            char *end;
            const float value = std::strtof(field, &end);
            if (end == field || !(value >= 0 && value <= limit) || (*end != ',' && *end != '\r' && *end != 0)) {
                const std::string where = std::string(DATA) + ": line " + std::to_string(samples.size() + 1);
                throw std::runtime_error(where + ": expected 64 pixels from 0 to 16 and a digit");
            }
            field = *end == ',' ? end + 1 : end;
            return value;
        };
        for (std::size_t i = 0; i < 64; i++) {
            const float pixel = (number(16) - 5 + noise(random)) / 8;
            (i < 32 ? sample.views[0][i] : sample.views[1][i % 8]) += i < 32 ? pixel : pixel / 2;
            sample.views[1][8 + i / 8 % 4] += i < 32 ? 0 : pixel / 3;
        }
        sample.label = static_cast<std::ptrdiff_t>(number(CLASSES - 1));
        samples.push_back(sample);
    }
    if (samples.size() < SAMPLES) {
        throw std::runtime_error(std::string("run in the root of the repository, which has ") + DATA);
    }
    std::shuffle(samples.begin(), samples.end(), random);
    return samples;
}

// Trains on the fused loss alone or on the blended gradients, by Adam; returns the accuracy of the fused head.
double train(unsigned seed, bool blends, std::int32_t device) {
    std::mt19937 random(seed);
    const std::vector<Sample> samples = read_samples(random);
    Floats parameters(PARAMETERS), m(PARAMETERS), v(PARAMETERS);
    for (const Layer &layer : NETWORK) {
        std::uniform_real_distribution<float> uniform(-1, 1);
        const float bound = 1 / std::sqrt(static_cast<float>(layer.inputs));
        std::generate_n(&parameters[layer.offset], layer.len(), [&] { return bound * uniform(random); });
    }
    Blending blending(device);
    for (std::size_t step = 1; step <= STEPS; step++) {
        // The losses share a batch.
        const std::mt19937 batch(random());
        for (std::size_t k = blends ? 0 : FUSED; k < K; k++) {
            backward(parameters, samples.data(), TRAIN, batch, k, blending.losses[k].host);
        }
        if (blends) {
            backward(parameters, &samples[TRAIN], HELD_OUT, batch, FUSED, blending.held_out.host);
            blending.step();
        }
        const Floats &gradient = (blends ? blending.blended : blending.losses[FUSED]).host;
        const float first = 1 - std::pow(0.9F, step), second = 1 - std::pow(0.999F, step);
        for (std::size_t i = 0; i < PARAMETERS; i++) {
            m[i] = 0.9F * m[i] + 0.1F * gradient[i];
            v[i] = 0.999F * v[i] + 0.001F * gradient[i] * gradient[i];
            parameters[i] -= 1e-3F * (m[i] / first) / (std::sqrt(v[i] / second) + 1e-8F);
        }
    }
    if (blends) {
        const gradblend_report report = blending.report();
        std::printf("seed %u: weights of view 0 %.2f, view 1 %.2f, fused %.2f\n", seed, report.weights[0],
                    report.weights[1], report.weights[FUSED]);
    }
    double right = 0;
    for (std::size_t s = TRAIN + HELD_OUT; s < SAMPLES; s++) {
        Floats logits(CLASSES);
        linear(parameters, NETWORK[HEAD + FUSED], encode(parameters, samples[s]).data(), logits.data());
        right += std::max_element(logits.begin(), logits.end()) == logits.begin() + samples[s].label;
    }
    return right / TEST;
}

} // namespace

int main(int count, char **arguments) {
    std::int32_t device = GRADBLEND_CPU;
    unsigned seeds = 4;
    char rest; // after a number there is nothing
    for (int i = 1; i < count; i++) {
        if (arguments[i] == std::string("--device") && i + 1 < count &&
            std::sscanf(arguments[i + 1], "%9d%c", &device, &rest) == 1) {
            i++;
        } else if (arguments[i] == std::string("--quick")) {
            seeds = 1;
        } else {
            std::fprintf(stderr, "usage: %s [--device N] [--quick]\n", arguments[0]);
            return 2;
        }
    }
    try {
        double fused = 0, blended = 0;
        for (unsigned seed = 0; seed < seeds; seed++) {
            fused += train(seed, false, device) / seeds;
            blended += train(seed, true, device) / seeds;
        }
        std::printf("test accuracy: fused loss alone %.3f, blended gradients %.3f\n", fused, blended);
        return std::min(fused, blended) > 4.0 / CLASSES ? 0 : 1;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
