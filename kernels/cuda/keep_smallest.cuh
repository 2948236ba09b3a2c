// The tokens with the smallest keys of each head, ascending: a radix selection by one cluster of blocks for each head.
#pragma once

#include "common.cuh"

namespace kvhook {

constexpr int KEEP_THREADS = 512;
constexpr int KEEP_WARPS = KEEP_THREADS / 32;

// Values that a thread loads before it looks at the first.
constexpr int KEEP_UNROLL = 8;

// Bits of a key that one round decides, from the top.
constexpr int DIGIT_BITS = 11, BINS = 1 << DIGIT_BITS;

// `Item` of keep_smallest.rs: the heads of one layer of one sequence.
struct KeepItem {
    // Scores or weights, [heads, length].
    const float *values;
    // [heads, keep]
    uint32_t *out;
    // Of a draw: see `Draw`.
    uint64_t stream;
    uint32_t length, keep;
    // Protected tokens at the front, and tokens behind them that are not protected.
    uint32_t sinks, open;
    uint32_t first_tile, item;
    uint32_t layer, first_head;
};
static_assert(sizeof(KeepItem) == 56);

struct KeepHead {
    unsigned long long *verdict;
    // Blocks of a cluster, and keys that each keeps in shared memory; it computes those behind them anew in each round.
    uint32_t cluster, cached;
};

// Tiles are heads.
using KeepParams = Batch<KeepHead, KeepItem, 568>;
static_assert(sizeof(KeepParams) <= PARAMETER_BYTES);

__device__ inline void sync_cluster(uint32_t cluster) {
#if __CUDA_ARCH__ >= 900
    if (cluster > 1) {
        asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

// Reads the same variable in the shared memory of another block of the cluster.
template <class T> __device__ T load_of_rank(const T *variable, uint32_t rank, uint32_t cluster) {
#if __CUDA_ARCH__ >= 900
    if (cluster > 1) {
        uint32_t own = (uint32_t)__cvta_generic_to_shared(variable), address;
        T value;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
        if constexpr (sizeof(T) == 8) {
            asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
        } else {
            asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
        }
        return value;
    }
#endif
    return *variable;
}

__device__ inline int bits_of(uint32_t value) { return 32 - __clz(value); }
__device__ inline int bits_of(unsigned long long value) { return 64 - __clzll(value); }

// The inclusive sum over the threads of a warp up to this one.
__device__ inline uint32_t scan_warp(uint32_t value) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        uint32_t before = __shfl_up_sync(~0u, value, offset);
        value += threadIdx.x % 32 >= offset ? before : 0;
    }
    return value;
}

// What a round decided.
struct Choice {
    // The digit, the keys with lower ones, and those with this one.
    uint32_t digit, below, count;
};

// The digit in which the `wanted`-th smallest key lies (counted from 1), of the histograms of all ranks.
__device__ inline Choice choose_digit(const uint32_t *histogram, uint32_t cluster, uint32_t wanted, uint32_t *sums,
                                      Choice *choice) {
    constexpr int EACH = BINS / KEEP_THREADS;
    uint32_t counts[EACH] = {}, own = 0;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        for (uint32_t rank = 0; rank < cluster; rank++) {
            counts[k] += load_of_rank(&histogram[threadIdx.x * EACH + k], rank, cluster);
        }
        own += counts[k];
    }
    uint32_t inclusive = scan_warp(own), warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 31) {
        sums[warp] = inclusive;
    }
    __syncthreads();
    uint32_t below = inclusive - own;
    for (uint32_t other = 0; other < warp; other++) {
        below += sums[other];
    }
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        if (below < wanted && wanted <= below + counts[k]) {
            *choice = {threadIdx.x * EACH + k, below, counts[k]};
        }
        below += counts[k];
    }
    __syncthreads();
    return *choice;
}

