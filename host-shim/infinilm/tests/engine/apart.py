"""Runs prompts through InfiniLM's `LLM` in a process of its own: a job as JSON on stdin, tokens as JSON on stdout."""

import json
import sys


def main() -> None:
    job = json.load(sys.stdin)
    if job["form"] is not None:
        import kvhook_infinilm

        kvhook_infinilm.attach(json.dumps(job["form"]), strict=True)
    from infinilm.llm import LLM, SamplingParams

    llm = LLM(job["model"], device="cpu", dtype="float32", **job["options"])
    found = []
    for prompts, arm, new_tokens in job["requests"]:
        parameters = SamplingParams(top_k=1, max_tokens=new_tokens, ignore_eos=True)
        if arm is not None:
            parameters.kv_plugin = arm
        outputs = llm.generate(prompts, sampling_params=parameters, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
    figures = kvhook_infinilm.figures(llm) if job["form"] is not None else {}
    if job["form"] is None:
        assert "kvhook_infinilm" not in sys.modules
    llm.close()
    print(json.dumps({"tokens": found, "figures": figures}), flush=True)


main()
