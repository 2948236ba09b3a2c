// y = W3 relu(W2 relu(W1 x + b1) + b2) + b3 for groups of adjacent rows: see grouped_mlp.rs of the CPU bodies.
//
// All three products of a group are done by the warp that read it, and hidden values never leave its registers. A
// group's bits depend on its rows and the weights alone.

#include "common.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

using namespace kvhook;

namespace kvhook {

constexpr int THREADS = 256, WARPS = THREADS / 32;
// Groups of a tile of the tensor-core kernels. `TILE` of grouped_mlp.rs.
constexpr uint32_t TILE = 256;
// Threads of a block of the kernels for Hopper: three groups of warps. `WIDE_THREADS` of grouped_mlp.rs.
constexpr int WIDE_THREADS = 3 * GROUP_THREADS;
// Chunks of weights that are in shared memory where not all of them fit. `RING` of grouped_mlp.rs.
constexpr int RING = 4;

// `Head` of grouped_mlp.rs.
struct Head {
    // Null: none.
    unsigned long long *verdict;
    uint32_t head_dim;
    // Rows of a group.
    uint32_t factor;
    // Groups of a tile of the plain kernels.
    uint32_t plain_tile;
    uint32_t reserved;
};

// `Item` of grouped_mlp.rs.
struct Item {
    View source, destination;
    // As grouped_mlp.rs packs them.
    const char *weights;
    // What the destination's rows stand for; that of a row that is a fault is spoilt. Null: nothing to spoil.
    uint32_t *positions;
    uint32_t first_tile;
    // Of all things of the operation: what the verdict names.
    uint32_t number;
    uint32_t source_start, count, destination_start;
    uint16_t heads;
    uint8_t source_layout, destination_layout;
    // Whether the heads of a group of tokens are neighbours in a tile, rather than the groups of a head.
    uint8_t heads_inside;
    uint8_t reserved[7];
};
static_assert(sizeof(Item) == 80);

constexpr int ITEMS = 399;
using Launch = Batch<Head, Item, ITEMS>;
static_assert(sizeof(Launch) <= PARAMETER_BYTES);

// A group of an item.
struct Group {
    uint32_t head, group;
    __device__ Group(const Item &item, uint32_t number) {
        if (item.heads_inside) {
            group = number / item.heads, head = number - group * item.heads;
        } else {
            head = number / item.count, group = number - head * item.count;
        }
    }
};

// Tells that a row of the destination is no result.
__device__ inline void fault(const Launch &launch, const Item &item, uint32_t head, uint32_t place) {
    if (item.positions != nullptr) {
        item.positions[place] = SPOILT;
    }
    if (launch.head.verdict != nullptr) {
        report(launch.head.verdict, item.number, head, place, FAULT_TOO_LARGE);
    }
}

template <class T> __device__ constexpr float largest_value();
template <> __device__ constexpr float largest_value<float>() { return 3.402823466e38f; }
template <> __device__ constexpr float largest_value<__half>() { return 65504.f; }
template <> __device__ constexpr float largest_value<__nv_bfloat16>() { return 3.38953139e38f; }

__device__ inline float relu(float value) { return value < 0.f ? 0.f : value; }

__device__ inline void copy_async(void *shared, const char *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global)
                 : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Tensor cores: a warp holds 32 groups, their sums and hidden values in registers; weights come from shared memory, all
// of them (`RESIDENT`) or in a ring of chunks. Blocks take tiles in turns of neighbours, so that they rarely change
// weights.
//
// Packed weights: three biases of D f32, then (factor + 2) * D / 32 chunks of D outputs by 32 inputs, in the order in
// which lanes read them.
template <class T, int D, bool RESIDENT> struct Fast {
    static constexpr int CHUNKS = D / CHUNK, OUTPUTS = D / 8;
    // Words of a chunk.
    static constexpr int WORDS = OUTPUTS * 32;
    static constexpr int BIAS_WORDS = 3 * D / 4;
    // Groups of a warp: two instructions' worth.
    static constexpr uint32_t GROUPS = 32;
    static_assert(GROUPS * WARPS == TILE);

    using Sums = float[2][OUTPUTS][4];
    // The lane's words of a chunk of inputs, for each of its groups.
    using Inputs = uint4[4];
    // A chunk of inputs of the warp's groups.
    using Chunk = Fragment[2];

    const Launch &launch;
    const Item *item;
    uint4 *shared;
    int lane;

    __device__ const float *bias(int layer) const { return reinterpret_cast<const float *>(shared) + layer * D; }

    __device__ void copy_words(uint4 *to, uint32_t first, uint32_t count) const {
        for (uint32_t word = threadIdx.x; word < count; word += THREADS) {
            copy_async(to + word, item->weights + (size_t)(first + word) * 16);
        }
    }

    __device__ uint32_t all_chunks() const { return (launch.head.factor + 2) * CHUNKS; }

    // Words of chunk `number`, which is in shared memory after this.
    __device__ const uint4 *chunk(uint32_t number) const {
        uint4 *chunks = shared + BIAS_WORDS;
        if constexpr (RESIDENT) {
            return chunks + number * WORDS;
        } else {
            wait_copies<RING - 2>();
            __syncthreads();
            // All warps are past the chunk before, so its place is free.
            uint32_t next = number + RING - 1;
            if (next < all_chunks()) {
                copy_words(chunks + next % RING * WORDS, BIAS_WORDS + next * WORDS, WORDS);
            }
            commit_copies();
            return chunks + number % RING * WORDS;
        }
    }

    __device__ void start(Sums &sums, int layer) const {
#pragma unroll
        for (int output = 0; output < OUTPUTS; output++) {
            float2 both = *reinterpret_cast<const float2 *>(bias(layer) + output * 8 + lane % 4 * 2);
#pragma unroll
            for (int block = 0; block < 2; block++) {
                sums[block][output][0] = sums[block][output][2] = both.x;
                sums[block][output][1] = sums[block][output][3] = both.y;
            }
        }
    }

    __device__ static void multiply(Sums &sums, const Chunk &inputs, const uint4 *weights, int lane) {
#pragma unroll
        for (int output = 0; output < OUTPUTS; output++) {
            uint4 weight = weights[output * 32 + lane];
#pragma unroll
            for (int block = 0; block < 2; block++) {
                multiply_chunk<T>(sums[block][output], inputs[block], weight);
            }
        }
    }

    // relu(sums), rounded: the sums' lanes are the next layer's inputs' lanes.
    __device__ static void hide(const Sums &sums, Chunk (&hidden)[CHUNKS]) {
#pragma unroll
        for (int at = 0; at < CHUNKS * 2; at++) {
            int chunk = at / 2, block = at % 2;
            uint32_t low[4], high[4];
#pragma unroll
            for (int part = 0; part < 4; part++) {
                const float(&from)[4] = sums[block][chunk * 4 + part];
                low[part] = Mma<T>::pack(relu(from[0]), relu(from[1]));
                high[part] = Mma<T>::pack(relu(from[2]), relu(from[3]));
            }
            hidden[chunk][block] = {make_uint4(low[0], high[0], low[1], high[1]),
                                    make_uint4(low[2], high[2], low[3], high[3])};
        }
    }

    // Addresses of the rows of the lane's groups that are member `member` of their group.
    __device__ void find(const char *(&rows)[4], const Group (&groups)[4], uint32_t member) const {
        const Layout &layout = launch.layouts[item->source_layout];
#pragma unroll
        for (int half = 0; half < 4; half++) {
            uint32_t token = item->source_start + groups[half].group * launch.head.factor + member;
            rows[half] = row_address(layout, item->source, token, groups[half].head);
        }
    }

    __device__ void store(const Sums &sums, uint32_t first, uint32_t all) const {
        const Layout &layout = launch.layouts[item->destination_layout];
#pragma unroll
        for (int half = 0; half < 4; half++) {
            uint32_t number = first + half * 8 + lane / 4;
            if (number >= all) {
                continue;
            }
            Group group(*item, number);
            uint32_t place = item->destination_start + group.group;
            char *row = row_address(layout, item->destination, place, group.head);
            bool fits = true;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                uint32_t words[4];
#pragma unroll
                for (int part = 0; part < 4; part++) {
                    const float(&from)[4] = sums[half / 2][chunk * 4 + part];
                    float low = from[half % 2 * 2], high = from[half % 2 * 2 + 1];
                    fits = fits && fabsf(low) <= largest_value<T>() && fabsf(high) <= largest_value<T>();
                    words[part] = Mma<T>::pack(low, high);
                }
                *reinterpret_cast<uint4 *>(row + (chunk * 4 + lane % 4) * 16) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
            if (!fits) {
                fault(launch, *item, group.head, place);
            }
        }
    }

    __device__ void tile(uint32_t first) const {
        uint32_t all = item->count * item->heads;
        first += threadIdx.x / 32 * GROUPS;
        if constexpr (!RESIDENT) {
            __syncthreads();
            for (int number = 0; number < RING - 1; number++) {
                if (number < (int)all_chunks()) {
                    copy_words(shared + BIAS_WORDS + number * WORDS, BIAS_WORDS + number * WORDS, WORDS);
                }
                commit_copies();
            }
        } else if (first >= all) {
            return;
        }
        uint32_t inputs = launch.head.factor * CHUNKS, zero = launch.count >> 31;
        Sums sums;
        start(sums, 0);
        {
            // Lanes beyond the last group compute it again.
            auto group_of = [&](int half) { return Group(*item, min(first + half * 8 + lane / 4, all - 1)); };
            Group groups[4] = {group_of(0), group_of(1), group_of(2), group_of(3)};
            const char *rows[4];
            auto load = [&](Inputs &words, uint32_t number) {
                if (number % CHUNKS == 0) {
                    find(rows, groups, number / CHUNKS);
                }
#pragma unroll
                for (int half = 0; half < 4; half++) {
                    words[half] = load_once(rows[half] + (number % CHUNKS * 4 + lane % 4) * 16);
                }
            };
            Inputs now, next, later;
            load(now, 0);
            load(next, 1);
#pragma unroll 1
            for (uint32_t number = 0; number < inputs; number++) {
                load(later, min(number + 2, inputs - 1));
                Chunk chunk_now = {fragment(now[0], now[1], zero), fragment(now[2], now[3], zero)};
                multiply(sums, chunk_now, chunk(number), lane);
#pragma unroll
                for (int half = 0; half < 4; half++) {
                    now[half] = next[half], next[half] = later[half];
                }
            }
        }
#pragma unroll
        for (int layer = 1; layer < 3; layer++) {
            Chunk hidden[CHUNKS];
            hide(sums, hidden);
            start(sums, layer);
#pragma unroll
            for (int number = 0; number < CHUNKS; number++) {
                multiply(sums, hidden[number], chunk(inputs + (layer - 1) * CHUNKS + number), lane);
            }
        }
        store(sums, first, all);
    }

    __device__ static void run(const Launch &launch) {
        uint4 *memory = dynamic_shared();
        Fast fast{launch, nullptr, memory, int(threadIdx.x % 32)};
        const char *held = nullptr;
        uint32_t first = (uint64_t)launch.tiles * blockIdx.x / gridDim.x;
        uint32_t end = (uint64_t)launch.tiles * (blockIdx.x + 1) / gridDim.x;
        for (uint32_t number = first; number < end; number++) {
            fast.item = &launch.item_of(number);
            if (fast.item->weights != held) {
                held = fast.item->weights;
                __syncthreads();
                fast.copy_words(memory, 0, BIAS_WORDS + (RESIDENT ? fast.all_chunks() * WORDS : 0));
                commit_copies();
                wait_copies<0>();
                __syncthreads();
            }
            fast.tile((number - fast.item->first_tile) * TILE);
        }
    }
};

#if WIDE

// Hopper, at head_dim 128 with all weights in shared memory: a group of four warps has 64 groups of rows at a time. As
// `Fast`, but for the instruction and the order in which the weights lie in shared memory.
template <class T> struct Wide128 {
    static constexpr int D = 128, CHUNKS = D / CHUNK;
    static constexpr uint32_t GROUPS = 64, PANEL_BYTES = D * 128;

    // Of a lane: words of a chunk of its two rows.
    struct Input {
        uint4 low, high;
    };
    // A warp's 16 groups: the lane's two.
    struct Lane {
        Group low, high;
        __device__ Lane(const Item &item, uint32_t tile)
            : low(item, number(item, tile, 0)), high(item, number(item, tile, 8)) {}
        // Lanes beyond the last group compute it again.
        __device__ static uint32_t number(const Item &item, uint32_t tile, uint32_t further) {
            return min(first(tile) + further, item.count * item.heads - 1);
        }
        __device__ static uint32_t first(uint32_t tile) {
            return tile * GROUPS + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        }
    };

    const Launch &launch;
    const Item *item;
    // Panels of 64 channels by all outputs, and the biases.
    uint32_t weights;
    const float *biases;
    int lane;

    __device__ void load_weights(uint4 *shared) const {
        const uint4 *packed = reinterpret_cast<const uint4 *>(item->weights);
        uint32_t bias_words = 3 * D / 4, words = (launch.head.factor + 2) * CHUNKS * (D / 8) * 32;
        for (uint32_t number = threadIdx.x; number < words; number += blockDim.x) {
            uint4 word = packed[bias_words + number];
            uint32_t chunk = number / (D / 8 * 32), output = number / 4 % D, part = number % 4;
            uint32_t panel = weights + chunk / 2 * PANEL_BYTES, first = chunk % 2 * 4;
            uint32_t elements[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                uint32_t place = panel + place_of_word<D>(output, first + pair) + part * 4;
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(place), "r"(elements[pair]) : "memory");
            }
        }
        for (uint32_t number = threadIdx.x; number < bias_words; number += blockDim.x) {
            shared[number] = packed[number];
        }
    }

