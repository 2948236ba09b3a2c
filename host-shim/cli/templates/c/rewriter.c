/* plugin-name: makes one entry of each two neighbours, their mean, but for the first entries and the most recent ones.
 *
 * That is an example. Say in `group` which entries become one, and in `write_means` what it holds. */
#include "helpers.h"

/* What every method must protect. */
enum { SINKS = 4, DEFAULT_RECENT = 32 };

struct KvhInstance {
    KvhHostState *host;
    const KvhMemory1 *memory;
    const KvhRows1 *rows;
    /* Most recent entries that stay as they are. */
    uint64_t recent;
    uint64_t layers;
    /* For each layer, whether it is rewritten: sliding-window and other layers are left alone. */
    unsigned char rewritten[];
};

/* Pairs of rows that become one. Lengths and config decide that, never values. */
static uint64_t pairs(const KvhInstance *instance, uint64_t layer, uint64_t length) {
    const uint64_t whole = SINKS + instance->recent;
    return instance->rewritten[layer] && length > whole ? (length - whole) / 2 : 0;
}

/* The rows that new row `row` is made of: the first one, and how many. */
static uint64_t group(uint64_t pairs, uint64_t row, uint64_t *count) {
    *count = 1;
    if (row < SINKS) {
        return row;
    }
    if (row < SINKS + pairs) {
        *count = 2;
        return SINKS + 2 * (row - SINKS);
    }
    return row + pairs;
}

/* Row `i` of `to` becomes the mean of the rows of group `i`. `sum` and `row` have room for one row. */
static void write_means(const KvhLayer *layer, const KvhRows *from, const KvhLayer *lent, const KvhRows *to, uint32_t head,
                        uint64_t pairs, float *sum, float *row) {
    for (uint64_t i = 0; i < lent->length; i++) {
        uint64_t count;
        const uint64_t first = group(pairs, i, &count);
        memset(sum, 0, from->head_dim * sizeof *sum);
        for (uint64_t token = first; token < first + count; token++) {
            read_row(layer, from, token, head, row);
            for (uint32_t c = 0; c < from->head_dim; c++) {
                sum[c] += row[c] / (float)count;
            }
        }
        write_row(lent, to, i, head, sum);
    }
}

static KvhStatus create(const KvhCreateArgs *args, KvhInstance **instance, KvhText *error) {
    if (!HAS(args, KvhCreateArgs, config) || instance == NULL) {
        return not_called_right(error, "create");
    }
    double recent = DEFAULT_RECENT;
    if (!read_number(args->config, "recent", 0, 1e9, &recent) || recent != (double)(uint64_t)recent) {
        return fail(error, KVH_ERR_CONFIG,
                    "the config is not one of plugin-name: write recent=N, with N a whole number from 0 to 1000000000");
    }
    if (args->model->device.device_type != KVH_DEVICE_CPU || !is_readable(args->model->cache_dtype)) {
        return fail(error, KVH_ERR_UNSUPPORTED, "plugin-name reads caches of f32, f16 or bf16 in ordinary memory");
    }
    const KvhStr memory_id = KVH_LITERAL(KVH_MEMORY_1);
    const KvhMemory1 *memory = args->host->service(args->host->state, memory_id);
    const KvhStr rows_id = KVH_LITERAL(KVH_ROWS_1);
    const KvhRows1 *rows = args->host->service(args->host->state, rows_id);
    if (memory == NULL || rows == NULL) {
        return fail(error, KVH_ERR_UNSUPPORTED, "the host has no service " KVH_MEMORY_1 " or no " KVH_ROWS_1);
    }
    const KvhArray layers = args->model->layers;
    KvhInstance *made = malloc(sizeof *made + layers.count);
    if (made == NULL) {
        return fail(error, KVH_ERR_OUT_OF_MEMORY, "no memory for an instance");
    }
    *made = (KvhInstance){
        .host = args->host->state,
        .memory = memory,
        .rows = rows,
        .recent = (uint64_t)recent,
        .layers = layers.count,
    };
    for (uint64_t i = 0; i < layers.count; i++) {
        const KvhLayerInfo *layer = KVH_AT(KvhLayerInfo, layers, i);
        if (layer->shared_with >= 0) {
            free(made);
            return fail(error, KVH_ERR_UNSUPPORTED, "layer %d reads the cache of layer %d, which plugin-name does not handle",
                        (int)i, (int)layer->shared_with);
        }
        made->rewritten[i] = layer->kind == KVH_LAYER_FULL && (layer->flags & KVH_LAYER_FLAG_V_INSIDE_K) == 0;
    }
    *instance = made;
    return KVH_OK;
}

