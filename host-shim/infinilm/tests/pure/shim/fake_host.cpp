#include "fake_host.hpp"

extern "C" std::uint32_t kvhook_wants(KvhookHost *host, std::uint32_t) { return host->phases; }

extern "C" KvhookStatus kvhook_before_attention(KvhookHost *host, std::uint32_t rank, const KvhookStep *step,
                                                KvhText *error) {
    return host->shown(rank, *step, error);
}

extern "C" KvhookStatus kvhook_prepare(KvhookHost *host, std::uint32_t rank, KvhArrayMut sequences, void *stream,
                                       KvhText *error) {
    return host->prepared(rank, sequences, stream, error);
}
