"""Runs an InfiniLM script with compression attached: `python -m kvhook_infinilm SCRIPT [FLAGS]`.

The script runs as `python SCRIPT FLAGS` would run it. InfiniLM's server is a script too, but as a script its classes
would be out of the adapter's reach: it is imported, and its `main()` is called.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.util
import io
import os
import sys
import types
from collections.abc import Callable

import kvhook_infinilm

from . import settings
from .errors import KvhookError

SERVER = "infinilm.server.inference_server"

_USAGE = """\
usage: python -m kvhook_infinilm SCRIPT [FLAGS]

Runs an InfiniLM script with KV-cache compression attached. FLAGS are the script's own, and:
  --kv-plugin PLUGIN         name or path of a plugin, a whole kv_plugin form as JSON, or `none`
  --kv-plugin-config CONFIG  the plugin's own config
  --kv-plugin-path FOLDER    folder in which plugins are looked up and allowed, repeatable
  --kv-plugin-strict         do not start when the plugin cannot run
Without them the environment (INFINILM_KV_PLUGIN, ..) counts, then `kv_plugin` in the model's config.json."""


def main(arguments: list[str]) -> None:
    """Attaches and runs a script. Returns, or raises, as the script does; `SystemExit(2)` for a wrong call."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return
    if not arguments:
        _fail("no script is given")
    script = arguments[0]
    if not os.path.isfile(script):
        _fail(f"the script {script!r} is not there")
    sys.argv = list(arguments)
    _set_path(script)
    if importlib.util.find_spec("infinilm") is None:
        _fail(
            "infinilm cannot be imported; install it in this Python, with `pip install -e .` "
            "in InfiniLM's checkout"
        )
    server = _is_server(script)
    try:
        _read_flags(arguments[1:])
        kvhook_infinilm.attach()
    except KvhookError as error:
        sys.exit(f"kvhook_infinilm: {error}")
    if server:
        _run(lambda: importlib.import_module(SERVER).main())
    else:
        _run(lambda: _execute(script))


def _fail(message: str) -> None:
    print(f"{_USAGE}\n\nkvhook_infinilm: error: {message}", file=sys.stderr)
    sys.exit(2)


def _read_flags(flags: list[str]) -> None:
    """Takes our flags before InfiniLM's parser does: attaching asks for them, and a script may have no such parser."""
    parser = argparse.ArgumentParser(prog="kvhook_infinilm", add_help=False, allow_abbrev=False)
    settings.add_flags(parser)
    settings.set_flags(parser.parse_known_args(flags)[0])


def _set_path(script: str) -> None:
    """Puts the script's folder where `-m` put the current one. Neither is there with `python -P`."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(script))


def _is_server(script: str) -> bool:
    try:
        spec = importlib.util.find_spec(SERVER)
    except ModuleNotFoundError:
        spec = None
    installed = spec.origin if spec is not None else None
    if installed and os.path.isfile(installed) and os.path.samefile(installed, script):
        return True
    if os.path.realpath(script).endswith(SERVER.replace(".", os.sep) + ".py"):
        print(
            f"kvhook_infinilm: warning: {script} is not the server of the infinilm that is installed "
            f"({installed}); it is run without /kvhook/metrics and without `kv_plugin` in requests",
            file=sys.stderr,
        )
    return False


def _execute(script: str) -> None:
    """Runs a file as the module `__main__`."""
    path = os.path.abspath(script)
    module = types.ModuleType("__main__")
    module.__file__ = path
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    module.__builtins__ = __builtins__
    sys.modules["__main__"] = module
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, module.__dict__)


def _run(call: Callable[[], None]) -> None:
    """Calls; an exception is shown without our own frames, and the exit code is Python's."""
    try:
        call()
    except Exception as error:
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
            traceback = traceback.tb_next
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
