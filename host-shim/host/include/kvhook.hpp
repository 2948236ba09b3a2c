// The C++17 face of kvhook_host.h: header-only, no exceptions thrown, nothing to link but the host's library.
//
// A Host owns the host of one model, a Sequence frees itself. Calls that can fail answer a Result: a value, or an Error
// with the host's status and its message. Threads are as in kvhook_host.h: any, but for functions with a rank, which are
// called by the thread that drives that rank.
#ifndef KVHOOK_HPP
#define KVHOOK_HPP

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "kvhook_host.h"

namespace kvhook {

/// Why a call failed.
struct Error {
    /// KVHOOK_ERR_*.
    KvhookStatus status = KVHOOK_OK;
    /// What was found, where, what was expected.
    std::string message;
};

/// A value, or an Error.
template <class T>
class [[nodiscard]] Result {
public:
    Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
    Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

    /// Whether there is a value.
    explicit operator bool() const noexcept { return state_.index() == 0; }
    /// The value; only where there is one.
    T &value() & noexcept { return *std::get_if<0>(&state_); }
    const T &value() const & noexcept { return *std::get_if<0>(&state_); }
    T &&value() && noexcept { return std::move(*std::get_if<0>(&state_)); }
    T &operator*() & noexcept { return value(); }
    const T &operator*() const & noexcept { return value(); }
    T *operator->() noexcept { return std::get_if<0>(&state_); }
    const T *operator->() const noexcept { return std::get_if<0>(&state_); }
    /// The error; only where there is no value.
    const Error &error() const noexcept { return *std::get_if<1>(&state_); }

private:
    std::variant<T, Error> state_;
};

/// Nothing, or an Error.
template <>
class [[nodiscard]] Result<void> {
public:
    Result() = default;
    Result(Error error) : error_(std::move(error)) {}

