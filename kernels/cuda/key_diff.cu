// KeyDiff: scores of keys by their distance from the mean direction.
//
// Three passes in one launch, ordered by tickets: each tile of pass SUM adds up the unit keys of its rows, DIRECTION adds up
// the tiles of a head, SCORE reads the keys again. Tiles wait only for tiles of lower tickets, which run already.
#include "tile.cuh"

using namespace kvhook;

namespace kvhook {

// The keys of one layer of one sequence.
struct Item {
    Tiles tiles;
    // Scores, [heads, length].
    float *out;
    // A sum of unit keys for each tile and head of it, [chains, tiles_of_chain, heads of a tile, head_dim].
    float *sums;
    // [chains * heads of a tile, head_dim]
    float *directions;
    // For each chain: its tiles that are summed up, and its heads whose directions are known. Zero at the start.
    uint32_t *progress;
    uint32_t first_tile;
    // Read by the host only.
    uint32_t tiles_of_chain, chains_and_heads, unused;
};
static_assert(sizeof(Item) == 80);

// Passes.
constexpr uint32_t SUM = 0, DIRECTION = 1, SCORE = 2, NONE = 3;

// Tickets from `first_ticket` on: tiles of a pass, from `tile` on; of SCORE, from `tile` downwards; of DIRECTION, the heads
// of the chain that begins with `tile`.
struct Segment {
    uint32_t first_ticket, tile : 30, pass : 2;
};
static_assert(sizeof(Segment) == 8);

struct Head {
    uint32_t *ticket;
    uint32_t segments, tickets;
    Segment order[1408];
};

using Params = Batch<Head, Item, 258>;
static_assert(sizeof(Params) <= PARAMETER_BYTES);

__device__ void wait_until(const uint32_t *counter, uint32_t least) {
    if (threadIdx.x == 0) {
        uint32_t value;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
            if (value < least) {
                __nanosleep(200);
            }
        } while (value < least);
    }
    __syncthreads();
}

__device__ void count_up(uint32_t *counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1);
    }
}

// What a ticket stands for.
struct Job {
    const Item *item;
    TilePlace place;
    // NONE: there are no more.
    uint32_t pass;
    // Of the chain, in DIRECTION.
    uint32_t head;
    // Parts that its words are read in; see `Stream`.
    uint32_t parts;

    // `segment`: the ticket's, or one before it. Returns it.
    __device__ uint32_t find(const Params &params, uint32_t ticket, uint32_t segment) {
        pass = NONE, parts = 0;
        if (ticket >= params.head.tickets) {
            return segment;
        }
        const Segment *order = params.head.order;
        uint32_t step = 1;
        // Doubles its steps, for the one that begins at 0.
        while (segment + step < params.head.segments && order[segment + step].first_ticket <= ticket) {
            segment += step, step *= 2;
        }
        for (; step > 0; step /= 2) {
            if (segment + step < params.head.segments && order[segment + step].first_ticket <= ticket) {
                segment += step;
            }
        }
        Segment found = order[segment];
        uint32_t offset = ticket - found.first_ticket;
        uint32_t tile = found.pass == SUM ? found.tile + offset : found.pass == SCORE ? found.tile - offset : found.tile;
        item = &params.item_of(tile);
        place = TilePlace(item->tiles, tile - item->first_tile);
        pass = found.pass, head = offset;
        return segment;
    }
};

template <int PER, int WORDS> __device__ float squares(const float (&elements)[WORDS][PER]) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
#pragma unroll
        for (int e = 0; e < PER; e++) {
            sum = fmaf(elements[w][e], elements[w][e], sum);
        }
    }
    return sum;
}

__device__ inline float inverse_norm(float squares) { return squares > 0 ? rsqrtf(squares) : 0; }

