// The tokens of each head with the largest scores.
#include "keep_smallest.cuh"

using namespace kvhook;

// A cluster for each head.
extern "C" __global__ void __launch_bounds__(KEEP_THREADS) top_k_f32(const __grid_constant__ KeepParams params) {
    if (params.tiles == 0) {
        return;
    }
    uint32_t tile = blockIdx.x / params.head.cluster;
    const KeepItem &item = params.item_of(tile);
    uint32_t head = tile - item.first_tile;
    auto key_of = [](uint32_t, float score) {
        // Adding zero makes a negative zero positive. Negative floats are mirrored, then all are: the largest comes first.
        uint32_t bits = __float_as_uint(score + 0.0f);
        return bits >> 31 == 1 ? bits : ~(bits | 1u << 31);
    };
    keep_smallest<uint32_t>(params, item, head, FAULT_NOT_A_NUMBER, key_of, [](float score) { return isnan(score); });
}
