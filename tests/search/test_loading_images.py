"""Images from folders and data sets: decoded as they should be, split without overlap, with clear words."""

import gzip
import json
import pickle
import shutil
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from evaluators.data import LabelledImages
from search.config.references import SourceError
from search.config.study import DataSection
from search.loading import image_store as images_module
from search.loading.image_store import FileReader, Preprocessing, StoredImages, upright
from search.loading.images import open_data
from search.loading.splits import PLANS, SPLITS, draw_all, stratified
from tests.helpers.pictures import CLASSES, picture, troubled_folder, write_folder

pytestmark = pytest.mark.usefixtures("cache")


def quiet(*_) -> None:
    return None


def load(source: str, usual: Preprocessing | None = None, **keys):
    said: list[str] = []
    unread = open_data(DataSection(source=source, **keys), False, said.append)
    loaded = unread.read(usual, quiet, said.append)
    return loaded, "\n".join(said)


def names(loaded, split: str) -> list[str]:
    return loaded.record[split]["names"]


def test_a_troubled_folder_gets_through_with_clear_words(tmp_path) -> None:
    loaded, said = load(f"imagefolder:{troubled_folder(tmp_path / 'trees')}")
    assert "Skipped 1 of 200 images" in said
    assert "ash/000.png" in said
    assert "No images of 'dogwood'" in said
    assert "1 grey" in said
    assert "1 transparent, laid on white" in said
    assert loaded.empty == ("dogwood",)
    assert loaded.splits.classes == 5
    used = [name for split in SPLITS for name in names(loaded, split)]
    assert len(used) == len(set(used)) == 199
    assert not any("notes" in name or "hidden" in name or "gone" in name for name in used)
    # Numbers follow the sorted names of the folders, the empty one included.
    train = loaded.splits.train
    assert {label for name, label in zip(names(loaded, "train"), train.labels, strict=True) if "elm" in name} == {4}


