/* plugin-name: keeps the entries whose values are long, with the first entries and the most recent ones.
 *
 * That is an example. Put your own score into `score`. */
#include "helpers.h"

#include <math.h>

/* What every method must protect. */
enum { SINKS = 4, RECENT = 32 };

struct KvhInstance {
    KvhHostState *host;
    const KvhMemory1 *memory;
    /* Share of the tokens seen that is kept. */
    double keep;
    uint64_t layers;
    /* For each layer, whether it is compressed: sliding-window and other layers are left alone. */
    unsigned char compressed[];
};

/* The method: one score for each entry of one head of one layer; the highest are kept. `row` has room for one row. */
static void score(const KvhLayer *layer, uint32_t head, float *row, float *scores) {
    for (uint64_t token = 0; token < layer->length; token++) {
        read_row(layer, &layer->v, token, head, row);
        double sum = 0;
        for (uint32_t i = 0; i < layer->v.head_dim; i++) {
            sum += (double)row[i] * row[i];
        }
        scores[token] = (float)sqrt(sum);
    }
}

static KvhStatus create(const KvhCreateArgs *args, KvhInstance **instance, KvhText *error) {
    if (!HAS(args, KvhCreateArgs, config) || instance == NULL) {
        return not_called_right(error, "create");
    }
    double keep = 0.5;
    if (!read_number(args->config, "keep", 0, 1, &keep)) {
        return fail(error, KVH_ERR_CONFIG, "the config is not one of plugin-name: write keep=X, with X from 0 to 1");
    }
    if (args->model->device.device_type != KVH_DEVICE_CPU || !is_readable(args->model->cache_dtype)) {
        return fail(error, KVH_ERR_UNSUPPORTED, "plugin-name reads caches of f32, f16 or bf16 in ordinary memory");
    }
    const KvhStr memory_id = KVH_LITERAL(KVH_MEMORY_1);
    const KvhMemory1 *memory = args->host->service(args->host->state, memory_id);
    if (memory == NULL) {
        return fail(error, KVH_ERR_UNSUPPORTED, "the host has no service " KVH_MEMORY_1);
    }
    const KvhArray layers = args->model->layers;
    KvhInstance *made = malloc(sizeof *made + layers.count);
    if (made == NULL) {
        return fail(error, KVH_ERR_OUT_OF_MEMORY, "no memory for an instance");
    }
    *made = (KvhInstance){.host = args->host->state, .memory = memory, .keep = keep, .layers = layers.count};
    for (uint64_t i = 0; i < layers.count; i++) {
        const KvhLayerInfo *layer = KVH_AT(KvhLayerInfo, layers, i);
        if (layer->shared_with >= 0) {
            free(made);
            return fail(error, KVH_ERR_UNSUPPORTED, "layer %d reads the cache of layer %d, which plugin-name does not handle",
                        (int)i, (int)layer->shared_with);
        }
        made->compressed[i] = layer->kind == KVH_LAYER_FULL && (layer->flags & KVH_LAYER_FLAG_V_INSIDE_K) == 0;
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
    return KVH_OK;
}

/* Rows that a layer keeps. Lengths and config decide that, never values. */
static uint64_t rows_kept(const KvhInstance *instance, uint64_t layer, uint64_t length, uint64_t tokens_seen) {
    if (!instance->compressed[layer] || length <= SINKS + RECENT) {
        return length;
    }
    const uint64_t wanted = (uint64_t)(instance->keep * (double)tokens_seen);
    const uint64_t kept = wanted > SINKS + RECENT ? wanted : SINKS + RECENT;
    return kept < length ? kept : length;
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
        const uint64_t kept = rows_kept(instance, i, length, args->next_position);
        *KVH_AT_MUT(uint64_t, out->counts, i) = kept;
        dropped |= kept < length;
    }
    out->reason = dropped ? KVH_REASON_NONE : KVH_REASON_TOO_SHORT;
    return KVH_OK;
}

/* An entry that may be dropped. */
typedef struct {
    float score;
    uint32_t row;
} Entry;

/* The higher score first, then the lower row: the same cache gives the same plan. */
static int compare(const void *left, const void *right) {
    const Entry *a = left, *b = right;
    if (a->score != b->score) {
        return a->score > b->score ? -1 : 1;
    }
    return a->row < b->row ? -1 : a->row > b->row;
}

