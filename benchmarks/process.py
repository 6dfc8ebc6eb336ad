"""A worker as its parent sees it: a subprocess that answers commands."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.program import Settings

ROOT = Path(__file__).parents[1]


class WorkerProcess:
    """`benchmarks.worker` for one peer.

    Args:
      peer: what it measures.
      settings: of the run.
      name: what results call it; the peer's own name unless given.
      folder: the checkout that it runs in.
    """

    def __init__(
        self, peer: str, settings: Settings, *, name: str | None = None, folder: Path = ROOT
    ) -> None:
        self.peer = peer
        self.settings = settings
        self.name = name or peer
        self.folder = folder
        self._start()

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the worker)
        options = [f"--{key}={value}" for key, value in self.settings._asdict().items()]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", self.peer, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            cwd=self.folder,  # Which Python looks in first.
            # Several processes share one GPU.
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "KERAS_BACKEND": "jax"},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers.
        )
        self._hello: dict[str, Any] | None = None

    @property
    def hello(self) -> dict[str, Any]:
        """The worker's first answer: its version, or why it is missing or failed."""
        if self._hello is None:  # Read late, so that workers start side by side.
            self._hello = self._answer()
        return self._hello

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; a dead worker is started again first."""
        if "version" in self.hello and self._process.poll() is not None:
            self.close()
            self._start()
        if "version" not in self.hello:
            return self.hello
        with contextlib.suppress(BrokenPipeError):  # It died just now; why, the answer says.
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no message"
        return {"failed": f"the worker died with status {self._process.wait()}: {last}"}

    def close(self) -> None:
        """Ends the worker."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            stream.close()
