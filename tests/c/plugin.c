/* A complete plugin in plain C11: `window-c` keeps 4 attention sinks and the last `recent` rows of each layer.
 *
 * Build: cc -std=c11 -shared -fPIC -Wl,-z,nodelete -I<include> plugin.c -o libkvhook_window-c.so
 *
 * The sanitizer tests plant bugs in it: PLANT_OVERFLOW writes behind memory that the host lent, PLANT_RACE counts calls
 * of all instances without a lock. */
#include "kvhook.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SINKS = 4, DEFAULT_RECENT = 64 };

struct KvhInstance {
    KvhHostState *host;
    const KvhMemory1 *memory;
    uint64_t recent;
};

#ifdef PLANT_RACE
#include <threads.h>

static volatile uint64_t calls;

/* Counts slowly, so that two threads are sure to be here at once: the host's own locks would order short visits. */
static void count_call(void) {
    const struct timespec pause = {.tv_sec = 0, .tv_nsec = 10 * 1000 * 1000};
    for (int i = 0; i < 20; i++) {
        calls++;
        thrd_sleep(&pause, NULL);
    }
}
#endif

/* Writes a message, cut at what the caller's buffer takes. The messages are ASCII, so any cut is a whole character. */
static KvhStatus fail(KvhText *error, KvhStatus status, const char *format, ...) {
    char text[160];
    va_list arguments;
    va_start(arguments, format);
    const int written = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (error != NULL && error->data != NULL && written > 0) {
        size_t length = (size_t)written < sizeof text ? (size_t)written : sizeof text - 1;
        length = length < error->capacity ? length : error->capacity;
        memcpy(error->data, text, length);
        error->length = length;
    }
    return status;
}

/* Whether a struct of the host's is there, with all its fields up to `field`. */
#define HAS(pointer, type, field) ((pointer) != NULL && KVH_HAS(pointer, type, field))

/* What a function answers that was called without what it needs. */
static KvhStatus not_called_right(KvhText *error, const char *function) {
    return fail(error, KVH_ERR_INVALID_ARGUMENT, "%s was called with a null argument, or one of another version", function);
}

/* Reads `recent=N` or `{"recent": N}`; an empty config leaves the default. */
static int read_config(KvhStr config, uint64_t *recent) {
    char text[64], digits[10], brace[2], rest[2];
    if (config.length >= sizeof text) {
        return 0;
    }
    if (config.length > 0) {
        memcpy(text, config.data, config.length);
    }
    text[config.length] = '\0';
    *recent = DEFAULT_RECENT;
    if (text[strspn(text, " \t\r\n")] == '\0') {
        return 1;
    }
    /* `rest` takes what should not be there. */
    if (sscanf(text, " recent = %9[0-9] %1s", digits, rest) != 1 &&
        sscanf(text, " { \"recent\" : %9[0-9] %1[}] %1s", digits, brace, rest) != 2) {
        return 0;
    }
    *recent = strtoull(digits, NULL, 10);
    return *recent > 0;
}

