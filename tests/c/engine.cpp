// A small engine in C++17 that compresses its cache through kvhook.hpp and nothing else: it drives a toy model,
// whose outputs are compared with the same model under a mask (toy_model.hpp).
//
//   engine PLUGIN [--config TEXT] [--cache contiguous|paged] [--threads N] [--late STEPS] [--expect ROWS] [--copies FOLDER] [--swaps N]
//
// PLUGIN is the path of a library. Each thread drives sequences of its own on an arm of its own. --late commits so many
// steps after prepare. --expect says how many rows each layer keeps of the prompt. Prints a line with OK for each
// sequence; ends with 1 when anything is not as it should be.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kvhook.hpp"
#include "toy_cache.hpp"
#include "toy_model.hpp"

namespace {

constexpr std::size_t PROMPT = 96;
constexpr std::size_t ANSWER = 64;
constexpr std::uint32_t RANK = 0;

struct Options {
    std::string plugin, config, copies;
    bool paged = false;
    std::size_t threads = 1, late = 0, swaps = 0;
    std::optional<std::uint64_t> expect;
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
        const std::lock_guard<std::mutex> lock(mutex_);
        std::fprintf(stderr, "%d %.*s: %.*s\n", level, static_cast<int>(target.size()), target.data(),
                     static_cast<int>(message.size()), message.data());
    }
    std::int32_t log_max_level() noexcept override { return KVH_LOG_WARN; }

private:
    std::mutex mutex_;
};

// Counts what the host holds.
class Memory final : public kvhook::Memory {
public:
    void *allocate(std::uint32_t, std::uint64_t bytes, std::uint64_t alignment, void *) noexcept override {
        // Not a byte more than was asked for, so that a sanitizer sees whoever writes behind it.
        void *data = nullptr;
        if (posix_memalign(&data, alignment < sizeof(void *) ? sizeof(void *) : alignment, bytes) != 0) return nullptr;
        held += bytes;
        return data;
    }
    void free(std::uint32_t, void *data, std::uint64_t bytes, std::uint64_t, void *) noexcept override {
        held -= bytes;
        std::free(data);
    }

    std::atomic<std::uint64_t> held{0};
};

// One sequence from its prompt to its end.
class Session {
public:
    Session(kvhook::Host &host, const toy::Model &model, const Options &options, std::string arm, std::uint64_t seed)
        : host_(host), model_(model), options_(options), cache_(options.paged), arm_(std::move(arm)) {
        toy::Random random(seed);
        for (std::size_t i = 0; i < PROMPT + ANSWER; ++i) tokens_.push_back(static_cast<std::uint64_t>((random.next() + 1.0f) * 500.0f));
        dropped_at_.assign(toy::LAYERS, std::vector<std::vector<std::size_t>>(toy::KV_HEADS));
        shadow_.resize(toy::LAYERS);
    }

    void run() {
        sequence_ = take(host_.begin(PROMPT, {}, arm_), "begin");
        for (std::size_t position = 0; position < tokens_.size(); ++position) {
            outputs_.push_back(step(position));
            if (ticket_ != 0 && position + 1 >= planned_ + options_.late) commit();
            const bool prompt_done = position + 1 == PROMPT, answers = position + 1 > PROMPT;
            if (prompt_done && sequence_.wants().on_prefill_done != 0) prepare(KVHOOK_EVENT_PREFILL_DONE);
            if (answers && ticket_ == 0 && sequence_.wants().grown_every > 0) prepare(KVHOOK_EVENT_GROWN);
            if (ticket_ != 0 && options_.late == 0) commit();
        }
        check();
        take(sequence_.free(KVH_FREE_FINISHED), "free");
    }

private:
    // One token through all layers; gives the last layer's output.
    std::vector<float> step(std::size_t position) {
        std::vector<float> x = toy::Model::embedding(tokens_[position]);
        const std::uint32_t phase = position < PROMPT ? KVH_PHASE_PREFILL : KVH_PHASE_DECODE;
        const bool shown = (sequence_.wants().before_attention_phases & host_.wants(RANK) & phase) != 0;
        for (std::size_t layer = 0; layer < toy::LAYERS; ++layer) {
            std::vector<float> q = toy::multiply(model_.layers[layer].q, x.data());
            std::vector<float> k = toy::multiply(model_.layers[layer].k, x.data());
            std::vector<float> v = toy::multiply(model_.layers[layer].v, x.data());
            toy::rope(q, position);
            toy::rope(k, position);
            if (shown) show(layer, position, phase, q, k, v);
            cache_.append(layer, k, v);
            shadow_[layer].push_back({k, v});
            for (std::size_t head = 0; head < toy::KV_HEADS; ++head) dropped_at_[layer][head].push_back(std::numeric_limits<std::size_t>::max());
            std::vector<float> out(toy::WIDTH);
            for (std::size_t head = 0; head < toy::Q_HEADS; ++head) {
                const std::size_t kv = head / (toy::Q_HEADS / toy::KV_HEADS);
                toy::attend(&q[head * toy::DIM], cache_.length(layer), [&](std::size_t row) { return cache_.key(layer, kv, row); },
                            [&](std::size_t row) { return cache_.value(layer, kv, row); }, &out[head * toy::DIM]);
            }
            for (std::size_t i = 0; i < toy::WIDTH; ++i) x[i] += out[i];
        }
        return x;
    }

