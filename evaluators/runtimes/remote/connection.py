"""A worker on a board, started over ssh, and the line to it.

Keys, agents, known hosts and host names are ssh's own business: what `ssh HOST` does is done here, with its settings.
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
_OWN = ("evaluators", "spaces")
"""Packages that a board need not have: the worker brings what it imports of them."""
_FOLDER = '"${XDG_CACHE_HOME:-$HOME/.cache}"/deployfront'
_JOB_TIMEOUT_S = 600.0
"""Building an engine on a small board takes minutes."""
_HELLO_TIMEOUT_S = 60.0


class ConnectionLostError(Exception):
    """The line to a board broke, or a job took too long; the same job may work on a new line."""


class JobError(Exception):
    """The board answered that a job failed; trying again will not help."""


@dataclass(frozen=True)
class Address:
    """Where a board is, what to start there, and how many seconds a job may take.

    Address.parse("ssh://user@board:2222?runtime=onnxruntime&python=/opt/venv/bin/python&timeout=900")
    """

    destination: str
    port: int | None
    runtime: str
    python: str
    timeout_s: float = _JOB_TIMEOUT_S

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the address that a URL spells.

        Raises:
            TargetError: it names no host, an unknown runtime, no positive time, or something else.
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
        # A prompt for a password would hang a search; a dead board should be noticed within seconds.
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        options += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
        port = ["-p", str(self.port)] if self.port else []
        return [*ssh, *options, *port, self.destination, remote]


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise TargetError(f"a board's timeout is a number of seconds above 0, got {text!r}; leave it out for 600")
    return seconds


def worker_files() -> dict[str, str]:
    """Returns the source of the worker, of every runtime and of all that these import, by path."""
    waiting = ["evaluators.runtimes.remote.worker", *map(RUNTIMES.module, RUNTIMES)]
    found: dict[str, str] = {}
    while waiting:
        parts = waiting.pop().split(".")
        names = [
            *("/".join((*parts[:count], "__init__.py")) for count in range(1, len(parts) + 1)),
            "/".join(parts) + ".py",
        ]
        for name in names:
            if name not in found and (_PACKAGES / name).is_file():
                found[name] = (_PACKAGES / name).read_text()
                waiting += _own_imports(ast.parse(found[name]))
    return dict(sorted(found.items()))


def _own_imports(node: ast.AST) -> Iterator[str]:
    """Yields the modules of this project that code imports when it runs, and names that may be modules."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in _OWN:
        yield str(node.module)
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in _OWN)
    for child in ast.iter_child_nodes(node):
        yield from _own_imports(child)


@cache
def worker_file() -> bytes:
    """Returns the worker and all that it imports, as one file that Python runs."""
    file = io.BytesIO()
    main = "from evaluators.runtimes.remote.worker import main\n\nmain()\n"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {"__main__.py": main, **worker_files()}.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # without a time, so that equal content is an equal file
    return file.getvalue()


class SshConnection:
    """A running worker, and what it has been sent.

    Args:
        address: of the board.

    Raises:
        TargetError: the board cannot be reached, or cannot run the worker; it says why.
        ConnectionLostError: the line broke while it was set up.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._ids = itertools.count(1)
        self._buffer = b""
        self._uploaded: set[str] = set()
        name = f"worker-{hashlib.sha256(worker_file()).hexdigest()[:16]}.pyz"
        self._upload_worker(name)
        remote = f"cd / && exec {shlex.quote(address.python)} {_FOLDER}/{name} --store {_FOLDER}"
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed with the line
        self._process = subprocess.Popen(
            address.command(f"{remote} --runtime {address.runtime}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for the search, which ends this line in its own time
        )
        self.board: dict[str, Any] = self._hello()

    def _upload_worker(self, name: str) -> None:
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
        try:
            return self.ask("hello", timeout_s=_HELLO_TIMEOUT_S)
        except JobError as error:
            self.close()
            raise TargetError(f"{self._address.destination}: {error}") from None
        except ConnectionLostError:
            self._errors.seek(0)
            said = self._errors.read()
            self.close()
            raise TargetError(_reason(self._address, said)) from None

    def ask(self, do: str, timeout_s: float | None = None, **content: Any) -> dict[str, Any]:
        """Returns the worker's answer, which may take `timeout_s`; as long as the address says where not given.

        Raises:
            ConnectionLostError: there was none in time.
            JobError: the job failed on the board.
        """
        request = {"id": next(self._ids), "do": do, **content}
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except (OSError, ValueError) as error:  # a line that was closed is a ValueError
            # It may have said why it ended before we wrote.
            raise self._said_last() or ConnectionLostError(f"the line to {self._address.destination} broke") from error
        answer = json.loads(self._read_line(time.monotonic() + (timeout_s or self._address.timeout_s)))
        if "error" in answer:
            raise JobError(answer["error"])
        found: dict[str, Any] = answer["ok"]
        return found

    def _said_last(self) -> JobError | None:
        try:
            return JobError(json.loads(self._read_line(time.monotonic() + 1))["error"])
        except (ConnectionLostError, KeyError, ValueError, OSError):
            return None

    def _read_line(self, deadline: float) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        if stdout.closed:
            raise ConnectionLostError(f"the line to {self._address.destination} is closed")
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise ConnectionLostError(f"{self._address.destination} did not answer in time")
                found = os.read(stdout.fileno(), 1 << 16)
                if not found:
                    raise ConnectionLostError(f"the line to {self._address.destination} broke")
                self._buffer += found
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def upload(self, contents: Sequence[bytes]) -> list[str]:
        """Returns the digests of some contents, which the board has from then on; what it has is not sent again."""
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        unknown = [digest for digest in digests if digest not in self._uploaded]
        missing = set(self.ask("missing", digests=unknown)["digests"]) if unknown else set()
        for digest, content in zip(digests, contents, strict=True):
            if digest in missing:
                self.ask("put", data=base64.b64encode(content).decode())
        self._uploaded |= set(digests)
        return digests

    def close(self) -> None:
        """Ends the worker."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # it is broken already
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def _reason(address: Address, said: bytes) -> str:
    """Returns one line on why a board could not be used, from what ssh or the board's shell said."""
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no answer"
    remedy = f"try: ssh {address.destination} {address.python} --version"
    if "No space left" in last:
        remedy = "make room on the board's disk"
    elif "verification failed" in last or "host key" in last.lower():
        remedy = f"check the board's key and accept it once with: ssh {address.destination}"
    return f"a board answers over ssh, got from {address.destination}: {last}; {remedy}"
