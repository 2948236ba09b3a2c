#!/usr/bin/env python3
"""Writes the folder mlp_decouple/: FastCache's KVCacheLinearDecoupleCompressor on random weights, in PyTorch, f64.

The layer is built here from its formulas. For each factor f in 2, 3, 5, a compressor of LAYERS layers and four MLPs each:

    f{f}.safetensors     cases and numbers: k and v, [layers, kv heads, tokens, head_dim], in f32, f16 and bf16, and for
                         each case what remains of them, computed in f64 on the rounded numbers, stored in f32. The
                         metadata entry `cases` lists them: name, min_groups, segments [kind, tokens].
    f{f}-f32.pth         a checkpoint as the original's training script saves it: the state dict under
                         model_state_dict.compressor, with its dead `attention` tensors, epoch, loss and an optimizer

For f = 2 also other ways in which weights are saved, with the same numbers where they fit:

    plain-bf16.pth       the state dict itself, rounded to bf16
    no-dropout-f16.pth   text only, f16, Sequential without Dropout (indices 0, 2, 4), half of the tensors transposed views
    module.pth           a whole pickled module: holds no state dict
    legacy.pth           the format from before PyTorch 1.6
    state-dict.safetensors   the state dict under `compressor.`, beside a tensor of another part, f32

    pip install torch==2.15.0 safetensors==0.8.0 numpy==2.4.6
    python3 mlp_decouple.py
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

LAYERS, HEADS, DIM = 2, 3, 8
MIN_GROUPS = 2
FOLDER = Path(__file__).parent / "mlp_decouple"


def mlp(factor, dropout=True):
    """Sequential indices 0, 3, 6 hold parameters; 0, 2, 4 without Dropout."""
    drop = [nn.Dropout(0.4)] if dropout else []
    return nn.Sequential(
        nn.Linear(factor * DIM, DIM), nn.ReLU(), *drop, nn.Linear(DIM, DIM), nn.ReLU(), *drop, nn.Linear(DIM, DIM)
    )


class Compressor(nn.Module):
    def __init__(self, factor):
        super().__init__()
        for part in ("tk", "tv", "ik", "iv"):
            setattr(self, f"compress_{part}", nn.ModuleList(mlp(factor) for _ in range(LAYERS)))
        self.attention = nn.ModuleList(nn.Linear(DIM, 1) for _ in range(LAYERS))


def compress(rows, net, factor, min_groups):
    """rows: [heads, tokens, dim]; groups of `factor` become one each, the remainder follows as it is."""
    heads, tokens, dim = rows.shape
    groups = tokens // factor
    if groups < min_groups:
        return rows
    merged = net(rows[:, : groups * factor].reshape(heads, groups, factor * dim))
    return torch.cat([merged, rows[:, groups * factor :]], dim=1)


def cases(factor):
    """name -> (min_groups, segments)."""
    found = {f"remainder{r}": (1, [("text", 3 * factor + r)]) for r in range(factor)}
    found["short"] = (MIN_GROUPS, [("text", factor * MIN_GROUPS - 1)])
    found["long_enough"] = (MIN_GROUPS, [("text", factor * MIN_GROUPS)])
    found["all_image"] = (1, [("image", 2 * factor + 1)])
    found["image_prefix"] = (1, [("image", 2 * factor + 1), ("text", factor + 1)])
    found["image_in_the_middle"] = (1, [("text", factor + 1), ("image", factor), ("text", factor)])
    found["short_image"] = (MIN_GROUPS, [("image", factor), ("text", 2 * factor)])
    return found


@torch.no_grad()
def outputs(net, k, v, factor, min_groups, segments):
    """k, v: [layers, heads, tokens, dim], as f64."""
    kept = {"k": [], "v": []}
    for layer in range(LAYERS):
        for part, rows in (("k", k[layer]), ("v", v[layer])):
            out, start = [], 0
            for kind, tokens in segments:
                nets = getattr(net, f"compress_{kind[0]}{part}")
                out.append(compress(rows[:, start : start + tokens], nets[layer], factor, min_groups))
                start += tokens
            kept[part].append(torch.cat(out, dim=1))
    return {part: torch.stack(layers) for part, layers in kept.items()}


def checkpoint(net):
    """As the training script saves it, after one step of Adam, so that the optimizer has its moments."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    sum(parameter.sum() for parameter in net.parameters()).backward()
    optimizer.step()
    return {
        "epoch": 40,
        "model_state_dict": {"compressor": net.state_dict()},
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": {"factor": 0.5, "best": 0.3794, "last_epoch": 40},
        "loss": 0.3794,
    }


def main():
    FOLDER.mkdir(exist_ok=True)
    for factor in (2, 3, 5):
        torch.manual_seed(factor)
        net = Compressor(factor)
        torch.save(checkpoint(net), FOLDER / f"f{factor}-f32.pth")
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        if factor == 2:
            torch.save({n: t.bfloat16() for n, t in state.items()}, FOLDER / "plain-bf16.pth")
            other = {f"compressor.{name}": tensor for name, tensor in state.items()}
            save_file(other | {"vision.weight": torch.ones(3)}, FOLDER / "state-dict.safetensors")
            text_only = nn.Module()
            for part in ("tk", "tv"):
                nets = nn.ModuleList(mlp(factor, dropout=False) for _ in range(LAYERS))
                for index, ours in enumerate(nets):
                    theirs = getattr(net, f"compress_{part}")[index]
                    for i, j in ((0, 0), (2, 3), (4, 6)):
                        ours[i].load_state_dict(theirs[j].state_dict())
                setattr(text_only, f"compress_{part}", nets)
            view = lambda name, t: t.T.contiguous().T if t.dim() == 2 and "tk" in name else t
            halves = {n: view(n, t.half()) for n, t in text_only.state_dict().items()}
            torch.save(halves, FOLDER / "no-dropout-f16.pth")
            torch.save(mlp(2), FOLDER / "module.pth")
            torch.save({"compress_tk.0.0.weight": torch.ones(2)}, FOLDER / "legacy.pth", _use_new_zipfile_serialization=False)

        net = net.double().eval()
        listed = cases(factor)
        tokens = max(sum(n for _, n in segments) for _, segments in listed.values())
        k, v = torch.randn(2, LAYERS, HEADS, tokens, DIM)
        tensors = {}
        for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
            rounded = {"k": k.to(dtype), "v": v.to(dtype)}
            tensors |= {f"{name}.{part}": rows.contiguous() for part, rows in rounded.items()}
            for case, (min_groups, segments) in listed.items():
                out = outputs(net, rounded["k"].double(), rounded["v"].double(), factor, min_groups, segments)
                tensors |= {f"{name}.{case}.{part}": rows.float().contiguous() for part, rows in out.items()}
        about = [{"name": n, "min_groups": m, "segments": s} for n, (m, s) in listed.items()]
        save_file(tensors, FOLDER / f"f{factor}.safetensors", metadata={"cases": json.dumps(about)})


if __name__ == "__main__":
    main()