def test_more_than_a_few_corrupt_files_stop(tmp_path) -> None:
    root = write_folder(tmp_path / "trees", each=40)
    for number in range(2):
        (root / "ash" / f"{number:03}.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"at most 1% .* got 2 of 160: ash/000.png"):
        load(f"imagefolder:{root}")


def test_one_corrupt_file_never_stops_a_small_folder(tmp_path) -> None:
    root = write_folder(tmp_path / "trees", each=6)
    (root / "ash" / "000.png").write_bytes(b"")
    _, said = load(f"imagefolder:{root}")
    assert "Skipped 1 of 24" in said


@pytest.mark.parametrize(
    ("parts", "held_out"),
    [
        (["train", "val", "test"], {"validation": "val", "test": "test"}),
        (["train", "val"], {"validation": "val", "test": "val"}),
        (["Training", "test"], {"validation": "test", "test": "test"}),
        (["valid", "test"], {"train": "valid", "calibration": "valid", "validation": "valid", "test": "test"}),
        (["train"], dict.fromkeys(SPLITS, "train")),
        (["val"], dict.fromkeys(SPLITS, "val")),
    ],
)
def test_what_is_measured_comes_from_what_is_held_out(parts, held_out, tmp_path) -> None:
    for index, part in enumerate(parts):
        write_folder(tmp_path / part, each=20, first=100 * index)
    loaded, _ = load(f"imagefolder:{tmp_path}")
    everything = Counter(name for split in SPLITS for name in names(loaded, split))
    assert set(everything.values()) == {1}
    assert len(everything) == 80 * len(parts)
    for split in SPLITS:
        assert {name.split("/")[0] for name in names(loaded, split)} == {held_out.get(split, parts[0])}
        assert set(getattr(loaded.splits, split).labels) == {0, 1, 2, 3}


def test_copies_count_once_also_across_folders(tmp_path) -> None:
    write_folder(tmp_path / "train", each=20)
    write_folder(tmp_path / "val", each=20, first=15)  # five of each class are in both
    loaded, said = load(f"imagefolder:{tmp_path}")
    assert "Left out 20 images" in said
    seen = [{(tmp_path / name).read_bytes() for name in names(loaded, split)} for split in SPLITS]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 140
    assert all(name.startswith("train") for name in names(loaded, "train"))
    assert len(names(loaded, "validation")) + len(names(loaded, "test")) == 60


def test_splits_are_shuffled_and_calibration_has_all_classes(tmp_path) -> None:
    loaded, _ = load(f"imagefolder:{write_folder(tmp_path / 'trees', each=25)}")
    for split in SPLITS:
        labels = getattr(loaded.splits, split).labels
        assert set(labels) == {0, 1, 2, 3}
        assert not np.array_equal(labels, np.sort(labels))
    again, _ = load(f"imagefolder:{tmp_path / 'trees'}")
    assert names(again, "train") == names(loaded, "train")
    other, _ = load(f"imagefolder:{tmp_path / 'trees'}", seed=1)
    assert names(other, "train") != names(loaded, "train")


def test_caps_bound_every_split(tmp_path) -> None:
    loaded, _ = load(f"imagefolder:{write_folder(tmp_path, each=25)}", train=12, calibration=4, validation=8, test=16)
    assert [len(getattr(loaded.splits, split)) for split in SPLITS] == [12, 4, 8, 16]


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), count=st.integers(1, 60), seed=st.integers(0, 5))
def test_a_stratified_choice_has_every_class_and_its_share(sizes, count, seed) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    chosen = stratified(labels, count, np.random.default_rng(seed))
    assert len(chosen) == len(set(chosen)) == min(count, len(labels))
    taken = np.bincount(labels[chosen], minlength=len(sizes))
    if count >= len(sizes):
        assert taken.min() >= 1
        # What every class is given first, at most one image each, is all that the shares may differ by.
        share, first = len(chosen) / len(labels), len(sizes) / len(labels)
        assert np.all(np.abs(taken - share * np.array(sizes)) <= 1 + first * np.array(sizes))


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_draws_never_overlap(sizes) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    drawn = draw_all(labels, PLANS[frozenset({"train"})]["train"], dict.fromkeys(SPLITS, 1000), 0, len(labels))
    together = np.concatenate(list(drawn.values()))
    assert sorted(together) == list(range(len(labels)))


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=6), seed=st.integers(0, 5))
def test_every_class_is_in_every_split_as_far_as_it_has_images(sizes, seed) -> None:
    sizes = [80, *sizes]  # enough that every split has room for each class
    labels = np.repeat(np.arange(len(sizes)), sizes)
    for pool in ({"train"}, {"train", "validation"}, {"validation", "test"}):
        draws = PLANS[frozenset(pool)]["validation" if "validation" in pool else "train"]
        drawn = draw_all(labels, draws, dict.fromkeys(SPLITS, 1000), seed, len(labels))
        for label, size in enumerate(sizes):
            having = [split for split, indices in drawn.items() if label in labels[indices]]
            served = [split for split in ("train", "validation", "test", "calibration") if split in drawn]
            assert set(served[:size]) <= set(having)


def test_classes_that_a_split_lacks_and_uneven_ones_are_told(tmp_path) -> None:
    for name, count in (("ash", 90), ("birch", 2), ("cedar", 1)):
        write_folder(tmp_path, each=count, classes=(name,), first=1000 * count)
    loaded, said = load(f"imagefolder:{tmp_path}")
    assert set(loaded.splits.train.labels) == {0, 1, 2}
    assert set(loaded.splits.validation.labels) == {0, 1}
    assert "validation has none of 'cedar'; test has none of 'birch', 'cedar'" in said
    assert "from 1 of 'cedar' to 90 of 'ash': to answer 'ash' each time is right for 94.4%" in said
    _, even = load(f"imagefolder:{write_folder(tmp_path / 'even', each=20)}")
    assert "Careful" not in even
    assert "uneven" not in even


def test_a_class_that_a_folder_of_a_part_lacks_is_told(tmp_path) -> None:
    write_folder(tmp_path / "train", each=20)
    write_folder(tmp_path / "val", each=20, first=100, classes=CLASSES[:3])
    assert "Careful: validation has none of 'elm'; test has none of 'elm': " in load(f"imagefolder:{tmp_path}")[1]


def test_preprocessing_is_torchvisions(tmp_path) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8))
    for name in ("BILINEAR", "BICUBIC"):
        preset = ImageClassification(crop_size=32, resize_size=37, interpolation=InterpolationMode[name])
        ours = Preprocessing(32, 37, tuple(preset.mean), tuple(preset.std), name)
        found = ours.normalised(ours.pixels(image)[None])[0]
        np.testing.assert_allclose(found, preset(image).numpy(), atol=1e-5)


