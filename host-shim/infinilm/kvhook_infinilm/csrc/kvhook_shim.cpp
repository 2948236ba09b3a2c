// The shim inside InfiniLM: shows queries, keys and values to the host before attention, and prepares sequences after
// the forward, on each rank's own thread and stream. Python says what, by the descriptors of kvhook_shim.h; InfiniLM's
// own sources call the three functions kvhook_on_* at the end of this file.
//
// Nothing is thrown out of here and nothing waits: a lock is held only to look a descriptor up, never during a call of
// the host.

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "global_state/global_state.hpp"
#include "infinicore/context/context.hpp"
#include "infinicore/tensor.hpp"
#include "kvhook.hpp"
#include "kvhook_shim.h"

namespace {

using infinicore::Device;
using infinicore::Tensor;

/// The functions of the host's library: found by name, never linked.
struct HostFunctions {
    decltype(&kvhook_wants) wants = nullptr;
    decltype(&kvhook_before_attention) before_attention = nullptr;
    decltype(&kvhook_prepare) prepare = nullptr;
};

/// A descriptor between begin and end.
struct Entry {
    KvhShimRank *rank;
    /// Its thread is inside a forward.
    bool used;
    /// It was taken back meanwhile, and goes when its thread is done with it.
    bool ended;
};

/// What all threads share.
struct Registry {
    std::mutex mutex;
    HostFunctions host;
    std::vector<Entry> entries;
};

/// Never destroyed: ranks' threads may outlive the library's statics.
Registry &registry() {
    static Registry *const shared = new Registry;
    return *shared;
}

/// Number of entries: the one check that a forward costs when nobody looks.
std::atomic<std::size_t> registered{0};

/// Fills a caller's buffer, cut at a whole character.
void write(KvhText *text, std::string_view message) noexcept {
    if (text == nullptr) {
        return;
    }
    std::size_t length = std::min(message.size(), text->data == nullptr ? 0 : text->capacity);
    while (length > 0 && length < message.size() && (static_cast<unsigned char>(message[length]) & 0xC0) == 0x80) {
        --length;
    }
    if (length > 0) {
        std::memcpy(text->data, message.data(), length);
    }
    text->length = length;
}

std::int32_t refuse(KvhText *text, KvhookStatus status, const std::string &message) {
    write(text, message);
    return status;
}

/// The first error's buffer; null for later ones.
KvhText *first_error(KvhShimRank &rank) noexcept { return rank.error.length == 0 ? &rank.error : nullptr; }

void fail(KvhShimRank &rank, KvhookStatus &status, KvhookStatus found, std::string_view message) noexcept {
    if (status == KVHOOK_OK) {
        status = found;
        write(first_error(rank), message);
    }
}

template <class T>
const T &element(const KvhArray &array, std::uint64_t index) noexcept {
    return *reinterpret_cast<const T *>(static_cast<const std::byte *>(array.data) + index * array.stride);
}

bool served(const Device &device) noexcept {
    return device.getType() == Device::Type::CPU || device.getType() == Device::Type::NVIDIA;
}

/// Makes a device the thread's current one for its lifetime, so that its stream is the rank's and what is called finds
/// it; afterwards the thread is as it was.
class OnDevice {
public:
    explicit OnDevice(const Device &device) {
        if (device.getType() == Device::Type::CPU) {
            return;
        }
        before_ = infinicore::context::getDevice();
        infinicore::context::setDevice(device);
        set_ = true;
        stream_ = infinicore::context::getStream();
    }
    OnDevice(const OnDevice &) = delete;
    OnDevice &operator=(const OnDevice &) = delete;
    ~OnDevice() {
        try {
            if (set_) {
                infinicore::context::setDevice(before_);
            }
        } catch (...) {
            // It was current a moment ago; InfiniLM meets the fault itself with its next call.
        }
    }

    /// Null on the CPU.
    void *stream() const noexcept { return stream_; }

private:
    Device before_;
    bool set_ = false;
    void *stream_ = nullptr;
};

/// A forward of this thread's rank.
class Run {
public:
    Run() = default;
    Run(const Run &) = delete;
    Run &operator=(const Run &) = delete;
    /// The thread ends: also after a forward that has thrown.
    ~Run() { release(); }

