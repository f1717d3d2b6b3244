"""Streams: crops that move over real pictures, a user's own, and a search whose inputs are frames."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.data import LabelledImages, Splits
from evaluators.inference.frame_reuse import Reuse
from evaluators.streams import KEY_FRAMES, Stream
from search.cli import run
from search.config.study import FramesSection, Study, StudyError
from search.loading.streams import CLIP, NOISE, crop_at, moving_crops, with_streams
from search.loading.user_code import UserCodeError
from search.pipeline.pipeline import build_pipeline
from tests.helpers import tiny
from tests.helpers.searches import stored

STUDY = tiny.STUDY.replace(', "size<80%"', "").replace(
    "target = {batch = 4}", "frames = {frames = 300, highest_threshold = 1.0, max_age = 20}"
)


def smooth_images(count: int, size: tuple[int, int] = (16, 24)) -> LabelledImages:
    """Returns pictures of one colour each, brighter from picture to picture, so that a crop tells its picture."""
    images = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, *size), np.float32)
    return LabelledImages(images, np.arange(count) % 5)


def own_stream(split: str) -> tuple[np.ndarray, list[int], list[int]]:
    part = getattr(tiny.splits(), split)
    return part.images[:10], part.labels[:10].tolist(), [0, 4]


def wrong_shape(split: str) -> tuple[np.ndarray, list[int], list[int]]:
    return np.zeros((3, 1, 4, 4), np.float32), [0, 0, 0], [0]


def late_clip(split: str) -> tuple[np.ndarray, list[int], list[int]]:
    return np.zeros((3, 1, 8, 8), np.float32), [0, 0, 0], [1]


def no_triple(split: str) -> np.ndarray:
    return np.zeros((3, 1, 8, 8), np.float32)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 120), st.integers(1, 8), st.integers(0, 2**20))
def test_frames_have_the_inputs_size_and_the_label_of_what_they_show(frames, count, seed) -> None:
    images = smooth_images(count)
    stream = moving_crops(images, frames, seed)
    assert stream.images.shape == (frames, 3, 16, 24)
    assert stream.images[:].dtype == np.float32
    shown = np.rint(stream.images[:].mean(axis=(1, 2, 3))).astype(int)
    np.testing.assert_array_equal(stream.labels, shown % 5)
    np.testing.assert_array_equal(np.flatnonzero(np.diff(stream.clips)) + 1, stream.starts[1:])
    lengths = np.diff([*stream.starts, frames])
    assert all(CLIP[0] <= length <= CLIP[1] for length in lengths[:-1])
    first = shown[stream.starts]
    assert len(set(first[:count])) == len(first[:count]), "all are shown before one is shown again"


def test_a_seed_makes_one_stream(pipeline) -> None:
    images = pipeline.data.validation
    one, again, other = (moving_crops(images, 90, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.images[:], again.images[:])
    np.testing.assert_array_equal(one.labels, again.labels)
    assert one.digest == again.digest != other.digest


def test_frames_that_are_made_on_demand_are_the_same(pipeline, monkeypatch) -> None:
    kept = moving_crops(pipeline.data.validation, 90, 5)
    monkeypatch.setattr("search.loading.streams.SMALL_BYTES", 0)
    lazy = moving_crops(pipeline.data.validation, 90, 5)
    assert not isinstance(lazy.images, np.ndarray)
    np.testing.assert_array_equal(lazy.images[np.array([70, 3])], kept.images[[70, 3]])
    np.testing.assert_array_equal(lazy.thumbnails, kept.thumbnails)
    reuse = Reuse(0.5, 30)
    np.testing.assert_array_equal(lazy.key_frames(reuse), kept.key_frames(reuse))


def test_a_clip_moves_a_little_from_frame_to_frame_and_sometimes_stands_still() -> None:
    ramp = np.tile(np.arange(64, dtype=np.float32), (64, 1))[None, None]
    stream = moving_crops(LabelledImages(ramp, np.zeros(1, np.int64)), 400, 0)
    columns = stream.images[:, :, 16:48, 31:33].mean(axis=(1, 2, 3))  # in the middle a brightness is a place
    noise = NOISE * float(np.std(ramp)) / 8
    within = np.delete(np.abs(np.diff(columns)), stream.starts[1:] - 1)
    assert np.quantile(within, 0.2) < 3 * noise, "still, but for the noise"
    assert 3 * noise < np.quantile(within, 0.9) < 64 * 0.04


def test_a_crop_between_pixels_is_interpolated() -> None:
    image = np.arange(25, dtype=np.float32).reshape(1, 5, 5)
    np.testing.assert_array_equal(crop_at(image, np.array([1.0, 2.0]), (2, 2)), image[:, 1:3, 2:4])
    np.testing.assert_allclose(crop_at(image, np.array([0.5, 0.25]), (1, 1)), [[[2.75]]])


def test_validation_and_test_streams_show_other_pictures() -> None:
    splits = tiny.splits()
    streams = with_streams(FramesSection(frames=60), splits)
    assert isinstance(streams.validation, Stream)
    assert isinstance(streams.test, Stream)
    assert streams.validation.digest != streams.test.digest
    assert streams.train is splits.train
    assert with_streams(None, splits) is splits


def test_a_stream_of_ones_own() -> None:
    found = with_streams(FramesSection(source="tests.search.test_streams:own_stream"), tiny.splits())
    assert isinstance(found, Splits)
    np.testing.assert_array_equal(found.test.images[:], tiny.splits().test.images[:10])
    np.testing.assert_array_equal(found.validation.starts, [0, 4])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong_shape", r"frames are \(1, 8, 8\) as other images are, got \(1, 4, 4\)"),
        ("late_clip", "clips start at frame 0"),
        ("no_triple", "labels .* and clip starts, got ndarray from"),
    ],
)
def test_what_is_no_stream_is_one_clear_line(name, words) -> None:
    with pytest.raises(UserCodeError, match=words) as error:
        with_streams(FramesSection(source=f"tests.search.test_streams:{name}"), tiny.splits())
    assert "\n" not in str(error.value)


def test_frames_come_one_at_a_time(cache) -> None:
    study = Study.parse(tiny.STUDY + "frames = {}\n", "test")
    with pytest.raises(StudyError, match=r"one at a time, got target.batch = 4; set it to 1"):
        build_pipeline(study, lambda *_: None)


def test_a_study_tells_its_frames_in_a_file_of_its_own() -> None:
    study = Study.parse(STUDY.replace("frames = {", 'frames = {source = "mine.py:film", '), "test", Path("/there"))
    assert study.frames is not None
    assert study.frames.source == "/there/mine.py:film"
    assert Study.parse(study.to_toml(), "again") == study
    assert Study.parse(tiny.STUDY, "test").frames is None
    with pytest.raises(StudyError, match=r"frames\.max_age is at least 2, got 1"):
        Study.parse(STUDY.replace("max_age = 20", "max_age = 1"), "test")


def test_a_search_over_frames_is_picked_and_deployed(cache, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    assert run(["--study", "./study.toml", "--search", "one", "--runs", "runs", "--trials", "8"]) == 0
    printed = capsys.readouterr()
    assert "thresholds of exits are searched, not solved" in " ".join((printed.out + printed.err).split())
    search = stored(tmp_path / "runs")
    shares = {version.measured["accuracy"].notes[KEY_FRAMES] for version in search.versions if version.is_complete}
    assert search.baseline.evaluation.measurements["accuracy"].notes[KEY_FRAMES] == 1
    assert min(shares) < 1
    assert run(["front", "--runs", "runs", "--search", "one", "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(",key_frames_pct")
    where = ["--runs", "runs", "--search", "one", "--budget", "latency<9000%"]
    assert run(["pick", *where, "--prefer", "flops", "--out", "deploy"]) == 0
    description = json.loads((tmp_path / "deploy" / "bundle.json").read_text())
    assert description["frames"]["max_age"] == 20
    assert description["frames"]["threshold"] > 0
    capsys.readouterr()
    assert run(["measure", "deploy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correct"] == found["expected"] == description["check"]["correct"]
    assert found["latency_s"] > 0
    _check_bundle(tmp_path / "deploy", description, tmp_path)


def _check_bundle(bundle: Path, description: dict, folder: Path) -> None:
    """Checks what a bundle says of its own stream, of one that is given, and of images that come alone."""
    own = _ran(bundle)
    assert f"accuracy: {description['check']['correct'] / 300:.4%}" in own
    assert "of them key frames" in own
    with np.load(bundle / "check.npz") as check:
        images, labels = check["images"], check["labels"]
    np.savez(folder / "still.npz", images=np.repeat(images[:1], 40, axis=0), labels=np.repeat(labels[:1], 40))
    still = _ran(bundle, "--stream", str(folder / "still.npz"))
    assert "40 frames, 5.0% of them key frames" in still, "two of forty at a maximal age of 20"
    assert "worst" in still
    assert "key frames" not in _ran(bundle, str(folder / "still.npz"))
    reuse = Reuse(**description["frames"])
    computed = Stream(images, labels, np.zeros(1, np.int64)).key_frames(reuse) == np.arange(len(images))
    assert f"{computed.mean():.1%} of them key frames" in own


def _ran(bundle: Path, *arguments: str) -> str:
    command = [sys.executable, "-I", str(bundle / "run.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=os.sep)
    assert done.returncode == 0, done.stderr
    return done.stdout