    explicit operator bool() const noexcept { return !error_.has_value(); }
    /// The error; only where the call failed.
    const Error &error() const noexcept { return *error_; }

private:
    std::optional<Error> error_;
};

/// Text as the host takes it, borrowed.
inline KvhStr str(std::string_view text) noexcept {
    KvhStr out{};
    out.data = text.data();
    out.length = text.size();
    return out;
}

/// Text of the host's, borrowed as long as it says.
inline std::string_view view(KvhStr text) noexcept { return {text.data, text.length}; }

/// A vector's elements, for reading.
template <class T>
KvhArray array(const std::vector<T> &elements) noexcept {
    KvhArray out{};
    out.data = elements.data();
    out.count = elements.size();
    out.stride = sizeof(T);
    return out;
}

/// A vector's elements, to be filled.
template <class T>
KvhArrayMut array_mut(std::vector<T> &elements) noexcept {
    KvhArrayMut out{};
    out.data = elements.data();
    out.count = elements.size();
    out.stride = sizeof(T);
    return out;
}

/// A zeroed struct of the C API with its `struct_size` filled.
template <class T>
T sized() noexcept {
    T out{};
    out.struct_size = sizeof(T);
    return out;
}

/// Name of a status: "unknown_uid".
inline std::string_view status_name(KvhookStatus status) noexcept { return view(kvhook_status_name(status)); }
/// Name of a reason: "no_gain".
inline std::string_view reason_name(KvhookReason reason) noexcept { return view(kvhook_reason_name(reason)); }

/// Element types of a cache.
inline constexpr KvhDtype f32{KVH_DTYPE_FLOAT, 32, 1};
inline constexpr KvhDtype f16{KVH_DTYPE_FLOAT, 16, 1};
inline constexpr KvhDtype bf16{KVH_DTYPE_BFLOAT, 16, 1};

/// K or V rows by their strides in bytes; `stride_block` is 0 for a contiguous cache.
inline KvhRows rows(void *base, KvhDtype dtype, std::uint32_t head_dim, std::int64_t stride_token,
                    std::int64_t stride_head, std::int64_t stride_block = 0) noexcept {
    KvhRows out{};
    out.base = base;
    out.stride_block = stride_block;
    out.stride_token = stride_token;
    out.stride_head = stride_head;
    out.stride_element = dtype.bits / 8;
    out.head_dim = head_dim;
    out.dtype = dtype;
    return out;
}

/// Contiguous rows `[tokens, kv_heads, head_dim]`.
inline KvhRows token_major(void *base, KvhDtype dtype, std::uint32_t kv_heads, std::uint32_t head_dim) noexcept {
    const std::int64_t row = std::int64_t{head_dim} * (dtype.bits / 8);
    return rows(base, dtype, head_dim, row * kv_heads, row);
}

/// Contiguous rows `[kv_heads, capacity, head_dim]`.
inline KvhRows head_major(void *base, KvhDtype dtype, std::uint64_t capacity, std::uint32_t head_dim) noexcept {
    const std::int64_t row = std::int64_t{head_dim} * (dtype.bits / 8);
    return rows(base, dtype, head_dim, row, row * static_cast<std::int64_t>(capacity));
}

/// Paged rows `[blocks, block_size, kv_heads, head_dim]`.
inline KvhRows paged_token_major(void *base, KvhDtype dtype, std::uint32_t block_size, std::uint32_t kv_heads,
                                 std::uint32_t head_dim) noexcept {
    const std::int64_t row = std::int64_t{head_dim} * (dtype.bits / 8);
    return rows(base, dtype, head_dim, row * kv_heads, row, row * kv_heads * block_size);
}

/// Paged rows `[blocks, kv_heads, block_size, head_dim]`.
inline KvhRows paged_head_major(void *base, KvhDtype dtype, std::uint32_t block_size, std::uint32_t kv_heads,
                                std::uint32_t head_dim) noexcept {
    const std::int64_t row = std::int64_t{head_dim} * (dtype.bits / 8);
    return rows(base, dtype, head_dim, row, row * block_size, row * block_size * kv_heads);
}

/// A full-attention layer with `length` rows in a contiguous cache.
inline KvhLayer contiguous_layer(std::uint32_t layer, std::uint32_t kv_heads, std::uint64_t length, KvhRows k,
                                 KvhRows v) noexcept {
    KvhLayer out = sized<KvhLayer>();
    out.layer = layer;
    out.kind = KVH_LAYER_FULL;
    out.shared_with = -1;
    out.kv_heads = kv_heads;
    out.length = length;
    out.k = k;
    out.v = v;
    return out;
}

/// A full-attention layer with `length` rows in blocks, numbered by a table that all heads share.
inline KvhLayer paged_layer(std::uint32_t layer, std::uint32_t kv_heads, std::uint64_t length, KvhRows k, KvhRows v,
                            std::uint32_t block_size, const std::vector<std::int32_t> &table) noexcept {
    KvhLayer out = contiguous_layer(layer, kv_heads, length, k, v);
    out.block_size = block_size;
    out.table.data = table.data();
    out.table.count = static_cast<std::uint32_t>(table.size());
    out.table.dtype = KvhDtype{KVH_DTYPE_INT, 32, 1};
    return out;
}

/// What the engine gives to the host: derive from it. The object must outlive the host; functions are called from any
/// thread that calls the host.
class Callbacks {
public:
    virtual ~Callbacks() = default;
    /// Takes a message, borrowed during the call.
    virtual void log(std::int32_t level, std::string_view target, std::string_view message) noexcept {
        (void)level, (void)target, (void)message;
    }
    /// The lowest importance that is wanted: KVH_LOG_*.
    virtual std::int32_t log_max_level() noexcept { return KVH_LOG_INFO; }
};

/// Memory of a rank's device, in the stream's order; without it the host takes its own heap. As Callbacks.
class Memory {
public:
    virtual ~Memory() = default;
    /// Null refuses.
    virtual void *allocate(std::uint32_t rank, std::uint64_t bytes, std::uint64_t alignment, void *stream) noexcept = 0;
    virtual void free(std::uint32_t rank, void *data, std::uint64_t bytes, std::uint64_t alignment,
                      void *stream) noexcept = 0;
};

/// How to make a Host.
struct HostOptions {
    std::string_view engine;
    std::vector<KvhModel> models;
    KvhOffers offers = sized<KvhOffers>();
    Callbacks *callbacks = nullptr;
    Memory *memory = nullptr;
    std::vector<std::string> plugin_folders;
    std::string copy_folder;
};

namespace detail {

/// What the C callbacks get as their context.
struct Context {
    Callbacks *callbacks = nullptr;
    Memory *memory = nullptr;
};

inline void log(void *context, const KvhLogRecord *record) noexcept {
    static_cast<Context *>(context)->callbacks->log(record->level, view(record->target), view(record->message));
}

inline std::int32_t log_max_level(void *context) noexcept {
    return static_cast<Context *>(context)->callbacks->log_max_level();
}

inline void *allocate(void *context, std::uint32_t rank, std::uint64_t bytes, std::uint64_t alignment,
                      void *stream) noexcept {
    return static_cast<Context *>(context)->memory->allocate(rank, bytes, alignment, stream);
}

inline void free(void *context, std::uint32_t rank, void *data, std::uint64_t bytes, std::uint64_t alignment,
                 void *stream) noexcept {
    static_cast<Context *>(context)->memory->free(rank, data, bytes, alignment, stream);
}

/// The caller's buffer for a message.
class ErrorText {
public:
    ErrorText() noexcept {
        text_.data = buffer_;
        text_.capacity = sizeof(buffer_);
    }
    ErrorText(const ErrorText &) = delete;
    ErrorText &operator=(const ErrorText &) = delete;

