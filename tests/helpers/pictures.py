"""Image folders for tests: few pixels, every kind of trouble."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ash", "birch", "cedar", "elm")


def picture(label: int, number: int, side: int = 8) -> Image.Image:
    """Returns a bright bar whose place is the class, under noise that makes every image another."""
    rng = np.random.default_rng(1000 * label + number)
    pixels = rng.integers(0, 120, (side, side, 3))
    width = side // len(CLASSES)
    pixels[width * label : width * (label + 1)] += 120
    return Image.fromarray(pixels.astype(np.uint8))


def write_folder(root: Path, each: int, first: int = 0, classes: tuple[str, ...] = CLASSES, side: int = 8) -> Path:
    """Writes `each` images of every class below `root` and returns it."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(first, first + each):
            picture(label, number, side).save(root / name / f"{number:03}.png")
    return root


def troubled_folder(root: Path) -> Path:
    """Writes 200 images: one corrupt, one grey, one transparent; and an empty class, a note and a dead link."""
    write_folder(root, each=50)
    whole = (root / "ash" / "000.png").read_bytes()
    (root / "ash" / "000.png").write_bytes(whole[: len(whole) // 2])
    picture(1, 0).convert("L").save(root / "birch" / "000.png")
    see_through = picture(2, 0).convert("RGBA")
    see_through.putalpha(0)
    see_through.save(root / "cedar" / "000.png")
    (root / "dogwood").mkdir()
    (root / "elm" / ".hidden.png").write_bytes(whole)
    (root / "elm" / "notes.txt").write_text("not an image")
    (root / "elm" / "gone.png").symlink_to(root / "nowhere.png")
    (root / ".thumbnails").mkdir()
    return root