def test_images_of_every_mode_become_rgb(tmp_path) -> None:
    colour = picture(0, 0)
    white = (255, 255, 255)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert upright(clear, "RGB").getpixel((0, 0)) == white
    assert upright(half, "RGB").getpixel((0, 0)) == (127, 127, 127)
    clear.save(tmp_path / "palette.gif")
    with Image.open(tmp_path / "palette.gif") as palette:
        assert upright(palette, "RGB").getpixel((0, 0)) == white
    np.testing.assert_array_equal(np.asarray(upright(colour.convert("CMYK"), "RGB")), np.asarray(colour))
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert np.asarray(upright(deep, "L")).tolist() == [[0, 1, 255]]
    assert upright(deep, "RGB").getpixel((2, 0)) == white
    assert upright(colour.convert("1"), "RGB").mode == "RGB"
    exif = colour.getexif()
    exif[0x0112] = 6
    colour.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        np.testing.assert_array_equal(np.asarray(upright(turned, "RGB")), np.asarray(ImageOps.exif_transpose(turned)))
        assert not np.array_equal(np.asarray(upright(turned, "RGB")), np.asarray(colour))


@pytest.fixture
def store(tmp_path) -> StoredImages:
    root = write_folder(tmp_path / "trees", each=10)
    files = sorted(root.rglob("*.png"))
    made = Preprocessing(8, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return StoredImages(FileReader(root, files), np.arange(40), [file.name for file in files], made)


def test_a_store_slices_like_an_array(store) -> None:
    whole = store[:]
    assert whole.shape == store.shape == (40, 3, 8, 8)
    assert whole.dtype == store.dtype == np.float32
    np.testing.assert_array_equal(store[5:30:3], whole[5:30:3])
    some = np.array([3, 3, 39, 0])
    np.testing.assert_array_equal(store[some], whole[some])
    assert len(store[40:]) == 0
    data = LabelledImages(store, np.zeros(40, np.int64))
    assert data.digest == LabelledImages(store, np.zeros(40, np.int64)).digest
    assert data.digest != LabelledImages(store, np.ones(40, np.int64)).digest


def test_images_that_do_not_fit_are_read_again_and_are_the_same(store, monkeypatch) -> None:
    whole = store[:]
    monkeypatch.setattr(images_module, "KEPT_BYTES", 0)
    lazy = StoredImages(store._reader, store._indices, store._digests, store._preprocessing)
    assert lazy._kept is None
    np.testing.assert_array_equal(lazy[:], whole)
    assert lazy.digest == store.digest
    shutil.rmtree(store._reader._root)
    np.testing.assert_array_equal(store[:], whole)  # decoded once
    with pytest.raises(OSError, match="No such file"):
        lazy[:1]


def test_the_digest_is_over_content_and_preprocessing(tmp_path) -> None:
    write_folder(tmp_path / "one", each=20)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first, _ = load(f"imagefolder:{tmp_path / 'one'}")
    copied, _ = load(f"imagefolder:{tmp_path / 'two'}")
    smaller, _ = load(f"imagefolder:{tmp_path / 'one'}", size=4)
    assert first.splits.train.digest == copied.splits.train.digest
    assert first.splits.train.digest != smaller.splits.train.digest
    name = names(first, "train")[0]
    picture(0, 999).save(tmp_path / "two" / name)  # an index of what is known of files must not hide this
    changed, _ = load(f"imagefolder:{tmp_path / 'two'}")
    assert first.splits.train.digest != changed.splits.train.digest


def test_input_is_as_said_then_as_the_weights_want_then_as_usual(tmp_path) -> None:
    source = f"imagefolder:{write_folder(tmp_path / 'trees', each=10)}"
    weights = Preprocessing(16, 20, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "BICUBIC", "as W was trained")
    small, said = load(source)
    assert small.splits.image_shape == (3, 8, 8)
    assert "the size of all images" in said
    theirs, said = load(source, weights)
    assert theirs.preprocessing == weights
    assert "as W was trained" in said
    mine, _ = load(source, weights, size=12, mean=(0.5,), std=(0.25,))
    assert mine.splits.image_shape == (1, 12, 12)
    assert mine.preprocessing.resize == 12
    picture(0, 0, side=16).save(tmp_path / "trees" / "ash" / "large.png")
    usual, _ = load(source)
    assert usual.splits.image_shape == (3, 224, 224)
    assert usual.preprocessing.resize == 256
    with pytest.raises(SourceError, match="resize is at least size"):
        load(source, size=12, resize=8)
    with pytest.raises(SourceError, match="one value for grey or three"):
        load(source, mean=(0.5, 0.5), std=(0.5, 0.5))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("imagefolder:/no/such/place", "existing folder"),
        ("cifar10:/no/such/place", "--download"),
        ("cifar100:/no/such/place", "--download"),
        ("fashion-mnist:/no/such/place", "--download"),
        ("imagenet:/no/such/place", "imagefolder:PATH"),
    ],
)
def test_data_that_is_not_there_says_what_to_type(source, words) -> None:
    with pytest.raises(SourceError, match=words):
        load(source)


