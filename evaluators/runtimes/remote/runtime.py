"""A runtime on another machine: the same questions, answered by a worker over ssh."""

import base64
import io
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import numpy as np

from evaluators.data import SMALL_BYTES, ImageStore, bytes_of
from evaluators.inference.staged import Routes, Step, Steps, to_json
from evaluators.runtimes.base import Capabilities, Images, Proof, Spent, TargetError, TensorReader, TimedBatch
from evaluators.runtimes.device_state import DeviceState
from evaluators.runtimes.paired_timing import TakeTurn, TimingProtocol, Turn
from evaluators.runtimes.remote.connection import Address, ConnectionLostError, JobError, SshConnection

ALIVE = 2
"""So many artifacts stay loaded on a board: a candidate and its reference."""
RETRY_AFTER_S = (0.5, 2.0, 5.0, 15.0)
"""How long to wait before each attempt to reach a board again."""

Result = TypeVar("Result")
_Recipe = tuple[tuple[bytes, ...], tuple[float | Step, ...], int, str]


class RemoteRuntime:
    """A runtime that a worker offers over ssh.

    A line that breaks is set up again, and what was under way is done again: uploads that arrived stay on the board.

    Args:
        url: `ssh://[user@]host[:port][?runtime=NAME&python=PATH&timeout=SECONDS]`.

    Raises:
        TargetError: the board cannot be reached, or cannot run the worker.
    """

    def __init__(self, url: str) -> None:
        self._address = Address.parse(url)
        self.name = url
        self._line = SshConnection(self._address)
        self._handles: OrderedDict[_Recipe, int] = OrderedDict()
        self._next_handle = 0
        self.reconnections = 0

    @staticmethod
    def missing() -> str | None:
        """Returns None: whether a board is there is known when it is asked."""
        return None

    def version(self) -> str:
        """Returns the library's name and version on the board."""
        return str(self._line.board["version"])

    def device(self) -> str:
        """Returns the board's name and its device."""
        return f"{self._address.destination}: {self._line.board['device']}"

    def capabilities(self) -> Capabilities:
        """Returns what runs well on the board."""
        found = dict(self._line.board["capabilities"])
        several = ("precisions", "fp32_in", "storage", "int8_operators")
        return Capabilities(**found | {name: tuple(found[name]) for name in several})

    def state(self) -> DeviceState:
        """Returns how fast the board's device may run just now."""
        return DeviceState(**self.doing(lambda line: line.ask("state")))

    def deployable(self, model: bytes) -> bytes:
        """Returns the file that the board's runtime wants."""
        kind = self._line.board["runtime"]
        if kind == "onnxruntime":
            from evaluators.runtimes.onnx_rewrites.integer_operators import integer_form

            return integer_form(model)
        if kind == "openvino":
            from evaluators.runtimes.onnx_rewrites.unsigned_activations import unsigned_activations

            return unsigned_activations(model)
        return model

    def open(self, stages: Sequence[bytes], plan: Steps, threads: int, confidence: str = "softmax") -> "RemoteSession":
        """Returns an artifact that is loaded on the board when it is first asked."""
        return RemoteSession(self, (tuple(stages), tuple(plan), threads, confidence))

    def tensors(self, model: bytes) -> TensorReader:
        """Returns a function from a batch to all outputs of a file, computed on the board."""
        if self._line.board["runtime"] == "onnxruntime":
            from evaluators.runtimes.onnxruntime_cpu import rounded_halves

            model = rounded_halves(model)

        def watch(images: Images) -> dict[str, Images]:
            stored = _npy(images)

            def job(line: SshConnection) -> str:
                return str(line.ask("tensors", stage=line.upload([model])[0], images=line.upload([stored])[0])["npz"])

            with np.load(io.BytesIO(base64.b64decode(self.doing(job)))) as found:
                return dict(found)

        return watch

    def extras(self, stages: Sequence[bytes], images: Images) -> dict[str, bytes]:
        """Returns the files that the board's runtime adds to a bundle."""
        stored = _npy(images)

        def job(line: SshConnection) -> dict[str, str]:
            found: dict[str, str] = line.ask("extras", stages=line.upload(stages), images=line.upload([stored])[0])[
                "files"
            ]
            return found

        return {name: base64.b64decode(content) for name, content in self.doing(job).items()}

    def remarks(self) -> list[str]:
        """Returns how often the line broke, and what the runtime on the board has to say."""
        broke = f"the line to {self._address.destination} broke and was set up again {self.reconnections} times"
        found: list[str] = self.doing(lambda line: line.ask("remarks"))["remarks"]
        return [broke, *found] if self.reconnections else found

    def close(self) -> None:
        """Ends the worker."""
        self._line.close()

    def doing(self, job: Callable[[SshConnection], Result]) -> Result:
        """Returns what `job` returns, on a line that is set up again where it breaks.

        Raises:
            TargetError: the board did not come back.
            RuntimeError: the job failed on the board; its reason is passed on.
        """
        for pause in (*RETRY_AFTER_S, None):
            try:
                return job(self._line)
            except JobError as error:
                raise RuntimeError(f"on {self._address.destination}: {error}") from None
            except ConnectionLostError as error:
                if pause is None:
                    self._line.close()  # an answer that comes after all would be taken for the next question's
                    times = "once" if len(RETRY_AFTER_S) == 1 else f"{len(RETRY_AFTER_S)} times in a row"
                    raise TargetError(f"{error}, {times}") from None
                self._reconnect(pause)
        raise AssertionError("unreachable")

    def _reconnect(self, pause: float) -> None:
        self._line.close()
        self._handles.clear()
        time.sleep(pause)
        try:
            self._line = SshConnection(self._address)
            self.reconnections += 1
        except (TargetError, ConnectionLostError):
            return  # still closed, so the next attempt breaks at once and waits longer

    def handle(self, line: SshConnection, recipe: _Recipe) -> int:
        """Returns the worker's number for an artifact, loaded if it is not; the one unused for longest makes room."""
        if recipe in self._handles:
            self._handles.move_to_end(recipe)
            return self._handles[recipe]
        while len(self._handles) >= ALIVE:
            line.ask("close", handle=self._handles.popitem(last=False)[1])
        stages, plan, threads, confidence = recipe
        self._next_handle += 1
        digests = line.upload(stages)
        line.ask(
            "open",
            handle=self._next_handle,
            stages=digests,
            plan=to_json(plan),
            threads=threads,
            confidence=confidence,
        )
        self._handles[recipe] = self._next_handle
        return self._next_handle


