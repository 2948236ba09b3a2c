// What all passes of window_attention.cu share.
#pragma once

#include "common.cuh"
#include "mma.cuh"

namespace kvhook {

constexpr int THREADS = 256, WARPS = THREADS / 32;
// Tokens of a tile; also the tile of `columns`, `stored` and `pool`. `SPLIT` of window_attention.rs.
constexpr uint32_t SPLIT = 1024;
// Query rows that are multiplied with a warp's keys at a time.
constexpr int GROUP = 16;
constexpr float LOG2_E = 1.44269504f;
// Below any logit, but finite.
constexpr float LOWEST = -1e30f;
// How far a logit may lie above its row's reference: sums of 2^64 are far from overflow.
constexpr float REACH = 64.f;

// `Head` of window_attention.rs.
struct Head {
    // Elements of a row of keys and queries.
    uint32_t head_dim;
    // Neighbours that `pool` takes the mean of.
    uint32_t kernel;
};

// `Item` of window_attention.rs.
struct Item {
    View keys;
    const char *queries;
    // Bytes.
    int64_t query_stride_position, query_stride_head;
    // The engine's log-sum-exp; null: none.
    const float *lse;
    // Elements.
    int64_t lse_stride_position, lse_stride_head;
    // [heads, length].
    float *scores;
    // [heads, splits, rows]: largest logit and sum.
    float2 *stats;
    // [heads, rows]: log-sum-exp.
    float *row_lse;
    // [heads, length]: means over rows.
    float *means;
    // [heads, rows, length]; null: not kept.
    float *logits;
    // [heads]: tiles of `pool` that are done, and the bits of the largest score.
    uint2 *progress;
    float scale;
    uint32_t first_tile;
    uint32_t length, window;
    // Query rows of a KV head: its query heads times `window`.
    uint32_t rows;
    uint16_t heads;
    uint16_t layout;
};
static_assert(sizeof(Item) == 136);

constexpr int ITEMS = 224;
using Launch = Batch<Head, Item, ITEMS>;
static_assert(sizeof(Launch) <= PARAMETER_BYTES);

// A tile's place. Tiles of the heads of one split are neighbours: in a token-major cache their rows are.
struct Place {
    uint32_t head, split, start;
    __device__ Place(const Item &item, uint32_t tile) {
        uint32_t local = tile - item.first_tile;
        head = local % item.heads;
        split = local / item.heads;
        start = split * SPLIT;
    }
};

__device__ inline uint32_t splits_of(const Item &item) { return (item.length + SPLIT - 1) / SPLIT; }
__device__ inline uint32_t history_of(const Item &item) { return item.length - item.window; }

// Address of query row `row` of a KV head: rows of one query head are neighbours.
__device__ inline const char *query_address(const Item &item, uint32_t head, uint32_t row) {
    uint32_t group = item.rows / item.window;
    uint32_t query_head = head * group + row / item.window;
    return item.queries + row % item.window * item.query_stride_position + query_head * item.query_stride_head;
}

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float other(float value, int lanes) { return __shfl_xor_sync(0xffffffff, value, lanes); }

struct Add {
    __device__ static float of(float a, float b) { return a + b; }
};
struct Larger {
    __device__ static float of(float a, float b) { return fmaxf(a, b); }
};

} // namespace kvhook
