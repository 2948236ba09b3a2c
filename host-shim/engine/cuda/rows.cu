// The small operations between the products, each row by itself; ops.rs has the formulas.
#include "engine.cuh"

using namespace engine;

constexpr int THREADS = 256;

struct Embed {
    const float *panels;
    const uint32_t *tokens;
    float *out;
    uint32_t rows, hidden;
};

// A block for each row.
extern "C" __global__ void __launch_bounds__(THREADS) embed(const Embed p) {
    if (blockIdx.x >= p.rows) {
        return;
    }
    uint32_t token = p.tokens[blockIdx.x];
    const float *column = p.panels + (uint64_t)(token / PANEL) * PANEL * p.hidden + token % PANEL;
    float *out = p.out + (uint64_t)blockIdx.x * p.hidden;
    for (uint32_t i = threadIdx.x; i < p.hidden; i += THREADS) {
        out[i] = column[(uint64_t)i * PANEL];
    }
}

struct Norm {
    const float *x;
    // The rows taken; null: all.
    const uint32_t *chosen;
    const float *weight;
    float *out;
    uint32_t rows, hidden;
    float epsilon;
};

// A block for each row. Thread `t` sums the squares at `t`, `t + 256`, ...; the threads' sums are added as a tree.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const Norm p) {
    if (blockIdx.x >= p.rows) {
        return;
    }
    uint32_t row = p.chosen == nullptr ? blockIdx.x : p.chosen[blockIdx.x];
    const float *x = p.x + (uint64_t)row * p.hidden;
    float *out = p.out + (uint64_t)blockIdx.x * p.hidden;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < p.hidden; i += THREADS) {
        sum = __fmaf_rn(x[i], x[i], sum);
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, distance));
    }
    __shared__ float sums[THREADS / 32];
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    sum = 0.0f;
    for (int warp = 0; warp < THREADS / 32; ++warp) {
        sum = __fadd_rn(sum, sums[warp]);
    }
    float scale = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)p.hidden), p.epsilon)));
    for (uint32_t i = threadIdx.x; i < p.hidden; i += THREADS) {
        out[i] = __fmul_rn(__fmul_rn(x[i], scale), p.weight[i]);
    }
}

struct Angles {
    const uint32_t *positions;
    const double *frequencies;
    // Cosine and sine, `[rows, pairs]`.
    float2 *out;
    uint32_t rows, pairs;
};

extern "C" __global__ void __launch_bounds__(THREADS) rope_angles(const Angles p) {
    uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= p.rows * p.pairs) {
        return;
    }
    double sine, cosine;
    sincos((double)p.positions[index / p.pairs] * p.frequencies[index % p.pairs], &sine, &cosine);
    p.out[index] = make_float2((float)cosine, (float)sine);
}

struct Rope {
    // `[rows, heads, 2 * pairs]`
    const float *x;
    const float2 *angles;
    // The same shape, in the cache's dtype.
    void *out;
    // Heads of a row, and those of them that turn: the first ones.
    uint32_t rows, heads, turned, pairs;
};

// A block for each row.
template <class T> __device__ void rope(const Rope &p) {
    if (blockIdx.x >= p.rows) {
        return;
    }
    uint32_t row_pairs = p.heads * p.pairs;
    const float2 *x = reinterpret_cast<const float2 *>(p.x) + (uint64_t)blockIdx.x * row_pairs;
    char *out = static_cast<char *>(p.out) + (uint64_t)blockIdx.x * row_pairs * 2 * sizeof(T);
    for (uint32_t i = threadIdx.x; i < row_pairs; i += THREADS) {
        float2 pair = x[i];
        if (i < p.turned * p.pairs) {
            float2 angle = p.angles[(uint64_t)blockIdx.x * p.pairs + i % p.pairs];
            pair = make_float2(__fsub_rn(__fmul_rn(pair.x, angle.x), __fmul_rn(pair.y, angle.y)),
                               __fadd_rn(__fmul_rn(pair.x, angle.y), __fmul_rn(pair.y, angle.x)));
        }
        Element<T>::store(out + (uint64_t)i * 2 * sizeof(T), pair.x);
        Element<T>::store(out + ((uint64_t)i * 2 + 1) * sizeof(T), pair.y);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) rope_f32(const Rope p) { rope<float>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) rope_f16(const Rope p) { rope<__half>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) rope_bf16(const Rope p) { rope<__nv_bfloat16>(p); }

struct Swiglu {
    // `[rows, 2 * width]`: the gate, then up.
    const float *gate_up;
    float *out;
    uint32_t rows, width;
};

// A block for each row.
extern "C" __global__ void __launch_bounds__(THREADS) swiglu(const Swiglu p) {
    if (blockIdx.x >= p.rows) {
        return;
    }
    const float *gate = p.gate_up + (uint64_t)blockIdx.x * 2 * p.width, *up = gate + p.width;
    float *out = p.out + (uint64_t)blockIdx.x * p.width;
    for (uint32_t i = threadIdx.x; i < p.width; i += THREADS) {
        float g = gate[i], e = expf(-fabsf(g));
        float logistic = __fdiv_rn(g < 0.0f ? e : 1.0f, __fadd_rn(1.0f, e));
        out[i] = __fmul_rn(__fmul_rn(g, logistic), up[i]);
    }
}
