// KeyDiff: scores of keys by their distance from the mean direction.
//
// Three passes in one launch, ordered by tickets: each tile of pass SUM adds up the unit keys of its rows, DIRECTION adds up
// the tiles of a head, SCORE reads the keys again. Tiles wait only for tiles of lower tickets, which run already.
#include "tile.cuh"

using namespace kvhook;

namespace kvhook {

// The keys of one layer of one sequence.
struct Item {
    Tiles tiles;
    // Scores, [heads, length].
    float *out;
    // A sum of unit keys for each tile and head of it, [chains, tiles_of_chain, heads of a tile, head_dim].
    float *sums;
    // [chains * heads of a tile, head_dim]
    float *directions;
    // For each chain: its tiles that are summed up, and its heads whose directions are known. Zero at the start.
    uint32_t *progress;
    uint32_t first_tile;
    // Read by the host only.
    uint32_t tiles_of_chain, chains_and_heads, unused;
};
static_assert(sizeof(Item) == 80);

// Passes.
constexpr uint32_t SUM = 0, DIRECTION = 1, SCORE = 2;

// Tickets from `first_ticket` on: tiles of a pass, from `tile` on; of SCORE, from `tile` downwards; of DIRECTION, the heads
// of the chain that begins with `tile`.
struct Segment {
    uint32_t first_ticket, tile : 30, pass : 2;
};
static_assert(sizeof(Segment) == 8);

struct Head {
    uint32_t *ticket;
    uint32_t segments, unused;
    Segment order[1408];
};

using Params = Batch<Head, Item, 258>;
static_assert(sizeof(Params) <= PARAMETER_BYTES);

__device__ void wait_until(const uint32_t *counter, uint32_t least) {
    if (threadIdx.x == 0) {
        uint32_t value;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
            if (value < least) {
                __nanosleep(200);
            }
        } while (value < least);
    }
    __syncthreads();
}

__device__ void count_up(uint32_t *counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1);
    }
}

template <int PER, int WORDS> __device__ float squares(const float (&elements)[WORDS][PER]) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
#pragma unroll
        for (int e = 0; e < PER; e++) {
            sum = fmaf(elements[w][e], elements[w][e], sum);
        }
    }
    return sum;
}

__device__ inline float inverse_norm(float squares) { return squares > 0 ? rsqrtf(squares) : 0; }

template <class T, int PER, int WORDS, int UNROLL>
__device__ void sum_tile(const Layout &layout, const Item &item, TilePlace place, const char **rows, float *part) {
    const Tiles &tiles = item.tiles;
    float sums[WORDS][PER] = {};
    for (uint32_t step = 0; step < tiles.steps; step++) {
        __syncthreads();
        rows[threadIdx.x] = row_of_thread(layout, tiles, place, step);
        __syncthreads();
        for_each_row<T, PER, WORDS, UNROLL, false>(layout, tiles, rows, [&](uint32_t, auto &raw) {
            float elements[WORDS][PER];
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                Word<T, PER>::unpack(raw[w], elements[w]);
            }
            float inverse = inverse_norm(sum_over_lanes(squares<PER, WORDS>(elements), tiles.lanes_shift));
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
#pragma unroll
                for (int e = 0; e < PER; e++) {
                    sums[w][e] = fmaf(elements[w][e], inverse, sums[w][e]);
                }
            }
        });
    }
    // A group of lanes saw one head only: its number modulo the heads of a tile. Groups add in order.
    uint32_t lanes = 1u << tiles.lanes_shift, groups = TILE_ROWS >> tiles.lanes_shift;
    uint32_t heads = 1u << tiles.heads_shift, dim = layout.head_dim;
    float *out = item.sums + (size_t)(place.chain * tiles.tiles_of_chain + place.tile_of_chain) * heads * dim;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
        __syncthreads();
