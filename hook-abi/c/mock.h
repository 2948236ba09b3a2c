/* A small host for tests: it calls the plugin through its one symbol, shows it a cache, and reads the plan that it makes.
 *
 * The caches are f32 and contiguous, in ordinary memory. `helpers.h` reads the others that hosts have. */
#ifndef MOCK_H
#define MOCK_H

#include "helpers.h"

enum { MOCK_LAYERS = 2, MOCK_HEADS = 2, MOCK_DIM = 4, MOCK_LENGTH = 128, MOCK_BLOCKS = 256, MOCK_TEXT = 256 };

typedef float MockRows[MOCK_HEADS][MOCK_LENGTH][MOCK_DIM];

/* A cache, of which each layer has `length[layer]` rows. */
typedef struct {
    uint64_t length[MOCK_LAYERS];
    MockRows k[MOCK_LAYERS];
    MockRows v[MOCK_LAYERS];
} MockCache;

/* An instance of the plugin, and what it answered. Too large for some stacks: make it static. */
typedef struct {
    const KvhPluginEntry *entry;
    KvhInstance *instance;
    KvhHost host;
    MockCache cache;
    /* Rows that the bound allows. */
    uint64_t bound[MOCK_LAYERS];
    /* The plan. Its memory lives until the next one is made. */
    KvhPlan plan;
    KvhLayerPlan layers[MOCK_LAYERS];
    /* A rewrite's rows. */
    MockCache lent;
    /* What the plugin says when it refuses something. */
    char text[MOCK_TEXT];
    void *blocks[MOCK_BLOCKS];
    size_t block_count;
} Mock;

/* The plugin's one symbol. */
const KvhPluginEntry *kvh_plugin_entry_v1(void);

static inline KvhStatus mock_allocate(KvhHostState *state, KvhCall *call, const KvhAllocation *request, void **out,
                                      KvhText *error) {
    (void)call, (void)error;
    Mock *mock = (Mock *)state;
    void *block = mock->block_count < MOCK_BLOCKS ? malloc(request->bytes) : NULL;
    if (block == NULL) {
        return KVH_ERR_OUT_OF_MEMORY;
    }
    /* What nobody may rely on. */
    memset(block, 0xa5, request->bytes);
    mock->blocks[mock->block_count++] = block;
    *out = block;
    return KVH_OK;
}

static inline KvhRows mock_rows(MockRows *rows) {
    return (KvhRows){
        .base = rows,
        .stride_token = sizeof(*rows)[0][0],
        .stride_head = sizeof(*rows)[0],
        .stride_element = sizeof(float),
        .head_dim = MOCK_DIM,
        .dtype = {.code = KVH_DTYPE_FLOAT, .bits = 32, .lanes = 1},
    };
}

static inline KvhLayer mock_layer(MockCache *cache, uint32_t layer) {
    return (KvhLayer){
        .struct_size = sizeof(KvhLayer),
        .layer = layer,
        .kind = KVH_LAYER_FULL,
        .shared_with = -1,
        .kv_heads = MOCK_HEADS,
        .length = cache->length[layer],
        .k = mock_rows(&cache->k[layer]),
        .v = mock_rows(&cache->v[layer]),
    };
}

static inline KvhStatus mock_lend(KvhHostState *state, KvhCall *call, uint64_t sequence, KvhArrayMut layers, KvhText *error) {
    (void)call, (void)sequence, (void)error;
    Mock *mock = (Mock *)state;
    if (layers.count != MOCK_LAYERS) {
        return KVH_ERR_INVALID_ARGUMENT;
    }
    for (uint32_t i = 0; i < MOCK_LAYERS; i++) {
        mock->lent.length[i] = mock->bound[i];
        *KVH_AT_MUT(KvhLayer, layers, i) = mock_layer(&mock->lent, i);
    }
    return KVH_OK;
}

static inline const void *mock_service(KvhHostState *state, KvhStr id) {
    static const KvhMemory1 memory = {.allocate = mock_allocate};
    static const KvhRows1 rows = {.lend = mock_lend};
    (void)state;
    if (is_id(id, KVH_MEMORY_1)) {
        return &memory;
    }
    return is_id(id, KVH_ROWS_1) ? (const void *)&rows : NULL;
}

static inline void mock_forget(Mock *mock) {
    while (mock->block_count > 0) {
        free(mock->blocks[--mock->block_count]);
    }
}

static inline KvhText mock_text(Mock *mock) {
    memset(mock->text, 0, sizeof mock->text);
    return (KvhText){.data = mock->text, .capacity = sizeof mock->text - 1};
}