    /// Finds the rank's descriptor; false where there is none.
    bool begin();
    /// Shows one layer.
    void show(std::size_t layer, const Tensor &q, const Tensor &k, const Tensor &v);
    /// Prepares what is to be prepared.
    void prepare();
    /// The descriptor is its owner's again.
    void release() noexcept;

    KvhShimRank *rank() noexcept { return rank_; }

private:
    void check_sequences();
    /// Collects the sequences that lie in `tokens` from `first` on; they count from there.
    void collect(std::size_t layer, std::uint64_t first, std::uint64_t tokens);

    KvhShimRank *rank_ = nullptr;
    HostFunctions host_;
    const infinilm::global_state::ForwardContext *context_ = nullptr;
    Device device_;
    /// Phases of the sequences that are shown; 0: none are.
    std::uint32_t phases_ = 0;
    std::vector<KvhStepSequence> steps_;
};

bool Run::begin() {
    release();
    context_ = &infinilm::global_state::get_forward_context();
    const auto &caches = context_->kv_cache_vec;
    const auto first = std::find_if(caches.begin(), caches.end(), [](const Tensor &cache) { return !cache.empty(); });
    if (first == caches.end()) {
        return false;
    }
    const void *key = (*first)->data();
    device_ = (*first)->device();
    {
        Registry &shared = registry();
        const std::lock_guard<std::mutex> lock(shared.mutex);
        for (Entry &entry : shared.entries) {
            if (entry.rank->key == key && !entry.ended) {
                entry.used = true;
                rank_ = entry.rank;
                host_ = shared.host;
            }
        }
    }
    if (rank_ == nullptr) {
        return false;
    }
    check_sequences();
    return true;
}

void Run::check_sequences() {
    phases_ = 0;
    std::uint32_t phases = 0;
    for (std::uint64_t i = 0; i < rank_->sequences.count; ++i) {
        const KvhShimSequence &sequence = element<KvhShimSequence>(rank_->sequences, i);
        const KvhStepSequence &step = sequence.step;
        if (sequence.layers == nullptr || step.tokens > rank_->batch_tokens ||
            step.first_token > rank_->batch_tokens - step.tokens) {
            return fail(*rank_, rank_->show_status, KVHOOK_ERR_INVALID_ARGUMENT,
                        "sequence " + std::to_string(step.uid) + " has " + std::to_string(step.tokens) +
                            " tokens from " + std::to_string(step.first_token) + " on in a forward of " +
                            std::to_string(rank_->batch_tokens) + ", or no layers");
        }
        phases |= step.phase;
    }
    if (phases != 0 && !served(device_)) {
        return fail(*rank_, rank_->show_status, KVHOOK_ERR_UNSUPPORTED,
                    "nothing is shown on a device of type " + Device::toString(device_.getType()));
    }
    phases_ = phases;
}

void Run::release() noexcept {
    if (rank_ == nullptr) {
        return;
    }
    Registry &shared = registry();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    const auto entry = std::find_if(shared.entries.begin(), shared.entries.end(),
                                    [this](const Entry &entry) { return entry.rank == rank_; });
    if (entry != shared.entries.end()) {
        entry->used = false;
        if (entry->ended) {
            shared.entries.erase(entry);
            registered.store(shared.entries.size(), std::memory_order_release);
        }
    }
    rank_ = nullptr;
}

/// A tensor `[tokens, heads, dim]`, or `[rows, tokens, heads, dim]` whose first two axes may not lie in one stride.
struct Heads {
    std::byte *data = nullptr;
    Device device;
    KvhDtype dtype{};
    std::int64_t rows = 1;
    std::int64_t row_stride = 0;
    std::array<std::int64_t, 3> shape{};
    std::array<std::int64_t, 3> strides{};

