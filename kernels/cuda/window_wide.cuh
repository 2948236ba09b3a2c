// The passes of window_attention.cu on Hopper, for more than 128 and at most 256 query rows of a KV head.
//
// Four groups of four warps share a block's tensor cores: one multiplies while the others make exponentials, of which there
// are as many as there are products of 128 channels. Blocks take splits in turns of neighbours.
#pragma once

#include "wgmma.cuh"
#include "window_attention.cuh"

namespace kvhook {

constexpr int GROUPS = 4;

#if WIDE

// Adjacent splits of a head: a block's tiles from `tile` on, as far as they are of one head.
struct Stretch {
    const Item *item;
    uint32_t head, tiles, start, end;
    __device__ Stretch(const Launch &launch, uint32_t tile, uint32_t last, bool columns) {
        item = &launch.item_of(tile);
        uint32_t splits = splits_of(*item), local = tile - item->first_tile;
        head = local / splits;
        uint32_t split = local - head * splits;
        tiles = min(splits - split, last - tile);
        start = split * SPLIT;
        end = min((split + tiles) * SPLIT, columns ? history_of(*item) : item->length);
        if (!columns && item->lse != nullptr) {
            end = start;
        }
    }
};

// Calls `visit` with each stretch of the block's tiles that has keys.
template <class Visit> __device__ inline void for_each_stretch(const Launch &launch, bool columns, Visit visit) {
    uint32_t tile = (uint64_t)launch.tiles * blockIdx.x / gridDim.x;
    uint32_t last = (uint64_t)launch.tiles * (blockIdx.x + 1) / gridDim.x;
    while (tile < last) {
        Stretch stretch(launch, tile, last, columns);
        if (stretch.start < stretch.end) {
            visit(stretch);
        }
        tile += stretch.tiles;
    }
}

// The groups of warps multiply in turns: what one enqueues would else be done together with the others', and all would then
// make exponentials at once.
struct Turns {
    int group;
    __device__ explicit Turns(int group) : group(group) {
        if (group == GROUPS - 1) {
            pass();
        }
    }
    __device__ void wait() const { numbered_sync(1 + group, 2 * GROUP_THREADS); }
    __device__ void pass() const { numbered_arrive(1 + (group + 1) % GROUPS, 2 * GROUP_THREADS); }
    // After as many turns of each group.
    __device__ void end() const {
        if (group == 0) {
            wait();
        }
    }
};

__device__ inline uint32_t aligned_shared() { return (shared_address(dynamic_shared()) + 1023) / 1024 * 1024; }

// Copies COUNT rows of `WORDS` words, whose addresses the first lanes have, to a tile's rows from `first` on.
template <int ROWS, int WORDS, int COUNT>
__device__ inline void copy_rows(uint32_t tile, const char *row, uint32_t first, int lane) {
#pragma unroll
    for (int part = 0; part < COUNT * WORDS / 32; part++) {
        uint32_t number = part * 32 + lane, from = number / WORDS, word = number % WORDS;
        const char *source = reinterpret_cast<const char *>(__shfl_sync(~0u, (unsigned long long)row, from));
        copy_word(tile + place_of_word<ROWS>(first + from, word), source + word * 16);
    }
}

// The multiplications of a tile, by turns; `a` and `b` give the operands of a step.
template <class T, int STEPS, class A, class B>
__device__ inline void multiply_in_turn(const Turns &turns, float (&sums)[64], A a, B b) {
    turns.wait();
    products_begin();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        Wide<T>::multiply(sums, a(step), b(step), step > 0);
        if (step == STEPS / 2 - 1) {
            products_commit();
        }
    }
    products_commit();
    // The next group's begin while the last of this one's are done.
    products_wait<1>();
    turns.pass();
    products_end(sums);
}

