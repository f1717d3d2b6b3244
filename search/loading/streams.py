"""Streams for a study with [frames]: the user's own, or moving crops of the images of a split."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.data import SMALL_BYTES, ImageStore, LabelledImages, Splits, bytes_of
from evaluators.streams import Stream
from search.config.study import FramesSection
from search.loading.user_code import UserCodeError, call, load

CLIP = (10, 50)
"""The fewest and the most frames of one image; 30 on average, a second of video."""
NOISE = 0.05
"""Standard deviation of the noise, as a share of that of the images' values."""
_BORDER = 8
"""Images are padded by reflection by height and width divided by this, which is how far a crop can move."""
_SPEED, _INERTIA = 0.01, 0.9
"""Mean motion per frame along each axis, as a share of the size, and the share of the velocity that is kept."""
_STOPS = 1 / 20
"""Probability per frame that a crop stops or starts moving."""
_RULE = "a function of frames takes 'validation' or 'test' and returns images (n, c, h, w), labels (n,) and clip starts"


def with_streams(section: FramesSection | None, splits: Splits) -> Splits:
    """Returns the splits with streams as validation and test images; without a section the splits as they are.

    Raises:
        UserCodeError: the study's own function fails, or does not return a stream.
    """
    if section is None:
        return splits
    if section.source is not None:
        validation, test = (_own_stream(section.source, name, splits) for name in ("validation", "test"))
        return replace(splits, validation=validation, test=test)
    return replace(
        splits,
        validation=moving_crops(splits.validation, section.frames, section.seed),
        test=moving_crops(splits.test, section.frames, section.seed + 1),
    )


def _own_stream(source: str, split: str, splits: Splits) -> Stream:
    function = load(source)
    result = call(lambda: function(split), _RULE)
    if not isinstance(result, tuple) or len(result) != 3:
        raise UserCodeError(f"{_RULE}, got {type(result).__name__} from {source!r}")
    images, labels, starts = result
    try:
        stream = Stream(np.asarray(images, np.float32), np.asarray(labels, np.int64), np.asarray(starts, np.int64))
    except (TypeError, ValueError) as error:
        raise UserCodeError(f"{_RULE}, got another from {source!r}: {error}") from None
    if stream.images.shape[1:] != splits.image_shape:
        raise UserCodeError(f"frames are {splits.image_shape} as other images are, got {stream.images.shape[1:]}")
    return stream


@dataclass(frozen=True)
class CropPath:
    """The positions of a crop in each frame.

    Args:
        image: of the split, `(n,)`.
        place: upper left corner of the crop in the padded image, in pixels, `(n, 2)`.
        starts: index of the first frame of each image.
    """

    image: NDArray[np.int64]
    place: NDArray[np.float64]
    starts: NDArray[np.int64]


class MovingCrops:
    """Frames `(n, c, h, w)`, computed on access: crops of the images' own size, with camera noise.

    Args:
        images: to crop from.
        path: positions of the crops.
        seed: of the noise.
        digest: of the images and the path.
    """

    def __init__(self, images: ImageStore, path: CropPath, seed: int, digest: str) -> None:
        self._images = images
        self._path = path
        self._seed = seed
        self._noise = NOISE * float(np.std(images[:100]))
        self._padded: tuple[int, NDArray[np.float32]] | None = None
        self.digest = digest
        self.shape = (len(path.image), *images.shape[1:])
        self.dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any, /) -> NDArray[np.float32]:
        """Returns the frames of a slice or of an array of indices, `(m, c, h, w)`."""
        chosen = np.arange(len(self))[index]
        return np.array([self._frame(int(frame)) for frame in chosen], np.float32).reshape(-1, *self.shape[1:])

    def _frame(self, index: int) -> NDArray[np.float32]:
        crop = crop_at(self._bordered(int(self._path.image[index])), self._path.place[index], self.shape[2:])
        noise = np.random.default_rng((self._seed, index)).standard_normal(crop.shape, np.float32)
        frame: NDArray[np.float32] = crop + np.float32(self._noise) * noise
        return frame

    def _bordered(self, image: int) -> NDArray[np.float32]:
        """Returns an image padded by reflection; the last one is cached, because frames are accessed in order."""
        if self._padded is None or self._padded[0] != image:
            borders = [(0, 0), *((border, border + 1) for border in _borders(self.shape[2:]))]
            self._padded = image, np.pad(self._images[image : image + 1][0], borders, mode="symmetric")
        return self._padded[1]


def moving_crops(images: LabelledImages, frames: int, seed: int) -> Stream:
    """Returns a stream of labelled images, each shown for a while as by a moving camera.

    The label is that of the image. Cuts to the next image come after 10 to 50 frames; a crop moves with slowly changing
    velocity, or stands still for a while.

    Args:
        images: of one split; each is shown once before any is repeated.
        frames: total number.
        seed: of all random choices.
    """
    path = _path(len(images), frames, images.images.shape[2:], seed)
    content = f"moving crops 1 {images.digest} {frames} {seed}"
    crops = MovingCrops(images.images, path, seed, hashlib.sha256(content.encode()).hexdigest())
    frames_in_memory = crops[:] if bytes_of(crops) <= SMALL_BYTES else crops
    return Stream(frames_in_memory, images.labels[path.image], path.starts)


def crop_at(image: NDArray[np.float32], place: NDArray[np.float64], size: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns a crop `(c, h, w)` of an image at a fractional position, by bilinear interpolation."""
    top, left = np.floor(place).astype(int)
    height, width = size
    down, right = (place - (top, left)).astype(np.float32)
    window = image[:, top : top + height + 1, left : left + width + 1]
    rows = (1 - down) * window[:, :-1] + down * window[:, 1:]
    crop: NDArray[np.float32] = (1 - right) * rows[:, :, :-1] + right * rows[:, :, 1:]
    return crop


def _borders(size: tuple[int, ...]) -> list[int]:
    return [max(side // _BORDER, 1) for side in size]


def _path(images: int, frames: int, size: tuple[int, ...], seed: int) -> CropPath:
    rng = np.random.default_rng(seed)
    waiting: list[int] = []
    shown: list[NDArray[np.int64]] = []
    places: list[NDArray[np.float64]] = []
    left = frames
    while left > 0:
        waiting = waiting or rng.permutation(images).tolist()
        count = min(int(rng.integers(CLIP[0], CLIP[1] + 1)), left)
        shown.append(np.full(count, waiting.pop(), dtype=np.int64))
        places.append(_wander(count, size, rng))
        left -= count
    lengths = np.array([len(clip) for clip in shown])
    return CropPath(np.concatenate(shown), np.concatenate(places), np.cumsum(lengths) - lengths)


def _wander(frames: int, size: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns the position of a crop in each frame of a clip, `(frames, 2)`; motion is reflected at the borders."""
    far = 2.0 * np.array(_borders(size))
    speed = _SPEED * np.array(size)
    place, velocity = rng.uniform(0, far), rng.normal(0, speed)
    still = bool(rng.integers(2))
    places = np.empty((frames, 2))
    for frame in range(frames):
        places[frame] = place
        still ^= bool(rng.random() < _STOPS)
        velocity = _INERTIA * velocity + np.sqrt(1 - _INERTIA**2) * rng.normal(0, speed)
        ahead = place + (0 if still else velocity)
        place = far - np.abs(far - np.abs(ahead))  # mirrored at either end
        velocity = np.where((ahead < 0) | (ahead > far), -velocity, velocity)
    return places