#pragma unroll
        for (int e = 0; e < PER; e++) {
            part[e * TILE_ROWS + threadIdx.x] = sums[w][e];
        }
        __syncthreads();
        // Element e of the word of a lane, for one head.
        for (uint32_t index = threadIdx.x; index < heads * lanes * PER; index += TILE_ROWS) {
            uint32_t head = index / (lanes * PER), rest = index - head * lanes * PER;
            uint32_t element = (w * lanes + rest / PER) * PER + rest % PER;
            if (element < dim) {
                float sum = 0;
                for (uint32_t group = head; group < groups; group += heads) {
                    sum += part[rest % PER * TILE_ROWS + group * lanes + rest / PER];
                }
                out[head * dim + element] = sum;
            }
        }
    }
    count_up(&item.progress[place.chain * 2]);
}

// Adds up the tiles of one head, in order, in f64, and divides by the norm.
__device__ void direction_of_head(const Layout &layout, const Item &item, uint32_t chain, uint32_t head, double *shared) {
    const Tiles &tiles = item.tiles;
    uint32_t heads = 1u << tiles.heads_shift, dim = layout.head_dim, count = tiles.tiles_of_chain;
    const float *sums = item.sums + (size_t)chain * count * heads * dim + head * dim;
    float *out = item.directions + ((size_t)chain * heads + head) * dim;
    wait_until(&item.progress[chain * 2], count);
    double square = 0;
    // Eight runs of tiles, each by 32 threads, an element a thread.
    uint32_t run = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t first = (uint64_t)count * run / 8, last = (uint64_t)count * (run + 1) / 8;
    for (uint32_t start = 0; start < dim; start += 32) {
        uint32_t element = start + lane;
        double sum = 0;
        if (element < dim) {
            uint32_t tile = first;
            for (; tile + 8 <= last; tile += 8) {
                float batch[8];
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    batch[k] = __ldcg(&sums[(size_t)(tile + k) * heads * dim + element]);
                }
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    sum += batch[k];
                }
            }
            for (; tile < last; tile++) {
                sum += __ldcg(&sums[(size_t)tile * heads * dim + element]);
            }
        }
        __syncthreads();
        shared[threadIdx.x] = sum;
        __syncthreads();
        sum = 0;
        for (uint32_t other = 0; other < 8; other++) {
            sum += shared[other * 32 + lane];
        }
        square += sum * sum;
        if (run == 0 && element < dim) {
            out[element] = (float)sum;
        }
    }
    for (uint32_t offset = 16; offset > 0; offset /= 2) {
        square += __shfl_xor_sync(~0u, square, offset);
    }
    double norm = sqrt(square);
    if (run == 0) {
        for (uint32_t element = lane; element < dim; element += 32) {
            out[element] = norm > 0 ? (float)(out[element] / norm) : 0;
        }
    }
    count_up(&item.progress[chain * 2 + 1]);
}

template <class T, int PER, int WORDS, int UNROLL>
__device__ void score_tile(const Layout &layout, const Item &item, TilePlace place, const char **rows, float *scores) {
    const Tiles &tiles = item.tiles;
    uint32_t lanes = 1u << tiles.lanes_shift, lane = threadIdx.x & (lanes - 1);
    uint32_t heads = 1u << tiles.heads_shift, dim = layout.head_dim;
    uint32_t head_of_tile = (threadIdx.x >> tiles.lanes_shift) & (heads - 1);
    wait_until(&item.progress[place.chain * 2 + 1], heads);
    float direction[WORDS][PER];
    const float *known = item.directions + ((size_t)place.chain * heads + head_of_tile) * dim;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
#pragma unroll
        for (int e = 0; e < PER; e++) {
            uint32_t element = (w * lanes + lane) * PER + e;
            direction[w][e] = element < dim ? __ldcg(&known[element]) : 0;
        }
    }
    for (uint32_t step = 0; step < tiles.steps; step++) {
        __syncthreads();
        rows[threadIdx.x] = row_of_thread(layout, tiles, place, step);
        __syncthreads();
        for_each_row<T, PER, WORDS, UNROLL, true>(layout, tiles, rows, [&](uint32_t row, auto &raw) {
            float elements[WORDS][PER];
            float dot = 0;
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                Word<T, PER>::unpack(raw[w], elements[w]);
#pragma unroll
                for (int e = 0; e < PER; e++) {
                    dot = fmaf(elements[w][e], direction[w][e], dot);
                }
            }
            float inverse = inverse_norm(sum_over_lanes(squares<PER, WORDS>(elements), tiles.lanes_shift));
            dot = sum_over_lanes(dot, tiles.lanes_shift);
            if (lane == 0) {
                scores[row] = inverse * -dot;
            }
        });
        __syncthreads();
        if (rows[threadIdx.x] != nullptr) {
            uint32_t token = place.token(tiles, step, threadIdx.x), head = place.head(tiles, threadIdx.x);
            item.out[(size_t)head * tiles.length + token] = scores[threadIdx.x];
        }
    }
}

