// SnapKV's score of each key: see window_attention.rs of the CPU bodies for the formula.
//
// The softmax needs the sum of each query row before a probability of it is known, so QK^T is computed twice:
//
//   sums      for each split of 1,024 tokens: largest logit and sum of exponentials of each query row
//   merge     the splits of a row, in order, into its log-sum-exp (or takes the engine's)
//   columns   mean over the rows of exp(logit - log-sum-exp), for each key
//   pool      mean of neighbouring keys, and the largest score for the window's own keys
//
// Where a head has at most 8 query rows, `sums` keeps the logits, and `stored` makes the means without reading keys
// again. All logits are times log2(e), and exponentials are powers of two. A split's work and order depend on nothing
// but the sequence.

#include "window_attention.cuh"
#include "window_wide.cuh"

using namespace kvhook;

namespace kvhook {

// Folds the four columns that a lane has over the lanes of its columns. Lane l gets column 8 (l / 16 % 2) + 2 (l % 4) +
// l / 8 % 2, as does its neighbour l ^ 4.
template <class Fold> __device__ inline float fold_columns(const float (&columns)[2][2], int lane) {
    bool upper = lane & 16, odd = lane & 8;
    float first = upper ? columns[1][0] : columns[0][0], second = upper ? columns[1][1] : columns[0][1];
    float first_sent = upper ? columns[0][0] : columns[1][0], second_sent = upper ? columns[0][1] : columns[1][1];
    first = Fold::of(first, other(first_sent, 16));
    second = Fold::of(second, other(second_sent, 16));
    float kept = odd ? second : first, sent = odd ? first : second;
    kept = Fold::of(kept, other(sent, 8));
    return Fold::of(kept, other(kept, 4));
}

// Tensor cores: a warp holds 32 keys (16 at head_dim 256) in registers, straight from the cache, and multiplies them with
// all query rows, which lie in shared memory in the order in which lanes read them.
template <class T, int D, bool COLUMNS> struct Pass {
    static constexpr int CHUNKS = D / CHUNK;
    // Instructions' worth of keys.
    static constexpr int BLOCKS = D > 128 ? 1 : 2;
    static constexpr uint32_t KEYS = 16 * BLOCKS;
    // Query rows in shared memory at a time.
    static constexpr uint32_t ROWS = D > 128 ? 128 : 256;

    __device__ static void load_queries(const Item &item, uint32_t head, uint32_t first_row, uint32_t padded,
                                        uint4 *queries) {
        for (uint32_t word = threadIdx.x; word < padded * (D / 8); word += THREADS) {
            // Adjacent threads read adjacent words of a row.
            uint32_t row = word / (D / 8), part = word % (D / 8);
            uint4 value = make_uint4(0, 0, 0, 0);
            if (first_row + row < item.rows) {
                value = *reinterpret_cast<const uint4 *>(query_address(item, head, first_row + row) + part * 16);
            }
            queries[(row / 8 * CHUNKS + part / 4) * 32 + row % 8 * 4 + part % 4] = value;
        }
    }

    __device__ static void run(const Launch &launch, const Item &item) {
        uint4 *shared = dynamic_shared();
        const Layout &layout = launch.layouts[item.layout];
        Place place(item, blockIdx.x);
        uint32_t history = history_of(item);
        uint32_t end = min(place.start + SPLIT, COLUMNS ? history : item.length);
        if (place.start >= end) {
            return;
        }
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        uint32_t zero = launch.count >> 31;

        for (uint32_t first_row = 0; first_row < item.rows; first_row += ROWS) {
            uint32_t rows = min(item.rows - first_row, ROWS), padded = (rows + GROUP - 1) / GROUP * GROUP;
            uint4 *queries = shared;
            float *after = reinterpret_cast<float *>(shared + padded * (D / 8));
            // `sums`: reference and sum of each row, by warp. `columns`: log-sum-exp of each row.
            float *references = after + warp * padded, *sums = after + (WARPS + warp) * padded;

            __syncthreads();
            load_queries(item, place.head, first_row, padded, queries);
            if constexpr (COLUMNS) {
                const float *lse = item.row_lse + place.head * item.rows + first_row;
                for (uint32_t row = threadIdx.x; row < padded; row += THREADS) {
                    after[row] = row < rows ? lse[row] : INFINITY;
                }
            } else {
                for (uint32_t row = lane; row < padded; row += 32) {
                    references[row] = LOWEST;
                    sums[row] = 0;
                }
            }
            __syncthreads();

            for (uint32_t key = place.start + warp * KEYS; key < end; key += WARPS * KEYS) {
                Fragment keys[BLOCKS][CHUNKS];
#pragma unroll
                for (int block = 0; block < BLOCKS; block++) {
                    uint4 words[2][CHUNKS];
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        uint32_t token = min(key + block * 16 + half * 8 + lane / 4, end - 1);
                        const char *row = row_address(layout, item.keys, token, place.head);
#pragma unroll
                        for (int chunk = 0; chunk < CHUNKS; chunk++) {
                            words[half][chunk] = load_once(row + (chunk * 4 + lane % 4) * 16);
                        }
                    }
#pragma unroll
                    for (int chunk = 0; chunk < CHUNKS; chunk++) {
                        keys[block][chunk] = fragment(words[0][chunk], words[1][chunk], zero);
                    }
                }
                // Probabilities of keys lane / 4, + 8, ...: this lane's columns.
                float means[2 * BLOCKS] = {};
                bool masked = key + KEYS > history;

                for (uint32_t group = 0; group < padded; group += GROUP) {
                    float products[BLOCKS][2][4] = {};
#pragma unroll
                    for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
                        for (int eight = 0; eight < 2; eight++) {
                            uint4 query = queries[((group / 8 + eight) * CHUNKS + chunk) * 32 + lane];
#pragma unroll
                            for (int block = 0; block < BLOCKS; block++) {
                                multiply_chunk<T>(products[block][eight], keys[block][chunk], query);
                            }
                        }
                    }
                    if constexpr (COLUMNS) {
                        add_columns(products, after + group, lane, item.scale, means);
                    } else {
                        if (masked) {
                            mask(products, item, key, first_row + group, history, lane);
                        }
                        add_sums(products, references + group, sums + group, lane, item.scale);
                        if (item.logits != nullptr) {
                            keep(products, item, place.head, key, history, lane);
                        }
                    }
                }
                if constexpr (COLUMNS) {
                    store_means(means, item, place.head, key, end, first_row > 0, lane);
                }
            }
            if constexpr (!COLUMNS) {
                __syncthreads();
                float2 *stats = item.stats + (place.head * splits_of(item) + place.split) * item.rows + first_row;
                for (uint32_t row = threadIdx.x; row < rows; row += THREADS) {
                    float largest = LOWEST, sum = 0;
                    for (int other = 0; other < WARPS; other++) {
                        largest = fmaxf(largest, after[other * padded + row]);
                    }
                    for (int other = 0; other < WARPS; other++) {
                        float reference = after[other * padded + row];
                        sum += after[(WARPS + other) * padded + row] * exp2_fast(reference - largest);
                    }
                    stats[row] = make_float2(largest, sum);
                }
            }
        }
    }

    // Takes out keys that come after a query, and those that stand for keys beyond the end.
    __device__ static void mask(float (&products)[BLOCKS][2][4], const Item &item, uint32_t key, uint32_t first_row,
                                uint32_t history, int lane) {
#pragma unroll
        for (int column = 0; column < 4; column++) {
            uint32_t row = first_row + column / 2 * 8 + lane % 4 * 2 + column % 2;
            uint32_t last = history + row % item.window;
#pragma unroll
            for (int half = 0; half < 2 * BLOCKS; half++) {
                if (key + half * 8 + lane / 4 > last) {
                    products[half / 2][column / 2][half % 2 * 2 + column % 2] = -INFINITY;
                }
            }
        }
    }

    // Adds the keys' exponentials to the sums of 16 query rows, relative to a reference that is raised where a logit
    // lies far above it: rarely more than once.
    __device__ static void add_sums(const float (&products)[BLOCKS][2][4], float *references, float *sums, int lane,
                                    float scale) {
        float reference[2][2];
        float powers[BLOCKS][2][4];
        for (bool raised = false;; raised = true) {
#pragma unroll
            for (int eight = 0; eight < 2; eight++) {
                float2 both = *reinterpret_cast<float2 *>(references + eight * 8 + lane % 4 * 2);
                reference[eight][0] = both.x, reference[eight][1] = both.y;
            }
            float largest = -INFINITY;
#pragma unroll
            for (int at = 0; at < BLOCKS * 8; at++) {
                float &power = powers[at / 8][at / 4 % 2][at % 4];
                power = fmaf(products[at / 8][at / 4 % 2][at % 4], scale, -reference[at / 4 % 2][at % 2]);
                largest = fmaxf(largest, power);
            }
            if (raised || !__any_sync(0xffffffff, largest > REACH)) {
                break;
            }
            float columns[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
#pragma unroll
            for (int at = 0; at < BLOCKS * 8; at++) {
                float &column = columns[at / 4 % 2][at % 2];
                column = fmaxf(column, products[at / 8][at / 4 % 2][at % 4] * scale);
            }
            float highest = fold_columns<Larger>(columns, lane);
            if (!(lane & 4)) {
                int row = lane / 16 * 8 + lane % 4 * 2 + lane / 8 % 2;
                float before = references[row], now = fmaxf(before, highest);
                sums[row] *= exp2_fast(before - now);
                references[row] = now;
            }
            __syncwarp();
        }
        float columns[2][2] = {};
#pragma unroll
        for (int at = 0; at < BLOCKS * 8; at++) {
            columns[at / 4 % 2][at % 2] += exp2_fast(powers[at / 8][at / 4 % 2][at % 4]);
        }
        float sum = fold_columns<Add>(columns, lane);
        if (!(lane & 4)) {
            sums[lane / 16 * 8 + lane % 4 * 2 + lane / 8 % 2] += sum;
        }
    }

    // Keeps the logits of at most 8 query rows.
    __device__ static void keep(const float (&products)[BLOCKS][2][4], const Item &item, uint32_t head, uint32_t key,
                                uint32_t history, int lane) {
#pragma unroll
        for (int at = 0; at < BLOCKS * 4; at++) {
            uint32_t row = lane % 4 * 2 + at % 2, token = key + at / 2 * 8 + lane / 4;
            if (row < item.rows && token < history) {
                item.logits[(head * item.rows + row) * (size_t)item.length + token] =
                    products[at / 4][0][at % 4] * item.scale;
            }
        }
    }

    __device__ static void add_columns(const float (&products)[BLOCKS][2][4], const float *lse, int lane, float scale,
                                       float (&means)[2 * BLOCKS]) {
#pragma unroll
        for (int eight = 0; eight < 2; eight++) {
            float2 both = *reinterpret_cast<const float2 *>(lse + eight * 8 + lane % 4 * 2);
#pragma unroll
            for (int half = 0; half < 2 * BLOCKS; half++) {
                means[half] += exp2_fast(fmaf(products[half / 2][eight][half % 2 * 2], scale, -both.x));
                means[half] += exp2_fast(fmaf(products[half / 2][eight][half % 2 * 2 + 1], scale, -both.y));
            }
        }
    }

    __device__ static void store_means(float (&means)[2 * BLOCKS], const Item &item, uint32_t head, uint32_t key,
                                       uint32_t end, bool more, int lane) {
#pragma unroll
        for (int half = 0; half < 2 * BLOCKS; half++) {
            float mean = means[half];
            mean += other(mean, 1);
            mean += other(mean, 2);
            uint32_t token = key + half * 8 + lane / 4;
            if (lane % 4 == 0 && token < end) {
                // The lane wrote the rows before itself.
                float *target = item.means + head * (size_t)item.length + token;
                mean /= item.rows;
                *target = more ? *target + mean : mean;
            }
        }
    }
};

