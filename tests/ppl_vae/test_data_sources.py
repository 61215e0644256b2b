"""The known data sets, read from small files of the same layout, and from the real ones if there.

What is replaced: nothing here touches the network. Where torchvision would download, its class is
replaced by one that writes small files where torchvision leaves them; that torchvision's own class
does leave them there is tested on the real archives, where PPL_VAE_DATA has those.
"""

import gzip
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from ppl_vae.data import DataNotFoundError, data_home, formats, known_names, load_data

REAL = os.environ.get("PPL_VAE_DATA")


def real(*parts):
    """The path of a real file, or the reason to skip."""
    path = Path(REAL or "/nonexistent", *parts)
    if not path.exists():
        pytest.skip(f"PPL_VAE_DATA is unset or lacks {'/'.join(parts)}")
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)


def stored(data, split="train", column="x"):
    return data.splits[split][column].numpy()


def sizes(data):
    return tuple(len(data.split(split)) for split in ("train", "validation", "test"))


def test_data_home_follows_the_environment(monkeypatch):
    monkeypatch.setenv("PPL_VAE_DATA", "~/sets")
    assert data_home() == Path.home() / "sets"
    monkeypatch.setenv("PPL_VAE_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.abspath("cache"))
    assert data_home() == Path.cwd() / "cache" / "ppl_vae"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert data_home() == Path.home() / ".cache" / "ppl_vae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("PPL_VAE_DATA")
    assert data_home() == Path.home() / ".cache" / "ppl_vae"


NO_FILES = ("digits", "sprites", "sprites64")


@pytest.mark.parametrize("name", [name for name in known_names() if name not in NO_FILES])
def test_a_missing_file_is_named_with_where_to_put_it(name, home, no_torchvision):
    with pytest.raises(DataNotFoundError) as caught:
        load_data(name)
    assert str(home) in str(caught.value)
    assert "PPL_VAE_DATA" in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


# digits


def test_digits_are_scikit_learn_s_counts_in_a_fixed_order():
    from sklearn.datasets import load_digits

    data, order = load_data("digits", seed=9), np.random.RandomState(0).permutation(1797)
    assert sizes(data) == (1197, 300, 300)
    x = np.concatenate([stored(data, s) for s in data.splits])
    y = np.concatenate([stored(data, s, "y") for s in data.splits])
    assert x.dtype == np.uint8
    assert np.array_equal(x, load_digits().data[order])
    assert np.array_equal(y, load_digits().target[order])
    assert (x.max(), data.unit, data.image_shape, len(data.classes)) == (16, 1.0, (1, 8, 8), 10)
    with pytest.raises(ValueError, match="unit=255"):
        load_data("digits", binarize="static")


# MNIST


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(raw, pack, train=10_020):
    """Files of MNIST's layout with images of 2 x 3; returns their arrays."""
    random = np.random.RandomState(0)
    raw.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, rows in (("train", train), ("t10k", 30)):
        images = random.randint(0, 256, (rows, 2, 3)).astype(np.uint8)
        labels = random.randint(0, 10, rows).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = raw / f"{part}-{kind}-ubyte{'.gz' if pack else ''}"
            path.write_bytes(gzip.compress(idx(array), 1) if pack else idx(array))
            arrays[part, kind[:6]] = array
    return arrays


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_idx_files_are_read_without_torchvision(home, no_torchvision, name, folder, pack):
    arrays = write_idx(home / folder / "raw", pack)
    data = load_data(name)
    images, labels = arrays["train", "images"].reshape(-1, 6), arrays["train", "labels"]
    assert sizes(data) == (20, 10_000, 30)
    assert np.array_equal(stored(data), images[:20])
    assert np.array_equal(stored(data, "validation"), images[20:])
    assert np.array_equal(stored(data, "validation", "y"), labels[20:])
    assert np.array_equal(stored(data, "test"), arrays["t10k", "images"].reshape(-1, 6))
    assert np.array_equal(stored(data, "test", "y"), arrays["t10k", "labels"])
    assert stored(data).dtype == np.uint8
    assert (data.unit, data.image_shape, len(data.classes)) == (255.0, (1, 2, 3), 10)
    assert load_data(name, binarize="dynamic", labels=False).binarization == "dynamic"


def test_damaged_idx_files_are_named(home, no_torchvision):
    raw = home / "MNIST" / "raw"
    write_idx(raw, pack=False)
    images = raw / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    for damaged in (whole[:-1], whole + b"0", b"", b"\0\0\x0d" + whole[3:], whole[:3] + b"\1"):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte is"):
            load_data("mnist")
    packed = gzip.compress(whole)
    no_block = packed[:10] + b"\x07" + packed[11:]  # deflate has no third type of block
    for damaged in (packed[:-100], b"no archive", packed[:-8] + bytes(8), no_block):
        images.with_suffix(".gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged"):
            load_data("mnist")


def test_idx_files_that_do_not_belong_together_are_refused(home, no_torchvision):
    write_idx(home / "MNIST" / "raw", pack=False, train=10_000)
    with pytest.raises(ValueError, match="found 10000 images and 10000 labels"):
        load_data("mnist")


def test_missing_mnist_is_downloaded_by_torchvision_into_the_data_home(home, monkeypatch):
    from torchvision import datasets

    calls = []

    class Downloads:  # in the place of torchvision's class, without the network
        def __init__(self, root, *, train, download):
            calls.append((Path(root), train, download))
            write_idx(Path(root) / "MNIST" / "raw", pack=True)

    monkeypatch.setattr(datasets, "MNIST", Downloads)
    assert sizes(load_data("mnist")) == (20, 10_000, 30)
    assert calls == [(home, True, True)]
    load_data("mnist")
    assert len(calls) == 1


def test_a_failed_download_says_what_was_sought_and_what_to_do(home, monkeypatch):
    from torchvision import datasets

    def fail(*args, **kwargs):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets, "FashionMNIST", fail)
    with pytest.raises(DataNotFoundError) as caught:
        load_data("fashion_mnist")
    for part in ("no route to host", str(home / "FashionMNIST" / "raw"), "PPL_VAE_DATA"):
        assert part in str(caught.value)
    monkeypatch.setattr(datasets, "FashionMNIST", lambda *args, **kwargs: None)
    with pytest.raises(DataNotFoundError, match="did not leave there"):
        load_data("fashion_mnist")


