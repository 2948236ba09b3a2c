"""The compressor: for every layer, for K and for V, a three-layer ReLU MLP that makes one row of `factor` rows.

It is trained in coordinates in which channels have mean 0 and deviation 1, and with ReLUs shifted by a constant,
    relu(h + c) - c,
so that it starts as a linear map and W1, W2, W3 stay of order one.  `folded` gives the plain MLP that is shipped: both
changes of coordinates are linear and vanish in weights and biases.
"""

import torch
from torch import nn


def groups(rows, factor, sinks, count):
    """[layers, B, heads, N, d] -> [layers, B * heads * count, factor * d]: the first `count` groups after the sinks."""
    layers, batch, heads, _, d = rows.shape
    return rows[..., sinks : sinks + factor * count, :].reshape(layers, batch * heads * count, factor * d)


class Linear(nn.Module):
    """One linear map for each layer and each of K, V, in standardised channels.  M = 2 * layers: all of K, then V."""

    def __init__(self, mean, deviation, factor, mean_values):
        """mean, deviation [M, d].  Starts at the group's last row, for V at its mean if mean_values."""
        super().__init__()
        m, d = mean.shape
        self.factor = factor
        self.register_buffer("mean", mean[:, None])
        self.register_buffer("deviation", deviation[:, None])
        weight = torch.zeros(m, d, factor, d, device=mean.device)
        weight[:, :, -1] = torch.eye(d, device=mean.device)
        if mean_values:
            weight[m // 2 :] = torch.eye(d, device=mean.device)[:, None].repeat(1, factor, 1) / factor
        self.weight = nn.Parameter(weight.flatten(2))
        self.bias = nn.Parameter(torch.zeros(m, 1, d, device=mean.device))

    def standard(self, x):
        """[M, rows, factor * d] in standardised channels."""
        return (x.float() - self.mean.repeat(1, 1, self.factor)) / self.deviation.repeat(1, 1, self.factor)

    def net(self, x):
        return torch.baddbmm(self.bias, x, self.weight.mT)

    def forward(self, x):
        """x [M, rows, factor * d] -> [M, rows, d]"""
        return self.net(self.standard(x)) * self.deviation + self.mean

    def compress(self, keys, values, sinks, count):
        """keys, values [layers, B, heads, N, d] -> both compressed, each as `layers` tensors [B, heads, count, d]."""
        layers, batch, heads, _, d = keys.shape
        x = torch.cat([groups(t, self.factor, sinks, count) for t in (keys, values)])
        y = self(x).to(torch.bfloat16).to(keys.dtype).view(2, layers, batch, heads, count, d)
        return y[0].unbind(0), y[1].unbind(0)


class Mlp(Linear):
    """The MLP.  Starts at a linear map: hidden units are that map's principal components (`principal`) or its outputs,
    scaled to deviation 1, shifted by `shift`."""

    def __init__(self, start, sample, shift, principal):
        """sample [M, rows, factor * d]: rows of a cache, for the scale of the hidden units."""
        nn.Module.__init__(self)
        self.factor = start.factor
        self.register_buffer("mean", start.mean.clone())
        self.register_buffer("deviation", start.deviation.clone())
        with torch.no_grad():
            y = start.net(start.standard(sample))
            centre = y.mean(1, keepdim=True)
            if principal:
                power, basis = torch.linalg.eigh((y - centre).mT @ (y - centre) / y.shape[1])
                scale = power.clamp_min(1e-3).sqrt()[:, :, None]
                inward, outward = basis.mT / scale, basis * scale.mT
            else:
                scale = y.std(1)
                inward, outward = torch.diag_embed(1 / scale), torch.diag_embed(scale)
            eye = torch.eye(y.shape[-1], device=y.device).repeat(len(y), 1, 1)
            self.w1 = nn.Parameter(inward @ start.weight)
            self.b1 = nn.Parameter((start.bias - centre) @ inward.mT)
            self.w2 = nn.Parameter(eye.clone())
            self.b2 = nn.Parameter(torch.zeros_like(start.bias))
            self.w3 = nn.Parameter(outward.contiguous())
            self.b3 = nn.Parameter(centre.clone())
        self.register_buffer("shift", torch.full_like(start.bias, shift))

    def bend(self, h):
        return (h + self.shift).relu() - self.shift

    def net(self, x):
        h = self.bend(torch.baddbmm(self.b1, x, self.w1.mT))
        h = self.bend(torch.baddbmm(self.b2, h, self.w2.mT))
        return torch.baddbmm(self.b3, h, self.w3.mT)

    @torch.no_grad()
    def folded(self):
        """Plain weights and biases (w1, b1, w2, b2, w3, b3) in f64: y = w3 relu(w2 relu(w1 x + b1) + b2) + b3."""
        d = lambda t: t.double()
        column = lambda t: d(t).mT  # [M, 1, d] as a column
        mean, deviation = d(self.mean).repeat(1, 1, self.factor), d(self.deviation).repeat(1, 1, self.factor)
        w1 = d(self.w1) / deviation
        b1 = column(self.b1) - w1 @ mean.mT + column(self.shift)
        w2, b2 = d(self.w2), column(self.b2) - d(self.w2) @ column(self.shift) + column(self.shift)
        w3 = d(self.w3) * column(self.deviation)
        b3 = (column(self.b3) - d(self.w3) @ column(self.shift)) * column(self.deviation) + column(self.mean)
        return w1, b1[..., 0], w2, b2[..., 0], w3, b3[..., 0]


class Shipped:
    """The plain MLP with the weights of a file, as the plugin computes it: f32 arithmetic, f16 weights."""

    def __init__(self, tensors, factor):
        self.factor, self.tensors = factor, [t.float() for t in tensors]

    def compress(self, keys, values, sinks, count):
        w1, b1, w2, b2, w3, b3 = self.tensors
        layers, batch, heads, _, d = keys.shape
        x = torch.cat([groups(t, self.factor, sinks, count) for t in (keys, values)]).float()
        x = torch.baddbmm(b1[:, None], x, w1.mT).relu()
        x = torch.baddbmm(b2[:, None], x, w2.mT).relu()
        y = torch.baddbmm(b3[:, None], x, w3.mT)
        y = y.to(torch.bfloat16).to(keys.dtype).view(2, layers, batch, heads, count, d)
        return y[0].unbind(0), y[1].unbind(0)


class Fixed:
    """Maps without training: `stride` keeps the last row, `stride K, mean V`, `mean`."""

    def __init__(self, factor, mean_keys, mean_values):
        self.factor, self.means = factor, (mean_keys, mean_values)

    def compress(self, keys, values, sinks, count):
        out = []
        for rows, mean in zip((keys, values), self.means):
            g = rows[..., sinks : sinks + self.factor * count, :].unflatten(-2, (count, self.factor))
            g = g.float().mean(-2).to(torch.bfloat16).to(rows.dtype) if mean else g[..., -1, :]
            out.append(g.unbind(0))
        return out
