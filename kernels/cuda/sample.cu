// A weighted sample without replacement of the tokens of each head.
#include <math_constants.h>

#include "keep_smallest.cuh"

using namespace kvhook;

namespace kvhook {

// SplitMix64's step and finaliser, as in sample.rs.
__device__ uint64_t mix(uint64_t value) {
    uint64_t z = value + 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

} // namespace kvhook

// A cluster for each head.
extern "C" __global__ void __launch_bounds__(KEEP_THREADS) sample_f32(const __grid_constant__ KeepParams params) {
    if (params.tiles == 0) {
        return;
    }
    uint32_t tile = blockIdx.x / params.head.cluster;
    const KeepItem &item = params.item_of(tile);
    uint32_t head = tile - item.first_tile;
    uint64_t stream = mix(item.stream ^ ((uint64_t)item.layer << 32 | (item.first_head + head)));
    auto key_of = [=](uint32_t token, float weight) {
        double uniform = (double)((mix(stream ^ token) >> 11) + 1) / 9007199254740992.0;
        double key = weight > 0 ? -log(uniform) / (double)weight : CUDART_INF;
        // Zero or more, so the bits are in the order of the numbers.
        return (unsigned long long)__double_as_longlong(key + 0.0);
    };
    auto is_bad = [](float weight) { return !(weight >= 0 && isfinite(weight)); };
    keep_smallest<unsigned long long>(params, item, head, FAULT_WEIGHT, key_of, is_bad);
}
