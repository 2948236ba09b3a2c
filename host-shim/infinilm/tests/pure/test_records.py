"""Records: lines that are whole, whoever was cut off before."""

import json
import threading
import time
from types import SimpleNamespace

import pytest

from kvhook_infinilm import probes, records
from kvhook_infinilm.errors import Refused
from kvhook_infinilm.operate import Denied, probe_of

FIGURES = {"engine": "InfiniLM", "arms": {"a": {"sequences": 1}}}


def adapter(on=True):
    host = SimpleNamespace(figures=lambda: FIGURES) if on else None
    return SimpleNamespace(host=host, on=on, refused=None, model_name="m", recorders=[])


def test_a_line_says_what_when_and_of_what():
    before = time.time()
    line = json.loads(records.dumped(records.figures_line(adapter())))
    assert before - 1 <= line.pop("at") <= time.time() + 1
    assert line == {
        "kind": "figures",
        "engine": "infinilm",
        "model": "m",
        "run": records.RUN,
        "figures": FIGURES,
    }


@pytest.mark.parametrize("there", ["", '{"kind": "figures"}\n', '{"kind": "fig'])
def test_lines_are_appended_behind_whatever_is_there(tmp_path, there):
    path = tmp_path / "record.jsonl"
    if there:
        path.write_text(there)
    records.append(path, {"kind": "a"})
    records.append(path, {"kind": "b"})
    text = path.read_text()
    assert text.startswith(there)
    assert text.splitlines()[-2:] == ['{"kind":"a"}', '{"kind":"b"}']


def test_a_new_file_is_its_owners(tmp_path):
    records.append(tmp_path / "record.jsonl", {})
    assert (tmp_path / "record.jsonl").stat().st_mode & 0o777 == 0o600


def test_threads_do_not_mix_lines(tmp_path):
    path = tmp_path / "record.jsonl"
    one = {"tokens": list(range(3000))}
    threads = [
        threading.Thread(target=lambda: [records.append(path, one) for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [one] * 200


def test_figures_again_and_again_and_a_last_time(tmp_path):
    path, one = tmp_path / "record.jsonl", adapter()
    with records.Recorder(one, path, 0.001) as recorder:
        assert one.recorders == [recorder]
        while len(path.read_text().splitlines()) < 4:
            time.sleep(0.001)
        assert recorder._thread.is_alive()
    recorder.close()
    count = len(path.read_text().splitlines())
    assert one.recorders == [] and not recorder._thread.is_alive()
    assert count == len(path.read_text().splitlines()) >= 5


def test_a_recorder_ends_with_its_engine(tmp_path):
    one = adapter()
    recorder = records.Recorder(one, tmp_path / "record.jsonl", 0.001)
    one.on, one.host = False, None
    recorder._thread.join(60)
    assert not recorder._thread.is_alive()
    recorder.close()


def test_nothing_is_recorded_of_what_is_off(tmp_path):
    for off in (None, adapter(on=False)):
        with pytest.raises(Refused, match="off"):
            records.Recorder(off, tmp_path / "record.jsonl", 1)
    with pytest.raises(ValueError, match="every_seconds"):
        records.Recorder(adapter(), tmp_path / "record.jsonl", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("plain", "tokens", "same"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2), ([1], [2], 0)],
)
def test_tokens_in_common(plain, tokens, same):
    assert probes._same(plain, tokens) == same


def test_prompts_without_a_name_are_told_apart_and_do_not_show():
    (first, _), (second, _) = probes._named(["my secret", "another"])
    assert first != second and first.startswith("sha256:") and "secret" not in first
    assert probes._named({"a": "my secret"}) == [("a", "my secret")]
    with pytest.raises(TypeError):
        probes._named("my secret")


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        (
            '{"prompts": ["a"]}',
            {"prompts": ["a"], "max_new_tokens": 64, "arms": None},
        ),
        (
            '{"prompts": {"n": "a"}, "max_new_tokens": 3, "arms": ["b"]}',
            {"prompts": {"n": "a"}, "max_new_tokens": 3, "arms": ["b"]},
        ),
    ],
)
def test_bodies(body, asked):
    assert probe_of(body) == asked


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{}",
        "[" * 60000,
        '{"prompts": "a"}',
        '{"prompts": []}',
        '{"prompts": {}}',
        '{"prompts": [""]}',
        '{"prompts": [3]}',
        '{"prompts": {"a": 3}}',
        '{"prompts": {"": "a"}}',
        '{"prompts": ["\\ud800"]}',
        json.dumps({"prompts": ["a"] * 65}),
        '{"prompts": ["a"], "max_new_tokens": 0}',
        '{"prompts": ["a"], "max_new_tokens": true}',
        '{"prompts": ["a"], "max_new_tokens": 1e3}',
        '{"prompts": ["a"], "max_new_tokens": 99999}',
        '{"prompts": ["a"], "arms": "b"}',
        '{"prompts": ["a"], "arms": []}',
        '{"prompts": ["a"], "arms": [["b"]]}',
        '{"prompts": ["a"], "record": "/etc/passwd"}',
    ],
)
def test_bodies_that_are_not_taken(body):
    with pytest.raises(Denied) as error:
        probe_of(body)
    assert error.value.status == 400
