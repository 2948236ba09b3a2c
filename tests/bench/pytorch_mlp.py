#!/usr/bin/env python3
"""The compressor of `mlp-decouple` against PyTorch on the CPU, which runs FastCache's steps, on the same cores.

    python3 tests/bench/pytorch_mlp.py

Each step of the original is done for K and V of several layers: reshape to groups, Linear, ReLU, Linear, ReLU, Linear,
concatenation with the rest of the segment (dropout does nothing in inference). The other side is what
`cargo bench -p kvhook-bench --bench grouped_mlp` prints for the same shapes; PyTorch is timed before and after it. Rates
are of the operations of the formula. Needs PyTorch; figures are medians.
"""

import os
import re
import statistics
import subprocess
import time
from pathlib import Path

import torch

TENSORS = 8
RUNS = 15
# Name as the benchmark prints it: factor, head_dim, KV heads, tokens.
SHAPES = {
    "SmolLM2, f 2": (2, 64, 3, 2048),
    "SmolLM2, f 4": (4, 64, 3, 2048),
    "Llama 8B, f 2": (2, 128, 8, 1024),
    "LLaVA, f 5": (5, 128, 8, 1000),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def compress(rows, mlp, factor):
    """`compress_layer` of the original for one tensor `[batch, heads, tokens, head_dim]`."""
    batch, heads, tokens, dim = rows.shape
    groups = tokens // factor
    whole = groups * factor
    new = mlp(rows[:, :, :whole].reshape(batch, heads, groups, factor * dim))
    return torch.cat([new, rows[:, :, whole:]], dim=2).contiguous()


def rate(shape, dtype, threads):
    """GFLOP/s of PyTorch."""
    factor, dim, heads, tokens = shape
    torch.set_num_threads(threads)
    linear = torch.nn.Linear
    relu = torch.nn.ReLU
    mlp = torch.nn.Sequential(linear(factor * dim, dim), relu(), linear(dim, dim), relu(), linear(dim, dim)).to(dtype)
    tensors = [torch.randn(1, heads, tokens, dim).to(dtype) for _ in range(TENSORS)]
    times = []
    with torch.inference_mode():
        for _ in range(RUNS):
            start = time.perf_counter()
            for rows in tensors:
                compress(rows, mlp, factor)
            times.append(time.perf_counter() - start)
    operations = TENSORS * heads * (tokens // factor) * 2 * (factor + 2) * dim * dim
    return operations / statistics.median(times) / 1e9


def ours():
    """GFLOP/s by name, dtype and cores, from the benchmark's table."""
    root = Path(__file__).resolve().parents[2]
    command = ["cargo", "bench", "-p", "kvhook-bench", "--bench", "grouped_mlp"]
    text = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout
    line = re.compile(r"^(.+?)\s+(f32|f16|bf16)\s+(\d+)\s+[\d.]+\s+([\d.]+)", re.MULTILINE)
    return {(name, dtype, int(cores)): float(rate) for name, dtype, cores, rate in line.findall(text)}


def main():
    threads = sorted({1, len(os.sched_getaffinity(0))})
    cases = [(name, dtype, cores) for name in SHAPES for dtype in DTYPES for cores in threads]
    measure = lambda: {case: rate(SHAPES[case[0]], DTYPES[case[1]], case[2]) for case in cases}  # noqa: E731
    before, kvhook, after = measure(), ours(), measure()
    print(f"PyTorch {torch.__version__}, {TENSORS} tensors; GFLOP/s")
    print(f"{'shape':18} {'cache':5} {'cores':>5} {'PyTorch':>9} {'kvhook':>9} {'ratio':>6}")
    for case in cases:
        theirs = max(before[case], after[case])
        print(f"{case[0]:18} {case[1]:5} {case[2]:5} {theirs:9.1f} {kvhook[case]:9.1f} {kvhook[case] / theirs:6.2f}")


if __name__ == "__main__":
    main()
