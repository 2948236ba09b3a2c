"""Where nothing is compressed nothing changes: no plugin, `noop` and a plugin that declines."""

import pytest

from standin.engines import CACHES, ask, expect, figures, open_llm, prompt
from standin.model_files import byte_ids

LENGTHS = (1, 8, 15, 16, 17, 40, 64, 100, 150)
NEW_TOKENS = 20


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cache", CACHES)
def test_tokens(model, answers, cache, ranks):
    folder = model()
    prompts = [prompt(length) for length in LENGTHS]
    with open_llm(folder, None, ranks, **CACHES[cache]) as llm:
        plain = ask(llm, prompts, None, NEW_TOKENS)
        assert llm.engine.tokenize(prompts[-1]) == byte_ids(prompts[-1])
    for text, found in zip(prompts, plain):
        expect(found, answers(folder, text, NEW_TOKENS), f"{len(text)} tokens")
    with open_llm(folder, ranks=ranks, **CACHES[cache]) as llm:
        for arm in ("noop", "declines", "none"):
            assert ask(llm, prompts, arm, NEW_TOKENS) == plain, arm
        assert figures(llm, "noop")["sequences"] == figures(llm, "declines")["sequences"] == 9
        assert figures(llm, "declines")["commits"] == 0