template <class T, int PER, int WORDS, int UNROLL>
__device__ void sum_tile(const Layout &layout, const Item &item, TilePlace place, const char **rows, float *part) {
    const Tiles &tiles = item.tiles;
    float sums[WORDS][PER] = {};
    for (uint32_t step = 0; step < tiles.steps; step++) {
        __syncthreads();
        rows[threadIdx.x] = row_of_thread(layout, tiles, place, step);
        __syncthreads();
        for_each_row<T, PER, WORDS, UNROLL, false>(layout, tiles, rows, [&](uint32_t, auto &raw) {
            float elements[WORDS][PER];
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                Word<T, PER>::unpack(raw[w], elements[w]);
            }
            float inverse = inverse_norm(sum_over_lanes(squares<PER, WORDS>(elements), tiles.lanes_shift));
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
#pragma unroll
                for (int e = 0; e < PER; e++) {
                    sums[w][e] = fmaf(elements[w][e], inverse, sums[w][e]);
                }
            }
        });
    }
    // A group of lanes saw one head only: its number modulo the heads of a tile. Groups add in order.
    uint32_t lanes = 1u << tiles.lanes_shift, groups = TILE_ROWS >> tiles.lanes_shift;
    uint32_t heads = 1u << tiles.heads_shift, dim = layout.head_dim;
    float *out = item.sums + (size_t)(place.chain * tiles.tiles_of_chain + place.tile_of_chain) * heads * dim;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
        __syncthreads();
#pragma unroll
        for (int e = 0; e < PER; e++) {
            part[e * TILE_ROWS + threadIdx.x] = sums[w][e];
        }
        __syncthreads();
        // Element e of the word of a lane, for one head.
        for (uint32_t index = threadIdx.x; index < heads * lanes * PER; index += TILE_ROWS) {
            uint32_t head = index / (lanes * PER), rest = index - head * lanes * PER;
            uint32_t element = (w * lanes + rest / PER) * PER + rest % PER;
            if (element < dim) {
                float sum = 0;
                for (uint32_t group = head; group < groups; group += heads) {
                    sum += part[rest % PER * TILE_ROWS + group * lanes + rest / PER];
                }
                out[head * dim + element] = sum;
            }
        }
    }
    count_up(&item.progress[place.chain * 2]);
}

// Adds up the tiles of one head, in order, in f64, and divides by the norm.
__device__ void direction_of_head(const Layout &layout, const Item &item, uint32_t chain, uint32_t head, double *shared) {
    const Tiles &tiles = item.tiles;
    uint32_t heads = 1u << tiles.heads_shift, dim = layout.head_dim, count = tiles.tiles_of_chain;
    const float *sums = item.sums + (size_t)chain * count * heads * dim + head * dim;
    float *out = item.directions + ((size_t)chain * heads + head) * dim;
    wait_until(&item.progress[chain * 2], count);
    double square = 0;
    // Eight runs of tiles, each by 32 threads, an element a thread.
    uint32_t run = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t first = (uint64_t)count * run / 8, last = (uint64_t)count * (run + 1) / 8;
    for (uint32_t start = 0; start < dim; start += 32) {
        uint32_t element = start + lane;
        double sum = 0;
        if (element < dim) {
            uint32_t tile = first;
            for (; tile + 8 <= last; tile += 8) {
                float batch[8];
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    batch[k] = __ldcg(&sums[(size_t)(tile + k) * heads * dim + element]);
                }
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    sum += batch[k];
                }
            }
            for (; tile < last; tile++) {
                sum += __ldcg(&sums[(size_t)tile * heads * dim + element]);
            }
        }
        __syncthreads();
        shared[threadIdx.x] = sum;
        __syncthreads();
        sum = 0;
        for (uint32_t other = 0; other < 8; other++) {
            sum += shared[other * 32 + lane];
        }
        square += sum * sum;
        if (run == 0 && element < dim) {
            out[element] = (float)sum;
        }
    }
    for (uint32_t offset = 16; offset > 0; offset /= 2) {
        square += __shfl_xor_sync(~0u, square, offset);
    }
    double norm = sqrt(square);
    if (run == 0) {
        for (uint32_t element = lane; element < dim; element += 32) {
            out[element] = norm > 0 ? (float)(out[element] / norm) : 0;
        }
    }
    count_up(&item.progress[chain * 2 + 1]);
}

