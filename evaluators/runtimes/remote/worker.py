"""Runs artifacts on a board for a search on another machine; requests and answers are lines of JSON.

It is copied to the board in one file with the modules that it imports, so a board is measured by the same code as the
machine of the search. A board needs Python 3.10 or later, numpy, and the runtime's package.

A request is `{"id": 1, "do": "turn", ...}`; the answer repeats the id and has either `"ok"` or `"error"`.
"""

import argparse
import base64
import errno
import hashlib
import io
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from evaluators.inference.staged import from_json
from evaluators.runtimes.base import PrecedingKeyFrame, Runtime, Session, TensorReader, TimedBatch
from evaluators.runtimes.paired_timing import TakeTurn, TimingProtocol
from evaluators.runtimes.registry import RUNTIMES
from spaces import cache
from spaces.errors import UserError

Content = dict[str, Any]


class Worker:
    """Answers requests about artifacts, images and timings.

    Args:
        runtime: runs the artifacts.
        store: folder of the uploaded files, named by SHA-256; they are kept between connections.
    """

    def __init__(self, runtime: Runtime, store: Path) -> None:
        self._runtime = runtime
        self._store = store
        self._sessions: dict[int, Session] = {}
        self._tensor_readers: dict[str, TensorReader] = {}
        self._take_turn: TakeTurn | None = None
        self._images: dict[str, Any] = {}
        self._requests: dict[str, Callable[[Content], Content]] = {
            "hello": self._hello,
            "missing": self._missing,
            "put": self._put,
            "open": self._open,
            "close": self._close,
            "answer": self._answer,
            "all_logits": self._all_logits,
            "seconds": self._seconds,
            "turns": self._begin_turns,
            "turn": self._turn,
            "launches": self._launches,
            "proof": self._proof,
            "tensors": self._tensors,
            "extras": self._extras,
            "state": lambda _: asdict(self._runtime.state()),
            "remarks": lambda _: {"remarks": self._runtime.remarks()},
        }

    def handle(self, request: Content) -> Content:
        """Returns the answer to a request; a failure is also an answer."""
        answer: Content = {"id": request.get("id")}
        try:
            return answer | {"ok": self._requests[request["do"]](request)}
        except MemoryError:
            return answer | {"error": "a job fits into the board's memory, got one that does not; use a smaller batch"}
        except OSError as error:
            full = "the board's disk is full; remove what is not needed" if error.errno == errno.ENOSPC else str(error)
            return answer | {"error": full}
        except UserError as error:
            return answer | {"error": str(error)}
        except Exception as error:
            return answer | {"error": f"{type(error).__name__}: {error}"}

    def _hello(self, _: Content) -> Content:
        return {
            "runtime": self._runtime.name,
            "version": self._runtime.version(),
            "device": self._runtime.device(),
            "capabilities": asdict(self._runtime.capabilities()),
            "python": platform.python_version(),
            "system": platform.platform(),
        }

    def _missing(self, request: Content) -> Content:
        return {"digests": [digest for digest in request["digests"] if not self._file(digest).is_file()]}

    def _put(self, request: Content) -> Content:
        data = base64.b64decode(request["data"])
        digest = hashlib.sha256(data).hexdigest()
        cache.write_atomically(self._file(digest), data)
        return {"digest": digest}

    def _file(self, digest: str) -> Path:
        return self._store / f"{int(digest, 16):064x}"  # parsed as a number, so it cannot be another path

    def _open(self, request: Content) -> Content:
        stages = [self._file(digest).read_bytes() for digest in request["stages"]]
        handle = int(request["handle"])
        self._sessions[handle] = self._runtime.open(
            stages,
            from_json(request["plan"]),
            request["threads"],
            request.get("confidence", "softmax"),
            request.get("input_size"),
        )
        return {}

    def _close(self, request: Content) -> Content:
        self._sessions.pop(request["handle"], None)
        return {}

    def _load_images(self, digest: str) -> Any:
        if digest not in self._images:
            self._images = {digest: np.load(self._file(digest))}
        return self._images[digest]

    def _answer(self, request: Content) -> Content:
        logits, routes = self._sessions[request["handle"]].answer(
            self._load_images(request["images"]), request["batch"]
        )
        return {"logits": _encoded(logits), "routes": routes.tolist()}

    def _all_logits(self, request: Content) -> Content:
        images = self._load_images(request["images"])
        return {"logits": _encoded(self._sessions[request["handle"]].all_logits(images, request["batch"]))}

    def _seconds(self, request: Content) -> Content:
        images = self._load_images(request["images"])
        seconds = self._sessions[request["handle"]].seconds(images, request["calls"])
        return {"seconds": [(spent.work, spent.wall) for spent in seconds]}

    def _launches(self, request: Content) -> Content:
        return {"launches": self._sessions[request["handle"]].launches(self._load_images(request["images"]))}

    def _begin_turns(self, request: Content) -> Content:
        self._take_turn = self._sessions[request["handle"]].turns(
            self._load_images(request["images"]),
            [_timed_batch(batch) for batch in request["batches"]],
            self._sessions[request["reference"]],
            request["reference_batch"],
            TimingProtocol(**request["protocol"]),
        )
        return {}

    def _turn(self, request: Content) -> Content:
        if self._take_turn is None:
            raise ValueError("a turn follows 'turns', got none")
        return asdict(self._take_turn(request["candidate_first"]))

    def _proof(self, request: Content) -> Content:
        images = self._load_images(request["images"])
        return asdict(self._sessions[request["handle"]].proof(images, request["precisions"]))

    def _tensors(self, request: Content) -> Content:
        digest = request["stage"]
        if digest not in self._tensor_readers:
            self._tensor_readers[digest] = self._runtime.tensors(self._file(digest).read_bytes())
        file = io.BytesIO()
        np.savez(file, **self._tensor_readers[digest](self._load_images(request["images"])))  # type: ignore[arg-type]
        return {"npz": base64.b64encode(file.getvalue()).decode()}

    def _extras(self, request: Content) -> Content:
        stages = [self._file(digest).read_bytes() for digest in request["stages"]]
        files = self._runtime.extras(stages, self._load_images(request["images"]))
        return {"files": {name: base64.b64encode(content).decode() for name, content in files.items()}}