def test_a_folder_without_classes_is_refused(tmp_path) -> None:
    picture(0, 0).save(tmp_path / "alone.png")
    with pytest.raises(SourceError, match="two classes or more"):
        load(f"imagefolder:{tmp_path}")
    write_folder(tmp_path, each=1, classes=CLASSES[:2])
    with pytest.raises(SourceError, match="no image for"):
        load(f"imagefolder:{tmp_path}")


def test_fashion_mnist_is_read_as_torchvision_stores_it(tmp_path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 40)):
        pixels, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        for file, content in (
            (f"{part}-images-idx3-ubyte", struct.pack(">iiii", 2051, count, 28, 28) + pixels.tobytes()),
            (f"{part}-labels-idx1-ubyte", struct.pack(">ii", 2049, count) + labels.tobytes()),
        ):
            (raw / file).write_bytes(content)
            (raw / f"{file}.gz").write_bytes(gzip.compress(content))
    loaded, said = load(f"fashion-mnist:{tmp_path}")
    assert loaded.splits.image_shape == (1, 28, 28)
    assert loaded.splits.classes == 10
    assert "usual for this data set" in said
    assert len(loaded.splits.validation) + len(loaded.splits.test) == 40


def test_cifar_is_read_as_torchvision_stores_it(tmp_path, monkeypatch) -> None:
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    for name, count in (("data_batch_1", 50), ("test_batch", 30)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": [n % 10 for n in range(count)]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    # torchvision checks the real files' MD5, which these small ones do not have.
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    loaded, _ = load(f"cifar10:{tmp_path}")
    train = loaded.splits.train
    found = CIFAR10(str(tmp_path), train=True)
    index = loaded.record["train"]["names"][0]
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    expected = ((found.data[index] / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(train.images[:1][0], expected, atol=1e-5)
    assert train.labels[0] == found.targets[index]


def test_imagenet_is_read_as_torchvision_stores_it(tmp_path) -> None:
    wnids = ("n01440764", "n01443537", "n01484850", "n01491361")
    write_folder(tmp_path / "val", each=20, classes=wnids)
    names = {wnid: (wnid,) for wnid in wnids} | {wnids[0]: ("tench", "Tinca tinca")}
    torch.save((names, [wnids[0]]), tmp_path / "meta.bin")
    loaded, said = load(f"imagenet:{tmp_path}", size=8)
    assert "All are drawn from one folder" in said
    assert loaded.splits.classes == 4
    assert loaded.record["classes"] == wnids
    assert loaded.splits.names == ("tench, Tinca tinca", *wnids[1:])


def test_the_record_says_which_image_is_where(tmp_path) -> None:
    loaded, _ = load(f"imagefolder:{write_folder(tmp_path / 'trees', each=20)}")
    loaded.write(tmp_path)
    record = json.loads((tmp_path / "splits.json").read_text())
    for split in SPLITS:
        part = getattr(loaded.splits, split)
        assert record[split]["images"] == len(part) == len(record[split]["names"])
        assert record[split]["digest"] == part.digest
        assert [CLASSES[label] for label in part.labels] == [name.split("/")[0] for name in record[split]["names"]]
