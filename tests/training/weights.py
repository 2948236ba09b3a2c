"""The weight file, version 2: safetensors with named f16 tensors and a JSON text of metadata (docs/mlp-weights.md)."""

import hashlib
import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def named(tensors):
    """(w1, b1, w2, b2, w3, b3), each [2 * layers, ...], K first, as `{name: f16 tensor}`."""
    out, layers = {}, len(tensors[0]) // 2
    for i in range(2 * layers):
        part = f"layers.{i % layers}.{'text_k' if i < layers else 'text_v'}"
        for j, tensor in enumerate(tensors):
            value = tensor[i].to(torch.float16).cpu().contiguous()
            if not value.isfinite().all():
                raise ValueError(f"{part}: a value does not fit f16")
            out[f"{part}.{j // 2}.{'bias' if j % 2 else 'weight'}"] = value
    return out


def digest(tensors):
    """sha256 over all tensors in the order of their names: name, a zero byte, then the data, little endian."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + b"\0" + tensors[name].numpy().tobytes())
    return sha.hexdigest()


def write(path, tensors, model, name, factor, sinks, recent, max_position, training):
    """`max_position`: the first position that no compressed row was trained on."""
    tensors = named(tensors)
    terms = {
        "format_version": 2,
        "model": {
            "name": name,
            "layers": model.layers,
            "kv_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "rope_base": model.rope_base,
        },
        "factor": factor,
        "head_dim": model.head_dim,
        "activation": "relu",
        "positions": "logical",
        "pairing": "half_split",
        "min_groups": 1,
        "sinks": sinks,
        "recent": recent,
        "max_position": max_position,
        "training": training,
        "sha256": digest(tensors),
    }
    save_file(tensors, path, metadata={"kvhook_mlp": json.dumps(terms)})


def read(path):
    """-> (terms, (w1, b1, w2, b2, w3, b3)), K of all layers first."""
    with safe_open(path, "pt") as file:
        terms = json.loads(file.metadata()["kvhook_mlp"])
        layers = terms["model"]["layers"]
        stack = lambda j: torch.stack(
            [
                file.get_tensor(f"layers.{i}.{part}.{j // 2}.{'bias' if j % 2 else 'weight'}")
                for part in ("text_k", "text_v")
                for i in range(layers)
            ]
        )
        return terms, tuple(stack(j) for j in range(6))
