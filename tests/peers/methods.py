"""What other programs do to one layer.

Each function yields the operation that a peer stands beside, its name, and a function of a layer's index that
compresses K and V of that layer to new tensors; and, where it cannot be captured into a CUDA graph, why.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn

WINDOW = 64
POOL = 5


class Layers:
    """K and V of some layers, [1, kv_heads, tokens, head_dim], and what presses ask of a model's layer."""

    def __init__(self, shape, tokens, count, device):
        self.shape, self.tokens, self.count, self.device = shape, tokens, count, device
        size = (1, shape.kv_heads, tokens, shape.head_dim)
        fresh = lambda: torch.rand(size, device=device, dtype=torch.bfloat16) * 2 - 1  # noqa: E731
        self.keys = [fresh() for _ in range(count)]
        self.values = [fresh() for _ in range(count)]
        # Presses project the queries of the last tokens themselves.
        self.hidden = torch.randn(1, WINDOW + 1, shape.hidden, device=device, dtype=torch.bfloat16)
        angles = torch.rand(1, WINDOW + 1, shape.head_dim, device=device)
        self.rotary = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.module = Attention(shape).to(device, torch.bfloat16)

    def pick(self, layer, indices):
        """Rows of K and V of a layer, as kvpress picks them."""
        indices = indices.unsqueeze(-1).expand(-1, -1, -1, self.shape.head_dim)
        return self.keys[layer].gather(2, indices), self.values[layer].gather(2, indices)


class Attention(nn.Module):
    """What of a Llama attention layer kvpress uses."""

    def __init__(self, shape):
        super().__init__()
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.q_heads * shape.head_dim, bias=False)
        self.config = types.SimpleNamespace(num_attention_heads=shape.q_heads, num_key_value_heads=shape.kv_heads)


# Presses that read a number back in the middle of their work.
READS_BACK = {
    "SnapKVPress": "calls item(), which a graph cannot hold",
    "TOVAPress": "calls item(), which a graph cannot hold",
}


def torch_methods(layers, keep):
    """Rows by given indices; top-k of given scores, and the rows."""
    kept = layers.tokens // keep
    scores = [torch.rand(1, layers.shape.kv_heads, layers.tokens, device=layers.device) for _ in range(layers.count)]
    given = [score.topk(kept, dim=-1).indices.sort(dim=-1).values for score in scores]
    yield "commit", "torch gather", lambda layer: layers.pick(layer, given[layer])
    yield "top_k", "torch topk + gather", lambda layer: layers.pick(layer, scores[layer].topk(kept, dim=-1).indices)
    yield (
        "top_k",
        "torch topk unsorted + gather",
        lambda layer: layers.pick(layer, scores[layer].topk(kept, dim=-1, sorted=False).indices),
    )


def kvpress_methods(layers, keep):
    """kvpress's own presses: score, top-k and gather."""
    presses = import_presses()
    kwargs = {"position_embeddings": layers.rotary}
    version = importlib.metadata.version("kvpress") if "kvpress" in installed() else "of unknown version"
    for operation, module, name in (
        ("key_norm", "knorm_press", "KnormPress"),
        ("key_diff", "keydiff_press", "KeyDiffPress"),
        ("attention-64", "snapkv_press", "SnapKVPress"),
        ("attention-1", "tova_press", "TOVAPress"),
        ("streaming", "streaming_llm_press", "StreamingLLMPress"),
    ):
        press = getattr(presses(module), name)(compression_ratio=1 - 1 / keep)
        yield (
            operation,
            f"kvpress {version} {name.removesuffix('Press')}",
            lambda layer, press=press: press.compress(
                layers.module, layers.hidden, layers.keys[layer], layers.values[layer], None, kwargs
            ),
            READS_BACK.get(name, ""),
        )


def installed():
    return {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}


def import_presses():
    """The presses' modules, without the package's own `__init__`, which wants what evaluations need."""
    if "kvpress" not in sys.modules:
        spec = importlib.util.find_spec("kvpress")
        if spec is None:
            raise ImportError("kvpress is not installed: pip install --no-deps kvpress==0.5.4")
        package = types.ModuleType("kvpress")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["kvpress"] = package
    return lambda module: importlib.import_module(f"kvpress.presses.{module}")


def triton_methods(layers, keep):
    """SnapKV by hand: two passes in Triton, then PyTorch's pooling, top-k and gather."""
    import snapkv

    shape = layers.shape
    group = shape.q_heads // shape.kv_heads
    size = (shape.kv_heads, group * WINDOW, shape.head_dim)
    queries = [torch.randn(size, device=layers.device, dtype=torch.bfloat16) for _ in range(layers.count)]
    kept = layers.tokens // keep
    few = layers.keys[0][0, :, : min(layers.tokens, 2048)].contiguous()
    found, expected = (function(queries[0], few, WINDOW) for function in (snapkv.scores, snapkv.reference))
    error = ((found - expected).norm() / expected.norm()).item()
    if not error < 1e-2:
        raise RuntimeError(f"the Triton kernel's scores are off by {error:.1e} of their norm")

    def compress(layer):
        scores = snapkv.scores(queries[layer], layers.keys[layer][0], WINDOW)
        scores = F.avg_pool1d(scores.unsqueeze(0), POOL, padding=POOL // 2, stride=1)
        scores[..., -WINDOW:] = float("inf")
        return layers.pick(layer, scores.topk(kept, dim=-1, sorted=False).indices)

    yield "attention-64", "Triton SnapKV, two passes", compress


def fastcache_methods(layers, factor):
    """FastCache's compressor of text (arXiv 2503.08461): three linear layers over groups of adjacent rows."""
    dim = layers.shape.head_dim

    def mlp():
        stack = nn.Sequential(
            nn.Linear(factor * dim, dim),
            nn.ReLU(),
            nn.Dropout(0.4),
            nn.Linear(dim, dim),
            nn.ReLU(),
            nn.Dropout(0.4),
            nn.Linear(dim, dim),
        )
        return stack.to(layers.device, torch.bfloat16).eval()

    mlps = [(mlp(), mlp()) for _ in range(layers.count)]

    def rows(x, network):
        heads, length = x.shape[1], x.shape[2]
        groups = length // factor
        done = groups * factor
        new = network(x[:, :, :done].reshape(1, heads, groups, factor * dim))
        return new if done == length else torch.cat((new, x[:, :, done:]), dim=2)

    def compress(layer):
        for_keys, for_values = mlps[layer]
        return rows(layers.keys[layer], for_keys), rows(layers.values[layer], for_values)

    yield f"mlp-{factor}", "FastCache's MLP, PyTorch", compress
