// Hopper's products of 16-bit elements with f32 sums, of a group of four warps, and what feeds them: tiles in shared memory,
// filled by asynchronous copies that barriers count. Code for sm_90a only, where WIDE is 1.
#pragma once

#include "mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WIDE 1
#else
#define WIDE 0
#endif

namespace kvhook {

// Threads that multiply together.
constexpr int GROUP_THREADS = 128;

// A tile in shared memory: rows in panels of 64 channels, 128 bytes a row, whose eight 16-byte words lie in an order that
// depends on the row, so that neither copies nor products meet in a bank. Panels begin at multiples of 1,024 bytes.
template <int ROWS> __device__ inline uint32_t place_of_word(uint32_t row, uint32_t word) {
    return word / 8 * (ROWS * 128) + row * 128 + ((word % 8 ^ row % 8) * 16);
}

// What an instruction is told of a tile: `address` is that of its first row's first channel.
__device__ inline uint64_t tile_descriptor(uint32_t address) {
    // 128-byte rows in the order above; 1,024 bytes from 8 rows to the next.
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 16 | (address & 0x3ffff) >> 4;
}

// Channels of an instruction, and bytes of a row from one's to the next's.
constexpr int STEP = 16;

// The descriptor's address `step` instructions further on.
template <int ROWS> __device__ inline uint32_t step_address(uint32_t tile, int step) {
    return tile + step / 4 * (ROWS * 128) + step % 4 * 32;
}

#if WIDE

// Makes words that this thread wrote, or knows to be written, visible to products.
__device__ inline void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers in shared memory.
__device__ inline void barrier_init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ inline void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives when this thread's copies so far have arrived.
__device__ inline void barrier_arrive_with_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
}

// Barriers of the block, by number; 0 is __syncthreads.
__device__ inline void numbered_sync(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ inline void numbered_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ inline void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Waits for all products; what was in `sums` before is not read any more.
__device__ inline void products_end(float (&sums)[64]) {
    products_wait<0>();
#pragma unroll
    for (int at = 0; at < 64; at++) {
        asm volatile("" : "+f"(sums[at])::"memory");
    }
}

#define KVHOOK_SUMS_8(FROM)                                                                                            \
    "+f"(sums[FROM]), "+f"(sums[FROM + 1]), "+f"(sums[FROM + 2]), "+f"(sums[FROM + 3]), "+f"(sums[FROM + 4]),          \
        "+f"(sums[FROM + 5]), "+f"(sums[FROM + 6]), "+f"(sums[FROM + 7])
#define KVHOOK_SUMS_64                                                                                                 \
    KVHOOK_SUMS_8(0), KVHOOK_SUMS_8(8), KVHOOK_SUMS_8(16), KVHOOK_SUMS_8(24), KVHOOK_SUMS_8(32), KVHOOK_SUMS_8(40),    \
        KVHOOK_SUMS_8(48), KVHOOK_SUMS_8(56)
#define KVHOOK_NAMES_64                                                                                                \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"  \
    "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
    "%58,%59,%60,%61,%62,%63}"

// Sums of 64 rows of A by 128 rows of B over 16 channels. Thread t of the four warps has rows 16 (t / 32) + t % 32 / 4 and
// 8 more, in columns 8 i + 2 (t % 4) and the next: sums[4 i ..]. `keep`: adds to what was there.
template <class T> struct Wide;

#define KVHOOK_WIDE(TYPE, NAME)                                                                                        \
    template <> struct Wide<TYPE> {                                                                                    \
        /* Both from shared memory. */                                                                                 \
        __device__ static void multiply(float (&sums)[64], uint64_t a, uint64_t b, bool keep) {                        \
            asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32."   \
                         NAME "." NAME " " KVHOOK_NAMES_64 ", %64, %65, p, 1, 1, 0, 0;\n}"                             \
                         : KVHOOK_SUMS_64                                                                              \
                         : "l"(a), "l"(b), "r"((int)keep));                                                            \
        }                                                                                                              \
        /* A from registers, as in mma.cuh. */                                                                         \
        __device__ static void multiply(float (&sums)[64], const uint4 &a, uint64_t b, bool keep) {                    \
            asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32."   \
                         NAME "." NAME " " KVHOOK_NAMES_64 ", {%64,%65,%66,%67}, %68, p, 1, 1, 0;\n}"                  \
                         : KVHOOK_SUMS_64                                                                              \
                         : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"((int)keep));                            \
        }                                                                                                              \
    }

KVHOOK_WIDE(__half, "f16");
KVHOOK_WIDE(__nv_bfloat16, "bf16");

#endif

} // namespace kvhook
