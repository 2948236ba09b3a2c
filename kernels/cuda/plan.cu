// A plan's lists: copied and checked as they are copied, with the positions that the kept rows stand for; and lists that
// follow a formula.
#include "common.cuh"

using namespace kvhook;

namespace kvhook {

constexpr int THREADS = 256, TILE = 1024;

// The lists of one layer of one sequence, or one range of its rows.
struct Item {
    // Null: the rows from `start` on.
    const uint32_t *list;
    // Copies of the lists; null: none.
    uint32_t *kept;
    // What the rows stand for. Null: not wanted.
    uint32_t *positions;
    // Positions of the first `old_count` rows there are; null: the list itself holds positions.
    const uint32_t *old;
    uint32_t list_stride, kept_stride, positions_stride, old_stride;
    uint32_t count, start;
    // Rows there are, and the position behind the last; of a list of positions: each is below `length`.
    uint32_t length, next_position, old_count;
    // 1: the list holds positions.
    uint32_t is_positions;
    uint32_t first_tile, item, tiles_of_list, unused;
};
static_assert(sizeof(Item) == 88);

using Params = Batch<unsigned long long *, Item, 363>;
static_assert(sizeof(Params) <= PARAMETER_BYTES);

} // namespace kvhook

// One tile of one list a block.
extern "C" __global__ void __launch_bounds__(THREADS) adopt_u32(const __grid_constant__ Params params) {
    if (blockIdx.x >= params.tiles) {
        return;
    }
    const Item &item = params.item_of(blockIdx.x);
    uint32_t tile = blockIdx.x - item.first_tile;
    uint32_t head = tile / item.tiles_of_list;
    uint32_t start = (tile - head * item.tiles_of_list) * TILE;
    uint32_t end = min(item.count, start + TILE);
    const uint32_t *list = item.list == nullptr ? nullptr : item.list + (size_t)head * item.list_stride;
    for (uint32_t place = start + threadIdx.x; place < end; place += THREADS) {
        uint32_t value = list == nullptr ? item.start + place : list[place];
        uint32_t fault = 0;
        if (list != nullptr && place > 0 && value < list[place - 1]) {
            fault = FAULT_DESCENDING;
        } else if (list != nullptr && place > 0 && value == list[place - 1] && !item.is_positions) {
            fault = FAULT_REPEATED;
        } else if (value >= item.length) {
            fault = item.is_positions && value == SPOILT ? FAULT_TOO_LARGE : FAULT_OUT_OF_RANGE;
        }
        if (fault != 0) {
            report(params.head, item.item, head, place, fault);
        }
        // A list that all heads share is copied once.
        if (item.kept != nullptr && (head == 0 || item.kept_stride != 0)) {
            item.kept[(size_t)head * item.kept_stride + place] = value;
        }
        if (item.positions != nullptr) {
            uint32_t position = value;
            if (!item.is_positions) {
                position = value < item.old_count ? item.old[(size_t)head * item.old_stride + value]
                                                  : item.next_position - (item.length - value);
            }
            item.positions[(size_t)head * item.positions_stride + place] = position;
        }
    }
}

namespace kvhook {

// Evenly spaced rows of one layer of one sequence.
struct Spaced {
    uint32_t *out;
    // Rows at the front, chosen rows of those between, rows at the end, and all there are.
    uint32_t sinks, chosen, recent, length;
    uint32_t first_tile, unused;
};
static_assert(sizeof(Spaced) == 32);

struct NoHead {
    uint64_t unused;
};

using SpacedParams = Batch<NoHead, Spaced, 998>;
static_assert(sizeof(SpacedParams) <= PARAMETER_BYTES);

} // namespace kvhook

// One tile a block.
extern "C" __global__ void __launch_bounds__(THREADS) spaced_u32(const __grid_constant__ SpacedParams params) {
    if (blockIdx.x >= params.tiles) {
        return;
    }
    const Spaced &item = params.item_of(blockIdx.x);
    uint32_t count = item.sinks + item.chosen + item.recent;
    uint32_t start = (blockIdx.x - item.first_tile) * TILE, end = min(count, start + TILE);
    uint64_t history = item.length - item.sinks - item.recent;
    for (uint32_t place = start + threadIdx.x; place < end; place += THREADS) {
        uint32_t row;
        if (place < item.sinks) {
            row = place;
        } else if (place < item.sinks + item.chosen) {
            // The middle of the place's share.
            row = item.sinks + (2 * uint64_t(place - item.sinks) + 1) * history / (2 * uint64_t(item.chosen));
        } else {
            row = item.length - (count - place);
        }
        item.out[place] = row;
    }
}

namespace kvhook {

// An arithmetic progression.
struct Progression {
    uint32_t *out;
    uint32_t first, step, count, first_tile;
};
static_assert(sizeof(Progression) == 24);

using Progressions = Batch<NoHead, Progression, 1332>;
static_assert(sizeof(Progressions) <= PARAMETER_BYTES);

} // namespace kvhook

// One tile a block.
extern "C" __global__ void __launch_bounds__(THREADS) progressions_u32(const __grid_constant__ Progressions params) {
    if (blockIdx.x >= params.tiles) {
        return;
    }
    const Progression &item = params.item_of(blockIdx.x);
    uint32_t start = (blockIdx.x - item.first_tile) * TILE, end = min(item.count, start + TILE);
    for (uint32_t place = start + threadIdx.x; place < end; place += THREADS) {
        item.out[place] = item.first + place * item.step;
    }
}