// Any dtype, head_dim and layout: products of tiles of 64 keys and 64 query rows in f32.
template <class T, bool COLUMNS> struct PlainPass {
    static constexpr uint32_t TILE = 64;
    static constexpr int STEP = 32, STRIDE = TILE + 4;

    struct Shared {
        // [channel][row]
        float keys[STEP][STRIDE], queries[STEP][STRIDE];
        // [query row][key]
        float logits[TILE][TILE + 1];
        const char *key_rows[TILE], *query_rows[TILE];
    };

    __device__ static void load(float (&tile)[STEP][STRIDE], const char *const (&rows)[TILE], uint32_t first,
                                uint32_t channels, int64_t stride) {
        for (int at = threadIdx.x; at < (int)TILE * STEP; at += THREADS) {
            int channel = at % STEP, row = at / STEP;
            bool there = first + channel < channels && rows[row] != nullptr;
            tile[channel][row] = there ? Element<T>::load(rows[row] + (first + channel) * stride) : 0.f;
        }
    }

    // The logits of a tile; those that a row may not see are -inf.
    __device__ static void multiply(Shared &shared, const Launch &launch, const Item &item, uint32_t head, uint32_t key,
                                    uint32_t end, uint32_t first_row) {
        const Layout &layout = launch.layouts[item.layout];
        __syncthreads();
        if (threadIdx.x < TILE) {
            uint32_t token = key + threadIdx.x;
            shared.key_rows[threadIdx.x] =
                token < end ? row_address(layout, item.keys, token, head) : nullptr;
        } else if (threadIdx.x < 2 * TILE) {
            uint32_t row = first_row + threadIdx.x - TILE;
            shared.query_rows[threadIdx.x - TILE] = row < item.rows ? query_address(item, head, row) : nullptr;
        }
        int column = threadIdx.x % 16 * 4, row = threadIdx.x / 16 * 4;
        float sums[4][4] = {};
        for (uint32_t first = 0; first < launch.head.head_dim; first += STEP) {
            __syncthreads();
            load(shared.keys, shared.key_rows, first, launch.head.head_dim, layout.stride_element);
            load(shared.queries, shared.query_rows, first, launch.head.head_dim, sizeof(T));
            __syncthreads();
#pragma unroll 8
            for (int channel = 0; channel < STEP; channel++) {
                float4 keys = *reinterpret_cast<float4 *>(&shared.keys[channel][column]);
                float4 queries = *reinterpret_cast<float4 *>(&shared.queries[channel][row]);
                float key_values[4] = {keys.x, keys.y, keys.z, keys.w};
                float query_values[4] = {queries.x, queries.y, queries.z, queries.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        sums[i][j] = fmaf(query_values[i], key_values[j], sums[i][j]);
                    }
                }
            }
        }
        uint32_t history = history_of(item);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t last = history + (first_row + row + i) % item.window;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                bool seen = key + column + j <= last && key + column + j < end;
                shared.logits[row + i][column + j] = seen ? sums[i][j] * item.scale : -INFINITY;
            }
        }
        __syncthreads();
    }

    __device__ static void run(const Launch &launch, const Item &item) {
        __shared__ Shared shared;
        Place place(item, blockIdx.x);
        uint32_t end = min(place.start + SPLIT, COLUMNS ? history_of(item) : item.length);
        if (place.start >= end) {
            return;
        }
        // Four threads for each query row, or key.
        int line = threadIdx.x / 4, part = threadIdx.x % 4 * (TILE / 4);
        if constexpr (COLUMNS) {
            const float *lse = item.row_lse + place.head * item.rows;
            for (uint32_t key = place.start; key < end; key += TILE) {
                float mean = 0;
                for (uint32_t first_row = 0; first_row < item.rows; first_row += TILE) {
                    multiply(shared, launch, item, place.head, key, end, first_row);
                    for (uint32_t row = part; row < part + TILE / 4 && first_row + row < item.rows; row++) {
                        mean += exp2_fast(shared.logits[row][line] - lse[first_row + row]);
                    }
                }
                mean += other(mean, 1);
                mean += other(mean, 2);
                if (part == 0 && key + line < end) {
                    item.means[place.head * (size_t)item.length + key + line] = mean / item.rows;
                }
            }
        } else {
            float2 *stats = item.stats + (place.head * splits_of(item) + place.split) * item.rows;
            for (uint32_t first_row = 0; first_row < item.rows; first_row += TILE) {
                float largest = LOWEST, sum = 0;
                for (uint32_t key = place.start; key < end; key += TILE) {
                    multiply(shared, launch, item, place.head, key, end, first_row);
                    float before = largest;
                    for (uint32_t at = part; at < part + TILE / 4; at++) {
                        largest = fmaxf(largest, shared.logits[line][at]);
                    }
                    sum *= exp2_fast(before - largest);
                    for (uint32_t at = part; at < part + TILE / 4; at++) {
                        sum += exp2_fast(shared.logits[line][at] - largest);
                    }
                    if (item.logits != nullptr && first_row + line < item.rows) {
                        float *kept = item.logits + (place.head * item.rows + first_row + line) * (size_t)item.length;
                        for (uint32_t at = part; at < part + TILE / 4 && key + at < end; at++) {
                            kept[key + at] = shared.logits[line][at];
                        }
                    }
                }
                for (int lanes = 1; lanes < 4; lanes *= 2) {
                    float both = fmaxf(largest, other(largest, lanes));
                    sum *= exp2_fast(largest - both);
                    sum += other(sum, lanes);
                    largest = both;
                }
                if (part == 0 && first_row + line < item.rows) {
                    stats[first_row + line] = make_float2(largest, sum);
                }
            }
        }
    }
};

