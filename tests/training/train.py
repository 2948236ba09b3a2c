#!/usr/bin/env python3
"""Train the compressor of one factor by self-distillation.

    train.py --model FOLDER --tokens tokens.safetensors --factor 2 --out smollm2-135m-f2.safetensors

The model is frozen.  A sequence of 4,352 tokens runs once with its full cache (the teacher).  Then it is cut into 15
blocks of 256 tokens; every block is scored as a continuation whose whole past was compressed once, when the block
began: 4 sinks and the 32 newest rows raw, everything between them `factor` rows to one.  The blocks share one set of
compressed rows and run in one pass (block-sparse attention), so a sequence yields 3,840 scored tokens at 15 prompt
lengths from 256 to 4,095.  The loss is KL(teacher || student) of the next-token distribution at each of them.

First a linear map is trained, then the MLP, which starts at that linear map.  Both stop at the best validation.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compressor import Linear, Mlp, groups
from model import BLOCK, Divergence, Frozen, Layout, kl_of_logits
from weights import write

SINKS, RECENT, LENGTH = 4, 32, 4352
BLOCKS = LENGTH // BLOCK - 2
# Share of each source in a batch; prose most, since that is what a chat model reads and writes.
SHARES = {
    "gutenberg": 0.2,
    "standard-ebooks": 0.16,
    "austen": 0.14,
    "shakespeare": 0.06,
    "rust-guides": 0.09,
    "python-doc": 0.08,
    "sqlite-doc": 0.07,
    "postgresql-doc": 0.06,
    "apache-doc": 0.04,
    "node-doc": 0.03,
    "python-code": 0.04,
    "rust-code": 0.03,
}
CHAT_SHARE = 0.15  # sequences that begin as a chat prompt does


class Texts:
    """Token ids of a split on the device."""

    def __init__(self, path, split, device):
        with safe_open(path, "pt") as file:
            names = [n for n in file.keys() if n.startswith(f"{split}/")]
            self.tokens = {n.split("/")[1]: file.get_tensor(n).long().to(device) for n in names}
            self.chat = file.get_tensor("chat_prefix").long().to(device)
        self.names = [n for n in SHARES if n in self.tokens]
        self.shares = torch.tensor([SHARES[n] for n in self.names])

    def sample(self, batch, length, rng):
        out = []
        for pick in torch.multinomial(self.shares, batch, replacement=True, generator=rng).tolist():
            tokens = self.tokens[self.names[pick]]
            at = int(torch.randint(len(tokens) - length, (), generator=rng))
            ids = tokens[at : at + length]
            if float(torch.rand((), generator=rng)) < CHAT_SHARE:
                ids = torch.cat((self.chat, ids))[:length]
            out.append(ids)
        return torch.stack(out)

    def fixed(self, each, length):
        """`each` sequences of every source, spread over it."""
        out = []
        for tokens in (self.tokens[n] for n in self.names):
            step = (len(tokens) - length) // each
            out += [tokens[i * step : i * step + length] for i in range(each) if step > 0]
        return torch.stack(out)


class Trainer:
    """A frozen model, texts and one factor."""

    def __init__(self, model, tokens, factor, batch, length=LENGTH, each=2):
        self.model, self.factor, self.batch, self.length = model, factor, batch, length
        self.blocks = length // BLOCK - 2
        most = (2 * BLOCK - 1 + BLOCK * (self.blocks - 1) - SINKS - RECENT) // factor
        self.layout = Layout(BLOCK, self.blocks, factor, SINKS, RECENT, model.device, most)
        self.texts = Texts(tokens, "train", model.device)
        self.held_out = Texts(tokens, "validation", model.device).fixed(each, length)
        self.seen = 0

    def divergence(self, compressor, ids, first):
        """KL of each scored token, [batch, blocks, BLOCK]."""
        layout, model = self.layout, self.model
        layout.move(first)
        mask = model.mask(layout)
        hidden, keys, values = model.prefill(ids)
        inside = slice(first, first + layout.own)
        rows = compressor.compress(keys, values, SINKS, layout.most)
        student = model.blocks(ids[:, inside], layout, mask, keys, values, *rows)
        kl = Divergence.apply(student.flatten(0, 1), hidden[:, inside].flatten(0, 1), model.head)
        return kl.view(len(ids), self.blocks, BLOCK)

    @torch.no_grad()
    def validate(self, compressor):
        """Mean KL of each block (prompts of 383, 639, ... tokens) on validation documents."""
        parts = [
            self.divergence(compressor, ids, 3 * BLOCK // 2 - 1).mean(2)
            for ids in self.held_out.split(self.batch)
            if len(ids) == self.batch
        ]
        return torch.cat(parts).mean(0)

    @torch.no_grad()
    def statistics(self, rng):
        """Mean and deviation of each channel, and sample groups, of the training text."""
        _, keys, values = self.model.prefill(self.texts.sample(self.batch, self.length, rng))
        rows = torch.cat([groups(t, 1, SINKS, self.length - SINKS).float() for t in (keys, values)])
        count = min(self.layout.most, 256)
        sample = torch.cat([groups(t, self.factor, SINKS + RECENT, count) for t in (keys, values)])
        return rows.mean(1), rows.std(1), sample

    def fit(self, compressor, steps, minutes, rate, rng, every=100, log=print):
        """Adam with warm-up and cosine decay, until `steps` or `minutes`; keeps the best on validation."""
        optimizer = torch.optim.Adam(compressor.parameters(), lr=rate, betas=(0.9, 0.98))
        start, step, best, kept, mean = time.time(), 0, math.inf, None, 0.0
        while True:
            progress = max(step / steps, (time.time() - start) / 60 / minutes)
            if step % every == 0 or progress >= 1:
                value = self.validate(compressor)
                score = float(value.mean())
                log(
                    f"  step {step} {time.time() - start:.0f} s train {float(mean):.4f} validation {score:.4f}",
                    *(f"{v:.4f}" for v in value[:: max(1, self.blocks // 4)].tolist()),
                )
                if score < best:
                    best, kept = score, copy.deepcopy(compressor.state_dict())
            if progress >= 1:
                break
            lr = rate * min(1, (step + 1) / 40) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            first = BLOCK + int(torch.randint(BLOCK, (), generator=rng))
            loss = self.divergence(compressor, self.texts.sample(self.batch, self.length, rng), first).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(compressor.parameters(), 1.0)
            optimizer.step()
            mean = 0.98 * mean + 0.02 * loss.detach() if step else loss.detach()
            step += 1
        self.seen += step * self.batch * self.blocks * BLOCK
        compressor.load_state_dict(kept)
        return step, best


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--model", required=True, help="Hugging Face folder: config.json, model.safetensors")
    args.add_argument("--name", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    args.add_argument("--tokens", required=True, help="made by data.py")
    args.add_argument("--factor", type=int, required=True)
    args.add_argument("--out", type=Path, required=True)
    args.add_argument("--linear-out", type=Path, help="where to write the linear map of the first stage")
    args.add_argument("--batch", type=int, default=8)
    args.add_argument("--length", type=int, default=LENGTH)
    args.add_argument("--linear-steps", type=int, default=240)
    args.add_argument("--steps", type=int, default=1500)
    args.add_argument("--linear-minutes", type=float, default=1e9, help="an upper bound for the first stage")
    args.add_argument("--minutes", type=float, default=1e9, help="an upper bound for the second stage")
    args.add_argument("--linear-rate", type=float, default=4e-3)
    args.add_argument("--rate", type=float, default=1e-3)
    args.add_argument("--shift", type=float, default=4.0)
    args.add_argument("--principal", type=int, default=0)
    args.add_argument("--every", type=int, default=100)
    args.add_argument("--validation-sequences", type=int, default=2, help="of each source")
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--device", default="cuda")
    args = args.parse_args()

    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    cuda = args.device.startswith("cuda")
    model = Frozen(args.model, torch.device(args.device), torch.bfloat16, compiled=cuda)
    if cuda:
        Divergence.of_logits = staticmethod(torch.compile(kl_of_logits, dynamic=False))
    run(model, args)


def run(model, args, log=print):
    """Both stages and the files."""
    rng, start = torch.Generator().manual_seed(args.seed), time.time()
    trainer = Trainer(model, args.tokens, args.factor, args.batch, args.length, args.validation_sequences)
    mean, deviation, sample = trainer.statistics(rng)
    linear = Linear(mean, deviation, args.factor, mean_values=False)
    steps, best = trainer.fit(linear, args.linear_steps, args.linear_minutes, args.linear_rate, rng, args.every, log)
    log(f"linear: {steps} steps, validation {best:.4f}, {time.time() - start:.0f} s")
    if args.linear_out:
        save_file(
            {"weight": linear.weight.data, "bias": linear.bias.data, "mean": mean, "deviation": deviation},
            args.linear_out,
        )
    mlp = Mlp(linear, sample, args.shift, bool(args.principal))
    steps, best = trainer.fit(mlp, args.steps, args.minutes, args.rate, rng, args.every, log)
    seconds = time.time() - start
    log(f"mlp: {steps} steps, validation {best:.4f}, {seconds:.0f} s in all")
    training = {
        "loss": "KL(full cache || compressed cache) of next-token distributions, all tokens of 256-token blocks",
        "prompts": f"{BLOCK} to {args.length - BLOCK - 1} tokens",
        "sources": SHARES,
        "steps": steps,
        "batch": args.batch,
        "scored_tokens": trainer.seen,
        "seed": args.seed,
        "rate": args.rate,
        "shift": args.shift,
        "validation_kl": round(best, 5),
        "seconds": round(seconds),
        "licence": "MIT OR Apache-2.0",
    }
    max_position = args.length - BLOCK
    write(args.out, mlp.folded(), model, args.name, args.factor, SINKS, RECENT, max_position, json.dumps(training))
    return best


if __name__ == "__main__":
    main()
