"""Bundles: picked, run in a bare interpreter, measured again, damaged."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from evaluators.bundle import run as run_bundle
from evaluators.bundle.manifest import DeploymentTarget, Manifest
from evaluators.inference import inputs
from search.cli import run
from search.loading.image_store import Preprocessing


def test_the_bundle_answers_as_measured_in_a_bare_interpreter(folder, tmp_path, capsys, pipeline) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    text = capsys.readouterr().out
    assert "measured again" in text
    names = {file.name for file in out.iterdir()}
    needed = {"candidate.json", "evaluation.json", "study.toml", "environment.json", "run.py", "bundle.json"}
    assert needed <= names
    assert "__pycache__" not in names
    evaluation = json.loads((out / "evaluation.json").read_text())
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(out, elsewhere)
    script = (
        "import sys, runpy\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx', 'search', 'evaluators', 'spaces'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Bare())\n"
        "sys.argv = ['run.py']\n"
        f"runpy.run_path({str(elsewhere / 'run.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = evaluation["confirmed"]["test_accuracy"]["value"]
    assert f"accuracy: {accuracy:.4%}" in done.stdout
    assert json.loads((out / "bundle.json").read_text())["check"]["images"] == len(pipeline.data.test)
    # A second pick may replace it; something else in the way may not be.
    assert run(["pick", *arguments]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert run(["pick", *arguments[:-1], str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_a_bundle_is_measured_again(folder, tmp_path, capsys) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    capsys.readouterr()
    assert run(["measure", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correct"] == found["expected"]
    confirmed = json.loads((out / "evaluation.json").read_text())["confirmed"]["latency"]
    assert found["protocol"] == confirmed["protocol"], "by the same clock, beside the same reference"
    assert "calls back to back" in found["protocol"]
    assert 0 < found["latency_s"] <= found["percentiles"]["p99"]
    assert found["latency_s"] == pytest.approx(confirmed["value"], rel=0.5)
    assert run(["measure", str(out)]) == 0
    assert "check images" in capsys.readouterr().out
    assert run(["measure", str(tmp_path)]) == 2
    assert "bundle.json" in capsys.readouterr().err


def test_a_bundle_without_a_reference_is_told_by_this_machines_clock(folder, tmp_path, capsys) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    description = json.loads((out / "bundle.json").read_text())
    older = {name: value for name, value in description.items() if name not in ("reference", "leaving")}
    (out / "bundle.json").write_text(json.dumps(older))
    capsys.readouterr()
    assert run(["measure", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "its own first file" in found["protocol"]
    assert any("the bundle brings no reference" in remark for remark in found["remarks"])
    elsewhere = {**description, "target": {**description["target"], "device": "another CPU"}}
    (out / "bundle.json").write_text(json.dumps(elsewhere))
    assert run(["measure", str(out)]) == 0
    assert "picked for onnxruntime on another CPU" in capsys.readouterr().out


def test_a_bundle_with_engines_falls_back_where_they_cannot_run(folder, tmp_path) -> None:
    from evaluators.runtimes.remote.connection import worker_file

    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    (out / "runtime.pyz").write_bytes(worker_file())
    (out / "engines.json").write_text(json.dumps({"engines": [{"file": "none.engine", "source": "x", "results": []}]}))
    # In isolated mode nothing of this project can be imported but what the bundle brings.
    command = [sys.executable, "-I", "-S", "-c", "import sys; sys.path += eval(sys.argv.pop(1)); sys.argv.pop(0);"]
    command[-1] += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    packages = [path for path in sys.path if path.endswith("site-packages")]
    done = subprocess.run(
        [*command, repr(packages), str(out / "run.py")], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "the engines cannot be used here" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_a_bundle_lacks_is_one_clear_line(folder, tmp_path) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0

    def refused(*given: str) -> str:
        done = subprocess.run(
            [sys.executable, str(out / "run.py"), *given], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stdout
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "nosuchfile" in refused("nosuchfile")
    (tmp_path / "text.npz").write_text("no images")
    assert "text.npz" in refused(str(tmp_path / "text.npz"))
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    assert "images" in refused(str(tmp_path / "other.npz"))
    np.save(tmp_path / "small.npy", np.zeros((2, 1, 3, 3), np.float32))
    assert "(2, 1, 3, 3)" in refused(str(tmp_path / "small.npy"))
    stage = json.loads((out / "bundle.json").read_text())["deployed"][-1]
    (out / stage).write_bytes(b"torn")
    refused()
    (out / stage).unlink()
    assert stage in refused()
    assert run(["measure", str(out)]) == 2


def test_a_bundle_classifies_in_three_lines_of_python(folder, tmp_path, pipeline) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    np.save(tmp_path / "one.npy", pipeline.data.test.images[:1])
    np.save(tmp_path / "two.npy", pipeline.data.test.images[:2])
    Image.new("L", (8, 8)).save(tmp_path / "dog.png")
    network = run_bundle.load(out)
    logits, _ = network(pipeline.data.test.images[:1])
    assert network.classify(tmp_path / "one.npy") == pipeline.data.names[int(logits.argmax())]
    for refused, words in (
        (tmp_path / "two.npy", "one picture is classified at a time, got 2 in"),
        (tmp_path / "dog.png", "this bundle's data came preprocessed"),
        (np.zeros((1, 1, 8, 8), np.float32), r"a picture is named by its file, got ndarray; call network\(images\)"),
    ):
        with pytest.raises(ValueError, match=words):
            network.classify(refused)
    description = json.loads((out / "bundle.json").read_text())
    as_trained = {"size": 8, "resize": 8, "mean": [0.5], "std": [0.5], "interpolation": "BILINEAR"}
    (out / "bundle.json").write_text(json.dumps(description | {"preprocessing": as_trained}))
    script = "from deploy.run import load\nnetwork = load('deploy')\nprint(network.classify('dog.png'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() in pipeline.data.names, done.stderr
    no_pillow = f"import sys; sys.modules['PIL'] = None\n{script}"
    done = subprocess.run([sys.executable, "-c", no_pillow], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "a picture needs pillow" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (np.zeros((2, 1, 8, 9), np.float32), "float32 (2, 1, 8, 9)"),
        (np.zeros((1, 8, 8), np.float32), "float32 (1, 8, 8)"),
        (np.zeros((1, 8, 8, 1), np.float32), "float32 (1, 8, 8, 1)"),
        (np.zeros((1, 1, 8, 8), np.uint8), "uint8 (1, 1, 8, 8)"),
        (np.zeros((1, 1, 8, 8)), "float64 (1, 1, 8, 8)"),
        ([[0.0] * 8] * 8, "list"),
        ("dog.png", "str"),
    ],
)
def test_other_shapes_and_types_are_refused_in_one_line(images, got) -> None:
    shaped = Manifest(deployed=(), target=DeploymentTarget(), image_shape=(1, 8, 8))
    network = run_bundle.Classifier(lambda images: pytest.fail("it is not asked"), shaped)
    with pytest.raises(ValueError, match=re.escape(f"images are a float32 array (n, 1, 8, 8), got {got}")):
        network(images)


def test_a_bundle_that_was_damaged_says_so(folder, tmp_path) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    description = json.loads((out / "bundle.json").read_text())
    description["check"]["correct"] -= 1
    (out / "bundle.json").write_text(json.dumps(description))
    done = subprocess.run([sys.executable, str(out / "run.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 1


def test_a_bundle_shows_who_leaves_where(folder, tmp_path, pipeline) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    images = pipeline.data.test.images[:]
    few = tmp_path / "few"
    few.mkdir()
    np.save(few / "a.npy", images[0])
    np.savez(few / "b.npz", images=images[1:4], labels=pipeline.data.test.labels[1:4])

    def told(*given: str) -> list[str]:
        done = subprocess.run([sys.executable, str(out / "run.py"), *given], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    names = [*json.loads((out / "bundle.json").read_text())["exits"], "end"]
    shown = [line.split() for line in told(str(few)) if " class " in line]
    assert [line[0] for line in shown] == ["a.npy:", "b.npz[0]:", "b.npz[1]:", "b.npz[2]:"]
    assert {line[-1] for line in shown} <= set(names)
    assert {line[3] for line in shown} <= {"top,", "upper,", "lower,", "bottom,"}, "classes are called by their names"
    assert not [line for line in told() if " class " in line], "many are not shown one by one"
    assert len([line for line in told("--show") if " class " in line]) == len(images)
    first, *rest = told("--stats", str(few))
    assert first.startswith("4 images of 2 files")
    counts = {line.split(":")[0].strip(): int(line.split("(")[1].rstrip(")")) for line in rest}
    assert counts == {name: sum(line[-1] == name for line in shown) for name in names}
    (tmp_path / "empty").mkdir()
    refused = subprocess.run(
        [sys.executable, str(out / "run.py"), "--stats", str(tmp_path / "empty")], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert ".npz" in refused.stderr


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16", "CMYK"])
@pytest.mark.parametrize(("size", "resize", "channels"), [(8, 8, 1), (8, 11, 3), (8, 20, 3)])
def test_a_bundle_prepares_pictures_as_the_search_did(mode, size, resize, channels, tmp_path) -> None:
    rng = np.random.default_rng(0)
    how = Preprocessing(size, resize, (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels], "BICUBIC")
    grey = rng.integers(0, 65536, (13, 17)).astype(np.uint16)
    image = Image.fromarray(grey if mode == "I;16" else rng.integers(0, 256, (13, 17, 3)).astype(np.uint8))
    file = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    (image if mode == "I;16" else image.convert(mode)).save(file, exif=turned)
    with Image.open(file) as opened:
        wanted = how.normalised(how.pixels(opened)[None])
    np.testing.assert_allclose(inputs.picture(file, asdict(how)), wanted, atol=1e-6)


def test_measure_reads_what_lies_in_the_bundle_and_says_what_is_broken(folder, tmp_path, capsys) -> None:
    out = tmp_path / "deploy"
    arguments = ["--runs", str(folder), "--search", "one", "--budget", "latency<1000%", "--out", str(out)]
    assert run(["pick", *arguments]) == 0
    manifest = json.loads((out / "bundle.json").read_text())
    files = {out / name: b"" for name in manifest["deployed"]}
    files[out / "check.npz"] = b"PK torn"
    files[out / "bundle.json"] = json.dumps(manifest | {"thresholds": [0.5] * 7}).encode()
    for file, broken in files.items():
        whole = file.read_bytes()
        file.write_bytes(broken)
        capsys.readouterr()
        assert run(["measure", str(out)]) == 2, file.name
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: "), line
        file.write_bytes(whole)
    assert run(["measure", str(out)]) == 0
