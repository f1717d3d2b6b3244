"""A runtime on another machine, reached over ssh."""

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
"""Number of artifacts that stay loaded on a board: a candidate and its reference."""
RETRY_AFTER_S = (0.5, 2.0, 5.0, 15.0)
"""Seconds to wait before each attempt to reconnect."""

Result = TypeVar("Result")
_Recipe = tuple[tuple[bytes, ...], tuple[float | Step, ...], int, str, int | None]


class RemoteRuntime:
    """A runtime of a board, used through a worker there.

    If the connection breaks, it is set up again and the job is repeated; uploaded files stay on the board.

    Args:
        url: `ssh://[user@]host[:port][?runtime=NAME&python=PATH&timeout=SECONDS]`.

    Raises:
        TargetError: the board cannot be reached, or cannot run the worker.
    """

    def __init__(self, url: str) -> None:
        self._address = Address.parse(url)
        self.name = url
        self._connection = SshConnection(self._address)
        self._handles: OrderedDict[_Recipe, int] = OrderedDict()
        self._next_handle = 0
        self.reconnections = 0

    @staticmethod
    def missing() -> str | None:
        """Returns None: whether a board can be reached is known only after connecting."""
        return None

    def version(self) -> str:
        """Returns the library's name and version on the board."""
        return str(self._connection.board["version"])

    def device(self) -> str:
        """Returns the board's name and its device."""
        return f"{self._address.destination}: {self._connection.board['device']}"

    def capabilities(self) -> Capabilities:
        """Returns the capabilities of the board."""
        content = dict(self._connection.board["capabilities"])
        tuples = ("precisions", "fp32_in", "storage", "int8_operators")
        return Capabilities(**content | {name: tuple(content[name]) for name in tuples})

    def state(self) -> DeviceState:
        """Returns the clocks, power mode and temperature of the board's device."""
        return DeviceState(**self.run_job(lambda connection: connection.request("state")))

    def deployable(self, model: bytes) -> bytes:
        """Returns the model in the form that the board's runtime runs."""
        kind = self._connection.board["runtime"]
        if kind == "onnxruntime":
            from evaluators.runtimes.onnx_rewrites.integer_operators import integer_form

            return integer_form(model)
        if kind == "openvino":
            from evaluators.runtimes.onnx_rewrites.unsigned_activations import unsigned_activations

            return unsigned_activations(model)
        return model

    def open(
        self,
        stages: Sequence[bytes],
        plan: Steps,
        threads: int,
        confidence: str = "softmax",
        input_size: int | None = None,
    ) -> "RemoteSession":
        """Returns an artifact that is loaded on the board at its first use."""
        return RemoteSession(self, (tuple(stages), tuple(plan), threads, confidence, input_size))

    def tensors(self, model: bytes) -> TensorReader:
        """Returns a function from a batch to all outputs of a file, computed on the board."""
        if self._connection.board["runtime"] == "onnxruntime":
            from evaluators.runtimes.onnxruntime_cpu import rounded_halves

            model = rounded_halves(model)

        def read(images: Images) -> dict[str, Images]:
            stored = _npy(images)

            def job(connection: SshConnection) -> str:
                stage, image_file = connection.upload([model, stored])
                return str(connection.request("tensors", stage=stage, images=image_file)["npz"])

            with np.load(io.BytesIO(base64.b64decode(self.run_job(job)))) as tensors:
                return dict(tensors)

        return read

    def extras(self, stages: Sequence[bytes], images: Images) -> dict[str, bytes]:
        """Returns the files that the board's runtime adds to a bundle."""
        stored = _npy(images)

        def job(connection: SshConnection) -> dict[str, str]:
            *stage_files, image_file = connection.upload([*stages, stored])
            files: dict[str, str] = connection.request("extras", stages=stage_files, images=image_file)["files"]
            return files

        return {name: base64.b64decode(content) for name, content in self.run_job(job).items()}

    def remarks(self) -> list[str]:
        """Returns how often the connection broke, and the remarks of the runtime on the board."""
        broke = f"the connection to {self._address.destination} broke and was set up again {self.reconnections} times"
        remarks: list[str] = self.run_job(lambda connection: connection.request("remarks"))["remarks"]
        return [broke, *remarks] if self.reconnections else remarks

    def close(self) -> None:
        """Ends the worker."""
        self._connection.close()

    def run_job(self, job: Callable[[SshConnection], Result]) -> Result:
        """Returns the result of `job`; if the connection breaks, it is set up again and the job is repeated.

        Raises:
            TargetError: the board cannot be reached any more.
            RuntimeError: the job failed on the board, with the reason.
        """
        for pause in (*RETRY_AFTER_S, None):
            try:
                return job(self._connection)
            except JobError as error:
                raise RuntimeError(f"on {self._address.destination}: {error}") from None
            except ConnectionLostError as error:
                if pause is None:
                    self._connection.close()  # a late answer would be taken for that of the next request
                    times = "once" if len(RETRY_AFTER_S) == 1 else f"{len(RETRY_AFTER_S)} times in a row"
                    raise TargetError(f"{error}, {times}") from None
                self._reconnect(pause)
        raise AssertionError("unreachable")

    def _reconnect(self, pause: float) -> None:
        self._connection.close()
        self._handles.clear()
        time.sleep(pause)
        try:
            self._connection = SshConnection(self._address)
            self.reconnections += 1
        except (TargetError, ConnectionLostError):
            return  # the connection stays closed, so the next attempt fails at once and the next pause is longer

    def handle(self, connection: SshConnection, recipe: _Recipe) -> int:
        """Returns the worker's handle of an artifact, which is loaded first if needed.

        The least recently used artifact is closed if too many are loaded.
        """
        if recipe in self._handles:
            self._handles.move_to_end(recipe)
            return self._handles[recipe]
        while len(self._handles) >= ALIVE:
            connection.request("close", handle=self._handles.popitem(last=False)[1])
        stages, plan, threads, confidence, input_size = recipe
        self._next_handle += 1
        digests = connection.upload(stages)
        connection.request(
            "open",
            handle=self._next_handle,
            stages=digests,
            plan=to_json(plan),
            threads=threads,
            confidence=confidence,
            input_size=input_size,
        )
        self._handles[recipe] = self._next_handle
        return self._next_handle


