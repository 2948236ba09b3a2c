"""Times what other programs do with a KV cache, for `kvhook bench --peers`. docs/bench.md says what stands beside what.

Rows are written when they are measured, so that a run that is cut off leaves what it had.
"""

import argparse
import dataclasses
import datetime
import json
import sys

import torch

import measure
import methods

FORMAT = 1
FACTOR = 5
# K and V of so many bytes lie in tensors of their own: far beyond the second-level cache, and enough launches in a row.
CACHE_BYTES = 1 << 30
# The rate of a product is that of so many of this size.
MATMUL = 8192
PRODUCTS = 5


@dataclasses.dataclass
class Shape:
    layers: int
    kv_heads: int
    q_heads: int
    head_dim: int
    hidden: int


SHAPES = {
    "llama-3.1-8b": Shape(32, 8, 32, 128, 4096),
    "qwen3-8b": Shape(36, 8, 32, 128, 4096),
    "smollm2-135m": Shape(30, 3, 9, 64, 576),
    "llava-1.5-7b": Shape(32, 32, 32, 128, 4096),
}
CASES = {
    "llama-3.1-8b": [2048, 8192, 32768, 131072],
    "qwen3-8b": [32768],
    "smollm2-135m": [8192],
    "llava-1.5-7b": [4096],
}


def main():
    options = arguments()
    clock = measure.Clock(options.device)
    report = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if clock.on_cuda else "cpu",
        "products_per_second": products(clock) if clock.on_cuda else None,
        "rows": [],
        "left_out": [],
    }
    print("us a layer, launched from Python and as a graph")
    for name in options.shapes:
        for tokens in options.tokens or CASES[name]:
            run(options, clock, report, name, tokens)
    write(options, report)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--operations", nargs="+", metavar="NAME")
    parser.add_argument("--keep", type=int, default=2, help="one of so many rows is kept")
    return parser.parse_args()


@torch.no_grad()
def run(options, clock, report, name, tokens):
    shape = SHAPES[name]
    layer_bytes = 2 * shape.kv_heads * tokens * shape.head_dim * 2
    count = min(shape.layers, -(-CACHE_BYTES // layer_bytes)) if clock.on_cuda else 2
    layers = methods.Layers(shape, tokens, count, options.device)
    for source, share in (
        (methods.torch_methods, options.keep),
        (methods.kvpress_methods, options.keep),
        (methods.triton_methods, options.keep),
        (methods.fastcache_methods, FACTOR),
    ):
        try:
            for operation, peer, compress, *reason in source(layers, share):
                if options.operations and operation not in options.operations:
                    continue

                def call(compress=compress):
                    for layer in range(count):
                        compress(layer)

                eager = clock.eager(call)
                graph, note = (None, reason[0]) if any(reason) else clock.graph(call)
                row = {
                    "peer": peer,
                    "operation": operation,
                    "shape": name,
                    "form": "contiguous",
                    "tokens": tokens,
                    "keep": share,
                }
                report["rows"].append(row | {"layers": count, "eager_us": eager, "graph_us": graph, "note": note})
                write(options, report)
                times = " ".join(f"{time['median'] / count:10.2f}" if time else f"{'–':>10}" for time in (eager, graph))
                print(f"{name} {tokens:7} {operation:13} {peer:32} {times} {note}", flush=True)
        except Exception as error:  # One peer that cannot be had must not cost the others.
            left_out = f"{source.__name__}, {name}, {tokens}: {type(error).__name__}: {error}"
            report["left_out"].append(left_out)
            print(f"left out: {left_out}", file=sys.stderr, flush=True)


def products(clock):
    """Additions and multiplications a second of large bf16 products, one behind the other."""
    a, b = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def call():
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)

    return PRODUCTS * 2 * MATMUL**3 / (clock.eager(call)["median"] / 1e6)


def write(options, report):
    with open(options.json, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
