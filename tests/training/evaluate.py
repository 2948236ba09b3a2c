#!/usr/bin/env python3
"""KL of shipped weights on text that was never trained on, against maps that need no training.

    evaluate.py --model FOLDER --tokens tokens.safetensors --weights F2 F4 --linear L2 L4 --out results.json

A passage is T tokens of prompt and 256 scored tokens.  T - 1 rows are in the cache when it is compressed once; the last
prompt token is the first one fed afterwards.  All methods keep the same 4 sinks, 32 newest rows and the same number of
rows.  Arithmetic f32, cache bf16, weights as shipped.  Differences are paired over passages.
"""

import argparse
import json
import math

import torch
from safetensors.torch import load_file

from compressor import Fixed, Linear, Shipped
from model import BLOCK, Divergence, Frozen, Layout
from train import RECENT, SINKS, Texts
from weights import read


def upper_tail(t, freedom):
    """P(Student t > t), by integrating the density."""
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:-1]  # t + x / (1 - x)
    y = abs(t) + x / (1 - x)
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = torch.exp(log - (freedom + 1) / 2 * torch.log1p(y * y / freedom)) / (1 - x) ** 2
    tail = float(torch.trapezoid(density, x))
    return tail if t > 0 else 1 - tail


def linear_map(path, factor, device):
    state = {k: v.to(device) for k, v in load_file(path).items()}
    out = Linear(state["mean"], state["deviation"], factor, False)
    out.weight.data, out.bias.data = state["weight"], state["bias"]
    return out


@torch.no_grad()
def measure(model, passages, prompt, factor, methods, batch):
    """{method: KL of each passage}"""
    layout = Layout(prompt - 1, 1, factor, SINKS, RECENT, model.device)
    out = {name: [] for name in methods}
    masks = {bias: model.mask(layout, bias) for bias in {b for _, b in methods.values()}}
    for ids in passages.split(batch):
        hidden, keys, values = model.prefill(ids)
        scored = slice(prompt - 1, prompt - 1 + BLOCK)
        for name, (compressor, bias) in methods.items():
            rows = compressor.compress(keys, values, SINKS, layout.most)
            student = model.blocks(ids[:, scored], layout, masks[bias], keys, values, *rows)
            kl = Divergence.apply(student.flatten(0, 1), hidden[:, scored].flatten(0, 1), model.head)
            out[name].append(kl.view(len(ids), BLOCK).mean(1).cpu())
    return {name: torch.cat(parts).double() for name, parts in out.items()}


def summary(kl, stride):
    """Mean, standard error, and the paired difference to stride with its one-sided p."""
    n, diff = len(kl), stride - kl
    error = float(diff.std() / n**0.5)
    p = upper_tail(float(diff.mean()) / error, n - 1) if error > 0 else None
    return {
        "kl": float(kl.mean()),
        "error": float(kl.std() / n**0.5),
        "ratio": float(kl.mean() / stride.mean()),
        "better_by": float(diff.mean()),
        "better_by_error": error,
        "p": p,
        "passages": n,
    }


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", required=True)
    args.add_argument("--tokens", required=True)
    args.add_argument("--weights", nargs="+", required=True)
    args.add_argument("--linear", nargs="*", default=[])
    args.add_argument("--sources", nargs="+", default=["moby-dick", "state-of-the-union", "eighty-days", "rust-book"])
    args.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    args.add_argument("--passages", type=int, default=32, help="of each source")
    args.add_argument("--batch", type=int, default=8)
    args.add_argument("--device", default="cuda")
    args.add_argument("--out", required=True)
    args = args.parse_args()

    device = torch.device(args.device)
    model = Frozen(args.model, device, torch.float32)
    texts = Texts(args.tokens, "test", device).tokens
    results = []
    for path, linear in zip(args.weights, args.linear or [None] * len(args.weights)):
        terms, tensors = read(path)
        f = terms["factor"]
        methods = {
            "stride": (Fixed(f, False, False), 0.0),
            "stride K, mean V": (Fixed(f, False, True), 0.0),
            "mean": (Fixed(f, True, True), 0.0),
            "mean + log f": (Fixed(f, True, True), math.log(f)),
        }
        if linear:
            methods["trained linear map"] = (linear_map(linear, f, device), 0.0)
        methods["trained MLP"] = (Shipped([t.to(device) for t in tensors], f), 0.0)
        for prompt in args.lengths:
            length, by_source = prompt + BLOCK, {}
            for source in args.sources:
                tokens = texts[source]
                count = min(args.passages, len(tokens) // length)
                step = len(tokens) // count
                passages = torch.stack([tokens[i * step : i * step + length] for i in range(count)])
                by_source[source] = measure(model, passages, prompt, f, methods, args.batch)
            for source in [*args.sources, "all"]:
                pick = lambda m: torch.cat([by_source[s][m] for s in (args.sources if source == "all" else [source])])
                for method in methods:
                    row = summary(pick(method), pick("stride"))
                    results.append({"factor": f, "prompt": prompt, "source": source, "method": method, **row})
                    if source == "all" or method.startswith("trained M"):
                        p = row["p"] if row["p"] is not None else math.nan
                        print(
                            f"f={f} T={prompt} {source:20s} {method:20s} {row['kl']:.4f} ({row['error']:.4f})",
                            f"ratio {row['ratio']:.3f} p {p:.1e} n {row['passages']}",
                            flush=True,
                        )
    with open(args.out, "w") as file:
        json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