template <class T, bool IN_WORDS> __device__ void key_diff(const Params &params) {
    constexpr int PER = IN_WORDS ? Element<T>::PER_WORD : 1;
    __shared__ const char *rows[TILE_ROWS];
    __shared__ alignas(8) float part[(PER < 2 ? 2 : PER) * TILE_ROWS];
    __shared__ uint32_t taken;

    if (params.tiles == 0) {
        return;
    }
    if (threadIdx.x == 0) {
        taken = atomicAdd(params.head.ticket, 1);
    }
    __syncthreads();
    uint32_t low = 0, high = params.head.segments;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (params.head.order[middle].first_ticket <= taken) {
            low = middle;
        } else {
            high = middle;
        }
    }
    Segment segment = params.head.order[low];
    uint32_t offset = taken - segment.first_ticket;
    uint32_t tile = segment.pass == SUM ? segment.tile + offset : segment.pass == SCORE ? segment.tile - offset : segment.tile;
    const Item &item = params.item_of(tile);
    const Layout &layout = params.layouts[item.tiles.layout];
    TilePlace place(item.tiles, tile - item.first_tile);
    if (segment.pass == DIRECTION) {
        direction_of_head(layout, item, place.chain, offset, reinterpret_cast<double *>(part));
    } else if (segment.pass == SUM) {
        if (!IN_WORDS) {
            sum_tile<T, PER, 32, 1>(layout, item, place, rows, part);
        } else if (layout.head_dim <= 32 * PER) {
            sum_tile<T, PER, 1, 8>(layout, item, place, rows, part);
        } else {
            sum_tile<T, PER, 2, 4>(layout, item, place, rows, part);
        }
    } else {
        if (!IN_WORDS) {
            score_tile<T, PER, 32, 1>(layout, item, place, rows, part);
        } else if (layout.head_dim <= 32 * PER) {
            score_tile<T, PER, 1, 8>(layout, item, place, rows, part);
        } else {
            score_tile<T, PER, 2, 4>(layout, item, place, rows, part);
        }
    }
}

} // namespace kvhook

// One ticket a block: rows of whole 16-byte words.
extern "C" __global__ void __launch_bounds__(TILE_ROWS, 4) key_diff_f32(const __grid_constant__ Params params) {
    key_diff<float, true>(params);
}

extern "C" __global__ void __launch_bounds__(TILE_ROWS, 4) key_diff_f16(const __grid_constant__ Params params) {
    key_diff<__half, true>(params);
}

extern "C" __global__ void __launch_bounds__(TILE_ROWS, 4) key_diff_bf16(const __grid_constant__ Params params) {
    key_diff<__nv_bfloat16, true>(params);
}

// Any rows.
extern "C" __global__ void __launch_bounds__(TILE_ROWS) key_diff_any_f32(const __grid_constant__ Params params) {
    key_diff<float, false>(params);
}

extern "C" __global__ void __launch_bounds__(TILE_ROWS) key_diff_any_f16(const __grid_constant__ Params params) {
    key_diff<__half, false>(params);
}

extern "C" __global__ void __launch_bounds__(TILE_ROWS) key_diff_any_bf16(const __grid_constant__ Params params) {
    key_diff<__nv_bfloat16, false>(params);
}