template <class Pass, bool COLUMNS> __device__ void run_pass(const Launch &launch) {
    if (blockIdx.x >= launch.tiles) {
        return;
    }
    const Item &item = launch.item_of(blockIdx.x);
    // The engine's log-sum-exp makes the first pass needless, kept logits the second.
    if (COLUMNS ? item.logits == nullptr : item.lse == nullptr) {
        Pass::run(launch, item);
    }
}

} // namespace kvhook

#define PASSES(NAME, TYPE, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        window_sums_##NAME##_##D(const __grid_constant__ Launch launch) {                                              \
        run_pass<Pass<TYPE, D, false>, false>(launch);                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        window_columns_##NAME##_##D(const __grid_constant__ Launch launch) {                                           \
        run_pass<Pass<TYPE, D, true>, true>(launch);                                                                   \
    }

#define PLAIN_PASSES(NAME, TYPE)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        window_sums_##NAME(const __grid_constant__ Launch launch) {                                                    \
        run_pass<PlainPass<TYPE, false>, false>(launch);                                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        window_columns_##NAME(const __grid_constant__ Launch launch) {                                                 \
        run_pass<PlainPass<TYPE, true>, true>(launch);                                                                 \
    }

#if WIDE
#define RUN_WIDE(PASS, ...) PASS<__VA_ARGS__>::run(launch)
#else
#define RUN_WIDE(PASS, ...)
#endif

