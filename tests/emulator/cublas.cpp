// cuBLAS, as far as the benchmarks use it, on the stand-in driver. Every call is one launch there, in a capture too.
//
// Sums are f32, as those of a device, but in an order of their own.

#include <algorithm>
#include <functional>

#include "cuda.hpp"

#include "vec128.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
int cuCtxGetCurrent(void **context);
int cuStreamSynchronize(void *stream);
int standin_launch(void *stream, const std::function<void()> *work);
}

namespace {

enum : int { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum : int { HOST = 0, DEVICE = 1 };  // where scalars are
enum : int { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
constexpr int COMPUTE_32F = 68, VERSION = 130000;

struct Handle {
    void *stream;
    int pointers;
};

template <class D>
using Element = std::conditional_t<D::BYTES == 4, uint32_t, unsigned short>;

template <class D>
float get(const void *list, int64_t i) {
    float x[D::PER_WORD];
    D::widen(static_cast<const Element<D> *>(list)[i], x);
    return x[0];
}

template <class D>
void put(void *list, int64_t i, float value) {
    const float x[D::PER_WORD] = {value};
    static_cast<Element<D> *>(list)[i] = static_cast<Element<D>>(D::narrow(x));
}

// The sum of term(first) up to term(end), by halves, which keeps the error of a long one small.
template <class Term>
float sum(int64_t first, int64_t end, const Term &term) {
    if (end - first > 16) {
        const int64_t middle = first + (end - first) / 2;
        return sum(first, middle, term) + sum(middle, end, term);
    }
    float all = 0.0f;
    for (int64_t i = first; i < end; ++i) {
        all += term(i);
    }
    return all;
}

// Calls `with` with the dtype that a code stands for.
template <class With>
int with_dtype(int code, With with) {
    switch (code) {
        case CUDA_R_32F: return with(Float());
        case CUDA_R_16F: return with(Half());
        case CUDA_R_16BF: return with(Bfloat());
        default: return NOT_SUPPORTED;
    }
}

// A scalar of the caller's, as a launch reads it: on the host during the call, on a device when it runs.
std::function<float()> scalar(const Handle &handle, const void *at) {
    const float *from = static_cast<const float *>(at);
    if (handle.pointers == DEVICE) {
        return [=] { return *from; };
    }
    return [value = *from] { return value; };
}

// What is wrong with a call, or SUCCESS.
int check(const Handle *handle, bool valid) {
    return handle == nullptr ? NOT_INITIALIZED : valid ? SUCCESS : INVALID_VALUE;
}

int launch(const Handle &handle, const std::function<void()> &work) {
    return standin_launch(handle.stream, &work) == 0 ? SUCCESS : EXECUTION_FAILED;
}

}  // namespace

EXPORT int cublasCreate_v2(Handle **handle) {
    void *context = nullptr;
    if (handle == nullptr || cuCtxGetCurrent(&context) != 0 || context == nullptr) {
        return handle == nullptr ? INVALID_VALUE : NOT_INITIALIZED;
    }
    *handle = new Handle{nullptr, HOST};
    return SUCCESS;
}

EXPORT int cublasDestroy_v2(Handle *handle) {
    const int status = check(handle, true);
    delete handle;
    return status;
}

EXPORT int cublasGetVersion_v2(Handle *handle, int *version) {
    if (const int wrong = check(handle, version != nullptr)) {
        return wrong;
    }
    *version = VERSION;
    return SUCCESS;
}

EXPORT int cublasSetStream_v2(Handle *handle, void *stream) {
    if (const int wrong = check(handle, true)) {
        return wrong;
    }
    handle->stream = stream;
    return SUCCESS;
}

EXPORT int cublasSetPointerMode_v2(Handle *handle, int pointers) {
    if (const int wrong = check(handle, pointers == HOST || pointers == DEVICE)) {
        return wrong;
    }
    handle->pointers = pointers;
    return SUCCESS;
}

// Nothing here needs one.
EXPORT int cublasSetWorkspace_v2(Handle *handle, void *workspace, size_t) {
    return check(handle, reinterpret_cast<uintptr_t>(workspace) % 256 == 0);
}

EXPORT int cublasDotEx(Handle *handle, int n, const void *x, int x_type, int x_step, const void *y, int y_type,
                       int y_step, void *result, int result_type, int execution) {
    if (const int wrong = check(handle, result != nullptr && (n <= 0 || (x != nullptr && y != nullptr)))) {
        return wrong;
    }
    if (y_type != x_type || result_type != x_type || execution != CUDA_R_32F || x_step < 1 || y_step < 1) {
        return NOT_SUPPORTED;
    }
    const int status = with_dtype(x_type, [=](auto dtype) {
        using D = decltype(dtype);
        return launch(*handle, [=] {
            const auto term = [=](int64_t i) { return get<D>(x, i * x_step) * get<D>(y, i * y_step); };
            put<D>(result, 0, sum(0, n, term));
        });
    });
    if (status == SUCCESS && handle->pointers == HOST) {
        return cuStreamSynchronize(handle->stream) == 0 ? SUCCESS : EXECUTION_FAILED;
    }
    return status;
}

EXPORT int cublasAxpyEx(Handle *handle, int n, const void *alpha, int alpha_type, const void *x, int x_type, int x_step,
                        void *y, int y_type, int y_step, int execution) {
    if (const int wrong = check(handle, alpha != nullptr && (n <= 0 || (x != nullptr && y != nullptr)))) {
        return wrong;
    }
    if (alpha_type != CUDA_R_32F || y_type != x_type || execution != CUDA_R_32F || x_step < 1 || y_step < 1) {
        return NOT_SUPPORTED;
    }
    return with_dtype(x_type, [=](auto dtype) {
        using D = decltype(dtype);
        return launch(*handle, [=, alpha = scalar(*handle, alpha)] {
            const float a = alpha();
            for (int64_t i = 0; i < n; ++i) {
                put<D>(y, i * y_step, a * get<D>(x, i * x_step) + get<D>(y, i * y_step));
            }
        });
    });
}

EXPORT int cublasGemmEx(Handle *handle, int a_turned, int b_turned, int m, int n, int k, const void *alpha,
                        const void *a, int a_type, int a_step, const void *b, int b_type, int b_step, const void *beta,
                        void *c, int c_type, int c_step, int compute, int) {
    const bool steps = a_step >= std::max(1, a_turned ? k : m) && b_step >= std::max(1, b_turned ? n : k) &&
                       c_step >= std::max(1, m) && std::min({m, n, k}) >= 0;
    if (const int wrong = check(handle, steps && alpha && beta && a && b && c)) {
        return wrong;
    }
    if ((a_turned | b_turned | 1) != 1 || b_type != a_type || (c_type != a_type && c_type != CUDA_R_32F) ||
        compute != COMPUTE_32F) {
        return NOT_SUPPORTED;
    }
    const auto work = [=, alpha = scalar(*handle, alpha), beta = scalar(*handle, beta)](auto dtype, auto c_dtype) {
        using D = decltype(dtype);
        using C = decltype(c_dtype);
        for (int64_t at = 0; at < int64_t(m) * n; ++at) {
            const int64_t i = at % m, j = at / m, out = j * c_step + i;
            const float dot = sum(0, k, [&](int64_t l) {
                return get<D>(a, a_turned ? i * a_step + l : l * a_step + i) *
                       get<D>(b, b_turned ? l * b_step + j : j * b_step + l);
            });
            // A beta of 0 forgets even a NaN.
            put<C>(c, out, alpha() * dot + (beta() == 0.0f ? 0.0f : beta() * get<C>(c, out)));
        }
    };
    return with_dtype(a_type, [&](auto dtype) {
        return with_dtype(c_type, [&](auto c_dtype) { return launch(*handle, [=] { work(dtype, c_dtype); }); });
    });
}
