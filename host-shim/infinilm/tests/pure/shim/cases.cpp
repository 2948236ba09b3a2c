// The shim between stand-ins of the engine and a host that records: `cases HOST_LIBRARY CASE`. Exits with 0 when the
// case holds.
#include "kvhook_shim.cpp"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <thread>

#include "fake_host.hpp"

namespace {

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
            std::exit(1);                                                            \
        }                                                                            \
    } while (false)

using infinicore::TensorImpl;
namespace context = infinicore::context;

constexpr std::size_t HEADS = 2, DIM = 3, LAYERS = 3;

/// One rank's half of a forward: caches, descriptor, and a buffer for messages.
struct Rank {
    std::vector<std::vector<float>> caches{LAYERS, std::vector<float>(8)};
    Device device;
    KvhookHost host;
    std::vector<KvhLayer> layers{LAYERS, kvhook::sized<KvhLayer>()};
    std::vector<KvhShimSequence> sequences;
    std::vector<KvhookPrepareSequence> prepares;
    char message[256] = {};
    KvhShimRank descriptor{};

    Rank() {
        host.phases = KVH_PHASE_PREFILL;
        host.shown = [](auto...) { return KVHOOK_OK; };
        host.prepared = [](auto...) { return KVHOOK_OK; };
    }

    void add(std::uint64_t uid, std::uint64_t first_token, std::uint64_t tokens) {
        KvhShimSequence sequence{};
        sequence.step.uid = uid;
        sequence.step.first_token = first_token;
        sequence.step.tokens = tokens;
        sequence.step.phase = KVH_PHASE_PREFILL;
        sequence.layers = layers.data();
        sequences.push_back(sequence);
        descriptor.batch_tokens = std::max(descriptor.batch_tokens, first_token + tokens);
    }

    KvhShimRank *described(std::uint32_t rank = 0) {
        descriptor.struct_size = sizeof(KvhShimRank);
        descriptor.key = caches[0].data();
        descriptor.host = &host;
        descriptor.rank = rank;
        descriptor.layers = LAYERS;
        descriptor.sequences = kvhook::array(sequences);
        descriptor.prepares = kvhook::array_mut(prepares);
        descriptor.error = kvhook::sized<KvhText>();
        descriptor.error.data = message;
        descriptor.error.capacity = sizeof(message);
        return &descriptor;
    }

    std::string error() const { return std::string(message, descriptor.error.length); }

    /// Makes this thread the rank's.
    void enter() {
        auto &tensors = infinilm::global_state::context.kv_cache_vec;
        tensors.clear();
        for (auto &cache : caches) {
            TensorImpl impl;
            impl.start = reinterpret_cast<std::byte *>(cache.data());
            impl.where = device;
            tensors.emplace_back(Tensor(impl));
        }
    }
};

/// Floats whose values are their indices.
std::vector<float> counting(std::size_t count) {
    std::vector<float> out(count);
    for (std::size_t i = 0; i < count; ++i) {
        out[i] = static_cast<float>(i);
    }
    return out;
}

Tensor tensor(const float *data, std::vector<std::size_t> sizes, std::vector<std::ptrdiff_t> steps) {
    TensorImpl impl;
    impl.start = reinterpret_cast<std::byte *>(const_cast<float *>(data));
    impl.sizes = std::move(sizes);
    impl.steps = std::move(steps);
    return Tensor(impl);
}

/// `[tokens, HEADS, DIM]`, `offset` floats into rows of `row` floats: part of a fused buffer.
Tensor paged(const std::vector<float> &data, std::size_t tokens, std::size_t row, std::size_t offset) {
    return tensor(data.data() + offset, {tokens, HEADS, DIM}, {static_cast<std::ptrdiff_t>(row), DIM, 1});
}

float at(const KvhTensor &tensor, std::int64_t token, std::int64_t head, std::int64_t channel) {
    const auto *data = reinterpret_cast<const float *>(static_cast<std::byte *>(tensor.data) + tensor.byte_offset);
    return data[token * tensor.strides[0] + head * tensor.strides[1] + channel * tensor.strides[2]];
}