    __device__ void start(float (&sums)[64], int layer) const {
#pragma unroll
        for (int output = 0; output < D / 8; output++) {
            float2 both = *reinterpret_cast<const float2 *>(biases + layer * D + output * 8 + lane % 4 * 2);
            sums[output * 4] = sums[output * 4 + 2] = both.x;
            sums[output * 4 + 1] = sums[output * 4 + 3] = both.y;
        }
    }

    // Adds the products of 128 channels, whose weights are in `panels`.
    __device__ static void multiply(float (&sums)[64], const uint4 (&inputs)[D / STEP], uint32_t panels) {
        products_begin();
#pragma unroll
        for (int step = 0; step < D / STEP; step++) {
            Wide<T>::multiply(sums, inputs[step], tile_descriptor(step_address<D>(panels, step)), true);
        }
        products_commit();
        products_end(sums);
    }

    // The rows that are member `member` of the lane's groups.
    __device__ void find(const char *(&rows)[2], const Lane &groups, uint32_t member) const {
        const Layout &layout = launch.layouts[item->source_layout];
        uint32_t start = item->source_start + member;
        rows[0] = row_address(layout, item->source, start + groups.low.group * launch.head.factor, groups.low.head);
        rows[1] = row_address(layout, item->source, start + groups.high.group * launch.head.factor, groups.high.head);
    }

