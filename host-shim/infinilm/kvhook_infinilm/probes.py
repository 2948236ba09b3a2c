"""Probes: prompts that are replayed on each arm and uncompressed, in the engine that serves."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence

from .errors import KvhookError, Refused
from .records import append, line

NONE = "none"
"""The arm of the uncompressed replay."""

PATIENCE = 600.0
"""Seconds to wait for an answer, which may have others before it."""


def probe(
    engine,
    prompts: Sequence[str] | Mapping[str, str],
    max_new_tokens: int = 64,
    *,
    arms: Sequence[str] | None = None,
    record: str | os.PathLike | None = None,
) -> list[dict]:
    """Replays prompts uncompressed and on each arm, greedily, one after the other.

    A probe is a request that names its arm. Others' requests keep their arms and wait for it as for any request; the arm's
    figures and its guard count it.

    Args:
        engine: An `LLM`, `LLMEngine` or `AsyncLLMEngine`.
        prompts: Texts, taken as they are, without a chat template; as a dict with names for the record. A text without
            a name has the first digits of its SHA-256.
        max_new_tokens: The longest answer.
        arms: Names of arms; None: all that compress, whatever their weight.
        record: A file that gets a line for each answer (docs/report.md).

    Returns the lines. Beside what the page names, an arm's has `same`: how many of its first tokens are the uncompressed
    answer's.

    Raises `Refused` where compression is off, or an arm does not compress (unknown, shadow, draining, disabled, safe
    mode); `KvhookError` for a prompt that is not answered; `OSError` for the file. The lines of before are in the file.

    Thread: any, where the engine runs by itself (`AsyncLLMEngine`); else the one that drives it.
    """
    lines = []
    for one in each(engine, prompts, max_new_tokens, arms=arms):
        if record is not None:
            append(record, one)
        lines.append(one)
    return lines


def each(engine, prompts, max_new_tokens: int, *, arms=None) -> Iterator[dict]:
    """As `probe`, line by line."""
    from . import adapter_of

    adapter = adapter_of(engine)
    if adapter is None or not adapter.on:
        raise Refused(getattr(adapter, "refused", None) or "compression is off")
    if adapter.requests is None:
        raise Refused("probes need an engine with a scheduler: LLM, LLMEngine, AsyncLLMEngine")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    replay = _Replay(engine, adapter, max_new_tokens)
    names = _compressing(adapter) if arms is None else list(arms)
    for name in names:
        _check(adapter, name)
    for name, text in _named(prompts):
        plain = replay.answer(text, NONE)
        yield line("probe", adapter, prompt=name, arm=NONE, tokens=plain.tokens)
        for arm in names:
            _check(adapter, arm)
            answer = replay.answer(text, arm)
            # It may have been switched off meanwhile.
            _check(adapter, arm)
            yield line(
                "probe",
                adapter,
                prompt=name,
                arm=arm,
                tokens=answer.tokens,
                kept=answer.kept,
                of=answer.of,
                same=_same(plain.tokens, answer.tokens),
            )


class _Answer:
    def __init__(self, request, entries: int):
        """Args: entries: Layers times KV heads, over all ranks."""
        tracked = getattr(request, "_kvhook", None)
        prompt = request.get_prompt_length()
        rows = prompt if tracked is None or tracked.prompt_rows is None else tracked.prompt_rows
        self.tokens = list(request.generated_token_ids)
        self.kept = rows * entries
        self.of = prompt * entries


class _Replay:
    """Answers prompts in an engine."""

    def __init__(self, engine, adapter, max_new_tokens: int):
        self._engine = engine
        # An `AsyncLLMEngine` has a thread that makes its steps.
        self._steps_itself = hasattr(engine, "is_healthy")
        self._llm_engine = engine.engine if hasattr(engine, "engine") else engine
        self._max_new_tokens = max_new_tokens
        self._entries = adapter.entries_per_token

    def answer(self, text: str, arm: str) -> _Answer:
        """Raises `KvhookError` where there is none."""
        request = self._request(text, arm)
        self._llm_engine.add_request(request)
        end = time.monotonic() + PATIENCE
        while not request.is_finished():
            if not self._steps_itself:
                self._llm_engine.step()
            elif not self._engine.is_healthy():
                raise KvhookError("the engine has stopped")
            else:
                time.sleep(0.002)
            if time.monotonic() > end:
                request.mark_canceled()
                raise KvhookError(f"a probe of arm {arm} had no answer in {PATIENCE:.0f} s")
        if not request.generated_token_ids:
            raise KvhookError(
                f"a probe of arm {arm}, a prompt of {request.get_prompt_length()} tokens, was not answered: "
                f"{request.finish_reason}"
            )
        return _Answer(request, self._entries)

    def _request(self, text: str, arm: str):
        from infinilm.llm.request import InferenceRequest
        from infinilm.llm.sampling_params import SamplingParams

        # Without a queue for its tokens: nobody streams it.
        return InferenceRequest(
            request_id=f"kvhook-probe-{uuid.uuid4().hex}",
            prompt=text,
            prompt_token_ids=self._llm_engine.tokenize(text),
            sampling_params=SamplingParams(top_k=1, max_tokens=self._max_new_tokens),
            eos_token_ids=self._llm_engine.eos_token_ids,
            request_data={"kv_plugin": arm},
        )


def _named(prompts: Sequence[str] | Mapping[str, str]) -> list[tuple[str, str]]:
    if isinstance(prompts, str):
        raise TypeError("prompts is one text; expected a list of texts, or a dict")
    if isinstance(prompts, Mapping):
        return list(prompts.items())
    return [(f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}", text) for text in prompts]


def _states(adapter) -> dict[str, str]:
    """What each arm does; empty in safe mode."""
    arms = adapter.host.arms()
    return {} if arms["safe_mode"] else {arm["name"]: arm["state"] for arm in arms["arms"]}


def _compressing(adapter) -> list[str]:
    names = [name for name, state in _states(adapter).items() if state == "serving"]
    if not names:
        raise Refused("no arm compresses: `arms()` gives their states")
    return names


def _check(adapter, arm: str) -> None:
    state = _states(adapter).get(arm)
    if state != "serving":
        raise Refused(
            f"arm {arm} is {state or 'not there, or all are off (safe mode)'}: a probe of it would be answered uncompressed; "
            "an arm that is serving with weight 0 gets probes, and no request that does not name it"
        )


def _same(plain: Sequence[int], tokens: Sequence[int]) -> int:
    for place, (ours, theirs) in enumerate(zip(tokens, plain)):
        if ours != theirs:
            return place
    return min(len(plain), len(tokens))