    KvhText *raw() noexcept { return &text_; }
    Error error(KvhookStatus status) const { return {status, std::string(buffer_, text_.length)}; }

private:
    char buffer_[1024] = {};
    KvhText text_ = sized<KvhText>();
};

/// Calls a function of the C API that takes `arguments` and an error buffer.
template <class Function, class... Arguments>
Result<void> call(Function function, Arguments... arguments) {
    ErrorText text;
    const KvhookStatus status = function(arguments..., text.raw());
    if (status != KVHOOK_OK) {
        return text.error(status);
    }
    return {};
}

}  // namespace detail

/// A live sequence; freed with KVH_FREE_FINISHED when it goes out of scope, unless it was freed before. The Host must
/// outlive it.
class Sequence {
public:
    Sequence() = default;
    Sequence(KvhookHost *host, const KvhookSequence &sequence) noexcept : host_(host), wants_(sequence) {}
    Sequence(Sequence &&other) noexcept : host_(std::exchange(other.host_, nullptr)), wants_(other.wants_) {}
    Sequence &operator=(Sequence &&other) noexcept {
        if (this != &other) {
            end();
            host_ = std::exchange(other.host_, nullptr);
            wants_ = other.wants_;
        }
        return *this;
    }
    Sequence(const Sequence &) = delete;
    Sequence &operator=(const Sequence &) = delete;
    ~Sequence() { end(); }

    /// Its name; 0: no arm took it.
    std::uint64_t uid() const noexcept { return wants_.uid; }
    /// What the host wants for it.
    const KvhookSequence &wants() const noexcept { return wants_; }

    /// Frees it, with a reason of KVH_FREE_*.
    Result<void> free(std::int32_t reason, void *stream = nullptr) {
        KvhookHost *host = std::exchange(host_, nullptr);
        if (host == nullptr || uid() == 0) {
            return {};
        }
        return detail::call(kvhook_free, host, uid(), reason, stream);
    }

private:
    void end() noexcept {
        if (host_ != nullptr && uid() != 0) {
            kvhook_free(std::exchange(host_, nullptr), uid(), KVH_FREE_FINISHED, nullptr, nullptr);
        }
    }