#define WIDE_PASSES(NAME, TYPE, D)                                                                                     \
    extern "C" __global__ void __launch_bounds__(GROUPS *GROUP_THREADS, 1)                                             \
        window_wide_sums_##NAME##_##D(const __grid_constant__ Launch launch) {                                         \
        if (launch.tiles > 0) {                                                                                        \
            RUN_WIDE(WideSums, TYPE, D);                                                                               \
        }                                                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(GROUPS *GROUP_THREADS, 1)                                             \
        window_wide_columns_##NAME##_##D(const __grid_constant__ Launch launch) {                                      \
        if (launch.tiles > 0) {                                                                                        \
            RUN_WIDE(WideColumns, TYPE, D);                                                                            \
        }                                                                                                              \
    }

PASSES(f16, __half, 64)
PASSES(f16, __half, 96)
PASSES(f16, __half, 128)
PASSES(f16, __half, 256)
PASSES(bf16, __nv_bfloat16, 64)
PASSES(bf16, __nv_bfloat16, 96)
PASSES(bf16, __nv_bfloat16, 128)
PASSES(bf16, __nv_bfloat16, 256)
WIDE_PASSES(f16, __half, 64)
WIDE_PASSES(f16, __half, 96)
WIDE_PASSES(f16, __half, 128)
WIDE_PASSES(bf16, __nv_bfloat16, 64)
WIDE_PASSES(bf16, __nv_bfloat16, 96)
WIDE_PASSES(bf16, __nv_bfloat16, 128)
PLAIN_PASSES(f32, float)
PLAIN_PASSES(f16, __half)
PLAIN_PASSES(bf16, __nv_bfloat16)

