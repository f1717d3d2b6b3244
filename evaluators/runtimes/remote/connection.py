"""The connection to a worker on a board, started over ssh.

Keys, agents, known hosts and host names are as in the user's ssh settings: a board is reached as with `ssh HOST`.
"""

import ast
import base64
import hashlib
import io
import itertools
import json
import math
import os
import selectors
import shlex
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import parse_qs, urlsplit

from evaluators.runtimes.base import TargetError
from evaluators.runtimes.registry import RUNTIMES

SSH_COMMAND = "DEPLOYFRONT_SSH_COMMAND"
"""An environment variable that replaces `ssh`, as in `ssh -F my-config`."""

_PACKAGES = Path(__file__).parent.parent.parent.parent
_OWN_PACKAGES = ("evaluators", "spaces")
"""Packages that need not be installed on a board: the worker's file has the modules of them that it imports."""
_FOLDER = '"${XDG_CACHE_HOME:-$HOME/.cache}"/deployfront'
_JOB_TIMEOUT_S = 600.0
"""Long enough to build an engine on a small board, which takes minutes."""
_HELLO_TIMEOUT_S = 60.0


class ConnectionLostError(Exception):
    """The connection to a board broke, or a job took too long; the job may succeed on a new connection."""


class JobError(Exception):
    """The board answered that a job failed; repeating it would not help."""


@dataclass(frozen=True)
class Address:
    """The address of a board, and how to run the worker there.

    Address.parse("ssh://user@board:2222?runtime=onnxruntime&python=/opt/venv/bin/python&timeout=900")

    Args:
        destination: `[user@]host`.
        port: of ssh; None for the default.
        runtime: name of a runtime, or `auto`.
        python: the Python interpreter on the board.
        timeout_s: maximum seconds of a job.
    """

    destination: str
    port: int | None
    runtime: str
    python: str
    timeout_s: float = _JOB_TIMEOUT_S

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the address in a URL.

        Raises:
            TargetError: it has no host, an unknown runtime or option, or a timeout that is not positive.
        """
        parts = urlsplit(text)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        unknown = sorted(set(query) - {"runtime", "python", "timeout"})
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme != "ssh" or not parts.hostname or parts.path.strip("/") or unknown or port == -1:
            raise TargetError(
                f"a board is ssh://[user@]host[:port][?runtime=NAME&python=PATH&timeout=SECONDS], got {text!r}"
            )
        runtime = query.get("runtime", "auto")
        if runtime not in ("auto", *RUNTIMES):
            raise TargetError(f"a board's runtime is one of {', '.join(RUNTIMES)}, got {runtime!r}")
        user = f"{parts.username}@" if parts.username else ""
        timeout_s = _positive(query.get("timeout", str(_JOB_TIMEOUT_S)))
        return cls(f"{user}{parts.hostname}", port, runtime, query.get("python", "python3"), timeout_s)

    def command(self, remote: str) -> list[str]:
        """Returns the command that runs `remote` in the board's shell."""
        ssh = shlex.split(os.environ.get(SSH_COMMAND, "ssh"))
        # A password prompt would block a search; a board that is gone should be noticed within seconds.
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        options += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
        return [*ssh, *options, *self._port, self.destination, remote]

    def by_hand(self, *remote: str) -> str:
        """Returns the command with which a user runs words on the board, or logs in to it."""
        return shlex.join(["ssh", *self._port, self.destination, *map(shlex.quote, remote)])

    @property
    def _port(self) -> list[str]:
        return ["-p", str(self.port)] if self.port else []


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise TargetError(f"a board's timeout is a number of seconds above 0, got {text!r}; leave it out for 600")
    return seconds


def worker_files() -> dict[str, str]:
    """Returns the sources of the worker, of every runtime and of the modules that these import, by path."""
    pending = ["evaluators.runtimes.remote.worker", *map(RUNTIMES.module, RUNTIMES)]
    sources: dict[str, str] = {}
    while pending:
        parts = pending.pop().split(".")
        names = [
            *("/".join((*parts[:count], "__init__.py")) for count in range(1, len(parts) + 1)),
            "/".join(parts) + ".py",
        ]
        for name in names:
            if name not in sources and (_PACKAGES / name).is_file():
                sources[name] = (_PACKAGES / name).read_text()
                pending += _own_imports(ast.parse(sources[name]))
    return dict(sorted(sources.items()))