    KvhookHost *host_ = nullptr;
    KvhookSequence wants_ = sized<KvhookSequence>();
};

/// An answer to Host::ask.
struct Answer {
    /// KVHOOK_DECISION_*.
    std::int32_t decision = KVHOOK_DECISION_KEEP;
    /// Why it is a keep.
    KvhookReason reason = KVH_REASON_NONE;
    /// The most rows that each layer keeps.
    std::vector<std::uint64_t> counts;
};

/// The state of a ticket.
struct Verdict {
    /// KVHOOK_VERDICT_*.
    std::int32_t verdict = KVHOOK_VERDICT_PENDING;
    /// Why it was dropped.
    KvhookReason reason = KVH_REASON_NONE;
    /// KVHOOK_MOVE_*, when ready.
    std::int32_t movement = 0;
    /// Whether a commit to fresh rows needs them for every layer; else a layer that keeps all its rows may have none.
    bool rewrites = false;
    /// Position of the next token when the ticket was made.
    std::uint64_t planned_position = 0;
    /// Rows that each layer keeps, when ready.
    std::vector<std::uint64_t> counts;
};

/// What a commit left.
struct Committed {
    /// Rows of each layer.
    std::vector<std::uint64_t> lengths;
    /// Position of the next token.
    std::uint64_t next_position = 0;
};

/// The host of one model. Movable, not copyable.
class Host {
public:
    /// Makes a host without arms.
    static Result<Host> create(const HostOptions &options) {
        Host host;
        host.context_ = new detail::Context{options.callbacks, options.memory};
        host.layers_ = options.models.empty() ? 0 : options.models.front().layers.count;

        KvhookCallbacks callbacks = sized<KvhookCallbacks>();
        callbacks.context = host.context_;
        if (options.callbacks != nullptr) {
            callbacks.log = detail::log;
            callbacks.log_max_level = detail::log_max_level;
        }
        if (options.memory != nullptr) {
            callbacks.allocate = detail::allocate;
            callbacks.free = detail::free;
        }
        std::vector<KvhStr> folders;
        for (const std::string &folder : options.plugin_folders) {
            folders.push_back(str(folder));
        }
        KvhookHostConfig config = sized<KvhookHostConfig>();
        config.engine = str(options.engine);
        config.callbacks = &callbacks;
        config.models = array(options.models);
        config.offers = &options.offers;
        config.plugin_folders = array(folders);
        config.copy_folder = str(options.copy_folder);
        if (auto made = detail::call(kvhook_host_create, &config, &host.raw_); !made) {
            return made.error();
        }
        return host;
    }

    Host(Host &&other) noexcept
        : raw_(std::exchange(other.raw_, nullptr)),
          context_(std::exchange(other.context_, nullptr)),
          layers_(other.layers_) {}
    Host &operator=(Host &&other) noexcept {
        if (this != &other) {
            end();
            raw_ = std::exchange(other.raw_, nullptr);
            context_ = std::exchange(other.context_, nullptr);
            layers_ = other.layers_;
        }
        return *this;
    }
    Host(const Host &) = delete;
    Host &operator=(const Host &) = delete;
    /// Frees every sequence that is still live. Sequence objects must be gone before.
    ~Host() { end(); }

    /// The handle, for functions that have no member here.
    KvhookHost *raw() const noexcept { return raw_; }

    /// Replaces all arms by those of a `kv_plugin` form; `source` is KVHOOK_SOURCE_*.
    Result<void> configure(std::string_view json, std::int32_t source = KVHOOK_SOURCE_OPERATOR) {
        return detail::call(kvhook_configure, raw_, str(json), source);
    }
    /// Adds an arm, or replaces its plugin.
    Result<void> set_arm(const KvhookArm &arm) { return detail::call(kvhook_arm_set, raw_, &arm); }
    /// Adds an arm, or replaces its plugin: by name of arm and plugin, and config.
    Result<void> set_arm(std::string_view name, std::string_view plugin, std::string_view config = {},
                         double weight = 1.0) {
        KvhookArm arm = sized<KvhookArm>();
        arm.name = str(name);
        arm.plugin = str(plugin);
        arm.config = str(config);
        arm.weight = weight;
        return set_arm(arm);
    }
    /// Changes an arm's share.
    Result<void> set_weight(std::string_view arm, double weight) {
        return detail::call(kvhook_arm_weight, raw_, str(arm), weight);
    }
    /// Changes arms by a command, as a whole or not at all; `source` is KVHOOK_SOURCE_*.
    Result<void> control(std::string_view command, std::int32_t source = KVHOOK_SOURCE_OPERATOR) {
        return detail::call(kvhook_control, raw_, str(command), source);
    }
    /// The arms as JSON.
    Result<std::string> arms_json() { return text(kvhook_arms_json); }
    /// Removes an arm.
    Result<void> remove_arm(std::string_view arm) { return detail::call(kvhook_arm_remove, raw_, str(arm)); }