template <class T, int PER, int WORDS, int UNROLL>
__device__ void score_tile(const Layout &layout, const Item &item, TilePlace place, const char **rows, float *scores) {
    const Tiles &tiles = item.tiles;
    uint32_t lanes = 1u << tiles.lanes_shift, lane = threadIdx.x & (lanes - 1);
    uint32_t heads = 1u << tiles.heads_shift, dim = layout.head_dim;
    uint32_t head_of_tile = (threadIdx.x >> tiles.lanes_shift) & (heads - 1);
    wait_until(&item.progress[place.chain * 2 + 1], heads);
    float direction[WORDS][PER];
    const float *known = item.directions + ((size_t)place.chain * heads + head_of_tile) * dim;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
#pragma unroll
        for (int e = 0; e < PER; e++) {
            uint32_t element = (w * lanes + lane) * PER + e;
            direction[w][e] = element < dim ? __ldcg(&known[element]) : 0;
        }
    }
    for (uint32_t step = 0; step < tiles.steps; step++) {
        __syncthreads();
        rows[threadIdx.x] = row_of_thread(layout, tiles, place, step);
        __syncthreads();
        for_each_row<T, PER, WORDS, UNROLL, true>(layout, tiles, rows, [&](uint32_t row, auto &raw) {
            float elements[WORDS][PER];
            float dot = 0;
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                Word<T, PER>::unpack(raw[w], elements[w]);
#pragma unroll
                for (int e = 0; e < PER; e++) {
                    dot = fmaf(elements[w][e], direction[w][e], dot);
                }
            }
            float inverse = inverse_norm(sum_over_lanes(squares<PER, WORDS>(elements), tiles.lanes_shift));
            dot = sum_over_lanes(dot, tiles.lanes_shift);
            if (lane == 0) {
                scores[row] = inverse * -dot;
            }
        });
        __syncthreads();
        if (rows[threadIdx.x] != nullptr) {
            uint32_t token = place.token(tiles, step, threadIdx.x), head = place.head(tiles, threadIdx.x);
            item.out[(size_t)head * tiles.length + token] = scores[threadIdx.x];
        }
    }
}