def test_an_import_of_torchvision_that_fails_is_reported(home, no_torchvision):
    with pytest.raises(DataNotFoundError, match=r"importing it failed.*install the torchvision"):
        load_data("mnist")


def test_real_mnist_has_its_published_counts_and_mean(monkeypatch):
    real("MNIST", "raw", "train-images-idx3-ubyte.gz")
    data = load_data("mnist")
    assert sizes(data) == (50_000, 10_000, 10_000)
    y = np.concatenate([stored(data, s, "y") for s in ("train", "validation")])
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(y).tolist() == counts
    total = sum(stored(data, s).sum(dtype=np.int64) for s in ("train", "validation"))
    assert round(total / (60_000 * 784 * 255), 4) == 0.1307
    assert y[:5].tolist() == [5, 0, 4, 1, 9]


def test_torchvision_reads_the_same_from_real_archives(tmp_path, monkeypatch):
    raw = real("MNIST", "raw", "train-images-idx3-ubyte.gz").parent
    shutil.copytree(raw, tmp_path / "MNIST" / "raw")
    from torchvision import datasets

    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    test = datasets.MNIST(tmp_path, train=False, download=True)  # finds the archives, unpacks them
    for path in (tmp_path / "MNIST" / "raw").glob("*.gz"):
        path.unlink()
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path))
    data = load_data("mnist")
    assert torch.equal(data.splits["test"]["x"], test.data.reshape(-1, 784))
    assert torch.equal(data.splits["test"]["y"], test.targets)
    assert data.classes == tuple(c[0] for c in test.classes)


def test_fashion_s_class_names_are_torchvision_s(home):
    from torchvision import datasets

    write_idx(home / "FashionMNIST" / "raw", pack=False)
    assert load_data("fashion_mnist").classes == tuple(datasets.FashionMNIST.classes)


