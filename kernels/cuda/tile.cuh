// Tiles of rows, for kernels that read whole rows of a cache.
#pragma once

#include "common.cuh"

namespace kvhook {

// Threads of a block, and rows that it takes in one step.
constexpr int TILE_ROWS = 256;

// `Tiles` of tile.rs: rows of several heads and adjacent tokens, one view's part of a launch.
struct Tiles {
    View view;
    // Tokens, from `start` on, in each head.
    uint32_t start, length;
    // Tiles of the heads that one tile covers: a chain.
    uint32_t tiles_of_chain;
    // log2 of the heads of a tile, and its steps.
    uint8_t heads_shift, steps;
    // log2 of the lanes that share a row.
    uint8_t lanes_shift;
    uint8_t layout;
};
static_assert(sizeof(Tiles) == 32);

// What a lane loads at once: a 16-byte word of PER elements, or one element anywhere.
template <class T, int PER> struct Word {
    static_assert(PER == Element<T>::PER_WORD);
    using Raw = uint4;
    __device__ static Raw zero() { return make_uint4(0, 0, 0, 0); }
    __device__ static Raw load(const char *address) { return *reinterpret_cast<const uint4 *>(address); }
    // For a word that nobody reads again.
    __device__ static Raw load_last(const char *address) {
        return __ldcs(reinterpret_cast<const uint4 *>(address));
    }
    __device__ static void unpack(Raw raw, float (&out)[PER]) { Element<T>::unpack(raw, out); }
};

template <class T> struct Word<T, 1> {
    using Raw = float;
    __device__ static Raw zero() { return 0; }
    __device__ static Raw load(const char *address) { return Element<T>::load(address); }
    __device__ static Raw load_last(const char *address) { return Element<T>::load(address); }
    __device__ static void unpack(Raw raw, float (&out)[1]) { out[0] = raw; }
};

// The place of a tile in its view.
struct TilePlace {
    uint32_t chain, tile_of_chain;
    __device__ TilePlace(const Tiles &tiles, uint32_t tile) {
        chain = tile / tiles.tiles_of_chain;
        tile_of_chain = tile - chain * tiles.tiles_of_chain;
    }
    // Of row `row` of a step.
    __device__ uint32_t head(const Tiles &tiles, uint32_t row) const {
        return (chain << tiles.heads_shift) + (row & ((1u << tiles.heads_shift) - 1));
    }
    // Counted from `start`.
    __device__ uint32_t token(const Tiles &tiles, uint32_t step, uint32_t row) const {
        uint32_t tokens_of_step = TILE_ROWS >> tiles.heads_shift;
        return (tile_of_chain * tiles.steps + step) * tokens_of_step + (row >> tiles.heads_shift);
    }
};

// Address of this thread's row of a step; null: there is none.
__device__ inline const char *row_of_thread(const Layout &layout, const Tiles &tiles, TilePlace place, uint32_t step) {
    uint32_t token = place.token(tiles, step, threadIdx.x), head = place.head(tiles, threadIdx.x);
    if (token >= tiles.length || head >= layout.kv_heads) {
        return nullptr;
    }
    return row_address(layout, tiles.view, tiles.start + token, head);
}

// The sum over the lanes that share a row, in a fixed order; each lane gets it.
__device__ inline float sum_over_lanes(float value, uint32_t lanes_shift) {
    for (uint32_t offset = 1u << lanes_shift >> 1; offset > 0; offset >>= 1) {
        value += __shfl_xor_sync(~0u, value, offset);
    }
    return value;
}

// Walks over the rows of a step, UNROLL rows of each group of lanes at a time. `visit(row, raw)` gets a row's number and
// its WORDS words of this lane; words behind the row, and rows that there are not, are zero. All lanes call it together.
template <class T, int PER, int WORDS, int UNROLL, bool LAST, class Visit>
__device__ void for_each_row(const Layout &layout, const Tiles &tiles, const char *const *rows, Visit visit) {
    uint32_t lanes = 1u << tiles.lanes_shift, lane = threadIdx.x & (lanes - 1);
    uint32_t groups = TILE_ROWS >> tiles.lanes_shift, group = threadIdx.x >> tiles.lanes_shift;
    uint32_t words = layout.head_dim / PER;
    int64_t step = PER == 1 ? layout.stride_element : 16;
    for (uint32_t base = group; base < TILE_ROWS; base += groups * UNROLL) {
        typename Word<T, PER>::Raw raw[UNROLL][WORDS];
#pragma unroll
        for (int k = 0; k < UNROLL; k++) {
            uint32_t row = base + k * groups;
            const char *address = row < TILE_ROWS ? rows[row] : nullptr;
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                uint32_t word = w * lanes + lane;
                raw[k][w] = Word<T, PER>::zero();
                if (address != nullptr && word < words) {
                    const char *source = address + word * step;
                    raw[k][w] = LAST ? Word<T, PER>::load_last(source) : Word<T, PER>::load(source);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < UNROLL; k++) {
            uint32_t row = base + k * groups;
            if (row < TILE_ROWS) {
                visit(row, raw[k]);
            }
        }
    }
}

} // namespace kvhook