    /// Begins a sequence.
    Result<Sequence> begin(const KvhookBegin &begin) {
        KvhookSequence out = sized<KvhookSequence>();
        if (auto begun = detail::call(kvhook_begin, raw_, &begin, &out); !begun) {
            return begun.error();
        }
        return Sequence(raw_, out);
    }
    /// Begins a sequence of `prompt_length` tokens, its arm chosen by `key`, or named.
    Result<Sequence> begin(std::uint64_t prompt_length, std::string_view key = {}, std::string_view arm = {}) {
        KvhookBegin args = sized<KvhookBegin>();
        args.key = str(key);
        args.arm = str(arm);
        args.prompt_length = prompt_length;
        return begin(args);
    }
    /// Begins a sequence with the rows of a live one.
    Result<Sequence> fork(const Sequence &sequence) {
        KvhookSequence out = sized<KvhookSequence>();
        if (auto forked = detail::call(kvhook_fork, raw_, sequence.uid(), &out); !forked) {
            return forked.error();
        }
        return Sequence(raw_, out);
    }
    /// The last rows were taken away.
    Result<void> cut(std::uint64_t uid, const std::vector<std::uint64_t> &lengths, std::uint64_t next_position) {
        const KvhArray rows = array(lengths);
        return detail::call(kvhook_cut, raw_, uid, &rows, next_position);
    }
    /// Frees every live sequence.
    Result<void> reset(void *stream = nullptr) { return detail::call(kvhook_reset, raw_, stream); }

    /// Is there something to compress? `ask.lengths` is the caller's.
    Result<Answer> ask(const KvhookAsk &ask) {
        Answer answer;
        answer.counts.resize(layers_);
        KvhookAnswer out = sized<KvhookAnswer>();
        out.counts = array_mut(answer.counts);
        if (auto asked = detail::call(kvhook_ask, raw_, &ask, &out); !asked) {
            return asked.error();
        }
        answer.decision = out.decision;
        answer.reason = out.reason;
        return answer;
    }
    /// Prepares sequences on one rank; tickets and reasons are written to the elements.
    Result<void> prepare(std::uint32_t rank, std::vector<KvhookPrepareSequence> &sequences, void *stream = nullptr) {
        return detail::call(kvhook_prepare, raw_, rank, array_mut(sequences), stream);
    }
    /// The state of a ticket. Never waits.
    Result<Verdict> verdict(std::uint64_t ticket) {
        Verdict verdict;
        verdict.counts.resize(layers_);
        KvhookVerdict out = sized<KvhookVerdict>();
        out.counts = array_mut(verdict.counts);
        if (auto asked = detail::call(kvhook_verdict, raw_, ticket, &out); !asked) {
            return asked.error();
        }
        verdict.verdict = out.verdict;
        verdict.reason = out.reason;
        verdict.movement = out.movement;
        verdict.rewrites = out.rewrites != 0;
        verdict.planned_position = out.planned_position;
        return verdict;
    }
    /// Drops a ticket.
    Result<void> drop(std::uint64_t ticket, KvhookReason reason) {
        return detail::call(kvhook_drop, raw_, ticket, reason);
    }
    /// Kept blocks of each layer, for KVHOOK_MOVE_TABLE: ordinals, copied.
    Result<std::vector<std::vector<std::uint32_t>>> table_edit(std::uint64_t ticket) {
        std::vector<KvhookTableEdit> edits(layers_, sized<KvhookTableEdit>());
        if (auto edited = detail::call(kvhook_table_edit, raw_, ticket, array_mut(edits)); !edited) {
            return edited.error();
        }
        std::vector<std::vector<std::uint32_t>> blocks;
        for (const KvhookTableEdit &edit : edits) {
            blocks.emplace_back(edit.blocks, edit.blocks + edit.count);
        }
        return blocks;
    }
    /// Carries out a ticket on one rank; `fresh` is empty for rows that move in place.
    Result<Committed> commit(std::uint32_t rank, std::uint64_t ticket, const std::vector<KvhLayer> &layers,
                             std::uint64_t next_position, const std::vector<KvhLayer> &fresh = {},
                             void *stream = nullptr) {
        Committed committed;
        KvhookCommit args = commit_args(layers, fresh, stream, committed);
        args.ticket = ticket;
        args.next_position = next_position;
        if (auto done = detail::call(kvhook_commit, raw_, rank, &args); !done) {
            return done.error();
        }
        committed.next_position = args.new_next_position;
        return committed;
    }
    /// Both halves in one call, for one rank. `answer` says what came of it.
    Result<Committed> compress(const KvhookAsk &ask, const std::vector<KvhLayer> &layers, Answer &answer,
                               const std::vector<KvhLayer> &fresh = {}) {
        Committed committed;
        KvhookCommit args = commit_args(layers, fresh, nullptr, committed);
        answer.counts.resize(layers_);
        KvhookAnswer out = sized<KvhookAnswer>();
        out.counts = array_mut(answer.counts);
        if (auto done = detail::call(kvhook_compress, raw_, &ask, &args, &out); !done) {
            return done.error();
        }
        answer.decision = out.decision;
        answer.reason = out.reason;
        committed.next_position = args.new_next_position;
        return committed;
    }