    __device__ Input load(const char *const (&rows)[2], int chunk) const {
        int place = (chunk * 4 + lane % 4) * 16;
        return {load_once(rows[0] + place), load_once(rows[1] + place)};
    }

    // Brings rows into the second-level cache: a line by each of a row's first two lanes.
    __device__ void bring(const char *const (&rows)[2]) const {
        if (lane % 4 < 2) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                asm volatile("prefetch.global.L2 [%0];" ::"l"(rows[half] + lane % 4 * 128));
            }
        }
    }

    // A layer whose inputs are the sums of the one before.
    __device__ void next_layer(float (&sums)[64], int layer) const {
        uint4 hidden[D / STEP];
#pragma unroll
        for (int step = 0; step < D / STEP; step++) {
            const float *from = sums + step * 8;
            hidden[step] =
                make_uint4(Mma<T>::pack(relu(from[0]), relu(from[1])), Mma<T>::pack(relu(from[2]), relu(from[3])),
                           Mma<T>::pack(relu(from[4]), relu(from[5])), Mma<T>::pack(relu(from[6]), relu(from[7])));
        }
        start(sums, layer);
        multiply(sums, hidden, weights + (launch.head.factor + layer - 1) * (D / 64) * PANEL_BYTES);
    }

    __device__ void store(const float (&sums)[64], const Lane &groups, uint32_t tile) const {
        const Layout &layout = launch.layouts[item->destination_layout];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Group &group = half == 0 ? groups.low : groups.high;
            if (Lane::first(tile) + half * 8 >= item->count * item->heads) {
                continue;
            }
            uint32_t place = item->destination_start + group.group;
            char *row = row_address(layout, item->destination, place, group.head);
            bool fits = true;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                uint32_t words[4];
#pragma unroll
                for (int part = 0; part < 4; part++) {
                    float low = sums[(chunk * 4 + part) * 4 + half * 2];
                    float high = sums[(chunk * 4 + part) * 4 + half * 2 + 1];
                    fits = fits && fabsf(low) <= largest_value<T>() && fabsf(high) <= largest_value<T>();
                    words[part] = Mma<T>::pack(low, high);
                }
                *reinterpret_cast<uint4 *>(row + (chunk * 4 + lane % 4) * 16) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
            if (!fits) {
                fault(launch, *item, group.head, place);
            }
        }
    }

    // The item's tiles `first .. end`, in turns of the block's groups of warps.
    __device__ void tiles(uint32_t first, uint32_t end) const {
        uint32_t step = blockDim.x / GROUP_THREADS;
        first += threadIdx.x / GROUP_THREADS;
        if (first >= end) {
            return;
        }
        uint32_t factor = launch.head.factor;
        Input inputs[CHUNKS];
        const char *rows[2];
        // Finds rows of the tile, or of the group's next one behind its last member.
        auto find_ahead = [&](uint32_t tile, uint32_t member) {
            bool is_next = member >= factor;
            find(rows, Lane(*item, is_next && tile + step < end ? tile + step : tile),
                 is_next ? min(member - factor, factor - 1) : member);
        };
        find_ahead(first, 1);
        bring(rows);
        find_ahead(first, 0);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            inputs[chunk] = load(rows, chunk);
        }
        for (uint32_t tile = first; tile < end; tile += step) {
            float sums[64];
            start(sums, 0);
#pragma unroll 1
            for (uint32_t member = 0; member < factor; member++) {
                // A row of each group is on its way to registers, and the one behind it to the second-level cache.
                find_ahead(tile, member + 2);
                bring(rows);
                find_ahead(tile, member + 1);
                uint4 operands[D / STEP];
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; chunk++) {
                    uint4 low = inputs[chunk].low, high = inputs[chunk].high;
                    operands[chunk * 2] = make_uint4(low.x, high.x, low.y, high.y);
                    operands[chunk * 2 + 1] = make_uint4(low.z, high.z, low.w, high.w);
                    inputs[chunk] = load(rows, chunk);
                }
                multiply(sums, operands, weights + member * (D / 64) * PANEL_BYTES);
            }
            next_layer(sums, 1);
            next_layer(sums, 2);
            store(sums, Lane(*item, tile), tile);
        }
    }

    __device__ static void run(const Launch &launch) {
        uint32_t first = (uint64_t)launch.tiles * blockIdx.x / gridDim.x;
        uint32_t end = (uint64_t)launch.tiles * (blockIdx.x + 1) / gridDim.x;
        uint32_t bytes = (launch.head.factor + 2) * (D / 64) * PANEL_BYTES;
        uint32_t base = shared_address(dynamic_shared()), aligned = (base + 1023) / 1024 * 1024;
        uint4 *biases = dynamic_shared() + (aligned - base + bytes) / 16;
        Wide128 mlp{launch, nullptr, aligned, reinterpret_cast<const float *>(biases), int(threadIdx.x % 32)};
        const char *held = nullptr;
        while (first < end) {
            mlp.item = &launch.item_of(first);
            if (mlp.item->weights != held) {
                held = mlp.item->weights;
                __syncthreads();
                mlp.load_weights(biases);
                fence_for_products();
                __syncthreads();
            }
            uint32_t tiles = (mlp.item->count * mlp.item->heads + GROUPS - 1) / GROUPS, start = mlp.item->first_tile;
            uint32_t last = min(end, start + tiles);
            mlp.tiles(first - start, last - start);
            first = last;
        }
    }
};

