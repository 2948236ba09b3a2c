"""What compression does not serve is refused by its reason, and the engine's tokens are as without."""

import pytest

from kvhook_infinilm import adapter_of, attach
from kvhook_infinilm.errors import AttachError, Refused

from standin import engines
from standin.engines import PAGED, ask, expect, open_llm, prompt
from standin.test_generate import generate, open_engine, static

NEW_TOKENS = 12
FORM = {"plugin": "truncate", "config": "budget=36"}


def check(model, answers, reason: str, folder=None, **options) -> None:
    """An `LLM` with these options goes on uncompressed, and is not made at all where the operator is strict."""
    folder = folder or model()
    text = prompt(90)
    with open_llm(folder, FORM, strict=False, **options) as llm:
        adapter = adapter_of(llm)
        assert not adapter.on and reason in adapter.refused, adapter.refused
        expect(ask(llm, text, None, NEW_TOKENS)[0], answers(folder, text, NEW_TOKENS))
    with pytest.raises(Refused, match=reason), open_llm(folder, FORM, strict=True, **options):
        pass


def test_speculative_decoding(model, answers):
    draft = model(model_type="minicpm_eagle", seed=7)
    check(
        model,
        answers,
        "speculative decoding",
        draft_model_path=str(draft),
        # With which InfiniLM's own code does not speculate: the stand-ins have no hidden states.
        top_k=2,
        **PAGED,
    )


def test_mla(model, answers):
    check(model, answers, "MLA", use_mla=True, **PAGED)


@pytest.mark.parametrize(
    "name,value,flag",
    [
        ("async_token_handoff", "auto", "--async-token-handoff"),
        ("async_token_handoff", True, "--async-token-handoff"),
        ("enable_chunked_prefill", True, "--chunked-prefill"),
    ],
)
def test_steps_in_flight(model, answers, monkeypatch, name, value, flag):
    from infinilm.config.engine_config import EngineConfig

    monkeypatch.setattr(EngineConfig, name, value, raising=False)
    check(model, answers, flag, **PAGED)


@pytest.mark.parametrize("value", [None, False, "off", "disabled"])
def test_no_steps_in_flight(model, monkeypatch, value):
    from infinilm.config.engine_config import EngineConfig

    monkeypatch.setattr(EngineConfig, "async_token_handoff", value, raising=False)
    with open_llm(model(), FORM, **PAGED) as llm:
        assert adapter_of(llm).on


def test_kv_connector(model, answers, monkeypatch):
    from infinilm.config.kv_transfer import KVTransferConfig
    from infinilm.kv_connector import KVConnectorFactory

    monkeypatch.setattr(KVConnectorFactory, "create_connector", lambda **_: _Connector())
    # Without any loading InfiniLM would wait for ever for its caches.
    runner = "infinilm.llm.model_runner.model_runner.load_model_state_dict_by_file"
    monkeypatch.setattr(runner, lambda engine, *_, **__: engine.load_state_dict({}))
    engine = _connected(model(), KVTransferConfig)
    adapter = adapter_of(engine)
    assert not adapter.on and "KV connector" in adapter.refused
    text = prompt(90)
    request = engines.add(engine, text, None, NEW_TOKENS)
    engines.run(engine, [request])
    expect(request.generated_token_ids, answers(model(), text, NEW_TOKENS))


def _connected(folder, transfer):
    from infinilm.config.engine_config import EngineConfig
    from infinilm.llm import LLMEngine

    engines.attach(FORM, strict=False)
    transfer = transfer(kv_connector="MooncakeConnector", kv_role="kv_producer")
    return LLMEngine(
        EngineConfig(
            str(folder),
            device="cpu",
            dtype="float32",
            kv_transfer_config=transfer,
            **PAGED,
        )
    )


class _Connector:
    """Both halves of a connector that has nothing to transfer."""

    def get_num_new_matched_tokens(self, request, computed):
        return 0, False

    def request_finished(self, request, table, block_size):
        return False, None

    def get_finished(self, *_):
        return set(), set(), set()

    def get_block_ids_with_load_errors(self):
        return set()

    def build_connector_meta(self):
        return object()

    def __getattr__(self, name):
        return lambda *_: None


def test_pipeline_parallelism(model, answers):
    """On every stage."""
    import infinicore
    from infinilm.distributed import DistConfig
    from infinilm.infer_engine import InferEngine

    for stage in (0, 1):
        engines.attach(FORM, strict=False)
        config = DistConfig(1, pp_size=2, pp_stage=stage)
        made = dict(device=infinicore.device("cpu"), distributed_config=config)
        engine = InferEngine(str(model()), cache_config=static(1), **made)
        assert "pipeline parallelism" in adapter_of(engine).refused
        found = generate(engine, [prompt(90)], None, NEW_TOKENS)
        expect(found[0], answers(model(), prompt(90), NEW_TOKENS))
        engines.attach(FORM)
        with pytest.raises(Refused, match="pipeline parallelism"):
            InferEngine(str(model()), cache_config=static(1), **made)


def test_int8_cache(model):
    with pytest.raises(Refused, match="int8"):
        open_engine(model(), static(1), kv_cache_dtype="int8")
    open_engine(model(), static(1), kv_cache_dtype="float32")


def test_graphs(model):
    """Plugins that do not look at decode go with compiled graphs."""
    with open_llm(model(), FORM, enable_graph=True, **PAGED) as llm:
        assert adapter_of(llm).on


def test_plugin_that_needs_queries(model, answers):
    """Without the C++ shim there are none; the reason names what is missing."""
    form = {"plugin": "truncate", "config": "history=top,importance=attention"}
    text = prompt(90)
    with open_llm(model(), form, strict=False, **PAGED) as llm:
        adapter = adapter_of(llm)
        assert not adapter.on and "queries" in adapter.refused, adapter.refused
        expect(ask(llm, text, None, NEW_TOKENS)[0], answers(model(), text, NEW_TOKENS))


def _points():
    from kvhook_infinilm.points import POINTS

    return POINTS


@pytest.mark.parametrize("point", _points(), ids=lambda point: point.name)
def test_missing_methods_and_parameters(infinilm, monkeypatch, point):
    """What is not as expected is named, and nothing is attached."""
    import importlib

    from infinilm.llm.scheduler import Scheduler

    owner = getattr(importlib.import_module(point.module), point.owner)
    attach("none")
    publish = Scheduler.commit_computed_tokens.__wrapped__
    monkeypatch.setattr(Scheduler, "commit_computed_tokens", publish)
    with monkeypatch.context() as patch:
        patch.delattr(owner, point.method)
        with pytest.raises(AttachError, match=f"{point.name}.*from commit"):
            attach("none", strict=True)
        attach("none", strict=False)
        if owner is not Scheduler or point.method != "commit_computed_tokens":
            assert Scheduler.commit_computed_tokens is publish
    with monkeypatch.context() as patch:
        patch.setattr(owner, point.method, lambda other: None)
        with pytest.raises(AttachError, match=f"{point.name} has no parameter .*self"):
            attach("none", strict=True)
    with monkeypatch.context() as patch:
        patch.delattr(importlib.import_module(point.module), point.owner)
        with pytest.raises(AttachError, match=f"has no {point.owner}"):
            attach("none", strict=True)
