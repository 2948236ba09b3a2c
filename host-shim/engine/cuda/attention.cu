// Causal attention over cached rows, with grouped queries, for all sequences and ranks of a step in one launch.
//
// The keys that a query sees are taken in splits of 128 rows of the cache. In a split:
// - a score is one chain of fused multiply-adds over the channels, times the scale;
// - exponentials of the distance to the split's largest score are summed by lanes of `key % 32`, then as a tree;
// - each channel of the output is one chain over the keys.
// Splits are merged in order. One block does that for all splits of its queries, or a block does one split and `combine`
// merges; the arithmetic is the same, and so are the bits.
#include "engine.cuh"

using namespace engine;

// Pairs of a query row and a head of one block; keys of a split, and those in shared memory at a time.
constexpr int PAIRS = 32, SPLIT = 128, KEYS = 32, THREADS = 256;

struct Attention {
    // `[rows, columns, head_dim]`, in the cache's dtype: the queries come first.
    const void *qkv;
    // By rank and sequence.
    const Item *items;
    // `[rows, heads, head_dim]`
    float *out;
    // `[rows, heads, splits, head_dim]` and the same without head_dim: the splits' results; null: the block merges.
    float *partial;
    float2 *partial_sums;
    uint32_t heads, columns, head_dim;
    // Query heads of a KV head; the most KV heads of a rank; the most splits of a query.
    uint32_t group, kv_heads, splits;
    float scale;
};

// What is known of a query after some splits: the largest score, the sum of exponentials, weights for the next merge.
struct Merge {
    float largest = -INFINITY, sum = 0.0f, old_weight = 0.0f, new_weight = 0.0f;

    __device__ void add(float split_largest, float split_sum) {
        float now = fmaxf(largest, split_largest);
        old_weight = expf(__fsub_rn(largest, now));
        new_weight = expf(__fsub_rn(split_largest, now));
        largest = now;
        sum = __fmaf_rn(sum, old_weight, __fmul_rn(split_sum, new_weight));
    }

    __device__ float merged(float old, float of_split) const {
        return __fmaf_rn(old, old_weight, __fmul_rn(of_split, new_weight));
    }
};

// Some keys or values of a head as f32, with rows of `head_dim + 4`; zeros behind the last one.
template <class T>
__device__ void fetch(float *to, const char *from, const Item &item, uint32_t head, uint32_t start, uint32_t end,
                      uint32_t head_dim) {
    constexpr int PER = Element<T>::PER_WORD;
    uint32_t words = head_dim / PER;
    for (uint32_t i = threadIdx.x; i < KEYS * words; i += THREADS) {
        uint32_t key = i / words, word = i - key * words;
        float values[PER] = {};
        if (start + key < end) {
            const T *row = reinterpret_cast<const T *>(from) + item.row(start + key, head, head_dim);
            Element<T>::unpack(reinterpret_cast<const uint4 *>(row)[word], values);
        }
        float *out = to + key * (head_dim + 4) + word * PER;
#pragma unroll
        for (int j = 0; j < PER; j += 4) {
            *reinterpret_cast<float4 *>(out + j) = make_float4(values[j], values[j + 1], values[j + 2], values[j + 3]);
        }
    }
}