const KvhStepSequence &sequence(const KvhookStep &step, std::uint64_t index) {
    return element<KvhStepSequence>(step.sequences, index);
}

/// One layer of paged tensors with `tokens` tokens, shown.
void layer(std::size_t index, std::size_t tokens) {
    const auto data = counting(tokens * HEADS * DIM);
    const Tensor all = paged(data, tokens, HEADS * DIM, 0);
    kvhook_on_attention(index, all, all, all);
}

void begin(Rank &rank, std::uint32_t number = 0) {
    CHECK(kvhook_shim_begin(rank.described(number), 1, nullptr) == KVHOOK_OK);
}

void silent_without_descriptor() {
    Rank rank;
    rank.enter();
    kvhook_on_run();
    layer(0, 4);
    kvhook_on_forward_done();
    CHECK(current == nullptr && registered == 0);
}

void silent_outside_of_run() {
    Rank rank;
    rank.add(7, 0, 4);
    rank.prepares.push_back({});
    int calls = 0;
    rank.host.shown = [&](auto...) { return ++calls, KVHOOK_OK; };
    rank.host.prepared = [&](auto...) { return ++calls, KVHOOK_OK; };
    rank.enter();
    begin(rank);
    layer(0, 4);
    kvhook_on_forward_done();
    CHECK(calls == 0);
    kvhook_on_run();
    layer(0, 4);
    kvhook_on_forward_done();
    CHECK(calls == 2 && rank.descriptor.shown == 1 && rank.descriptor.prepared == 1);
    layer(0, 4);
    kvhook_on_forward_done();
    CHECK(calls == 2);
}

void paged_views_of_a_fused_buffer() {
    constexpr std::size_t TOKENS = 5, ROW = 4 * HEADS * DIM;
    Rank rank;
    rank.add(7, 0, 3);
    rank.add(9, 3, 2);
    const auto data = counting(TOKENS * ROW);
    int calls = 0;
    rank.host.shown = [&](std::uint32_t number, const KvhookStep &step, KvhText *) {
        ++calls;
        CHECK(number == 3 && step.layer == 1 && step.stream == nullptr && step.struct_size == sizeof(KvhookStep));
        CHECK(step.q->ndim == 3 && step.q->shape[0] == TOKENS && step.k->shape[1] == HEADS && step.v->shape[2] == DIM);
        CHECK(step.q->device.device_type == KVH_DEVICE_CPU && step.q->dtype.bits == 32);
        for (std::size_t t = 0; t < TOKENS; ++t) {
            for (std::size_t h = 0; h < HEADS; ++h) {
                for (std::size_t d = 0; d < DIM; ++d) {
                    const std::size_t expected = t * ROW + h * DIM + d;
                    CHECK(at(*step.q, t, h, d) == expected);
                    CHECK(at(*step.k, t, h, d) == expected + 2 * HEADS * DIM);
                    CHECK(at(*step.v, t, h, d) == expected + 3 * HEADS * DIM);
                }
            }
        }
        CHECK(step.sequences.count == 2);
        CHECK(sequence(step, 0).uid == 7 && sequence(step, 0).first_token == 0 && sequence(step, 0).tokens == 3);
        CHECK(sequence(step, 1).uid == 9 && sequence(step, 1).first_token == 3 && sequence(step, 1).tokens == 2);
        CHECK(sequence(step, 1).cache == &rank.layers[1]);
        CHECK(sequence(step, 1).struct_size == sizeof(KvhStepSequence));
        return KVHOOK_OK;
    };
    rank.enter();
    begin(rank, 3);
    kvhook_on_run();
    kvhook_on_attention(1, paged(data, TOKENS, ROW, 0), paged(data, TOKENS, ROW, 2 * HEADS * DIM),
                        paged(data, TOKENS, ROW, 3 * HEADS * DIM));
    kvhook_on_forward_done();
    CHECK(calls == 1 && rank.descriptor.shown == 1 && rank.descriptor.show_status == KVHOOK_OK);
    CHECK(rank.descriptor.prepared == 0);
}

