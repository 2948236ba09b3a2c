#!/usr/bin/env python3
"""Writes expected_attention.safetensors: ExpectedAttention's scores (Devoto et al. 2025, arXiv 2510.00636), in PyTorch, f64.

Written from the paper's formula, with whole rotation matrices and their mean taken over all positions.

    q           [tokens, query heads, channels], with RoPE applied
    k, v        [kv heads, tokens, channels]; like q multiples of 1/32 below 4, so exact in f32, f16 and bf16
    {case}      [kv heads, tokens]: the scores, of the first so many tokens and query heads

The metadata entry `cases` lists the cases with what they were computed with.

    pip install torch==2.15.0 safetensors==0.8.0 numpy==2.4.6
    python3 expected_attention.py
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SINKS = 4  # queries at the start that do not count

PLAIN = {
    "tokens": 80, "kv_heads": 2, "q_heads": 6, "channels": 16,
    "rotary_dim": 16, "pairing": "half_split", "base": 10000.0, "frequencies": [],
    "future": 512, "covariance": True, "epsilon": 0.0,
}
CASES = {
    "plain": {},
    "mean_only": {"covariance": False},
    "epsilon": {"epsilon": 0.25, "future": 1},
    "short_future": {"future": 7, "q_heads": 2},
    "interleaved": {"pairing": "interleaved", "base": 100000.0},
    "partial": {"rotary_dim": 8},
    "partial_interleaved": {"rotary_dim": 10, "pairing": "interleaved"},
    "table": {"frequencies": [0.75, 0.5, 0.125, 0.03125, 0.0078125, 0.001953125, 0.0, 0.25]},
    "no_rope": {"pairing": "none"},
    "one_query": {"tokens": 5},
    "no_query": {"tokens": 4},
}


def rotation(position, case):
    """The matrix [channels, channels] that turns a column vector to a position."""
    matrix = torch.eye(case["channels"], dtype=torch.float64)
    if case["pairing"] == "none":
        return matrix
    pairs = case["rotary_dim"] // 2
    for pair in range(pairs):
        frequency = case["base"] ** (-2 * pair / case["rotary_dim"])
        if case["frequencies"]:
            frequency = case["frequencies"][pair]
        angle = torch.tensor(position * frequency, dtype=torch.float64)
        a, b = (pair, pair + pairs) if case["pairing"] == "half_split" else (2 * pair, 2 * pair + 1)
        matrix[a, a] = matrix[b, b] = torch.cos(angle)
        matrix[b, a] = torch.sin(angle)
        matrix[a, b] = -torch.sin(angle)
    return matrix


def scores(q, k, v, case):
    tokens, channels = case["tokens"], case["channels"]
    # Before RoPE: the inverse of a rotation is its transpose.
    before = torch.stack([q[t] @ rotation(t, case) for t in range(SINKS, tokens)] or [q[:0].sum(0)])
    mean = before.mean(0)
    centred = before - mean
    covariance = torch.einsum("thi,thj->hij", centred, centred) / len(before)
    if not case["covariance"]:
        covariance *= 0
    future = [rotation(tokens + step, case) for step in range(case["future"])]
    average = torch.stack(future).mean(0)
    mean = mean @ average.T
    covariance = average @ covariance @ average.T
    group = case["q_heads"] // case["kv_heads"]
    out = []
    for head in range(case["kv_heads"]):
        attention = 0
        for g in range(head * group, (head + 1) * group):
            logits = k[head] @ mean[g] / channels**0.5
            logits = logits + torch.einsum("ti,ij,tj->t", k[head], covariance[g], k[head]) / (2 * channels)
            attention = attention + torch.softmax(logits, 0) / group
        out.append((attention + case["epsilon"]) * v[head].norm(dim=-1))
    return torch.stack(out)


def rows(first, second):
    """With a direction in common, as real queries and keys have."""
    shape = (first, second, PLAIN["channels"])
    x = 0.5 * torch.randn(shape, dtype=torch.float64) + torch.randn(shape[2], dtype=torch.float64)
    return (x.clamp(-3.9, 3.9) * 32).round() / 32


def main():
    torch.manual_seed(11)
    tokens, kv_heads = PLAIN["tokens"], PLAIN["kv_heads"]
    q, k, v = rows(tokens, PLAIN["q_heads"]), rows(kv_heads, tokens), rows(kv_heads, tokens)
    tensors = {"q": q.float(), "k": k.float(), "v": v.float()}
    cases = []
    for name, changes in CASES.items():
        case = PLAIN | changes
        n = case["tokens"]
        tensors[name] = scores(q[:n, : case["q_heads"]], k[:, :n], v[:, :n], case)
        cases.append({"name": name} | case)
    path = Path(__file__).parent / "expected_attention.safetensors"
    save_file(tensors, path, metadata={"cases": json.dumps(cases)})


if __name__ == "__main__":
    main()