// The log-sum-exp of each query row; also sets back what `pool` counts. Each tile of an item takes its share of the rows.
extern "C" __global__ void __launch_bounds__(THREADS) window_merge(const __grid_constant__ Launch launch) {
    if (blockIdx.x >= launch.tiles) {
        return;
    }
    const Item &item = launch.item_of(blockIdx.x);
    uint32_t tile = blockIdx.x - item.first_tile, splits = splits_of(item), all = item.heads * item.rows;
    if (tile == 0) {
        for (uint32_t head = threadIdx.x; head < item.heads; head += THREADS) {
            item.progress[head] = make_uint2(0, 0);
        }
    }
    for (uint32_t at = tile * THREADS + threadIdx.x; at < all; at += splits * item.heads * THREADS) {
        uint32_t head = at / item.rows, row = at % item.rows;
        if (item.lse != nullptr) {
            uint32_t query_head = head * (item.rows / item.window) + row / item.window;
            item.row_lse[at] =
                LOG2_E * item.lse[query_head * item.lse_stride_head + row % item.window * item.lse_stride_position];
            continue;
        }
        const float2 *stats = item.stats + (size_t)head * splits * item.rows + row;
        float largest = LOWEST, sum = 0;
#pragma unroll 8
        for (uint32_t split = 0; split < splits; split++) {
            float2 part = stats[(size_t)split * item.rows];
            float both = fmaxf(largest, part.x);
            sum = sum * exp2_fast(largest - both) + part.y * exp2_fast(part.x - both);
            largest = both;
        }
        item.row_lse[at] = largest + log2f(sum);
    }
}