// `GROUPS * 64` channels at most. Grid: splits (or 1), tiles of queries times KV heads, items.
template <class T, int GROUPS> __device__ void attention(const Attention &p) {
    extern __shared__ __align__(16) float shared[];
    if (p.items == nullptr) {
        return;
    }
    const Item item = p.items[blockIdx.z];
    uint32_t kv_head = blockIdx.y % p.kv_heads, first_pair = blockIdx.y / p.kv_heads * PAIRS;
    if (kv_head >= item.kv_heads) {
        return;
    }
    // Query heads that the rank computes with this KV head.
    uint32_t first_head = max((item.first_kv_head + kv_head) * p.group, item.first_query_head);
    uint32_t end_head = min((item.first_kv_head + kv_head + 1) * p.group, item.first_query_head + item.query_heads);
    uint32_t heads = end_head > first_head ? end_head - first_head : 0;
    if (first_pair >= item.rows * heads) {
        return;
    }
    uint32_t pairs = min((uint32_t)PAIRS, item.rows * heads - first_pair);
    uint32_t keys = item.cached + (first_pair + pairs - 1) / heads + 1;
    uint32_t first_split = 0, end_split = (keys + SPLIT - 1) / SPLIT;
    if (p.partial != nullptr) {
        if (blockIdx.x >= end_split) {
            return;
        }
        first_split = blockIdx.x, end_split = first_split + 1;
    }

    uint32_t dim = p.head_dim, stride = dim + 4;
    float *queries = shared;                     // [PAIRS][dim + 4]
    float *block = queries + PAIRS * stride;     // [KEYS][dim + 4]
    float *scores = block + KEYS * stride;       // [PAIRS][SPLIT + 4]
    float *largest = scores + PAIRS * (SPLIT + 4); // [PAIRS]
    float *sums = largest + PAIRS;               // [PAIRS]
    uint32_t thread = threadIdx.x, tx = thread % 16, ty = thread / 16;

    for (uint32_t i = thread; i < PAIRS * dim; i += THREADS) {
        uint32_t pair = i / dim, channel = i - pair * dim;
        float value = 0.0f;
        if (pair < pairs) {
            uint32_t row = item.first_row + (first_pair + pair) / heads, head = first_head + (first_pair + pair) % heads;
            const T *q = static_cast<const T *>(p.qkv) + ((uint64_t)row * p.columns + head) * dim + channel;
            value = Element<T>::load(reinterpret_cast<const char *>(q));
        }
        queries[pair * stride + channel] = value;
    }

    // The pairs `ty` and `ty + 16` are this thread's.
    uint32_t visible[2];
    for (int i = 0; i < 2; ++i) {
        visible[i] = item.cached + (first_pair + ty + 16 * i) / heads + 1;
    }
    Merge merge[2];
    float out[2][GROUPS][4] = {};
    for (uint32_t split = first_split; split < end_split; ++split) {
        uint32_t start = split * SPLIT, end = min(start + SPLIT, keys);
        for (uint32_t from = start; from < end; from += KEYS) {
            __syncthreads();
            fetch<T>(block, item.k, item, kv_head, from, end, dim);
            __syncthreads();
            if (ty < pairs) {
                // Keys `tx` and `tx + 16`.
                float dot[2][2] = {};
                for (uint32_t c = 0; c < dim; c += 4) {
                    float4 q[2], k[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        q[i] = *reinterpret_cast<const float4 *>(queries + (ty + 16 * i) * stride + c);
                        k[i] = *reinterpret_cast<const float4 *>(block + (tx + 16 * i) * stride + c);
                    }
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            float sum = dot[i][j];
                            sum = __fmaf_rn(q[i].x, k[j].x, sum);
                            sum = __fmaf_rn(q[i].y, k[j].y, sum);
                            sum = __fmaf_rn(q[i].z, k[j].z, sum);
                            dot[i][j] = __fmaf_rn(q[i].w, k[j].w, sum);
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        uint32_t key = from + tx + 16 * j;
                        scores[(ty + 16 * i) * (SPLIT + 4) + key - start] =
                            key < visible[i] ? __fmul_rn(dot[i][j], p.scale) : -INFINITY;
                    }
                }
            }
        }
        __syncthreads();
        // A warp has four pairs, a lane every 32nd key.
        uint32_t lane = thread % 32;
        for (uint32_t pair = thread / 32 * 4; pair < min(thread / 32 * 4 + 4, pairs); ++pair) {
            float *of_pair = scores + pair * (SPLIT + 4);
            float most = -INFINITY, sum = 0.0f;
            for (uint32_t key = lane; key < (end - start + 31) / 32 * 32; key += 32) {
                most = fmaxf(most, of_pair[key]);
            }
            for (int distance = 16; distance > 0; distance /= 2) {
                most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
            }
            for (uint32_t key = lane; key < (end - start + 31) / 32 * 32; key += 32) {
                float score = of_pair[key];
                float weight = score == -INFINITY ? 0.0f : expf(__fsub_rn(score, most));
                of_pair[key] = weight;
                sum = __fadd_rn(sum, weight);
            }
            for (int distance = 16; distance > 0; distance /= 2) {
                sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, distance));
            }
            if (lane == 0) {
                largest[pair] = most, sums[pair] = sum;
            }
        }
        float of_split[2][GROUPS][4] = {};
        for (uint32_t from = start; from < end; from += KEYS) {
            __syncthreads();
            fetch<T>(block, item.v, item, kv_head, from, end, dim);
            __syncthreads();
            if (ty < pairs) {
                const float *weights = scores + ty * (SPLIT + 4) + from - start;
                for (uint32_t key = 0; key < KEYS; key += 4) {
                    float4 of_keys[2];
                    of_keys[0] = *reinterpret_cast<const float4 *>(weights + key);
                    of_keys[1] = *reinterpret_cast<const float4 *>(weights + 16 * (SPLIT + 4) + key);
#pragma unroll
                    for (int of = 0; of < 4; ++of) {
                        float first = (&of_keys[0].x)[of], second = (&of_keys[1].x)[of];
#pragma unroll
                        for (int g = 0; g < GROUPS; ++g) {
                            uint32_t channel = (g * 16 + tx) * 4;
                            if (channel < dim) {
                                float4 v = *reinterpret_cast<const float4 *>(block + (key + of) * stride + channel);
                                of_split[0][g][0] = __fmaf_rn(first, v.x, of_split[0][g][0]);
                                of_split[0][g][1] = __fmaf_rn(first, v.y, of_split[0][g][1]);
                                of_split[0][g][2] = __fmaf_rn(first, v.z, of_split[0][g][2]);
                                of_split[0][g][3] = __fmaf_rn(first, v.w, of_split[0][g][3]);
                                of_split[1][g][0] = __fmaf_rn(second, v.x, of_split[1][g][0]);
                                of_split[1][g][1] = __fmaf_rn(second, v.y, of_split[1][g][1]);
                                of_split[1][g][2] = __fmaf_rn(second, v.z, of_split[1][g][2]);
                                of_split[1][g][3] = __fmaf_rn(second, v.w, of_split[1][g][3]);
                            }
                        }
                    }
                }
            }
        }
        for (int i = 0; i < 2; ++i) {
            uint32_t pair = ty + 16 * i;
            // A split of which the query sees nothing leaves everything as it is.
            if (pair >= pairs || start >= visible[i]) {
                continue;
            }
            uint32_t row = item.first_row + (first_pair + pair) / heads, head = first_head + (first_pair + pair) % heads;
            if (p.partial != nullptr) {
                uint64_t at = ((uint64_t)row * p.heads + head) * p.splits + split;
                if (tx == 0) {
                    p.partial_sums[at] = make_float2(largest[pair], sums[pair]);
                }
                for (int g = 0; g < GROUPS; ++g) {
                    uint32_t channel = (g * 16 + tx) * 4;
                    if (channel < dim) {
                        *reinterpret_cast<float4 *>(p.partial + at * dim + channel) =
                            make_float4(of_split[i][g][0], of_split[i][g][1], of_split[i][g][2], of_split[i][g][3]);
                    }
                }
                continue;
            }
            merge[i].add(largest[pair], sums[pair]);
            for (int g = 0; g < GROUPS; ++g) {
                for (int c = 0; c < 4; ++c) {
                    out[i][g][c] = merge[i].merged(out[i][g][c], of_split[i][g][c]);
                }
            }
        }
    }
    for (int i = 0; i < 2 && p.partial == nullptr; ++i) {
        uint32_t pair = ty + 16 * i;
        if (pair < pairs) {
            uint32_t row = item.first_row + (first_pair + pair) / heads, head = first_head + (first_pair + pair) % heads;
            for (int g = 0; g < GROUPS; ++g) {
                for (int c = 0; c < 4; ++c) {
                    uint32_t channel = (g * 16 + tx) * 4 + c;
                    if (channel < dim) {
                        p.out[((uint64_t)row * p.heads + head) * dim + channel] = __fdiv_rn(out[i][g][c], merge[i].sum);
                    }
                }
            }
        }
    }
}

