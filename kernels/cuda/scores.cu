// What comes between scores and a selection: weights of a draw, and the refusal of scores that have no order.
#include <math_constants.h>

#include "common.cuh"

using namespace kvhook;

namespace kvhook {

constexpr int THREADS = 256, TILE = 4096;

// Scores of the heads of one layer of one sequence, [heads, length].
struct Item {
    float *scores;
    // The selection, [heads, keep].
    uint32_t *kept;
    uint32_t length, keep;
    // Protected tokens at the front, and tokens behind them that are not protected.
    uint32_t sinks, open;
    uint32_t first_tile, tiles_of_head;
};
static_assert(sizeof(Item) == 40);

struct Head {
    // WEIGHT_*, for weights; 1 for the refusal of weights, 0 for that of scores.
    uint32_t kind, unused;
};

using Params = Batch<Head, Item, 798>;
static_assert(sizeof(Params) <= PARAMETER_BYTES);

// Any other: 1, whatever the score.
constexpr uint32_t WEIGHT_OF_NORM = 0, WEIGHT_OF_DIRECTION = 1;

} // namespace kvhook

// One tile of one head a block.
extern "C" __global__ void __launch_bounds__(THREADS) weigh_f32(const __grid_constant__ Params params) {
    if (blockIdx.x >= params.tiles) {
        return;
    }
    const Item &item = params.item_of(blockIdx.x);
    uint32_t tile = blockIdx.x - item.first_tile, head = tile / item.tiles_of_head;
    uint32_t start = (tile - head * item.tiles_of_head) * TILE, end = min(item.length, start + TILE);
    float *scores = item.scores + (size_t)head * item.length;
    for (uint32_t token = start + threadIdx.x; token < end; token += THREADS) {
        float score = scores[token], weight = 1.0f;
        if (params.head.kind == WEIGHT_OF_NORM) {
            // The smallest normal number, so that the inverse is finite. A NaN stays one, for the draw to refuse.
            weight = isnan(score) ? score : 1.0f / fmaxf(-score, 1.17549435e-38f);
        } else if (params.head.kind == WEIGHT_OF_DIRECTION) {
            weight = isnan(score) ? score : fminf(fmaxf(1.0f + score, 0.0f), 2.0f);
        }
        scores[token] = weight;
    }
}

// One tile of the tokens of one head that are not protected a block.
extern "C" __global__ void __launch_bounds__(THREADS) refuse_f32(const __grid_constant__ Params params) {
    if (blockIdx.x >= params.tiles) {
        return;
    }
    const Item &item = params.item_of(blockIdx.x);
    uint32_t tile = blockIdx.x - item.first_tile, head = tile / item.tiles_of_head;
    uint32_t start = (tile - head * item.tiles_of_head) * TILE, end = min(item.open, start + TILE);
    const float *scores = item.scores + (size_t)head * item.length + item.sinks;
    for (uint32_t token = start + threadIdx.x; token < end; token += THREADS) {
        float score = scores[token];
        bool good = params.head.kind == 0 ? !isnan(score) : score >= 0 && isfinite(score);
        if (!good) {
            item.kept[(size_t)head * item.keep] = ~0u;
        }
    }
}