class RemoteSession:
    """An artifact on a board.

    Args:
        board: where it is.
        recipe: its stages, how they are run, threads, and what tells how sure an exit is.
    """

    def __init__(self, board: RemoteRuntime, recipe: _Recipe) -> None:
        self._board = board
        self._recipe = recipe

    def answer(self, images: ImageStore, batch: int) -> tuple[Images, Routes]:
        """Returns the logits `(n, classes)` and the routes `(n,)` that led to them, from `batch` images at a time."""
        parts = [self._answer(part, batch) for part in _parts(images, batch)]
        return np.concatenate([logits for logits, _ in parts]), np.concatenate([routes for _, routes in parts])

    def all_logits(self, images: ImageStore, batch: int) -> Images:
        """Returns what every exit and, last, the end says, `(n, exits + 1, classes)`: no image leaves early."""
        answers = [self._ask("all_logits", part, batch=batch)["logits"] for part in _parts(images, batch)]
        return np.concatenate([np.load(io.BytesIO(base64.b64decode(answer))) for answer in answers])

    def _answer(self, images: Images, batch: int) -> tuple[Images, Routes]:
        found = self._ask("answer", images, batch=batch)
        logits: Images = np.load(io.BytesIO(base64.b64decode(found["logits"])))
        return logits, np.array(found["routes"], dtype=np.int64)

    def seconds(self, images: Images, calls: int) -> list[Spent]:
        """Returns what each of `calls` runs on one batch took on the board."""
        return [Spent(*taken) for taken in self._ask("seconds", images, calls=calls)["seconds"]]

    def launches(self, images: Images) -> dict[str, float]:
        """Returns the median wall-clock seconds of each way to launch a batch on the board, the deployed one first."""
        return dict(self._ask("launches", images)["launches"])

    def turns(
        self,
        images: ImageStore,
        batches: Sequence[TimedBatch],
        reference: "RemoteSession",
        reference_batch: int,
        protocol: TimingProtocol,
    ) -> TakeTurn:
        """Returns turns that are taken on the board: not a byte crosses the network while a clock runs."""
        some, batches = _needed(images, batches, reference_batch)
        stored = _npy(some)
        prepared: list[SshConnection] = []

        def prepare(line: SshConnection) -> None:
            line.ask(
                "turns",
                handle=self._board.handle(line, self._recipe),
                reference=self._board.handle(line, reference._recipe),
                images=line.upload([stored])[0],
                batches=[asdict(batch) for batch in batches],
                reference_batch=reference_batch,
                protocol=asdict(protocol),
            )
            prepared[:] = [line]

        def take_turn(candidate_first: bool) -> Turn:
            def job(line: SshConnection) -> Turn:
                if prepared != [line]:  # a new line knows nothing of what the old one was told
                    prepare(line)
                found = line.ask("turn", candidate_first=candidate_first)
                return Turn(found["ratios"], found["works"], found["walls"])

            return self._board.doing(job)

        return take_turn

    def proof(self, images: Images, precisions: Mapping[str, str]) -> Proof:
        """Returns which layers do not run on the board in the precision that they were written in, or do not tell."""
        found = self._ask("proof", images, precisions=dict(precisions))
        return Proof(tuple(found["differences"]), tuple(found["unproven"]))

    def _ask(self, do: str, images: Images, **content: Any) -> dict[str, Any]:
        """Returns what the worker answers about this artifact and some images."""
        stored = _npy(images)

        def job(line: SshConnection) -> dict[str, Any]:
            handle = self._board.handle(line, self._recipe)
            return line.ask(do, handle=handle, images=line.upload([stored])[0], **content)

        return self._board.doing(job)