#define ATTENTION(NAME, T, GROUPS)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const Attention p) { attention<T, GROUPS>(p); }
ATTENTION(attention_64_f32, float, 1)
ATTENTION(attention_64_f16, __half, 1)
ATTENTION(attention_64_bf16, __nv_bfloat16, 1)
ATTENTION(attention_128_f32, float, 2)
ATTENTION(attention_128_f16, __half, 2)
ATTENTION(attention_128_bf16, __nv_bfloat16, 2)
ATTENTION(attention_256_f32, float, 4)
ATTENTION(attention_256_f16, __half, 4)
ATTENTION(attention_256_bf16, __nv_bfloat16, 4)

struct Combine {
    const float *partial;
    const float2 *partial_sums;
    // Of the first rank; the others' sequences have the same rows.
    const Item *items;
    const uint32_t *sequence_of_row;
    float *out;
    uint32_t rows, heads, head_dim, splits;
};

// Merges the splits of each query. Grid: heads, rows; a thread for each channel.
extern "C" __global__ void __launch_bounds__(256) combine(const Combine p) {
    uint32_t head = blockIdx.x, row = blockIdx.y, channel = threadIdx.x;
    if (row >= p.rows || channel >= p.head_dim) {
        return;
    }
    const Item &item = p.items[p.sequence_of_row[row]];
    uint32_t visible = item.cached + row - item.first_row + 1;
    uint64_t first = ((uint64_t)row * p.heads + head) * p.splits;
    Merge merge;
    float out = 0.0f;
    for (uint32_t split = 0; split < (visible + SPLIT - 1) / SPLIT; ++split) {
        float2 sums = p.partial_sums[first + split];
        merge.add(sums.x, sums.y);
        out = merge.merged(out, p.partial[(first + split) * p.head_dim + channel]);
    }
    p.out[((uint64_t)row * p.heads + head) * p.head_dim + channel] = __fdiv_rn(out, merge.sum);
}
