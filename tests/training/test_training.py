"""Checks of the training code on a tiny random model, on the CPU: `python -m pytest tests/training`."""

import json

import pytest
import torch
from safetensors.torch import save_file

import weights
from compressor import Fixed, Linear, Mlp, Shipped
from model import BLOCK, Divergence, Frozen, Layout

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, INNER, VOCABULARY = 2, 4, 2, 16, 64, 96, 101


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = {
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 2048,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    for i in range(LAYERS):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(HIDDEN)
        for name, shape in shapes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = torch.randn(shape) * shape[1] ** -0.5
    save_file(tensors, tmp_path / "model.safetensors")
    return Frozen(tmp_path, torch.device("cpu"), torch.float32)


def error(model, factor, first=300, blocks=2):
    """Relative error of the final hidden states of blocks over a cache of which every `factor`-th row is kept."""
    layout = Layout(first, blocks, factor, 4, 32, model.device)
    ids = torch.randint(VOCABULARY, (2, first + blocks * BLOCK))
    hidden, keys, values = model.prefill(ids)
    rows = Fixed(factor, False, False).compress(keys, values, 4, layout.most)
    student = model.blocks(ids[:, first:], layout, model.mask(layout), keys, values, *rows)
    return float((student - hidden[:, first:]).norm() / student.norm())


def test_blocks_over_an_uncompressed_cache_are_the_model(model):
    """One row to one: every block must see exactly its past; with fewer rows the result differs."""
    assert error(model, 1) < 1e-4
    assert error(model, 4) > 3e-3


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("first", [256, 257, 300])
def test_layout_shows_each_position_once(factor, first):
    """Each block sees sinks, whole groups and raw rows that together cover its past, then its own tokens causally."""
    layout = Layout(first, 3, factor, 4, 32, torch.device("cpu"))
    seen = layout.dense()
    window = layout.window.view(3, -1)
    for block in range(3):
        start = first + block * BLOCK
        for i in (0, 1, BLOCK - 1):
            row = seen[block * BLOCK + i]
            raw = row[layout.prefix + layout.own :].view(3, -1)
            covered = [p for p in range(4) if row[p]]
            covered += [4 + factor * g + j for g in range(layout.most) if row[4 + g] for j in range(factor)]
            covered += window[block][raw[block]].tolist()
            assert covered == list(range(start))
            assert raw[block].sum() >= 32 and raw.sum() == raw[block].sum()
            own = row[layout.prefix : layout.prefix + layout.own].nonzero().flatten()
            assert own.tolist() == list(range(block * BLOCK, block * BLOCK + i + 1))


@pytest.mark.parametrize("principal", [False, True])
def test_the_file_computes_what_was_trained(model, tmp_path, principal):
    """Standardised, centred form -> folded f16 file -> plain MLP."""
    factor, shape = 2, (2 * LAYERS, DIM)
    start = Linear(torch.randn(shape) * 3, torch.rand(shape) + 0.5, factor, True)
    sample = torch.randn(2 * LAYERS, 500, factor * DIM) * 2
    mlp = Mlp(start, sample, 4.0, principal)
    with torch.no_grad():
        for p in mlp.parameters():
            p += 0.1 * torch.randn_like(p)
    x = torch.randn(2 * LAYERS, 50, factor * DIM)
    w1, b1, w2, b2, w3, b3 = mlp.folded()
    h = (x.double() @ w1.mT + b1[:, None]).relu()
    y = (h @ w2.mT + b2[:, None]).relu() @ w3.mT + b3[:, None]
    assert torch.allclose(y.float(), mlp(x), rtol=1e-4, atol=1e-4)

    path = tmp_path / "weights.safetensors"
    weights.write(path, mlp.folded(), model, "tiny", factor, 4, 32, 300, "none")
    terms, tensors = weights.read(path)
    assert terms["max_position"] == 300
    assert terms["factor"] == factor and terms["sha256"] == weights.digest(weights.named(tensors))
    rows = torch.randn(LAYERS, 1, KV_HEADS, 40, DIM)
    shipped, trained = (c.compress(rows, rows, 4, 10) for c in (Shipped(tensors, factor), mlp))
    assert torch.allclose(torch.stack(shipped[0]), torch.stack(trained[0]), rtol=2e-2, atol=5e-2)


def test_divergence_has_the_gradient_of_kl():
    s, t, head = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8), torch.randn(11, 8)
    Divergence.apply(s, t, head).sum().backward()
    found, s.grad = s.grad, None
    target = (t @ head.T).log_softmax(-1)
    torch.nn.functional.kl_div((s @ head.T).log_softmax(-1), target, log_target=True, reduction="sum").backward()
    assert torch.allclose(found, s.grad, atol=1e-5)