# static MNIST


def bits(rows, seed=0):
    return np.random.RandomState(seed).randint(0, 2, (rows, 784)).astype(np.uint8)


@pytest.mark.parametrize("labels", [True, False])
def test_packed_static_mnist_is_unpacked(home, labels):
    folder = home / "binarized_mnist"
    folder.mkdir()
    arrays = {}
    for i, (key, rows) in enumerate((("train", 5), ("valid", 3), ("test", 2))):
        arrays[key] = np.packbits(bits(rows, i), axis=1)
        if labels:
            arrays[f"{key}_labels"] = np.arange(rows, dtype=np.uint8)
    np.savez_compressed(folder / "binarized_mnist.npz", **arrays)
    data = load_data("static_mnist")
    for i, (split, rows) in enumerate((("train", 5), ("validation", 3), ("test", 2))):
        assert np.array_equal(stored(data, split), bits(rows, i))
        if labels:
            assert stored(data, split, "y").tolist() == list(range(rows))
    assert data.columns == (("x", "y") if labels else ("x",))
    assert (data.binarization, data.unit) == ("static", 1.0)
    with pytest.raises(ValueError, match="binary already"):
        load_data("static_mnist", binarize="dynamic")


def write_amat(home, **texts):
    folder = home / "binarized_mnist"
    folder.mkdir(exist_ok=True)
    for key, text in texts.items():
        (folder / f"binarized_mnist_{key}.amat").write_text(text)


def amat(array):
    return "".join(" ".join(map(str, row)) + " \n" for row in array)


def test_the_original_text_files_are_read(home):
    write_amat(home, train=amat(bits(5)), valid=amat(bits(3, 1)), test=amat(bits(2, 2)))
    data = load_data("static_mnist")
    assert data.columns == ("x",)
    assert np.array_equal(stored(data), bits(5))
    assert np.array_equal(stored(data, "validation"), bits(3, 1))
    assert np.array_equal(stored(data, "test"), bits(2, 2))


@pytest.mark.parametrize("text", ["", "0 1 1\n", amat(bits(2) * 2), amat(bits(2))[:-4]])
def test_text_files_of_another_layout_are_refused(home, text):
    write_amat(home, train=text, valid=amat(bits(3)), test=amat(bits(2)))
    with pytest.raises(ValueError, match="rows of 784 numbers"):
        load_data("static_mnist")


def test_real_static_mnist_has_its_published_means():
    real("binarized_mnist", "binarized_mnist.npz")
    data = load_data("static_mnist")
    assert sizes(data) == (50_000, 10_000, 10_000)
    means = [round(float(stored(data, s).mean()), 5) for s in data.splits]
    assert means == [0.13056, 0.13113, 0.13251]


# OMNIGLOT


def area_means_by_copying(ink):
    """The area mean, by another route: each pixel four times four, then blocks of 15 by 15."""
    fine = np.kron(ink.astype(np.int64), np.ones((4, 4), np.int64))
    sums = fine.reshape(28, 15, 28, 15).sum((1, 3))
    return np.round(255 * (sums / 225)).astype(np.uint8)


def test_area_means_are_exact():
    ink = (
        np.random.RandomState(0).random_sample((30, 105, 105))
        < np.linspace(0, 1, 30)[:, None, None]
    )
    expected = np.stack([area_means_by_copying(image) for image in ink])
    assert np.array_equal(formats.area_means(ink), expected)
    assert formats.area_means(np.ones((1, 105, 105), bool)).min() == 255


def test_area_means_of_the_real_originals_are_the_real_28x28_images():
    packed = np.load(real("omniglot", "omniglot_105x105.npz"))
    small = np.load(real("omniglot", "omniglot_28x28_area.npz"))
    for side in ("background", "evaluation"):
        rows = np.random.RandomState(0).choice(len(packed[side]), 3000, replace=False)
        ink = np.unpackbits(packed[side][rows], axis=1, count=105 * 105).reshape(-1, 105, 105)
        assert np.array_equal(formats.area_means(ink), small[side][rows])


