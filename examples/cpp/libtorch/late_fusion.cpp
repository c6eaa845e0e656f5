// A late-fusion network of libtorch on two views of handwritten digits, the upper and the lower half, trained with
// Gradient-Blending. CMakeLists.txt has the commands.
//
//     late_fusion [--epochs N] [FILE]
//
// FILE has 64 pixels from 0 to 16 and a label in each line; by default it is that of the candle example.

#include "gradblend_torch.hpp"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

namespace {

constexpr char DIGITS[] = "integrations/candle/examples/data/digits.csv";
constexpr std::int64_t VIEW = 32, HIDDEN = 32, CLASSES = 10, BATCH = 50;
// Few samples, so that heads overfit: for training, and held out. The rest are for testing.
constexpr std::int64_t TRAINING = 300, HELD_OUT = 60;

struct Samples {
    torch::Tensor pixels, labels;

    Samples part(std::int64_t from, std::int64_t count) const {
        return {pixels.narrow(0, from, count), labels.narrow(0, from, count)};
    }

    // A batch of samples drawn at random.
    Samples draw() const {
        const torch::Tensor index = torch::randint(labels.size(0), {BATCH}, torch::kLong);
        return {pixels.index_select(0, index), labels.index_select(0, index)};
    }
};

Samples read(const std::string &path) {
    std::ifstream file(path);
    std::vector<float> pixels;
    std::vector<std::int64_t> labels;
    for (std::string line; std::getline(file, line);) {
        std::replace(line.begin(), line.end(), ',', ' ');
        std::istringstream numbers(line);
        std::vector<float> row{std::istream_iterator<float>(numbers), {}};
        TORCH_CHECK(row.size() == 65, path, ", line ", labels.size() + 1, ": expected 65 numbers, got ", row.size());
        labels.push_back(static_cast<std::int64_t>(row.back()));
        pixels.insert(pixels.end(), row.begin(), row.end() - 1);
    }
    const auto count = static_cast<std::int64_t>(labels.size());
    TORCH_CHECK(count > TRAINING + HELD_OUT, path, ": ", count, " digits, expected more than ", TRAINING + HELD_OUT);
    return {torch::tensor(pixels).reshape({count, 2 * VIEW}) / 16, torch::tensor(labels)};
}

struct NetworkImpl : torch::nn::Module {
    torch::nn::Linear top_encoder{VIEW, HIDDEN}, bottom_encoder{VIEW, HIDDEN};
    torch::nn::Linear top{HIDDEN, CLASSES}, bottom{HIDDEN, CLASSES}, fused{2 * HIDDEN, CLASSES};

    NetworkImpl() {
        register_module("top_encoder", top_encoder);
        register_module("bottom_encoder", bottom_encoder);
        register_module("top", top);
        register_module("bottom", bottom);
        register_module("fused", fused);
    }

    // Logits of the heads of the two views, and of the fused one.
    std::vector<torch::Tensor> forward(const torch::Tensor &pixels) {
        const torch::Tensor a = torch::relu(top_encoder(pixels.narrow(1, 0, VIEW)));
        const torch::Tensor b = torch::relu(bottom_encoder(pixels.narrow(1, VIEW, VIEW)));
        return {top(a), bottom(b), fused(torch::cat({a, b}, 1))};
    }

    std::vector<torch::Tensor> losses(const Samples &samples) {
        std::vector<torch::Tensor> losses;
        for (const torch::Tensor &logits : forward(samples.pixels)) {
            losses.push_back(torch::nn::functional::cross_entropy(logits, samples.labels));
        }
        return losses;
    }
};
TORCH_MODULE(Network);

void train(const std::string &path, long epochs) {
    const Samples all = read(path);
    const Samples training = all.part(0, TRAINING), held_out = all.part(TRAINING, HELD_OUT);
    const Samples test = all.part(TRAINING + HELD_OUT, all.labels.size(0) - TRAINING - HELD_OUT);

    Network network;
    torch::optim::Adam optimizer(network->parameters(), torch::optim::AdamOptions(3e-3));
    gradblend::torch::GradBlend gb(network->named_parameters(),
                                   gradblend::torch::GradBlendConfig(3).every(2).min_weight({0, 0, 0.3}));
    for (long epoch = 1; epoch <= epochs; epoch++) {
        for (std::int64_t step = 0; step < TRAINING / BATCH; step++) {
            optimizer.zero_grad();
            gb.backward(network->losses(training.draw()), [&] { return network->losses(held_out.draw()).back(); });
            optimizer.step();
        }
        if (epoch % 10 == 0 || epoch == epochs) {
            const torch::NoGradGuard no_grad;
            std::printf("epoch %ld: weights", epoch);
            const torch::Tensor weights = gb.weights().cpu();
            for (std::int64_t k = 0; k < 3; k++) {
                std::printf(" %.2f", weights[k].item<float>());
            }
            std::printf(", accuracy of top, bottom, fused");
            for (const torch::Tensor &logits : network->forward(test.pixels)) {
                std::printf(" %.3f", logits.argmax(1).eq(test.labels).to(torch::kFloat).mean().item<float>());
            }
            std::printf("\n");
        }
    }
}

} // namespace

int main(int count, char **words) {
    std::string path = DIGITS;
    long epochs = 30;
    for (int i = 1; i < count; i++) {
        if (std::strcmp(words[i], "--epochs") == 0 && i + 1 < count) {
            epochs = std::strtol(words[++i], nullptr, 10);
        } else {
            path = words[i];
        }
    }
    try {
        torch::manual_seed(0);
        train(path, epochs);
        return 0;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