    /// False where it is not such a tensor, or of another element type than the host knows.
    bool read(const Tensor &tensor) {
        switch (tensor->dtype()) {
        case infinicore::DataType::F32: dtype = kvhook::f32; break;
        case infinicore::DataType::F16: dtype = kvhook::f16; break;
        case infinicore::DataType::BF16: dtype = kvhook::bf16; break;
        default: return false;
        }
        const std::size_t axes = tensor->ndim();
        if (axes != 3 && axes != 4) {
            return false;
        }
        // The contract takes no const pointer; hooks look and do not write.
        data = const_cast<std::byte *>(tensor->data());
        device = tensor->device();
        for (std::size_t axis = 0; axis < 3; ++axis) {
            shape[axis] = static_cast<std::int64_t>(tensor->size(axes - 3 + axis));
            strides[axis] = tensor->stride(axes - 3 + axis);
        }
        if (axes == 4) {
            rows = static_cast<std::int64_t>(tensor->size(0));
            row_stride = tensor->stride(0);
        }
        return true;
    }

    /// Whether all rows lie in one stride.
    bool flat() const noexcept { return rows == 1 || shape[0] == 1 || row_stride == shape[0] * strides[0]; }

    /// All rows as one.
    void flatten() noexcept {
        if (rows != 1 && shape[0] == 1) {
            strides[0] = row_stride;
        }
        shape[0] *= rows;
        rows = 1;
    }

    /// One row. Borrows this.
    KvhTensor row(std::int64_t index) noexcept {
        KvhTensor out{};
        out.data = data + index * row_stride * (dtype.bits / 8);
        out.device.device_type = device.getType() == Device::Type::CPU ? KVH_DEVICE_CPU : KVH_DEVICE_CUDA;
        out.device.device_id = static_cast<std::int32_t>(device.getIndex());
        out.ndim = static_cast<std::int32_t>(shape.size());
        out.dtype = dtype;
        out.shape = shape.data();
        out.strides = strides.data();
        return out;
    }
};

void Run::collect(std::size_t layer, std::uint64_t first, std::uint64_t tokens) {
    steps_.clear();
    for (std::uint64_t i = 0; i < rank_->sequences.count; ++i) {
        const KvhShimSequence &sequence = element<KvhShimSequence>(rank_->sequences, i);
        KvhStepSequence step = sequence.step;
        if (step.first_token < first || step.first_token + step.tokens > first + tokens) {
            continue;
        }
        step.struct_size = sizeof(KvhStepSequence);
        step.first_token -= first;
        step.cache = &sequence.layers[layer];
        steps_.push_back(step);
    }
}

void Run::show(std::size_t layer, const Tensor &q_tensor, const Tensor &k_tensor, const Tensor &v_tensor) {
    if (phases_ == 0 || (host_.wants(rank_->host, rank_->rank) & phases_) == 0) {
        return;
    }
    if (layer >= rank_->layers || layer >= context_->kv_cache_vec.size()) {
        return fail(*rank_, rank_->show_status, KVHOOK_ERR_INVALID_ARGUMENT,
                    "layer " + std::to_string(layer) + " of a model of " + std::to_string(rank_->layers));
    }
    if (context_->kv_cache_vec[layer].empty()) {
        return;
    }
    Heads q, k, v;
    if (!q.read(q_tensor) || !k.read(k_tensor) || !v.read(v_tensor)) {
        return fail(*rank_, rank_->show_status, KVHOOK_ERR_UNSUPPORTED,
                    "layer " + std::to_string(layer) + ": queries, keys and values must have 3 or 4 axes of F32, F16 " +
                        "or BF16, not " + q_tensor->info());
    }
    const bool flat = q.flat() && k.flat() && v.flat();
    if (flat) {
        q.flatten(), k.flatten(), v.flatten();
    }
    if (q.rows != k.rows || q.rows != v.rows || q.shape[0] != k.shape[0] || q.shape[0] != v.shape[0] ||
        static_cast<std::uint64_t>(q.rows * q.shape[0]) != rank_->batch_tokens) {
        return fail(*rank_, rank_->show_status, KVHOOK_ERR_INVALID_ARGUMENT,
                    "layer " + std::to_string(layer) + " has not the " + std::to_string(rank_->batch_tokens) +
                        " tokens of the forward: " + q_tensor->info());
    }
    const OnDevice on_device(device_);
    const auto row_tokens = static_cast<std::uint64_t>(q.shape[0]);
    std::uint64_t placed = 0;
    for (std::int64_t row = 0; row < q.rows; ++row) {
        collect(layer, static_cast<std::uint64_t>(row) * row_tokens, row_tokens);
        placed += steps_.size();
        if (steps_.empty()) {
            continue;
        }
        const KvhTensor q_row = q.row(row), k_row = k.row(row), v_row = v.row(row);
        KvhookStep step = kvhook::sized<KvhookStep>();
        step.layer = static_cast<std::uint32_t>(layer);
        step.q = &q_row;
        step.k = &k_row;
        step.v = &v_row;
        step.sequences = kvhook::array(steps_);
        step.stream = on_device.stream();
        const KvhookStatus status = host_.before_attention(rank_->host, rank_->rank, &step, first_error(*rank_));
        if (status != KVHOOK_OK && rank_->show_status == KVHOOK_OK) {
            rank_->show_status = status;
        }
    }
    if (placed != rank_->sequences.count) {
        return fail(*rank_, rank_->show_status, KVHOOK_ERR_INVALID_ARGUMENT,
                    "a sequence lies in more than one row of the batch");
    }
    ++rank_->shown;
}

void Run::prepare() {
    if (rank_->prepares.count == 0) {
        return;
    }
    if (!served(device_)) {
        return fail(*rank_, rank_->prepare_status, KVHOOK_ERR_UNSUPPORTED,
                    "nothing is prepared on a device of type " + Device::toString(device_.getType()));
    }
    const OnDevice on_device(device_);
    rank_->prepared = 1;
    rank_->prepare_status =
        host_.prepare(rank_->host, rank_->rank, rank_->prepares, on_device.stream(), first_error(*rank_));
}

/// The forward that this thread is in, if its rank has a descriptor. A plain pointer: the check that each layer costs
/// when nobody looks. Null outside of RUN, so that the dummy forwards of graph compiling are silent.
thread_local Run *current = nullptr;

/// Calls `body`, and keeps what it throws as an error of the rank.
template <class Body>
void contained(KvhShimRank &rank, KvhookStatus &status, Body body) noexcept {
    try {
        body();
    } catch (const std::exception &error) {
        fail(rank, status, KVHOOK_ERR_INTERNAL, error.what());
    } catch (...) {
        fail(rank, status, KVHOOK_ERR_INTERNAL, "unknown exception in the shim");
    }
}

}  // namespace

