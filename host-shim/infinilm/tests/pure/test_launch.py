"""`python -m kvhook_infinilm SCRIPT FLAGS` against `python SCRIPT FLAGS`, over an `infinilm` of our own."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import kvhook_infinilm

SERVER = """
import sys

class InferenceServer:
    pass

def main():
    print(__name__, InferenceServer.__module__, sys.argv)
    if "--fail" in sys.argv:
        raise LookupError("server")

if __name__ == "__main__":
    main()
"""
# In place of the adapter's `attach`, before anything else runs: says that it was called, and with which flags.
ATTACH = """
import kvhook_infinilm

def attach():
    from kvhook_infinilm import settings
    from kvhook_infinilm.errors import KvhookError
    choice = settings.choose({}, "m")
    print("attached", choice and choice.form, settings.folders(), settings.strict(), flush=True)
    if settings.strict():
        raise KvhookError("nothing to attach to")

kvhook_infinilm.attach = attach
"""
ATTACHED = "attached None [] False\n"


@dataclass
class Place:
    """A folder with an `infinilm`, and the means to run in it."""

    folder: Path

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    def python(self, *arguments, infinilm=True):
        package = Path(kvhook_infinilm.__path__[0]).parent
        paths = [self.folder / "first", package]
        if infinilm:
            paths.append(self.folder / "python")
        environment = {key: value for key, value in os.environ.items() if "KV_PLUGIN" not in key}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def launch(self, *arguments, **options):
        return self.python("-m", "kvhook_infinilm", *arguments, **options)


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    place.write("python/infinilm/__init__.py", "")
    place.write("python/infinilm/server/inference_server.py", SERVER)
    place.write("first/sitecustomize.py", ATTACH)
    return place


def same(place, script, *flags):
    """Runs both ways and expects the same; gives the output."""
    plain = place.python(script, *flags)
    ours = place.launch(script, *flags)
    assert ours.returncode == plain.returncode
    assert ours.stdout == ATTACHED + plain.stdout
    assert ours.stderr == plain.stderr
    return plain


def test_a_script_sees_what_python_shows_it(place):
    place.write("scripts/beside.py", "WHERE = __name__")
    script = place.write(
        "scripts/script.py",
        "import sys, beside\n"
        "import __main__\n"
        "print(__name__, __file__, sys.argv, sys.path[0], __spec__, __package__, beside.WHERE)\n"
        "print(__main__.__dict__ is globals())\n",
    )
    out = same(place, script, "--model", "m", "--kv-pl", "x").stdout
    assert out.startswith("__main__ ")


def test_our_future_imports_are_not_the_scripts(place):
    script = place.write("s.py", "def f(x: int): pass\nprint(f.__annotations__['x'] is int)\n")
    assert same(place, script).stdout == "True\n"


def test_a_script_by_a_relative_path_and_by_a_link(place):
    place.write("scripts/script.py", "import sys; print(sys.argv[0], __file__, sys.path[0])")
    os.symlink("scripts/script.py", place.folder / "link.py")
    same(place, "scripts/script.py")
    assert str(place.folder / "scripts") in same(place, "link.py").stdout
    place.write("scripts/fail.py", "raise ValueError('x')")
    assert "fail.py" in same(place, "scripts/fail.py").stderr


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("sys.exit()", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('why')", 1),
        ("inner()", 1),
        ("def", 1),
        ("os._exit(137)", 137),
    ],
)
def test_exit_codes_and_tracebacks(place, line, code):
    script = place.write(
        "s.py", f"import os, sys\ndef inner():\n    raise ValueError('x')\n{line}\n"
    )
    assert same(place, script).returncode == code


def test_chained_exceptions_are_shown_as_they_are(place):
    script = place.write(
        "s.py", "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise OSError('x') from e\n"
    )
    assert "direct cause" in same(place, script).stderr


def test_an_interrupt_ends_as_pythons(place):
    script = place.write("s.py", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    assert place.launch(script).returncode == -signal.SIGINT


def test_threads_and_exit_handlers_of_the_script_run(place):
    script = place.write(
        "s.py",
        "import atexit, threading, time\n"
        "VALUE = 'still here'\n"
        "atexit.register(lambda: print('exit', VALUE))\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread', VALUE))).start()\n",
    )
    assert same(place, script).stdout == "thread still here\nexit still here\n"


def test_the_server_is_imported_under_its_own_name(place):
    server = "python/infinilm/server/inference_server.py"
    name = "infinilm.server.inference_server"
    ran = place.launch(server, "--port", "1")
    assert ran.stdout == f"{ATTACHED}{name} {name} {[server, '--port', '1']}\n"
    assert ran.stderr == ""
    assert ran.returncode == 0


def test_the_servers_exception_is_shown_and_its_code_kept(place):
    ran = place.launch("python/infinilm/server/inference_server.py", "--fail")
    assert ran.returncode == 1
    assert ran.stderr.rstrip().endswith("LookupError: server")
    assert ran.stderr.count("File ") == 1


def test_a_server_of_another_checkout_is_run_and_said(place):
    other = place.write("other/infinilm/server/inference_server.py", SERVER)
    ran = place.launch(other)
    assert ran.stdout == f"{ATTACHED}__main__ __main__ {[other]}\n"
    assert "is not the server of the infinilm that is installed" in ran.stderr


def test_our_flags_are_known_when_we_attach(place):
    script = place.write("s.py", "import sys; print(sys.argv[1:])")
    flags = ["--kv-plugin", "noop", "--model", "m", "--kv-plugin-path", "/a", "--kv-plugin-path=/b"]
    ran = place.launch(script, *flags)
    form = '{"plugin": "noop"}'
    assert ran.stdout == f"attached {form} ['/a', '/b'] False\n{flags}\n"


def test_strict_ends_before_the_script(place):
    script = place.write("s.py", "print('ran')")
    ran = place.launch(script, "--kv-plugin-strict")
    assert ran.returncode == 1
    assert "ran" not in ran.stdout
    assert ran.stderr == "kvhook_infinilm: nothing to attach to\n"


def test_an_infinilm_that_the_adapter_does_not_know_runs_without(place):
    (place.folder / "first/sitecustomize.py").unlink()
    script = place.write("s.py", "print('ran')")
    ran = place.launch(script)
    assert (ran.returncode, ran.stdout) == (0, "ran\n")
    assert "kvhook is off" in ran.stderr
    assert "infinilm.base_config" in ran.stderr
    strict = place.launch(script, "--kv-plugin-strict")
    assert (strict.returncode, strict.stdout) == (1, "")
    assert strict.stderr.splitlines()[-1].startswith("kvhook_infinilm: InfiniLM has no module")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no script is given"),
        (["missing.py", "--model", "m"], "the script 'missing.py' is not there"),
        (["python"], "the script 'python' is not there"),
        (["--model", "m"], "the script '--model' is not there"),
    ],
)
def test_a_wrong_call(place, arguments, message):
    ran = place.launch(*arguments)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("usage: python -m kvhook_infinilm SCRIPT [FLAGS]\n")
    assert ran.stderr.endswith(f"kvhook_infinilm: error: {message}\n")


def test_without_infinilm(place):
    if place.python("-c", "import infinilm", infinilm=False).returncode == 0:
        pytest.skip("infinilm is installed")
    script = place.write("s.py", "print('ran')")
    ran = place.launch(script, infinilm=False)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert "infinilm cannot be imported; install it in this Python" in ran.stderr


def test_help(place):
    ran = place.launch("--help")
    assert ran.returncode == 0
    for flag in ("--kv-plugin", "--kv-plugin-config", "--kv-plugin-path", "--kv-plugin-strict"):
        assert flag in ran.stdout
