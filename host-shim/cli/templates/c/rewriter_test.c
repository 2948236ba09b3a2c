/* What plugin-name must do. Ends with 1 when a check fails. */
#include "mock.h"

static int failures;

#define CHECK(condition) \
    ((condition) ? (void)0 : (void)(failures++, fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition)))

static Mock mock;

/* The key of an entry; its value is a key times two. */
static float key(int layer, int head, int token) {
    return (float)(1000 * layer + 200 * head + token);
}

static void fill(uint64_t length) {
    for (int layer = 0; layer < MOCK_LAYERS; layer++) {
        mock.cache.length[layer] = length;
        for (int head = 0; head < MOCK_HEADS; head++) {
            for (int token = 0; token < MOCK_LENGTH; token++) {
                for (int i = 0; i < MOCK_DIM; i++) {
                    mock.cache.k[layer][head][token][i] = key(layer, head, token);
                    mock.cache.v[layer][head][token][i] = 2 * key(layer, head, token);
                }
            }
        }
    }
}

static void neighbours_become_one_between_the_first_and_the_most_recent_entries(void) {
    CHECK(mock_create(&mock, "recent=3") == KVH_OK);
    fill(12);
    static MockCache before;
    before = mock.cache;
    CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_REWRITE);
    CHECK(memcmp(&before, &mock.cache, sizeof before) == 0);
    /* Rows 4 to 8 are between; the odd one stays. */
    const float rows[] = {0, 1, 2, 3, 4.5f, 6.5f, 8, 9, 10, 11};
    const uint32_t positions[] = {0, 1, 2, 3, 4, 6, 8, 9, 10, 11};
    for (int layer = 0; layer < MOCK_LAYERS; layer++) {
        CHECK(mock.bound[layer] == 10 && mock.layers[layer].count == 10);
        CHECK(memcmp(mock.layers[layer].positions, positions, sizeof positions) == 0);
        for (int head = 0; head < MOCK_HEADS; head++) {
            for (int row = 0; row < 10; row++) {
                for (int i = 0; i < MOCK_DIM; i++) {
                    const float expected = key(layer, head, 0) + rows[row];
                    CHECK(mock.lent.k[layer][head][row][i] == expected);
                    CHECK(mock.lent.v[layer][head][row][i] == 2 * expected);
                }
            }
        }
    }
    mock_destroy(&mock);
}

static void a_short_sequence_is_kept(void) {
    CHECK(mock_create(&mock, "") == KVH_OK);
    fill(37);
    CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_KEEP);
    fill(38);
    CHECK(mock_plan(&mock) == KVH_OK && mock.plan.kind == KVH_PLAN_REWRITE && mock.bound[0] == 37);
    mock_destroy(&mock);
}

static void a_wrong_config_is_refused_by_the_key(void) {
    const char *wrong[] = {"recnt=1", "recent", "recent=", "recent=x", "recent=1.5", "recent=-1", "recent=1,more=1"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        CHECK(mock_create(&mock, wrong[i]) == KVH_ERR_CONFIG && strstr(mock.text, "recent=") != NULL);
    }
}

int main(void) {
    neighbours_become_one_between_the_first_and_the_most_recent_entries();
    a_short_sequence_is_kept();
    a_wrong_config_is_refused_by_the_key();
    printf("%s\n", failures == 0 ? "all tests passed" : "tests failed");
    return failures != 0;
}