def _encoded(array: Any) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def _timed_batch(content: Content) -> TimedBatch:
    follows = content["follows"]
    return TimedBatch(**content | {"follows": PrecedingKeyFrame(**follows) if follows else None})


def choose_runtime(name: str) -> Runtime:
    """Returns the runtime called `name`, or for `auto` the first one that works on this machine, preferably TensorRT.

    Raises:
        UserError: none works; the message has the reason for each.
    """
    reasons = []
    for each in sorted(RUNTIMES, key=lambda known: known != "tensorrt") if name == "auto" else [name]:
        try:
            runtime = RUNTIMES[each]
            reason = runtime.missing()
        except ImportError as error:
            reason = f"{error}; install it for {sys.executable}"
        if reason is None:
            return runtime()
        reasons.append(f"{each}: {reason}")
    raise UserError(f"a board has a runtime, got none that works: {'; '.join(reasons)}")


def serve(worker: Worker, requests: TextIO, answers: TextIO) -> None:
    """Answers requests until the connection is closed."""
    for line in requests:
        answers.write(json.dumps(worker.handle(json.loads(line))) + "\n")
        answers.flush()


def main() -> None:
    """Serves standard input and output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--store", type=Path, required=True)
    arguments = parser.parse_args()
    # Libraries may write to standard output, so answers get a channel of their own, and the rest goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ.setdefault("DEPLOYFRONT_CACHE", str(arguments.store))
    try:
        worker = Worker(choose_runtime(arguments.runtime), arguments.store / "uploads")
    except UserError as error:
        answers.write(json.dumps({"id": None, "error": str(error)}) + "\n")
        answers.flush()
        sys.exit(2)
    serve(worker, sys.stdin, answers)


if __name__ == "__main__":
    main()
