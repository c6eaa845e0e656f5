/*
 * Compiled alone, as C and as C++: the headers need nothing before them, may be included twice, and leave DLPack's
 * structs to dlpack.h, which comes first with -DDLPACK_FIRST. The vectors are of every record: nvcc 13.0 crashes at C++20
 * on vectors of unnamed structs.
 */
#ifndef DLPACK_FIRST
#include "gradblend.h"
#include "gradblend.h"
#endif

typedef struct DLManagedTensor {
    void *manager_ctx;
} DLManagedTensor;
typedef struct DLManagedTensorVersioned {
    void *manager_ctx;
} DLManagedTensorVersioned;

#ifdef __cplusplus
#include "gradblend.hpp"
#include "gradblend.hpp"

template class std::vector<gradblend_config>;
template class std::vector<gradblend_tensor>;
template class std::vector<gradblend_report>;
template class std::vector<gradblend_dlpack>;
#endif

#include "gradblend.h"

struct gradblend_config;
struct gradblend_tensor;
struct gradblend_report;
struct gradblend_dlpack;

int main(void) {
    DLManagedTensor array = {0};
    gradblend_dlpack record = {&array, 0};
    return record.managed == &array && gradblend_version() == GRADBLEND_VERSION ? 0 : 1;
}
