"""Arms that are swapped under load, some of them for plugins that fail: what the tests of swaps have in common.

Run by itself it does so in an `LLM` of its own process: a job as JSON on stdin, what was found as JSON on stdout.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time

GOOD = {
    "last": ("truncate", "budget=20,sinks=4"),
    "longer": ("truncate", "budget=36,sinks=4"),
    "key_diff": ("truncate", "budget=24,history=top,importance=key_diff,recent=8"),
    "half": ("faulty", "keep=0.5"),
    "heads": ("faulty", "keep=0.4,plan=select-heads"),
}
"""Plugin and config of the arms that compress."""

WITH_QUERIES = {
    "attention": (
        "truncate",
        "budget=28,history=top,importance=attention,window=8,recent=8,pool=1",
    )
}
"""More of them, which hold state for a sequence while its prompt is computed."""

FAILING = [
    "prefill_done=fail,after={n}",
    "prefill_done=panic,after={n}",
    "prefill_done=panic-twice",
    "bound=fail,after={n}",
    "bound=panic,after={n}",
    "damage=out-of-range,after={n}",
    "keep=0.4,damage=descending,plan=select-heads,after={n}",
    "damage=fewer,plan=ranges",
    "answer=above",
    "allocate=65536,free=panic",
    "destroy=panic,after={n}",
    "prefill_done=out-of-memory,after={n}",
]
"""Configs of `faulty`: they load, and fail sooner or later. Where they do not they keep what `half` or `heads` keep."""

REFUSED = [
    ("faulty", "create=fail"),
    ("faulty", "create=panic"),
    ("faulty", "needs=panic"),
    ("faulty", "keep=2"),
    ("truncate", "no_such_key=1"),
    ("missing", ""),
]
"""These do not load: the old one goes on."""

ARMS = ("a", "b")


def first_arms() -> list[dict]:
    """The arms before the first swap."""
    plugin, config = GOOD["last"]
    return [{"name": name, "plugin": plugin, "config": config} for name in ARMS]


def command(draw: random.Random, good: dict) -> tuple[list, bool]:
    """One swap, with other changes beside it, and whether it can be made."""
    name = draw.choice(ARMS)
    dice = draw.random()
    if dice < 0.15:
        plugin, config = draw.choice(REFUSED)
    elif dice < 0.55:
        plugin, config = "faulty", draw.choice(FAILING).format(n=draw.randint(0, 6))
    else:
        plugin, config = draw.choice(list(good.values()))
    state = "shadow" if draw.random() < 0.1 else "serving"
    swap = {"name": name, "plugin": plugin, "config": config, "state": state}
    changes = [{"replace": swap}, {"weights": {name: draw.randint(0, 3)}}]
    if draw.random() < 0.2:
        changes.append({"state": {draw.choice(ARMS): "draining"}})
    if draw.random() < 0.2:
        changes.append({"guard": {name: {"failed": 0.5, "sequences": 4}}})
    return changes, dice >= 0.15


def resources(process: int | str = "self") -> dict:
    """Threads, open files and resident memory of a process."""
    status = open(f"/proc/{process}/status").read()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "threads": int(fields["Threads"]),
        "files": len(os.listdir(f"/proc/{process}/fd")),
        "mib": int(fields["VmRSS"].split()[0]) / 1024,
    }


class Load:
    """Requests that are always in flight. Used by the thread that drives the engine; `steps` is read by any."""

    def __init__(self, llm, prompts, in_flight: int, new_tokens: int, seed: int):
        self.steps = 0
        self.done: list[tuple] = []
        """Request, index of its prompt."""
        self._llm = llm
        self._prompts = prompts
        self._in_flight = in_flight
        self._new_tokens = new_tokens
        self._draw = random.Random(seed)
        self._running: list[tuple] = []

    def answer(self, index: int, arm: str):
        """One request, alone."""
        request = self._add(index, arm)
        while not request.is_finished():
            self._llm.engine.step()
        return request

    def run_while(self, going) -> None:
        """Keeps requests in flight as long as it is told to, then lets them end."""
        while going() or self._running:
            while going() and len(self._running) < self._in_flight:
                index = self._draw.randrange(len(self._prompts))
                self._running.append((self._add(index, self._draw.choice([*ARMS, "", ""])), index))
            self._llm.engine.step()
            self.steps += 1
            ended = [one for one in self._running if one[0].is_finished()]
            self._running = [one for one in self._running if not one[0].is_finished()]
            self.done += ended

    def _add(self, index: int, arm: str):
        from infinilm.llm import SamplingParams
        from infinilm.llm.request import InferenceRequest

        parameters = SamplingParams(top_k=1, max_tokens=self._new_tokens, ignore_eos=True)
        if arm:
            parameters.kv_plugin = arm
        request = InferenceRequest(
            request_id=f"{self._draw.getrandbits(64):x}",
            prompt="",
            prompt_token_ids=self._prompts[index],
            sampling_params=parameters,
            eos_token_ids=[],
        )
        self._llm.engine.add_request(request)
        return request


def outcome(request) -> tuple[int, list[int]]:
    """By how much its cache became shorter, and its tokens."""
    tracked = getattr(request, "_kvhook", None)
    return (tracked.dropped if tracked else 0), list(request.generated_token_ids)


def main() -> None:
    """Runs a job."""
    job = json.load(sys.stdin)
    import kvhook_infinilm
    from kvhook_infinilm import HostError

    good = GOOD | (WITH_QUERIES if job["queries"] else {})
    form = {"arms": first_arms()}
    kvhook_infinilm.attach(json.dumps(form), folders=job["folders"], strict=True)
    from infinilm.llm import LLM

    llm = LLM(job["model"], device="cpu", dtype="float32", **job["options"])
    prompts = [llm.engine.tokenize(text) for text in job["prompts"]]
    load = Load(llm, prompts, job["in_flight"], job["new_tokens"], job["seed"])

    alone = []
    for index in range(len(prompts)):
        alone.append([outcome(load.answer(index, "none"))])
    for plugin, config in good.values():
        swap = {"name": "a", "plugin": plugin, "config": config}
        kvhook_infinilm.control(llm, [{"replace": swap}])
        for index, answers in enumerate(alone):
            answers.append(outcome(load.answer(index, "a")))

    draw = random.Random(job["seed"])
    made = refused = 0
    wrong: list[str] = []
    most = {"instances": 0}

    def swap_often(count: int) -> None:
        """One swap, at most, for each step of the engine: requests are in flight at all of them."""
        nonlocal made, refused
        for _ in range(count):
            before = load.steps
            changes, can = command(draw, good)
            try:
                kvhook_infinilm.control(llm, changes)
                made += 1
                if not can:
                    wrong.append(f"{changes} was made")
            except HostError as error:
                refused += 1
                if can:
                    wrong.append(f"{changes}: {error}")
            # Those of the sequences that an arm serves may be the old ones still.
            bound = len(ARMS) + job["in_flight"]
            alive = kvhook_infinilm.arms(llm)["instances"]
            most["instances"] = max(most["instances"], alive)
            if alive > bound:
                wrong.append(f"{alive} instances, at most {bound} can be in use")
            while load.steps == before and thread.is_alive():
                time.sleep(0.0005)

    def swapped(count: int) -> None:
        nonlocal thread
        ended = threading.Event()

        def run() -> None:
            try:
                swap_often(count)
            except Exception as error:
                wrong.append(repr(error))
            finally:
                ended.set()

        thread = threading.Thread(target=run)
        thread.start()
        load.run_while(lambda: not ended.is_set())
        thread.join()

    thread = threading.current_thread()
    # Every library has been loaded once and the allocator has what it needs.
    swapped(job["swaps"] // 2)
    before = resources()
    swapped(job["swaps"])
    after = resources()

    compressed = 0
    for request, index in load.done:
        dropped, tokens = outcome(request)
        compressed += dropped > 0
        expected = [answer for rows, answer in alone[index] if rows == dropped]
        if tokens not in expected:
            wrong.append(
                f"prompt {index}, {dropped} rows dropped: {tokens}, alone {expected or 'never'}"
            )
    figures = kvhook_infinilm.figures(llm)["arms"]
    found = {
        "made": made,
        "refused": refused,
        "requests": len(load.done),
        "compressed": compressed,
        "steps": load.steps,
        "before": before,
        "after": after,
        "most_instances": most["instances"],
        "instances": kvhook_infinilm.arms(llm)["instances"],
        "live": sum(arm["live"] for arm in figures.values()),
        "fallbacks": {name: arm["fallbacks"] for name, arm in figures.items()},
        "wrong": wrong,
    }
    llm.close()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
