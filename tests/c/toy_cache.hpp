// The toy engine's KV cache: one sequence, f32, contiguous or paged. What is freed is gone: a contiguous layer moves to a
// smaller allocation, a paged one gives blocks back, which are overwritten.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "kvhook.hpp"
#include "toy_model.hpp"

namespace toy {

inline constexpr std::size_t BLOCK = 8;

class Cache {
public:
    explicit Cache(bool paged) : paged_(paged), layers_(LAYERS) {
        for (Layer &layer : layers_) {
            if (!paged) continue;
            layer.rows.assign(2 * POOL_BLOCKS * BLOCK * ROW, NAN);
            // Taken from the end, odd numbers first, so that a sequence's blocks do not lie in order.
            for (std::int32_t block = 0; block < static_cast<std::int32_t>(POOL_BLOCKS); block += 2) layer.free.push_back(block);
            for (std::int32_t block = 1; block < static_cast<std::int32_t>(POOL_BLOCKS); block += 2) layer.free.push_back(block);
        }
    }

    std::uint64_t length(std::size_t layer) const { return layers_[layer].length; }

    std::vector<std::uint64_t> lengths() const {
        std::vector<std::uint64_t> lengths;
        for (const Layer &layer : layers_) lengths.push_back(layer.length);
        return lengths;
    }

    // `k` and `v` are [KV_HEADS][DIM].
    void append(std::size_t index, const std::vector<float> &k, const std::vector<float> &v) {
        Layer &layer = layers_[index];
        reserve(layer, layer.length + 1);
        for (std::size_t head = 0; head < KV_HEADS; ++head) {
            for (std::size_t c = 0; c < DIM; ++c) {
                row(layer, layer.length, head, false)[c] = k[head * DIM + c];
                row(layer, layer.length, head, true)[c] = v[head * DIM + c];
            }
        }
        ++layer.length;
    }

    const float *key(std::size_t layer, std::size_t head, std::size_t token) { return row(layers_[layer], token, head, false); }
    const float *value(std::size_t layer, std::size_t head, std::size_t token) { return row(layers_[layer], token, head, true); }

    // Describes a layer by the row formula. Valid until the layer changes.
    KvhLayer view(std::size_t index) {
        Layer &layer = layers_[index];
        float *k = layer.rows.data(), *v = k + layer.rows.size() / 2;
        const auto number = static_cast<std::uint32_t>(index);
        if (paged_) {
            return kvhook::paged_layer(number, KV_HEADS, layer.length,
                                       kvhook::paged_token_major(k, kvhook::f32, BLOCK, KV_HEADS, DIM),
                                       kvhook::paged_token_major(v, kvhook::f32, BLOCK, KV_HEADS, DIM), BLOCK, layer.table);
        }
        return kvhook::contiguous_layer(number, KV_HEADS, layer.length,
                                        kvhook::head_major(k, kvhook::f32, layer.capacity, DIM),
                                        kvhook::head_major(v, kvhook::f32, layer.capacity, DIM));
    }

    std::vector<KvhLayer> views() {
        std::vector<KvhLayer> views;
        for (std::size_t layer = 0; layer < LAYERS; ++layer) views.push_back(view(layer));
        return views;
    }

    // The first `length` rows are what is left. Gives the bytes that became free.
    std::uint64_t shrink(std::size_t index, std::uint64_t length) {
        Layer &layer = layers_[index];
        if (length > layer.length) throw std::logic_error("a layer cannot shrink to more rows than it has");
        layer.length = length;
        if (paged_) {
            const std::size_t blocks = (length + BLOCK - 1) / BLOCK, before = layer.table.size();
            while (layer.table.size() > blocks) release(layer, blocks);
            return (before - blocks) * BLOCK * ROW * 2 * sizeof(float);
        }
        const std::size_t before = layer.rows.size();
        resize(layer, length);
        return (before - layer.rows.size()) * sizeof(float);
    }

    // Of the first `planned` blocks only those with the given ordinals stay; later ones follow.
    void keep_blocks(std::size_t index, const std::uint32_t *ordinals, std::size_t count, std::size_t planned) {
        Layer &layer = layers_[index];
        std::vector<std::int32_t> kept;
        for (std::size_t i = 0, next = 0; i < layer.table.size(); ++i) {
            const bool stays = i >= planned || (next < count && ordinals[next] == i);
            if (stays && i < planned) ++next;
            if (stays) {
                kept.push_back(layer.table[i]);
            } else {
                wipe(layer, layer.table[i]);
            }
        }
        layer.table = kept;
    }

private:
    static constexpr std::size_t POOL_BLOCKS = 40;
    // Elements of one token.
    static constexpr std::size_t ROW = KV_HEADS * DIM;

    struct Layer {
        // K, then V.
        std::vector<float> rows;
        std::uint64_t length = 0;
        std::size_t capacity = 0;
        std::vector<std::int32_t> table, free;
    };

    float *row(Layer &layer, std::size_t token, std::size_t head, bool value) {
        float *base = layer.rows.data() + (value ? layer.rows.size() / 2 : 0);
        if (!paged_) return base + (head * layer.capacity + token) * DIM;
        const auto block = static_cast<std::size_t>(layer.table.at(token / BLOCK));
        return base + (block * BLOCK + token % BLOCK) * ROW + head * DIM;
    }

    void reserve(Layer &layer, std::size_t length) {
        if (!paged_) {
            if (length > layer.capacity) resize(layer, length + length / 2);
            return;
        }
        if (length > layer.table.size() * BLOCK) {
            if (layer.free.empty()) throw std::runtime_error("the pool has no free block");
            layer.table.push_back(layer.free.back());
            layer.free.pop_back();
        }
    }

    // Moves a contiguous layer to an allocation for `capacity` rows.
    void resize(Layer &layer, std::size_t capacity) {
        std::vector<float> rows(2 * KV_HEADS * capacity * DIM, NAN);
        for (std::size_t part = 0; part < 2; ++part)
            for (std::size_t head = 0; head < KV_HEADS; ++head)
                for (std::size_t i = 0; i < layer.length * DIM; ++i)
                    rows[(part * KV_HEADS + head) * capacity * DIM + i] = row(layer, 0, head, part == 1)[i];
        layer.rows.swap(rows);
        layer.capacity = capacity;
    }

    void release(Layer &layer, std::size_t at) {
        wipe(layer, layer.table[at]);
        layer.table.erase(layer.table.begin() + static_cast<std::ptrdiff_t>(at));
    }

    void wipe(Layer &layer, std::int32_t block) {
        for (std::size_t part = 0; part < 2; ++part)
            for (std::size_t i = 0; i < BLOCK * ROW; ++i)
                layer.rows[part * layer.rows.size() / 2 + static_cast<std::size_t>(block) * BLOCK * ROW + i] = NAN;
        layer.free.push_back(block);
    }

    bool paged_;
    std::vector<Layer> layers_;
};

}  // namespace toy
