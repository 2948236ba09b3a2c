// New rows on their way into the cache.
#include "engine.cuh"

using namespace engine;

constexpr int THREADS = 128;

struct Write {
    // `[rows, heads + 2 * kv_heads, head_dim]`, in the cache's dtype.
    const void *qkv;
    // By rank and sequence.
    const Item *items;
    const uint32_t *sequence_of_row;
    uint32_t rows, sequences, heads, kv_heads, head_dim;
};

// A block for each row and rank.
template <class T> __device__ void write_rows(const Write &p) {
    if (blockIdx.x >= p.rows) {
        return;
    }
    const Item &item = p.items[blockIdx.y * p.sequences + p.sequence_of_row[blockIdx.x]];
    uint32_t token = item.cached + blockIdx.x - item.first_row;
    const T *row = static_cast<const T *>(p.qkv) + (uint64_t)blockIdx.x * (p.heads + 2 * p.kv_heads) * p.head_dim;
    const T *k = row + (uint64_t)(p.heads + item.first_kv_head) * p.head_dim, *v = k + p.kv_heads * p.head_dim;
    for (uint32_t i = threadIdx.x; i < item.kv_heads * p.head_dim; i += THREADS) {
        uint64_t at = item.row(token, i / p.head_dim, p.head_dim) + i % p.head_dim;
        reinterpret_cast<T *>(item.k)[at] = k[i];
        reinterpret_cast<T *>(item.v)[at] = v[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) cache_write_32(const Write p) { write_rows<uint32_t>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) cache_write_16(const Write p) { write_rows<uint16_t>(p); }