    /// Phases in which before_attention is wanted: one atomic load.
    std::uint32_t wants(std::uint32_t rank) const noexcept { return kvhook_wants(raw_, rank); }
    /// Shows one layer of one step.
    Result<void> before_attention(std::uint32_t rank, const KvhookStep &step) {
        return detail::call(kvhook_before_attention, raw_, rank, &step);
    }
    /// Positions of a layer's rows: the host's memory, until the next commit, cut or end of the sequence.
    Result<KvhPositions> positions(std::uint32_t rank, std::uint64_t uid, std::uint32_t layer) {
        KvhPositions out{};
        if (auto asked = detail::call(kvhook_positions, raw_, rank, uid, layer, &out); !asked) {
            return asked.error();
        }
        return out;
    }

    /// The engine got bytes back.
    Result<void> freed(std::uint64_t uid, std::uint64_t bytes) { return detail::call(kvhook_freed, raw_, uid, bytes); }
    /// Figures of an arm, without its reasons.
    Result<KvhookFigures> figures(std::string_view arm) {
        KvhookFigures out = sized<KvhookFigures>();
        if (auto asked = detail::call(kvhook_figures, raw_, str(arm), &out); !asked) {
            return asked.error();
        }
        return out;
    }
    /// Figures of all arms as JSON.
    Result<std::string> figures_json() { return text(kvhook_figures_json); }
    /// Figures of all arms as Prometheus text.
    Result<std::string> figures_prometheus() { return text(kvhook_figures_prometheus); }

private:
    Host() = default;

    void end() noexcept {
        kvhook_host_destroy(std::exchange(raw_, nullptr));
        delete std::exchange(context_, nullptr);
    }

    KvhookCommit commit_args(const std::vector<KvhLayer> &layers, const std::vector<KvhLayer> &fresh, void *stream,
                             Committed &committed) const {
        committed.lengths.resize(layers_);
        KvhookCommit args = sized<KvhookCommit>();
        args.layers = array(layers);
        args.fresh = array(fresh);
        args.stream = stream;
        args.lengths = array_mut(committed.lengths);
        return args;
    }

    /// Asks for a text until the buffer is large enough.
    template <class Function>
    Result<std::string> text(Function function) {
        std::string out(4096, '\0');
        for (;;) {
            KvhText buffer = sized<KvhText>();
            buffer.data = out.data();
            buffer.capacity = out.size();
            auto asked = detail::call(function, raw_, &buffer);
            if (!asked && asked.error().status != KVHOOK_ERR_BUFFER_TOO_SMALL) {
                return asked.error();
            }
            out.resize(buffer.length);
            if (asked) {
                return out;
            }
        }
    }

    KvhookHost *raw_ = nullptr;
    detail::Context *context_ = nullptr;
    std::size_t layers_ = 0;
};

}  // namespace kvhook

#endif
