"""Random weights of a tiny Llama, from the seed in its config."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def make(config: Mapping) -> dict[str, np.ndarray]:
    """Float32 matrices `[out, in]` under Hugging Face's names, without `model.` and `.weight`.

    A layer of linear attention has `decay` and `linear` in place of the projections of attention.
    """
    draw = np.random.default_rng(config["seed"])
    hidden, inner, vocabulary = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    head_dim = config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    kvs = config["num_key_value_heads"] * head_dim

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (draw.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.3 * draw.standard_normal(hidden)).astype(np.float32)

    weights = {"embed_tokens": matrix(vocabulary, hidden, hidden**0.5)}
    for index, kind in enumerate(layer_types(config)):
        layer = f"layers.{index}."
        weights[layer + "input_layernorm"] = norm()
        if kind == "full_attention":
            # So large that heads tell tokens apart, and that what attention sees decides about the answer.
            weights[layer + "q_proj"] = matrix(queries, hidden, 1.5)
            weights[layer + "k_proj"] = matrix(kvs, hidden, 1.5)
            weights[layer + "v_proj"] = matrix(kvs, hidden)
            weights[layer + "o_proj"] = matrix(hidden, queries, 3.0)
        else:
            weights[layer + "decay"] = draw.uniform(0.5, 0.95, hidden).astype(np.float32)
            weights[layer + "linear"] = matrix(hidden, hidden)
        weights[layer + "post_attention_layernorm"] = norm()
        weights[layer + "gate_proj"] = matrix(inner, hidden)
        weights[layer + "up_proj"] = matrix(inner, hidden)
        weights[layer + "down_proj"] = matrix(hidden, inner)
    weights["norm"] = norm()
    weights["lm_head"] = matrix(vocabulary, hidden, 3.0)
    return weights


def layer_types(config: Mapping) -> list[str]:
    """The kind of each layer."""
    return config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
