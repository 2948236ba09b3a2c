// Rows that were chosen of those that may be dropped, put among the rows that are kept whole.
#include "common.cuh"

using namespace kvhook;

namespace kvhook {

constexpr int THREADS = 256, TILE = 1024;

// The most stretches of all items of a launch.
constexpr int STRETCHES = 1024;

// Adjacent rows that may be dropped: those from `start` on; `before` such rows lie before them.
struct Stretch {
    uint32_t start, before;
};

// The lists of one layer of one sequence.
struct Item {
    // Chosen rows, ascending, numbered among those that may be dropped.
    const uint32_t *chosen;
    // Chosen rows and those that are kept whole, ascending, numbered among all.
    uint32_t *out;
    uint32_t chosen_stride, out_stride;
    // Chosen rows; rows that may be dropped; rows that are kept whole.
    uint32_t count, open, whole;
    uint32_t first_stretch, stretches;
    uint32_t first_tile, tiles_of_list, unused;
};
static_assert(sizeof(Item) == 56);

struct Head {
    Stretch stretches[STRETCHES];
};

using Params = Batch<Head, Item, 417>;
static_assert(sizeof(Params) <= PARAMETER_BYTES);

// How many of `count` ascending numbers, of which `number_of` gives one each, are at most `value`.
template <class F> __device__ uint32_t up_to(uint32_t count, uint32_t value, F number_of) {
    uint32_t low = 0, high = count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (number_of(middle) <= value) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

} // namespace kvhook

// One tile of one list a block.
extern "C" __global__ void __launch_bounds__(THREADS) merge_whole_u32(const __grid_constant__ Params params) {
    if (blockIdx.x >= params.tiles) {
        return;
    }
    const Item &item = params.item_of(blockIdx.x);
    const Stretch *stretches = params.head.stretches + item.first_stretch;
    uint32_t tile = blockIdx.x - item.first_tile;
    uint32_t head = tile / item.tiles_of_list;
    uint32_t start = (tile - head * item.tiles_of_list) * TILE, end = min(item.count + item.whole, start + TILE);
    const uint32_t *chosen = item.chosen + (size_t)head * item.chosen_stride;
    uint32_t *out = item.out + (size_t)head * item.out_stride;
    for (uint32_t place = start + threadIdx.x; place < end; place += THREADS) {
        if (place < item.count) {
            // A list that was spoilt stays inside its buffers.
            uint32_t number = min(chosen[place], item.open - 1);
            uint32_t stretch = up_to(item.stretches, number, [&](uint32_t i) { return stretches[i].before; }) - 1;
            uint32_t row = stretches[stretch].start + (number - stretches[stretch].before);
            // Rows that are kept whole lie before it, as many as are not open.
            out[place + (row - number)] = row;
        } else {
            uint32_t number = place - item.count;
            // Stretches that lie before this row.
            uint32_t passed = up_to(item.stretches, number,
                                    [&](uint32_t i) { return stretches[i].start - stretches[i].before; });
            uint32_t open = passed < item.stretches ? stretches[passed].before : item.open;
            uint32_t before = open == 0 ? 0 : up_to(item.count, open - 1, [&](uint32_t i) { return chosen[i]; });
            out[number + before] = number + open;
        }
    }
}