static void destroy(KvhInstance *instance) {
    free(instance);
}

static KvhStatus needs(KvhInstance *instance, KvhNeeds *needs, KvhText *error) {
    if (instance == NULL || !HAS(needs, KvhNeeds, layer_mask_words)) {
        return not_called_right(error, "needs");
    }
    needs->must = KVH_CAN_REWRITE;
    return KVH_OK;
}

static KvhStatus bound(KvhInstance *instance, const KvhBoundArgs *args, KvhBoundOut *out, KvhText *error) {
    if (instance == NULL || !HAS(args, KvhBoundArgs, segments) || !HAS(out, KvhBoundOut, reason)) {
        return not_called_right(error, "bound");
    }
    if (args->lengths.count != instance->layers) {
        return fail(error, KVH_ERR_INVALID_ARGUMENT, "%llu lengths for %llu layers",
                    (unsigned long long)args->lengths.count, (unsigned long long)instance->layers);
    }
    int dropped = 0;
    for (uint64_t i = 0; i < args->lengths.count; i++) {
        const uint64_t length = *KVH_AT(uint64_t, args->lengths, i);
        const uint64_t kept = length - pairs(instance, i, length);
        *KVH_AT_MUT(uint64_t, out->counts, i) = kept;
        dropped |= kept < length;
    }
    out->reason = dropped ? KVH_REASON_NONE : KVH_REASON_TOO_SHORT;
    return KVH_OK;
}

/* Writes the new rows of one layer. */
static KvhStatus rewrite_layer(KvhInstance *instance, KvhCall *call, uint64_t sequence, const KvhLayer *layer,
                               const KvhLayer *lent, uint64_t pairs, KvhLayerPlan *plan, KvhText *error) {
    if (lent->length != layer->length - pairs) {
        return fail(error, KVH_ERR_INVALID_ARGUMENT, "layer %d: %llu rows lent where the bound says %llu", (int)layer->layer,
                    (unsigned long long)lent->length, (unsigned long long)(layer->length - pairs));
    }
    const uint32_t dim = layer->k.head_dim > layer->v.head_dim ? layer->k.head_dim : layer->v.head_dim;
    uint32_t *positions = borrow(instance->memory, instance->host, call, KVH_MEMORY_TICKET, sequence,
                                 lent->length * sizeof *positions, error);
    float *room =
        borrow(instance->memory, instance->host, call, KVH_MEMORY_CALL, sequence, 2 * dim * sizeof *room, error);
    if (positions == NULL || room == NULL) {
        return KVH_ERR_OUT_OF_MEMORY;
    }
    for (uint32_t head = 0; head < layer->kv_heads; head++) {
        write_means(layer, &layer->k, lent, &lent->k, head, pairs, room, room + dim);
        write_means(layer, &layer->v, lent, &lent->v, head, pairs, room, room + dim);
    }
    /* A new row stands for the position of the first row that it is made of. A sequence whose prompt has just been
     * completed was never compressed, so a row's position is its number; all heads agree. */
    for (uint64_t i = 0; i < lent->length; i++) {
        uint64_t count;
        positions[i] = (uint32_t)group(pairs, i, &count);
    }
    plan->count = (uint32_t)lent->length;
    plan->positions = positions;
    return KVH_OK;
}

