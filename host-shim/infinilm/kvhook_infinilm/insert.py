"""`kvhook-infinilm insert CHECKOUT`: puts the C++ shim into InfiniLM's sources, checks it, takes it out again.

One file of our own, `csrc/kvhook_shim.cpp`, complete in itself, and a handful of lines in InfiniLM's files, each ending
in `// kvhook`. The places are found by what stands there, never by line numbers; where one is missing or there are two
of them, nothing is changed. InfiniLM's build takes the new file by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import KvhookError
from .package import NATIVE, PACKAGE, read

SHIM_FILE = "csrc/kvhook_shim.cpp"
"""Where our file goes, below the checkout."""

_HEADERS = {
    "kvhook.h": "hook-abi/include",
    "kvhook_host.h": "host-shim/host/include",
    "kvhook.hpp": "host-shim/host/include",
}
_NOTICE = "// Written by `kvhook-infinilm insert`; not to be edited. Taken out by `--remove`.\n"
_DIGEST = "// SHA-256 of what follows: "
_OUR_LINE = re.compile(
    r"[ \t]*(?:void )?kvhook_on_\w+\(.*\)(?: noexcept)?;[ \t]*// kvhook[ \t]*\r?\n"
)


class InsertError(KvhookError):
    """The checkout is left as it was; the message says why, and what to do."""


def insert(checkout: Path) -> list[str]:
    """Puts the shim in, or an older one's successor, as a whole or not at all.

    Returns the files that were changed; none when it was complete. Raises `InsertError`.
    """
    return _write(checkout, _wanted(checkout, inserted=True))


def remove(checkout: Path) -> list[str]:
    """Takes the shim out: every file is byte for byte as before, ours is gone.

    Returns the files that were changed. Raises `InsertError`.
    """
    return _write(checkout, _wanted(checkout, inserted=False))


def check(checkout: Path) -> list[str]:
    """The files in which the shim is missing, incomplete or of another version; none when all is well.

    Raises `InsertError` where `insert` would.
    """
    wanted = _wanted(checkout, inserted=True)
    return [name for name, data in wanted.items() if _read(checkout, name) != data]


def shim_source() -> str:
    """The text of `csrc/kvhook_shim.cpp`: the shim with all of our headers in it.

    Raises `PackageError` when the package is not complete.
    """
    seen: set[str] = set()

    def resolved(path: Path) -> str:
        def include(match: re.Match[str]) -> str:
            name = match[1]
            if name in seen:
                return ""
            seen.add(name)
            return resolved(own_file(name))

        names = "|".join(map(re.escape, [*_HEADERS, "kvhook_shim.h"]))
        text = read(path).replace("\r\n", "\n")
        return re.sub(rf'^#include "({names})"\n', include, text, flags=re.MULTILINE)

    body = resolved(PACKAGE / "csrc" / "kvhook_shim.cpp")
    return f"{_NOTICE}{_DIGEST}{_digest(body)}\n{body}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 1 where something is wrong, which is then on stderr."""
    parser = argparse.ArgumentParser(
        prog="kvhook-infinilm", description="KV cache compression for InfiniLM."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "insert",
        help="put the C++ shim into InfiniLM's sources",
        description="Puts the C++ shim into a checkout of InfiniLM, which is then built as usual. "
        f"It adds {SHIM_FILE} and a few lines that end in `// kvhook`.",
    )
    command.add_argument("checkout", type=Path, metavar="CHECKOUT", help="folder of InfiniLM")
    mode = command.add_mutually_exclusive_group()
    mode.add_argument(
        "--check", action="store_true", help="only say whether it is there, complete and current"
    )
    mode.add_argument("--remove", action="store_true", help="take it out again")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments.checkout, arguments.check, arguments.remove)
    except KvhookError as error:
        print(f"kvhook-infinilm: {error}", file=sys.stderr)
        return 1


def _run(checkout: Path, checking: bool, removing: bool) -> int:
    if checking:
        lacking = check(checkout)
        for name in lacking:
            print(f"{name}: the shim is missing, incomplete or of another version", file=sys.stderr)
        print("run `kvhook-infinilm insert` on it" if lacking else "the shim is complete")
        return 1 if lacking else 0
    changed = (remove if removing else insert)(checkout)
    for name in changed:
        print(f"changed {name}")
    if not changed:
        print("nothing to do: the shim is " + ("not there" if removing else "complete"))
    else:
        print("now build InfiniLM again, as usual")
    return 0


# The checkout's files, as they should be.


