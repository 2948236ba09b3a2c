// Checking the indices of a selection.
#include "common.cuh"

using namespace kvhook;

namespace kvhook {

constexpr int THREADS = 256, TILE = 2048;

// Lists of one layer of one sequence.
struct Item {
    const uint32_t *indices;
    uint32_t stride_head, count, length, least;
    uint32_t first_tile, item, tiles_of_list, unused;
};

using Params = Batch<unsigned long long *, Item, 797>;
static_assert(sizeof(Params) <= PARAMETER_BYTES);

} // namespace kvhook

// One tile a block.
extern "C" __global__ void __launch_bounds__(THREADS) check_indices_u32(const __grid_constant__ Params params) {
    if (blockIdx.x >= params.tiles) {
        return;
    }
    const Item &item = params.item_of(blockIdx.x);
    uint32_t tile = blockIdx.x - item.first_tile;
    uint32_t head = tile / item.tiles_of_list;
    uint32_t start = (tile - head * item.tiles_of_list) * TILE;
    uint32_t end = min(item.count, start + TILE);
    const uint32_t *list = item.indices + (size_t)head * item.stride_head;
    for (uint32_t place = start + threadIdx.x; place < end; place += THREADS) {
        uint32_t index = list[place];
        uint32_t fault = 0;
        if (place > 0 && index == list[place - 1]) {
            fault = FAULT_REPEATED;
        } else if (place > 0 && index < list[place - 1]) {
            fault = FAULT_DESCENDING;
        } else if (index >= item.length) {
            fault = FAULT_OUT_OF_RANGE;
        } else if (place == 0 && index < item.least) {
            fault = FAULT_OVERTAKES;
        }
        if (fault != 0) {
            report(params.head, item.item, head, place, fault);
        }
    }
}
