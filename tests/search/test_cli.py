"""Mistakes: one line, exit code 2, nothing written."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from search.cli import run
from tests.helpers import tiny


@pytest.fixture
def study(tmp_path: Path) -> Path:
    file = tmp_path / "study.toml"
    file.write_text(tiny.STUDY)
    return file


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "latency"], ["redirect", "latency=5ms"]),
        (["--budget", "latncy<5ms"], ["did you mean 'latency'"]),
        (["--budget", "latency<5"], ["us, ms, s"]),
        (["--budget", "latency<-5ms"], ["above 0"]),
        (["--study", "digitz"], ["'digitz'", "digits"]),
        (["--study", "no/such/study.toml"], ["existing study.toml"]),
        (["--model", "torchvision:resnet18"], ["no --data", "add --data"]),
        (["--data", "cifar10:/data"], ["no --model"]),
        (["--model", "torchvision:resnet18", "--data", "cifar10:/data"], ["--budget", "latency<50%"]),
        (["--model", "resnet18", "--data", "cifar10:/data"], ["torchvision:NAME", "'resnet18'"]),
        (["--model", "torchvision:resnet18", "--data", "cifar10"], ["imagefolder:PATH", "'cifar10'"]),
        (["--weights", "net.pt", "--study", "digits", "--runs", "/dev/null"], ["/dev/null"]),
        (["--batch", "0"], ["--batch"]),
        (["init"], ["FOLDER"]),
        (["--sampler", "tpee"], ["did you mean 'tpe'"]),
        (["--sampler", "foo"], ["is one of ehvi, tpe, nsga2, gp, random or package.module:attribute, got 'foo'"]),
        (["--target", "abacus"], ["onnxruntime", "tensorrt", "doctor"]),
        (["--target", "ssh://"], ["ssh://[user@]host"]),
        (["--trials", "0"], ["--trials"]),
        (["--exit-thresholds", "middle"], ["solved or searched", "'middle'"]),
        (["--gates", "middle"], ["solved or searched", "'middle'"]),
        (
            ["--search-only", "chanels"],
            ["--search-only takes at least one of channels", "did you mean 'channels'?), got 'chanels'; leave it"],
        ),
        (["--search-only", "zoom,exits"], ["masks, patterns, frames, size, got 'zoom,exits'"]),
        (["--search-only", ","], ["at least one of channels", "got ','"]),
        (
            ["--objectives", "accuracy,flop"],
            ["accuracy and at least one of latency, flops, params, size (did you mean 'flops'?), got 'accuracy,flop'"],
        ),
        (["--objectives", "accuracy,energy"], ["latency, flops, params, size, got", "leave it out for accuracy and"]),
        (["--objectives", "latency,flops"], ["--objectives takes accuracy and at least one of"]),
        (["--objectives", "accuracy"], ["at least one of latency", "got 'accuracy'"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["no-such-command"], ["no-such-command"]),
        (["front"], ["no search in"]),
        (["front", "--search", "nothing"], ["journal.log"]),
        (["--budget", "latency<1ms", "pick"], ["come after its name", "--budget"]),
        (["--runs", "elsewhere", "front"], ["come after its name", "--runs"]),
        (["front", "--json", "--csv"], ["--json", "--csv"]),
        (["pick", "--prefer", "beauty"], ["knee", "'beauty'"]),
        (["pick", "--prefer", "macs"], ["'macs'", "flops = MACs"]),
        (["pick", "--finetune", "long"], ["10epochs", "'long'"]),
        (["report", "--out", "page.pdf"], ["page.pdf", ".html or .md"]),
        (["measure", "nothing"], ["no bundle.json"]),
        (["doctor", "--target", "abacus"], ["onnxruntime", "'abacus'"]),
        (["diagnose", "--against-target", "abacus"], ["onnxruntime", "'abacus'"]),
        (["compare", "one", "two"], ["journal.log", "one"]),
        (["--objectives", "accuracy,fps"], ["latency = batch / rate"]),
        (
            ["--data", "imagefolder:/my", "flowers"],
            ["'flowers'", "quoted: 'imagefolder:/my flowers'"],
        ),
        (["front", "--runs", "my", "runs"], ["(runs)", "quoted: 'my runs'"]),
        (["init", "my", "study"], ["(study)", "quoted: 'my study'"]),
        (["pick"], ["no search in"]),
        (["ui"], ["no search in"]),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, words, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    written = capsys.readouterr()
    assert written.err.startswith("error: ")
    assert written.err.count("\n") == 1
    for word in words:
        assert word in written.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("trials = 12", "trials = 0"), ["search.trials", "0"]),
        (('name = "tiny"', ""), ["name"]),
        (("epochs = 4", "epoks = 4"), ["epoks"]),
        (("latency<1000%", "latency<1000"), ["us, ms, s, %"]),
        (('"tests.helpers.tiny:network"', '"tests.helpers.tiny"'), ["a model is torchvision:NAME"]),
        (('"tests.helpers.tiny:network"', '"tests.helpers.tiny:nothing"'), ["tests.helpers.tiny:nothing"]),
        (('"tests.helpers.tiny:network"', '"tests.nowhere:network"'), ["tests.nowhere"]),
        (('"tests.helpers.tiny:network"', '"tests.helpers.tiny:no_network"'), ["broken on purpose"]),
        (('"tests.helpers.tiny:network"', '"tests.helpers.tiny:splits"'), ["torch.nn.Module", "Splits"]),
        (('"tests.helpers.tiny:splits"', '"tests.helpers.tiny:network"'), ["evaluators.data.Splits"]),
        (('"tests.helpers.tiny:splits"', '"tests.helpers.tiny:no_network"'), ["broken on purpose"]),
        (('name = "tiny"', 'name = "tiny'), ["TOML"]),
        (('name = "tiny"', 'name = "ti ny"'), ["name is letters, digits, - and _", "'ti ny'"]),
        (("epochs = 4", "epoks = 4"), ["[training] has no key 'epoks'", "did you mean 'epochs'?"]),
        (("epochs = 4", 'epochs = "four"'), ["training.epochs is a number", "'four'"]),
        (("batch = 50", "batch = 1.5"), ["training.batch is a whole number", "1.5"]),
        (("trials = 12", "trials = 0"), ["search.trials is at least 1, got 0; leave it out for 100"]),
        (("learning_rate = 0.05", "learning_rate = inf"), ["training.learning_rate is a finite number"]),
        (
            ('level = "bn"', 'level = "full"'),
            ["recovery.level is one of none, bn, finetune, elastic", "leave it out for 'elastic'"],
        ),
        (('after = ["pool"]', 'after = "pool"'), ["exits.after is a list in brackets", "'pool'"]),
        (("target = {batch = 4}", "target = 4"), ["target is a section with keys"]),
        (("model.source", "model.factory"), ["[model] has no key 'factory'", "source, weights"]),
        (("search = {trials = 12}", 'space = {only = ["pecision"]}'), ["did you mean 'precision'"]),
        (("search = {trials = 12}", "space = {only = []}"), ["space.only is at least one of channels"]),
        (("search = {trials = 12}", 'space = {precision = "int9"}'), ["space.precision is", "'int8'", "'int9'"]),
        (('["latency<1000%", "size<80%"]', '"latency<1000%"'), ["budget is a list in brackets", "'latency<1000%'"]),
        (('["latency<1000%", "size<80%"]', "[5]"), ["budget is a text in quotes", "[5]"]),
        (("target = {", "targets = {"), ["a study has no key 'targets'", "did you mean 'target'?"]),
    ],
)
def test_a_mistake_in_a_study_names_its_place(change, words, study, tmp_path, capsys, cache) -> None:
    study.write_text(tiny.STUDY.replace(*change))
    assert run(["--study", str(study), "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_directory_that_cannot_be_written_is_named(study, tmp_path, capsys, cache) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert run(["--study", str(study), "--runs", str(tmp_path / "file")]) == 2
    assert "writable" in capsys.readouterr().err


def test_a_target_that_is_not_installed_says_how_to_get_it(tmp_path, capsys, monkeypatch) -> None:
    from evaluators.runtimes.tensorrt_gpu.runtime import TensorRT

    reason = TensorRT.missing()
    if reason is None:
        pytest.skip("TensorRT and a GPU are here")
    monkeypatch.chdir(tmp_path)
    assert run(["--target", "tensorrt"]) == 2
    error = capsys.readouterr().err
    assert " ".join(reason.split()) in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_named(tmp_path, capsys) -> None:
    from search.results.store import SearchFolder

    folder = SearchFolder(tmp_path / "one")
    with folder.lock():
        folder.create()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["ui", "--runs", str(tmp_path), "--port", str(port)]) == 2
    assert f"{port}, which is in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["--budget", "latency"], 2),
        (["--sampler", "tpee"], 2),
        (["--target", "abacus"], 2),
        (["--model", "torchvision:resnet18", "--data", "cifar10:/data"], 2),
        (["front", "--search", "nothing"], 2),
        (["compare", "nothing", "7"], 2),
        (["pick", "--prefer", "beauty"], 2),
        (["pick", "--finetune", "long"], 2),
        (["profile", "--study", "digitz"], 2),
        (["diagnose", "--study", "digitz"], 2),
        (["measure", "nothing"], 2),
        (["doctor", "--target", "abacus"], 2),
    ],
)
def test_what_needs_nothing_heavy_answers_without_it(arguments, code) -> None:
    script = (
        f"import sys; from search.cli import run; code = run({arguments!r});"
        "heavy = {'torch', 'optuna', 'mlflow', 'numpy'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == code


def test_the_version_is_told(capsys) -> None:
    assert run(["--version"]) == 0
    assert re.fullmatch(r"deployfront (\d+\.\d+\.\d+\S*|from source)\n", capsys.readouterr().out)


def test_what_the_demo_is_and_how_it_is_stopped_is_said_first(tmp_path, capsys) -> None:
    command = ["--sampler", "abacus", "--runs", str(tmp_path)]
    assert run([*command, "--trials", "7"]) == 2
    said = capsys.readouterr().out
    assert said.startswith("This is the demo, study scenes, because no --model, --data or --study is given")
    assert "7 trials" in said
    assert "Ctrl-C stops it" in said
    for more in (["--quiet"], ["--study", "digits"]):
        assert run([*command, *more]) == 2
        assert capsys.readouterr().out == ""


def test_doctor_tells_what_each_target_can_do(capsys) -> None:
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("onnxruntime", "fp32", "int8", "tensorrt", "torch"):
        assert word in text


def test_an_interrupt_before_the_first_trial_says_that_the_same_command_goes_on(tmp_path, capsys) -> None:
    (tmp_path / "stopping.py").write_text("def build():\n    raise KeyboardInterrupt\n")
    study = tmp_path / "study.toml"
    study.write_text(tiny.STUDY.replace("tests.helpers.tiny:network", "stopping.py:build"))
    assert run(["--study", str(study), "--runs", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
