// A toy transformer: attention layers with RoPE and a residual, seeded weights, no MLP. And the same model again, written
// another way: full attention in double over every token, with a mask for what a compressed cache does not hold.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace toy {

inline constexpr std::size_t LAYERS = 3;
inline constexpr std::size_t KV_HEADS = 2;
inline constexpr std::size_t Q_HEADS = 4;
inline constexpr std::size_t DIM = 16;
inline constexpr std::size_t WIDTH = Q_HEADS * DIM;
inline constexpr double ROPE_BASE = 10000.0;

// SplitMix64.
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    // From -1 to 1.
    float next() {
        std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        z ^= z >> 31;
        return static_cast<float>(static_cast<double>(z >> 11) / 4503599627370496.0 - 1.0);
    }

    std::vector<float> vector(std::size_t count, float scale) {
        std::vector<float> values(count);
        for (float &value : values) value = scale * next();
        return values;
    }

private:
    std::uint64_t state_;
};

struct Weights {
    // Row-major [outputs][WIDTH].
    std::vector<float> q, k, v;
};

// Seeded weights; a token's embedding is drawn from its number.
class Model {
public:
    explicit Model(std::uint64_t seed) {
        Random random(seed);
        for (std::size_t layer = 0; layer < LAYERS; ++layer) {
            const float scale = 2.0f / std::sqrt(static_cast<float>(WIDTH));
            layers.push_back({random.vector(WIDTH * WIDTH, scale), random.vector(KV_HEADS * DIM * WIDTH, scale),
                              random.vector(KV_HEADS * DIM * WIDTH, scale)});
        }
    }

    static std::vector<float> embedding(std::uint64_t token) { return Random(token * 977 + 13).vector(WIDTH, 1.0f); }

    std::vector<Weights> layers;
};

inline std::vector<float> multiply(const std::vector<float> &matrix, const float *x) {
    std::vector<float> y(matrix.size() / WIDTH, 0.0f);
    for (std::size_t i = 0; i < y.size(); ++i)
        for (std::size_t j = 0; j < WIDTH; ++j) y[i] += matrix[i * WIDTH + j] * x[j];
    return y;
}

// Rotates each head's halves against each other.
inline void rope(std::vector<float> &heads, std::uint64_t position) {
    for (std::size_t start = 0; start < heads.size(); start += DIM) {
        for (std::size_t c = 0; c < DIM / 2; ++c) {
            const double angle = static_cast<double>(position) * std::pow(ROPE_BASE, -2.0 * static_cast<double>(c) / DIM);
            const double a = heads[start + c], b = heads[start + c + DIM / 2];
            heads[start + c] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
            heads[start + c + DIM / 2] = static_cast<float>(a * std::sin(angle) + b * std::cos(angle));
        }
    }
}

// Attention of one query over `count` rows, one pass with a running maximum.
inline void attend(const float *query, std::size_t count, const std::function<const float *(std::size_t)> &key,
                   const std::function<const float *(std::size_t)> &value, float *out) {
    float most = -INFINITY, total = 0.0f;
    std::vector<float> sum(DIM, 0.0f);
    for (std::size_t row = 0; row < count; ++row) {
        const float *k = key(row), *v = value(row);
        float logit = 0.0f;
        for (std::size_t c = 0; c < DIM; ++c) logit += query[c] * k[c];
        logit /= std::sqrt(static_cast<float>(DIM));
        const float larger = std::fmax(most, logit);
        const float shrink = std::exp(most - larger), weight = std::exp(logit - larger);
        most = larger;
        total = total * shrink + weight;
        for (std::size_t c = 0; c < DIM; ++c) sum[c] = sum[c] * shrink + weight * v[c];
    }
    for (std::size_t c = 0; c < DIM; ++c) out[c] = sum[c] / total;
}

// Whether the query of a token sees the key of an earlier one: (layer, kv head, query, key).
using Visible = std::function<bool(std::size_t, std::size_t, std::size_t, std::size_t)>;

// The last layer's output for each token: every token at once, layer by layer, in double, masked.
inline std::vector<std::vector<double>> masked_forward(const Model &model, const std::vector<std::uint64_t> &tokens,
                                                       const Visible &visible) {
    using Matrix = std::vector<std::vector<double>>;
    const auto project = [](const std::vector<float> &matrix, const Matrix &x) {
        Matrix y(x.size(), std::vector<double>(matrix.size() / WIDTH, 0.0));
        for (std::size_t t = 0; t < x.size(); ++t)
            for (std::size_t j = 0; j < WIDTH; ++j)
                for (std::size_t i = 0; i < y[t].size(); ++i) y[t][i] += static_cast<double>(matrix[i * WIDTH + j]) * x[t][j];
        return y;
    };
    // RoPE as a multiplication of complex numbers.
    const auto rotate = [](Matrix &x) {
        for (std::size_t t = 0; t < x.size(); ++t) {
            for (std::size_t i = 0; i < x[t].size(); ++i) {
                const std::size_t c = i % DIM;
                if (c >= DIM / 2) continue;
                const double angle = static_cast<double>(t) / std::pow(ROPE_BASE, static_cast<double>(2 * c) / DIM);
                const double real = x[t][i], imaginary = x[t][i + DIM / 2];
                x[t][i] = real * std::cos(angle) - imaginary * std::sin(angle);
                x[t][i + DIM / 2] = imaginary * std::cos(angle) + real * std::sin(angle);
            }
        }
    };
    Matrix x;
    for (const std::uint64_t token : tokens) {
        const std::vector<float> embedding = Model::embedding(token);
        x.emplace_back(embedding.begin(), embedding.end());
    }
    for (std::size_t layer = 0; layer < LAYERS; ++layer) {
        Matrix q = project(model.layers[layer].q, x), k = project(model.layers[layer].k, x);
        const Matrix v = project(model.layers[layer].v, x);
        rotate(q);
        rotate(k);
        for (std::size_t t = 0; t < x.size(); ++t) {
            for (std::size_t head = 0; head < Q_HEADS; ++head) {
                const std::size_t kv = head / (Q_HEADS / KV_HEADS);
                std::vector<double> weights(t + 1, 0.0);
                double total = 0.0;
                for (std::size_t s = 0; s <= t; ++s) {
                    if (!visible(layer, kv, t, s)) continue;
                    double logit = 0.0;
                    for (std::size_t c = 0; c < DIM; ++c) logit += q[t][head * DIM + c] * k[s][kv * DIM + c];
                    weights[s] = std::exp(logit / std::sqrt(static_cast<double>(DIM)));
                    total += weights[s];
                }
                for (std::size_t c = 0; c < DIM; ++c)
                    for (std::size_t s = 0; s <= t; ++s) x[t][head * DIM + c] += weights[s] / total * v[s][kv * DIM + c];
            }
        }
    }
    return x;
}

}  // namespace toy
