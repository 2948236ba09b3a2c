// What the engine's kernels share. Every kernel takes one struct by value, whose all-zero value means that there is no work.
//
// A row's bits depend on that row alone, not on the rows beside it: every sum has one order, products and sums are rounded
// where they are written (`__fmaf_rn` and the like), and nothing is added atomically.
#pragma once

#include "../../../kernels/cuda/common.cuh"

namespace engine {

using kvhook::Element;

// Columns of a panel of a weight matrix, `[panel][input][16]`; `PANEL` of matmul.rs.
constexpr uint32_t PANEL = 16;

// `Item` of step.rs: the rows that one rank holds of one sequence in one layer. Strides are in elements.
struct Item {
    char *k, *v;
    // Block table; null: one block.
    const uint32_t *table;
    uint64_t stride_block, stride_head;
    // Rows of a block.
    uint32_t block_size;
    // Rows before the step.
    uint32_t cached;
    // Its rows of the batch.
    uint32_t first_row, rows;
    // Heads of the rank, numbered over the whole model.
    uint32_t first_kv_head, kv_heads;
    uint32_t first_query_head, query_heads;

    // Element at which the row of a token and a head of the rank begins.
    __device__ uint64_t row(uint32_t token, uint32_t head, uint32_t head_dim) const {
        uint32_t entry = token / block_size, slot = token - entry * block_size;
        uint64_t block = table == nullptr ? entry : table[entry];
        return block * stride_block + head * stride_head + (uint64_t)slot * head_dim;
    }
};
static_assert(sizeof(Item) == 72);

} // namespace engine
