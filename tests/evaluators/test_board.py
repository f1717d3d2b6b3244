"""A board over ssh: the real server, the real client, the real worker; and what happens when the connection breaks."""

import ast
import base64
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import TrialState

from evaluators.runtimes.base import PrecedingKeyFrame, TargetError, TimedBatch
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from evaluators.runtimes.paired_timing import TimingProtocol
from evaluators.runtimes.registry import runtime
from evaluators.runtimes.remote import runtime as board_module
from evaluators.runtimes.remote.connection import (
    SSH_COMMAND,
    Address,
    ConnectionLostError,
    SshConnection,
    worker_file,
    worker_files,
)
from evaluators.runtimes.remote.runtime import RemoteRuntime, _needed
from evaluators.runtimes.remote.worker import Worker, choose_runtime
from evaluators.testing import RuntimeContract
from search.cli import run
from search.config.study import Study
from search.loop.coordinator import build_coordinator
from search.pipeline.pipeline import build_pipeline
from search.results.store import SearchFolder, StoredSearch
from tests.helpers import loopback, tiny

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    reason = loopback.missing()
    if reason:
        pytest.skip(reason)
    made = loopback.start(tmp_path_factory.mktemp("board"))
    before = os.environ.get(SSH_COMMAND)
    os.environ[SSH_COMMAND] = made.ssh_command
    yield made
    made.stop()
    if before is None:
        del os.environ[SSH_COMMAND]
    else:
        os.environ[SSH_COMMAND] = before


@pytest.fixture(scope="module")
def board(server):
    made = RemoteRuntime(server.url())
    yield made
    made.close()


class TestBoard(RuntimeContract):
    @pytest.fixture
    def runtime(self, board):
        return board

    def test_tells_what_it_is(self, runtime) -> None:
        assert runtime.version() == OnnxRuntime().version()
        assert "board" in runtime.device()
        assert runtime.capabilities() == OnnxRuntime().capabilities()

    def test_says_what_this_machine_says(self, runtime, builder, network, space, images) -> None:
        candidate = space.candidate(space.uniform(0.5, "int8", 0.6))
        artifact = builder.build(space.apply(network, candidate), candidate)
        here = OnnxRuntime().open(artifact.deployed, artifact.thresholds, 1).answer(images.numpy(), 4)
        there = runtime.open(artifact.deployed, artifact.thresholds, 1).answer(images.numpy(), 4)
        np.testing.assert_array_equal(here[0], there[0])
        np.testing.assert_array_equal(here[1], there[1])


def opened_dense(board, builder, network, space):
    return board.open(builder.build(network, space.dense()).deployed, [], 1)


def test_a_connection_that_breaks_between_jobs_is_set_up_again(server, board, builder, network, space, images) -> None:
    opened = opened_dense(board, builder, network, space)
    before = opened.answer(images.numpy(), 4)[0]
    count = board.reconnections
    server.cut()
    np.testing.assert_array_equal(opened.answer(images.numpy(), 4)[0], before)
    assert board.reconnections == count + 1


def test_a_connection_that_breaks_within_a_job_does_it_again(server, board, builder, network, space, images) -> None:
    opened, count = opened_dense(board, builder, network, space), board.reconnections
    opened.answer(images.numpy(), 4)
    cutter = threading.Timer(0.3, server.cut)
    cutter.start()
    begin = time.monotonic()
    taken = opened.seconds(images.numpy()[:4], 20_000)  # runs for longer than the connection lasts
    assert len(taken) == 20_000
    assert board.reconnections == count + 1, f"the job took {time.monotonic() - begin:.1f} s"


def test_turns_go_on_after_a_cut(server, board, builder, network, space, images) -> None:
    candidate, reference = (opened_dense(board, builder, network, space) for _ in range(2))
    take_turn = candidate.turns(images.numpy(), [TimedBatch(0, 4)], reference, 2, TimingProtocol())
    assert len(take_turn(True).ratios) == 1
    server.cut()
    assert len(take_turn(False).ratios) == 1


def test_a_job_that_does_not_come_back_in_time_is_done_again(server, builder, network, space, images) -> None:
    patient = RemoteRuntime(server.url(timeout=3))
    opened = opened_dense(patient, builder, network, space)
    before = opened.answer(images.numpy(), 4)[0]
    server.freeze()
    try:
        np.testing.assert_array_equal(opened.answer(images.numpy(), 4)[0], before)
        assert patient.reconnections == 1
        assert "set up again 1 times" in patient.remarks()[0]
    finally:
        server.cut()
        patient.close()


def test_an_answer_that_does_not_come_in_time_breaks_the_connection(server) -> None:
    connection = SshConnection(Address.parse(server.url(timeout=0.5)))
    server.freeze()
    try:
        with pytest.raises(ConnectionLostError, match="did not answer in time"):
            connection.request("remarks")
    finally:
        server.cut()
        connection.close()


