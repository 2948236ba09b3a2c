"""A frozen Llama model with just what training a cache compressor needs: a pass that keeps its cache, and a pass whose
blocks of tokens see a compressed one."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

BLOCK = 256  # tokens scored after one compression
WINDOW = 64  # raw rows gathered in front of a block; at least recent + factor - 1


def rms_norm(x, weight, eps):
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(weight.dtype) * weight


def rotate(x, cos, sin):
    """RoPE in half-split pairing; x [B, N, heads, d], cos and sin [N, 1, d]."""
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


def before_attention(x, norm, qkv, cos, sin, eps: float, heads: int, kv_heads: int):
    """x [B, N, hidden] f32 -> q [B, heads, N, d], k and v [B, kv_heads, N, d]."""
    h = rms_norm(x, norm, eps) @ qkv.T
    h = h.view(*h.shape[:2], heads + 2 * kv_heads, -1)
    q, k, v = h.split((heads, kv_heads, kv_heads), 2)
    return [t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v)]


def after_attention(x, o, out, norm, gate_up, down, eps: float):
    """x [B, N, hidden] f32, o [B, heads, N, d] -> the layer's output."""
    x = x + o.transpose(1, 2).flatten(2) @ out.T
    gate, up = (rms_norm(x, norm, eps) @ gate_up.T).chunk(2, -1)
    return x + (F.silu(gate) * up) @ down.T


