// What Python gives to the shim inside InfiniLM before each forward: what each rank's thread shows, and prepares.
//
// One forward: kvhook_shim_begin, InferEngine.forward, kvhook_shim_end. Between the two calls the descriptors belong to
// the ranks' threads. Nothing here waits for a forward, and nothing is thrown.
#ifndef KVHOOK_SHIM_H
#define KVHOOK_SHIM_H

#include "kvhook_host.h"

#ifdef __cplusplus
#pragma GCC visibility push(default)
extern "C" {
#endif

// Version of this header. The shim that was compiled into InfiniLM must have the same.
enum { KVHOOK_SHIM_VERSION = 1 };

// A sequence of a forward, on one rank.
typedef struct KvhShimSequence {
    // What is shown of it. `first_token` and `tokens` count on the flattened first axes of the batch: a static cache's
    // row `b` of `n` tokens begins at `b * n`. `cache` is ignored: the shim fills it with the layer's.
    KvhStepSequence step;
    // One for each layer of the model: its rows before the forward. `positions` is ignored.
    const KvhLayer *layers;
} KvhShimSequence;

// One forward of one rank.
typedef struct KvhShimRank {
    // `sizeof(KvhShimRank)` as the caller knows it.
    size_t struct_size;
    // Start of the rank's first cache tensor that is not empty: by it the rank's thread finds its descriptor.
    const void *key;
    // The host; it must live until `kvhook_shim_end` has answered 0.
    KvhookHost *host;
    // The rank, as in the host's models.
    uint32_t rank;
    // Number of layers of the model.
    uint32_t layers;
    // Tokens of the forward: the product of the batch axes. A layer with another number of them is not shown.
    uint64_t batch_tokens;
    // `KvhShimSequence` elements whose queries, keys and values are shown. None: nothing is shown.
    KvhArray sequences;
    // `KvhookPrepareSequence` elements to be prepared after the forward. None: nothing is prepared.
    KvhArrayMut prepares;
    // Out: 1 once `kvhook_prepare` has been called; its answers stand in `prepares`.
    uint32_t prepared;
    // Out: what `kvhook_prepare` returned; `KVHOOK_ERR_UNSUPPORTED` where it could not be called.
    KvhookStatus prepare_status;
    // Out: layers that were shown.
    uint32_t shown;
    // Out: the first error met while showing, or `KVHOOK_OK`. The forward is not disturbed by it.
    KvhookStatus show_status;
    // Lent by the caller. Out: the message of the first error, of either status.
    KvhText error;
} KvhShimRank;

// `KVHOOK_SHIM_VERSION` of the header that the shim was compiled with.
//
// Thread: any.
uint32_t kvhook_shim_version(void);

// Takes the host from its library, which the caller has loaded before, so that both call the same one. The second time
// nothing happens.
//
// Thread: any; before the first `kvhook_shim_begin`.
// Returns `KVHOOK_ERR_DLOPEN` when the file is not loaded or lacks a function, `KVHOOK_ERR_INVALID_ARGUMENT` when
// another host's library was attached before.
int32_t kvhook_shim_attach(const char *host_library, KvhText *error);

// Hands descriptors to the ranks' threads, all or none: each finds its own by `key` when its next forward begins. The
// outputs are cleared. `ranks` and all that they lead to must stay in place and unchanged until `kvhook_shim_end` has
// answered 0.
//
// Thread: any.
// Returns `KVHOOK_ERR_INVALID_ARGUMENT` when nothing is attached, a `struct_size` is another, `key` or `host` is null or
// a key is in use; then nothing is registered.
int32_t kvhook_shim_begin(KvhShimRank *ranks, uint64_t count, KvhText *error);

// Takes descriptors back; unknown ones are ignored. Returns how many of them are still used by their rank's thread: 0
// after a forward that returned. More after one that raised, when another rank was still under way: then their memory
// and host must live on until a later call answers 0.
//
// Thread: any.
uint64_t kvhook_shim_end(KvhShimRank *ranks, uint64_t count);

#ifdef __cplusplus
}
#pragma GCC visibility pop
#endif

#endif
