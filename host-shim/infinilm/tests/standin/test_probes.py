"""Probes and records, in each kind of engine."""

import asyncio
import json

import pytest

import kvhook_infinilm
from kvhook_infinilm import Refused, adapter_of, control
from kvhook_infinilm.records import RUN

from standin.engines import CACHES, KEEPS, PAGED, add, attach, expect, open_llm, prompt, run

NEW_TOKENS = 12
ASKED = {"first": prompt(90), "second": prompt(70, 1), "short": prompt(6, 2)}


def check(lines, answers, model, llm_arms, block):
    assert [(line["prompt"], line["arm"]) for line in lines] == [
        (name, arm) for name in ASKED for arm in ["none", *llm_arms]
    ]
    for line in lines:
        text, arm = ASKED[line["prompt"]], line["arm"]
        expected = answers(model(), text, NEW_TOKENS, KEEPS.get(arm), block=block)
        found = line["tokens"]
        # An end-of-text token ends it.
        expect(
            found, type(expected)(**(vars(expected) | {"tokens": expected.tokens[: len(found)]}))
        )
        assert line["kind"] == "probe" and line["engine"] == "infinilm" and line["run"] == RUN
        if arm == "none":
            plain = found
            assert "kept" not in line and "same" not in line
            continue
        length = len(text)
        rows = KEEPS[arm].count(length, length, block) if arm in KEEPS else length
        assert line["kept"] * length == line["of"] * rows, arm
        first = [i for i, (ours, theirs) in enumerate(zip(found, plain)) if ours != theirs]
        assert line["same"] == (first[0] if first else min(len(found), len(plain)))


@pytest.mark.parametrize("cache", CACHES)
def test_each_arm_answers_as_when_asked(model, answers, cache, tmp_path):
    path = tmp_path / "record.jsonl"
    with open_llm(model(), ["last32", "noop"], **CACHES[cache]) as llm:
        kvhook_infinilm.record(llm, path)
        lines = kvhook_infinilm.probe(llm, ASKED, NEW_TOKENS, record=path)
        block = getattr(llm.engine.scheduler, "block_size", 1)
        check(lines, answers, model, ["last32", "noop"], block)
        figures = kvhook_infinilm.figures(llm)["arms"]
        # A probe is a sequence of its arm.
        assert figures["last32"]["sequences"] == figures["noop"]["sequences"] == len(ASKED)
        assert not adapter_of(llm).live
        recorder = kvhook_infinilm.record(llm, path, every_seconds=3600)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written[1:-2] == lines
    # As the engine is closed a last one.
    assert [line["kind"] for line in (written[0], *written[-2:])] == ["figures"] * 3
    assert written[-1]["figures"]["arms"] == figures and not recorder._thread.is_alive()


def test_others_requests_go_on_meanwhile(model, answers):
    with open_llm(model(), ["last32", "noop"], **PAGED) as llm:
        text = prompt(80, 9)
        others = [add(llm.engine, text, arm, 24) for arm in ("last32", "none")]
        kvhook_infinilm.probe(llm, ASKED, NEW_TOKENS)
        run(llm.engine, others)
        for request, arm in zip(others, ("last32", None)):
            expected = answers(model(), text, 24, KEEPS.get(arm), block=16)
            expect(request.generated_token_ids, expected, str(arm))


def test_arms_that_do_not_compress_are_not_probed(model):
    with open_llm(model(), ["last32", "noop"], **PAGED) as llm:
        for state in ("shadow", "draining", "disabled"):
            control(llm, [{"state": {"noop": state}}])
            lines = kvhook_infinilm.probe(llm, [ASKED["first"]], 2)
            assert [line["arm"] for line in lines] == ["none", "last32"]
            with pytest.raises(Refused, match=f"noop is {state}"):
                kvhook_infinilm.probe(llm, [ASKED["first"]], 2, arms=["noop"])
        with pytest.raises(Refused, match="nobody"):
            kvhook_infinilm.probe(llm, [ASKED["first"]], 2, arms=["nobody"])
        control(llm, [{"safe_mode": True}])
        with pytest.raises(Refused):
            kvhook_infinilm.probe(llm, [ASKED["first"]], 2)


def test_an_arm_that_is_switched_off_meanwhile_has_no_line(model, tmp_path):
    path = tmp_path / "record.jsonl"
    with open_llm(model(), ["last32", "noop"], **PAGED) as llm:
        step, steps = llm.engine.step, []

        def switching_off():
            steps.append(1)
            if len(steps) == 2 * NEW_TOKENS - 4:
                control(llm, [{"state": {"last32": "disabled"}}])
            return step()

        llm.engine.step = switching_off
        with pytest.raises(Refused, match="last32 is disabled"):
            kvhook_infinilm.probe(llm, ASKED, NEW_TOKENS, record=path)
        (line,) = map(json.loads, path.read_text().splitlines())
        assert line["arm"] == "none"


def test_a_conversation_stays_on_its_arm(model):
    with open_llm(model(), ["last32", "noop"], **PAGED) as llm:
        taken = []
        for key in range(12):
            requests = []
            for turn in range(3):
                request = add(llm.engine, prompt(40, turn), None, 1)
                request.sampling_params.kv_key = f"conversation {key}"
                requests.append(request)
            before = {name: arm["sequences"] for name, arm in _arms(llm)}
            run(llm.engine, requests)
            taken.append({name: arm["sequences"] - before[name] for name, arm in _arms(llm)})
        assert all(sorted(each.values()) == [0, 3] for each in taken)
        assert len({json.dumps(each) for each in taken}) == 2


def _arms(llm):
    return kvhook_infinilm.figures(llm)["arms"].items()


def test_over_http_beside_a_server_that_serves(model, answers, monkeypatch):
    """The server's engine makes its steps by itself; its event loop goes on while probes are answered."""
    fastapi = pytest.importorskip("fastapi")
    testclient = pytest.importorskip("fastapi.testclient")
    from types import SimpleNamespace

    from kvhook_infinilm.operate import add_routes

    attach(["last32", "noop"])
    from infinilm.llm import AsyncLLMEngine

    monkeypatch.setenv("KVHOOK_CONTROL", "1")
    engine = AsyncLLMEngine(str(model()), device="cpu", dtype="float32", skip_load=True, **PAGED)
    app = fastapi.FastAPI()
    add_routes(SimpleNamespace(engine=engine), app)
    client = testclient.TestClient(app, base_url="http://localhost", client=("127.0.0.1", 50000))
    body = {"prompts": ASKED, "max_new_tokens": NEW_TOKENS}

    async def serve():
        engine.start()
        try:
            return await asyncio.to_thread(
                lambda: (
                    client.post("/kvhook/probe", json=body),
                    client.get("/kvhook/record"),
                    client.post("/kvhook/probe", json=body | {"arms": ["nobody"]}),
                )
            )
        finally:
            engine.stop()

    probed, recorded, refused = asyncio.run(serve())
    assert (probed.status_code, recorded.status_code, refused.status_code) == (200, 200, 409)
    lines = [json.loads(line) for line in probed.text.splitlines()]
    check(lines, answers, model, ["last32", "noop"], 16)
    (figures,) = map(json.loads, recorded.text.splitlines())
    assert figures["kind"] == "figures"
    assert figures["figures"]["arms"]["last32"]["sequences"] == len(ASKED)
