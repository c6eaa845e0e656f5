/*
 * A library with the ABI of version 0.1.0, for programs compiled with a later header: it accepts and writes records of that
 * version alone, and has the library that GRADBLEND_LIBRARY names do the work.
 */
#include "gradblend.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *function(const char *name) {
    static void *library;
    if (!library && !(library = dlopen(getenv("GRADBLEND_LIBRARY"), RTLD_NOW | RTLD_LOCAL))) {
        fprintf(stderr, "%s\n", dlerror());
        abort();
    }
    return dlsym(library, name);
}

/* Defines a function that calls the one of the same name in the other library. */
#define FORWARD(result, name, parameters, arguments)                                                                   \
    static result forward_##name parameters {                                                                          \
        void *address = function("gradblend_" #name);                                                                  \
        result(*forward) parameters;                                                                                   \
        memcpy(&forward, &address, sizeof address);                                                                    \
        return forward arguments;                                                                                      \
    }
#define EXPORT(result, name, parameters, arguments)                                                                    \
    FORWARD(result, name, parameters, arguments)                                                                       \
    result gradblend_##name parameters { return forward_##name arguments; }

EXPORT(gradblend_status, plan_create,
       (const gradblend_blender *b, const gradblend_tensor *t, uint64_t n, gradblend_plan **p), (b, t, n, p))
EXPORT(gradblend_status, step, (gradblend_blender *b, const gradblend_plan *p, void *s), (b, p, s))
EXPORT(gradblend_status, reweight, (gradblend_blender *b, void *s), (b, s))
EXPORT(size_t, last_error, (char *buffer, size_t bytes), (buffer, bytes))
FORWARD(gradblend_status, blender_create, (int32_t d, const gradblend_config *c, gradblend_blender **b), (d, c, b))
FORWARD(gradblend_status, solve,
        (const gradblend_config *c, const double *m, const double *s, const double *w, double *to, uint32_t *flags),
        (c, m, s, w, to, flags))
FORWARD(gradblend_status, get_report, (gradblend_blender *b, gradblend_report *r, void *s), (b, r, s))

void gradblend_blender_destroy(gradblend_blender *blender) {
    void *address = function("gradblend_blender_destroy");
    void (*forward)(gradblend_blender *);
    memcpy(&forward, &address, sizeof address);
    forward(blender);
}

uint32_t gradblend_version(void) {
    return GRADBLEND_VERSION;
}

gradblend_status gradblend_config_default(uint32_t modalities, gradblend_config *config) {
    *config = (gradblend_config){.size = sizeof *config, .modalities = modalities, .average = GRADBLEND_EMA,
                                 .decay = 0.99, .damping = 1e-12};
    return GRADBLEND_OK;
}

/* Rejects any other size, as version 0.1.0 does. */
gradblend_status gradblend_blender_create(int32_t device, const gradblend_config *config, gradblend_blender **blender) {
    return config->size == sizeof *config ? forward_blender_create(device, config, blender) : GRADBLEND_INVALID_ARGUMENT;
}

gradblend_status gradblend_solve(const gradblend_config *config, const double *m, const double *s, const double *in_force,
                                 double *weights, uint32_t *flags) {
    return config->size == sizeof *config ? forward_solve(config, m, s, in_force, weights, flags)
                                          : GRADBLEND_INVALID_ARGUMENT;
}

/* Does not read `size`, and writes the record of version 0.1.0, whatever the caller's is. */
gradblend_status gradblend_get_report(gradblend_blender *blender, gradblend_report *report, void *stream) {
    gradblend_report whole;
    gradblend_status status = forward_get_report(blender, &whole, stream);
    if (status == GRADBLEND_OK) {
        *report = whole;
    }
    return status;
}