// Each group has 64 query rows, in registers; all take the same keys, a part of which each group brings.
template <class T, int D> struct WideSums {
    static constexpr int PANELS = (D + 63) / 64, STEPS = D / STEP, STAGES = 4;
    static constexpr uint32_t KEYS = 128, TILE_BYTES = KEYS * 128 * PANELS;

    // Of exponentials whose reference stays: 2^REACH.
    static constexpr float MOST = 18446744073709551616.f;

    const Launch &launch;
    uint32_t tiles, barriers;

    __device__ uint32_t full(int stage) const { return barriers + stage * 8; }
    __device__ uint32_t empty(int stage) const { return barriers + (STAGES + stage) * 8; }

    // A warp brings 8 keys of a tile, `ahead` tiles behind the current one, as soon as no group multiplies with what was
    // in its place.
    __device__ void bring(const Stretch &stretch, uint32_t key, int ahead, int stage, uint32_t parity) const {
        stage += ahead;
        if (stage < STAGES) {
            parity ^= 1;
        } else {
            stage -= STAGES;
        }
        barrier_wait(empty(stage), parity);
        const Item &item = *stretch.item;
        uint32_t first = threadIdx.x / 32 * 8, lane = threadIdx.x % 32;
        uint32_t token = min(key + first + lane % 8, stretch.end - 1);
        const char *row = row_address(launch.layouts[item.layout], item.keys, token, stretch.head);
        copy_rows<KEYS, D / 8, 8>(tiles + stage * TILE_BYTES, row, first, lane);
        barrier_arrive_with_copies(full(stage));
    }

    __device__ void all() const {
        int group = threadIdx.x / GROUP_THREADS, lane = threadIdx.x % 32, stage = 0;
        // Of this thread's two query rows; the other is 8 further.
        uint32_t row = threadIdx.x / 32 * 16 + lane / 4, parity = 0;
        Turns turns(group);
        for_each_stretch(launch, false, [&](const Stretch &stretch) {
            const Item &item = *stretch.item;
            for (int ahead = 0; ahead < STAGES - 1; ahead++) {
                if (stretch.start + ahead * KEYS < stretch.end) {
                    bring(stretch, stretch.start + ahead * KEYS, ahead, stage, parity);
                }
            }
            uint4 queries[STEPS];
            load(queries, item, stretch.head, row, lane);
            float references[2] = {LOWEST, LOWEST}, totals[2] = {};
            for (uint32_t key = stretch.start; key < stretch.end; key += KEYS) {
                barrier_wait(full(stage), parity);
                fence_for_products();
                uint32_t keys = tiles + stage * TILE_BYTES;
                float sums[64];
                multiply_in_turn<T, STEPS>(
                    turns, sums, [&](int step) -> const uint4 & { return queries[step]; },
                    [&](int step) { return tile_descriptor(step_address<KEYS>(keys, step)); });
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(empty(stage));
                }
                if (key + (STAGES - 1) * KEYS < stretch.end) {
                    bring(stretch, key + (STAGES - 1) * KEYS, STAGES - 1, stage, parity);
                }
                if (++stage == STAGES) {
                    stage = 0, parity ^= 1;
                }
                if (key + KEYS > history_of(item)) {
                    mask(sums, item, key, row, lane);
                }
                add(sums, fabsf(item.scale), references, totals);
                if ((key + KEYS) % SPLIT == 0 || key + KEYS >= stretch.end) {
                    store(item, stretch.head, key / SPLIT, references, totals, row, lane);
                }
            }
        });
        turns.end();
    }

    // What is known of a split, which lies with four lanes; the next one begins.
    __device__ static void store(const Item &item, uint32_t head, uint32_t split, float (&references)[2],
                                 float (&totals)[2], uint32_t row, int lane) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float reference = references[half], total = totals[half];
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                float its_reference = other(reference, lanes), its_total = other(total, lanes);
                float both = fmaxf(reference, its_reference);
                total = total * exp2_fast(reference - both) + its_total * exp2_fast(its_reference - both);
                reference = both;
            }
            if (lane % 4 == 0 && row + half * 8 < item.rows) {
                uint32_t place = (head * splits_of(item) + split) * item.rows + row + half * 8;
                item.stats[place] = make_float2(reference, total);
            }
            references[half] = LOWEST, totals[half] = 0;
        }
    }

    // The lane's channels of its two rows. A scale below 0 goes into them, so that the largest product is the largest logit.
    __device__ static void load(uint4 (&queries)[STEPS], const Item &item, uint32_t head, uint32_t row, int lane) {
        uint32_t sign = item.scale < 0 ? 0x80008000 : 0;
        auto word = [&](const char *address, int channel) {
            return address == nullptr ? 0 : *reinterpret_cast<const uint32_t *>(address + channel * 2) ^ sign;
        };
        const char *low = row < item.rows ? query_address(item, head, row) : nullptr;
        const char *high = row + 8 < item.rows ? query_address(item, head, row + 8) : nullptr;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            int channel = step * STEP + lane % 4 * 2;
            queries[step] =
                make_uint4(word(low, channel), word(high, channel), word(low, channel + 8), word(high, channel + 8));
        }
    }

    // Takes out keys that come after a query, and those that stand for keys beyond the end.
    __device__ static void mask(float (&sums)[64], const Item &item, uint32_t key, uint32_t row, int lane) {
        uint32_t history = history_of(item);
        uint32_t last[2] = {history + row % item.window, history + (row + 8) % item.window};
#pragma unroll
        for (int at = 0; at < 64; at++) {
            if (key + at / 4 * 8 + lane % 4 * 2 + at % 2 > last[at / 2 % 2]) {
                sums[at] = -INFINITY;
            }
        }
    }

    // The sum of a row's exponentials relative to a reference.
    __device__ static float exponentials(const float (&sums)[64], int half, float scale, float reference) {
        float parts[2] = {};
#pragma unroll
        for (int at = 0; at < 32; at++) {
            parts[at % 2] += exp2_fast(fmaf(sums[at / 2 * 4 + half * 2 + at % 2], scale, -reference));
        }
        return parts[0] + parts[1];
    }

    // Adds exponentials relative to a reference, which is raised where a logit lies far above it: rarely more than once.
    __device__ static void add(const float (&sums)[64], float scale, float (&references)[2], float (&totals)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = exponentials(sums, half, scale, references[half]);
            // No more than the sum is any of them.
            if (!(total <= MOST)) {
                float largest = -INFINITY;
#pragma unroll
                for (int at = 0; at < 32; at++) {
                    largest = fmaxf(largest, sums[at / 2 * 4 + half * 2 + at % 2]);
                }
                totals[half] *= exp2_fast(references[half] - largest * scale);
                references[half] = largest * scale;
                total = exponentials(sums, half, scale, references[half]);
            }
            totals[half] += total;
        }
    }

    __device__ static void run(const Launch &launch) {
        __shared__ uint64_t barriers[2 * STAGES];
        WideSums pass{launch, aligned_shared(), shared_address(barriers)};
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < STAGES; stage++) {
                // The threads that copy; the warps that multiply.
                barrier_init(pass.full(stage), GROUPS * GROUP_THREADS);
                barrier_init(pass.empty(stage), GROUPS * GROUP_THREADS / 32);
            }
        }
        __syncthreads();
        pass.all();
    }
};

