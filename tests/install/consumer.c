/* Checks an installed gradblend from C: the header fits the library, and a step gives the right weights. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <gradblend.h>

static void check(gradblend_status status, const char *what)
{
    char message[256];
    if (status != GRADBLEND_OK) {
        gradblend_last_error(message, sizeof message);
        fprintf(stderr, "%s: %s: %s\n", what, gradblend_status_name(status), message);
        exit(1);
    }
}

int main(void)
{
    const float train[] = {1.0f, 2.0f}, valid[] = {1.0f, 1.0f};
    const float first[] = {1.0f, 0.5f}, second[] = {0.5f, 1.0f};
    const void *const modalities[] = {first, second};
    float blended[2];
    const gradblend_tensor tensor = {2, GRADBLEND_F32, train, valid, modalities, blended};
    gradblend_config config;
    gradblend_blender *blender;
    gradblend_plan *plan;
    gradblend_report report = {.size = sizeof report};

    if (gradblend_version() != GRADBLEND_VERSION) {
        fprintf(stderr, "header and library are of different versions\n");
        return 1;
    }
    check(gradblend_config_default(2, &config), "config_default");
    check(gradblend_blender_create(GRADBLEND_CPU, &config, &blender), "blender_create");
    check(gradblend_plan_create(blender, &tensor, 1, &plan), "plan_create");
    check(gradblend_step(blender, plan, NULL), "step");
    check(gradblend_reweight(blender, NULL), "reweight");
    check(gradblend_get_report(blender, &report, NULL), "get_report");
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);

    /* c = (1.5, 1.5) and d = (0.5, 1), so w ~ (1.5 / 0.25, 1.5 / 1). The step blended with 1/2 each. */
    printf("C: weights %.3f %.3f, blended %.3f %.3f\n", report.weights[0], report.weights[1], blended[0], blended[1]);
    return !(fabs(report.weights[0] - 0.8) < 1e-6 && fabs(report.weights[1] - 0.2) < 1e-6 && report.observed == 1 &&
             blended[0] == 0.75f && blended[1] == 0.75f);
}