static KvhStatus create(const KvhCreateArgs *args, KvhInstance **instance, KvhText *error) {
    if (!HAS(args, KvhCreateArgs, config) || instance == NULL) {
        return not_called_right(error, "create");
    }
    uint64_t recent = 0;
    if (!read_config(args->config, &recent)) {
        return fail(error, KVH_ERR_CONFIG,
                    "the config is not one of window-c: write recent=N, with N a whole number from 1 to 999999999");
    }
    if (args->model->device.device_type != KVH_DEVICE_CPU) {
        return fail(error, KVH_ERR_UNSUPPORTED, "window-c plans for caches in ordinary memory (device type 1), not for type %d",
                    (int)args->model->device.device_type);
    }
    const KvhStr memory_id = KVH_LITERAL(KVH_MEMORY_1);
    const KvhMemory1 *memory = args->host->service(args->host->state, memory_id);
    if (memory == NULL) {
        return fail(error, KVH_ERR_UNSUPPORTED, "the host has no service " KVH_MEMORY_1);
    }
    KvhInstance *made = malloc(sizeof *made);
    if (made == NULL) {
        return fail(error, KVH_ERR_OUT_OF_MEMORY, "no memory for an instance");
    }
    *made = (KvhInstance){.host = args->host->state, .memory = memory, .recent = recent};
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

static uint64_t rows_kept(const KvhInstance *instance, uint64_t length) {
    const uint64_t most = SINKS + instance->recent;
    return length < most ? length : most;
}

static KvhStatus bound(KvhInstance *instance, const KvhBoundArgs *args, KvhBoundOut *out, KvhText *error) {
    if (instance == NULL || !HAS(args, KvhBoundArgs, segments) || !HAS(out, KvhBoundOut, reason)) {
        return not_called_right(error, "bound");
    }
#ifdef PLANT_RACE
    count_call();
#endif
    int dropped = 0;
    for (uint64_t i = 0; i < args->lengths.count; i++) {
        const uint64_t length = *KVH_AT(uint64_t, args->lengths, i);
        const uint64_t kept = rows_kept(instance, length);
        *KVH_AT_MUT(uint64_t, out->counts, i) = kept;
        dropped |= kept < length;
    }
    out->reason = dropped ? KVH_REASON_NONE : KVH_REASON_TOO_SHORT;
    return KVH_OK;
}

/* Fills one layer's plan with ranges in ticket memory. */
static KvhStatus plan_layer(KvhInstance *instance, KvhCall *call, uint64_t sequence, uint64_t length, KvhLayerPlan *plan,
                            KvhText *error) {
    const KvhAllocation request = {
        .struct_size = sizeof request,
        .kind = KVH_MEMORY_TICKET,
        .sequence = sequence,
        .bytes = 2 * sizeof(KvhRange),
        .alignment = _Alignof(KvhRange),
    };
    void *lent = NULL;
    const KvhStatus status = instance->memory->allocate(instance->host, call, &request, &lent, error);
    if (status != KVH_OK) {
        return status;
    }
    KvhRange *ranges = lent;
    const uint64_t kept = rows_kept(instance, length);
    uint32_t count = 0;
    if (kept == length) {
        ranges[count++] = (KvhRange){.start = 0, .length = length};
    } else {
        ranges[count++] = (KvhRange){.start = 0, .length = SINKS};
        ranges[count++] = (KvhRange){.start = length - instance->recent, .length = instance->recent};
    }
#ifdef PLANT_OVERFLOW
    ranges[2] = ranges[0];
#endif
    plan->count = (uint32_t)kept;
    plan->range_count = count;
    plan->ranges = ranges;
    return KVH_OK;
}

static KvhStatus on_prefill_done(KvhInstance *instance, const KvhPrepareArgs *args, KvhPrepareOut *out, KvhText *error) {
    if (instance == NULL || !HAS(args, KvhPrepareArgs, stream) || !HAS(out, KvhPrepareOut, plans)) {
        return not_called_right(error, "on_prefill_done");
    }
    for (uint64_t i = 0; i < args->sequences.count; i++) {
        const KvhSequence *sequence = KVH_AT(KvhSequence, args->sequences, i);
        KvhPlan *plan = KVH_AT_MUT(KvhPlan, out->plans, i);
        int dropped = 0;
        for (uint64_t l = 0; l < sequence->layers.count; l++) {
            const uint64_t length = KVH_AT(KvhLayer, sequence->layers, l)->length;
            if (length == 0) {
                continue;
            }
            KvhLayerPlan *layer = KVH_AT_MUT(KvhLayerPlan, plan->layers, l);
            const KvhStatus status = plan_layer(instance, args->call, i, length, layer, error);
            if (status != KVH_OK) {
                return status;
            }
            dropped |= rows_kept(instance, length) < length;
        }
        plan->kind = dropped ? KVH_PLAN_SELECT : KVH_PLAN_KEEP;
        plan->reason = dropped ? KVH_REASON_NONE : KVH_REASON_TOO_SHORT;
    }
    return KVH_OK;
}

static const void *hook(KvhStr id) {
    static const KvhOnPrefillDone1 on_prefill_done_1 = {.bound = bound, .on_prefill_done = on_prefill_done};
    const KvhStr known = KVH_LITERAL(KVH_ON_PREFILL_DONE_1);
    const int same = id.length == known.length && memcmp(id.data, known.data, known.length) == 0;
    return same ? &on_prefill_done_1 : NULL;
}

static const KvhFingerprint fingerprints[] = KVH_FINGERPRINTS;

static const KvhPluginEntry entry = {
    .struct_size = sizeof entry,
    .abi_major = KVH_ABI_MAJOR,
    .abi_minor = KVH_ABI_MINOR,
    .required_host_minor = 0,
    .id = KVH_LITERAL("window-c"),
    .version = KVH_LITERAL("0.1.0"),
    .fingerprints = {.data = fingerprints, .count = KVH_FINGERPRINT_COUNT, .stride = sizeof(KvhFingerprint)},
    .create = create,
    .destroy = destroy,
    .needs = needs,
    .hook = hook,
};

KVH_META("{\"id\":\"window-c\",\"version\":\"0.1.0\",\"abi_major\":1,\"abi_minor\":0,\"required_host_minor\":0,"
         "\"hooks\":[\"kvh.on_prefill_done/1\"],\"may_need\":[],\"language\":\"c\",\"compiler\":\"" __VERSION__ "\","
         "\"config_schema\":{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{\"recent\":"
         "{\"description\":\"Rows at the end that are kept.\",\"type\":\"integer\",\"default\":64,\"minimum\":1,"
         "\"maximum\":999999999}}},\"layouts\":" KVH_LAYOUTS_JSON "}");

KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void);

KVH_EXPORT const KvhPluginEntry *kvh_plugin_entry_v1(void) {
    return &entry;
}
