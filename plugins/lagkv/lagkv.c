/* lagkv: keeps the entries that vary most against the entries that come after them (Liang et al. 2025, arXiv 2504.04704).
 *
 * Behind the sinks a prompt is cut into blocks of `lag` entries. Each block but the last is measured by the one behind it:
 * in each channel, where an entry lies between that block's least and greatest value. An entry whose channels lie far apart
 * from each other is hard to foretell, and kept; of each block the same share. Sinks, the last whole block and what is behind
 * it are kept whole. No queries are needed. */
#include "config.h"

#include <math.h>

struct KvhInstance {
    KvhHostState *host;
    const KvhMemory1 *memory;
    /* Rows kept in each layer; 0: a share of the tokens seen. */
    uint64_t budget;
    double keep;
    /* First rows, which are always kept. */
    uint64_t sinks;
    /* Rows of a block. */
    uint64_t lag;
    /* Shorter sequences are kept whole. */
    uint64_t min_tokens;
    uint64_t layers;
    /* For each layer, whether it is compressed: sliding-window and other layers are left alone. */
    unsigned char compressed[];
};

static KvhStatus create(const KvhCreateArgs *args, KvhInstance **instance, KvhText *error) {
    enum { KEEP, BUDGET, SINKS, LAG, MIN_TOKENS, KEYS };
    Number config[KEYS] = {
        [KEEP] = {.key = "keep", .least = 0, .most = 1, .value = 0.5},
        [BUDGET] = {.key = "budget", .least = 1, .most = 1e12, .whole = 1},
        [SINKS] = {.key = "sinks", .least = 0, .most = 1e12, .whole = 1, .value = 4},
        [LAG] = {.key = "lag", .least = 1, .most = 1e12, .whole = 1, .value = 128},
        [MIN_TOKENS] = {.key = "min_tokens", .least = 0, .most = 1e12, .whole = 1},
    };
    if (instance == NULL || !HAS(args, KvhCreateArgs, config) || !HAS(args->model, KvhModel, layers) ||
        !HAS(args->host, KvhHost, service)) {
        return not_called_right(error, "create");
    }
    if (!read_numbers(args->config, config, KEYS, error)) {
        return KVH_ERR_CONFIG;
    }
    if (config[KEEP].given && config[BUDGET].given) {
        return fail(error, KVH_ERR_CONFIG, "config keys `keep` and `budget` are both given; one of them says how much is kept");
    }
    const KvhModel *model = args->model;
    if (model->device.device_type != KVH_DEVICE_CPU) {
        return fail(error, KVH_ERR_UNSUPPORTED, "lagkv reads ordinary memory; the cache lies on %s (device type %d)",
                    model->device.device_type == KVH_DEVICE_CUDA ? "a CUDA device" : "another device",
                    (int)model->device.device_type);
    }
    if (!is_readable(model->cache_dtype)) {
        return fail(error, KVH_ERR_UNSUPPORTED, "lagkv reads f32, f16 and bf16; the cache has type code %d of %d bits",
                    (int)model->cache_dtype.code, (int)model->cache_dtype.bits);
    }
    const KvhStr memory_id = KVH_LITERAL(KVH_MEMORY_1);
    const KvhMemory1 *memory = args->host->service(args->host->state, memory_id);
    if (memory == NULL) {
        return fail(error, KVH_ERR_UNSUPPORTED, "the host has no service " KVH_MEMORY_1);
    }
    const KvhArray layers = model->layers;
    KvhInstance *made = malloc(sizeof *made + layers.count);
    if (made == NULL) {
        return fail(error, KVH_ERR_OUT_OF_MEMORY, "no memory for an instance");
    }
    *made = (KvhInstance){
        .host = args->host->state,
        .memory = memory,
        .budget = (uint64_t)config[BUDGET].value,
        .keep = config[KEEP].value,
        .sinks = (uint64_t)config[SINKS].value,
        .lag = (uint64_t)config[LAG].value,
        .min_tokens = (uint64_t)config[MIN_TOKENS].value,
        .layers = layers.count,
    };
    for (uint64_t i = 0; i < layers.count; i++) {
        const KvhLayerInfo *layer = KVH_AT(KvhLayerInfo, layers, i);
        if (layer->shared_with >= 0) {
            free(made);
            return fail(error, KVH_ERR_UNSUPPORTED, "layer %d reads the cache of layer %d, which lagkv does not handle", (int)i,
                        (int)layer->shared_with);
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
    if (instance == NULL || !HAS(needs, KvhNeeds, min_tokens)) {
        return not_called_right(error, "needs");
    }
    needs->min_tokens = instance->min_tokens;
    return KVH_OK;
}

/* Rows that a layer keeps. Lengths and config decide that, never values. */
static uint64_t rows_kept(const KvhInstance *instance, uint64_t layer, uint64_t length, uint64_t tokens_seen) {
    if (!instance->compressed[layer] || tokens_seen < instance->min_tokens) {
        return length;
    }
    const uint64_t share = (uint64_t)(instance->keep * (double)tokens_seen);
    const uint64_t wanted = instance->budget > 0 ? instance->budget : share > 0 ? share : 1;
    return wanted < length ? wanted : length;
}

static KvhStatus bound(KvhInstance *instance, const KvhBoundArgs *args, KvhBoundOut *out, KvhText *error) {
    if (instance == NULL || !HAS(args, KvhBoundArgs, lengths) || !HAS(out, KvhBoundOut, reason)) {
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

/* How the rows of a layer fall into parts. */
typedef struct {
    uint64_t sinks;
    /* Blocks that lose rows; all but the last one. */
    uint64_t blocks;
    /* Rows kept of these blocks in all; 0: sinks and the most recent rows are all that is kept. */
    uint64_t chosen;
} Parts;

static Parts parts_of(const KvhInstance *instance, uint64_t length, uint64_t count) {
    Parts parts = {.sinks = instance->sinks < count ? instance->sinks : count};
    if (instance->sinks >= length) {
        return parts;
    }
    const uint64_t whole_blocks = (length - instance->sinks) / instance->lag;
    if (whole_blocks < 2) {
        return parts;
    }
    const uint64_t blocks = whole_blocks - 1;
    const uint64_t never_dropped = length - blocks * instance->lag;
    if (count > never_dropped) {
        parts.blocks = blocks;
        parts.chosen = count - never_dropped;
    }
    return parts;
}

/* A row of a block. */
typedef struct {
    double score;
    uint32_t row;
} Entry;

/* Room for the work on one layer. */
typedef struct {
    /* A block and the one behind it, `[lag][channels]` each. */
    float *block;
    float *next;
    /* Of the block behind: least and greatest value of each channel. */
    float *least;
    float *greatest;
    /* Of each row of a block. */
    double *spread;
    Entry *entries;
    unsigned char *stays;
} Room;

static void read_block(const KvhLayer *layer, const KvhRows *rows, uint32_t head, uint64_t first, uint64_t lag, float *block) {
    for (uint64_t i = 0; i < lag; i++) {
        read_row(layer, rows, first + i, head, block + i * rows->head_dim);
    }
}

static void find_range(const float *block, uint64_t lag, uint32_t channels, float *least, float *greatest) {
    memcpy(least, block, channels * sizeof *least);
    memcpy(greatest, block, channels * sizeof *greatest);
    for (uint64_t i = 1; i < lag; i++) {
        for (uint32_t c = 0; c < channels; c++) {
            const float value = block[i * channels + c];
            least[c] = value < least[c] ? value : least[c];
            greatest[c] = value > greatest[c] ? value : greatest[c];
        }
    }
}

/* Standard deviation over the channels of a row, each as a share of its range. A channel without a range says nothing: 0. */
static double spread_of(const float *row, uint32_t channels, const float *least, const float *greatest) {
    double sum = 0;
    for (uint32_t c = 0; c < channels; c++) {
        const double range = (double)greatest[c] - least[c];
        sum += range == 0 ? 0 : ((double)row[c] - least[c]) / range;
    }
    const double mean = sum / channels;
    double squares = 0;
    for (uint32_t c = 0; c < channels; c++) {
        const double range = (double)greatest[c] - least[c];
        const double share = range == 0 ? 0 : ((double)row[c] - least[c]) / range;
        squares += (share - mean) * (share - mean);
    }
    return channels > 1 ? sqrt(squares / (channels - 1)) : 0;
}

/* Adds to each row's score its part of a softmax over the block's spreads. */
static void add_softmax(Room *room, uint64_t lag) {
    double most = room->spread[0];
    for (uint64_t i = 1; i < lag; i++) {
        most = room->spread[i] > most ? room->spread[i] : most;
    }
    double total = 0;
    for (uint64_t i = 0; i < lag; i++) {
        room->spread[i] = exp(room->spread[i] - most);
        total += room->spread[i];
    }
    for (uint64_t i = 0; i < lag; i++) {
        room->entries[i].score += room->spread[i] / total;
    }
}

/* Adds the scores of the block at `first`, of K or of V. Their mean would have the same order. */
static void add_scores(const KvhLayer *layer, const KvhRows *rows, uint32_t head, uint64_t first, uint64_t lag, Room *room) {
    const uint32_t channels = rows->head_dim;
    read_block(layer, rows, head, first, lag, room->block);
    read_block(layer, rows, head, first + lag, lag, room->next);
    find_range(room->next, lag, channels, room->least, room->greatest);
    for (uint64_t i = 0; i < lag; i++) {
        room->spread[i] = spread_of(room->block + i * channels, channels, room->least, room->greatest);
    }
    add_softmax(room, lag);
}

/* The higher score first, then the lower row: the same cache gives the same plan. */
static int compare(const void *left, const void *right) {
    const Entry *a = left, *b = right;
    if (a->score != b->score) {
        return a->score > b->score ? -1 : 1;
    }
    return a->row < b->row ? -1 : a->row > b->row;
}

/* Writes the `count` best rows of the block at `first`, ascending. Gives 0 when scores are not numbers. */
static int choose(const KvhLayer *layer, uint32_t head, uint64_t first, uint64_t lag, uint64_t count, Room *room,
                  uint32_t *indices) {
    for (uint64_t i = 0; i < lag; i++) {
        room->entries[i] = (Entry){.score = 0, .row = (uint32_t)i};
        room->stays[i] = 0;
    }
    add_scores(layer, &layer->k, head, first, lag, room);
    add_scores(layer, &layer->v, head, first, lag, room);
    for (uint64_t i = 0; i < lag; i++) {
        if (!isfinite(room->entries[i].score)) {
            return 0;
        }
    }
    qsort(room->entries, lag, sizeof *room->entries, compare);
    for (uint64_t i = 0; i < count; i++) {
        room->stays[room->entries[i].row] = 1;
    }
    for (uint64_t i = 0; i < lag; i++) {
        if (room->stays[i]) {
            *indices++ = (uint32_t)(first + i);
        }
    }
    return 1;
}

/* Writes the `count` rows that a head keeps, ascending. Gives 0 when scores are not numbers. */
static int choose_rows(const KvhLayer *layer, uint32_t head, uint64_t count, uint64_t lag, const Parts *parts, Room *room,
                       uint32_t *indices) {
    uint64_t written = 0;
    for (; written < parts->sinks; written++) {
        indices[written] = (uint32_t)written;
    }
    for (uint64_t block = 0; block < parts->blocks; block++) {
        /* What does not divide evenly goes to the first blocks, a row each. */
        const uint64_t share = parts->chosen / parts->blocks + (block < parts->chosen % parts->blocks);
        if (!choose(layer, head, parts->sinks + block * lag, lag, share, room, indices + written)) {
            return 0;
        }
        written += share;
    }
    for (; written < count; written++) {
        indices[written] = (uint32_t)(layer->length - (count - written));
    }
    return 1;
}

static void *borrow_for_call(KvhInstance *instance, KvhCall *call, uint64_t sequence, uint64_t bytes, KvhText *error) {
    return borrow(instance->memory, instance->host, call, KVH_MEMORY_CALL, sequence, bytes, error);
}

/* Room for a layer whose rows have at most so many channels. Gives 0 when there is none. */
static int find_room(KvhInstance *instance, KvhCall *call, uint64_t sequence, uint64_t channels, Room *room, KvhText *error) {
    const uint64_t lag = instance->lag;
    float *floats = borrow_for_call(instance, call, sequence, (2 * lag + 2) * channels * sizeof *floats, error);
    room->spread = borrow_for_call(instance, call, sequence, lag * sizeof *room->spread, error);
    room->entries = borrow_for_call(instance, call, sequence, lag * sizeof *room->entries, error);
    room->stays = borrow_for_call(instance, call, sequence, lag, error);
    if (floats == NULL || room->spread == NULL || room->entries == NULL || room->stays == NULL) {
        return 0;
    }
    room->block = floats;
    room->next = room->block + lag * channels;
    room->least = room->next + lag * channels;
    room->greatest = room->least + channels;
    return 1;
}

/* Chooses the rows of one layer for each head. */
static KvhStatus plan_layer(KvhInstance *instance, KvhCall *call, uint64_t sequence, const KvhLayer *layer, uint64_t count,
                            KvhLayerPlan *plan, KvhText *error) {
    const Parts parts = parts_of(instance, layer->length, count);
    /* Without blocks to choose from the heads agree, and share one list. */
    const uint32_t lists = parts.blocks > 0 ? layer->kv_heads : 1;
    uint32_t *indices =
        borrow(instance->memory, instance->host, call, KVH_MEMORY_TICKET, sequence, lists * count * sizeof *indices, error);
    if (indices == NULL) {
        return KVH_ERR_OUT_OF_MEMORY;
    }
    Room room = {0};
    const uint32_t channels = layer->k.head_dim > layer->v.head_dim ? layer->k.head_dim : layer->v.head_dim;
    if (parts.blocks > 0 && !find_room(instance, call, sequence, channels, &room, error)) {
        return KVH_ERR_OUT_OF_MEMORY;
    }
    for (uint32_t head = 0; head < lists; head++) {
        if (!choose_rows(layer, head, count, instance->lag, &parts, &room, indices + head * count)) {
            return fail(error, KVH_ERR_INTERNAL, "layer %d, head %d: rows hold values that are no numbers", (int)layer->layer,
                        (int)head);
        }
    }
    plan->count = (uint32_t)count;
    plan->indices = indices;
    plan->index_stride_head = lists > 1 ? (int64_t)count : 0;
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
    if (instance == NULL || !HAS(args, KvhPrepareArgs, sequences) || !HAS(out, KvhPrepareOut, plans)) {
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
    .id = KVH_LITERAL("lagkv"),
    .version = KVH_LITERAL("0.1.0"),
    .fingerprints = {.data = fingerprints, .count = KVH_FINGERPRINT_COUNT, .stride = sizeof(KvhFingerprint)},
    .create = create,
    .destroy = destroy,
    .needs = needs,
    .hook = hook,
};

/* The start of a key in the schema of the config. */
#define KEY(name, description, type, default_, minimum) \
    "\"" name "\":{\"description\":\"" description "\",\"type\":\"" type "\",\"default\":" default_ ",\"minimum\":" minimum

/* What can be read from the file without running it. */
KVH_META("{\"id\":\"lagkv\",\"version\":\"0.1.0\",\"abi_major\":1,\"abi_minor\":0,\"required_host_minor\":0,"
         "\"hooks\":[\"kvh.on_prefill_done/1\"],\"may_need\":[],\"language\":\"c\",\"compiler\":\"" __VERSION__ "\","
         "\"config_schema\":{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{"
         KEY("keep", "Fraction of the tokens seen that is kept; 0.5 when neither this nor `budget` is given.", "number",
             "0.5", "0") ",\"maximum\":1},"
         KEY("budget", "Entries that are kept; instead of `keep`.", "integer", "null", "1") "},"
         KEY("sinks", "Entries at the start that are always kept (attention sinks).", "integer", "4", "0") "},"
         KEY("lag", "Entries of a block, which is measured by the block behind it.", "integer", "128", "1") "},"
         KEY("min_tokens", "Sequences shorter than this are kept whole.", "integer", "0", "0") "}"
         "}},\"layouts\":" KVH_LAYOUTS_JSON "}");

KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void);

KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void) {
    return &entry;
}