def test_a_board_that_is_always_too_late_fails_the_trial_with_that_reason(server, monkeypatch) -> None:
    monkeypatch.setattr(board_module, "RETRY_AFTER_S", (0.0, 0.0))
    late = RemoteRuntime(server.url(timeout=1e-6))
    with pytest.raises(TargetError, match="did not answer in time, 2 times in a row"):
        late.open([b"x"], [], 1).seconds(np.zeros((1, 1, 8, 8), np.float32), 1)
    late.close()


def test_a_board_tells_its_devices_state(board) -> None:
    assert board.state().kind == "CPU"


def test_a_trial_whose_board_is_always_late_is_kept_with_its_reason(server, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(board_module, "RETRY_AFTER_S", (0.0,))
    mine, search = RemoteRuntime(server.url()), SearchFolder(tmp_path / "late")
    study = Study.parse(tiny.STUDY, "the tests' study")
    study = study.model_copy(update={"target": study.target.model_copy(update={"runtime": server.url()})})
    pipeline = build_pipeline(study, lambda *_: None, mine)
    baseline = StoredSearch.read(SearchFolder(folder / "one")).baseline
    patient, late = mine._address, replace(mine._address, timeout_s=1e-6)
    with search.lock():
        coordinator = build_coordinator(pipeline, search.create(), baseline, "random", 0, [])
        for done, address in enumerate((patient, late, patient), 1):
            mine._address = mine._connection._address = address
            assert coordinator.run(done, None).code == 0
    mine.close()
    trials = [trial for trial in search.open().trials if trial.state.is_finished()]
    assert [trial.state == TrialState.FAIL for trial in trials] == [False, True, False]
    assert trials[1].user_attrs["reason"] == "TargetError: board did not answer in time, once"


def test_what_was_uploaded_is_not_sent_again(server, board, builder, network, space) -> None:
    artifact = builder.build(network, space.dense())
    opened_dense(board, builder, network, space).seconds(np.zeros((1, 1, 8, 8), np.float32), 1)
    uploads = server.folder / "cache" / "deployfront" / "uploads"
    digest = hashlib.sha256(artifact.deployed[0]).hexdigest()
    stamp = (uploads / digest).stat().st_mtime_ns
    again = RemoteRuntime(server.url())
    opened_dense(again, builder, network, space).seconds(np.zeros((1, 1, 8, 8), np.float32), 1)
    again.close()
    assert (uploads / digest).stat().st_mtime_ns == stamp


def test_a_job_that_fails_on_the_board_is_told_with_its_reason(board) -> None:
    with pytest.raises(RuntimeError, match=r"on board: .*[Pp]rotobuf"):
        board.open([b"not a model"], [], 1).seconds(np.zeros((1, 1, 8, 8), np.float32), 1)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ssh://", "ssh://[user@]host"),
        ("ssh://board/etc", "ssh://[user@]host"),
        ("ssh://board:port", "ssh://[user@]host"),
        ("ssh://board?speed=fast", "ssh://[user@]host"),
        ("ssh://board?timeout=soon", "above 0, got 'soon'"),
        ("ssh://board?timeout=-1", "above 0"),
        ("ssh://board?runtime=abacus", "onnxruntime"),
    ],
)
def test_an_address_that_is_none_is_refused(url, words) -> None:
    with pytest.raises(TargetError) as error:
        Address.parse(url)
    assert words in str(error.value)


def test_an_address_has_all_its_parts() -> None:
    address = Address.parse("ssh://me@jetson:2222?runtime=onnxruntime&python=/opt/bin/python3")
    assert address == Address("me@jetson", 2222, "onnxruntime", "/opt/bin/python3")
    command = address.command("true")
    assert command[-2:] == ["me@jetson", "true"]
    assert command[command.index("-p") + 1] == "2222"
    assert "StrictHostKeyChecking" not in " ".join(command)