// Each group has 64 keys at a time, which it brings itself, and multiplies them with all query rows, 128 at a time.
template <class T, int D> struct WideColumns {
    static constexpr int PANELS = (D + 63) / 64, STEPS = D / STEP;
    static constexpr uint32_t ROWS = 256, ROWS_AT_ONCE = 128, KEYS = 64;
    static constexpr uint32_t QUERY_BYTES = ROWS * 128 * PANELS, KEY_BYTES = KEYS * 128 * PANELS;

    const Launch &launch;
    uint32_t queries;
    float *log_sums;
    int group, lane;

    // Where the group's keys are, one of two.
    __device__ uint32_t keys(int buffer) const { return queries + QUERY_BYTES + (group * 2 + buffer) * KEY_BYTES; }

    // A warp brings 16 keys.
    __device__ void bring(const Stretch &stretch, uint32_t key, int buffer) const {
        const Item &item = *stretch.item;
        uint32_t first = threadIdx.x / 32 % 4 * 16;
        uint32_t token = min(key + first + lane % 16, stretch.end - 1);
        const char *row = row_address(launch.layouts[item.layout], item.keys, token, stretch.head);
        copy_rows<KEYS, D / 8, 16>(keys(buffer), row, first, lane);
    }

    __device__ void load_queries(const Item &item, uint32_t head) const {
        for (uint32_t number = threadIdx.x; number < ROWS * (D / 8); number += GROUPS * GROUP_THREADS) {
            uint32_t row = number / (D / 8), word = number % (D / 8);
            uint4 value = make_uint4(0, 0, 0, 0);
            if (row < item.rows) {
                value = *reinterpret_cast<const uint4 *>(query_address(item, head, row) + word * 16);
            }
            uint32_t place = queries + place_of_word<ROWS>(row, word);
            asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(place), "r"(value.x), "r"(value.y), "r"(value.z),
                         "r"(value.w)
                         : "memory");
        }
        for (uint32_t row = threadIdx.x; row < ROWS; row += GROUPS * GROUP_THREADS) {
            log_sums[row] = row < item.rows ? item.row_lse[head * item.rows + row] : INFINITY;
        }
    }

    __device__ void add(const float (&sums)[64], const float *log_sums, float scale, float (&means)[4]) const {
#pragma unroll
        for (int eight = 0; eight < 16; eight++) {
            float2 both = *reinterpret_cast<const float2 *>(log_sums + eight * 8 + lane % 4 * 2);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                means[half * 2] += exp2_fast(fmaf(sums[eight * 4 + half * 2], scale, -both.x));
                means[half * 2 + 1] += exp2_fast(fmaf(sums[eight * 4 + half * 2 + 1], scale, -both.y));
            }
        }
    }

    __device__ void all() const {
        Turns turns(group);
        for_each_stretch(launch, true, [&](const Stretch &stretch) {
            const Item &item = *stretch.item;
            // All groups are past the stretch before.
            __syncthreads();
            bring(stretch, stretch.start + group * KEYS, 0);
            load_queries(item, stretch.head);
            fence_for_products();
            __syncthreads();
            int buffer = 0;
            for (uint32_t first = stretch.start; first < stretch.end; first += GROUPS * KEYS, buffer ^= 1) {
                uint32_t key = first + group * KEYS;
                asm volatile("cp.async.wait_all;" ::: "memory");
                fence_for_products();
                numbered_sync(1 + GROUPS + group, GROUP_THREADS);
                // The group is past the other buffer.
                if (first + GROUPS * KEYS < stretch.end) {
                    bring(stretch, key + GROUPS * KEYS, buffer ^ 1);
                }
                float means[4] = {};
                for (uint32_t from = 0; from < item.rows; from += ROWS_AT_ONCE) {
                    float sums[64];
                    uint32_t rows = queries + from * 128, tile = keys(buffer);
                    multiply_in_turn<T, STEPS>(
                        turns, sums, [&](int step) { return tile_descriptor(step_address<KEYS>(tile, step)); },
                        [&](int step) { return tile_descriptor(step_address<ROWS>(rows, step)); });
                    add(sums, log_sums + from, item.scale, means);
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float mean = means[half * 2] + means[half * 2 + 1];
                    mean += other(mean, 1);
                    mean += other(mean, 2);
                    uint32_t token = key + threadIdx.x / 32 % 4 * 16 + half * 8 + lane / 4;
                    if (lane % 4 == 0 && token < stretch.end) {
                        item.means[stretch.head * (size_t)item.length + token] = mean / item.rows;
                    }
                }
            }
        });
        turns.end();
    }

    __device__ static void run(const Launch &launch) {
        __shared__ float log_sums[ROWS];
        WideColumns pass{launch, aligned_shared(), log_sums, int(threadIdx.x) / GROUP_THREADS, int(threadIdx.x % 32)};
        pass.all();
    }
};

#endif

} // namespace kvhook
