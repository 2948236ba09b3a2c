// Stand-in for InfiniLM's state of a rank's thread.
#pragma once

#include <vector>

#include "infinicore/tensor.hpp"

namespace infinilm::global_state {

struct ForwardContext {
    std::vector<infinicore::Tensor> kv_cache_vec;
};

inline thread_local ForwardContext context;
inline ForwardContext &get_forward_context() { return context; }

}  // namespace infinilm::global_state
