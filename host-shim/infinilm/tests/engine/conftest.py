"""Fixtures of the tests that need the engine: models, prompts, engines, and what an independent reference writes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TEXTS = HERE.parents[3] / "tests" / "text"

LENGTHS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 112, 136, 140, 150, 170, 200, 240, 320, 500, 1500)
"""Tokens of the 20 prompts, about."""


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct."""
    from engine import model_files

    return model_files.smollm2()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Makes a tiny random model by its name."""
    from engine import model_files

    made = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = model_files.tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="session")
def prompts(model) -> list[str]:
    """Pieces of real text, of `LENGTHS` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [(TEXTS / name).read_text() for name in ("moby-dick.txt", "state-of-the-union.txt")]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    cut = []
    for index, length in enumerate(LENGTHS):
        start = 2000 * (index // 2)
        cut.append(tokenizer.decode(ids[index % 2][start : start + length]))
    return cut


@pytest.fixture(scope="session")
def depth() -> str:
    """`shim` where the C++ shim was compiled into InfiniLM, else `python`."""
    from kvhook_infinilm.shim import Shim

    return "shim" if Shim.find() else "python"


@pytest.fixture(scope="session")
def reference(model):
    """`reference(prompt ids, new tokens, Keep, Merge or None, ..)` of SmolLM2."""
    from engine.reference import Reference

    return Reference(model).answer


@pytest.fixture(scope="session")
def answers(model, reference, request):
    """As `reference`, with answers kept for the next run: they take minutes and do not depend on kvhook or InfiniLM."""
    from engine.merge import trained

    files = [
        HERE / "reference.py",
        HERE / "merge.py",
        trained(2),
        trained(4),
        model / "config.json",
    ]
    source = b"".join(file.read_bytes() for file in files)
    source += str((model / "model.safetensors").stat().st_size).encode()
    name = f"kvhook/reference-{hashlib.sha256(source).hexdigest()[:16]}"
    kept = request.config.cache.get(name, {})

    def answer(prompt, new_tokens, keep, **more):
        from engine.reference import Answer

        if keep is not None and not keep.every:
            # Compressed once or not at all: most caches and arms agree.
            kept_whole = keep.rows(len(prompt), len(prompt)) == len(prompt)
            keep = None if kept_whole else replace(keep, block_size=1)
        what = [prompt, new_tokens, type(keep).__name__, keep and asdict(keep), more]
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        if key not in kept:
            kept[key] = asdict(reference(prompt, new_tokens, keep, **more))
        return Answer(**kept[key])

    yield answer
    request.config.cache.set(name, kept)


@pytest.fixture(scope="session")
def static_llm(model, depth):
    """SmolLM2 with a static cache, all arms, no prefix caching."""
    from engine import engines

    with engines.open_llm(model, engines.arms(depth), **engines.STATIC) as llm:
        yield llm


@pytest.fixture(scope="session")
def paged_llm(model, depth):
    """SmolLM2 with a paged cache, all arms, with prefix caching."""
    from engine import engines

    with engines.open_llm(model, engines.arms(depth), **engines.PAGED) as llm:
        yield llm


@pytest.fixture(scope="session")
def merging_model(model, tmp_path_factory) -> Path:
    """SmolLM2 whose config.json chooses `mlp-decouple`."""
    from engine import engines, model_files

    folder = tmp_path_factory.mktemp("merging") / "model"
    return model_files.copy_with(model, folder, kv_plugin=engines.merging_arms())


@pytest.fixture(params=["static", "paged"])
def kind(request) -> str:
    """Of cache."""
    return request.param


@pytest.fixture
def llm(kind, request):
    """SmolLM2 with all arms and a cache of this kind."""
    return request.getfixturevalue(f"{kind}_llm")
