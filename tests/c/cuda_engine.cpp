// An engine with its cache on a CUDA device, with nothing but the driver API and kvhook.hpp. It compresses the same cache
// twice, on the device and in ordinary memory, and compares what is left: every byte, every length, every position.
//
//   cuda_engine PLUGIN [--config TEXT] [--cache contiguous|paged] [--dtype f32|f16|bf16|fp8] [--ranks N] [--devices N]
//               [--rounds N] [--prompt TOKENS] [--images 0|1] [--late TOKENS] [--bound SHARE] [--ties SHARE]
//               [--room QUERIES] [--blocked 0|1] [--copies FOLDER]
//
// PLUGIN is the path of a library. Rank r has its cache on device r modulo the number of devices. Each round compresses, with so many tokens appended between prepare and commit. With a
// bound, elements of rows may differ by that share of their row's largest. With ties, so many of a head's rows may be others
// than in ordinary memory. With room, the host may hold no more memory than a plugin of so many queries may: those, 4 bytes
// for each kept row and head, and 64 MiB. A prompt above 4,096 tokens fills the whole cache. With images, two stretches of the
// prompt are images. With blocked, the stream waits during each prepare and commit, which must not.
// Prints a line with OK, or "skipped" where there are not so many CUDA devices; ends with 1 when anything is not as it should be.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_driver.hpp"
#include "kvhook.hpp"
#include "toy_model.hpp"

namespace {

constexpr std::uint32_t LAYERS = 3, KV_HEADS = 2, Q_HEADS = 8, DIM = 64, BLOCK = 16;
constexpr std::size_t CAPACITY = 4096, GROWTH = 400;
constexpr std::uint64_t MEBIBYTE = 1 << 20;
// Bytes before and behind the cache that nobody may write.
constexpr std::size_t GUARD = 256;
constexpr unsigned char UNTOUCHED = 0xa5;

struct Options {
    std::string plugin, config, copies;
    bool paged = false;
    KvhDtype dtype = kvhook::bf16;
    std::size_t ranks = 1, devices = 1, rounds = 2, late = 3, prompt = 1200;
    bool images = false, blocked = false;
    double bound = 0, ties = 0;
    // Queries of a window; negative: room is not looked at.
    long room = -1;

    std::size_t element() const { return dtype.bits / 8; }
    std::size_t capacity() const { return std::max(CAPACITY, prompt); }
};

[[noreturn]] void fail(const std::string &what) { throw std::runtime_error(what); }

template <class T>
T take(kvhook::Result<T> result, const char *what) {
    if (!result) fail(std::string(what) + ": " + std::string(kvhook::status_name(result.error().status)) + ": " + result.error().message);
    return std::move(result).value();
}

void take(const kvhook::Result<void> &result, const char *what) {
    if (!result) fail(std::string(what) + ": " + std::string(kvhook::status_name(result.error().status)) + ": " + result.error().message);
}

class Log final : public kvhook::Callbacks {
public:
    void log(std::int32_t level, std::string_view target, std::string_view message) noexcept override {
        std::fprintf(stderr, "%d %.*s: %.*s\n", level, static_cast<int>(target.size()), target.data(), static_cast<int>(message.size()), message.data());
    }
    std::int32_t log_max_level() noexcept override { return KVH_LOG_DEBUG; }
};

// Writes an element, cut to its dtype. A number that is too small for an f16's exponents becomes 0.
void encode(KvhDtype dtype, float value, unsigned char *to) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    if (dtype.bits == 32) {
        std::memcpy(to, &bits, sizeof bits);
        return;
    }
    // Whatever an fp8 means: the bytes differ.
    if (dtype.bits == 8) {
        *to = static_cast<unsigned char>(bits >> 16);
        return;
    }
    std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
    if (dtype.code == KVH_DTYPE_FLOAT) {
        const std::uint32_t sign = bits >> 31 << 15, exponent = bits >> 23 & 0xff;
        half = static_cast<std::uint16_t>(exponent < 113 ? sign : sign | ((exponent - 112) << 10) | (bits >> 13 & 0x3ff));
    }
    std::memcpy(to, &half, sizeof half);
}