// Rows of 16-byte words. A block takes tickets until there are no more, and reads ahead into shared memory, where each thread
// has words of its own: little is under way, and the second pass finds in the second-level cache what the first one read.
// Whoever has the lowest ticket that is not done waits for nobody, so reading ahead holds nobody up.
template <class T> struct Stream {
    static constexpr int PER = Element<T>::PER_WORD, THREADS = 512, WARPS = THREADS / 32;
    // Words of a thread in a part, parts on their way, and room for one more, which is being used.
    static constexpr int WORDS = 4, PARTS = 3, RING = PARTS + 1;
    // Elements of a direction at a time.
    static constexpr uint32_t ELEMENTS = 128;
    static constexpr uint32_t MOST_ROWS = 1024;

    union Shared {
        // Sums of the threads, an element of all threads after the other.
        float sums[PER][THREADS];
        double runs[WARPS][ELEMENTS];
        float scores[MOST_ROWS];
    };

    const Params &params;
    Shared &shared;
    // Of this thread, in each part.
    uint4 *words;
    const Job *now, *next;
    // Parts that were asked for since the current job began, and those that are not used yet.
    uint32_t asked, waiting;
    // Where the next one used lies.
    uint32_t front;

    __device__ uint32_t words_of_row(const Item &item) const {
        return params.layouts[item.tiles.layout].head_dim / PER > 32 ? 2 : 1;
    }

    // Row of the tile that this thread has words of, `round` rounds of all threads further on.
    __device__ static uint32_t row_of(const Tiles &tiles, uint32_t round) {
        return (round * THREADS + threadIdx.x) >> tiles.lanes_shift;
    }

    __device__ void ask(const Job &job, uint32_t part) const {
        const Tiles &tiles = job.item->tiles;
        const Layout &layout = params.layouts[tiles.layout];
        uint32_t lanes = 1u << tiles.lanes_shift, lane = threadIdx.x & (lanes - 1), mask = (1u << tiles.heads_shift) - 1;
        uint32_t rows = TILE_ROWS * tiles.steps, start = job.place.tile_of_chain * (rows >> tiles.heads_shift);
        uint32_t words_of_each = words_of_row(*job.item), place = (front + waiting) % RING;
        uint64_t policy;
        if (job.pass == SUM) {
            asm("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
        } else {
            asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
        }
#pragma unroll
        for (int at = 0; at < WORDS; at++) {
            uint32_t number = part * WORDS + at, row = row_of(tiles, number / words_of_each);
            uint32_t word = number % words_of_each * lanes + lane;
            uint32_t token = start + (row >> tiles.heads_shift);
            uint32_t head = (job.place.chain << tiles.heads_shift) + (row & mask);
            bool there = row < rows && token < tiles.length && head < layout.kv_heads && word < layout.head_dim / PER;
            const char *source = tiles.view.base;
            if (there) {
                source = row_address(layout, tiles.view, tiles.start + token, head) + word * 16;
            }
            // Words that there are not become 0.
            asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                             (uint32_t)__cvta_generic_to_shared(words + (place * WORDS + at) * THREADS)),
                         "l"(source), "r"(there ? 16 : 0), "l"(policy)
                         : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    __device__ void read_ahead() {
        while (waiting < PARTS) {
            if (asked < now->parts) {
                ask(*now, asked);
            } else if (asked < now->parts + next->parts) {
                ask(*next, asked - now->parts);
            } else {
                break;
            }
            asked++, waiting++;
        }
    }

    // The next part's words.
    __device__ void take(uint4 (&raw)[WORDS]) {
        if (waiting == 3) {
            asm volatile("cp.async.wait_group 2;" ::: "memory");
        } else if (waiting == 2) {
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
#pragma unroll
        for (int at = 0; at < WORDS; at++) {
            raw[at] = words[(front * WORDS + at) * THREADS];
        }
        front = (front + 1) % RING, waiting--;
        read_ahead();
    }

    // For the rows of a part: sums over the lanes that share each.
    template <int ROWS> __device__ static void sum_over_lanes(float (&values)[ROWS], uint32_t lanes_shift) {
        for (uint32_t offset = 1u << lanes_shift >> 1; offset > 0; offset >>= 1) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                values[row] += __shfl_xor_sync(~0u, values[row], offset);
            }
        }
    }

    template <int PER_ROW> __device__ void sum() {
        constexpr int ROWS = WORDS / PER_ROW;
        const Item &item = *now->item;
        const Tiles &tiles = item.tiles;
        float sums[PER_ROW][PER] = {};
        for (uint32_t part = 0; part < now->parts; part++) {
            uint4 raw[WORDS];
            take(raw);
            float inverse[ROWS];
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                inverse[row] = 0;
#pragma unroll
                for (int w = 0; w < PER_ROW; w++) {
                    float elements[1][PER];
                    Element<T>::unpack(raw[row * PER_ROW + w], elements[0]);
                    inverse[row] += squares<PER, 1>(elements);
                }
            }
            sum_over_lanes<ROWS>(inverse, tiles.lanes_shift);
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                float factor = inverse_norm(inverse[row]);
#pragma unroll
                for (int w = 0; w < PER_ROW; w++) {
                    float elements[PER];
                    Element<T>::unpack(raw[row * PER_ROW + w], elements);
#pragma unroll
                    for (int e = 0; e < PER; e++) {
                        sums[w][e] = fmaf(elements[e], factor, sums[w][e]);
                    }
                }
            }
        }
        // A group of lanes saw one head only: its number modulo the heads of a tile. Groups add in order.
        uint32_t lanes = 1u << tiles.lanes_shift, groups = THREADS >> tiles.lanes_shift, heads = 1u << tiles.heads_shift;
        uint32_t dim = params.layouts[tiles.layout].head_dim, outputs = lanes * PER;
        float *out = item.sums + (size_t)(now->place.chain * tiles.tiles_of_chain + now->place.tile_of_chain) * heads * dim;
#pragma unroll
        for (int w = 0; w < PER_ROW; w++) {
            __syncthreads();
#pragma unroll
            for (int e = 0; e < PER; e++) {
                shared.sums[e][threadIdx.x] = sums[w][e];
            }
            __syncthreads();
            for (uint32_t index = threadIdx.x; index < heads * outputs; index += THREADS) {
                uint32_t head = index / outputs, rest = index % outputs, element = w * outputs + rest;
                if (element < dim) {
                    float sum = 0;
#pragma unroll 8
                    for (uint32_t group = head; group < groups; group += heads) {
                        sum += shared.sums[rest % PER][group * lanes + rest / PER];
                    }
                    out[head * dim + element] = sum;
                }
            }
        }
        count_up(&item.progress[now->place.chain * 2]);
    }

    template <int PER_ROW> __device__ void score() {
        constexpr int ROWS = WORDS / PER_ROW;
        const Item &item = *now->item;
        const Tiles &tiles = item.tiles;
        const Layout &layout = params.layouts[tiles.layout];
        uint32_t lanes = 1u << tiles.lanes_shift, lane = threadIdx.x & (lanes - 1), heads = 1u << tiles.heads_shift;
        wait_until(&item.progress[now->place.chain * 2 + 1], heads);
        uint32_t head_of_tile = (threadIdx.x >> tiles.lanes_shift) & (heads - 1);
        const float *known = item.directions + ((size_t)now->place.chain * heads + head_of_tile) * layout.head_dim;
        float direction[PER_ROW][PER];
#pragma unroll
        for (int at = 0; at < PER_ROW * PER; at++) {
            uint32_t element = (at / PER * lanes + lane) * PER + at % PER;
            direction[at / PER][at % PER] = element < layout.head_dim ? __ldcg(&known[element]) : 0;
        }
        uint32_t rows = TILE_ROWS * tiles.steps;
        for (uint32_t part = 0; part < now->parts; part++) {
            uint4 raw[WORDS];
            take(raw);
            float lengths[ROWS] = {}, dots[ROWS] = {};
#pragma unroll
            for (int at = 0; at < WORDS; at++) {
                float elements[1][PER];
                Element<T>::unpack(raw[at], elements[0]);
                lengths[at / PER_ROW] += squares<PER, 1>(elements);
#pragma unroll
                for (int e = 0; e < PER; e++) {
                    dots[at / PER_ROW] = fmaf(elements[0][e], direction[at % PER_ROW][e], dots[at / PER_ROW]);
                }
            }
            sum_over_lanes<ROWS>(lengths, tiles.lanes_shift);
            sum_over_lanes<ROWS>(dots, tiles.lanes_shift);
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                uint32_t number = row_of(tiles, part * ROWS + row);
                if (lane == 0 && number < rows) {
                    shared.scores[number] = inverse_norm(lengths[row]) * -dots[row];
                }
            }
        }
        __syncthreads();
        uint32_t tokens = rows >> tiles.heads_shift, start = now->place.tile_of_chain * tokens;
        for (uint32_t index = threadIdx.x; index < rows; index += THREADS) {
            uint32_t in_tile = index / tokens, token = index % tokens;
            uint32_t head = (now->place.chain << tiles.heads_shift) + in_tile;
            if (start + token < tiles.length && head < layout.kv_heads) {
                item.out[(size_t)head * tiles.length + start + token] = shared.scores[(token << tiles.heads_shift) + in_tile];
            }
        }
    }

    // Adds up the tiles of one head, in f64: a run of them by each warp, and the runs in order. Divides by the norm.
    __device__ void direction() {
        const Item &item = *now->item;
        const Tiles &tiles = item.tiles;
        uint32_t heads = 1u << tiles.heads_shift, dim = params.layouts[tiles.layout].head_dim, count = tiles.tiles_of_chain;
        uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = heads * dim;
        uint32_t first = (uint64_t)count * warp / WARPS, last = (uint64_t)count * (warp + 1) / WARPS;
        const float *from = item.sums + (size_t)now->place.chain * count * stride + now->head * dim;
        float *out = item.directions + ((size_t)now->place.chain * heads + now->head) * dim;
        __shared__ double squares_of_warp[WARPS];
        wait_until(&item.progress[now->place.chain * 2], count);
        double square = 0;
        for (uint32_t start = 0; start < dim; start += ELEMENTS) {
            double sums[ELEMENTS / 32] = {};
#pragma unroll 8
            for (uint32_t tile = first; tile < last; tile++) {
#pragma unroll
                for (int at = 0; at < (int)ELEMENTS / 32; at++) {
                    uint32_t element = start + at * 32 + lane;
                    sums[at] += element < dim ? __ldcg(&from[(size_t)tile * stride + element]) : 0.f;
                }
            }
            __syncthreads();
#pragma unroll
            for (int at = 0; at < (int)ELEMENTS / 32; at++) {
                shared.runs[warp][at * 32 + lane] = sums[at];
            }
            __syncthreads();
            if (threadIdx.x < ELEMENTS && start + threadIdx.x < dim) {
                double sum = 0;
#pragma unroll
                for (int run = 0; run < WARPS; run++) {
                    sum += shared.runs[run][threadIdx.x];
                }
                square += sum * sum;
                out[start + threadIdx.x] = (float)sum;
            }
        }
        for (uint32_t offset = 16; offset > 0; offset /= 2) {
            square += __shfl_xor_sync(~0u, square, offset);
        }
        if (lane == 0) {
            squares_of_warp[warp] = square;
        }
        __syncthreads();
        double norm = 0;
        for (int other = 0; other < (int)ELEMENTS / 32; other++) {
            norm += squares_of_warp[other];
        }
        norm = sqrt(norm);
        // Each thread wrote the elements that it reads.
        for (uint32_t element = threadIdx.x; threadIdx.x < ELEMENTS && element < dim; element += ELEMENTS) {
            out[element] = norm > 0 ? (float)(out[element] / norm) : 0;
        }
        count_up(&item.progress[now->place.chain * 2 + 1]);
    }

    // Finds out what a ticket stands for.
    __device__ static uint32_t find(const Params &params, Job &job, uint32_t ticket, uint32_t segment) {
        segment = job.find(params, ticket, segment);
        if (job.pass == SUM || job.pass == SCORE) {
            const Tiles &tiles = job.item->tiles;
            uint32_t words = params.layouts[tiles.layout].head_dim / PER > 32 ? 2 : 1;
            uint32_t all = (TILE_ROWS * tiles.steps << tiles.lanes_shift) * words;
            job.parts = (all + THREADS * WORDS - 1) / (THREADS * WORDS);
        }
        return segment;
    }

    __device__ static void run(const Params &params) {
        __shared__ Shared shared;
        // The current job, the next one, and the one behind.
        __shared__ Job jobs[3];
        if (params.tiles == 0) {
            return;
        }
        uint32_t segment = 0;
        if (threadIdx.x == 0) {
            segment = find(params, jobs[0], atomicAdd(params.head.ticket, 1), segment);
            segment = find(params, jobs[1], atomicAdd(params.head.ticket, 1), segment);
        }
        __syncthreads();
        Stream stream{params, shared, dynamic_shared() + threadIdx.x, nullptr, nullptr, 0, 0, 0};
        for (uint32_t number = 0; jobs[number % 3].pass != NONE; number++) {
            uint32_t ticket = 0;
            if (threadIdx.x == 0) {
                ticket = atomicAdd(params.head.ticket, 1);
            }
            stream.now = &jobs[number % 3], stream.next = &jobs[(number + 1) % 3];
            stream.read_ahead();
            if (stream.now->pass == DIRECTION) {
                stream.direction();
            } else {
                bool two = stream.words_of_row(*stream.now->item) == 2;
                if (stream.now->pass == SUM) {
                    two ? stream.template sum<2>() : stream.template sum<1>();
                } else {
                    two ? stream.template score<2>() : stream.template score<1>();
                }
            }
            if (threadIdx.x == 0) {
                segment = find(params, jobs[(number + 2) % 3], ticket, segment);
            }
            stream.asked -= stream.now->parts;
            __syncthreads();
        }
    }
};

