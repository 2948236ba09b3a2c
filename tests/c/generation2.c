/* A plugin from a made-up future, for the tests of growth: its header had a second generation of the layer view and of
 * the layer plan, each with a field more at its end. It lists both generations of both, reads the new field only where
 * `struct_size` says that it is there, and writes only what the host has room for.
 *
 * It keeps the first `pinned_rows` rows (4 where the host does not say) and the last 8. */
#include "kvhook.h"

#include <stdlib.h>
#include <string.h>

typedef struct Layer2 {
    KvhLayer first;
    /* Generation 2: rows at the front that the engine wants to be kept. */
    uint64_t pinned_rows;
} Layer2;

typedef struct LayerPlan2 {
    KvhLayerPlan first;
    /* Generation 2: rows that were pinned. */
    uint64_t pinned_rows;
} LayerPlan2;

enum { DEFAULT_PINNED = 4, RECENT = 8 };

struct KvhInstance {
    KvhHostState *host;
    const KvhMemory1 *memory;
};

static KvhStatus create(const KvhCreateArgs *args, KvhInstance **instance, KvhText *error) {
    (void)error;
    const KvhStr memory_id = KVH_LITERAL(KVH_MEMORY_1);
    const KvhMemory1 *memory = args->host->service(args->host->state, memory_id);
    KvhInstance *made = memory == NULL ? NULL : malloc(sizeof *made);
    if (made == NULL) {
        return memory == NULL ? KVH_ERR_UNSUPPORTED : KVH_ERR_OUT_OF_MEMORY;
    }
    *made = (KvhInstance){.host = args->host->state, .memory = memory};
    *instance = made;
    return KVH_OK;
}

static void destroy(KvhInstance *instance) {
    free(instance);
}

static KvhStatus needs(KvhInstance *instance, KvhNeeds *needs, KvhText *error) {
    (void)instance, (void)needs, (void)error;
    return KVH_OK;
}

/* A bound sees no layers, so it is the most that any pinned count below 64 leads to. */
static KvhStatus bound(KvhInstance *instance, const KvhBoundArgs *args, KvhBoundOut *out, KvhText *error) {
    (void)instance, (void)error;
    for (uint64_t i = 0; i < args->lengths.count; i++) {
        const uint64_t length = *KVH_AT(uint64_t, args->lengths, i);
        *KVH_AT_MUT(uint64_t, out->counts, i) = length < 64 + RECENT ? length : 64 + RECENT;
    }
    return KVH_OK;
}

static KvhStatus on_prefill_done(KvhInstance *instance, const KvhPrepareArgs *args, KvhPrepareOut *out, KvhText *error) {
    for (uint64_t i = 0; i < args->sequences.count; i++) {
        const KvhSequence *sequence = KVH_AT(KvhSequence, args->sequences, i);
        KvhPlan *plan = KVH_AT_MUT(KvhPlan, out->plans, i);
        for (uint64_t l = 0; l < sequence->layers.count; l++) {
            /* The stride is the host's: its elements may be smaller or larger than ours. */
            const KvhLayer *layer = KVH_AT(KvhLayer, sequence->layers, l);
            uint64_t pinned = DEFAULT_PINNED;
            if (KVH_HAS(layer, Layer2, pinned_rows)) {
                pinned = ((const Layer2 *)layer)->pinned_rows;
            }
            const KvhAllocation request = {
                .struct_size = sizeof request,
                .kind = KVH_MEMORY_TICKET,
                .sequence = i,
                .bytes = 2 * sizeof(KvhRange),
                .alignment = _Alignof(KvhRange),
            };
            void *lent = NULL;
            const KvhStatus status = instance->memory->allocate(instance->host, args->call, &request, &lent, error);
            if (status != KVH_OK) {
                return status;
            }
            KvhRange *ranges = lent;
            KvhLayerPlan *filled = KVH_AT_MUT(KvhLayerPlan, plan->layers, l);
            if (layer->length <= pinned + RECENT) {
                ranges[0] = (KvhRange){.start = 0, .length = layer->length};
                filled->range_count = 1;
                filled->count = (uint32_t)layer->length;
            } else {
                ranges[0] = (KvhRange){.start = 0, .length = pinned};
                ranges[1] = (KvhRange){.start = layer->length - RECENT, .length = RECENT};
                filled->range_count = 2;
                filled->count = (uint32_t)(pinned + RECENT);
            }
            filled->ranges = ranges;
            if (KVH_HAS(filled, LayerPlan2, pinned_rows)) {
                ((LayerPlan2 *)filled)->pinned_rows = pinned;
            }
        }
        plan->kind = KVH_PLAN_SELECT;
    }
    return KVH_OK;
}

static const void *hook(KvhStr id) {
    static const KvhOnPrefillDone1 on_prefill_done_1 = {.bound = bound, .on_prefill_done = on_prefill_done};
    const KvhStr known = KVH_LITERAL(KVH_ON_PREFILL_DONE_1);
    const int same = id.length == known.length && memcmp(id.data, known.data, known.length) == 0;
    return same ? &on_prefill_done_1 : NULL;
}

/* The first generations are as the header says; the second ones have made-up fingerprints. */
static const struct {
    KvhFingerprint first[KVH_FINGERPRINT_COUNT];
    KvhFingerprint second[2];
} fingerprints = {
    .first = KVH_FINGERPRINTS,
    .second = {{KVH_LITERAL("KvhLayer"), 2, 0, UINT64_C(0x1111111111111111)},
               {KVH_LITERAL("KvhLayerPlan"), 2, 0, UINT64_C(0x2222222222222222)}},
};

static const KvhPluginEntry entry = {
    .struct_size = sizeof entry,
    .abi_major = KVH_ABI_MAJOR,
    .abi_minor = KVH_ABI_MINOR + 1,
    .required_host_minor = 0,
    .id = KVH_LITERAL("generation2"),
    .version = KVH_LITERAL("0.2.0"),
    .fingerprints = {.data = &fingerprints,
                     .count = sizeof fingerprints / sizeof(KvhFingerprint),
                     .stride = sizeof(KvhFingerprint)},
    .create = create,
    .destroy = destroy,
    .needs = needs,
    .hook = hook,
};

KVH_META("{\"id\":\"generation2\",\"version\":\"0.2.0\",\"abi_major\":1,\"abi_minor\":1,\"required_host_minor\":0,"
         "\"hooks\":[\"kvh.on_prefill_done/1\"],\"may_need\":[],\"language\":\"c\",\"compiler\":\"" __VERSION__ "\","
         "\"config_schema\":{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{}},\"layouts\":" KVH_LAYOUTS_JSON
         "}");

KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void);

KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void) {
    return &entry;
}