#endif

// Any dtype, head_dim and layout: weights and hidden values in f32, and each result one chain of fused multiply-adds over
// the inputs in order, then the bias: the CPU's bits.
//
// Packed weights: for each layer the bias, padded to a multiple of 4, then [input][outputs, padded] in f32.
template <class T> struct Plain {
    // Inputs that are in shared memory at a time.
    static constexpr uint32_t STEP = 32;
    // Groups and outputs of a thread.
    static constexpr int GROUPS = 8, OUTPUTS = 4;

    const Launch &launch;
    const Item &item;
    uint32_t dim, padded, tile, first, all;

    // One layer. Inputs of the first come from the cache, STEP at a time; others are `from`, [channel][group]. Results
    // of the last go to the cache; others to `to`.
    __device__ void layer(const float *weights, uint32_t inputs, const float *from, float *to, float *step,
                          bool last) const {
        const float *bias = weights;
        weights += padded;
        uint32_t quads = padded / OUTPUTS, work = tile / GROUPS * quads;
        // Rounds are the same for all threads: there is a barrier inside.
        for (uint32_t start = 0; start < work; start += THREADS) {
            bool active = start + threadIdx.x < work;
            uint32_t unit = active ? start + threadIdx.x : 0;
            uint32_t output = unit % quads * OUTPUTS, group = unit / quads * GROUPS;
            float sums[GROUPS][OUTPUTS] = {};
            for (uint32_t base = 0; base < inputs; base += STEP) {
                uint32_t count = min(STEP, inputs - base);
                const float *x = from == nullptr ? step : from + base * tile;
                if (from == nullptr) {
                    __syncthreads();
                    load(step, base, count);
                    __syncthreads();
                }
                for (uint32_t input = 0; input < count; input++) {
                    float4 weight = *reinterpret_cast<const float4 *>(weights + (size_t)(base + input) * padded + output);
                    float weight_values[OUTPUTS] = {weight.x, weight.y, weight.z, weight.w};
                    float4 low = *reinterpret_cast<const float4 *>(x + input * tile + group);
                    float4 high = *reinterpret_cast<const float4 *>(x + input * tile + group + 4);
                    float x_values[GROUPS] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                    for (int i = 0; i < GROUPS; i++) {
#pragma unroll
                        for (int j = 0; j < OUTPUTS; j++) {
                            sums[i][j] = fmaf(x_values[i], weight_values[j], sums[i][j]);
                        }
                    }
                }
            }
#pragma unroll
            for (int at = 0; at < GROUPS * OUTPUTS; at++) {
                int i = at / OUTPUTS, j = at % OUTPUTS;
                if (active && output + j < dim) {
                    float value = sums[i][j] + bias[output + j];
                    if (last) {
                        store(first + group + i, output + j, value);
                    } else {
                        to[(output + j) * tile + group + i] = relu(value);
                    }
                }
            }
        }
        __syncthreads();
    }

    // Inputs `base ..` of the tile's groups, [input][group].
    __device__ void load(float *step, uint32_t base, uint32_t count) const {
        const Layout &layout = launch.layouts[item.source_layout];
        for (uint32_t at = threadIdx.x; at < tile * STEP; at += THREADS) {
            uint32_t input = at % STEP, place = at / STEP;
            if (input < count) {
                Group group(item, min(first + place, all - 1));
                uint32_t member = (base + input) / dim, channel = (base + input) % dim;
                uint32_t token = item.source_start + group.group * launch.head.factor + member;
                const char *row = row_address(layout, item.source, token, group.head);
                step[input * tile + place] = Element<T>::load(row + (int64_t)channel * layout.stride_element);
            }
        }
    }

    __device__ void store(uint32_t number, uint32_t channel, float value) const {
        if (number >= all) {
            return;
        }
        const Layout &layout = launch.layouts[item.destination_layout];
        Group group(item, number);
        uint32_t place = item.destination_start + group.group;
        char *row = row_address(layout, item.destination, place, group.head);
        Element<T>::store(row + (int64_t)channel * layout.stride_element, value);
        if (!(fabsf(value) <= largest_value<T>())) {
            fault(launch, item, group.head, place);
        }
    }

    __device__ static void run(const Launch &launch) {
        if (blockIdx.x >= launch.tiles) {
            return;
        }
        uint4 *memory = dynamic_shared();
        const Item &item = launch.item_of(blockIdx.x);
        uint32_t dim = launch.head.head_dim, padded = (dim + 3) / 4 * 4, tile = launch.head.plain_tile;
        Plain plain{launch, item, dim, padded, tile, (blockIdx.x - item.first_tile) * tile, item.count * item.heads};
        float *step = reinterpret_cast<float *>(memory), *hidden = step + STEP * tile, *second = hidden + dim * tile;
        uint32_t inputs = launch.head.factor * dim;
        const float *weights = reinterpret_cast<const float *>(item.weights);
        plain.layer(weights, inputs, nullptr, hidden, step, false);
        weights += (size_t)(inputs + 1) * padded;
        plain.layer(weights, dim, hidden, second, step, false);
        weights += (size_t)(dim + 1) * padded;
        plain.layer(weights, dim, second, nullptr, step, true);
    }
};

} // namespace kvhook