// One ticket a block: any rows.
template <class T> __device__ void key_diff(const Params &params) {
    __shared__ const char *rows[TILE_ROWS];
    __shared__ alignas(8) float part[2 * TILE_ROWS];
    __shared__ uint32_t taken;

    if (params.tiles == 0) {
        return;
    }
    if (threadIdx.x == 0) {
        taken = atomicAdd(params.head.ticket, 1);
    }
    __syncthreads();
    Job job;
    job.find(params, taken, 0);
    const Item &item = *job.item;
    const Layout &layout = params.layouts[item.tiles.layout];
    if (job.pass == DIRECTION) {
        direction_of_head(layout, item, job.place.chain, job.head, reinterpret_cast<double *>(part));
    } else if (job.pass == SUM) {
        sum_tile<T, 1, 32, 1>(layout, item, job.place, rows, part);
    } else {
        score_tile<T, 1, 32, 1>(layout, item, job.place, rows, part);
    }
}

} // namespace kvhook

// Rows of whole 16-byte words.
extern "C" __global__ void __launch_bounds__(512, 1) key_diff_f32(const __grid_constant__ Params params) {
    Stream<float>::run(params);
}

extern "C" __global__ void __launch_bounds__(512, 1) key_diff_f16(const __grid_constant__ Params params) {
    Stream<__half>::run(params);
}

extern "C" __global__ void __launch_bounds__(512, 1) key_diff_bf16(const __grid_constant__ Params params) {
    Stream<__nv_bfloat16>::run(params);
}

// Any rows.
extern "C" __global__ void __launch_bounds__(TILE_ROWS) key_diff_any_f32(const __grid_constant__ Params params) {
    key_diff<float>(params);
}

extern "C" __global__ void __launch_bounds__(TILE_ROWS) key_diff_any_f16(const __grid_constant__ Params params) {
    key_diff<__half>(params);
}

extern "C" __global__ void __launch_bounds__(TILE_ROWS) key_diff_any_bf16(const __grid_constant__ Params params) {
    key_diff<__nv_bfloat16>(params);
}