extern "C" std::uint32_t kvhook_shim_version(void) { return KVHOOK_SHIM_VERSION; }

extern "C" std::int32_t kvhook_shim_attach(const char *host_library, KvhText *error) try {
    if (host_library == nullptr) {
        return refuse(error, KVHOOK_ERR_INVALID_ARGUMENT, "`host_library` is null");
    }
    const std::string path = host_library;
    // Only a library that is loaded already: the handles that Python gives are of that one.
    void *library = dlopen(host_library, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD | RTLD_NODELETE);
    if (library == nullptr) {
        const char *reason = dlerror();
        return refuse(error, KVHOOK_ERR_DLOPEN,
                      path + " is not loaded in this process" + (reason == nullptr ? "" : std::string(": ") + reason));
    }
    HostFunctions host;
    host.wants = reinterpret_cast<decltype(host.wants)>(dlsym(library, "kvhook_wants"));
    host.before_attention = reinterpret_cast<decltype(host.before_attention)>(dlsym(library, "kvhook_before_attention"));
    host.prepare = reinterpret_cast<decltype(host.prepare)>(dlsym(library, "kvhook_prepare"));
    if (host.wants == nullptr || host.before_attention == nullptr || host.prepare == nullptr) {
        return refuse(error, KVHOOK_ERR_DLOPEN, path + " is not kvhook's host: it lacks one of kvhook_wants, " +
                                                    "kvhook_before_attention and kvhook_prepare");
    }
    Registry &shared = registry();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    if (shared.host.wants != nullptr && shared.host.wants != host.wants) {
        return refuse(error, KVHOOK_ERR_INVALID_ARGUMENT, "another host's library is attached than " + path);
    }
    shared.host = host;
    return KVHOOK_OK;
} catch (...) {
    write(error, "out of memory");
    return KVHOOK_ERR_INTERNAL;
}

