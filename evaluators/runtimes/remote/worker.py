"""Runs artifacts on a board for a search elsewhere: JSON lines in, JSON lines out.

It is shipped with the few modules that it imports as one file, so that a board is measured by the very code that
measures this machine. A board needs Python 3.10 or later, numpy, and the runtime's own package.

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
        runtime: what runs the artifacts.
        store: keeps what was uploaded, by SHA-256, from one connection to the next.
    """

    def __init__(self, runtime: Runtime, store: Path) -> None:
        self._runtime = runtime
        self._store = store
        self._opened: dict[int, Session] = {}
        self._watched: dict[str, TensorReader] = {}
        self._turns: TakeTurn | None = None
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
        """Returns the answer to a request; a failure is an answer too."""
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
        return self._store / f"{int(digest, 16):064x}"  # a digest is a number, never a path

    def _open(self, request: Content) -> Content:
        stages = [self._file(digest).read_bytes() for digest in request["stages"]]
        handle = int(request["handle"])
        self._opened[handle] = self._runtime.open(
            stages, from_json(request["plan"]), request["threads"], request.get("confidence", "softmax")
        )
        return {}

    def _close(self, request: Content) -> Content:
        self._opened.pop(request["handle"], None)
        return {}

    def _load_images(self, digest: str) -> Any:
        if digest not in self._images:
            self._images = {digest: np.load(self._file(digest))}
        return self._images[digest]

    def _answer(self, request: Content) -> Content:
        logits, routes = self._opened[request["handle"]].answer(self._load_images(request["images"]), request["batch"])
        return {"logits": _encoded(logits), "routes": routes.tolist()}

    def _all_logits(self, request: Content) -> Content:
        images = self._load_images(request["images"])
        return {"logits": _encoded(self._opened[request["handle"]].all_logits(images, request["batch"]))}

    def _seconds(self, request: Content) -> Content:
        images = self._load_images(request["images"])
        taken = self._opened[request["handle"]].seconds(images, request["calls"])
        return {"seconds": [(spent.work, spent.wall) for spent in taken]}

    def _launches(self, request: Content) -> Content:
        return {"launches": self._opened[request["handle"]].launches(self._load_images(request["images"]))}

    def _begin_turns(self, request: Content) -> Content:
        self._turns = self._opened[request["handle"]].turns(
            self._load_images(request["images"]),
            [_timed_batch(batch) for batch in request["batches"]],
            self._opened[request["reference"]],
            request["reference_batch"],
            TimingProtocol(**request["protocol"]),
        )
        return {}

    def _turn(self, request: Content) -> Content:
        if self._turns is None:
            raise ValueError("a turn follows 'turns', got none")
        turn = self._turns(request["candidate_first"])
        return asdict(turn)

    def _proof(self, request: Content) -> Content:
        opened, images = self._opened[request["handle"]], self._load_images(request["images"])
        return asdict(opened.proof(images, request["precisions"]))

    def _tensors(self, request: Content) -> Content:
        digest = request["stage"]
        if digest not in self._watched:
            self._watched[digest] = self._runtime.tensors(self._file(digest).read_bytes())
        file = io.BytesIO()
        np.savez(file, **self._watched[digest](self._load_images(request["images"])))  # type: ignore[arg-type]
        return {"npz": base64.b64encode(file.getvalue()).decode()}

    def _extras(self, request: Content) -> Content:
        stages = [self._file(digest).read_bytes() for digest in request["stages"]]
        found = self._runtime.extras(stages, self._load_images(request["images"]))
        return {"files": {name: base64.b64encode(content).decode() for name, content in found.items()}}


def _encoded(array: Any) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def _timed_batch(content: Content) -> TimedBatch:
    follows = content["follows"]
    return TimedBatch(**content | {"follows": PrecedingKeyFrame(**follows) if follows else None})


def choose_runtime(name: str) -> Runtime:
    """Returns the runtime called `name`, or for `auto` the first one that works here, TensorRT before others.

    Raises:
        UserError: there is none; it says why of each.
    """
    reasons = []
    for candidate in sorted(RUNTIMES, key=lambda known: known != "tensorrt") if name == "auto" else [name]:
        try:
            found = RUNTIMES[candidate]
            reason = found.missing()
        except ImportError as error:
            reason = f"{error}; install it for {sys.executable}"
        if reason is None:
            return found()
        reasons.append(f"{candidate}: {reason}")
    raise UserError(f"a board has a runtime, got none that works: {'; '.join(reasons)}")


def serve(worker: Worker, requests: TextIO, answers: TextIO) -> None:
    """Answers request after request until the other side hangs up."""
    for line in requests:
        answers.write(json.dumps(worker.handle(json.loads(line))) + "\n")
        answers.flush()


def main() -> None:
    """Serves standard input and output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--store", type=Path, required=True)
    arguments = parser.parse_args()
    # Libraries write to standard output as they please; the answers keep a channel of their own.
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
