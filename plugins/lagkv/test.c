/* What lagkv must do. Ends with 1 when a check fails. */
#include "mock.h"

#include <math.h>

enum { LENGTH = 101, SINKS = 4, LAG = 8, BLOCKS = 12, TAIL = LENGTH - SINKS - (BLOCKS - 1) * LAG };

static int failures;

#define CHECK(condition) \
    ((condition) ? (void)0 : (void)(failures++, fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition)))

static Mock mock;

/* The block of an entry; that of the sinks is -1. */
static int block_of(int token) {
    return token < SINKS ? -1 : (token - SINKS) / LAG;
}

/* How far apart the channels of an entry are, from 0 to 7; no two of a block are alike. */
static int spread(int layer, int head, int token) {
    return (5 * token + block_of(token) + 3 * layer + head + 8) % LAG;
}

/* In each block half of the channels lie above the middle and half below, as far as `spread` says; the next block has them the
 * other way around. So an entry's channels, measured by the block behind it, lie further apart with its spread. */
static void fill(uint64_t length) {
    for (int layer = 0; layer < MOCK_LAYERS; layer++) {
        mock.cache.length[layer] = length;
        for (int head = 0; head < MOCK_HEADS; head++) {
            for (int token = 0; token < MOCK_LENGTH; token++) {
                for (int i = 0; i < MOCK_DIM; i++) {
                    const float away = (float)spread(layer, head, token);
                    const float value = (i + block_of(token)) % 2 == 0 ? away : -away;
                    mock.cache.k[layer][head][token][i] = value;
                    mock.cache.v[layer][head][token][i] = 3 * value + (float)i;
                }
            }
        }
    }
}

/* Whether an entry is to be kept where `chosen` are taken of the blocks that lose some. */
static int is_kept(int layer, int head, int token, int chosen) {
    const int block = block_of(token);
    if (token < SINKS || token >= LENGTH - TAIL) {
        return 1;
    }
    const int share = chosen / (BLOCKS - 1) + (block < chosen % (BLOCKS - 1));
    return spread(layer, head, token) >= LAG - share;
}

static void of_each_block_the_most_uneven_entries_stay(void) {
    const int chosen[] = {1, 11, 40, 87};
    for (size_t i = 0; i < sizeof chosen / sizeof chosen[0]; i++) {
        char config[64];
        snprintf(config, sizeof config, "{\"budget\": %d, \"lag\": %d}", SINKS + TAIL + chosen[i], LAG);
        CHECK(mock_create(&mock, config) == KVH_OK);
        fill(LENGTH);
        static MockCache before;
        before = mock.cache;
        CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_SELECT);
        CHECK(memcmp(&before, &mock.cache, sizeof before) == 0);
        for (int layer = 0; layer < MOCK_LAYERS; layer++) {
            const KvhLayerPlan *plan = &mock.layers[layer];
            CHECK(mock.bound[layer] == plan->count && plan->count == (uint32_t)(SINKS + TAIL + chosen[i]));
            for (int head = 0; head < MOCK_HEADS; head++) {
                const uint32_t *kept = plan->indices + head * plan->index_stride_head;
                const uint32_t *end = kept + plan->count;
                for (int token = 0; token < LENGTH; token++) {
                    const int stays = kept < end && *kept == (uint32_t)token;
                    CHECK(stays == is_kept(layer, head, token, chosen[i]));
                    kept += stays;
                }
                CHECK(kept == end);
            }
        }
        mock_destroy(&mock);
    }
}

/* Too few tokens for two blocks, or too few rows for the last one: sinks and the most recent entries stay. */
static void without_blocks_to_choose_from_the_most_recent_entries_stay(void) {
    const char *configs[] = {"budget=40,lag=49", "budget=12,lag=8", "budget=13,lag=8", "budget=40,lag=1000000000000",
                             "budget=40,sinks=50,lag=8"};
    const uint32_t sinks[] = {4, 4, 4, 4, 40};
    for (size_t i = 0; i < sizeof sinks / sizeof sinks[0]; i++) {
        CHECK(mock_create(&mock, configs[i]) == KVH_OK);
        fill(LENGTH);
        CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_SELECT);
        const KvhLayerPlan *plan = &mock.layers[1];
        CHECK(plan->index_stride_head == 0);
        for (uint32_t row = 0; row < plan->count; row++) {
            CHECK(plan->indices[row] == (row < sinks[i] ? row : LENGTH - plan->count + row));
        }
        mock_destroy(&mock);
    }
}

static void a_channel_that_is_the_same_everywhere_says_nothing(void) {
    CHECK(mock_create(&mock, "budget=40,lag=8") == KVH_OK);
    fill(LENGTH);
    for (int token = 0; token < MOCK_LENGTH; token++) {
        mock.cache.k[0][0][token][3] = 7;
        memset(mock.cache.v[0][0][token], 0, sizeof mock.cache.v[0][0][token]);
    }
    CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_SELECT);
    mock_destroy(&mock);
}

static void what_is_no_number_keeps_the_sequence_and_says_so(void) {
    const float wrong[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        CHECK(mock_create(&mock, "budget=40,lag=8") == KVH_OK);
        fill(LENGTH);
        mock.cache.v[1][1][20][2] = wrong[i];
        CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_KEEP && strstr(mock.text, "layer 1, head 1") != NULL);
        mock_destroy(&mock);
    }
}

static void a_short_sequence_is_kept(void) {
    CHECK(mock_create(&mock, "min_tokens=50,keep=0.5") == KVH_OK);
    fill(49);
    CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_KEEP);
    fill(50);
    CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_SELECT && mock.bound[0] == 25);
    mock_destroy(&mock);
    CHECK(mock_create(&mock, "keep=0") == KVH_OK);
    fill(2);
    CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_SELECT && mock.bound[0] == 1);
    mock_destroy(&mock);
}

static void a_wrong_config_is_refused_by_the_key(void) {
    const struct {
        const char *config;
        const char *word;
    } wrong[] = {
        {"kep=0.5", "keep, budget, sinks, lag"}, {"keep", "keep"}, {"keep=", "from 0 to 1"}, {"keep=x", "keep"},
        {"keep=2", "from 0 to 1"}, {"keep=nan", "keep"}, {"lag=0", "lag"}, {"lag=1.5", "whole"}, {"lag=8,lag=8", "twice"},
        {"keep=0.5,budget=10", "both"}, {"keep=0.5,", "key=number"}, {"\x80=1", "byte 0"}, {"sinks=-1", "sinks"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        CHECK(mock_create(&mock, wrong[i].config) == KVH_ERR_CONFIG && strstr(mock.text, wrong[i].word) != NULL);
    }
}

static void a_cache_on_a_device_is_refused_by_name(void) {
    CHECK(mock_create_on(&mock, "", KVH_DEVICE_CUDA) == KVH_ERR_UNSUPPORTED && strstr(mock.text, "CUDA device") != NULL);
}

int main(void) {
    of_each_block_the_most_uneven_entries_stay();
    without_blocks_to_choose_from_the_most_recent_entries_stay();
    a_channel_that_is_the_same_everywhere_says_nothing();
    what_is_no_number_keeps_the_sequence_and_says_so();
    a_short_sequence_is_kept();
    a_wrong_config_is_refused_by_the_key();
    a_cache_on_a_device_is_refused_by_name();
    printf("%s\n", failures == 0 ? "all tests passed" : "tests failed");
    return failures != 0;
}