#define FAST(NAME, TYPE, D)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        grouped_mlp_##NAME##_##D(const __grid_constant__ Launch launch) {                                              \
        Fast<TYPE, D, true>::run(launch);                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        grouped_mlp_ring_##NAME##_##D(const __grid_constant__ Launch launch) {                                         \
        Fast<TYPE, D, false>::run(launch);                                                                             \
    }

#if WIDE
#define RUN_WIDE(TYPE) Wide128<TYPE>::run(launch)
#else
#define RUN_WIDE(TYPE)
#endif

#define WIDE_128(NAME, TYPE)                                                                                           \
    extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1)                                                      \
        grouped_mlp_wide_##NAME##_128(const __grid_constant__ Launch launch) {                                         \
        RUN_WIDE(TYPE);                                                                                                \
    }

#define PLAIN(NAME, TYPE)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        grouped_mlp_##NAME(const __grid_constant__ Launch launch) {                                                    \
        Plain<TYPE>::run(launch);                                                                                      \
    }

FAST(f16, __half, 64)
FAST(f16, __half, 96)
FAST(f16, __half, 128)
FAST(bf16, __nv_bfloat16, 64)
FAST(bf16, __nv_bfloat16, 96)
FAST(bf16, __nv_bfloat16, 128)
WIDE_128(f16, __half)
WIDE_128(bf16, __nv_bfloat16)
PLAIN(f32, float)
PLAIN(f16, __half)
PLAIN(bf16, __nv_bfloat16)
