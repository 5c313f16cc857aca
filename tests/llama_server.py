"""A real OpenAI-compatible server: llama.cpp from the prebuilt wheel `xllamacpp`, in a process of its own that tests may kill.

Run as a script it serves: `python tests/llama_server.py MODEL.gguf PORT SLOTS`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class LlamaServer:
    """Serves a GGUF file on a free port of loopback, under the names of the file; a context manager. `url`: the address for `base_url`."""

    def __init__(self, model: Path, slots: int = 4) -> None:
        self.model, self.slots = model, slots
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> LlamaServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self, wait: bool = True) -> None:
        """Start the process on the same port as before, and wait until it answers."""
        command = [sys.executable, __file__, str(self.model), str(self.port), str(self.slots)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 120
        while wait:
            try:
                with urllib.request.urlopen(f"{self.url}/models", timeout=5):
                    return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > limit:
                    raise RuntimeError(f"the server did not start (exit code {self.process.poll()})") from None
                time.sleep(0.2)

    def kill(self) -> None:
        """End the process at once, in the middle of whatever it does."""
        self.process.kill()
        self.process.wait()


def serve(model: str, port: int, slots: int) -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.port = model, port
    parameters.n_parallel, parameters.n_ctx = slots, slots * 2_560
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3_600)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
