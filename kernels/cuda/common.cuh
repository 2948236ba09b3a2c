// What all kernels share: the view of a layer's K or V, conversions, and the parameters of a batch.
//
// Every kernel takes one struct by value, whose all-zero value means that there is no work. No namespace is without a name:
// its symbols would be named after the path of the file, and the fatbins would depend on where they are built.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace kvhook {

// Layouts that the views of one launch may have; `LAYOUTS` of batch.rs.
constexpr int LAYOUTS = 16;

// Bytes that a launch's parameters may take.
constexpr int PARAMETER_BYTES = 32764;

// `RawLayout` of rows.rs: shape and strides of views. Strides are in bytes.
struct Layout {
    int64_t stride_block, stride_token, stride_head;
    // Entries from one head's block table to the next; 0: shared.
    int32_t table_stride_head;
    int32_t stride_element;
    // Tokens of a block; 0: contiguous.
    uint32_t block_size;
    // log2(block_size), or NO_SHIFT where that is no power of two.
    uint32_t block_shift;
    uint32_t head_dim;
    uint16_t kv_heads;
    uint8_t dtype;
    // INDEX_*; of the block table's entries.
    uint8_t index_kind;
};
static_assert(sizeof(Layout) == 48);

constexpr uint32_t NO_SHIFT = 0xffffffff;
constexpr int INDEX_U32 = 0, INDEX_I32 = 1, INDEX_I64 = 2;

// `RawView` of rows.rs: where one layer's K or V of one sequence lies.
struct View {
    char *base;
    // Block table; null: none.
    const void *table;
};
static_assert(sizeof(View) == 16);

// Address of a row's first element: the row formula.
__device__ inline char *row_address(const Layout &layout, const View &view, uint32_t token, uint32_t head) {
    int64_t offset = head * layout.stride_head;
    if (layout.block_size == 0) {
        return view.base + offset + token * layout.stride_token;
    }
    uint32_t entry, slot;
    if (layout.block_shift != NO_SHIFT) {
        entry = token >> layout.block_shift;
        slot = token & (layout.block_size - 1);
    } else {
        entry = token / layout.block_size;
        slot = token - entry * layout.block_size;
    }
    int64_t block = entry;
    if (view.table != nullptr) {
        int64_t place = (int64_t)head * layout.table_stride_head + entry;
        switch (layout.index_kind) {
        case INDEX_U32: block = static_cast<const uint32_t *>(view.table)[place]; break;
        case INDEX_I32: block = static_cast<const int32_t *>(view.table)[place]; break;
        default: block = static_cast<const int64_t *>(view.table)[place];
        }
    }
    return view.base + offset + block * layout.stride_block + slot * layout.stride_token;
}

// `Batch` of batch.rs: the parameters of one launch over views of several layers and sequences. Each item has a field
// `first_tile`, the number of tiles of the items before it.
template <class Head, class Item, int N> struct Batch {
    Head head;
    uint32_t count;
    // Of all items; 0: no work.
    uint32_t tiles;
    Layout layouts[LAYOUTS];
    Item items[N];

    // The item that a tile belongs to.
    __device__ const Item &item_of(uint32_t tile) const {
        uint32_t low = 0, high = count;
        while (high - low > 1) {
            uint32_t middle = (low + high) / 2;
            if (items[middle].first_tile <= tile) {
                low = middle;
            } else {
                high = middle;
            }
        }
        return items[low];
    }
};

// Shared memory of the launch's size.
__device__ inline uint4 *dynamic_shared() {
    extern __shared__ uint4 memory[];
    return memory;
}

// Elements of each dtype, and the two that share a 32-bit word.
template <class T> struct Element;

template <> struct Element<float> {
    static constexpr int PER_WORD = 4;
    __device__ static float load(const char *address) { return *reinterpret_cast<const float *>(address); }
    __device__ static void store(char *address, float value) { *reinterpret_cast<float *>(address) = value; }
    // The elements of a 16-byte word.
    __device__ static void unpack(uint4 word, float (&out)[4]) {
        out[0] = __uint_as_float(word.x), out[1] = __uint_as_float(word.y);
        out[2] = __uint_as_float(word.z), out[3] = __uint_as_float(word.w);
    }
};

template <> struct Element<__half> {
    static constexpr int PER_WORD = 8;
    __device__ static float load(const char *address) {
        return __half2float(*reinterpret_cast<const __half *>(address));
    }
    __device__ static void store(char *address, float value) {
        *reinterpret_cast<__half *>(address) = __float2half_rn(value);
    }
    __device__ static void unpack_pair(uint32_t pair, float &low, float &high) {
        float2 both = __half22float2(*reinterpret_cast<__half2 *>(&pair));
        low = both.x, high = both.y;
    }
    __device__ static void unpack(uint4 word, float (&out)[8]) {
        unpack_pair(word.x, out[0], out[1]), unpack_pair(word.y, out[2], out[3]);
        unpack_pair(word.z, out[4], out[5]), unpack_pair(word.w, out[6], out[7]);
    }
};

template <> struct Element<__nv_bfloat16> {
    static constexpr int PER_WORD = 8;
    __device__ static float load(const char *address) {
        return __bfloat162float(*reinterpret_cast<const __nv_bfloat16 *>(address));
    }
    __device__ static void store(char *address, float value) {
        *reinterpret_cast<__nv_bfloat16 *>(address) = __float2bfloat16_rn(value);
    }
    __device__ static void unpack_pair(uint32_t pair, float &low, float &high) {
        low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000);
    }
    __device__ static void unpack(uint4 word, float (&out)[8]) {
        unpack_pair(word.x, out[0], out[1]), unpack_pair(word.y, out[2], out[3]);
        unpack_pair(word.z, out[4], out[5]), unpack_pair(word.w, out[6], out[7]);
    }
};

// The verdict word: GOOD, or the first fault by item, head and place. `verdict.rs` decodes it.
constexpr unsigned long long GOOD = ~0ull;
constexpr uint32_t FAULT_OUT_OF_RANGE = 1, FAULT_DESCENDING = 2, FAULT_REPEATED = 3, FAULT_OVERTAKES = 4,
                   FAULT_NOT_A_NUMBER = 5, FAULT_WEIGHT = 6, FAULT_TOO_LARGE = 7;

// In a list of positions: the row could not be computed. No position is as high.
constexpr uint32_t SPOILT = 0xffffffff;

// Records a fault; the lowest one stays, whatever the order of threads. `item` and `head` are below 16,384.
__device__ inline void report(unsigned long long *verdict, uint32_t item, uint32_t head, uint32_t place, uint32_t fault) {
    atomicMin(verdict, (unsigned long long)item << 50 | (unsigned long long)head << 36 |
                           (unsigned long long)place << 4 | fault);
}

// Whether an operation goes on: not where a check before it found a fault. A null verdict is good.
__device__ inline bool is_good(const unsigned long long *verdict) {
    return verdict == nullptr || *verdict == GOOD;
}

} // namespace kvhook