def refused(url: str) -> str:
    with pytest.raises(TargetError) as error:
        runtime(url)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_board_without_the_python_or_its_packages_says_so(server, tmp_path) -> None:
    assert "/no/such/python" in refused(server.url(python="/no/such/python"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    assert "numpy" in refused(server.url(python=str(tmp_path / "bare" / "bin" / "python")))


def test_an_unknown_host_key_is_not_accepted(server, monkeypatch, tmp_path) -> None:
    config = (server.folder / "ssh_config").read_text().replace("/known_hosts", "/nobody")
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv(SSH_COMMAND, f"ssh -F {tmp_path / 'config'}")
    assert "accept it once" in refused(server.url())


def test_a_host_that_cannot_be_reached_says_so(server, monkeypatch, tmp_path) -> None:
    lines = (server.folder / "ssh_config").read_text().splitlines()
    (tmp_path / "config").write_text("\n".join("  Port 1" if "Port" in line else line for line in lines))
    monkeypatch.setenv(SSH_COMMAND, f"ssh -F {tmp_path / 'config'}")
    assert "Connection refused" in refused(server.url())


def test_without_ssh_it_says_so(monkeypatch) -> None:
    monkeypatch.setenv(SSH_COMMAND, "/no/such/ssh")
    assert "not installed" in refused("ssh://board")


def test_a_full_disk_is_told(tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    answer = Worker(OnnxRuntime(), tmp_path).handle({"id": 7, "do": "put", "data": base64.b64encode(b"x").decode()})
    assert answer["id"] == 7
    assert "disk is full" in answer["error"]


def test_a_worker_answers_a_frame_again_or_computes_it(tmp_path, builder, network, space, images) -> None:
    worker = Worker(OnnxRuntime(), tmp_path)

    def ask(do: str, **content: object) -> dict:
        line = json.dumps({"id": 1, "do": do, **content})  # as it crosses the network
        return json.loads(json.dumps(worker.handle(json.loads(line))["ok"]))

    file = io.BytesIO()
    np.save(file, images.numpy())
    (stage,) = builder.build(network, space.dense()).deployed
    model, pictures = (ask("put", data=base64.b64encode(data).decode())["digest"] for data in (stage, file.getvalue()))
    ask("open", handle=1, stages=[model], plan=[], threads=1)
    batches = [TimedBatch(3, 1, follows=PrecedingKeyFrame(2, age, 1e9, 30)) for age in (1, 30)]
    settings = {
        "images": pictures,
        "batches": [asdict(batch) for batch in batches],
        "protocol": asdict(TimingProtocol()),
    }
    ask("turns", handle=1, reference=1, reference_batch=1, **settings)
    turns = [ask("turn", candidate_first=index % 2 == 0)["ratios"] for index in range(15)]
    again, fresh = np.median(turns, axis=0)
    assert 0 < again < fresh


def test_a_digest_is_never_a_path(tmp_path) -> None:
    worker = Worker(OnnxRuntime(), tmp_path / "store")
    (tmp_path / "secret").write_text("x")
    answer = worker.handle({"id": 1, "do": "open", "handle": 1, "stages": ["../secret"], "plan": [], "threads": 1})
    assert "error" in answer


def test_the_worker_is_one_file_that_runs_on_older_pythons() -> None:
    assert worker_file() == worker_file()
    for name, text in worker_files().items():
        tree = ast.parse(text, feature_version=(3, 10))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module == "typing":
                assert "Self" not in {alias.name for alias in node.names}, name
            if isinstance(node, ast.Import | ast.ImportFrom):
                top = (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
                assert top in {*sys.stdlib_module_names, "numpy", "onnxruntime", "evaluators", "spaces"}, (name, top)


def test_the_worker_brings_what_it_imports_and_needs_no_torch(tmp_path) -> None:
    (tmp_path / "worker.pyz").write_bytes(worker_file())
    modules = ("remote.worker", "onnxruntime_cpu", "tensorrt_gpu.inspector")
    loading = "; ".join(f"import evaluators.runtimes.{name}" for name in modules)
    code = f"import sys; sys.path[:0] = ['worker.pyz']; {loading}; print(sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(ran.stdout)
    assert "evaluators.runtimes.onnxruntime_cpu" in loaded
    assert {name.partition(".")[0] for name in loaded}.isdisjoint({"torch", "optuna", "search"})


def test_openvino_runs_on_a_board(server, builder, network, space, images) -> None:
    pytest.importorskip("openvino")
    board = RemoteRuntime(server.url(runtime="openvino"))
    try:
        here = runtime("openvino")
        assert (board.version(), board.capabilities()) == (here.version(), here.capabilities())
        (stage,) = builder.build(network, space.candidate(space.uniform(1.0, "int8"))).stages
        assert board.deployable(stage) == here.deployable(stage) != stage
        found, wanted = (each.open([here.deployable(stage)], [], 1).answer(images.numpy(), 4) for each in (board, here))
        np.testing.assert_array_equal(found[0], wanted[0])
    finally:
        board.close()


def test_auto_takes_what_works_here() -> None:
    assert choose_runtime("auto").name == "onnxruntime"


@pytest.mark.slow
def test_a_search_on_a_board_survives_a_cut_and_picks(server, tmp_path, cache, capfd) -> None:
    (tmp_path / "study.toml").write_text(tiny.STUDY)
    arguments = ["--study", str(tmp_path / "study.toml"), "--search", "one", "--runs", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "search", *arguments, "--target", server.url()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    journal = tmp_path / "runs" / "one" / "journal.log"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (journal.is_file() and journal.read_bytes().count(b'"evaluation"') > 3):
        time.sleep(0.05)
    server.cut()
    output, _ = process.communicate(timeout=240)
    assert process.returncode in (0, 1), output
    assert "set up again" in output
    search = StoredSearch.read(SearchFolder(tmp_path / "runs" / "one"))
    done = [trial for trial in search.trials if trial.state.is_finished()]
    assert len(done) == 12
    assert not [trial for trial in done if trial.user_attrs.get("reason")]
    assert "board" in search.baseline.evaluation.measurements["latency"].target
    picked = ["pick", "--runs", str(tmp_path / "runs"), "--budget", "latency<1000%", "--out", str(tmp_path / "deploy")]
    assert run(picked) == 0
    assert "measured again" in capfd.readouterr().out
    assert (tmp_path / "deploy" / "run.py").is_file()


def test_many_images_cross_the_network_in_parts(board, builder, network, space, images, monkeypatch) -> None:
    candidate = space.candidate(space.uniform(1.0, "int8", 0.6))
    artifact = builder.build(space.apply(network, candidate), candidate)
    opened = board.open(artifact.deployed, artifact.thresholds, 1)
    whole = opened.answer(images.numpy(), 4)
    monkeypatch.setattr("evaluators.runtimes.remote.runtime.SMALL_BYTES", images.numpy()[:5].nbytes)
    for one, other in zip(opened.answer(images.numpy(), 4), whole, strict=True):
        np.testing.assert_array_equal(one, other)
    take_turn = opened.turns(
        images.numpy(), [TimedBatch(8, 4), TimedBatch(0, 4, longest=True)], opened, 2, TimingProtocol()
    )
    assert len(take_turn(True).ratios) == 2


def test_turns_get_the_images_that_they_need(monkeypatch) -> None:
    images = np.arange(40, dtype=np.float32).reshape(10, 1, 2, 2)
    batches = [TimedBatch(4, 2), TimedBatch(8, 2, longest=True)]
    assert _needed(images, batches, 3)[1] == batches
    monkeypatch.setattr("evaluators.runtimes.remote.runtime.SMALL_BYTES", 0)
    some, moved = _needed(images, batches, 3)
    np.testing.assert_array_equal(some[:3], images[:3])
    for before, after in zip(batches, moved, strict=True):
        np.testing.assert_array_equal(
            some[after.start : after.start + after.count], images[before.start : before.start + before.count]
        )
        assert before.longest == after.longest
        assert after.follows is None


def test_a_frame_crosses_the_network_with_its_key_frame(monkeypatch) -> None:
    images = np.arange(40, dtype=np.float32).reshape(10, 1, 2, 2)
    batches = [
        TimedBatch(4, 1, False, PrecedingKeyFrame(2, 2, 0.5, 30)),
        TimedBatch(9, 1, True, PrecedingKeyFrame(8, 1, 0.5, 30)),
    ]
    monkeypatch.setattr("evaluators.runtimes.remote.runtime.SMALL_BYTES", 0)
    some, moved = _needed(images, batches, 1)
    assert len(some) == 5
    for before, after in zip(batches, moved, strict=True):
        np.testing.assert_array_equal(some[after.start], images[before.start])
        np.testing.assert_array_equal(some[after.follows.key], images[before.follows.key])
        assert replace(after.follows, key=before.follows.key) == before.follows
        assert after.longest == before.longest


def test_frames_take_turns_on_a_board(board, builder, network, space, images) -> None:
    opened = opened_dense(board, builder, network, space)
    reused, computed = PrecedingKeyFrame(2, 1, 1e9, 30), PrecedingKeyFrame(2, 1, 0.0, 30)
    batches = [TimedBatch(3, 1, follows=reused), TimedBatch(3, 1, follows=computed)]
    take_turn = opened.turns(images.numpy(), batches, opened, 1, TimingProtocol())
    again, fresh = np.median([take_turn(index % 2 == 0).ratios for index in range(15)], axis=0)
    assert 0 < again < fresh


def test_the_worker_tells_what_is_inside_a_file(builder, network, space, images, tmp_path) -> None:
    (stage,) = builder.build(network, space.candidate(space.uniform(1.0, "int8"))).deployed
    pictures = io.BytesIO()
    np.save(pictures, images.numpy())
    worker = Worker(OnnxRuntime(), tmp_path)
    put = [
        {"id": 1, "do": "put", "data": base64.b64encode(content).decode()} for content in (stage, pictures.getvalue())
    ]
    file, batch = (worker.handle(request)["ok"]["digest"] for request in put)
    for _ in range(2):
        answer = worker.handle({"id": 2, "do": "tensors", "stage": file, "images": batch})["ok"]
        found = np.load(io.BytesIO(base64.b64decode(answer["npz"])))
        np.testing.assert_array_equal(found["logits"], OnnxRuntime().tensors(stage)(images.numpy())["logits"])
