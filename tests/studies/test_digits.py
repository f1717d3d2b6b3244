import numpy as np
import torch

from studies.digits.data import augment, splits


def test_splits_share_no_image_and_are_stratified() -> None:
    data = splits()
    parts = [data.train, data.calibration, data.validation, data.test]
    assert [len(part) for part in parts] == [1000, 97, 350, 350]
    for part in parts:
        counts = np.bincount(part.labels, minlength=10)
        assert counts.min() >= 0.07 * len(part)
        assert part.images.shape[1:] == (1, 32, 32)
        assert part.images.min() >= 0
        assert part.images.max() <= 1
    seen = [{image.tobytes() for image in part.images} for part in parts]
    for index, one in enumerate(seen):
        for other in seen[index + 1 :]:
            assert len(one & other) <= 1  # scikit-learn's set may hold a pair of equal scans


def test_splits_are_the_same_each_time() -> None:
    assert splits().train.digest == splits().train.digest


def test_augmentation_is_seeded_and_keeps_shape_and_range() -> None:
    images = torch.from_numpy(splits().train.images[:8])
    one, two = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == images.shape
    assert not torch.allclose(one, images)
    assert one.min() >= 0
    assert one.max() <= 1 + 1e-6