/* Writes the `count` rows that a head keeps, ascending. `entries` and `stays` have room for all rows. */
static void choose(const float *scores, uint64_t length, uint64_t count, Entry *entries, unsigned char *stays,
                   uint32_t *indices) {
    uint64_t candidates = 0;
    for (uint64_t row = 0; row < length; row++) {
        stays[row] = row < SINKS || row + RECENT >= length;
        if (!stays[row]) {
            /* What is no number is worth nothing: a comparison with it has no order. */
            entries[candidates].score = isnan(scores[row]) ? -INFINITY : scores[row];
            entries[candidates++].row = (uint32_t)row;
        }
    }
    qsort(entries, candidates, sizeof *entries, compare);
    for (uint64_t i = 0; i < count - SINKS - RECENT; i++) {
        stays[entries[i].row] = 1;
    }
    for (uint64_t row = 0; row < length; row++) {
        if (stays[row]) {
            *indices++ = (uint32_t)row;
        }
    }
}

/* Chooses the rows of one layer for each head. */
static KvhStatus plan_layer(KvhInstance *instance, KvhCall *call, uint64_t sequence, const KvhLayer *layer, uint64_t count,
                            KvhLayerPlan *plan, KvhText *error) {
    const uint64_t length = layer->length;
    uint32_t *indices = borrow(instance->memory, instance->host, call, KVH_MEMORY_TICKET, sequence,
                               layer->kv_heads * count * sizeof *indices, error);
    Entry *entries =
        borrow(instance->memory, instance->host, call, KVH_MEMORY_CALL, sequence, length * sizeof *entries, error);
    float *scores = borrow(instance->memory, instance->host, call, KVH_MEMORY_CALL, sequence, length * sizeof *scores, error);
    float *row =
        borrow(instance->memory, instance->host, call, KVH_MEMORY_CALL, sequence, layer->v.head_dim * sizeof *row, error);
    unsigned char *stays = borrow(instance->memory, instance->host, call, KVH_MEMORY_CALL, sequence, length, error);
    if (indices == NULL || entries == NULL || scores == NULL || row == NULL || stays == NULL) {
        return KVH_ERR_OUT_OF_MEMORY;
    }
    for (uint32_t head = 0; head < layer->kv_heads; head++) {
        score(layer, head, row, scores);
        choose(scores, length, count, entries, stays, indices + head * count);
    }
    plan->count = (uint32_t)count;
    plan->indices = indices;
    plan->index_stride_head = (int64_t)count;
    return KVH_OK;
}

/* What fails keeps its own sequence, and says why in the plan: the others of the call do not notice. */
static void plan_sequence(KvhInstance *instance, KvhCall *call, uint64_t index, const KvhSequence *sequence, KvhPlan *plan) {
    int dropped = 0;
    for (uint64_t i = 0; i < sequence->layers.count; i++) {
        const KvhLayer *layer = KVH_AT(KvhLayer, sequence->layers, i);
        const uint64_t count = rows_kept(instance, i, layer->length, sequence->next_position);
        if (count == layer->length) {
            /* A layer plan that is left alone keeps everything. */
            continue;
        }
        KvhLayerPlan *layer_plan = KVH_AT_MUT(KvhLayerPlan, plan->layers, i);
        if (plan_layer(instance, call, index, layer, count, layer_plan, plan->message) != KVH_OK) {
            plan->kind = KVH_PLAN_KEEP;
            plan->reason = KVH_REASON_OTHER;
            return;
        }
        dropped = 1;
    }
    plan->kind = dropped ? KVH_PLAN_SELECT : KVH_PLAN_KEEP;
    plan->reason = dropped ? KVH_REASON_NONE : KVH_REASON_TOO_SHORT;
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
         "\"hooks\":[\"kvh.on_prefill_done/1\"],\"may_need\":[],\"language\":\"c\",\"compiler\":\"" __VERSION__ "\","
         "\"config_schema\":{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{\"keep\":"
         "{\"description\":\"Fraction of the tokens seen that is kept.\",\"type\":\"number\",\"default\":0.5,"
         "\"minimum\":0,\"maximum\":1}}},\"layouts\":" KVH_LAYOUTS_JSON "}");

KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void);

KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void) {
    return &entry;
}
