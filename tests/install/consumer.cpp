/* The same as consumer.c with the classes of gradblend.hpp. */
#include <cmath>
#include <cstdio>
#include <exception>

#include <gradblend.hpp>

int main() {
    const float train[] = {1.0f, 2.0f}, valid[] = {1.0f, 1.0f};
    const float first[] = {1.0f, 0.5f}, second[] = {0.5f, 1.0f};
    float blended[2];
    try {
        auto blender = gradblend::Blender::create(GRADBLEND_CPU, gradblend::config(2));
        gradblend::Tensors tensors(2);
        tensors.add(2, train, valid, {first, second}, blended);
        const auto plan = blender.plan(tensors);
        blender.step(plan);
        blender.reweight();
        const gradblend_report report = blender.report();
        std::printf("C++: weights %.3f %.3f, blended %.3f %.3f\n", report.weights[0], report.weights[1], blended[0],
                    blended[1]);
        return !(std::fabs(report.weights[0] - 0.8) < 1e-6 && std::fabs(report.weights[1] - 0.2) < 1e-6 &&
                 report.observed == 1 && blended[0] == 0.75f && blended[1] == 0.75f);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