/// A static batch `[ROWS, tokens, HEADS, DIM]` whose rows are `row_step` floats apart: calls, and each token's first
/// channel.
int static_batch(std::size_t tokens, std::ptrdiff_t row_step) {
    constexpr std::size_t ROWS = 3;
    Rank rank;
    for (std::size_t row = 0; row < ROWS; ++row) {
        rank.add(row + 1, row * tokens, tokens);
    }
    const auto data = counting(ROWS * static_cast<std::size_t>(row_step));
    std::map<std::uint64_t, std::vector<float>> seen;
    int calls = 0;
    rank.host.shown = [&](std::uint32_t, const KvhookStep &step, KvhText *) {
        ++calls;
        for (std::uint64_t i = 0; i < step.sequences.count; ++i) {
            const KvhStepSequence &each = sequence(step, i);
            for (std::uint64_t t = 0; t < each.tokens; ++t) {
                CHECK(each.first_token + t < static_cast<std::uint64_t>(step.q->shape[0]));
                seen[each.uid].push_back(at(*step.q, each.first_token + t, 0, 0));
            }
        }
        return KVHOOK_OK;
    };
    rank.enter();
    begin(rank);
    kvhook_on_run();
    const Tensor all = tensor(data.data(), {ROWS, tokens, HEADS, DIM}, {row_step, HEADS * DIM, DIM, 1});
    kvhook_on_attention(0, all, all, all);
    kvhook_on_forward_done();
    CHECK(seen.size() == ROWS && rank.descriptor.shown == 1 && rank.descriptor.show_status == KVHOOK_OK);
    for (std::size_t row = 0; row < ROWS; ++row) {
        CHECK(seen[row + 1].size() == tokens);
        for (std::size_t t = 0; t < tokens; ++t) {
            CHECK(seen[row + 1][t] == row * static_cast<std::size_t>(row_step) + t * HEADS * DIM);
        }
    }
    return calls;
}

void static_batch_in_one_stride() { CHECK(static_batch(4, 4 * HEADS * DIM) == 1); }
void static_batch_with_gaps_between_rows() { CHECK(static_batch(4, 5 * HEADS * DIM) == 3); }
void static_batch_of_one_token_each() { CHECK(static_batch(1, 5 * HEADS * DIM) == 1); }

void only_wanted_phases() {
    Rank rank;
    rank.add(7, 0, 4);
    int calls = 0;
    rank.host.shown = [&](auto...) { return ++calls, KVHOOK_OK; };
    rank.enter();
    begin(rank);
    kvhook_on_run();
    rank.host.phases = KVH_PHASE_DECODE;
    layer(0, 4);
    rank.host.phases = 0;
    layer(1, 4);
    CHECK(calls == 0);
    rank.host.phases = KVH_PHASE_DECODE | KVH_PHASE_PREFILL;
    layer(2, 4);
    CHECK(calls == 1 && rank.descriptor.shown == 1);
}

void layers_without_cache_are_passed_over() {
    Rank rank;
    rank.add(7, 0, 4);
    std::vector<std::uint32_t> seen;
    rank.host.shown = [&](std::uint32_t, const KvhookStep &step, KvhText *) {
        return seen.push_back(step.layer), KVHOOK_OK;
    };
    rank.enter();
    infinilm::global_state::context.kv_cache_vec[0] = Tensor();
    rank.described();
    rank.descriptor.key = rank.caches[1].data();
    CHECK(kvhook_shim_begin(&rank.descriptor, 1, nullptr) == KVHOOK_OK);
    kvhook_on_run();
    layer(0, 4);
    layer(1, 4);
    CHECK(seen == std::vector<std::uint32_t>{1} && rank.descriptor.show_status == KVHOOK_OK);
}

