#!/usr/bin/env python3
"""Writes lagkv.safetensors: LagKV's scores (Liang et al. 2025, arXiv 2504.04704), in PyTorch, f64, written from the formula.

    k, v        [kv heads, tokens, channels]; multiples of 1/32 below 4, so exact in f32, f16 and bf16
    {lag}       [kv heads, blocks, lag]: scores of the blocks but the last, behind SINKS sinks

    pip install torch==2.15.0 safetensors==0.8.0 numpy==2.4.6
    python3 lagkv.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

HEADS, TOKENS, CHANNELS, SINKS = 2, 150, 16, 4
LAGS = (8, 16, 31, 73)


def part(rows, lag):
    """rows: [heads, tokens, channels] -> [heads, blocks - 1, lag]"""
    count = (rows.shape[1] - SINKS) // lag
    blocks = rows[:, SINKS : SINKS + count * lag].unflatten(1, (count, lag))
    behind = blocks[:, 1:]
    least, most = behind.amin(2, keepdim=True), behind.amax(2, keepdim=True)
    return ((blocks[:, :-1] - least) / (most - least)).std(-1).softmax(-1)


def main():
    torch.manual_seed(12)
    drift = torch.linspace(0, 2, TOKENS, dtype=torch.float64)[:, None]
    k, v = ((torch.randn(HEADS, TOKENS, CHANNELS, dtype=torch.float64) + drift).clamp(-3.9, 3.9) for _ in range(2))
    k, v = ((32 * x).round() / 32 for x in (k, v))
    tensors = {"k": k.float(), "v": v.float()}
    for lag in LAGS:
        tensors[str(lag)] = ((part(k, lag) + part(v, lag)) / 2).contiguous()
    save_file(tensors, Path(__file__).parent / "lagkv.safetensors")


if __name__ == "__main__":
    main()