def _needed(
    images: ImageStore, batches: Sequence[TimedBatch], reference_batch: int
) -> tuple[Images, Sequence[TimedBatch]]:
    """Returns the images that turns need, those of the reference first, and where the batches lie among them.

    Few images are sent whole: then they are the same for every candidate, and cross the network once. Of many, one
    batch stands for all that go its way.
    """
    if bytes_of(images) <= SMALL_BYTES:
        return images[:], batches
    parts = [images[:reference_batch]]
    moved = []
    end = min(reference_batch, len(images))
    for batch in batches:
        parts.append(images[batch.start : batch.start + batch.count])
        behind = end + len(parts[-1])
        follows = replace(batch.follows, key=behind) if batch.follows else None
        moved.append(replace(batch, start=end, follows=follows, others=()))
        parts += [images[batch.follows.key : batch.follows.key + 1]] if batch.follows else []
        end = behind + (1 if batch.follows else 0)
    return np.concatenate(parts), moved


def _parts(images: ImageStore, batch: int) -> Iterator[Images]:
    """Yields the images, as many at a time as may cross the network together, in whole batches."""
    at_once = max(SMALL_BYTES * len(images) // bytes_of(images) // batch, 1) * batch
    for start in range(0, len(images), at_once):
        yield images[start : start + at_once]


def _npy(images: Images) -> bytes:
    file = io.BytesIO()
    np.save(file, images)
    return file.getvalue()
