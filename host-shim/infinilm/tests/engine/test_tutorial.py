"""docs/tutorial.md, the whole page: its files are written and its commands run, in their order, in an empty folder."""

# isort: off
from engine import needs  # noqa: F401

# isort: on
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.faulty import CHECKOUT

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def script(page: str) -> str:
    """The page's commands. A block of Rust is the file, or the end of the file, that the text before it names last."""
    lines, end = ["set -euo pipefail", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"], 0
    for block in BLOCK.finditer(page):
        language, body = block.groups()
        text, end = page[end : block.start()], block.end()
        if language == "sh":
            lines.append(body)
        elif language == "rust":
            file = re.findall(r"`([^`\n]+)`", text)[-1]
            redirect = ">>" if "Add this" in text else ">"
            lines.append(f"cat {redirect} {file} <<'END OF FILE'\n{body}END OF FILE")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def kvhook() -> Path:
    """The command, built by cargo."""
    cargo = shutil.which("cargo") or pytest.skip("the plugin is built with cargo")
    command = [cargo, "build", "--release", "--locked", "-p", "kvhook"]
    command.append("--message-format=json-render-diagnostics")
    built = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=True)
    messages = map(json.loads, built.stdout.splitlines())
    return next(Path(message["executable"]) for message in messages if message.get("executable"))


def test_every_command_works(kvhook, model, tmp_path):
    import infinilm

    python = tmp_path / "bin"
    python.mkdir()
    (python / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (python / "python").chmod(0o755)
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = os.environ | {
        "PATH": os.pathsep.join([str(python), str(kvhook.parent), os.environ["PATH"]]),
        "MODEL": str(model),
        "INFINILM": str(Path(infinilm.__file__).parents[2]),
    }
    # The project's own target folder.
    environment.pop("CARGO_TARGET_DIR", None)
    done = subprocess.run(
        ["bash", "-c", script((CHECKOUT / "docs" / "tutorial.md").read_text())],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    log = folder / "value-norm" / "server.log"
    said = log.read_text()[-3000:] if log.exists() else ""
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}\n{said}"
    lines = (folder / "value-norm" / "record.jsonl").read_text().splitlines()
    arms = [json.loads(line).get("arm") for line in lines]
    assert arms == [None, "none", "default", "quarter", None]
    assert "quarter" in (folder / "value-norm" / "report.html").read_text()