# Two alphabets of background, one of evaluation; numbers do not follow the alphabets' order.
CHARACTERS = {
    "images_background": [("Beta", 1, 1), ("Beta", 2, 2), ("Alpha", 1, 3)],
    "images_evaluation": [("Gamma", 1, 4), ("Gamma", 2, 5)],
}
NAMES = ("Beta/character01", "Beta/character02", "Alpha/character01", "Gamma/character01")


def write_drawings(root, ink):
    """torchvision's folders of drawings, 20 a character; ink is black, as in the originals."""
    rows = iter(ink)
    for folder, characters in CHARACTERS.items():
        for alphabet, rank, number in characters:
            place = root / "omniglot-py" / folder / alphabet / f"character{rank:02d}"
            place.mkdir(parents=True)
            for drawer in range(1, 21):
                Image.fromarray(~next(rows)).save(place / f"{number:04d}_{drawer:02d}.png")


def write_area_file(root, small):
    alphabets = ["Alpha", "Beta", "Gamma"]
    arrays, start = {"alphabets": np.array(alphabets)}, 0
    for side in ("background", "evaluation"):
        characters = CHARACTERS[f"images_{side}"]
        rows = 20 * len(characters)
        arrays[side] = small[start : start + rows]
        arrays[f"{side}_character"] = np.repeat([c[2] for c in characters], 20).astype(np.uint16)
        arrays[f"{side}_alphabet"] = np.repeat([alphabets.index(c[0]) for c in characters], 20)
        arrays[f"{side}_drawer"] = np.tile(np.arange(1, 21), len(characters)).astype(np.uint8)
        start += rows
    (root / "omniglot").mkdir()
    np.savez(root / "omniglot" / "omniglot_28x28_area.npz", **arrays)


@pytest.fixture
def few_characters(monkeypatch):
    """The number of characters in a complete folder is that of the small files."""
    for folder, characters in CHARACTERS.items():
        monkeypatch.setitem(formats.OMNIGLOT_CHARACTERS, folder, len(characters))


def check_omniglot(data, small):
    drawer = np.tile(np.arange(1, 21), 3)
    assert sizes(data) == (54, 6, 40)
    assert np.array_equal(stored(data), small[:60].reshape(60, -1)[drawer <= 18])
    assert np.array_equal(stored(data, "validation"), small[:60].reshape(60, -1)[drawer > 18])
    assert np.array_equal(stored(data, "test"), small[60:].reshape(40, -1))
    assert np.array_equal(stored(data, "train", "y"), np.repeat([0, 1, 2], 18))
    assert stored(data, "validation", "y").tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(stored(data, "test", "y"), np.repeat([3, 4], 20))
    assert data.classes == (*NAMES, "Gamma/character02")
    assert (data.unit, data.image_shape) == (255.0, (1, 28, 28))


def test_omniglot_is_the_same_from_drawings_and_from_the_area_file(
    home, few_characters, monkeypatch
):
    from torchvision import datasets

    ink = np.random.RandomState(0).random_sample((100, 105, 105)) < 0.3
    small = np.stack([area_means_by_copying(image) for image in ink])
    calls = []

    class Downloads:  # in the place of torchvision's class, without the network
        def __init__(self, root, *, background, download):
            calls.append((Path(root), background, download))
            if not background:
                write_drawings(Path(root), ink)

    monkeypatch.setattr(datasets, "Omniglot", Downloads)
    drawn = load_data("omniglot")
    check_omniglot(drawn, small)
    assert calls == [(home, True, True), (home, False, True)]
    load_data("omniglot")
    assert len(calls) == 2
    write_area_file(home, small)
    (home / "omniglot-py").rename(home / "away")
    small_file = load_data("omniglot")
    assert small_file.fingerprint() == drawn.fingerprint()
    assert small_file.classes == drawn.classes


def test_drawings_that_are_missing_are_noticed(home, few_characters):
    write_drawings(home, np.zeros((100, 105, 105), bool))
    next((home / "omniglot-py").glob("images_background/Alpha/*/*_07.png")).unlink()
    with pytest.raises(ValueError, match="59 drawings of 3 characters, not 60 of 3"):
        load_data("omniglot")


