"""Decode before and after compression in InfiniLM, and the hooks' share of prefill, in one run on one machine.

    python bench/bench_infinilm.py --model MODEL --text FILE --engine-build "stock GEMM"

Prints a table and, as its last line, JSON. The arms take turns, so that what else the machine does meets all alike.
Figures are CPU seconds of the process (one thread computes on the CPU); wall time stands beside them. InfiniLM and
`kvhook_infinilm` must be importable.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import kvhook_infinilm

CUT = 256


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--text", required=True, help="file with the prompt's text")
    parser.add_argument("--engine-build", required=True, help="what the engine was built with")
    parser.add_argument("--tokens", type=int, default=1500, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=33, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    form = {"arms": [{"name": "cut", "plugin": "truncate", "config": f"budget={CUT}"}]}
    kvhook_infinilm.attach(json.dumps(form), strict=True)
    from infinilm.llm import LLM

    llm = LLM(
        arguments.model,
        device="cpu",
        dtype="float32",
        cache_type="static",
        max_cache_len=2 * arguments.tokens,
        enable_prefix_caching=False,
    )
    ids = llm.engine.tokenize(open(arguments.text, encoding="utf-8").read())
    whole, short = ids[: arguments.tokens], ids[:CUT]
    cases = {
        "uncompressed": (whole, "none"),
        "compressed": (whole, "cut"),
        "native": (short, "none"),
    }
    prefill = {case: [] for case in cases}
    decode = {case: ([], []) for case in cases}
    for _ in range(arguments.rounds):
        for case, (prompt, arm) in cases.items():
            first, steps = answer(llm.engine, prompt, arm, arguments.decode)
            prefill[case].append(first[1])
            decode[case][0].append(statistics.median(cpu for cpu, _ in steps))
            decode[case][1].append(statistics.median(wall for _, wall in steps))

    hooks = kvhook_infinilm.figures(llm)["arms"]["cut"]["hooks"]
    spent = sum(hooks[name]["total_ns"] for name in ("bound", "on_prefill_done", "commit")) / 1e9
    share = spent / sum(prefill["compressed"])
    llm.close()

    print(f"{arguments.engine_build}; {arguments.tokens} -> {CUT} tokens, static cache, CPU")
    print(
        f"{'case':14} {'CPU ms a token':>15} {'wall ms a token':>16}   (median of {arguments.rounds} rounds)"
    )
    for case, (cpu, wall) in decode.items():
        print(
            f"{case:14} {1e3 * statistics.median(cpu):15.1f} {1e3 * statistics.median(wall):16.1f}"
        )
    by_round = [
        before / after for before, after in zip(decode["uncompressed"][0], decode["compressed"][0])
    ]
    to_native = [
        after / native for after, native in zip(decode["compressed"][0], decode["native"][0])
    ]
    result = {
        "engine_build": arguments.engine_build,
        "tokens": arguments.tokens,
        "kept": CUT,
        "faster": statistics.median(by_round),
        "faster_range": [min(by_round), max(by_round)],
        "to_native": statistics.median(to_native),
        "hooks_percent_of_prefill": 100 * share,
        "hooks_ms": 1e3 * spent / arguments.rounds,
    }
    print(
        f"decode is {result['faster']:.2f} times faster ({min(by_round):.2f} to {max(by_round):.2f}; goal 1.6), "
        f"{result['to_native']:.2f} of native {CUT}; hooks and commit take {result['hooks_ms']:.1f} ms, "
        f"{result['hooks_percent_of_prefill']:.3f} % of prefill"
    )
    print(json.dumps(result))


def answer(engine, prompt, arm: str, new_tokens: int):
    """Runs one request: (CPU, wall) seconds of its prefill, and of each later step."""
    from infinilm.llm import SamplingParams
    from infinilm.llm.request import InferenceRequest

    parameters = SamplingParams(top_k=1, max_tokens=new_tokens, ignore_eos=True)
    parameters.kv_plugin = arm
    request = InferenceRequest("bench", "", prompt, sampling_params=parameters)
    engine.add_request(request)
    times = []
    while not request.is_finished():
        cpu, wall = time.process_time(), time.perf_counter()
        engine.step()
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    return times[0], times[1:]


if __name__ == "__main__":
    main()
