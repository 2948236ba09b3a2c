// Moving the rows that a plan keeps, into other rows (gather) and in place (compact).
#include "common.cuh"

using namespace kvhook;

namespace kvhook {

constexpr int THREADS = 256;

// Words that a thread moves, all loaded before the first is stored.
constexpr int WORDS = 8;

// One K or V of one layer of one sequence.
struct Item {
    View source, destination;
    const uint32_t *indices;
    uint32_t stride_head;
    // Selected rows, in each head; `total` with the tail.
    uint32_t count;
    uint32_t tail_start, total;
    uint32_t destination_start;
    uint32_t first_tile;
    // Tiles of the heads that one tile covers: in place, a tile overwrites sources of this chain only.
    uint32_t tiles_of_chain;
    uint16_t heads_of_tile;
    uint8_t source_layout, destination_layout;
};
static_assert(sizeof(Item) == 72);

struct Head {
    // In place: the ticket, then a bit for each tile, set when its sources are read. Zero at the start.
    uint32_t *state;
    const unsigned long long *verdict;
};

using Params = Batch<Head, Item, 443>;
static_assert(sizeof(Params) <= PARAMETER_BYTES);

__device__ uint32_t load_acquire(const uint32_t *address) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ uint4 load_word(const uint4 *address) { return __ldcs(address); }
__device__ uint32_t load_word(const uint32_t *address) { return *address; }
__device__ uint16_t load_word(const uint16_t *address) { return *address; }

// The token that goes to a place of a head.
__device__ uint32_t token_of(const Item &item, uint32_t place, uint32_t head) {
    return place < item.count ? item.indices[(size_t)head * item.stride_head + place]
                              : item.tail_start + (place - item.count);
}

// How many of the first `tiles` tiles of a chain have sources of this head before row `end`: tokens ascend, so the others
// do not care what is written there. Run by a warp.
__device__ uint32_t tiles_before(const Item &item, uint32_t head, uint32_t places, uint32_t tiles, uint32_t end) {
    uint32_t low = 0, high = tiles;
    while (low < high) {
        uint32_t step = (high - low + 31) / 32, tile = low + threadIdx.x % 32 * step;
        uint32_t before = __ballot_sync(~0u, tile < high && token_of(item, tile * places, head) < end);
        if (before == 0) {
            return low;
        }
        uint32_t first = low;
        low = first + (__popc(before) - 1) * step + 1;
        high = min(high, first + __popc(before) * step);
    }
    return low;
}

// Waits until the sources of `count` tiles from `first` on are read. Run by a warp. Tiles take tickets in order, so those
// waited for run already, and each of them publishes before it waits.
__device__ void wait_for_tiles(const uint32_t *bits, uint32_t first, uint32_t count) {
    uint32_t end = first + count;
    for (uint32_t base = first / 32; base * 32 < end; base += 32) {
        uint32_t word = base + threadIdx.x % 32, start = word * 32;
        uint32_t wanted = start < end ? ~0u : 0;
        if (start < first) {
            wanted &= ~0u << (first - start);
        }
        if (start < end && end - start < 32) {
            wanted &= (1u << (end - start)) - 1;
        }
        while (__any_sync(~0u, wanted != 0 && (load_acquire(&bits[word]) & wanted) != wanted)) {
            __nanosleep(50);
        }
    }
}

template <class Word, bool IN_PLACE> __device__ void move_tile(const Params &params) {
    __shared__ const char *sources[THREADS];
    __shared__ char *targets[THREADS];
    __shared__ uint32_t ticket, waited_for[THREADS / 32];

    if (params.tiles == 0 || !is_good(params.head.verdict)) {
        return;
    }
    uint32_t tile = blockIdx.x;
    if (IN_PLACE) {
        if (threadIdx.x == 0) {
            ticket = atomicAdd(params.head.state, 1);
        }
        __syncthreads();
        tile = ticket;
    }
    const Item &item = params.item_of(tile);
    const Layout &layout = params.layouts[item.source_layout];
    const Layout &target_layout = params.layouts[item.destination_layout];
    uint32_t element = layout.dtype == 0 ? 4 : 2;
    uint32_t words = sizeof(Word) == 16 ? layout.head_dim * element / 16 : layout.head_dim;
    uint32_t heads = item.heads_of_tile;
    uint32_t places = min(uint32_t(THREADS), THREADS * WORDS / words) / heads;
    uint32_t rows = places * heads;
    uint32_t chain = (tile - item.first_tile) / item.tiles_of_chain;
    uint32_t tile_of_chain = tile - item.first_tile - chain * item.tiles_of_chain;

    // Rows by place, then head. A row that stays where it is has no source.
    if (threadIdx.x < rows) {
        uint32_t place = tile_of_chain * places + threadIdx.x / heads;
        uint32_t head = chain * heads + threadIdx.x % heads;
        const char *source = nullptr;
        char *target = nullptr;
        if (place < item.total && head < layout.kv_heads) {
            source = row_address(layout, item.source, token_of(item, place, head), head);
            target = row_address(target_layout, item.destination, item.destination_start + place, head);
            if (IN_PLACE && source == target) {
                source = nullptr;
            }
        }
        sources[threadIdx.x] = source;
        targets[threadIdx.x] = target;
    }
    __syncthreads();

    int64_t step = sizeof(Word) == 16 ? 16 : layout.stride_element;
    int64_t target_step = sizeof(Word) == 16 ? 16 : target_layout.stride_element;
    // Word `w` of the tile is in row w / words, which this finds exactly for w < 2,048 and words <= 1,024.
    uint32_t inverse = ((1u << 21) + words - 1) / words;
    Word loaded[WORDS];
#pragma unroll
    for (int k = 0; k < WORDS; k++) {
        uint32_t word = k * THREADS + threadIdx.x;
        uint32_t row = word * inverse >> 21;
        const char *source = row < rows ? sources[row] : nullptr;
        if (source != nullptr) {
            loaded[k] = load_word(reinterpret_cast<const Word *>(source + (word - row * words) * step));
        }
    }
    if (IN_PLACE) {
        // Meanwhile: which tiles before this one read rows that this one writes.
        uint32_t end = item.destination_start + min(item.total, (tile_of_chain + 1) * places);
        uint32_t lists = item.stride_head == 0 ? 1 : min(heads, layout.kv_heads - chain * heads);
        uint32_t warp = threadIdx.x / 32, count = 0;
        for (uint32_t head = warp; head < lists; head += THREADS / 32) {
            count = max(count, tiles_before(item, chain * heads + head, places, tile_of_chain, end));
        }
        if (threadIdx.x % 32 == 0) {
            waited_for[warp] = count;
        }
        __syncthreads();
        uint32_t *bits = params.head.state + 1;
        if (threadIdx.x == THREADS - 1) {
            __threadfence();
            atomicOr(&bits[tile / 32], 1u << tile % 32);
        }
        if (warp == 0) {
            for (uint32_t other = 0; other < THREADS / 32; other++) {
                count = max(count, waited_for[other]);
            }
            wait_for_tiles(bits, tile - tile_of_chain, count);
        }
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < WORDS; k++) {
        uint32_t word = k * THREADS + threadIdx.x;
        uint32_t row = word * inverse >> 21;
        if (row < rows && sources[row] != nullptr) {
            *reinterpret_cast<Word *>(targets[row] + (word - row * words) * target_step) = loaded[k];
        }
    }
}

} // namespace kvhook

// One tile a block.
extern "C" __global__ void __launch_bounds__(THREADS) gather_u128(const __grid_constant__ Params params) {
    move_tile<uint4, false>(params);
}

extern "C" __global__ void __launch_bounds__(THREADS) gather_u32(const __grid_constant__ Params params) {
    move_tile<uint32_t, false>(params);
}

extern "C" __global__ void __launch_bounds__(THREADS) gather_u16(const __grid_constant__ Params params) {
    move_tile<uint16_t, false>(params);
}

// One tile a block, taken by ticket.
extern "C" __global__ void __launch_bounds__(THREADS) compact_u128(const __grid_constant__ Params params) {
    move_tile<uint4, true>(params);
}

extern "C" __global__ void __launch_bounds__(THREADS) compact_u32(const __grid_constant__ Params params) {
    move_tile<uint32_t, true>(params);
}

extern "C" __global__ void __launch_bounds__(THREADS) compact_u16(const __grid_constant__ Params params) {
    move_tile<uint16_t, true>(params);
}