class RemoteSession:
    """An artifact on a board.

    Args:
        board: the runtime.
        recipe: stages, plan of their execution, number of threads, measure of confidence, and input size.
    """

    def __init__(self, board: RemoteRuntime, recipe: _Recipe) -> None:
        self._board = board
        self._recipe = recipe

    def answer(self, images: ImageStore, batch: int) -> tuple[Images, Routes]:
        """Returns the logits `(n, classes)` and the routes `(n,)`, computed `batch` images at a time."""
        parts = [self._answer(part, batch) for part in _parts(images, batch)]
        return np.concatenate([logits for logits, _ in parts]), np.concatenate([routes for _, routes in parts])

    def all_logits(self, images: ImageStore, batch: int) -> Images:
        """Returns the logits of every exit and, last, of the end, `(n, exits + 1, classes)`: no image leaves early."""
        answers = [self._request("all_logits", part, batch=batch)["logits"] for part in _parts(images, batch)]
        return np.concatenate([np.load(io.BytesIO(base64.b64decode(answer))) for answer in answers])

    def _answer(self, images: Images, batch: int) -> tuple[Images, Routes]:
        result = self._request("answer", images, batch=batch)
        logits: Images = np.load(io.BytesIO(base64.b64decode(result["logits"])))
        return logits, np.array(result["routes"], dtype=np.int64)

    def seconds(self, images: Images, calls: int) -> list[Spent]:
        """Returns the times of each of `calls` runs on one batch, on the board."""
        return [Spent(*seconds) for seconds in self._request("seconds", images, calls=calls)["seconds"]]

    def launches(self, images: Images) -> dict[str, float]:
        """Returns the median wall-clock seconds of each launch mode on the board, the deployed one first."""
        return dict(self._request("launches", images)["launches"])

    def turns(
        self,
        images: ImageStore,
        batches: Sequence[TimedBatch],
        reference: "RemoteSession",
        reference_batch: int,
        protocol: TimingProtocol,
    ) -> TakeTurn:
        """Returns turns that are taken on the board: nothing is transferred during a turn."""
        some, batches = _needed(images, batches, reference_batch)
        stored = _npy(some)
        prepared: list[SshConnection] = []

        def prepare(connection: SshConnection) -> None:
            connection.request(
                "turns",
                handle=self._board.handle(connection, self._recipe),
                reference=self._board.handle(connection, reference._recipe),
                images=connection.upload([stored])[0],
                batches=[asdict(batch) for batch in batches],
                reference_batch=reference_batch,
                protocol=asdict(protocol),
            )
            prepared[:] = [connection]

        def take_turn(candidate_first: bool) -> Turn:
            def job(connection: SshConnection) -> Turn:
                if prepared != [connection]:  # a new connection has to be prepared again
                    prepare(connection)
                turn = connection.request("turn", candidate_first=candidate_first)
                return Turn(turn["ratios"], turn["works"], turn["walls"])

            return self._board.run_job(job)

        return take_turn

    def proof(self, images: Images, precisions: Mapping[str, str]) -> Proof:
        """Returns the layers that run in another precision than requested, and those whose precision is unknown."""
        proof = self._request("proof", images, precisions=dict(precisions))
        return Proof(tuple(proof["differences"]), tuple(proof["unproven"]))

    def _request(self, do: str, images: Images, **content: Any) -> dict[str, Any]:
        """Returns the worker's answer to a request on this artifact and some images."""
        stored = _npy(images)

        def job(connection: SshConnection) -> dict[str, Any]:
            handle = self._board.handle(connection, self._recipe)
            return connection.request(do, handle=handle, images=connection.upload([stored])[0], **content)

        return self._board.run_job(job)


def _needed(
    images: ImageStore, batches: Sequence[TimedBatch], reference_batch: int
) -> tuple[Images, Sequence[TimedBatch]]:
    """Returns the images that turns need, those of the reference first, and the batches at their new positions.

    If all images are small enough together, they are sent whole: they are then the same for every candidate and sent
    once. Otherwise one batch stands for all batches of its path.
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
    """Yields the images in parts of whole batches, each small enough for one upload."""
    at_once = max(SMALL_BYTES * len(images) // bytes_of(images) // batch, 1) * batch
    for start in range(0, len(images), at_once):
        yield images[start : start + at_once]


def _npy(images: Images) -> bytes:
    file = io.BytesIO()
    np.save(file, images)
    return file.getvalue()