static KvhStatus rewrite_layers(KvhInstance *instance, KvhCall *call, uint64_t index, const KvhSequence *sequence,
                                KvhPlan *plan) {
    const uint64_t layers = sequence->layers.count;
    KvhLayer *lent =
        borrow(instance->memory, instance->host, call, KVH_MEMORY_CALL, index, layers * sizeof *lent, plan->message);
    if (lent == NULL) {
        return KVH_ERR_OUT_OF_MEMORY;
    }
    memset(lent, 0, layers * sizeof *lent);
    for (uint64_t i = 0; i < layers; i++) {
        lent[i].struct_size = sizeof *lent;
    }
    const KvhArrayMut array = {.data = lent, .count = layers, .stride = sizeof *lent};
    KvhStatus status = instance->rows->lend(instance->host, call, index, array, plan->message);
    for (uint64_t i = 0; i < layers && status == KVH_OK; i++) {
        const KvhLayer *layer = KVH_AT(KvhLayer, sequence->layers, i);
        if (instance->rewritten[i]) {
            status = rewrite_layer(instance, call, index, layer, &lent[i], pairs(instance, i, layer->length),
                                   KVH_AT_MUT(KvhLayerPlan, plan->layers, i), plan->message);
        }
    }
    return status;
}

/* What fails keeps its own sequence, and says why in the plan: the others of the call do not notice. */
static void plan_sequence(KvhInstance *instance, KvhCall *call, uint64_t index, const KvhSequence *sequence, KvhPlan *plan) {
    uint64_t merged = 0;
    for (uint64_t i = 0; i < sequence->layers.count; i++) {
        merged += pairs(instance, i, KVH_AT(KvhLayer, sequence->layers, i)->length);
    }
    if (merged == 0) {
        plan->kind = KVH_PLAN_KEEP;
        plan->reason = KVH_REASON_TOO_SHORT;
        return;
    }
    const int done = rewrite_layers(instance, call, index, sequence, plan) == KVH_OK;
    plan->kind = done ? KVH_PLAN_REWRITE : KVH_PLAN_KEEP;
    plan->reason = done ? KVH_REASON_NONE : KVH_REASON_OTHER;
}

static KvhStatus on_prefill_done(KvhInstance *instance, const KvhPrepareArgs *args, KvhPrepareOut *out, KvhText *error) {
    if (instance == NULL || !HAS(args, KvhPrepareArgs, stream) || !HAS(out, KvhPrepareOut, plans)) {
        return not_called_right(error, "on_prefill_done");
    }
    for (uint64_t i = 0; i < args->sequences.count; i++) {
        const KvhSequence *sequence = KVH_AT(KvhSequence, args->sequences, i);
        if (sequence->layers.count != instance->layers) {
            return fail(error, KVH_ERR_INVALID_ARGUMENT, "%llu layers where the model has %llu",
                        (unsigned long long)sequence->layers.count, (unsigned long long)instance->layers);
        }
        plan_sequence(instance, args->call, i, sequence, KVH_AT_MUT(KvhPlan, out->plans, i));
    }
    return KVH_OK;
}

static const void *hook(KvhStr id) {
    static const KvhOnPrefillDone1 on_prefill_done_1 = {.bound = bound, .on_prefill_done = on_prefill_done};
    return is_id(id, KVH_ON_PREFILL_DONE_1) ? &on_prefill_done_1 : NULL;
}

static const KvhFingerprint fingerprints[] = KVH_FINGERPRINTS;

static const KvhPluginEntry entry = {
    .struct_size = sizeof entry,
    .abi_major = KVH_ABI_MAJOR,
    .abi_minor = KVH_ABI_MINOR,
    .required_host_minor = 0,
    .id = KVH_LITERAL("plugin-name"),
    .version = KVH_LITERAL("0.1.0"),
    .fingerprints = {.data = fingerprints, .count = KVH_FINGERPRINT_COUNT, .stride = sizeof(KvhFingerprint)},
    .create = create,
    .destroy = destroy,
    .needs = needs,
    .hook = hook,
};

/* What can be read from the file without running it. */
KVH_META("{\"id\":\"plugin-name\",\"version\":\"0.1.0\",\"abi_major\":1,\"abi_minor\":0,\"required_host_minor\":0,"
         "\"hooks\":[\"kvh.on_prefill_done/1\"],\"may_need\":[\"rewrite\"],\"language\":\"c\",\"compiler\":\"" __VERSION__ "\","
         "\"config_schema\":{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{\"recent\":"
         "{\"description\":\"Most recent entries that stay as they are.\",\"type\":\"integer\",\"default\":32,"
         "\"minimum\":0,\"maximum\":1000000000}}},\"layouts\":" KVH_LAYOUTS_JSON "}");

KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void);

KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void) {
    return &entry;
}
