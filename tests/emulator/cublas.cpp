// The functions of cuBLAS that the laboratory calls, on the emulator: contiguous lists, column-major matrices, f32 sums
// in an order of their own. Each call is one kernel launch. Anything else is rejected as not supported.

#include <functional>

#include "cuda.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
int cuCtxGetCurrent(void **context);
int cuStreamSynchronize(void *stream);
int emulator_launch(void *stream, const std::function<void()> *task);
}

namespace {

enum : int { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum : int { HOST = 0, DEVICE = 1 };  // cublasPointerMode_t
constexpr int CUDA_R_32F = 0, CUDA_R_16F = 2, COMPUTE_32F = 68, VERSION = 130000;

struct Handle {
    void *stream;
    int pointer_mode;
};

// Elements on the device, f32, f16 or bf16 by their type.
struct List {
    void *data;
    int type;

    float operator[](int64_t i) const {
        if (type == CUDA_R_32F) {
            return static_cast<const float *>(data)[i];
        }
        const unsigned short bits = static_cast<const unsigned short *>(data)[i];
        return type == CUDA_R_16F ? __half2float({bits}) : __uint_as_float(static_cast<uint32_t>(bits) << 16);
    }
    void set(int64_t i, float value) const {
        if (type == CUDA_R_32F) {
            static_cast<float *>(data)[i] = value;
        } else {
            const unsigned short bits =
                type == CUDA_R_16F ? __float2half_rn(value).bits : __float2bfloat16_rn(value).bits;
            static_cast<unsigned short *>(data)[i] = bits;
        }
    }
};

List list(const void *data, int type) { return {const_cast<void *>(data), type}; }

// The sum of term(first) to term(end - 1) by halves, which keeps the error of a long sum small.
template <class Term>
float sum(int64_t first, int64_t end, const Term &term) {
    if (end - first > 1) {
        const int64_t middle = first + (end - first) / 2;
        return sum(first, middle, term) + sum(middle, end, term);
    }
    return first < end ? term(first) : 0.0f;
}

// A scalar: read during the call if it is the host's, or else when the launch runs.
std::function<float()> scalar(const Handle &handle, const void *address) {
    const float *from = static_cast<const float *>(address);
    return handle.pointer_mode == DEVICE ? std::function<float()>([=] { return *from; })
                                         : [value = *from] { return value; };
}

int launch(const Handle &handle, const std::function<void()> &task) {
    return emulator_launch(handle.stream, &task) == 0 ? SUCCESS : EXECUTION_FAILED;
}

}  // namespace

EXPORT int cublasCreate_v2(Handle **handle) {
    void *context = nullptr;
    if (cuCtxGetCurrent(&context) != 0 || context == nullptr) {
        return NOT_INITIALIZED;
    }
    *handle = new Handle{nullptr, HOST};
    return SUCCESS;
}

EXPORT int cublasDestroy_v2(Handle *handle) { return delete handle, SUCCESS; }
EXPORT int cublasGetVersion_v2(Handle *, int *version) { return *version = VERSION, SUCCESS; }
EXPORT int cublasSetStream_v2(Handle *handle, void *stream) { return handle->stream = stream, SUCCESS; }
EXPORT int cublasSetPointerMode_v2(Handle *handle, int mode) { return handle->pointer_mode = mode, SUCCESS; }
EXPORT int cublasSetWorkspace_v2(Handle *, void *workspace, size_t) {
    return reinterpret_cast<uintptr_t>(workspace) % 256 == 0 ? SUCCESS : INVALID_VALUE;
}

EXPORT int cublasDotEx(Handle *handle, int n, const void *x, int x_type, int x_step, const void *y, int y_type,
                       int y_step, void *result, int result_type, int execution) {
    if (y_type != x_type || result_type != x_type || execution != CUDA_R_32F || x_step != 1 || y_step != 1) {
        return NOT_SUPPORTED;
    }
    const int status = launch(*handle, [=, a = list(x, x_type), b = list(y, y_type)] {
        list(result, result_type).set(0, sum(0, n, [&](int64_t i) { return a[i] * b[i]; }));
    });
    const bool synchronize = status == SUCCESS && handle->pointer_mode == HOST;
    return synchronize && cuStreamSynchronize(handle->stream) != 0 ? EXECUTION_FAILED : status;
}

EXPORT int cublasAxpyEx(Handle *handle, int n, const void *alpha, int alpha_type, const void *x, int x_type, int x_step,
                        void *y, int y_type, int y_step, int execution) {
    if (alpha_type != CUDA_R_32F || y_type != x_type || execution != CUDA_R_32F || x_step != 1 || y_step != 1) {
        return NOT_SUPPORTED;
    }
    return launch(*handle, [=, alpha = scalar(*handle, alpha), x = list(x, x_type), y = list(y, y_type)] {
        for (int64_t i = 0; i < n; ++i) {
            y.set(i, alpha() * x[i] + y[i]);
        }
    });
}

EXPORT int cublasGemmEx(Handle *handle, int a_transposed, int b_transposed, int m, int n, int k, const void *alpha,
                        const void *a, int a_type, int a_step, const void *b, int b_type, int b_step, const void *beta,
                        void *c, int c_type, int c_step, int compute, int) {
    if (b_transposed || b_type != a_type || (c_type != a_type && c_type != CUDA_R_32F) || compute != COMPUTE_32F) {
        return NOT_SUPPORTED;
    }
    return launch(*handle, [=, alpha = scalar(*handle, alpha), beta = scalar(*handle, beta), a = list(a, a_type),
                            b = list(b, b_type), c = list(c, c_type)] {
        for (int64_t at = 0; at < int64_t(m) * n; ++at) {
            const int64_t i = at % m, j = at / m, out = j * c_step + i;
            const float dot = sum(
                0, k, [&](int64_t l) { return a[a_transposed ? i * a_step + l : l * a_step + i] * b[j * b_step + l]; });
            // A beta of 0 does not read C.
            c.set(out, alpha() * dot + (beta() == 0.0f ? 0.0f : beta() * c[out]));
        }
    });
}