def _own_imports(node: ast.AST) -> Iterator[str]:
    """Yields the names that code imports from this project at run time, which may be modules."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in _OWN_PACKAGES:
        yield str(node.module)
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in _OWN_PACKAGES)
    for child in ast.iter_child_nodes(node):
        yield from _own_imports(child)


@cache
def worker_file() -> bytes:
    """Returns the worker with all modules that it needs, as one zip file that Python runs."""
    file = io.BytesIO()
    main = "from evaluators.runtimes.remote.worker import main\n\nmain()\n"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {"__main__.py": main, **worker_files()}.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # without timestamps, so that equal sources give equal files
    return file.getvalue()


class SshConnection:
    """A connection to a running worker.

    Args:
        address: of the board.

    Raises:
        TargetError: the board cannot be reached, or cannot run the worker, with the reason.
        ConnectionLostError: the connection broke while it was set up.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._ids = itertools.count(1)
        self._buffer = b""
        self._uploaded: set[str] = set()
        name = f"worker-{hashlib.sha256(worker_file()).hexdigest()[:16]}.pyz"
        self._upload_worker(name)
        remote = f"cd / && exec {shlex.quote(address.python)} {_FOLDER}/{name} --store {_FOLDER}"
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed with the connection
        self._process = subprocess.Popen(
            address.command(f"{remote} --runtime {address.runtime}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C must reach the search only, which closes the connection itself
        )
        self.board: dict[str, Any] = self._hello()

    def _upload_worker(self, name: str) -> None:
        """Writes the worker's file to the board's cache folder, unless it is there."""
        file = f"{_FOLDER}/{name}"
        remote = f"mkdir -p {_FOLDER} && {{ [ -s {file} ] || {{ cat > {file}.$$ && mv {file}.$$ {file}; }}; }}"
        command = self._address.command(remote)
        try:
            done = subprocess.run(
                command, input=worker_file(), capture_output=True, check=False, timeout=_HELLO_TIMEOUT_S
            )
        except FileNotFoundError:
            raise TargetError(f"a board is reached by {command[0]}, which is not installed; install it") from None
        except subprocess.TimeoutExpired:
            raise TargetError(_reason(self._address, b"no answer in time")) from None
        if done.returncode:
            raise TargetError(_reason(self._address, done.stderr))

    def _hello(self) -> dict[str, Any]:
        """Returns the worker's description of itself: runtime, version, device, capabilities.

        Raises:
            TargetError: the worker does not start.
        """
        try:
            return self.request("hello", timeout_s=_HELLO_TIMEOUT_S)
        except JobError as error:
            self.close()
            raise TargetError(f"{self._address.destination}: {error}") from None
        except ConnectionLostError:
            self._errors.seek(0)
            messages = self._errors.read()
            self.close()
            raise TargetError(_reason(self._address, messages)) from None

    def request(self, do: str, timeout_s: float | None = None, **content: Any) -> dict[str, Any]:
        """Returns the worker's answer to a request.

        Args:
            do: name of the request, see `Worker`.
            timeout_s: maximum seconds; by default those of the address.
            content: of the request, JSON-ready.

        Raises:
            ConnectionLostError: there was no answer in time.
            JobError: the job failed on the board.
        """
        request = {"id": next(self._ids), "do": do, **content}
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except (OSError, ValueError) as error:  # writing to a closed pipe raises a ValueError
            # The worker may have sent the reason before it ended.
            broken = ConnectionLostError(f"the connection to {self._address.destination} broke")
            raise self._last_error() or broken from error
        answer = json.loads(self._read_line(time.monotonic() + (timeout_s or self._address.timeout_s)))
        if "error" in answer:
            raise JobError(answer["error"])
        result: dict[str, Any] = answer["ok"]
        return result

    def _last_error(self) -> JobError | None:
        """Returns the error that the worker sent before it ended; None if it sent none."""
        try:
            return JobError(json.loads(self._read_line(time.monotonic() + 1))["error"])
        except (ConnectionLostError, KeyError, ValueError, OSError):
            return None

    def _read_line(self, deadline: float) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        if stdout.closed:
            raise ConnectionLostError(f"the connection to {self._address.destination} is closed")
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not selector.select(remaining):
                    raise ConnectionLostError(f"{self._address.destination} did not answer in time")
                chunk = os.read(stdout.fileno(), 1 << 16)
                if not chunk:
                    raise ConnectionLostError(f"the connection to {self._address.destination} broke")
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def upload(self, contents: Sequence[bytes]) -> list[str]:
        """Sends files that the board does not have yet, and returns the SHA-256 of each file."""
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        unknown = [digest for digest in digests if digest not in self._uploaded]
        missing = set(self.request("missing", digests=unknown)["digests"]) if unknown else set()
        for digest, content in zip(digests, contents, strict=True):
            if digest in missing:
                self.request("put", data=base64.b64encode(content).decode())
        self._uploaded |= set(digests)
        return digests

    def close(self) -> None:
        """Closes the connection and ends the worker."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # the pipe is broken already
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def _reason(address: Address, messages: bytes) -> str:
    """Returns one line on why a board cannot be used, from the messages of ssh or the board's shell."""
    lines = [line for line in messages.decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no answer"
    remedy = f"try: {address.by_hand(address.python, '--version')}"
    if "No space left" in last:
        remedy = "make room on the board's disk"
    elif "verification failed" in last or "host key" in last.lower():
        remedy = f"check the board's key and accept it once with: {address.by_hand()}"
    return f"a board answers over ssh, got from {address.destination}: {last}; {remedy}"