// Means over at most 8 query rows from kept logits.
extern "C" __global__ void __launch_bounds__(THREADS) window_stored(const __grid_constant__ Launch launch) {
    if (blockIdx.x >= launch.tiles) {
        return;
    }
    const Item &item = launch.item_of(blockIdx.x);
    if (item.logits == nullptr) {
        return;
    }
    Place place(item, blockIdx.x);
    uint32_t end = min(place.start + SPLIT, history_of(item));
    const float *logits = item.logits + (size_t)place.head * item.rows * item.length;
    for (uint32_t key = place.start + threadIdx.x; key < end; key += THREADS) {
        float mean = 0;
#pragma unroll 8
        for (uint32_t row = 0; row < item.rows; row++) {
            mean += exp2_fast(logits[(size_t)row * item.length + key] - item.row_lse[place.head * item.rows + row]);
        }
        item.means[place.head * (size_t)item.length + key] = mean / item.rows;
    }
}

// Scores of the history, and from the last tile of a head that is done the scores of its window.
extern "C" __global__ void __launch_bounds__(THREADS) window_pool(const __grid_constant__ Launch launch) {
    if (blockIdx.x >= launch.tiles) {
        return;
    }
    __shared__ float warp_largest[WARPS];
    __shared__ bool is_last;
    const Item &item = launch.item_of(blockIdx.x);
    Place place(item, blockIdx.x);
    int history = history_of(item), reach = launch.head.kernel / 2;
    int end = min(place.start + SPLIT, (uint32_t)history);
    const float *means = item.means + place.head * (size_t)item.length;
    float *scores = item.scores + place.head * (size_t)item.length;
    float largest = 0;
    for (int key = place.start + threadIdx.x; key < end; key += THREADS) {
        float sum = 0;
        int last = min(key + reach, history - 1);
        for (int neighbour = max(key - reach, 0); neighbour <= last; neighbour++) {
            sum += means[neighbour];
        }
        float score = sum / launch.head.kernel;
        scores[key] = score;
        // NaN is left out here, as on the CPU.
        largest = fmaxf(largest, score);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        largest = fmaxf(largest, other(largest, lanes));
    }
    if (threadIdx.x % 32 == 0) {
        warp_largest[threadIdx.x / 32] = largest;
    }
    __syncthreads();
    uint2 *progress = item.progress + place.head;
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < WARPS; warp++) {
            largest = fmaxf(largest, warp_largest[warp]);
        }
        // The bits of numbers that are not negative are in their order.
        atomicMax(&progress->y, __float_as_uint(largest));
        __threadfence();
        is_last = atomicAdd(&progress->x, 1) == splits_of(item) - 1;
    }
    __syncthreads();
    if (is_last) {
        float most = __uint_as_float(atomicMax(&progress->y, 0));
        for (uint32_t key = history + threadIdx.x; key < item.length; key += THREADS) {
            scores[key] = most;
        }
    }
}
