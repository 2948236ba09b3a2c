// A host whose handle says what its functions do.
#pragma once

#include <cstdint>
#include <functional>

#include "kvhook_host.h"

struct KvhookHost {
    std::uint32_t phases = 0;
    std::function<KvhookStatus(std::uint32_t rank, const KvhookStep &step, KvhText *error)> shown;
    std::function<KvhookStatus(std::uint32_t rank, KvhArrayMut sequences, void *stream, KvhText *error)> prepared;
};
