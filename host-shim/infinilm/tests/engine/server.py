"""InfiniLM's HTTP server, launched as a user launches it, and a client."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


class Server:
    """A server that runs. Methods may be called from any thread."""

    def __init__(self, port: int, process: int):
        self.process = process
        """Its id."""
        self._port = port

    def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        with self._connection() as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def post(self, path: str, body) -> tuple[int, dict]:
        """Status and what comes back, both sides JSON."""
        with self._connection() as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def figures(self) -> dict:
        """Of all arms."""
        status, body = self.get("/kvhook/figures")
        assert status == 200, body
        return json.loads(body)["arms"]

    def chat(
        self, content: str, arm: str | None, new_tokens: int, stream: bool = False
    ) -> tuple[int, str]:
        """Status and the answer's text, or the error's."""
        with self._connection() as connection:
            response = self._post(connection, content, arm, new_tokens, stream)
            body = response.read().decode()
        if response.status != 200:
            return response.status, body
        if stream:
            return 200, "".join(map(_delta, body.splitlines())).strip()
        return 200, json.loads(body)["choices"][0]["message"]["content"].strip()

    def cancel(self, content: str, arm: str | None, new_tokens: int) -> None:
        """Asks, waits for the first piece of the answer and goes away."""
        with self._connection() as connection:
            assert self._post(connection, content, arm, new_tokens, stream=True).readline()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=180)
        try:
            yield connection
        finally:
            connection.close()

    @staticmethod
    def _post(connection, content, arm, new_tokens, stream) -> http.client.HTTPResponse:
        body = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": new_tokens,
            "stream": stream,
        }
        if arm is not None:
            body["kv_plugin"] = arm
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        return connection.getresponse()


def _delta(line: str) -> str:
    """The text of a line of a stream."""
    if not line.startswith("data: {"):
        return ""
    return json.loads(line[len("data: ") :])["choices"][0]["delta"].get("content") or ""


@contextlib.contextmanager
def serve(model: Path, flags: Sequence[str], log: Path, **env: str) -> Iterator[Server]:
    """Runs a server; its output goes into a file. `env`: variables of its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = importlib.util.find_spec("infinilm.server.inference_server").origin
    command = [
        sys.executable,
        "-m",
        "kvhook_infinilm",
        script,
        "--device",
        "cpu",
        "--model",
        str(model),
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | env
        )
    server = Server(port, process.pid)
    try:
        _wait(server, process, log)
        yield server
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            if server.get("/kvhook/figures")[0] == 200:
                return
        time.sleep(0.3)
    raise AssertionError(f"the server does not answer:\n{log.read_text()[-4000:]}")