def _wanted(checkout: Path, *, inserted: bool) -> dict[str, bytes | None]:
    """The bytes of each file that concerns us; None: no such file."""
    _checkout_or_raise(checkout)
    if inserted:
        context = _Source(_CONTEXT, _decoded(checkout, _CONTEXT))
        context.only("the cache tensors", r"std::vector<infinicore::Tensor>\s+kv_cache_vec\s*;")
    wanted: dict[str, bytes | None] = {}
    for name, edit in _EDITS.items():
        text = _without_our_lines(name, _decoded(checkout, name))
        if inserted:
            text = edit(_Source(name, text))
        wanted[name] = text.encode("utf-8", "surrogateescape")
    _shim_untouched_or_raise(checkout)
    wanted[SHIM_FILE] = shim_source().encode() if inserted else None
    return wanted


def _checkout_or_raise(checkout: Path) -> None:
    """Refuses what is not InfiniLM, or too old for the shim."""
    for name in [*_EDITS, _CONTEXT]:
        if not (checkout / name).is_file():
            raise InsertError(
                f"{checkout} has no {name}: expected a checkout of InfiniLM, df1a1fd9 or later"
            )


def _without_our_lines(name: str, text: str) -> str:
    """The text as InfiniLM has it; refuses one in which a line of ours was changed by hand."""
    kept = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if _OUR_LINE.fullmatch(line):
            continue
        if "kvhook" in line:
            raise InsertError(
                f"{name}:{number}: `{line.strip()}` is not as `insert` writes it; "
                "delete this line or restore the file, then run this again"
            )
        kept.append(line)
    return "".join(kept)


def _shim_untouched_or_raise(checkout: Path) -> None:
    """Refuses to replace or delete a file that `insert` did not write, or that was changed since."""
    data = _read(checkout, SHIM_FILE)
    if data is None:
        return
    text = data.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    head, _, body = text.removeprefix(_NOTICE).partition("\n")
    if text.startswith(_NOTICE) and head == _DIGEST + _digest(body):
        return
    raise InsertError(
        f"{SHIM_FILE} was not written by `insert`, or was changed since; "
        "keep a copy if you need it, delete the file, then run this again"
    )


def _in_attention(source: _Source) -> str:
    """The call before attention, in the layer that all backends share."""
    function = source.only(
        "AttentionLayer::forward",
        r"AttentionLayer::forward\s*\("
        + r",".join([r"\s*(?:const\s+)?infinicore::Tensor\s*&\s*(\w+)\s*"] * 3)
        + r"\)\s*const\s*\{",
    )
    body = source.block(function.end() - 1)
    layer = source.only("the layer's cache", r"\bkv_cache_vec\s*\[\s*(\w+)\s*\]", body)[1]
    visit = source.only("the call of the backend", r"\breturn\s+std::visit\s*\(", body)
    source.before(visit.start(), f"kvhook_on_attention({layer}, {', '.join(function.groups())});")
    source.declare(
        r"namespace\s+infinilm::layers::attention\s*\{",
        "void kvhook_on_attention(std::size_t layer, const infinicore::Tensor &q, "
        "const infinicore::Tensor &k, const infinicore::Tensor &v) noexcept;",
    )
    return source.edited()


def _in_rank_worker(source: _Source) -> str:
    """The calls around the forward, in the RUN branch of a rank's thread: compiling graphs is silent."""
    thread_loop = source.only(
        "RankWorker::thread_loop", r"\bvoid\s+RankWorker::thread_loop\s*\(\s*\)\s*\{"
    )
    run = source.only(
        "the RUN branch of thread_loop",
        r"\bif\s*\(\s*local_cmd\s*==\s*Command::RUN\s*\)\s*\{(?=\s*try\b)",
        source.block(thread_loop.end() - 1),
    )
    branch = source.block(run.end() - 1)
    logits = source.only("the declaration of logits", r"\binfinicore::Tensor\s+logits\s*;", branch)
    eager = source.only("the eager forward", r"\bif\s*\(\s*!\s*logits\s*\)\s*\{", branch)
    forward = source.block(eager.end() - 1)
    source.only("the model's forward", r"\bmodel_->forward\s*\(", forward)
    source.after(logits.end(), "kvhook_on_run();")
    source.after(forward[1] + 1, "kvhook_on_forward_done();")
    source.declare(
        r"namespace\s+infinilm::engine\s*\{",
        "void kvhook_on_run() noexcept;         ",
        "void kvhook_on_forward_done() noexcept;",
    )
    return source.edited()


_CONTEXT = "csrc/global_state/forward_context.hpp"
_EDITS: dict[str, Callable[[_Source], str]] = {
    "csrc/engine/rank_worker.cpp": _in_rank_worker,
    "csrc/layers/attention/backends/attention_layer.cpp": _in_attention,
}