/* Makes an instance for a cache on a device of some type. Unless the answer is KVH_OK, `mock->text` says why. */
static inline KvhStatus mock_create_on(Mock *mock, const char *config, int32_t device_type) {
    memset(mock, 0, sizeof *mock);
    mock->entry = kvh_plugin_entry_v1();
    mock->host = (KvhHost){
        .struct_size = sizeof(KvhHost),
        .state = (KvhHostState *)mock,
        .abi_major = KVH_ABI_MAJOR,
        .abi_minor = KVH_ABI_MINOR,
        .name = KVH_LITERAL("mock"),
        .service = mock_service,
    };
    KvhLayerInfo layers[MOCK_LAYERS];
    for (int i = 0; i < MOCK_LAYERS; i++) {
        layers[i] = (KvhLayerInfo){
            .struct_size = sizeof(KvhLayerInfo),
            .kind = KVH_LAYER_FULL,
            .shared_with = -1,
            .kv_heads = MOCK_HEADS,
            .q_heads = MOCK_HEADS,
            .k_head_dim = MOCK_DIM,
            .v_head_dim = MOCK_DIM,
        };
    }
    const KvhModel model = {
        .struct_size = sizeof model,
        .name = KVH_LITERAL("mock model"),
        .ranks = 1,
        .total_kv_heads = MOCK_HEADS,
        .device = {.device_type = device_type},
        .cache_dtype = {.code = KVH_DTYPE_FLOAT, .bits = 32, .lanes = 1},
        .position_axes = 1,
        .max_positions = 4096,
        .rope_base = 10000,
        .rotary_dim = MOCK_DIM,
        .rope_pairing = KVH_ROPE_HALF_SPLIT,
        .layers = {.data = layers, .count = MOCK_LAYERS, .stride = sizeof layers[0]},
    };
    const KvhOffers offers = {.struct_size = sizeof offers, .can = UINT64_MAX};
    const KvhCreateArgs args = {
        .struct_size = sizeof args,
        .host = &mock->host,
        .model = &model,
        .offers = &offers,
        .config = {.data = config, .length = strlen(config)},
    };
    KvhText error = mock_text(mock);
    return mock->entry->create(&args, &mock->instance, &error);
}

/* The same in ordinary memory. */
static inline KvhStatus mock_create(Mock *mock, const char *config) {
    return mock_create_on(mock, config, KVH_DEVICE_CPU);
}

static inline void mock_destroy(Mock *mock) {
    mock->entry->destroy(mock->instance);
    mock_forget(mock);
}

/* Asks for the bound and then for a plan of `mock->cache`, as a host does when a prompt is complete. Where the bound is
 * everything, no plan is asked for and `mock->plan` is a keep. Unless the answer is KVH_OK, `mock->text` says why; it also
 * holds the message of a plan that keeps. */
static inline KvhStatus mock_plan(Mock *mock) {
    const KvhOnPrefillDone1 *hook = mock->entry->hook((KvhStr)KVH_LITERAL(KVH_ON_PREFILL_DONE_1));
    const uint64_t tokens = mock->cache.length[0];
    mock_forget(mock);
    memcpy(mock->bound, mock->cache.length, sizeof mock->bound);
    const KvhBoundArgs bound_args = {
        .struct_size = sizeof bound_args,
        .uid = 1,
        .next_position = tokens,
        .prompt_length = tokens,
        .lengths = {.data = mock->cache.length, .count = MOCK_LAYERS, .stride = sizeof(uint64_t)},
    };
    KvhBoundOut bound_out = {
        .struct_size = sizeof bound_out,
        .counts = {.data = mock->bound, .count = MOCK_LAYERS, .stride = sizeof(uint64_t)},
    };
    KvhText error = mock_text(mock);
    KvhStatus status = hook->bound(mock->instance, &bound_args, &bound_out, &error);
    mock->plan = (KvhPlan){.struct_size = sizeof(KvhPlan), .kind = KVH_PLAN_KEEP};
    if (status != KVH_OK || memcmp(mock->bound, mock->cache.length, sizeof mock->bound) == 0) {
        return status;
    }
    KvhLayer layers[MOCK_LAYERS];
    for (uint32_t i = 0; i < MOCK_LAYERS; i++) {
        layers[i] = mock_layer(&mock->cache, i);
        mock->layers[i] = (KvhLayerPlan){.struct_size = sizeof(KvhLayerPlan)};
    }
    const KvhSequence sequence = {
        .struct_size = sizeof sequence,
        .uid = 1,
        .next_position = tokens,
        .prompt_length = tokens,
        .position_axes = 1,
        .layers = {.data = layers, .count = MOCK_LAYERS, .stride = sizeof layers[0]},
    };
    mock->plan.layers = (KvhArrayMut){.data = mock->layers, .count = MOCK_LAYERS, .stride = sizeof mock->layers[0]};
    mock->plan.message = &error;
    const KvhPrepareArgs args = {
        .struct_size = sizeof args,
        .sequences = {.data = &sequence, .count = 1, .stride = sizeof sequence},
    };
    KvhPrepareOut out = {
        .struct_size = sizeof out,
        .plans = {.data = &mock->plan, .count = 1, .stride = sizeof mock->plan},
    };
    status = hook->on_prefill_done(mock->instance, &args, &out, &error);
    mock->plan.message = NULL;
    return status;
}

#endif
