// Products of rows with a weight matrix that is stored in panels, as matmul.rs packs it.
//
// A result is a sum over segments of 64 inputs, in order, and each of these one chain of fused multiply-adds. So a row has
// the same bits from either kernel, whatever the rows beside it.
#include "engine.cuh"

using namespace engine;

constexpr uint32_t SEGMENT = 64;

struct Product {
    // `[rows, inputs]`
    const float *x;
    // `[panel][input][16]`
    const float *panels;
    // `[rows, outputs]`
    float *out;
    uint32_t rows, inputs, outputs;
    // 1: the result is added to `out`.
    uint32_t adds;
};

__device__ inline void store(const Product &p, uint32_t row, uint32_t output, float value) {
    float *out = p.out + (uint64_t)row * p.outputs + output;
    *out = p.adds ? __fadd_rn(*out, value) : value;
}

// Few rows: the weights are the traffic. A block makes 32 outputs of ROWS rows; each of its warps takes a segment at a
// time, a lane an output, and the segments are added in order.
constexpr int MOST_WARPS = 24;
// Weights that a lane has in flight.
constexpr int LOADS = 32;

template <int ROWS> __device__ void few(const Product &p) {
    __shared__ float xs[MOST_WARPS][ROWS][SEGMENT];
    __shared__ float sums[MOST_WARPS][ROWS][32];
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    uint32_t first_row = blockIdx.y * ROWS, output = blockIdx.x * 32 + lane;
    // The last panel is padded; a panel behind it is not there.
    bool exists = output < (p.outputs + PANEL - 1) / PANEL * PANEL;
    const float *column = p.panels + (uint64_t)(output / PANEL) * PANEL * p.inputs + output % PANEL;
    uint32_t segments = (p.inputs + SEGMENT - 1) / SEGMENT;
    float total[ROWS] = {};
    for (uint32_t round = 0; round < segments; round += warps) {
        uint32_t start = (round + warp) * SEGMENT;
        uint32_t count = start >= p.inputs ? 0 : min(SEGMENT, p.inputs - start);
        for (int row = 0; row < ROWS; ++row) {
            for (uint32_t i = lane; i < SEGMENT; i += 32) {
                bool there = i < count && first_row + row < p.rows;
                xs[warp][row][i] = there ? p.x[(uint64_t)(first_row + row) * p.inputs + start + i] : 0.0f;
            }
        }
        __syncwarp();
        float sum[ROWS] = {};
        if (count > 0 && exists) {
            for (uint32_t i = 0; i < SEGMENT; i += LOADS) {
                float weights[LOADS];
#pragma unroll
                for (int j = 0; j < LOADS; ++j) {
                    weights[j] = i + j < count ? column[(uint64_t)(start + i + j) * PANEL] : 0.0f;
                }
#pragma unroll
                for (int j = 0; j < LOADS; ++j) {
#pragma unroll
                    for (int row = 0; row < ROWS; ++row) {
                        sum[row] = __fmaf_rn(xs[warp][row][i + j], weights[j], sum[row]);
                    }
                }
            }
        }
        for (int row = 0; row < ROWS; ++row) {
            sums[warp][row][lane] = sum[row];
        }
        __syncthreads();
        if (warp == 0) {
            for (uint32_t of = 0; of < min(warps, segments - round); ++of) {
                for (int row = 0; row < ROWS; ++row) {
                    total[row] = __fadd_rn(total[row], sums[of][row][lane]);
                }
            }
        }
        __syncthreads();
    }
    if (warp == 0 && output < p.outputs) {
        for (int row = 0; row < ROWS && first_row + row < p.rows; ++row) {
            store(p, first_row + row, output, total[row]);
        }
    }
}

#define FEW(ROWS)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) matmul_few_##ROWS(const Product p) {                 \
        if (p.rows > 0) {                                                                                              \
            few<ROWS>(p);                                                                                              \
        }                                                                                                              \
    }
FEW(1)
FEW(2)
FEW(4)

// Many rows: a block makes 64 x 64 results, a thread 4 x 4 of them.
constexpr int TILE = 64, DEPTH = 16, MANY_THREADS = 256;
static_assert(SEGMENT % DEPTH == 0);

extern "C" __global__ void __launch_bounds__(MANY_THREADS) matmul_many(const Product p) {
    if (p.rows == 0) {
        return;
    }
    // Two stages; the rows' values turned, so that a thread reads four rows at once.
    __shared__ __align__(16) float xs[2][DEPTH][TILE + 4];
    __shared__ __align__(16) float ws[2][DEPTH][TILE];
    uint32_t thread = threadIdx.x, tx = thread % 16, ty = thread / 16;
    uint32_t first_row = blockIdx.y * TILE, first_output = blockIdx.x * TILE;
    // What this thread fetches for a stage: four inputs of one row, four outputs of one input.
    uint32_t x_row = thread / 4, x_input = thread % 4 * 4;
    uint32_t w_panel = thread / 64, w_input = thread % 64 / 4, w_lane = thread % 4 * 4;
    bool x_there = first_row + x_row < p.rows;
    const float *x = p.x + (uint64_t)(first_row + (x_there ? x_row : 0)) * p.inputs;
    uint32_t panel = first_output / PANEL + w_panel;
    bool w_there = panel * PANEL < p.outputs;
    const float *w = p.panels + (uint64_t)(w_there ? panel : 0) * PANEL * p.inputs + w_lane;

    float next_x[4];
    float4 next_w;
    auto fetch = [&](uint32_t start) {
        for (int i = 0; i < 4; ++i) {
            uint32_t input = start + x_input + i;
            next_x[i] = x_there && input < p.inputs ? x[input] : 0.0f;
        }
        bool there = w_there && start + w_input < p.inputs;
        next_w = there ? *reinterpret_cast<const float4 *>(w + (uint64_t)(start + w_input) * PANEL)
                       : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    };
    auto keep = [&](int stage) {
        for (int i = 0; i < 4; ++i) {
            xs[stage][x_input + i][x_row] = next_x[i];
        }
        *reinterpret_cast<float4 *>(&ws[stage][w_input][w_panel * PANEL + w_lane]) = next_w;
    };

    float total[4][4] = {}, sum[4][4] = {};
    fetch(0);
    keep(0);
    __syncthreads();
    int stage = 0;
    for (uint32_t start = 0; start < p.inputs; start += DEPTH) {
        bool more = start + DEPTH < p.inputs;
        if (more) {
            fetch(start + DEPTH);
        }
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            float4 a = *reinterpret_cast<const float4 *>(&xs[stage][k][ty * 4]);
            float4 b = *reinterpret_cast<const float4 *>(&ws[stage][k][tx * 4]);
            float rows[4] = {a.x, a.y, a.z, a.w}, columns[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sum[i][j] = __fmaf_rn(rows[i], columns[j], sum[i][j]);
                }
            }
        }
        if (!more || (start + DEPTH) % SEGMENT == 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    total[i][j] = __fadd_rn(total[i][j], sum[i][j]);
                    sum[i][j] = 0.0f;
                }
            }
        }
        if (more) {
            keep(stage ^ 1);
            stage ^= 1;
            __syncthreads();
        }
    }
    for (int i = 0; i < 4; ++i) {
        uint32_t row = first_row + ty * 4 + i;
        for (int j = 0; j < 4; ++j) {
            uint32_t output = first_output + tx * 4 + j;
            if (row < p.rows && output < p.outputs) {
                store(p, row, output, total[i][j]);
            }
        }
    }
}