class _Source:
    """A C++ file: places are found in its code, without comments and literals, and lines added there."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text
        self._code = _code(text)
        self._lines: list[tuple[int, str]] = []

    def only(
        self, anchor: str, pattern: str, within: tuple[int, int] | None = None
    ) -> re.Match[str]:
        """The one match, or `InsertError` with the anchor's name."""
        start, end = within or (0, len(self._code))
        found = list(re.compile(pattern).finditer(self._code, start, end))
        if len(found) == 1:
            return found[0]
        problem = "is missing" if not found else f"was found {len(found)} times"
        raise self._error(f"{anchor} {problem}: expected once what matches `{pattern}`")

    def block(self, brace: int) -> tuple[int, int]:
        """The inside of the braces that open at `brace`."""
        depth = 0
        for match in re.compile(r"[{}]").finditer(self._code, brace):
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return brace + 1, match.start()
        raise self._error("the braces do not fit each other")

    def before(self, place: int, statement: str) -> None:
        """Adds a line before the one that `place` is in."""
        start = self._text.rfind("\n", 0, place) + 1
        if self._code[start:place].strip():
            raise self._error(f"`{self._text[start:place].strip()}` stands before the anchor")
        self._add(start, place, statement)

    def after(self, place: int, statement: str) -> None:
        """Adds a line after the one that `place` is in."""
        end = self._text.find("\n", place)
        if end < 0 or self._code[place:end].strip():
            raise self._error(f"`{self._text[place:].splitlines()[0]}` stands behind the anchor")
        if re.match(r"\s*else\b", self._code[end:]):
            raise self._error("an `else` follows the anchor: expected none")
        self._add(end + 1, place, statement)

    def declare(self, namespace: str, *declarations: str) -> None:
        """Adds declarations before the file's one namespace."""
        place = self.only("the namespace", rf"(?m)^{namespace}").start()
        for declaration in declarations:
            self.before(place, declaration)

    def edited(self) -> str:
        """The text with all added lines."""
        parts, end = [], 0
        for start, line in sorted(self._lines, key=lambda added: added[0]):
            parts += [self._text[end:start], line]
            end = start
        return "".join([*parts, self._text[end:]])

    def _add(self, start: int, anchor: int, statement: str) -> None:
        """Adds a line with the indent and the line end of the anchor's."""
        first = self._text.rfind("\n", 0, anchor) + 1
        indent = re.match(r"[ \t]*", self._text[first:])
        line_end = self._text.find("\n", anchor)
        ending = "\r\n" if self._text[line_end - 1 : line_end] == "\r" else "\n"
        self._lines.append((start, f"{indent[0] if indent else ''}{statement} // kvhook{ending}"))

    def _error(self, problem: str) -> InsertError:
        return InsertError(
            f"{self._name}: {problem}. Nothing was changed. InfiniLM has changed here; "
            "take a kvhook_infinilm that knows it, or use the Python depth, which needs no shim"
        )


def _code(text: str) -> str:
    """C++ text of the same length in which comments and literals are blank."""
    skipped = re.compile(
        r"//[^\n]*|/\*.*?\*/"
        r'|R"(?P<mark>[^()\\\s]*)\(.*?\)(?P=mark)"'
        r'|"(?:\\.|[^"\\\n])*"'
        r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'",
        re.DOTALL,
    )
    return skipped.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


# Files.


def own_file(name: str) -> Path:
    """One of our headers: of the installed package, or of the repository that it lies in."""
    if name not in _HEADERS:
        return PACKAGE / "csrc" / name
    installed = NATIVE / "include" / name
    if installed.is_file() or len(PACKAGE.parents) < 3:
        return installed
    return PACKAGE.parents[2] / _HEADERS[name] / name


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode("utf-8", "surrogateescape")).hexdigest()


def _read(checkout: Path, name: str) -> bytes | None:
    try:
        return (checkout / name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InsertError(f"{name} cannot be read: {error.strerror}") from error


def _decoded(checkout: Path, name: str) -> str:
    return (_read(checkout, name) or b"").decode("utf-8", "surrogateescape")


def _write(checkout: Path, wanted: dict[str, bytes | None]) -> list[str]:
    """Writes what differs; where a file cannot be written, those before it are put back."""
    before = {name: _read(checkout, name) for name in wanted}
    changed = [name for name, data in wanted.items() if before[name] != data]
    for index, name in enumerate(changed):
        try:
            _replace(checkout / name, wanted[name])
        except OSError as error:
            for written in changed[:index]:
                _replace(checkout / written, before[written])
            raise InsertError(
                f"{name} cannot be written ({error.strerror}); nothing was changed"
            ) from error
    return changed


def _replace(path: Path, data: bytes | None) -> None:
    """Gives a file new contents in one step, or deletes it."""
    path = path.resolve()
    if data is None:
        path.unlink(missing_ok=True)
        return
    # The name ends in nothing that a build would take.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".kvhook")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        if path.exists():
            shutil.copymode(path, temporary)
        else:
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    sys.exit(main())