extern "C" std::int32_t kvhook_shim_begin(KvhShimRank *ranks, std::uint64_t count, KvhText *error) try {
    Registry &shared = registry();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    if (shared.host.wants == nullptr) {
        return refuse(error, KVHOOK_ERR_INVALID_ARGUMENT, "no host is attached; call kvhook_shim_attach first");
    }
    for (std::uint64_t i = 0; i < count; ++i) {
        const KvhShimRank &rank = ranks[i];
        const std::string name = "descriptor " + std::to_string(i);
        if (rank.struct_size != sizeof(KvhShimRank)) {
            return refuse(error, KVHOOK_ERR_INVALID_ARGUMENT,
                          name + " has struct_size " + std::to_string(rank.struct_size) + ", the shim's is " +
                              std::to_string(sizeof(KvhShimRank)) + "; insert it again and build InfiniLM");
        }
        if (rank.key == nullptr || rank.host == nullptr) {
            return refuse(error, KVHOOK_ERR_INVALID_ARGUMENT, name + " has no key or no host");
        }
        const auto same_key = [&rank](const KvhShimRank &other) { return other.key == rank.key; };
        if (std::any_of(ranks, ranks + i, same_key) ||
            std::any_of(shared.entries.begin(), shared.entries.end(),
                        [&](const Entry &entry) { return same_key(*entry.rank); })) {
            return refuse(error, KVHOOK_ERR_INVALID_ARGUMENT, name + " has a key that is in use");
        }
    }
    shared.entries.reserve(shared.entries.size() + count);
    for (std::uint64_t i = 0; i < count; ++i) {
        KvhShimRank &rank = ranks[i];
        rank.prepared = 0;
        rank.prepare_status = KVHOOK_OK;
        rank.shown = 0;
        rank.show_status = KVHOOK_OK;
        rank.error.length = 0;
        shared.entries.push_back(Entry{&rank, false, false});
    }
    registered.store(shared.entries.size(), std::memory_order_release);
    return KVHOOK_OK;
} catch (...) {
    write(error, "out of memory");
    return KVHOOK_ERR_INTERNAL;
}

extern "C" std::uint64_t kvhook_shim_end(KvhShimRank *ranks, std::uint64_t count) {
    Registry &shared = registry();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    const auto asked = [&](const Entry &entry) {
        return std::any_of(ranks, ranks + count, [&](const KvhShimRank &rank) { return &rank == entry.rank; });
    };
    std::uint64_t used = 0;
    auto entry = shared.entries.begin();
    while (entry != shared.entries.end()) {
        if (!asked(*entry)) {
            ++entry;
        } else if (entry->used) {
            entry->ended = true;
            ++used;
            ++entry;
        } else {
            entry = shared.entries.erase(entry);
        }
    }
    registered.store(shared.entries.size(), std::memory_order_release);
    return used;
}

/// Called by a rank's thread when it begins a forward that was asked for from outside.
void kvhook_on_run() noexcept {
    current = nullptr;
    if (registered.load(std::memory_order_acquire) == 0) {
        return;
    }
    thread_local Run run;
    try {
        current = run.begin() ? &run : nullptr;
    } catch (...) {
        // Out of memory for a message: this forward is not shown, and nothing of it prepared.
        run.release();
    }
}

/// Called by each attention layer before K and V are written and attention runs. RoPE is applied.
void kvhook_on_attention(std::size_t layer, const Tensor &q, const Tensor &k, const Tensor &v) noexcept {
    if (Run *run = current; run != nullptr) {
        contained(*run->rank(), run->rank()->show_status, [&] { run->show(layer, q, k, v); });
    }
}

/// Called by a rank's thread when the forward's work is enqueued, eager or by a graph.
void kvhook_on_forward_done() noexcept {
    if (Run *run = current; run != nullptr) {
        contained(*run->rank(), run->rank()->prepare_status, [&] { run->prepare(); });
        run->release();
        current = nullptr;
    }
}