    void show(std::size_t layer, std::size_t position, std::uint32_t phase, std::vector<float> &q, std::vector<float> &k,
              std::vector<float> &v) {
        std::int64_t q_shape[] = {1, toy::Q_HEADS, toy::DIM}, kv_shape[] = {1, toy::KV_HEADS, toy::DIM};
        std::int64_t q_strides[] = {toy::WIDTH, toy::DIM, 1}, kv_strides[] = {toy::KV_HEADS * toy::DIM, toy::DIM, 1};
        const auto tensor = [](std::vector<float> &data, std::int64_t *shape, std::int64_t *strides) {
            return KvhTensor{data.data(), {KVH_DEVICE_CPU, 0}, 3, kvhook::f32, shape, strides, 0};
        };
        const KvhTensor q_tensor = tensor(q, q_shape, q_strides), k_tensor = tensor(k, kv_shape, kv_strides),
                        v_tensor = tensor(v, kv_shape, kv_strides);
        const KvhLayer cache = cache_.view(layer);
        std::vector<KvhStepSequence> sequences(1, kvhook::sized<KvhStepSequence>());
        sequences[0].uid = sequence_.uid();
        sequences[0].tokens = 1;
        sequences[0].first_position = position;
        sequences[0].prompt_length = PROMPT;
        sequences[0].flags = position + 1 == PROMPT ? KVH_STEP_PROMPT_ENDS : 0;
        sequences[0].phase = phase;
        sequences[0].cache = &cache;
        KvhookStep step = kvhook::sized<KvhookStep>();
        step.layer = static_cast<std::uint32_t>(layer);
        step.q = &q_tensor;
        step.k = &k_tensor;
        step.v = &v_tensor;
        step.sequences = kvhook::array(sequences);
        take(host_.before_attention(RANK, step), "before_attention");
    }

    void prepare(std::int32_t event) {
        const std::vector<std::uint64_t> lengths = cache_.lengths();
        KvhookAsk ask = kvhook::sized<KvhookAsk>();
        ask.uid = sequence_.uid();
        ask.event = event;
        ask.lengths = kvhook::array(lengths);
        ask.next_position = outputs_.size();
        const kvhook::Answer answer = take(host_.ask(ask), "ask");
        if (answer.decision == KVHOOK_DECISION_KEEP) return;
        if (answer.decision != KVHOOK_DECISION_IN_PLACE) fail("rows that nobody shares would not move in place");

        const std::vector<KvhLayer> layers = cache_.views();
        std::vector<KvhookPrepareSequence> sequences(1, kvhook::sized<KvhookPrepareSequence>());
        sequences[0].uid = sequence_.uid();
        sequences[0].event = event;
        sequences[0].layers = kvhook::array(layers);
        sequences[0].next_position = outputs_.size();
        take(host_.prepare(RANK, sequences), "prepare");
        if (sequences[0].ticket == 0) fail("kept: " + std::string(kvhook::reason_name(sequences[0].reason)));
        ticket_ = sequences[0].ticket;
        planned_ = outputs_.size();
        planned_rows_ = lengths;
    }

    void commit() {
        const kvhook::Verdict verdict = take(host_.verdict(ticket_), "verdict");
        if (verdict.verdict != KVHOOK_VERDICT_READY) fail("no verdict: " + std::string(kvhook::reason_name(verdict.reason)));
        std::vector<std::vector<std::uint32_t>> blocks;
        if (verdict.movement == KVHOOK_MOVE_TABLE) blocks = take(host_.table_edit(ticket_), "table_edit");
        const kvhook::Committed committed = take(host_.commit(RANK, ticket_, cache_.views(), outputs_.size()), "commit");
        ticket_ = 0;
        if (committed.next_position != outputs_.size()) fail("the next position changed");
        if (commits_ == 0 && options_.expect && verdict.counts != std::vector<std::uint64_t>(toy::LAYERS, *options_.expect))
            fail("the first commit keeps " + std::to_string(verdict.counts[0]) + " rows of the first layer");
        std::uint64_t freed = 0;
        for (std::size_t layer = 0; layer < toy::LAYERS; ++layer) {
            const std::uint64_t appended = outputs_.size() - planned_;
            if (committed.lengths[layer] != verdict.counts[layer] + appended) fail("the length is not what the verdict said");
            if (!blocks.empty()) cache_.keep_blocks(layer, blocks[layer].data(), blocks[layer].size(), (planned_rows_[layer] + toy::BLOCK - 1) / toy::BLOCK);
            freed += cache_.shrink(layer, committed.lengths[layer]);
            find_dropped(layer);
        }
        take(host_.freed(sequence_.uid(), freed), "freed");
        ++commits_;
    }

