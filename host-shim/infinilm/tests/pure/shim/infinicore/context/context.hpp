// Stand-in for InfiniCore's context: a thread's current device, each with a stream of its own.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "../tensor.hpp"

namespace infinicore::context {

inline thread_local Device current;
inline thread_local bool broken = false;

inline Device getDevice() { return current; }
inline void setDevice(Device device) {
    if (broken) {
        throw std::runtime_error("device lost");
    }
    current = device;
}
inline void *stream_of(Device device) {
    return reinterpret_cast<void *>(0x1000 * static_cast<std::uintptr_t>(device.getType()) + device.getIndex());
}
inline void *getStream() { return stream_of(current); }

}  // namespace infinicore::context
