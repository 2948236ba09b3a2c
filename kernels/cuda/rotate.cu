// Re-rotation of keys in place: see rotate.rs of the CPU bodies.
//
// An angle is a fraction of a turn in fixed point: the frequency times 2^64 turns, times the shift, modulo 2^64, is exact
// but for the frequency's rounding, whatever the shift.

#include "common.cuh"

using namespace kvhook;

namespace kvhook {

constexpr int THREADS = 256;
// Units of a thread. An item has at most 2^31 units. `UNITS` of rotate.rs.
constexpr uint32_t UNITS = 4;
// `MOST_PAIRS` of rotate.rs.
constexpr uint32_t MOST_PAIRS = 256;

// `Head` of rotate.rs.
struct Head {
    // Turns a position of each pair, times 2^64.
    uint64_t turns[MOST_PAIRS];
    uint32_t pairs;
    // 0: channel c with c + pairs; 1: channel 2 c with 2 c + 1.
    uint32_t interleaved;
};

// `Item` of rotate.rs.
struct Item {
    View rows;
    // Former positions by head and place; null: all rows move by `shift`.
    const uint32_t *positions;
    // Elements.
    int64_t positions_stride_head;
    int64_t shift;
    uint32_t first_tile, first_token, tokens;
    uint16_t heads;
    uint8_t layout;
    // Whether the heads of a token are neighbours in a tile, rather than the tokens of a head.
    uint8_t heads_inside;
};
static_assert(sizeof(Item) == 56);

constexpr int ITEMS = 512;
using Launch = Batch<Head, Item, ITEMS>;
static_assert(sizeof(Launch) <= PARAMETER_BYTES);

// Cosine and sine of a fraction of a turn. 16-bit rows take the hardware's, which are right to 2^-21.
template <class T> __device__ inline void turn(uint64_t fraction, float &cosine, float &sine) {
    float half_turns = (float)(int32_t)(fraction >> 32) * 4.656612873e-10f;
    if constexpr (sizeof(T) == 4) {
        sincospif(half_turns, &sine, &cosine);
    } else {
        __sincosf(half_turns * 3.14159265f, &sine, &cosine);
    }
}

// A row of an item, and by how much it turns.
struct Row {
    char *address;
    int64_t shift;
    __device__ Row(const Launch &launch, const Item &item, uint32_t number) {
        uint32_t head, place;
        if (item.heads_inside) {
            place = number / item.heads, head = number - place * item.heads;
        } else {
            head = number / item.tokens, place = number - head * item.tokens;
        }
        uint32_t token = item.first_token + place;
        address = row_address(launch.layouts[item.layout], item.rows, token, head);
        shift = item.positions == nullptr
                    ? item.shift
                    : (int64_t)token - (int64_t)item.positions[head * item.positions_stride_head + place];
    }
};

template <class T> struct Word {
    static constexpr int ELEMENTS = 16 / sizeof(T);
    float values[ELEMENTS];
    __device__ explicit Word(const char *address) {
        Element<T>::unpack(*reinterpret_cast<const uint4 *>(address), values);
    }
    __device__ void store(char *address) const {
        alignas(16) char bytes[16];
#pragma unroll
        for (int element = 0; element < ELEMENTS; element++) {
            Element<T>::store(bytes + element * sizeof(T), values[element]);
        }
        *reinterpret_cast<uint4 *>(address) = *reinterpret_cast<const uint4 *>(bytes);
    }
};

template <class T> __device__ inline void rotate_pair(uint64_t turns, int64_t shift, float &a, float &b) {
    float cosine, sine;
    turn<T>(turns * (uint64_t)shift, cosine, sine);
    float first = a;
    a = first * cosine - b * sine;
    b = first * sine + b * cosine;
}

// Rows of whole words. A unit is two words of one row whose channels turn together, or one word of neighbours.
template <class T> __device__ void rotate_words(const Launch &launch) {
    if (blockIdx.x >= launch.tiles) {
        return;
    }
    constexpr uint32_t ELEMENTS = Word<T>::ELEMENTS;
    const Item &item = launch.item_of(blockIdx.x);
    const Head &head = launch.head;
    uint32_t units = head.pairs / (head.interleaved ? ELEMENTS / 2 : ELEMENTS);
    uint32_t all = item.heads * item.tokens * units;
    uint32_t first = (blockIdx.x - item.first_tile) * THREADS * UNITS + threadIdx.x;
    __shared__ uint64_t turns[MOST_PAIRS];
    for (uint32_t pair = threadIdx.x; pair < head.pairs; pair += THREADS) {
        turns[pair] = head.turns[pair];
    }
    __syncthreads();
#pragma unroll
    for (uint32_t number = 0; number < UNITS; number++) {
        uint32_t at = first + number * THREADS;
        if (at >= all) {
            return;
        }
        Row row(launch, item, at / units);
        uint32_t unit = at % units;
        char *address = row.address + unit * 16;
        if (head.interleaved) {
            Word<T> word(address);
#pragma unroll
            for (int pair = 0; pair < (int)ELEMENTS / 2; pair++) {
                rotate_pair<T>(turns[unit * (ELEMENTS / 2) + pair], row.shift, word.values[pair * 2],
                               word.values[pair * 2 + 1]);
            }
            word.store(address);
        } else {
            char *other_address = address + head.pairs * sizeof(T);
            Word<T> word(address), other(other_address);
#pragma unroll
            for (int pair = 0; pair < (int)ELEMENTS; pair++) {
                rotate_pair<T>(turns[unit * ELEMENTS + pair], row.shift, word.values[pair], other.values[pair]);
            }
            word.store(address);
            other.store(other_address);
        }
    }
}

// Any layout. A unit is a pair.
template <class T> __device__ void rotate_pairs(const Launch &launch) {
    if (blockIdx.x >= launch.tiles) {
        return;
    }
    const Item &item = launch.item_of(blockIdx.x);
    const Head &head = launch.head;
    int64_t stride = launch.layouts[item.layout].stride_element;
    uint32_t all = item.heads * item.tokens * head.pairs;
    uint32_t first = (blockIdx.x - item.first_tile) * THREADS * UNITS + threadIdx.x;
    for (uint32_t number = 0; number < UNITS; number++) {
        uint32_t at = first + number * THREADS;
        if (at >= all) {
            return;
        }
        Row row(launch, item, at / head.pairs);
        uint32_t pair = at % head.pairs;
        char *first_channel = row.address + (head.interleaved ? 2 * pair : pair) * stride;
        char *second_channel = row.address + (head.interleaved ? 2 * pair + 1 : pair + head.pairs) * stride;
        float a = Element<T>::load(first_channel), b = Element<T>::load(second_channel);
        rotate_pair<T>(head.turns[pair], row.shift, a, b);
        Element<T>::store(first_channel, a);
        Element<T>::store(second_channel, b);
    }
}

} // namespace kvhook

#define ROTATE(NAME, TYPE)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) rotate_##NAME(const __grid_constant__ Launch launch) {       \
        rotate_words<TYPE>(launch);                                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) rotate_pairs_##NAME(const __grid_constant__ Launch launch) { \
        rotate_pairs<TYPE>(launch);                                                                                    \
    }

ROTATE(f32, float)
ROTATE(f16, __half)
ROTATE(bf16, __nv_bfloat16)