/// What a layer that does not fit leaves behind: no call, an error with its message, and no harm.
void refused(KvhookStatus status, const char *message, const std::function<void()> &show,
             const std::function<void(Rank &)> &change = {}) {
    Rank rank;
    rank.add(7, 0, 4);
    rank.prepares.push_back({});
    rank.host.shown = [&](auto...) { return std::abort(), KVHOOK_OK; };
    if (change) {
        change(rank);
    }
    rank.enter();
    begin(rank);
    kvhook_on_run();
    show();
    kvhook_on_forward_done();
    CHECK(rank.descriptor.show_status == status && rank.descriptor.shown == 0);
    CHECK(rank.error().find(message) != std::string::npos);
    CHECK(rank.descriptor.prepared == 1 && rank.descriptor.prepare_status == KVHOOK_OK);
    CHECK(kvhook_shim_end(&rank.descriptor, 1) == 0);
}

void what_does_not_fit_is_not_shown() {
    refused(KVHOOK_ERR_INVALID_ARGUMENT, "layer 1 has not the 4 tokens", [] { layer(1, 5); });
    refused(KVHOOK_ERR_INVALID_ARGUMENT, "layer 3 of a model of 3", [] { layer(3, 4); });
    refused(KVHOOK_ERR_UNSUPPORTED, "F32, F16 or BF16", [] {
        TensorImpl impl;
        impl.type = infinicore::DataType::I8;
        kvhook_on_attention(0, Tensor(impl), Tensor(impl), Tensor(impl));
    });
    refused(KVHOOK_ERR_UNSUPPORTED, "3 or 4 axes", [] {
        const Tensor flat = tensor(nullptr, {4, 6}, {6, 1});
        kvhook_on_attention(0, flat, flat, flat);
    });
    refused(KVHOOK_ERR_INVALID_ARGUMENT, "sequence 8 has 4 tokens from 1 on", [] { layer(0, 4); }, [](Rank &rank) {
        rank.add(8, 1, 4);
        rank.descriptor.batch_tokens = 4;
    });
}

void exceptions_stay_inside() {
    refused(KVHOOK_ERR_INTERNAL, "device lost",
            [] {
                context::broken = true;
                layer(0, 4);
                context::broken = false;
            },
            [](Rank &rank) { rank.device = Device(Device::Type::NVIDIA, 1); });
}

void errors_of_the_host_are_kept() {
    Rank rank;
    rank.add(7, 0, 4);
    rank.prepares.push_back({});
    rank.host.shown = [](std::uint32_t, const KvhookStep &, KvhText *error) {
        write(error, "first");
        return KVHOOK_ERR_VIEW;
    };
    rank.host.prepared = [](std::uint32_t, KvhArrayMut, void *, KvhText *error) {
        write(error, "second");
        return KVHOOK_ERR_UNKNOWN_UID;
    };
    rank.enter();
    begin(rank);
    kvhook_on_run();
    layer(0, 4);
    layer(1, 4);
    kvhook_on_forward_done();
    CHECK(rank.descriptor.show_status == KVHOOK_ERR_VIEW && rank.descriptor.prepare_status == KVHOOK_ERR_UNKNOWN_UID);
    CHECK(rank.error() == "first" && rank.descriptor.prepared == 1);
    CHECK(kvhook_shim_end(&rank.descriptor, 1) == 0);
    begin(rank);
    CHECK(rank.descriptor.show_status == KVHOOK_OK && rank.descriptor.prepared == 0 && rank.error().empty());
}

void device_and_stream_of_the_rank() {
    const Device device(Device::Type::NVIDIA, 2);
    Rank rank;
    rank.device = device;
    rank.add(7, 0, 4);
    rank.prepares.push_back({});
    int calls = 0;
    rank.host.shown = [&](std::uint32_t, const KvhookStep &step, KvhText *) {
        ++calls;
        CHECK(step.stream == context::stream_of(device) && context::current == device);
        return KVHOOK_OK;
    };
    rank.host.prepared = [&](std::uint32_t, KvhArrayMut, void *stream, KvhText *) {
        ++calls;
        CHECK(stream == context::stream_of(device) && context::current == device);
        return KVHOOK_OK;
    };
    rank.enter();
    begin(rank);
    kvhook_on_run();
    layer(0, 4);
    CHECK(context::current == Device());
    kvhook_on_forward_done();
    CHECK(context::current == Device() && calls == 2);
}

