"""Engines with arms, and what is asked of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import kvhook_infinilm
from kvhook_infinilm import adapter_of

from .merge import Merge, trained
from .reference import Answer, Keep

STATIC = dict(cache_type="static", max_cache_len=2048, enable_prefix_caching=False)
PAGED = dict(
    cache_type="paged", num_blocks=600, block_size=16, max_batch_size=8, attn_backend="paged-attn"
)

_KEEPS = {
    "last128": Keep(budget=132),
    "last32": Keep(budget=36),
    "key_diff": Keep(keep=0.25, importance="key_diff"),
    "attention": Keep(keep=0.25, importance="attention"),
    "every": Keep(budget=132, every=64),
    "every_key_diff": Keep(keep=0.25, importance="key_diff", every=64),
    "pairs": Merge(2),
    "fours": Merge(4),
    "every_pairs": Merge(2, every=64),
    "every_fours": Merge(4, every=64),
}

_CONFIGS = {
    "last128": "budget=132,sinks=4",
    "last32": "budget=36,sinks=4",
    "key_diff": "keep=0.25,history=top,importance=key_diff",
    "attention": "keep=0.25,history=top,importance=attention",
    "every": "budget=132,every=64",
    "every_key_diff": "keep=0.25,history=top,importance=key_diff,every=64",
    "declines": "budget=100000",
}
_NEED_SHIM = {"attention"}


def keep_of(arm: str, kind: str) -> Keep | Merge | None:
    """What the reference does for an arm, with a cache of this kind."""
    keep = _KEEPS.get(arm)
    block_size = PAGED["block_size"] if kind == "paged" else 1
    return keep and replace(keep, block_size=block_size)


def truncate(name: str, config: str) -> dict:
    """An arm of `truncate`."""
    return {"name": name, "plugin": "truncate", "config": config}


def arms(depth: str) -> list[dict]:
    """All that the engine offers what they need."""
    noop = {"name": "noop", "plugin": "noop"}
    if depth == "python":
        noop["config"] = "observe=none"
    shim = depth == "shim"
    served = {name: config for name, config in _CONFIGS.items() if shim or name not in _NEED_SHIM}
    return [noop, *(truncate(name, config) for name, config in served.items())]


def merging_arms() -> list[dict]:
    """Arms of `mlp-decouple`, for SmolLM2."""
    merges = {name: keep for name, keep in _KEEPS.items() if isinstance(keep, Merge)}
    return [
        {
            "name": name,
            "plugin": "mlp-decouple",
            "config": {"weights": str(trained(merge.factor)), "every": merge.every},
        }
        for name, merge in merges.items()
    ]


@contextlib.contextmanager
def open_llm(model: Path, arms: Sequence[dict] | None, **options) -> Iterator:
    """An `LLM` on the CPU; it must be served. `arms` None: as the model's config.json says."""
    form = arms and json.dumps({"arms": list(arms)})
    kvhook_infinilm.attach(form, strict=True)
    from infinilm.llm import LLM

    llm = LLM(str(model), device="cpu", dtype="float32", **options)
    try:
        assert adapter_of(llm).on, adapter_of(llm).refused
        yield llm
    finally:
        llm.close()


def ask(llm, prompts: Sequence[str], arm: str | None, new_tokens: int) -> list:
    """`RequestOutput` of each prompt, greedy; an end-of-text token does not end it. `arm` None: without the attribute."""
    from infinilm.llm import SamplingParams

    parameters = SamplingParams(top_k=1, max_tokens=new_tokens, ignore_eos=True)
    if arm is not None:
        parameters.kv_plugin = arm
    return llm.generate(list(prompts), sampling_params=parameters, use_tqdm=False)


def tokens(llm, prompts: Sequence[str], arm: str | None, new_tokens: int) -> list[list[int]]:
    """As `ask`: the tokens alone."""
    return [list(one.outputs[0].token_ids) for one in ask(llm, prompts, arm, new_tokens)]


def figures(llm, arm: str) -> dict:
    """Of one arm, so far."""
    return kvhook_infinilm.figures(llm)["arms"][arm]


def run_apart(
    model: Path, form: dict | None, options: dict, requests: Sequence[tuple], **env
) -> dict:
    """Runs `apart.py`: an `LLM` in a process of its own.

    Args:
        form: A `kv_plugin` form; None: kvhook is not even imported.
        requests: (prompts, arm or None, new tokens), asked one after the other.
        env: Variables of its environment.

    Returns `tokens`, for each of `requests`, and `figures`.
    """
    job = dict(model=str(model), form=form, options=options, requests=list(requests))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("apart.py"))],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | env,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


class Comparison:
    """Compares tokens with the reference's. After a near tie that rounding decides, an answer is not compared on."""

    NEAR_TIE = 1e-3
    """Two logits that are nearer are told apart by rounding."""

    def __init__(self):
        self.compared = 0
        self.lost = 0

    def add(self, found: Sequence[int], expected: Answer, what: str = "") -> None:
        """Fails for a token that is not the reference's."""
        assert len(found) == len(expected.tokens), what
        self.compared += len(found)
        for place, (ours, theirs) in enumerate(zip(found, expected.tokens)):
            if ours != theirs:
                assert expected.gaps[place] < self.NEAR_TIE, (
                    f"{what}: token {place} is {ours}, the reference's {theirs} (ahead by "
                    f"{expected.gaps[place]:.4f}): {list(found)} and {expected.tokens}"
                )
                self.lost += len(found) - place
                return

    def end(self) -> None:
        """Fails where too much was not compared."""
        print(f"{self.compared} tokens, {self.lost} of them behind a near tie")
        assert self.lost < 0.05 * self.compared