// Keeps the protected tokens and, of the others, those with the smallest keys (of equal keys the lower token).
// `key_of(token, value)` gives a token's key; `fault` is reported for values that `is_bad`.
template <class Key, class KeyOf, class IsBad>
__device__ void keep_smallest(const KeepParams &params, const KeepItem &item, uint32_t head, uint32_t fault,
                              KeyOf key_of, IsBad is_bad) {
    __shared__ uint32_t histograms[2][BINS];
    __shared__ uint32_t sums[KEEP_WARPS], lower_of_warp[KEEP_WARPS], equal_of_warp[KEEP_WARPS];
    __shared__ uint32_t totals[2];
    __shared__ Choice choice;
    __shared__ Key lowest_of_warp[KEEP_WARPS], highest_of_warp[KEEP_WARPS], limits[2];
    Key *keys = reinterpret_cast<Key *>(dynamic_shared());

    uint32_t cluster = params.head.cluster, rank = blockIdx.x % cluster;
    uint32_t slice = (item.open + cluster - 1) / cluster;
    uint32_t first = min(item.open, rank * slice);
    uint32_t count = min(item.open - first, slice), cached = min(count, params.head.cached);
    uint32_t *out = item.out + (size_t)head * item.keep;
    first += item.sinks;
    const float *values = item.values + (size_t)head * item.length + first;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    Key lowest = ~(Key)0, highest = 0;
    for (uint32_t base = threadIdx.x; base < count; base += KEEP_THREADS * KEEP_UNROLL) {
        float loaded[KEEP_UNROLL];
#pragma unroll
        for (int k = 0; k < KEEP_UNROLL; k++) {
            uint32_t place = base + k * KEEP_THREADS;
            loaded[k] = place < count ? values[place] : 0;
        }
#pragma unroll
        for (int k = 0; k < KEEP_UNROLL; k++) {
            uint32_t place = base + k * KEEP_THREADS;
            if (place < count) {
                if (is_bad(loaded[k])) {
                    report(params.head.verdict, item.item, head, first + place, fault);
                }
                Key key = key_of(first + place, loaded[k]);
                lowest = min(lowest, key);
                highest = max(highest, key);
                if (place < cached) {
                    keys[place] = key;
                }
            }
        }
    }
    // Digits are those of the distance from the lowest key: scores mostly lie close together, and bins that all threads
    // count in are slow.
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        lowest = min(lowest, __shfl_xor_sync(~0u, lowest, offset));
        highest = max(highest, __shfl_xor_sync(~0u, highest, offset));
    }
    if (lane == 0) {
        lowest_of_warp[warp] = lowest;
        highest_of_warp[warp] = highest;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int other = 1; other < KEEP_WARPS; other++) {
            lowest = min(lowest, lowest_of_warp[other]);
            highest = max(highest, highest_of_warp[other]);
        }
        limits[0] = lowest;
        limits[1] = highest;
    }
    sync_cluster(cluster);
    lowest = limits[0], highest = limits[1];
    for (uint32_t other = 0; other < cluster; other++) {
        lowest = min(lowest, load_of_rank(&limits[0], other, cluster));
        highest = max(highest, load_of_rank(&limits[1], other, cluster));
    }
    auto key_at = [&](uint32_t place) {
        return (place < cached ? keys[place] : key_of(first + place, values[place])) - lowest;
    };

    // Keys that agree with `known` in the bits of `mask` are undecided: `wanted` of the `undecided` are kept.
    Key known = 0, mask = 0;
    uint32_t recent = item.length - item.sinks - item.open;
    uint32_t wanted = item.keep - item.sinks - recent, undecided = item.open;
    int shift = item.open == 0 ? 0 : bits_of(highest - lowest);
    for (uint32_t round = 0; shift > 0 && wanted > 0 && wanted < undecided; round++) {
        int bits = min(DIGIT_BITS, shift);
        shift -= bits;
        uint32_t *histogram = histograms[round % 2], digits = (1u << bits) - 1;
        for (uint32_t bin = threadIdx.x; bin < BINS; bin += KEEP_THREADS) {
            histogram[bin] = 0;
        }
        __syncthreads();
#pragma unroll 4
        for (uint32_t place = threadIdx.x; place < count; place += KEEP_THREADS) {
            Key key = key_at(place);
            if ((key & mask) == known) {
                atomicAdd(&histogram[(uint32_t)(key >> shift) & digits], 1);
            }
        }
        // Others read this histogram until they arrive here in the next round, which writes another.
        sync_cluster(cluster);
        Choice chosen = choose_digit(histogram, cluster, wanted, sums, &choice);
        known |= (Key)chosen.digit << shift;
        mask |= (Key)digits << shift;
        wanted -= chosen.below;
        undecided = chosen.count;
    }
    __syncthreads();

    // Each warp writes the kept tokens of adjacent places, behind those of the warps and ranks before it.
    uint32_t lower_lanes = (1u << lane) - 1;
    uint32_t of_warp = ((count + KEEP_WARPS - 1) / KEEP_WARPS + 31) / 32 * 32;
    uint32_t start = min(count, warp * of_warp), end = min(count, start + of_warp);
    uint32_t lower = 0, equal = 0;
    for (uint32_t base = start; base < end; base += 32) {
        Key key = base + lane < end ? key_at(base + lane) & mask : 0;
        lower += __popc(__ballot_sync(~0u, base + lane < end && key < known));
        equal += __popc(__ballot_sync(~0u, base + lane < end && key == known));
    }
    if (lane == 0) {
        lower_of_warp[warp] = lower;
        equal_of_warp[warp] = equal;
    }
    __syncthreads();
    lower = equal = 0;
    for (uint32_t other = 0; other < KEEP_WARPS; other++) {
        lower += other < warp ? lower_of_warp[other] : 0;
        equal += other < warp ? equal_of_warp[other] : 0;
    }
    if (threadIdx.x == KEEP_THREADS - 1) {
        totals[0] = lower + lower_of_warp[warp];
        totals[1] = equal + equal_of_warp[warp];
    }
    sync_cluster(cluster);
    for (uint32_t other = 0; other < rank; other++) {
        lower += load_of_rank(&totals[0], other, cluster);
        equal += load_of_rank(&totals[1], other, cluster);
    }
    for (uint32_t base = start; base < end; base += 32) {
        Key key = base + lane < end ? key_at(base + lane) & mask : 0;
        bool is_lower = base + lane < end && key < known, is_equal = base + lane < end && key == known;
        uint32_t lowers = __ballot_sync(~0u, is_lower), equals = __ballot_sync(~0u, is_equal);
        uint32_t equal_before = equal + __popc(equals & lower_lanes);
        if (is_lower || (is_equal && equal_before < wanted)) {
            uint32_t before = lower + __popc(lowers & lower_lanes) + min(equal_before, wanted);
            out[item.sinks + before] = first + base + lane;
        }
        lower += __popc(lowers);
        equal += __popc(equals);
    }
    if (rank == 0) {
        for (uint32_t place = threadIdx.x; place < item.sinks; place += KEEP_THREADS) {
            out[place] = place;
        }
        for (uint32_t place = threadIdx.x; place < recent; place += KEEP_THREADS) {
            out[item.keep - recent + place] = item.length - recent + place;
        }
    }
    // Others may still read this block's totals.
    sync_cluster(cluster);
}

} // namespace kvhook