def test_real_drawings_as_png_give_the_bytes_of_the_real_area_file(
    home, few_characters, monkeypatch
):
    packed = np.load(real("omniglot", "omniglot_105x105.npz"))
    small = np.load(real("omniglot", "omniglot_28x28_area.npz"))
    parts = [("background", slice(0, 60)), ("evaluation", slice(0, 40))]
    ink = [np.unpackbits(packed[s][r], axis=1, count=105 * 105) for s, r in parts]
    write_drawings(home, np.concatenate(ink).reshape(-1, 105, 105).astype(bool))
    check_omniglot(load_data("omniglot"), np.concatenate([small[s][r] for s, r in parts]))


def test_real_omniglot_has_its_published_counts():
    real("omniglot", "omniglot_28x28_area.npz")
    data = load_data("omniglot")
    assert sizes(data) == (18 * 964, 2 * 964, 20 * 659)
    assert np.bincount(stored(data, "train", "y")).tolist() == [18] * 964
    assert sorted(set(stored(data, "test", "y").tolist())) == list(range(964, 1623))
    # The published list of numbers has Alphabet of the Magi at 709 .. 728 and ULOG last.
    assert data.classes[708] == "Alphabet_of_the_Magi/character01"
    assert data.classes[1622] == "ULOG/character26"


def write_chardata(home, pixels, test_pixels, **changes):
    (home / "omniglot").mkdir(exist_ok=True)
    mat = {
        "data": pixels.T,
        "testdata": test_pixels.T,
        "target": np.eye(50)[:, np.arange(len(pixels)) % 50],
        "testtarget": np.eye(50)[:, np.arange(len(test_pixels)) % 7],
    }
    mat = {key: value for key, value in (mat | changes).items() if value is not None}
    scipy.io.savemat(home / "omniglot" / "chardata.mat", mat)


@pytest.mark.parametrize("exact", [True, False])
def test_chardata_is_turned_upright_and_kept_exactly(home, exact):
    random = np.random.RandomState(0)
    train, test = (random.randint(0, 256, (rows, 784)) / 255.0 for rows in (1350, 9))
    if not exact:
        test[3, 5] = 0.5001
    write_chardata(home, train, test)
    data = load_data("omniglot_iwae")
    assert sizes(data) == (5, 1345, 9)
    assert stored(data).dtype == (np.uint8 if exact else np.float32)
    upright = [
        np.stack([row.reshape(28, 28).T.reshape(-1) for row in part]) for part in (train, test)
    ]
    for split, expected in (
        ("train", upright[0][:5]),
        ("validation", upright[0][5:]),
        ("test", upright[1]),
    ):
        used = data.split(split).batch(slice(None))["x"].numpy()
        assert np.array_equal(used, expected.astype(np.float32))
    assert stored(data, "train", "y").tolist() == [0, 1, 2, 3, 4]
    assert stored(data, "test", "y").tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert load_data("omniglot_iwae", binarize="dynamic").binarization == "dynamic"


def test_another_chardata_is_refused(home):
    write_chardata(home, np.zeros((1345, 784)), np.zeros((2, 784)))
    with pytest.raises(ValueError, match="more than 1345"):
        load_data("omniglot_iwae")
    write_chardata(home, np.zeros((1346, 784)), np.zeros((2, 784)), testtarget=None)
    with pytest.raises(ValueError, match="lacks testtarget"):
        load_data("omniglot_iwae")
    write_chardata(home, np.zeros((1346, 784)), np.zeros((2, 784)), testtarget=np.ones((50, 2)))
    with pytest.raises(ValueError, match="one-hot"):
        load_data("omniglot_iwae")
    (home / "omniglot" / "chardata.mat").write_bytes(b"no MATLAB file" * 20)
    with pytest.raises(ValueError, match="no MATLAB 5 file"):
        load_data("omniglot_iwae")


# Others