void each_rank_on_its_own_thread() {
    constexpr std::uint32_t RANKS = 2;
    Rank ranks[RANKS], other_engine;
    std::vector<KvhShimRank> descriptors;
    std::atomic<int> calls{0};
    for (std::uint32_t number = 0; number < RANKS; ++number) {
        Rank &rank = ranks[number];
        rank.add(7, 0, 4);
        rank.prepares.push_back({});
        rank.host.shown = [&calls, number](std::uint32_t asked, const KvhookStep &, KvhText *) {
            CHECK(asked == number);
            return ++calls, KVHOOK_OK;
        };
        rank.host.prepared = [&calls, number](std::uint32_t asked, KvhArrayMut sequences, void *, KvhText *) {
            CHECK(asked == number && sequences.count == 1);
            static_cast<KvhookPrepareSequence *>(sequences.data)->ticket = 100 + number;
            return ++calls, KVHOOK_OK;
        };
        descriptors.push_back(*rank.described(number));
    }
    CHECK(kvhook_shim_begin(descriptors.data(), RANKS, nullptr) == KVHOOK_OK);
    std::vector<std::thread> threads;
    for (Rank *rank : {&ranks[0], &ranks[1], &other_engine}) {
        threads.emplace_back([rank] {
            rank->enter();
            kvhook_on_run();
            for (std::size_t index = 0; index < LAYERS; ++index) {
                layer(index, 4);
            }
            kvhook_on_forward_done();
        });
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    CHECK(kvhook_shim_end(descriptors.data(), RANKS) == 0);
    CHECK(calls == RANKS * (LAYERS + 1));
    for (std::uint32_t number = 0; number < RANKS; ++number) {
        CHECK(descriptors[number].shown == LAYERS && descriptors[number].prepared == 1);
        CHECK(ranks[number].prepares[0].ticket == 100 + number);
    }
}

void memory_is_kept_while_a_thread_uses_it() {
    Rank rank;
    rank.add(7, 0, 4);
    rank.enter();
    begin(rank);
    kvhook_on_run();
    CHECK(kvhook_shim_end(&rank.descriptor, 1) == 1);
    CHECK(kvhook_shim_end(&rank.descriptor, 1) == 1);
    CHECK(kvhook_shim_begin(rank.described(), 1, nullptr) == KVHOOK_ERR_INVALID_ARGUMENT);
    std::thread([&rank] {
        rank.enter();
        kvhook_on_run();
        CHECK(current == nullptr);
    }).join();
    kvhook_on_forward_done();
    CHECK(kvhook_shim_end(&rank.descriptor, 1) == 0 && registered == 0);
    begin(rank);
}

void a_thread_that_ends_in_a_forward_lets_go() {
    Rank rank;
    rank.add(7, 0, 4);
    begin(rank);
    std::thread([&rank] {
        rank.enter();
        kvhook_on_run();
        CHECK(kvhook_shim_end(&rank.descriptor, 1) == 1);
    }).join();
    CHECK(kvhook_shim_end(&rank.descriptor, 1) == 0 && registered == 0);
}

void after_a_forward_that_has_thrown_the_next_is_silent() {
    Rank rank;
    rank.add(7, 0, 4);
    rank.host.shown = [](auto...) { return std::abort(), KVHOOK_OK; };
    rank.enter();
    begin(rank);
    kvhook_on_run();
    CHECK(kvhook_shim_end(&rank.descriptor, 1) == 1);
    kvhook_on_run();
    layer(0, 4);
    kvhook_on_forward_done();
    CHECK(kvhook_shim_end(&rank.descriptor, 1) == 0 && registered == 0);
}

void a_forward_that_was_taken_back_is_not_found() {
    Rank rank;
    rank.add(7, 0, 4);
    rank.host.shown = [](auto...) { return std::abort(), KVHOOK_OK; };
    rank.enter();
    begin(rank);
    CHECK(kvhook_shim_end(&rank.descriptor, 1) == 0);
    kvhook_on_run();
    layer(0, 4);
    kvhook_on_forward_done();
}

void begin_takes_all_or_none() {
    Rank first, second;
    KvhShimRank both[] = {*first.described(), *second.described()};
    char message[256];
    KvhText error = kvhook::sized<KvhText>();
    error.data = message;
    error.capacity = sizeof(message);
    const auto refused_with = [&](const char *text) {
        const bool refused = kvhook_shim_begin(both, 2, &error) == KVHOOK_ERR_INVALID_ARGUMENT;
        const bool named = std::string(message, error.length).find(text) != std::string::npos;
        return refused && named && registered == 0;
    };
    both[1].struct_size -= 8;
    CHECK(refused_with("descriptor 1 has struct_size"));
    both[1] = *second.described();
    both[1].key = both[0].key;
    CHECK(refused_with("descriptor 1 has a key that is in use"));
    both[1] = *second.described();
    both[1].host = nullptr;
    CHECK(refused_with("no host"));
    both[1] = *second.described();
    CHECK(kvhook_shim_begin(both, 2, &error) == KVHOOK_OK && registered == 2);
    CHECK(kvhook_shim_end(both, 2) == 0 && registered == 0);
}

void attach_takes_one_loaded_host(const char *library) {
    char message[256];
    KvhText error = kvhook::sized<KvhText>();
    error.data = message;
    error.capacity = sizeof(message);
    CHECK(kvhook_shim_attach(library, &error) == KVHOOK_OK);
    CHECK(kvhook_shim_attach("libno-such-host.so", &error) == KVHOOK_ERR_DLOPEN);
    CHECK(std::string(message, error.length).find("libno-such-host.so is not loaded") == 0);
    CHECK(kvhook_shim_attach("libc.so.6", &error) == KVHOOK_ERR_DLOPEN);
    CHECK(std::string(message, error.length).find("libc.so.6 is not kvhook's host") == 0);
    CHECK(kvhook_shim_version() == KVHOOK_SHIM_VERSION);
}

void messages_are_cut_at_characters() {
    char buffer[4];
    KvhText text = kvhook::sized<KvhText>();
    text.data = buffer;
    text.capacity = sizeof(buffer);
    write(&text, "abc\xC3\xA9");
    CHECK(text.length == 3);
    write(&text, "ab\xC3\xA9");
    CHECK(text.length == 4);
    write(nullptr, "abc");
}

}  // namespace