    // Which positions are gone, judged by the rows that are there, and whether the host's table of positions agrees.
    void find_dropped(std::size_t layer) {
        const KvhPositions positions = take(host_.positions(RANK, sequence_.uid(), static_cast<std::uint32_t>(layer)), "positions");
        const std::size_t length = cache_.length(layer), next = outputs_.size();
        for (std::size_t head = 0; head < toy::KV_HEADS; ++head) {
            const auto matches = [&](std::size_t position, std::size_t row) {
                const std::size_t bytes = toy::DIM * sizeof(float), at = head * toy::DIM;
                return std::memcmp(&shadow_[layer][position].k[at], cache_.key(layer, head, row), bytes) == 0 &&
                       std::memcmp(&shadow_[layer][position].v[at], cache_.value(layer, head, row), bytes) == 0;
            };
            std::size_t row = 0;
            for (std::size_t position = 0; position < next; ++position) {
                if (row < length && matches(position, row)) {
                    const std::int64_t place = static_cast<std::int64_t>(head) * positions.stride_head + static_cast<std::int64_t>(row);
                    const std::size_t said = row < positions.count ? positions.data[place] : next - (length - row);
                    if (said != position) fail("row " + std::to_string(row) + " is position " + std::to_string(position) + ", the host says " + std::to_string(said));
                    ++row;
                } else if (dropped_at_[layer][head][position] > next) {
                    dropped_at_[layer][head][position] = next;
                }
            }
            if (row != length) fail("row " + std::to_string(row) + " is none that was ever written");
        }
    }

    void check() {
        const auto visible = [&](std::size_t layer, std::size_t head, std::size_t query, std::size_t key) {
            return query < dropped_at_[layer][head][key];
        };
        const auto expected = toy::masked_forward(model_, tokens_, visible);
        const auto uncompressed = toy::masked_forward(model_, tokens_, [](auto, auto, auto, auto) { return true; });
        double difference = 0.0, effect = 0.0;
        for (std::size_t t = 0; t < tokens_.size(); ++t) {
            for (std::size_t i = 0; i < toy::WIDTH; ++i) {
                // A NaN is a difference, too.
                const double here = std::fabs(static_cast<double>(outputs_[t][i]) - expected[t][i]);
                difference = here <= difference ? difference : here;
                effect = std::fmax(effect, std::fabs(uncompressed[t][i] - expected[t][i]));
            }
        }
        if (!(difference <= 1e-4)) fail("the outputs differ from masked attention by " + std::to_string(difference));
        // Where rows went, leaving them out of the mask must show, or the comparison would prove nothing.
        if (commits_ > 0 && !(effect > 1e-2)) fail("the mask changes nothing");
        if (options_.expect && *options_.expect < PROMPT && commits_ == 0) fail("nothing was compressed");
        std::printf("OK %s: %zu tokens, %zu commits, %llu rows left, %.1e from masked attention, %.1e from full\n", arm_.c_str(),
                    tokens_.size(), commits_, static_cast<unsigned long long>(cache_.length(0)), difference, effect);
    }

    struct Row {
        std::vector<float> k, v;
    };

    kvhook::Host &host_;
    const toy::Model &model_;
    const Options &options_;
    toy::Cache cache_;
    std::string arm_;
    kvhook::Sequence sequence_;
    std::vector<std::uint64_t> tokens_;
    std::vector<std::vector<float>> outputs_;
    // Every row that was ever written: [layer][position].
    std::vector<std::vector<Row>> shadow_;
    // [layer][head][position]: the first token that does not see it any more.
    std::vector<std::vector<std::vector<std::size_t>>> dropped_at_;
    std::uint64_t ticket_ = 0;
    std::size_t planned_ = 0, commits_ = 0;
    std::vector<std::uint64_t> planned_rows_;
};

