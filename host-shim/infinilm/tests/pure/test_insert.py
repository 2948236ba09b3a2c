"""The inserter, on small trees of its own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kvhook_infinilm import insert as inserter
from kvhook_infinilm.insert import InsertError, check, insert, main, remove, shim_source

WORKER = "csrc/engine/rank_worker.cpp"
ATTENTION = "csrc/layers/attention/backends/attention_layer.cpp"
CONTEXT = "csrc/global_state/forward_context.hpp"
SHIM = "csrc/kvhook_shim.cpp"

TREE = {
    CONTEXT: """\
#pragma once
struct ForwardContext {
    std::vector<infinicore::Tensor> kv_cache_vec;
};
""",
    # Anchors also stand in comments and literals, braces too, where they must not count.
    WORKER: """\
#include "rank_worker.hpp"

namespace infinilm::engine {

void RankWorker::other() {
    infinicore::Tensor logits;
    if (!logits) {
        model_->forward(nothing);
    }
}

void RankWorker::thread_loop() {
    while (true) {
        if (local_cmd == Command::LOAD) {
            log("[{} if (!logits) {");  // } infinicore::Tensor logits;
        } else if (local_cmd == Command::RUN) {
            local_args = pending_args_;
        }
        if (local_cmd == Command::RUN) {
            try {
                infinicore::Tensor logits;
                char brace = '}';
                if (compiler_ != nullptr) {
                    logits = graph->run();
                }
                /* infinicore::Tensor logits; if (!logits) { */
                if (!logits) {
                    auto output = model_->forward(args);
                    logits = output.logits;
                }

                sample(logits);
            } catch (const std::exception &e) {
                break;
            }
        } else if (local_cmd == Command::COMPILE) {
            compiler_->compile();
        }
    }
}

} // namespace infinilm::engine
""",
    ATTENTION: """\
#include "attention_layer.hpp"