int main(int count, char **arguments) {
    CHECK(count == 3);
    const char *library = arguments[1];
    const std::map<std::string, std::function<void()>> cases{
#define CASE(name) {#name, name}
        CASE(silent_without_descriptor),
        CASE(silent_outside_of_run),
        CASE(paged_views_of_a_fused_buffer),
        CASE(static_batch_in_one_stride),
        CASE(static_batch_with_gaps_between_rows),
        CASE(static_batch_of_one_token_each),
        CASE(only_wanted_phases),
        CASE(layers_without_cache_are_passed_over),
        CASE(what_does_not_fit_is_not_shown),
        CASE(exceptions_stay_inside),
        CASE(errors_of_the_host_are_kept),
        CASE(device_and_stream_of_the_rank),
        CASE(each_rank_on_its_own_thread),
        CASE(memory_is_kept_while_a_thread_uses_it),
        CASE(a_thread_that_ends_in_a_forward_lets_go),
        CASE(after_a_forward_that_has_thrown_the_next_is_silent),
        CASE(a_forward_that_was_taken_back_is_not_found),
        CASE(begin_takes_all_or_none),
        CASE(messages_are_cut_at_characters),
#undef CASE
        {"attach_takes_one_loaded_host", [&] { attach_takes_one_loaded_host(library); }},
    };
    if (std::string(arguments[2]) == "list") {
        for (const auto &[name, body] : cases) {
            std::puts(name.c_str());
        }
        return 0;
    }
    Rank rank;
    CHECK(kvhook_shim_begin(rank.described(), 1, nullptr) == KVHOOK_ERR_INVALID_ARGUMENT);
    CHECK(dlopen(library, RTLD_NOW | RTLD_LOCAL) != nullptr);
    CHECK(kvhook_shim_attach(library, nullptr) == KVHOOK_OK);
    const auto found = cases.find(arguments[2]);
    CHECK(found != cases.end());
    found->second();
    return 0;
}
