import hashlib
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.data import LabelledImages
from search.config.overrides import Request
from studies.digits.data import splits as digit_splits
from studies.digits.model import resnet20
from studies.scenes.composition import SMALLEST, Drawings, compose
from studies.scenes.data import COUNTS, SEEDS, augment, scenes, splits

SPLITS = tuple(COUNTS)


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    return digit_splits(8).calibration


@pytest.fixture(scope="module")
def some(digits):
    return compose(digits, 300, seed=5)


def test_the_default_study_asks_about_scenes() -> None:
    study = Request().to_study()
    assert study.name == "scenes"
    assert study.data.source == "studies.scenes.data:splits"
    assert Request(study="digits").to_study().data.source == "studies.digits.data:splits"


def test_splits_have_enough_scenes_of_every_class() -> None:
    data = splits()
    choosing = Request().to_study().exits.choose_on
    assert len(data.validation) - choosing >= 2000, "what scores versions beside what chooses thresholds"
    for split in SPLITS:
        part = getattr(data, split)
        counts = np.bincount(part.labels, minlength=data.classes)
        assert counts.sum() == COUNTS[split]
        assert counts.max() - counts.min() <= 1
        assert part.images.shape == (COUNTS[split], 1, 48, 48)
        assert part.images.min() >= 0
        assert part.images.max() <= 1


def test_no_digit_is_in_two_splits() -> None:
    data = digit_splits(8)
    seen = [{image.tobytes() for image in getattr(data, split).images} for split in SPLITS]
    assert sum(len(part) for part in seen) - len(set().union(*seen)) <= 1  # two scans of the set are equal


def test_a_split_is_made_of_its_own_digits_alone() -> None:
    own = digit_splits(8)
    for split in SPLITS:
        expected = compose(getattr(own, split), 10, SEEDS[split])
        assert np.array_equal(scenes(split, 10).images, expected.images)


def test_the_digit_and_the_clutter_come_from_the_given_digits() -> None:
    """Digits without any ink give scenes without any."""
    blank = LabelledImages(np.zeros((10, 1, 8, 8), np.float32), np.arange(10))
    made = compose(blank, 40, seed=0)
    assert not made.masks.any()
    assert (made.boxes == 0).all()
    assert made.images.max() < 0.5


def test_a_seed_gives_the_same_pixels(digits, some) -> None:
    again, other = compose(digits, 300, seed=5), compose(digits, 300, seed=6)
    for field in fields(some):
        assert np.array_equal(getattr(again, field.name), getattr(some, field.name))
    assert not np.array_equal(other.images, some.images)


def test_pixels_are_the_same_on_every_platform(some) -> None:
    steps = np.round(some.images * 255).astype(np.uint8)
    assert np.array_equal(some.images, steps / np.float32(255)), "brightness is rounded to steps of 1/255"
    assert hashlib.sha256(steps.tobytes()).hexdigest()[:16] == "7e4760d0c88e6205"


@given(count=st.integers(1, 40), size=st.integers(SMALLEST, 64), seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_scenes_have_the_shapes_and_ranges_that_are_promised(digits, count, size, seed) -> None:
    made = compose(digits, count, seed, size)
    assert len(made) == count
    assert made.images.shape == (count, 1, size, size)
    assert made.images.dtype == np.float32
    assert made.masks.shape == (count, size, size)
    assert made.boxes.shape == (count, 4)
    assert ((made.difficulty >= 0) & (made.difficulty <= 1)).all()
    counts = np.bincount(made.labels, minlength=10)
    assert counts.max() - counts.min() <= 1


def test_boxes_are_the_bounds_of_the_masks(some) -> None:
    for mask, (top, left, bottom, right) in zip(some.masks, some.boxes, strict=True):
        rows, columns = np.nonzero(mask)
        assert (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1) == (top, left, bottom, right)


def test_masks_are_where_the_digit_is_seen(some) -> None:
    brighter = [
        image[0][mask].mean() - image[0][~mask].mean() for image, mask in zip(some.images, some.masks, strict=True)
    ]
    assert min(brighter) > 0
    easy = some.difficulty < 0.1
    bright, masks = some.images[easy, 0] > 0.3, some.masks[easy]
    assert (bright & masks).sum() > 0.9 * masks.sum(), "the digit's strokes are bright"
    assert (bright & ~masks).sum() < 0.1 * (~masks).sum(), "and little else is"


def test_the_digit_is_in_the_scene_as_large_as_its_difficulty_allows(some) -> None:
    heights = some.boxes[:, 2] - some.boxes[:, 0]
    assert heights[some.difficulty < 0.2].mean() > 1.4 * heights[some.difficulty > 0.8].mean()
    assert heights.min() >= 8


def test_hard_scenes_are_noisier_and_more_cluttered(some) -> None:
    outside = [image[0][~mask].std() for image, mask in zip(some.images, some.masks, strict=True)]
    contrast = [
        image[0][mask].mean() - image[0][~mask].mean() for image, mask in zip(some.images, some.masks, strict=True)
    ]
    ratio = np.array(contrast) / np.array(outside)
    assert ratio[some.difficulty < 0.2].mean() > 2 * ratio[some.difficulty > 0.8].mean()


def test_a_drawing_is_placed_turned_and_enlarged_as_it_says() -> None:
    cells = np.zeros((1, 8, 8), np.float32)
    cells[0, 1, 3:5] = 1  # above the middle, where its turn by a right angle is beside it

    def middle_of(turn: float, scale: float) -> tuple[float, float]:
        values = [np.array([value], np.float32) for value in (scale, turn)]
        middle, place = np.array([[3.5, 3.5]], np.float32), np.array([[30, 20]], np.float32)
        drawn = Drawings(cells, middle, *values, place).drawn(48)[0]
        rows, columns = np.nonzero(drawn > 0.5)
        return rows.mean(), columns.mean()

    assert middle_of(0, 4) == pytest.approx((30 - 2.5 * 4, 20), abs=0.51)
    assert middle_of(0, 2) == pytest.approx((30 - 2.5 * 2, 20), abs=0.51)
    turned = middle_of(np.pi / 2, 4)
    assert turned[0] == pytest.approx(30, abs=0.51)
    assert abs(turned[1] - 20) == pytest.approx(10, abs=0.51)


def test_what_cannot_be_composed_is_told(digits) -> None:
    with pytest.raises(ValueError, match=r"^scenes are at least 36 pixels .*, got 20; "):
        compose(digits, 10, 0, size=20)
    with pytest.raises(ValueError, match=r"^digits are \(n, 1, 8, 8\), got \(97, 1, 32, 32\); "):
        compose(digit_splits().calibration, 10, 0)
    with pytest.raises(ValueError, match=r"^a split is one of train, .*, got 'tests'"):
        scenes("tests")


def test_augmentation_is_seeded_and_keeps_shape_and_range(some) -> None:
    images = torch.from_numpy(some.images[:8])
    one, two = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == images.shape
    assert not torch.allclose(one, images)
    assert one.min() >= 0
    assert one.max() <= 1


@pytest.mark.parametrize("size", [48, 36, 24, 16])
def test_the_network_reads_images_of_any_size(size) -> None:
    with torch.no_grad():
        assert resnet20().eval()(torch.zeros(2, 1, size, size)).shape == (2, 10)


def test_the_network_has_blocks_that_could_be_left_out() -> None:
    network = resnet20().eval()
    features = torch.rand(1, 16, 24, 24)
    for stage in (network.stage1, network.stage2, network.stage3):
        features = stage[0](features)
        assert all(block(features).shape == features.shape for block in list(stage)[1:])
        assert len(stage) >= 3
