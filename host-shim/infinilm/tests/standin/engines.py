"""Engines over the stand-ins, and what is asked of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import kvhook_infinilm
from kvhook_infinilm import adapter_of

from .model_files import byte_ids
from .reference import Keep

BLOCK = 16

STATIC = dict(cache_type="static", max_cache_len=1024)
PAGED = dict(cache_type="paged", num_blocks=120, block_size=BLOCK, max_batch_size=8)
FLASH = PAGED | dict(attn_backend="flash-attn")
CACHES = dict(static=STATIC, paged=PAGED, flash=FLASH)

KEEPS = {
    "last32": Keep(budget=36),
    "last60": Keep(budget=64),
    "key_diff": Keep(keep=0.5, key_diff=True, recent=8),
    "every": Keep(budget=36, every=8),
    "every_key_diff": Keep(keep=0.4, key_diff=True, recent=8, every=16),
    "aligned": Keep(budget=36, align=True),
}
"""What the reference does for each arm that compresses."""

_CONFIGS = {
    "last32": "budget=36,sinks=4",
    "last60": "budget=64,sinks=4",
    "key_diff": "keep=0.5,recent=8,history=top,importance=key_diff",
    "every": "budget=36,sinks=4,every=8",
    "every_key_diff": "keep=0.4,recent=8,history=top,importance=key_diff,every=16",
    "aligned": "budget=36,align=block",
    "declines": "budget=100000",
}


def arm(name: str) -> dict:
    """One of these, or `noop`."""
    if name == "noop":
        return {"name": name, "plugin": "noop", "config": "observe=none"}
    return {"name": name, "plugin": "truncate", "config": _CONFIGS[name]}


SHORTENING = tuple(name for name in KEEPS if name != "aligned")
"""Arms that go with every cache."""

ARMS = ("noop", *SHORTENING, "declines")


def prompt(length: int, seed: int = 0) -> str:
    """A text of so many tokens: each byte is one."""
    draw = random.Random(f"{length} {seed}")
    return "".join(draw.choice(string.ascii_letters) for _ in range(length))


def attach(arms: Sequence[str] | dict | None, strict: bool = True) -> None:
    """What engines made from now on are served by: names of arms, a whole form, or nothing."""
    if arms is None:
        kvhook_infinilm.attach("none")
        return
    form = arms if isinstance(arms, dict) else {"arms": [arm(name) for name in arms]}
    kvhook_infinilm.attach(json.dumps(form), strict=strict)


@contextlib.contextmanager
def open_llm(
    folder: Path, arms: Sequence[str] | dict | None = ARMS, ranks: int = 1, strict=True, **options
) -> Iterator:
    """An `LLM` over the stand-ins. What blocks hold when they are given out is lost, as other requests' rows were."""
    attach(arms, strict)
    from infinilm.llm import LLM

    llm = LLM(
        str(folder),
        device="cpu",
        dtype="float32",
        tensor_parallel_size=ranks,
        skip_load=True,
        **options,
    )
    spoil_blocks(llm.engine)
    try:
        if strict and arms is not None:
            assert adapter_of(llm).on, adapter_of(llm).refused
        yield llm
    finally:
        llm.close()


def spoil_blocks(engine) -> None:
    """A block that is given out is NaN until it is written."""
    manager = getattr(engine.scheduler, "cache_manager", None)
    if manager is None:
        return
    give = manager._allocate_block

    def given():
        block = give()
        for rank in engine.model_runner.model_engine._caches:
            for cache in filter(None, rank):
                cache.array.values[:, block.block_id] = np.nan
        return block

    manager._allocate_block = given


def parameters(arm: str | None, new_tokens: int):
    """Greedy `SamplingParams`; an end-of-text token does not end it. `arm` None: without the attribute."""
    from infinilm.llm import SamplingParams

    made = SamplingParams(top_k=1, max_tokens=new_tokens, ignore_eos=True)
    if arm is not None:
        made.kv_plugin = arm
    return made


def ask(llm, prompts: str | Sequence[str], arm: str | None, new_tokens: int) -> list[list[int]]:
    """Tokens for each prompt."""
    outputs = llm.generate(
        [prompts] if isinstance(prompts, str) else list(prompts),
        sampling_params=parameters(arm, new_tokens),
        use_tqdm=False,
    )
    return [list(one.outputs[0].token_ids) for one in outputs]


def request(ids: Sequence[int], arm: str | None, new_tokens: int):
    """An `InferenceRequest` that nobody has queued yet."""
    from infinilm.llm.request import InferenceRequest

    name = f"{arm}-{next(_names)}"
    return InferenceRequest(name, "", list(ids), sampling_params=parameters(arm, new_tokens))


_names = itertools.count()


def add(engine, text: str, arm: str | None, new_tokens: int):
    """Queues a request at an `LLMEngine` and gives it."""
    queued = request(byte_ids(text), arm, new_tokens)
    engine.add_request(queued)
    return queued


def run(engine, requests: Sequence, limit: int = 2000) -> None:
    """Steps until these have ended."""
    for _ in range(limit):
        if all(request.is_finished() for request in requests):
            return
        engine.step()
    raise AssertionError(f"after {limit} steps: {[request.status for request in requests]}")


def figures(llm, arm: str) -> dict:
    """Of one arm, so far."""
    return kvhook_infinilm.figures(llm)["arms"][arm]


def block_of(llm) -> int:
    """Tokens of a block, for the reference; 1 for a static cache."""
    return getattr(llm.engine.scheduler, "block_size", 1)


def usable(llm) -> int:
    """Blocks that the next request may use."""
    return llm.engine.scheduler.cache_manager.get_total_usable_blocks()


def compare(llm, answers, folder, arm: str, keep, lengths: Sequence[int], new_tokens: int) -> int:
    """Asks an arm for prompts of these lengths, together, and expects the reference's answers; how many of the prompts
    `keep`, the reference's form of the arm, makes shorter."""
    block, prompts = block_of(llm), [prompt(length) for length in lengths]
    for text, found in zip(prompts, ask(llm, prompts, arm, new_tokens)):
        expected = answers(folder, text, new_tokens, keep, block=block)
        expect(found, expected, f"{arm}, {len(text)}")
    return sum(keep.count(length, length, block) < length for length in lengths)


def expect(found: Sequence[int], answer, what: str = "") -> None:
    """Fails where tokens are not the reference's. What rounding could decide is not asked."""
    assert answer.gap > 1e-4, (
        f"{what}: two tokens are nearly as likely ({answer.gap}); take another prompt"
    )
    assert list(found) == answer.tokens, what