kvhook::Host make_host(const Options &options, Log &log, Memory &memory) {
    KvhLayerInfo info = kvhook::sized<KvhLayerInfo>();
    info.kind = KVH_LAYER_FULL;
    info.shared_with = -1;
    info.kv_heads = toy::KV_HEADS;
    info.q_heads = toy::Q_HEADS;
    info.k_head_dim = toy::DIM;
    info.v_head_dim = toy::DIM;
    const std::vector<KvhLayerInfo> layers(toy::LAYERS, info);
    KvhModel model = kvhook::sized<KvhModel>();
    model.name = kvhook::str("toy");
    model.ranks = 1;
    model.total_kv_heads = toy::KV_HEADS;
    model.device = {KVH_DEVICE_CPU, 0};
    model.cache_dtype = kvhook::f32;
    model.position_axes = 1;
    model.max_positions = 4096;
    model.rope_base = toy::ROPE_BASE;
    model.rotary_dim = toy::DIM;
    model.rope_pairing = KVH_ROPE_HALF_SPLIT;
    model.layers = kvhook::array(layers);
    kvhook::HostOptions host;
    host.engine = "toy engine 1";
    host.models = {model};
    host.offers.can = KVH_CAN_QUERIES | KVH_CAN_ALL_QUERIES | KVH_CAN_LAYER_COUNTS | KVH_CAN_STATE | KVH_CAN_GROWN;
    host.offers.max_window_queries = PROMPT;
    host.offers.block_size = options.paged ? toy::BLOCK : 0;
    host.callbacks = &log;
    host.memory = &memory;
    host.plugin_folders = {options.plugin.substr(0, options.plugin.rfind('/'))};
    host.copy_folder = options.copies;
    return take(kvhook::Host::create(host), "create");
}

// Gives the number of threads that failed.
int run(const Options &options) {
    Log log;
    Memory memory;
    std::atomic<int> failures{0};
    {
        kvhook::Host host = make_host(options, log, memory);
        const toy::Model model(7);
        std::vector<std::string> arms;
        for (std::size_t i = 0; i < options.threads; ++i) {
            arms.push_back("arm" + std::to_string(i));
            take(host.set_arm(arms.back(), options.plugin, options.config), "set_arm");
        }
        std::atomic<bool> swapping{options.swaps > 0};
        const auto drive = [&](std::size_t thread) {
            try {
                for (std::uint64_t round = 0; round < 3 || swapping; ++round) Session(host, model, options, arms[thread], 100 * thread + round).run();
            } catch (const std::exception &error) {
                std::fprintf(stderr, "FAILED %s: %s\n", arms[thread].c_str(), error.what());
                ++failures;
            }
        };
        // Gives each arm new instances, again and again, beside an arm that comes and goes.
        const auto swap = [&] {
            try {
                for (std::size_t i = 0; i < options.swaps; ++i) {
                    const std::string spare = i % 2 == 0 ? R"({"add": {"name": "spare", "plugin": ")" + options.plugin + R"("}})" : R"({"remove": "spare"})";
                    const std::string replace = R"({"replace": {"name": ")" + arms[i % arms.size()] + R"("}})";
                    take(host.control(R"({"changes": [)" + spare + ", " + replace + R"(, {"weights": {"arm0": 2}}]})"), "control");
                    if (take(host.arms_json(), "arms").find("arm0") == std::string::npos) fail("arm0 is not in the list");
                }
            } catch (const std::exception &error) {
                std::fprintf(stderr, "FAILED swap %s\n", error.what());
                ++failures;
            }
            swapping = false;
        };
        std::vector<std::thread> threads;
        if (options.swaps > 0) threads.emplace_back(swap);
        for (std::size_t i = 1; i < options.threads; ++i) threads.emplace_back(drive, i);
        drive(0);
        for (std::thread &thread : threads) thread.join();
    }
    if (memory.held != 0) fail("the host still holds " + std::to_string(memory.held) + " bytes");
    return failures;
}

Options parse(int count, char **arguments) {
    Options options;
    if (count < 2) fail("usage: engine PLUGIN [--config TEXT] [--cache contiguous|paged] [--threads N] [--late STEPS] [--expect ROWS] [--copies FOLDER] [--swaps N]");
    options.plugin = arguments[1];
    if (options.plugin.find('/') == std::string::npos) fail("PLUGIN is a path with a folder");
    for (int i = 2; i < count; i += 2) {
        const std::string key = arguments[i];
        if (i + 1 == count) fail(key + " needs a value");
        const std::string value = arguments[i + 1];
        if (key == "--config") options.config = value;
        else if (key == "--cache" && (value == "contiguous" || value == "paged")) options.paged = value == "paged";
        else if (key == "--threads") options.threads = std::stoul(value);
        else if (key == "--late") options.late = std::stoul(value);
        else if (key == "--expect") options.expect = std::stoul(value);
        else if (key == "--copies") options.copies = value;
        else if (key == "--swaps") options.swaps = std::stoul(value);
        else fail("unknown argument " + key + " " + value);
    }
    return options;
}

}  // namespace

int main(int count, char **arguments) {
    try {
        return run(parse(count, arguments)) == 0 ? 0 : 1;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "FAILED: %s\n", error.what());
        return 1;
    }
}
