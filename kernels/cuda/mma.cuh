// Products of 16-bit elements on tensor cores, with f32 sums.
//
// One instruction multiplies 16 rows of A by 8 rows of B over 16 channels. Lane l holds of A rows l / 4 and l / 4 + 8, of
// B row l / 4, and of the sums those rows of A in columns 2 (l % 4) and the next. A sum does not depend on the order of
// channels as long as both sides have the same one, so a lane reads 8 adjacent channels (16 bytes) of a row at a time,
// which are two instructions' worth: no shuffling between memory and registers. Four lanes take 32 channels: a chunk.
#pragma once

#include "common.cuh"

namespace kvhook {

constexpr int CHUNK = 32;

template <class T> struct Mma;

template <> struct Mma<__half> {
    __device__ static void multiply(float (&sums)[4], uint4 a, uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    }
    __device__ static uint32_t pack(float low, float high) {
        __half2 both = __floats2half2_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&both);
    }
};

template <> struct Mma<__nv_bfloat16> {
    __device__ static void multiply(float (&sums)[4], uint4 a, uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    }
    __device__ static uint32_t pack(float low, float high) {
        __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<uint32_t *>(&both);
    }
};

// A's side of a chunk: the operands of its two instructions.
struct Fragment {
    uint4 first, second;
};

// The operands from the lane's words of rows l / 4 and l / 4 + 8. An instruction takes four adjacent registers, two of
// each row's, and the compiler would rather copy them together before each instruction than keep them so. `zero` is 0,
// which it cannot know: what comes out are new values, made once.
__device__ inline Fragment fragment(uint4 low, uint4 high, uint32_t zero) {
    return {make_uint4(low.x ^ zero, high.x ^ zero, low.y ^ zero, high.y ^ zero),
            make_uint4(low.z ^ zero, high.z ^ zero, low.w ^ zero, high.w ^ zero)};
}

// Adds a chunk's products; `b` is the lane's word of B's row l / 4.
template <class T> __device__ inline void multiply_chunk(float (&sums)[4], const Fragment &a, uint4 b) {
    Mma<T>::multiply(sums, a.first, b.x, b.y);
    Mma<T>::multiply(sums, a.second, b.z, b.w);
}

__device__ inline uint32_t shared_address(const void *pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

// Begins to copy a word.
__device__ inline void copy_word(uint32_t shared, const char *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// Reads a word of memory that no kernel writes meanwhile, and that is read once.
__device__ inline uint4 load_once(const char *address) {
    uint4 word;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                 : "l"(address));
    return word;
}

} // namespace kvhook