class Layout:
    """Which rows the queries of each block see.  Block b starts at position `first + b * BLOCK`, when everything before
    it was compressed once: sinks raw, `groups[b]` compressed rows, `raw[b]` raw rows, then the block's own tokens.

    Keys lie as [sinks | compressed rows | padding], [own tokens of all blocks], [WINDOW raw rows of each block].
    `most` compressed rows exist; it bounds how far `move` can go.  Tensors are updated in place, and the mask function
    stays the same object, so that compiled attention is not compiled again.
    """

    def __init__(self, first, blocks, factor, sinks, recent, device, most=None):
        self.blocks, self.factor, self.sinks, self.recent = blocks, factor, sinks, recent
        self.starts = torch.zeros(blocks, dtype=torch.long, device=device)
        self.groups, self.raw = self.starts.clone(), self.starts.clone()
        self.most = most or (first + BLOCK * (blocks - 1) - recent - sinks) // factor
        self.prefix = -(-(sinks + self.most) // 128) * 128
        self.own = blocks * BLOCK
        self.length = self.prefix + self.own + blocks * WINDOW
        self.visible = self._mask_function()
        self.move(first)

    def move(self, first):
        self.first = first
        self.starts.copy_(first + BLOCK * torch.arange(self.blocks))
        self.groups.copy_((self.starts - self.recent - self.sinks) // self.factor)
        self.raw.copy_(self.starts - self.sinks - self.factor * self.groups)
        offsets = torch.arange(WINDOW, device=self.starts.device)
        self.window = (self.starts[:, None] - WINDOW + offsets).flatten().clamp_min(0)

    def _mask_function(self):
        sinks, prefix, owned, groups, raw_rows = self.sinks, self.prefix, self.own, self.groups, self.raw

        def visible(b, h, q, kv):
            block, own, raw = q // BLOCK, kv - prefix, kv - prefix - owned
            is_prefix = (own < 0) & (kv < sinks + groups[block])
            is_own = (own >= 0) & (raw < 0) & (own <= q) & (own // BLOCK == block)
            is_raw = (raw >= 0) & (raw // WINDOW == block) & (raw % WINDOW >= WINDOW - raw_rows[block])
            return is_prefix | is_own | is_raw

        return visible

    def dense(self):
        """The mask as a tensor [queries, keys]."""
        at = self.starts.device
        return self.visible(
            0, 0, torch.arange(self.own, device=at)[:, None], torch.arange(self.length, device=at)[None]
        )


class Frozen:
    """The weights of a Hugging Face Llama folder, in `dtype`; the residual stream is f32."""

    def __init__(self, folder, device, dtype, compiled=False):
        folder = Path(folder)
        c = json.loads((folder / "config.json").read_text())
        self.heads, self.kv_heads, self.layers = (
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["num_hidden_layers"],
        )
        self.head_dim = c.get("head_dim") or c["hidden_size"] // self.heads
        self.eps, self.rope_base, self.device, self.dtype = c["rms_norm_eps"], float(c["rope_theta"]), device, dtype
        w = {k.removeprefix("model."): t.to(device, dtype) for k, t in load_file(folder / "model.safetensors").items()}
        self.embedding, self.norm = w["embed_tokens.weight"], w["norm.weight"]
        self.head = w.get("lm_head.weight", self.embedding)
        self.weights = []
        for i in range(self.layers):
            p = lambda n: w[f"layers.{i}.{n}.weight"]
            self.weights.append(
                (
                    p("input_layernorm"),
                    torch.cat([p(f"self_attn.{n}_proj") for n in "qkv"]),
                    p("self_attn.o_proj"),
                    p("post_attention_layernorm"),
                    torch.cat([p("mlp.gate_proj"), p("mlp.up_proj")]),
                    p("mlp.down_proj"),
                )
            )
        angle = torch.arange(c["max_position_embeddings"], device=device)[:, None].double() / self.rope_base ** (
            torch.arange(0, self.head_dim, 2, device=device).double() / self.head_dim
        )
        angle = torch.cat((angle, angle), -1)[:, None]
        self.cos, self.sin = angle.cos().float(), angle.sin().float()
        self.before, self.after, self.flex = before_attention, after_attention, None
        if compiled:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            torch._dynamo.config.cache_size_limit = 64
            self.before = torch.compile(before_attention, dynamic=False)
            self.after = torch.compile(after_attention, dynamic=False)
            self.flex = torch.compile(flex_attention, dynamic=False)
            self.block_mask = create_block_mask

    def _before(self, x, w, first):
        n = x.shape[1]
        cos, sin = self.cos[first : first + n], self.sin[first : first + n]
        return self.before(x, w[0], w[1], cos, sin, self.eps, self.heads, self.kv_heads)

    @torch.no_grad()
    def prefill(self, ids):
        """ids [B, N] -> (final hidden [B, N, hidden], K and V [layers, B, kv_heads, N, d])."""
        x, ks, vs = self.embedding[ids].float(), [], []
        for w in self.weights:
            q, k, v = self._before(x, w, 0)
            k, v = self.cache(k), self.cache(v)
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self.after(x, o, *w[2:], self.eps)
            ks.append(k)
            vs.append(v)
        return rms_norm(x, self.norm, self.eps), torch.stack(ks), torch.stack(vs)

    def cache(self, t):
        """A row as a bf16 cache holds it."""
        return t.to(torch.bfloat16).to(t.dtype)

    def mask(self, layout, logit_bias=0.0):
        """What `blocks` takes; logit_bias is added to the logits of compressed rows (dense attention only)."""
        if self.flex is not None and logit_bias == 0.0:
            return self.block_mask(layout.visible, None, None, layout.own, layout.length, device=str(self.device))
        seen = layout.dense()
        bias = torch.zeros(seen.shape, device=seen.device, dtype=self.dtype).masked_fill(~seen, -torch.inf)
        bias[:, layout.sinks : layout.prefix] += logit_bias
        return bias

    def blocks(self, ids, layout, mask, keys, values, compressed_k, compressed_v):
        """Final hidden states of all blocks, each over its own compressed cache.

        ids [B, blocks * BLOCK]; keys, values: the full cache as `prefill` gives it; compressed_*: `layers` tensors
        [B, kv_heads, most, d].
        """
        x = self.embedding[ids].float()
        batch, kv_heads = ids.shape[0], self.kv_heads
        pad = torch.zeros(
            batch,
            kv_heads,
            layout.prefix - layout.sinks - layout.most,
            self.head_dim,
            device=x.device,
            dtype=self.dtype,
        )
        for i, w in enumerate(self.weights):
            q, k, v = self._before(x, w, layout.first)
            rows = [
                torch.cat(
                    (full[i, :, :, : layout.sinks], short[i], pad, self.cache(own), full[i, :, :, layout.window]), 2
                )
                for full, short, own in ((keys, compressed_k, k), (values, compressed_v, v))
            ]
            if isinstance(mask, torch.Tensor):
                o = F.scaled_dot_product_attention(
                    q, *(r.repeat_interleave(self.heads // kv_heads, 1) for r in rows), mask
                )
            else:
                o = self.flex(q.contiguous(), *rows, block_mask=mask, enable_gqa=True)
            x = self.after(x, o, *w[2:], self.eps)
        return rms_norm(x, self.norm, self.eps)


def kl_of_logits(student, teacher):
    """KL(teacher || student) of each row, and its gradient with respect to the student's logits."""
    s, t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    p = t.exp()
    return (p * (t - s)).sum(-1), (s.exp() - p).to(student.dtype)


class Divergence(torch.autograd.Function):
    """KL of next-token distributions, [rows], from hidden states [rows, hidden]; logits are made in chunks."""

    CHUNK = 4096
    of_logits = staticmethod(kl_of_logits)

    @staticmethod
    def forward(ctx, student, teacher, head):
        out, grads = [], []
        for s, t in zip(student.split(Divergence.CHUNK), teacher.split(Divergence.CHUNK)):
            kl, g = Divergence.of_logits(s @ head.T, t @ head.T)
            out.append(kl)
            if ctx.needs_input_grad[0]:
                grads.append(g @ head)
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        return (ctx.saved_tensors[0] * grad[:, None]).to(ctx.saved_tensors[0].dtype), None, None