double decode(KvhDtype dtype, const unsigned char *from) {
    std::uint16_t half = 0;
    std::memcpy(&half, from, sizeof half);
    if (dtype.bits == 16 && dtype.code == KVH_DTYPE_FLOAT) {
        const int exponent = half >> 10 & 0x1f, mantissa = half & 0x3ff;
        const double size = exponent == 31 ? HUGE_VAL : exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
        return half >> 15 ? -size : size;
    }
    std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    if (dtype.bits == 32) std::memcpy(&bits, from, sizeof bits);
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Where a rank's cache lies: ordinary memory, or a device, with guards around the cache.
class Place {
public:
    // Without a driver, ordinary memory.
    Place(const cuda::Driver *driver, std::int32_t device) : driver_(driver), stream_(driver == nullptr ? nullptr : driver->stream()), device_(device) {}

    bool on_device() const { return driver_ != nullptr; }
    KvhDevice device() const { return {on_device() ? KVH_DEVICE_CUDA : KVH_DEVICE_CPU, device_}; }
    void *stream() const { return stream_; }
    void wait() const {
        if (on_device()) driver_->synchronize(stream_);
    }

    // For the host. Null where there is no memory.
    void *allocate(std::uint64_t bytes, std::uint64_t alignment, void *stream) const {
        if (!on_device()) {
            void *data = nullptr;
            return posix_memalign(&data, std::max<std::uint64_t>(alignment, sizeof(void *)), bytes) == 0 ? data : nullptr;
        }
        // The device's allocations are aligned to 256 bytes.
        return reinterpret_cast<void *>(alignment > 256 ? 0 : driver_->allocate(bytes, stream));
    }
    void free(void *data, void *stream) const {
        if (!on_device()) return std::free(data);
        driver_->free(reinterpret_cast<cuda::Pointer>(data), stream);
    }

    // What may not wait for the stream: it is called while the stream does.
    template <class Call>
    auto while_blocked(bool blocked, const char *what, Call call) const {
        if (!blocked || !on_device()) return call();
        std::atomic<bool> opened{false};
        driver_->block(stream_, opened);
        const auto start = std::chrono::steady_clock::now();
        auto answer = call();
        const bool waited = std::chrono::steady_clock::now() - start > std::chrono::seconds(5);
        opened = true;
        // The flag is on this stack.
        wait();
        if (waited) fail(std::string(what) + " waited for the stream");
        return answer;
    }

    // Memory of the engine's own, filled; its guards are compared by `intact`.
    unsigned char *own(const std::vector<unsigned char> &content) const {
        if (!on_device()) {
            unsigned char *data = static_cast<unsigned char *>(std::malloc(content.size()));
            std::memcpy(data, content.data(), content.size());
            return data;
        }
        std::vector<unsigned char> guarded(content.size() + 2 * GUARD, UNTOUCHED);
        std::memcpy(&guarded[GUARD], content.data(), content.size());
        const cuda::Pointer start = driver_->allocate(guarded.size(), stream_);
        if (start == 0) fail("the device has no memory");
        driver_->upload(start, guarded.data(), guarded.size(), stream_);
        return reinterpret_cast<unsigned char *>(start + GUARD);
    }
    void write(unsigned char *to, const void *from, std::size_t bytes) const {
        if (on_device()) {
            driver_->upload(reinterpret_cast<cuda::Pointer>(to), from, bytes, stream_);
        } else {
            std::memcpy(to, from, bytes);
        }
    }
    std::vector<unsigned char> read(const void *from, std::size_t bytes) const {
        std::vector<unsigned char> content(bytes);
        if (on_device() && bytes > 0) {
            wait();
            driver_->download(content.data(), reinterpret_cast<cuda::Pointer>(from), bytes);
        } else {
            std::memcpy(content.data(), from, bytes);
        }
        return content;
    }
    bool intact(const unsigned char *data, std::size_t bytes) const {
        if (!on_device()) return true;
        const std::vector<unsigned char> guard(GUARD, UNTOUCHED);
        return read(data - GUARD, GUARD) == guard && read(data + bytes, GUARD) == guard;
    }

private:
    const cuda::Driver *driver_;
    void *stream_;
    std::int32_t device_;
};

// The places of all ranks, and the host's memory there.
class Places final : public kvhook::Memory {
public:
    explicit Places(std::vector<Place> places) : places_(std::move(places)) {}

    const Place &of(std::size_t rank) const { return places_[rank % places_.size()]; }
    bool on_device() const { return places_[0].on_device(); }
    void wait() const {
        for (const Place &place : places_) place.wait();
    }

    void *allocate(std::uint32_t rank, std::uint64_t bytes, std::uint64_t alignment, void *stream) noexcept override {
        void *data = of(rank).allocate(bytes, alignment, stream);
        if (data != nullptr) peak = std::max(peak, held += bytes);
        return data;
    }
    void free(std::uint32_t rank, void *data, std::uint64_t bytes, std::uint64_t, void *stream) noexcept override {
        held -= bytes;
        of(rank).free(data, stream);
    }

    // Bytes that the host holds, and the most that it held.
    std::uint64_t held = 0, peak = 0;

private:
    std::vector<Place> places_;
};

// One sequence of one engine.
class Engine {
public:
    Engine(const Options &options, Places &places, Log &log) : options_(options), places_(places), host_(make_host(options, places, log)) {
        const std::size_t bytes = options.capacity() * KV_HEADS * DIM * options.element();
        const std::int32_t blocks = static_cast<std::int32_t>(options.capacity() / BLOCK);
        // Twice the blocks that are needed, in a shuffled order.
        for (std::int32_t block = 0; block < blocks; ++block) table_.push_back((block * 37 + 11) % blocks * 2 + 1);
        const std::vector<unsigned char> empty(bytes * (options.paged ? 2 : 1), 0xee);
        for (std::size_t tensor = 0; tensor < options.ranks * LAYERS * 2; ++tensor) rows_.push_back(places.of(tensor / (LAYERS * 2)).own(empty));
        bytes_ = empty.size();
        std::vector<unsigned char> table(table_.size() * sizeof(std::int32_t));
        std::memcpy(table.data(), table_.data(), table.size());
        for (std::size_t rank = 0; rank < options.ranks; ++rank) tables_.push_back(places.of(rank).own(table));
        queries_.resize(options.ranks);
        take(host_.set_arm("arm", options.plugin, options.config), "set_arm");
    }

    void run() {
        std::vector<KvhSegment> segments;
        if (options_.images) segments = {{KVH_SEGMENT_IMAGE, 0, 30, 500}, {KVH_SEGMENT_IMAGE, 0, 700, 201}};
        KvhookBegin begin = kvhook::sized<KvhookBegin>();
        begin.arm = kvhook::str("arm");
        begin.prompt_length = options_.prompt;
        begin.segments = kvhook::array(segments);
        kvhook::Sequence sequence = take(host_.begin(begin), "begin");
        append(sequence, options_.prompt, KVH_PHASE_PREFILL);
        for (std::size_t round = 0; round < options_.rounds; ++round) {
            places_.peak = places_.held;
            compress(sequence, round == 0 ? KVHOOK_EVENT_PREFILL_DONE : KVHOOK_EVENT_GROWN);
            check_room();
            for (std::size_t i = 0; i < GROWTH; ++i) append(sequence, 1, KVH_PHASE_DECODE);
        }
        snapshot(sequence);
        take(sequence.free(KVH_FREE_FINISHED, places_.of(0).stream()), "free");
        places_.wait();
        for (std::size_t tensor = 0; tensor < rows_.size(); ++tensor)
            if (!places_.of(tensor / (LAYERS * 2)).intact(rows_[tensor], bytes_)) fail("something wrote outside the cache");
    }

    // What is left of a head of a tensor: the position of each row, and all rows.
    struct Head {
        std::vector<std::uint64_t> positions;
        std::vector<unsigned char> rows;
    };
    std::vector<Head> left;
    std::size_t commits = 0;
    std::vector<std::uint64_t> lengths;

private:
    static kvhook::Host make_host(const Options &options, Places &places, Log &log) {
        KvhLayerInfo info = kvhook::sized<KvhLayerInfo>();
        info.kind = KVH_LAYER_FULL;
        info.shared_with = -1;
        info.kv_heads = KV_HEADS;
        info.q_heads = Q_HEADS;
        info.k_head_dim = DIM;
        info.v_head_dim = DIM;
        const std::vector<KvhLayerInfo> layers(LAYERS, info);
        KvhModel model = kvhook::sized<KvhModel>();
        model.name = kvhook::str("toy");
        model.ranks = static_cast<std::uint32_t>(options.ranks);
        model.total_kv_heads = model.ranks * KV_HEADS;
        model.cache_dtype = options.dtype;
        model.position_axes = 1;
        model.max_positions = 2 * options.capacity();
        model.rope_base = 10000.0;
        model.rotary_dim = DIM;
        model.rope_pairing = KVH_ROPE_HALF_SPLIT;
        model.layers = kvhook::array(layers);
        kvhook::HostOptions host;
        host.engine = "cuda test engine";
        for (; model.rank < model.ranks; ++model.rank) {
            model.first_kv_head = model.rank * KV_HEADS;
            model.device = places.of(model.rank).device();
            host.models.push_back(model);
        }
        host.offers.can = KVH_CAN_QUERIES | KVH_CAN_STATE | KVH_CAN_GROWN | KVH_CAN_REWRITE;
        host.offers.max_window_queries = 64;
        host.offers.block_size = options.paged ? BLOCK : 0;
        host.callbacks = &log;
        host.memory = &places;
        host.plugin_folders = {options.plugin.substr(0, options.plugin.find_last_of('/'))};
        host.copy_folder = options.copies;
        return take(kvhook::Host::create(host), "create");
    }

    // Rows of K (0) or V (1) of a rank's layer.
    unsigned char *rows(std::size_t rank, std::size_t layer, std::size_t part) const { return rows_[(rank * LAYERS + layer) * 2 + part]; }

    KvhLayer view(std::size_t rank, std::uint32_t layer) {
        unsigned char *k = rows(rank, layer, 0), *v = rows(rank, layer, 1);
        const std::uint64_t length = lengths.empty() ? 0 : lengths[layer];
        if (!options_.paged)
            return kvhook::contiguous_layer(layer, KV_HEADS, length, kvhook::head_major(k, options_.dtype, options_.capacity(), DIM), kvhook::head_major(v, options_.dtype, options_.capacity(), DIM));
        KvhLayer out = kvhook::paged_layer(layer, KV_HEADS, length, kvhook::paged_token_major(k, options_.dtype, BLOCK, KV_HEADS, DIM),
                                           kvhook::paged_token_major(v, options_.dtype, BLOCK, KV_HEADS, DIM), BLOCK, table_);
        out.table.data = tables_[rank];
        return out;
    }

    std::vector<KvhLayer> views(std::size_t rank) {
        std::vector<KvhLayer> views;
        for (std::uint32_t layer = 0; layer < LAYERS; ++layer) views.push_back(view(rank, layer));
        return views;
    }

    std::size_t offset(std::size_t token, std::size_t head) const {
        const std::size_t row = DIM * options_.element();
        if (!options_.paged) return (head * options_.capacity() + token) * row;
        return ((static_cast<std::size_t>(table_[token / BLOCK]) * BLOCK + token % BLOCK) * KV_HEADS + head) * row;
    }

    // `tokens` tokens with their queries, which the plugin sees before their rows are written.
    void append(kvhook::Sequence &sequence, std::size_t tokens, std::uint32_t phase) {
        if (lengths.empty()) lengths.assign(LAYERS, 0);
        const bool shown = (sequence.wants().before_attention_phases & phase) != 0;
        for (std::uint32_t tensors = 0; tensors < options_.ranks * LAYERS; ++tensors) {
            const std::uint32_t rank = tensors / LAYERS, layer = tensors % LAYERS;
            toy::Random random(1000003 * tensors + next_);
            if (shown) {
                std::vector<unsigned char> q(tokens * Q_HEADS * DIM * options_.element());
                for (std::size_t at = 0; at < q.size(); at += options_.element()) encode(options_.dtype, random.next(), &q[at]);
                show(sequence, rank, layer, tokens, phase, q);
            }
            const std::size_t row = DIM * options_.element();
            // A prompt's rows go there together.
            std::vector<unsigned char> all[2];
            for (std::size_t part = 0; part < 2 && tokens > 1; ++part) all[part] = places_.of(rank).read(rows(rank, layer, part), bytes_);
            for (std::size_t token = 0; token < tokens; ++token) {
                for (std::size_t head = 0; head < KV_HEADS; ++head) {
                    for (std::size_t part = 0; part < 2; ++part) {
                        unsigned char bytes[DIM * sizeof(float)];
                        const float scale = 1.0f + static_cast<float>((next_ + token) % 7);
                        for (std::size_t c = 0; c < DIM; ++c) encode(options_.dtype, random.next() * scale, bytes + c * options_.element());
                        const std::size_t at = offset(lengths[layer] + token, head);
                        if (tokens > 1) {
                            std::memcpy(&all[part][at], bytes, row);
                        } else {
                            places_.of(rank).write(rows(rank, layer, part) + at, bytes, row);
                        }
                    }
                }
            }
            for (std::size_t part = 0; part < 2 && tokens > 1; ++part) places_.of(rank).write(rows(rank, layer, part), all[part].data(), bytes_);
        }
        for (std::uint64_t &length : lengths) length += tokens;
        next_ += tokens;
    }

    void show(kvhook::Sequence &sequence, std::uint32_t rank, std::uint32_t layer, std::size_t tokens, std::uint32_t phase, const std::vector<unsigned char> &bytes) {
        const Place &place = places_.of(rank);
        Queries &queries = queries_[rank];
        if (queries.bytes < bytes.size()) queries = {place.own(bytes), bytes.size()};
        place.write(queries.data, bytes.data(), bytes.size());
        std::int64_t shape[] = {static_cast<std::int64_t>(tokens), Q_HEADS, DIM}, strides[] = {Q_HEADS * DIM, DIM, 1};
        const KvhTensor tensor{queries.data, place.device(), 3, options_.dtype, shape, strides, 0};
        const KvhLayer cache = view(rank, layer);
        std::vector<KvhStepSequence> sequences(1, kvhook::sized<KvhStepSequence>());
        sequences[0].uid = sequence.uid();
        sequences[0].tokens = tokens;
        sequences[0].first_position = next_;
        sequences[0].prompt_length = options_.prompt;
        sequences[0].flags = next_ + tokens == options_.prompt ? KVH_STEP_PROMPT_ENDS : 0;
        sequences[0].phase = phase;
        sequences[0].cache = &cache;
        KvhookStep step = kvhook::sized<KvhookStep>();
        step.layer = layer;
        step.q = &tensor;
        step.k = &tensor;
        step.v = &tensor;
        step.sequences = kvhook::array(sequences);
        step.stream = place.stream();
        take(host_.before_attention(rank, step), "before_attention");
        // The queries' memory is used again for the next layer.
        place.wait();
    }

    void compress(kvhook::Sequence &sequence, std::int32_t event) {
        KvhookAsk ask = kvhook::sized<KvhookAsk>();
        ask.uid = sequence.uid();
        ask.event = event;
        ask.lengths = kvhook::array(lengths);
        ask.next_position = next_;
        if (take(host_.ask(ask), "ask").decision == KVHOOK_DECISION_KEEP) return;
        std::uint64_t ticket = 0;
        for (std::uint32_t rank = 0; rank < options_.ranks; ++rank) {
            const std::vector<KvhLayer> layers = views(rank);
            std::vector<KvhookPrepareSequence> sequences(1, kvhook::sized<KvhookPrepareSequence>());
            sequences[0].uid = sequence.uid();
            sequences[0].event = event;
            sequences[0].layers = kvhook::array(layers);
            sequences[0].next_position = next_;
            const Place &place = places_.of(rank);
            take(place.while_blocked(options_.blocked, "prepare", [&] { return host_.prepare(rank, sequences, place.stream()); }), "prepare");
            ticket = sequences[0].ticket;
            if (ticket == 0) fail("kept: " + std::string(kvhook::reason_name(sequences[0].reason)));
        }
        for (std::size_t i = 0; i < options_.late; ++i) append(sequence, 1, KVH_PHASE_DECODE);
        kvhook::Verdict verdict;
        do {
            verdict = take(host_.verdict(ticket), "verdict");
        } while (verdict.verdict == KVHOOK_VERDICT_PENDING);
        if (verdict.verdict != KVHOOK_VERDICT_READY) fail("dropped: " + std::string(kvhook::reason_name(verdict.reason)));
        std::vector<std::vector<std::uint32_t>> blocks;
        if (verdict.movement == KVHOOK_MOVE_TABLE) blocks = take(host_.table_edit(ticket), "table_edit");
        kvhook::Committed committed;
        for (std::uint32_t rank = 0; rank < options_.ranks; ++rank) {
            const Place &place = places_.of(rank);
            committed = take(place.while_blocked(options_.blocked, "commit", [&] { return host_.commit(rank, ticket, views(rank), next_, {}, place.stream()); }), "commit");
        }
        // All ranks and layers have one table here.
        if (!blocks.empty()) edit_table(blocks[0], (lengths[0] - options_.late + BLOCK - 1) / BLOCK);
        if (committed.next_position != next_) fail("the next position changed");
        lengths = committed.lengths;
        places_.wait();
        ++commits;
    }

    // Of the first `planned` blocks only those with the given ordinals stay; the others are free.
    void edit_table(const std::vector<std::uint32_t> &ordinals, std::size_t planned) {
        std::vector<std::int32_t> kept, freed;
        std::size_t next = 0;
        for (std::size_t i = 0; i < table_.size(); ++i) {
            const bool stays = i >= planned || (next < ordinals.size() && ordinals[next] == i);
            if (stays && i < planned) ++next;
            (stays ? kept : freed).push_back(table_[i]);
        }
        kept.insert(kept.end(), freed.begin(), freed.end());
        table_ = kept;
        for (std::size_t rank = 0; rank < options_.ranks; ++rank) places_.of(rank).write(tables_[rank], table_.data(), table_.size() * sizeof(std::int32_t));
    }

    void snapshot(kvhook::Sequence &sequence) {
        places_.wait();
        const std::size_t row = DIM * options_.element();
        for (std::uint32_t tensors = 0; tensors < options_.ranks * LAYERS; ++tensors) {
            const std::uint32_t rank = tensors / LAYERS, layer = tensors % LAYERS;
            const KvhPositions positions = take(host_.positions(rank, sequence.uid(), layer), "positions");
            for (std::size_t part = 0; part < 2; ++part) {
                const std::vector<unsigned char> all = places_.of(rank).read(rows(rank, layer, part), bytes_);
                for (std::size_t head = 0; head < KV_HEADS; ++head) {
                    Head of_head;
                    for (std::size_t token = 0; token < lengths[layer]; ++token) {
                        const unsigned char *first = &all[offset(token, head)];
                        of_head.rows.insert(of_head.rows.end(), first, first + row);
                        of_head.positions.push_back(next_ - (lengths[layer] - token));
                    }
                    std::vector<std::uint32_t> table(positions.count);
                    const auto bytes = places_.of(rank).read(positions.data + static_cast<std::int64_t>(head) * positions.stride_head, positions.count * sizeof(std::uint32_t));
                    if (!table.empty()) std::memcpy(table.data(), bytes.data(), bytes.size());
                    std::copy(table.begin(), table.end(), of_head.positions.begin());
                    left.push_back(std::move(of_head));
                }
            }
        }
    }

    // What the host held during the last compression, beside what it held before.
    void check_room() const {
        if (options_.room < 0 || !places_.on_device()) return;
        const std::uint64_t queries = options_.ranks * LAYERS * static_cast<std::uint64_t>(options_.room) * Q_HEADS * DIM * options_.element();
        std::uint64_t kept = 0;
        for (const std::uint64_t length : lengths) kept += options_.ranks * length * KV_HEADS;
        const std::uint64_t most = queries + 4 * kept + 64 * MEBIBYTE;
        if (places_.peak > most) fail("the host held " + std::to_string(places_.peak) + " bytes, expected at most " + std::to_string(most));
    }

    const Options &options_;
    Places &places_;
    kvhook::Host host_;
    // K and V of each layer of each rank.
    std::vector<unsigned char *> rows_;
    std::size_t bytes_ = 0, next_ = 0;
    std::vector<std::int32_t> table_;
    // One for each rank.
    std::vector<unsigned char *> tables_;
    struct Queries {
        unsigned char *data = nullptr;
        std::size_t bytes = 0;
    };
    std::vector<Queries> queries_;
};

Options parse(int count, char **arguments) {
    Options options;
    if (count < 2) fail("usage: cuda_engine PLUGIN [--config TEXT] [--cache contiguous|paged] [--dtype f32|f16|bf16|fp8] [--ranks N] [--devices N] [--rounds N] [--prompt TOKENS] [--images 0|1] [--late TOKENS] [--bound SHARE] [--ties SHARE] [--room QUERIES] [--blocked 0|1] [--copies FOLDER]");
    options.plugin = arguments[1];
    if (options.plugin.find('/') == std::string::npos) fail("PLUGIN is a path with a folder");
    for (int i = 2; i < count; i += 2) {
        const std::string key = arguments[i];
        if (i + 1 == count) fail(key + " needs a value");
        const std::string value = arguments[i + 1];
        if (key == "--config") options.config = value;
        else if (key == "--cache" && (value == "contiguous" || value == "paged")) options.paged = value == "paged";
        else if (key == "--dtype" && value == "f32") options.dtype = kvhook::f32;
        else if (key == "--dtype" && value == "f16") options.dtype = kvhook::f16;
        else if (key == "--dtype" && value == "bf16") options.dtype = kvhook::bf16;
        else if (key == "--ranks") options.ranks = std::stoul(value);
        else if (key == "--devices") options.devices = std::stoul(value);
        else if (key == "--dtype" && value == "fp8") options.dtype = {10, 8, 1};  // DLPack's float8_e4m3fn
        else if (key == "--prompt") options.prompt = std::stoul(value);
        else if (key == "--images") options.images = value == "1";
        else if (key == "--blocked") options.blocked = value == "1";
        else if (key == "--ties") options.ties = std::stod(value);
        else if (key == "--room") options.room = std::stol(value);
        else if (key == "--bound") options.bound = std::stod(value);
        else if (key == "--rounds") options.rounds = std::stoul(value);
        else if (key == "--late") options.late = std::stoul(value);
        else if (key == "--copies") options.copies = value;
        else fail("unknown argument " + key + " " + value);
    }
    if (options.ranks == 0 || options.devices == 0) fail("--ranks and --devices are 1 or more");
    return options;
}

// What differs between the device's rows and those in ordinary memory.
struct Differences {
    // Positions of which only one of both keeps the row.
    std::size_t ties = 0;
    // Rows that are not equal byte by byte, which may then differ within the bound.
    std::size_t unequal = 0;
};

// How far two rows are apart, by the largest of the second.
double distance(const Options &options, const unsigned char *device, const unsigned char *memory) {
    double largest = 0, off = 0;
    for (std::size_t c = 0; c < DIM * options.element(); c += options.element()) {
        const double found = decode(options.dtype, device + c), expected = decode(options.dtype, memory + c);
        largest = std::fmax(largest, std::fabs(expected));
        // A NaN is no number within any bound.
        if (!std::isfinite(found)) return HUGE_VAL;
        off = std::fmax(off, std::fabs(found - expected));
    }
    return off / largest;
}

// Compares the heads of both, row by row. Positions ascend.
Differences compare(const Options &options, const std::vector<Engine::Head> &device, const std::vector<Engine::Head> &memory) {
    const std::size_t row = DIM * options.element();
    Differences all;
    for (std::size_t head = 0; head < memory.size(); ++head) {
        const Engine::Head &found = device[head], &expected = memory[head];
        std::size_t ties = 0, i = 0, j = 0;
        while (i < found.positions.size() && j < expected.positions.size()) {
            if (found.positions[i] != expected.positions[j]) {
                ++ties;
                ++(found.positions[i] < expected.positions[j] ? i : j);
                continue;
            }
            const unsigned char *left = &found.rows[i * row], *right = &expected.rows[j * row];
            if (std::memcmp(left, right, row) != 0) {
                ++all.unequal;
                const double off = options.bound == 0 ? HUGE_VAL : distance(options, left, right);
                if (off > options.bound)
                    fail("head " + std::to_string(head) + " of all, position " + std::to_string(found.positions[i]) + ": the row is off by " + std::to_string(off) + " of its largest");
            }
            ++i;
            ++j;
        }
        ties += found.positions.size() - i + expected.positions.size() - j;
        // Each row of which only one is kept stands for one that only the other keeps.
        if (static_cast<double>(ties) > 2 * options.ties * static_cast<double>(expected.positions.size()))
            fail("head " + std::to_string(head) + " of all keeps " + std::to_string(ties / 2) + " other rows than in ordinary memory");
        all.ties += ties / 2;
    }
    return all;
}

int run(const Options &options) {
    std::vector<Place> devices;
    for (std::int32_t device = 0; device < static_cast<std::int32_t>(options.devices); ++device) {
        const cuda::Driver *driver = cuda::Driver::open(device);
        if (driver == nullptr) {
            std::printf("skipped: no CUDA device %d\n", device);
            return 0;
        }
        devices.emplace_back(driver, device);
    }
    Log log;
    Places on_device(devices), in_memory({Place(nullptr, 0)});
    std::size_t commits = 0;
    Differences differences;
    std::vector<std::uint64_t> lengths;
    {
        Engine device(options, on_device, log), memory(options, in_memory, log);
        device.run();
        memory.run();
        commits = device.commits;
        lengths = device.lengths;
        if (device.commits != memory.commits) fail("not as many commits as in ordinary memory");
        if (device.lengths != memory.lengths) fail("not as many rows as in ordinary memory");
        differences = compare(options, device.left, memory.left);
    }
    on_device.wait();
    if (on_device.held != 0 || in_memory.held != 0) fail("the host still holds memory");
    std::printf("OK %s: %zu commits, %llu rows left, %zu of all rows not byte by byte as in ordinary memory, %zu others, %.1f MiB held\n", options.config.c_str(), commits,
                static_cast<unsigned long long>(lengths[0]), differences.unequal, differences.ties, static_cast<double>(on_device.peak) / MEBIBYTE);
    return 0;
}

}  // namespace

int main(int count, char **arguments) {
    try {
        return run(parse(count, arguments));
    } catch (const std::exception &error) {
        std::fprintf(stderr, "FAILED: %s\n", error.what());
        return 1;
    }
}
