/* What plugin-name must do. Ends with 1 when a check fails. */
#include "mock.h"

enum { LENGTH = 100, SINKS = 4, RECENT = 32 };

static int failures;

#define CHECK(condition) \
    ((condition) ? (void)0 : (void)(failures++, fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition)))

static Mock mock;

/* How long the value of an entry is; no two of a head are alike. */
static int value(int layer, int head, int token) {
    return (token * 37 + layer * 5 + head * 11) % 101;
}

static void fill(uint64_t length) {
    for (int layer = 0; layer < MOCK_LAYERS; layer++) {
        mock.cache.length[layer] = length;
        for (int head = 0; head < MOCK_HEADS; head++) {
            for (int token = 0; token < MOCK_LENGTH; token++) {
                for (int i = 0; i < MOCK_DIM; i++) {
                    mock.cache.k[layer][head][token][i] = 1;
                    mock.cache.v[layer][head][token][i] = (float)value(layer, head, token);
                }
            }
        }
    }
}

/* Whether an entry is to be kept: it is protected, or fewer than `free` of the others have longer values. */
static int is_kept(int layer, int head, int token, int free) {
    if (token < SINKS || token >= LENGTH - RECENT) {
        return 1;
    }
    int longer = 0;
    for (int other = SINKS; other < LENGTH - RECENT; other++) {
        longer += value(layer, head, other) > value(layer, head, token);
    }
    return longer < free;
}

static void the_longest_values_stay_with_the_first_and_the_most_recent_entries(void) {
    CHECK(mock_create(&mock, "keep=0.5") == KVH_OK);
    fill(LENGTH);
    static MockCache before;
    before = mock.cache;
    CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_SELECT);
    CHECK(memcmp(&before, &mock.cache, sizeof before) == 0);
    for (int layer = 0; layer < MOCK_LAYERS; layer++) {
        const KvhLayerPlan *plan = &mock.layers[layer];
        CHECK(mock.bound[layer] == LENGTH / 2 && plan->count == LENGTH / 2);
        for (int head = 0; head < MOCK_HEADS; head++) {
            const uint32_t *kept = plan->indices + head * plan->index_stride_head;
            for (int token = 0; token < LENGTH; token++) {
                if (is_kept(layer, head, token, LENGTH / 2 - SINKS - RECENT)) {
                    CHECK(*kept == (uint32_t)token);
                    kept++;
                }
            }
            CHECK(kept == plan->indices + head * plan->index_stride_head + plan->count);
        }
    }
    mock_destroy(&mock);
}

static void a_short_sequence_is_kept(void) {
    CHECK(mock_create(&mock, "{\"keep\": 0}") == KVH_OK);
    fill(SINKS + RECENT);
    CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_KEEP);
    fill(SINKS + RECENT + 1);
    CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_SELECT && mock.bound[0] == SINKS + RECENT);
    mock_destroy(&mock);
}

static void a_wrong_config_is_refused_by_the_key(void) {
    const char *wrong[] = {"kep=0.5", "keep", "keep=", "keep=x", "keep=2", "keep=-1", "keep=nan", "keep=0.5,more=1"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        CHECK(mock_create(&mock, wrong[i]) == KVH_ERR_CONFIG && strstr(mock.text, "keep=") != NULL);
    }
}

int main(void) {
    the_longest_values_stay_with_the_first_and_the_most_recent_entries();
    a_short_sequence_is_kept();
    a_wrong_config_is_refused_by_the_key();
    printf("%s\n", failures == 0 ? "all tests passed" : "tests failed");
    return failures != 0;
}