namespace infinilm::layers::attention {

AttentionLayer::AttentionLayer(size_t layer) : layer_(layer) {
    return std::visit(nothing);
}

infinicore::Tensor
AttentionLayer::forward( infinicore::Tensor& queries,
                         infinicore::Tensor  &keys, const infinicore::Tensor &values ) const
{
    auto &cache = context.kv_cache_vec[ layer_ ];
    return std::visit(
        [&](auto &backend) { return backend->forward(queries, keys, values, cache); },
        backend_);
}

} // namespace infinilm::layers::attention
""",
}


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        write(tmp_path, name, text)
    return tmp_path


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def lines_around(text: str, line: str) -> tuple[str, str]:
    """The lines before and after the one that is `line` but for white space."""
    lines = [each.strip() for each in text.splitlines()]
    assert lines.count(line) == 1, f"{line!r} in {text}"
    index = lines.index(line)
    return lines[index - 1], lines[index + 1]


def test_calls_stand_at_their_places(tree: Path) -> None:
    assert insert(tree) == [WORKER, ATTENTION, SHIM]
    worker = (tree / WORKER).read_text()
    assert lines_around(worker, "kvhook_on_run(); // kvhook") == (
        "infinicore::Tensor logits;",
        "char brace = '}';",
    )
    assert lines_around(worker, "kvhook_on_forward_done(); // kvhook") == ("}", "")
    done = worker.index("kvhook_on_forward_done(); // kvhook\n\n")
    assert worker.index("logits = output.logits;") < done < worker.index("sample(logits);")
    attention = (tree / ATTENTION).read_text()
    assert lines_around(
        attention, "kvhook_on_attention(layer_, queries, keys, values); // kvhook"
    ) == ("auto &cache = context.kv_cache_vec[ layer_ ];", "return std::visit(")


def test_declarations_stand_before_the_namespace(tree: Path) -> None:
    insert(tree)
    for name in (WORKER, ATTENTION):
        text = (tree / name).read_text()
        called = {line.split("(")[0].strip() for line in text.splitlines() if "kvhook_on" in line}
        declared = {name.removeprefix("void ") for name in called if name.startswith("void ")}
        assert declared == {name for name in called if not name.startswith("void ")} != set()
        last = max(text.index(f"void {name}(") for name in declared)
        assert text[last:].splitlines()[1].startswith("namespace infinilm")


def test_few_lines_each_marked_and_nothing_else_changed(tree: Path) -> None:
    insert(tree)
    added = 0
    for name in (WORKER, ATTENTION):
        before = TREE[name].splitlines()
        after = (tree / name).read_text().splitlines()
        ours = [line for line in after if line.endswith("// kvhook")]
        assert [line for line in after if line not in ours] == before
        added += len(ours)
    assert added == 6


def test_twice_is_once(tree: Path) -> None:
    insert(tree)
    once = contents(tree)
    assert insert(tree) == []
    assert contents(tree) == once


def test_remove_is_byte_identical(tree: Path) -> None:
    before = contents(tree)
    insert(tree)
    assert remove(tree) == [WORKER, ATTENTION, SHIM]
    assert contents(tree) == before
    assert remove(tree) == []


def test_remove_needs_no_anchors(tree: Path) -> None:
    insert(tree)
    changed = (tree / ATTENTION).read_text().replace("return std::visit(\n", "return call(\n")
    write(tree, ATTENTION, changed)
    write(tree, CONTEXT, "")
    remove(tree)
    assert (tree / ATTENTION).read_text() == TREE[ATTENTION].replace("std::visit(\n", "call(\n")
    assert not (tree / SHIM).exists()


def test_windows_line_ends_and_odd_bytes(tmp_path: Path) -> None:
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"// \xff caf\xe9\r\n" + text.replace("\n", "\r\n").encode())
    before = contents(tmp_path)
    insert(tmp_path)
    for name in (WORKER, ATTENTION):
        data = (tmp_path / name).read_bytes()
        assert data.count(b"// kvhook\r\n") == data.count(b"// kvhook") > 0
        assert data.count(b"\n") == data.count(b"\r\n")
    assert check(tmp_path) == []
    remove(tmp_path)
    assert contents(tmp_path) == before


def test_check_says_what_is_lacking(tree: Path) -> None:
    assert check(tree) == [WORKER, ATTENTION, SHIM]
    insert(tree)
    assert check(tree) == []
    text = (tree / WORKER).read_text()
    (tree / WORKER).write_text(text.replace("kvhook_on_run(); // kvhook\n", "\n"))
    assert check(tree) == [WORKER]
    assert insert(tree) == [WORKER]
    assert check(tree) == []


ANCHORS = [
    (CONTEXT, "kv_cache_vec;", "the cache tensors"),
    (WORKER, "void RankWorker::thread_loop() {", "RankWorker::thread_loop"),
    (WORKER, "if (local_cmd == Command::RUN) {\n            try", "the RUN branch"),
    (WORKER, "infinicore::Tensor logits;\n                char", "the declaration of logits"),
    (WORKER, "if (!logits) {\n                    auto", "the eager forward"),
    (WORKER, "model_->forward(args)", "the model's forward"),
    (WORKER, "namespace infinilm::engine {", "the namespace"),
    (ATTENTION, "AttentionLayer::forward(", "AttentionLayer::forward"),
    (ATTENTION, "kv_cache_vec[ layer_ ]", "the layer's cache"),
    (ATTENTION, "return std::visit(\n        [", "the call of the backend"),
    (ATTENTION, "namespace infinilm::layers::attention {", "the namespace"),
]


@pytest.mark.parametrize(("name", "anchor", "called"), ANCHORS)
def test_a_missing_anchor_is_named_and_nothing_changed(
    tree: Path, name: str, anchor: str, called: str
) -> None:
    assert TREE[name].count(anchor) == 1
    write(tree, name, TREE[name].replace(anchor, anchor.swapcase()))
    before = contents(tree)
    with pytest.raises(InsertError, match=f"{name}: {called}.* is missing: expected"):
        insert(tree)
    assert contents(tree) == before


DOUBLES = [
    (WORKER, "infinicore::Tensor logits;\n                char", "the declaration of logits"),
    (WORKER, "model_->forward(args);", "the model's forward"),
    (ATTENTION, "return std::visit(\n        [", "the call of the backend"),
]


@pytest.mark.parametrize(("name", "anchor", "called"), DOUBLES)
def test_an_anchor_found_twice_is_named_and_nothing_changed(
    tree: Path, name: str, anchor: str, called: str
) -> None:
    first = anchor.split("\n")[0]
    write(tree, name, TREE[name].replace(anchor, f"{first} {anchor}"))
    before = contents(tree)
    with pytest.raises(InsertError, match=f"{name}: {called} was found 2 times"):
        insert(tree)
    assert contents(tree) == before


def test_a_call_is_not_put_between_if_and_else(tree: Path) -> None:
    text = TREE[WORKER].replace("logits = output.logits;\n                }\n", "x;\n}\nelse {}\n")
    write(tree, WORKER, text)
    with pytest.raises(InsertError, match="`?else"):
        insert(tree)


def test_braces_that_do_not_fit(tree: Path) -> None:
    write(tree, WORKER, TREE[WORKER].replace("    }\n}\n\n} // namespace", "} // namespace"))
    with pytest.raises(InsertError, match="braces"):
        insert(tree)


@pytest.mark.parametrize("action", [insert, remove, check])
def test_an_edited_shim_is_kept(tree: Path, action) -> None:
    insert(tree)
    with (tree / SHIM).open("a") as file:
        file.write("// mine\n")
    before = contents(tree)
    with pytest.raises(InsertError, match=f"{SHIM} was not written by `insert`, or was changed"):
        action(tree)
    assert contents(tree) == before


def test_a_file_of_our_name_that_is_not_ours_is_kept(tree: Path) -> None:
    write(tree, SHIM, "int main() {}\n")
    with pytest.raises(InsertError, match="was not written by"):
        insert(tree)
    assert (tree / SHIM).read_text() == "int main() {}\n"


def test_a_shim_of_another_version_is_replaced(tree: Path, monkeypatch) -> None:
    current = shim_source()
    read = inserter.read
    with monkeypatch.context() as older:
        older.setattr(inserter, "read", lambda path: read(path) + "// older\n")
        insert(tree)
    assert (tree / SHIM).read_text() != current
    assert check(tree) == [SHIM]
    assert insert(tree) == [SHIM]
    assert (tree / SHIM).read_text() == current


def test_a_shim_with_windows_line_ends_is_still_ours(tree: Path) -> None:
    insert(tree)
    data = (tree / SHIM).read_bytes()
    (tree / SHIM).write_bytes(data.replace(b"\n", b"\r\n"))
    remove(tree)
    assert not (tree / SHIM).exists()


@pytest.mark.parametrize("action", [insert, remove])
def test_a_line_of_ours_that_was_changed_is_named(tree: Path, action) -> None:
    insert(tree)
    text = (tree / WORKER).read_text()
    number = text.splitlines().index("                kvhook_on_run(); // kvhook") + 1
    (tree / WORKER).write_text(text.replace("kvhook_on_run();", "if (x) kvhook_on_run();"))
    before = contents(tree)
    with pytest.raises(InsertError, match=f"{WORKER}:{number}: `if .x. kvhook_on_run"):
        action(tree)
    assert contents(tree) == before


@pytest.mark.parametrize("name", TREE)
def test_not_a_checkout(tree: Path, name: str) -> None:
    (tree / name).unlink()
    with pytest.raises(InsertError, match=f"has no {name}: expected a checkout of InfiniLM"):
        insert(tree)


def test_a_failed_write_leaves_all_as_it_was(tree: Path, monkeypatch) -> None:
    before = contents(tree)
    replace = os.replace

    def full(source: str, target: Path) -> None:
        if Path(target).name == Path(SHIM).name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InsertError, match=f"{SHIM} cannot be written .No space"):
        insert(tree)
    assert contents(tree) == before


def test_modes_and_links_are_kept(tree: Path) -> None:
    os.chmod(tree / WORKER, 0o755)
    elsewhere = tree / "elsewhere.cpp"
    os.replace(tree / ATTENTION, elsewhere)
    (tree / ATTENTION).symlink_to(elsewhere)
    insert(tree)
    assert stat.S_IMODE((tree / WORKER).stat().st_mode) == 0o755
    assert (tree / ATTENTION).is_symlink()
    assert "kvhook_on_attention" in elsewhere.read_text()


def test_the_shim_needs_nothing_of_ours_beside_it() -> None:
    source = shim_source()
    ours = [line for line in source.splitlines() if line.startswith('#include "kvhook')]
    assert ours == []
    for declared_once in ("KVHOOK_SHIM_H", "KVHOOK_HOST_H", "KVHOOK_HPP", "KVHOOK_H"):
        assert source.count(f"#ifndef {declared_once}\n") == 1
    for exported in ("version", "attach", "begin", "end"):
        assert f"kvhook_shim_{exported}(" in source


def test_the_command(tree: Path, capsys) -> None:
    assert main(["insert", str(tree), "--check"]) == 1
    assert WORKER in capsys.readouterr().err
    assert main(["insert", str(tree)]) == 0
    assert SHIM in capsys.readouterr().out
    assert main(["insert", str(tree)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["insert", str(tree), "--check"]) == 0
    assert main(["insert", str(tree), "--remove"]) == 0
    assert not (tree / SHIM).exists()
    assert main(["insert", str(tree / "nowhere")]) == 1
    assert "expected a checkout of InfiniLM" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["insert", str(tree), "--check", "--remove"])
