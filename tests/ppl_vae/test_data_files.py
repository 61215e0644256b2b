"""The user's own files: .npy, .npz and folders of images."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_vae.data import load_data


def save_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def stored(data, split="train", column="x"):
    return data.splits[split][column].numpy()


class OpenedError(Exception):
    pass


class Trap:
    """A pickle of this raises `OpenedError` in whoever unpickles it."""

    def __reduce__(self):
        return _spring, ()


def _spring():
    raise OpenedError


def test_an_npy_file_is_x_split_by_seed(tmp_path):
    x = np.arange(40.0).reshape(10, 2, 2)
    np.save(tmp_path / "mine.npy", x)
    data = load_data(tmp_path / "mine.npy", seed=3)
    order = np.random.RandomState(3).permutation(10)
    assert data.name == "mine.npy"
    assert np.array_equal(stored(data), x[order[:8]])
    assert np.array_equal(stored(data, "validation"), x[order[8:9]])
    flat = load_data(str(tmp_path / "mine.npy"), image_shape=(1, 2, 2), unit=40)
    assert stored(flat).shape == (8, 4)
    assert flat.split("test").batch(slice(None))["x"].max() < 1


def test_an_npz_file_of_x_and_y_is_split_by_seed(tmp_path):
    x, y = np.arange(10.0), np.arange(10, dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    data = load_data(tmp_path / "mine.npz")
    for split in data.splits:
        assert np.array_equal(stored(data, split), stored(data, split, "y"))
    assert load_data(tmp_path / "mine.npz", labels=False).columns == ("x",)


def test_an_npz_file_of_splits_is_taken_as_it_is(tmp_path):
    x = np.arange(12.0).reshape(6, 2)
    y = np.arange(6)
    path = tmp_path / "mine.npz"
    np.savez(path, train=x[:4], train_labels=y[:4], test=x[4:], test_labels=y[4:])
    data = load_data(path)
    assert list(data.splits) == ["train", "test"]
    assert np.array_equal(stored(data), x[:4])
    assert stored(data, "test", "y").tolist() == [4, 5]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("images", "y"), r"holds \['images', 'y'\]: expected x"),
        (("train", "valid"), r"expected x and perhaps y, or train"),
        (("test",), "expected x"),
        (("train", "test_labels"), "test_labels but not test"),
        (("train", "train_labels", "test"), "test has columns"),
    ],
)
def test_an_npz_file_laid_out_otherwise_is_refused(tmp_path, keys, message):
    np.savez(tmp_path / "mine.npz", **{key: np.ones(5, np.int64) for key in keys})
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / "mine.npz")


@pytest.mark.parametrize("name", ["trap.npy", "trap.npz"])
def test_objects_are_refused_and_never_unpickled(tmp_path, name):
    objects = np.array([Trap(), Trap(), Trap()], dtype=object)
    if name.endswith("z"):
        np.savez(tmp_path / name, x=objects)
    else:
        np.save(tmp_path / name, objects)
    with pytest.raises(ValueError, match="Python objects are never loaded"):
        load_data(tmp_path / name)
    with pytest.raises(OpenedError):  # the trap does work
        np.load(tmp_path / name, allow_pickle=True)["x" if name.endswith("z") else ...]


def test_a_bare_pickle_named_npy_is_refused(tmp_path):
    (tmp_path / "trap.npy").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="Python objects are never loaded"):
        load_data(tmp_path / "trap.npy")


def test_a_damaged_npz_is_named(tmp_path):
    path = tmp_path / "half.npz"
    np.savez_compressed(path, x=np.random.RandomState(0).random_sample(5000))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.npz"):
        load_data(path)
    path.write_bytes(whole[:2000] + bytes(2000) + whole[4000:])
    with pytest.raises(ValueError, match=r"half\.npz"):
        load_data(path)


def test_missing_and_foreign_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        load_data(tmp_path / "none.npy")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_data("none.npy")
    (tmp_path / "mine.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"expected a \.npy or \.npz file or a folder"):
        load_data(tmp_path / "mine.csv")


# Folders of images


def test_class_folders_are_labels_and_pixels_go_channel_first(tmp_path):
    random = np.random.RandomState(0)
    images = {
        (folder, i): save_image(
            tmp_path / folder / f"{i}.png", random.randint(0, 256, (4, 5, 3)).astype(np.uint8)
        )
        for folder in ("dog", "cat")
        for i in range(5)
    }
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    data = load_data(tmp_path)
    assert (data.classes, data.image_shape, data.unit) == (("cat", "dog"), (3, 4, 5), 255.0)
    x = np.concatenate([stored(data, s) for s in data.splits])
    y = np.concatenate([stored(data, s, "y") for s in data.splits])
    assert x.dtype == np.uint8
    found = {(row.tobytes(), label) for row, label in zip(x, y, strict=True)}
    assert found == {
        (image.transpose(2, 0, 1).tobytes(), ("cat", "dog").index(folder))
        for (folder, _), image in images.items()
    }
    assert torch.equal(data.split("train").batch(slice(0, 1))["x"][0], torch.tensor(x[0]) / 255)


def test_loose_grey_images_stay_one_channel_in_order_of_name(tmp_path):
    images = [save_image(tmp_path / f"{i}.png", np.full((2, 3), i, np.uint8)) for i in range(6)]
    Image.fromarray(np.full((2, 3), True)).save(tmp_path / "6.png")
    data = load_data(tmp_path, seed=2)
    order = np.random.RandomState(2).permutation(7)
    x = np.stack([*images, np.full((2, 3), 255, np.uint8)]).reshape(7, 6)
    assert data.image_shape == (1, 2, 3)
    assert data.columns == ("x",)
    assert np.array_equal(np.concatenate([stored(data, s) for s in data.splits]), x[order])


def test_split_folders_are_splits_with_the_classes_of_all(tmp_path):
    for split, folder, value in [("train", "b", 1), ("train", "c", 2), ("test", "a", 3)]:
        save_image(tmp_path / split / folder / "0.png", np.full((2, 2), value, np.uint8))
    data = load_data(tmp_path)
    assert list(data.splits) == ["train", "test"]
    assert data.classes == ("a", "b", "c")
    assert stored(data)[:, 0].tolist() == [1, 2]
    assert stored(data, "train", "y").tolist() == [1, 2]
    assert stored(data, "test", "y").tolist() == [0]


def test_only_a_train_folder_keeps_every_row_for_training(tmp_path):
    save_image(tmp_path / "train" / "0.png", np.zeros((2, 2), np.uint8))
    assert {s: len(load_data(tmp_path).split(s)) for s in load_data(tmp_path).splits} == {
        "train": 1
    }


def grey(side):
    return np.zeros((side, side), np.uint8)


def test_the_first_image_of_another_size_is_named(tmp_path):
    for i, side in enumerate((4, 4, 5, 6)):
        save_image(tmp_path / f"{i}.png", grey(side))
    with pytest.raises(ValueError, match=r"one size: \S*2\.png is .* = \(1, 5, 5\)"):
        load_data(tmp_path)


def test_a_color_image_among_grey_ones_is_named(tmp_path):
    save_image(tmp_path / "0.png", grey(4))
    save_image(tmp_path / "1.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"1\.png is .* = \(3, 4, 4\)"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no images"),
        ({"0.png": 2, "a/0.png": 2}, "both in class folders"),
        ({"a/b/0.png": 2}, "no further folders"),
        ({"a/0.png": 2, "a/b/0.png": 2}, "no further folders"),
        ({"train/0.png": 2, "val/0.png": 2}, "found val"),
        ({"train/0.png": 2, "0.png": 2}, "loose images"),
        ({"test/0.png": 2}, "no train"),
    ],
)
def test_folders_laid_out_otherwise_are_refused(tmp_path, files, message):
    for name, side in files.items():
        save_image(tmp_path / name, grey(side))
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path)


def test_unreadable_and_transparent_images_are_named(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png is not a readable image"):
        load_data(tmp_path)
    save_image(tmp_path / "0.png", np.zeros((2, 2, 4), np.uint8))
    with pytest.raises(ValueError, match=r"0\.png has pixels of mode RGBA"):
        load_data(tmp_path)


# Names


def test_an_unknown_name_brings_the_nearest_known_one():
    with pytest.raises(ValueError, match="did you mean 'fashion_mnist'"):
        load_data("fashion-mnist")
    with pytest.raises(ValueError, match="known: caltech_silhouettes, digits"):
        load_data("zzz")


def test_a_known_name_wins_over_a_file_and_takes_no_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_image(Path("digits") / "train" / "0.png", grey(3))
    assert load_data("digits").image_shape == (1, 8, 8)
    assert load_data("./digits").image_shape == (1, 3, 3)
    assert load_data(Path("digits")).image_shape == (1, 3, 3)
    Path("digits").rename("faces")
    assert load_data("faces").name == "faces"
    with pytest.raises(ValueError, match="its own image_shape and unit"):
        load_data("digits", unit=16.0)
