"""Fixtures of the tests over stand-ins: InfiniLM's own Python, its compiled modules stood in for."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def infinilm():
    """InfiniLM's Python package over the stand-ins.

    Installed when the first test runs, not when tests are collected: those of other folders run without it.
    """
    from standin import install

    reason = install.missing()
    if reason is not None:
        pytest.skip(reason)
    install.install()
    import infinilm

    return infinilm


@pytest.fixture(scope="session")
def model(infinilm, tmp_path_factory):
    """A model's folder by the changes to its config."""
    from standin import model_files

    made = {}

    def make(**changes):
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = model_files.write(tmp_path_factory.mktemp("model"), **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def answers():
    """`answers(folder, prompt or its tokens, new tokens, Keep or None, ..)`: the reference's, remembered."""
    from standin import model_files
    from standin.reference import Reference

    references, kept = {}, {}

    def answer(folder, prompt: str | tuple, new_tokens: int, keep=None, **more):
        key = folder, prompt, new_tokens, keep, tuple(more.items())
        if key not in kept:
            if folder not in references:
                references[folder] = Reference(model_files.config(folder))
            ids = model_files.byte_ids(prompt) if isinstance(prompt, str) else list(prompt)
            kept[key] = references[folder].answer(ids, new_tokens, keep, **more)
        return kept[key]

    return answer


@pytest.fixture(autouse=True)
def attached_to_nothing(infinilm):
    """Whatever a test chose, the next one begins without."""
    yield
    import kvhook_infinilm

    kvhook_infinilm.attach("none")


@pytest.fixture
def reached(monkeypatch):
    """(sequence, rank) of each sequence of which the host has asked a plugin on a rank: those are due an `on_free`."""
    from kvhook_infinilm.host import Host

    ask, prepare, found = Host.ask, Host.prepare, set()

    def asked(self, candidate):
        # The bound of a plan is the same on all ranks: the first tells it.
        found.add((candidate.uid, 0))
        return ask(self, candidate)

    def prepared(self, rank, prepares):
        found.update((each.uid, rank) for each in prepares)
        return prepare(self, rank, prepares)

    monkeypatch.setattr(Host, "ask", asked)
    monkeypatch.setattr(Host, "prepare", prepared)
    return found
