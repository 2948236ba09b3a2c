// Row norms.
#include "tile.cuh"

using namespace kvhook;

namespace kvhook {

// One K or V of one layer of one sequence.
struct Item {
    Tiles tiles;
    // [heads, length]
    float *out;
    uint32_t first_tile, unused;
};
static_assert(sizeof(Item) == 48);

struct Head {
    // 1, or -1 for the norms negated.
    float sign, unused;
};

using Params = Batch<Head, Item, 664>;
static_assert(sizeof(Params) <= PARAMETER_BYTES);

template <class T, int PER, int WORDS, int UNROLL>
__device__ void norms_of_step(const Layout &layout, const Tiles &tiles, const char *const *rows, float *norms) {
    for_each_row<T, PER, WORDS, UNROLL, false>(layout, tiles, rows, [&](uint32_t row, auto &raw) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            float elements[PER];
            Word<T, PER>::unpack(raw[w], elements);
#pragma unroll
            for (int e = 0; e < PER; e++) {
                sum = fmaf(elements[e], elements[e], sum);
            }
        }
        sum = sum_over_lanes(sum, tiles.lanes_shift);
        if ((threadIdx.x & ((1u << tiles.lanes_shift) - 1)) == 0) {
            norms[row] = sqrtf(sum);
        }
    });
}

template <class T, bool IN_WORDS> __device__ void row_norms(const Params &params) {
    __shared__ const char *rows[TILE_ROWS];
    __shared__ float norms[TILE_ROWS];
    constexpr int PER = IN_WORDS ? Element<T>::PER_WORD : 1;

    if (blockIdx.x >= params.tiles) {
        return;
    }
    const Item &item = params.item_of(blockIdx.x);
    const Layout &layout = params.layouts[item.tiles.layout];
    TilePlace place(item.tiles, blockIdx.x - item.first_tile);
    rows[threadIdx.x] = row_of_thread(layout, item.tiles, place, 0);
    __syncthreads();
    if (!IN_WORDS) {
        norms_of_step<T, PER, 32, 1>(layout, item.tiles, rows, norms);
    } else if (layout.head_dim <= 32 * PER) {
        norms_of_step<T, PER, 1, 8>(layout, item.tiles, rows, norms);
    } else {
        norms_of_step<T, PER, 2, 4>(layout, item.tiles, rows, norms);
    }
    __syncthreads();
    if (rows[threadIdx.x] != nullptr) {
        uint32_t token = place.token(item.tiles, 0, threadIdx.x), head = place.head(item.tiles, threadIdx.x);
        item.out[(size_t)head * item.tiles.length + token] = params.head.sign * norms[threadIdx.x];
    }
}

} // namespace kvhook

// One tile of one step a block: rows of whole 16-byte words.
extern "C" __global__ void __launch_bounds__(TILE_ROWS) row_norms_f32(const __grid_constant__ Params params) {
    row_norms<float, true>(params);
}

extern "C" __global__ void __launch_bounds__(TILE_ROWS) row_norms_f16(const __grid_constant__ Params params) {
    row_norms<__half, true>(params);
}

extern "C" __global__ void __launch_bounds__(TILE_ROWS) row_norms_bf16(const __grid_constant__ Params params) {
    row_norms<__nv_bfloat16, true>(params);
}

// Any rows.
extern "C" __global__ void __launch_bounds__(TILE_ROWS) row_norms_any_f32(const __grid_constant__ Params params) {
    row_norms<float, false>(params);
}

extern "C" __global__ void __launch_bounds__(TILE_ROWS) row_norms_any_f16(const __grid_constant__ Params params) {
    row_norms<__half, false>(params);
}

extern "C" __global__ void __launch_bounds__(TILE_ROWS) row_norms_any_bf16(const __grid_constant__ Params params) {
    row_norms<__nv_bfloat16, false>(params);
}