def test_silhouettes_are_turned_upright_with_the_object_as_one(home):
    (home / "caltech101_silhouettes").mkdir()
    mat, expected = {}, {}
    for i, (key, split) in enumerate((("train", "train"), ("val", "validation"), ("test", "test"))):
        background = bits(3 + i, i)
        mat[f"{key}_data"] = background
        mat[f"{key}_labels"] = (np.arange(3 + i) % 3 + 1).astype(np.uint8)[:, None]
        expected[split] = np.stack([1 - row.reshape(28, 28).T.reshape(-1) for row in background])
    mat["classnames"] = np.array([["Airplanes", "Faces 2", "ant"]], dtype=object)
    path = home / "caltech101_silhouettes" / "caltech101_silhouettes_28_split1.mat"
    scipy.io.savemat(path, mat)
    data = load_data("caltech_silhouettes")
    for split, x in expected.items():
        assert np.array_equal(stored(data, split), x)
        assert np.array_equal(stored(data, split, "y"), np.arange(len(x)) % 3)
    assert data.classes == ("Airplanes", "Faces 2", "ant")
    assert (data.unit, data.binarization, data.image_shape) == (1.0, "none", (1, 28, 28))


def test_real_silhouettes_are_airplanes_wider_than_high():
    real("caltech101_silhouettes", "caltech101_silhouettes_28_split1.mat")
    data = load_data("caltech_silhouettes")
    assert sizes(data) == (4100, 2264, 2307)
    assert len(data.classes) == 101
    x, y = stored(data), stored(data, "train", "y")
    assert data.classes[0] == "Airplanes Side 2"
    planes = x[y == 0].reshape(-1, 28, 28)
    border = x.reshape(-1, 28, 28)[:, 0].mean()
    assert border < 0.5  # the background, at the border, is 0
    assert planes.any(2).sum(1).mean() < planes.any(1).sum(1).mean()


def test_frey_faces_are_shuffled_by_a_fixed_seed(home):
    (home / "freyfaces").mkdir()
    x = np.random.RandomState(1).randint(0, 256, (1965, 560)).astype(np.uint8)
    np.save(home / "freyfaces" / "freyfaces.npy", x)
    data = load_data("frey_faces", seed=5)
    order = np.random.RandomState(0).permutation(1965)
    assert sizes(data) == (1565, 200, 200)
    assert np.array_equal(np.concatenate([stored(data, s) for s in data.splits]), x[order])
    assert (data.unit, data.image_shape) == (255.0, (1, 28, 20))
    np.save(home / "freyfaces" / "freyfaces.npy", x[:1000])
    with pytest.raises(ValueError, match=r"expected \(1965, 560\) bytes"):
        load_data("frey_faces")


def test_real_frey_faces_keep_their_range():
    real("freyfaces", "freyfaces.npy")
    data = load_data("frey_faces")
    x = np.concatenate([stored(data, s) for s in data.splits])
    assert (x.shape, x.min(), x.max()) == ((1965, 560), 8, 238)


class OpenedError(Exception):
    pass


class Trap:
    def __reduce__(self):
        return _spring, ()


def _spring():
    raise OpenedError


def test_dsprites_are_read_without_touching_the_pickle_in_their_file(home):
    (home / "dsprites").mkdir()
    random = np.random.RandomState(0)
    images = random.randint(0, 2, (50, 64, 64)).astype(np.uint8)
    factors = np.stack([random.randint(0, n, 50) for n in (1, 3, 6, 40, 32, 32)], axis=1)
    np.savez_compressed(
        home / "dsprites" / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
        imgs=images,
        latents_classes=factors,
        latents_values=factors * 1.0,
        metadata=np.array(Trap(), dtype=object),
    )
    data = load_data("dsprites")
    order = np.random.RandomState(0).permutation(50)
    assert sizes(data) == (40, 5, 5)
    for column, array in (
        ("x", images.reshape(50, -1)),
        ("y", factors[:, 1]),
        ("factors", factors),
    ):
        found = np.concatenate([stored(data, s, column) for s in data.splits])
        assert np.array_equal(found, array[order])
    assert data.classes == ("square", "ellipse", "heart")
    assert (data.unit, data.image_shape, stored(data).dtype) == (1.0, (1, 64, 64), np.uint8)
    assert load_data("dsprites", labels=False).columns == ("x", "factors")
