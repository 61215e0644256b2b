"""The type of every data set: batches, binarization, copies, fingerprint."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.data import Dataset, from_arrays, validation


def grey(rows=40, seed=1):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (rows, 6)).astype(np.uint8))


def grey_dataset():
    splits = {"train": grey(40, 1), "validation": grey(20, 2), "test": grey(20, 3)}
    return Dataset("grey", {s: {"x": x} for s, x in splits.items()}, (1, 2, 3), unit=255.0)


def one_split(x, **kwargs):
    return Dataset("d", {"train": {"x": x}}, **kwargs)


# Rows


def test_a_batch_holds_the_rows_asked_for_divided_by_the_unit():
    x = torch.tensor([[0, 255], [51, 102], [255, 0]], dtype=torch.uint8)
    y = torch.tensor([2, 0, 1])
    extra = torch.tensor([7, 8, 9], dtype=torch.int16)
    data = Dataset("d", {"train": {"x": x, "y": y, "w": extra}}, unit=255)
    rows = data.split("train")
    assert len(rows) == 3
    assert rows.columns == ("x", "y", "w")
    batch = rows.batch(torch.tensor([2, 1, 1]))
    assert torch.equal(batch["x"], torch.tensor([[1.0, 0.0], [0.2, 0.4], [0.2, 0.4]]))
    assert batch["y"].tolist() == [1, 0, 0]
    assert batch["y"].dtype == torch.int64
    assert torch.equal(batch["w"], torch.tensor([9.0, 8.0, 8.0]))
    assert rows.batch(slice(0, 1), dtype=torch.float64)["x"].dtype == torch.float64


def test_a_batch_has_the_default_dtype_of_the_moment():
    rows = one_split(grey(4)).split("train")
    torch.set_default_dtype(torch.float64)
    try:
        assert rows.batch(slice(None))["x"].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_writing_into_a_batch_leaves_the_data_as_they_were():
    data = from_arrays({"x": torch.ones(10, 2), "y": torch.zeros(10, dtype=torch.int64)})
    before = data.fingerprint()
    batch = data.split("train").batch(slice(0, 4))
    batch["x"].zero_()
    batch["y"].fill_(5)
    assert data.fingerprint() == before


def test_batches_give_every_row_once_in_order_with_a_small_last_one():
    rows = one_split(torch.arange(10.0)[:, None]).split("train")
    batches = list(rows.batches(4))
    assert [len(b["x"]) for b in batches] == [4, 4, 2]
    assert torch.cat([b["x"] for b in batches])[:, 0].tolist() == list(range(10))
    with pytest.raises(ValueError, match="at least 1 row"):
        rows.batches(0)


@pytest.mark.parametrize(
    "indices", [torch.tensor([True, False]), torch.tensor([[0]]), torch.tensor(0), [0, 1], 3]
)
def test_indices_of_another_kind_are_refused(indices):
    with pytest.raises(TypeError, match="indices must be an int64"):
        one_split(torch.ones(2, 1)).split("train").batch(indices)


def test_a_batch_of_integers_is_refused():
    with pytest.raises(TypeError, match=r"torch\.int64"):
        one_split(torch.ones(2, 1)).split("train").batch(slice(None), dtype=torch.int64)


def test_gathering_and_drawing_trace_to_the_same_bits():
    rows = grey_dataset().binarized("dynamic").split("train")
    indices = torch.tensor([3, 0, 7])
    traced = make_fx(lambda i: rows.batch(i)["x"])(indices)
    other = torch.tensor([5, 9, 3])  # what was traced must not be the indices' values
    torch.manual_seed(0)
    eager = rows.batch(other)["x"]
    torch.manual_seed(0)
    assert torch.equal(traced(other), eager)


def test_an_absent_split_is_named_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"no split 'tset', only \['train', 'validation', 'test'\]"
    ):
        grey_dataset().split("tset")


# Binarization


def test_dynamic_training_rows_are_drawn_anew_with_probability_of_their_grey():
    data = grey_dataset().binarized("dynamic")
    rows = data.split("train")
    torch.manual_seed(0)
    draws = torch.stack([rows.batch(slice(None))["x"] for _ in range(2000)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = grey(40, 1).double() / 255
    error = (draws.double().mean(0) - p) / (p * (1 - p) / 2000).sqrt().clamp_min(1e-9)
    sure = (p == 0) | (p == 1)
    assert error[~sure].abs().max() < 4.8  # 240 normal draws exceed this with probability 4e-4
    assert torch.equal(draws[0][sure].double(), p[sure])


def test_dynamic_draws_follow_torch_s_global_random_state_and_no_other():
    rows = grey_dataset().binarized("dynamic", seed=3).split("train")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (rows.batch(slice(None))["x"] for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(rows.batch(slice(None), dtype=torch.float64)["x"], first.double())


@pytest.mark.parametrize("how", ["static", "dynamic"])
def test_evaluation_rows_are_drawn_once_whatever_torch_s_state(how):
    torch.manual_seed(1)
    first = grey_dataset().binarized(how, seed=4)
    torch.manual_seed(2)
    again = grey_dataset().binarized(how, seed=4)
    state = torch.get_rng_state()
    assert first.fingerprint() == again.fingerprint()
    for split in ("validation", "test"):
        x = first.split(split).batch(slice(None))["x"]
        assert set(x.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(x, first.split(split).batch(slice(None))["x"])
        assert torch.equal(torch.get_rng_state(), state)  # evaluating takes no random number
    assert first.fingerprint() != grey_dataset().binarized(how, seed=5).fingerprint()


def test_static_and_dynamic_agree_on_the_evaluation_rows():
    static, dynamic = (grey_dataset().binarized(how, seed=4) for how in ("static", "dynamic"))
    for split in ("validation", "test"):
        a, b = (d.split(split).batch(slice(None))["x"] for d in (static, dynamic))
        assert torch.equal(a, b)


def test_static_bits_are_stored_as_bytes_with_the_mean_of_the_greys():
    x = torch.full((3000, 4), 51, dtype=torch.uint8)  # a fifth
    x[:, 1], x[:, 2] = 0, 255
    data = one_split(x, unit=255.0).binarized("static", seed=0)
    stored = data.splits["train"]["x"]
    assert (stored.dtype, data.unit, data.binarization) == (torch.uint8, 1.0, "static")
    assert stored.unique().tolist() == [0, 1]
    assert stored[:, 1].sum() == 0
    assert stored[:, 2].sum() == 3000
    assert abs(stored[:, [0, 3]].double().mean() - 0.2) < 4 * (0.16 / 6000) ** 0.5
    assert not torch.equal(stored[:, 0], stored[:, 3])


def test_bits_do_not_depend_on_how_many_rows_are_looked_at_together(monkeypatch):
    whole = grey_dataset().binarized("static").fingerprint()

    def three_rows(value):
        return ((start, value[start : start + 3]) for start in range(0, len(value), 3))

    monkeypatch.setattr(validation, "in_parts", three_rows)
    assert grey_dataset().binarized("static").fingerprint() == whole


def test_dynamic_keeps_the_bytes_and_copies_no_training_row():
    data = grey_dataset()
    dynamic = data.binarized("dynamic")
    assert dynamic.splits["train"]["x"].data_ptr() == data.splits["train"]["x"].data_ptr()
    assert dynamic.splits["test"]["x"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("x", "unit"),
    [
        (torch.tensor([[0.5], [1.5]]), 1.0),
        (torch.tensor([[0.5], [-0.1]]), 1.0),
        (torch.tensor([[0], [16]], dtype=torch.uint8), 1.0),
    ],
)
def test_what_is_no_probability_is_not_binarized(x, unit):
    with pytest.raises(ValueError, match=r"row 1 of train\['x'\] spans"):
        one_split(x, unit=unit).binarized("static")


def test_counts_become_greys_by_their_unit():
    counts = one_split(torch.tensor([[0, 8], [16, 4]], dtype=torch.uint8))
    bits = dataclasses.replace(counts, unit=16.0).binarized("static")
    assert bits.splits["train"]["x"][:, 0].tolist() == [0, 1]


def test_what_is_binary_is_not_binarized_again():
    bits = one_split(torch.tensor([[0, 1], [1, 1]]))
    with pytest.raises(ValueError, match="binary already"):
        bits.binarized("dynamic")
    static = grey_dataset().binarized("static")
    with pytest.raises(ValueError, match="binary already"):
        static.binarized("static")
    with pytest.raises(ValueError, match="binary already"):
        grey_dataset().binarized("dynamic").binarized("dynamic")


def test_a_false_claim_of_binarization_is_refused():
    splits = grey_dataset().splits
    with pytest.raises(ValueError, match=r"train\['x'\] must hold only 0 and 255"):
        Dataset("d", splits, unit=255.0, binarization="static")
    with pytest.raises(ValueError, match=r"validation\['x'\] must hold only 0 and 255"):
        Dataset("d", splits, unit=255.0, binarization="dynamic")
    with pytest.raises(ValueError, match="must be 'static' or 'dynamic'"):
        grey_dataset().binarized("none")
    with pytest.raises(ValueError, match="seed"):
        grey_dataset().binarized("static", seed=-1)
    with pytest.raises(ValueError, match="no column 'x'"):
        Dataset("d", {"train": {"w": torch.ones(2, 1)}}).binarized("static")


# Copies

ONES = torch.ones(3, 4)
LABELS = torch.tensor([0, 1, 2])


def test_the_splits_are_kept_when_the_caller_s_dictionary_changes():
    columns = {"x": ONES}
    data = Dataset("d", {"train": columns})
    columns["y"] = LABELS
    assert data.columns == ("x",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"


def test_without_labels_drops_them_from_every_split():
    columns = {"x": ONES, "y": LABELS}
    data = Dataset("d", {"train": columns, "test": columns}, classes=("a", "b", "c"))
    bare = data.without_labels()
    assert bare.classes is None
    assert [list(c) for c in bare.splits.values()] == [["x"], ["x"]]


def test_to_keeps_all_but_the_place():
    data = grey_dataset().binarized("dynamic")
    there = data.to("cpu")
    assert there.fingerprint() == data.fingerprint()
    assert there.split("train").to("cpu").dynamic


# Labels that are withheld


def labeled_dataset(rows=60, classes=4, seed=0):
    """Classes of unlike sizes, in no order."""
    stream = np.random.RandomState(seed)
    sizes = {"train": rows, "validation": 20, "test": 20}
    return Dataset(
        "labeled",
        {
            split: {
                "x": grey(n, number),
                "y": torch.from_numpy(stream.choice(classes, n, p=[0.4, 0.3, 0.2, 0.1])),
            }
            for number, (split, n) in enumerate(sizes.items())
        },
        (1, 2, 3),
        tuple("abcd"),
        255.0,
    )


@pytest.mark.parametrize("count", [4, 5, 11, 16])
def test_as_many_labels_of_each_class_are_kept(count):
    whole = labeled_dataset()
    data = whole.labeled(count, seed=3)
    y, was = data.splits["train"]["y"], whole.splits["train"]["y"]
    rows = data.split("train").labeled
    assert rows.tolist() == (y >= 0).nonzero().squeeze(1).tolist()
    assert len(rows) == count
    assert torch.equal(y[rows], was[rows])
    others = torch.ones(60, dtype=torch.bool)
    others[rows] = False
    assert (y[others] == -1).all()
    numbers = torch.bincount(y[rows], minlength=4)
    assert numbers.max() - numbers.min() <= 1
    assert numbers.min() == count // 4
    # All else stays.
    for split in ("validation", "test"):
        for column in ("x", "y"):
            assert torch.equal(data.splits[split][column], whole.splits[split][column])
        assert data.split(split).labeled is None
    assert torch.equal(data.splits["train"]["x"], whole.splits["train"]["x"])
    assert (data.unit, data.classes, data.image_shape) == (255.0, tuple("abcd"), (1, 2, 3))
    assert data.describe()["labeled"] == count
    assert "labeled" not in whole.describe()


def test_the_rows_that_keep_a_label_are_a_function_of_the_seed():
    whole = labeled_dataset()
    one, same, other = (whole.labeled(12, seed=s) for s in (0, 0, 1))
    assert one.fingerprint() == same.fingerprint()
    assert one.fingerprint()["sha256"] != other.fingerprint()["sha256"]
    # Which class has the odd one is drawn too, and every row can be.
    odd, drawn = set(), set()
    for seed in range(60):
        rows = whole.labeled(5, seed)
        y = rows.splits["train"]["y"]
        odd.add(int(torch.bincount(y[y >= 0], minlength=4).argmax()))
        drawn |= set(rows.split("train").labeled.tolist())
    assert odd == {0, 1, 2, 3}
    assert len(drawn) > 50


def test_what_is_withheld_is_gone():
    """Nothing of it is held: not even by the tensor that was labeled."""
    whole = labeled_dataset()
    data = whole.labeled(8)
    before = data.fingerprint()
    known = {"x": data.splits["train"]["x"].clone(), "y": data.splits["train"]["y"].clone()}
    whole.splits["train"]["y"].fill_(3)
    assert data.fingerprint() == before
    by_hand = Dataset(
        "by hand", {**data.splits, "train": known}, data.image_shape, data.classes, data.unit
    )
    assert by_hand.fingerprint()["sha256"] == before["sha256"]


def test_classes_without_names_are_counted():
    y = torch.tensor([0, 2, 1, 2, 0, 1])
    data = Dataset("d", {"train": {"x": torch.ones(6, 2), "y": y}}).labeled(3)
    kept = data.splits["train"]["y"]
    assert sorted(kept[kept >= 0].tolist()) == [0, 1, 2]
    every = Dataset("d", {"train": {"x": torch.ones(6, 2), "y": y}}).labeled(6)
    assert every.split("train").labeled is None
    assert torch.equal(every.splits["train"]["y"], y)


def test_labels_that_cannot_be_withheld_are_refused():
    whole = labeled_dataset()
    with pytest.raises(ValueError, match=r"labeled\(3\): labeled has 4 classes; expected at least"):
        whole.labeled(3)
    rare = int((whole.splits["train"]["y"] == 3).sum())
    count = 4 * (rare + 1)
    with pytest.raises(ValueError, match=rf"has {rare} training rows of class 3, and {rare + 1} "):
        whole.labeled(count)
    with pytest.raises(ValueError, match="labeled has no labels: take the data set as it was"):
        whole.without_labels().labeled(8)
    with pytest.raises(ValueError, match="labeled has withheld labels already"):
        whole.labeled(8).labeled(4)


def test_binarized_rows_keep_what_is_known_of_their_labels():
    data = labeled_dataset().labeled(8)
    for how in ("static", "dynamic"):
        assert torch.equal(data.binarized(how).splits["train"]["y"], data.splits["train"]["y"])


# Fingerprint


def test_a_description_can_be_written_as_json():
    found = json.loads(json.dumps(grey_dataset().fingerprint()))
    expected = hashlib.sha256()
    for split, x in (("train", grey(40, 1)), ("validation", grey(20, 2)), ("test", grey(20, 3))):
        expected.update(f"{split}/x:torch.uint8{tuple(x.shape)};".encode() + x.numpy().tobytes())
    assert found == {
        "name": "grey",
        "rows": {"train": 40, "validation": 20, "test": 20},
        "columns": {"x": {"shape": [6], "dtype": "uint8"}},
        "image_shape": [1, 2, 3],
        "classes": None,
        "unit": 255.0,
        "binarization": "none",
        "sha256": expected.hexdigest(),
    }


def test_the_digest_tells_values_shapes_dtypes_and_places_apart():
    x = torch.zeros(4, 6, dtype=torch.uint8)
    changed = x.clone()
    changed[3, 5] = 1
    sets = [
        one_split(x),
        one_split(changed),
        one_split(x.reshape(4, 2, 3)),
        one_split(x.reshape(8, 3)),
        one_split(x.to(torch.int8)),
        one_split(x.to(torch.bool)),
        one_split(x.to(torch.bfloat16)),
        Dataset("d", {"train": {"w": x}}),
        Dataset("d", {"train": {"x": x[:3]}, "test": {"x": x[3:]}}),
    ]
    digests = [data.fingerprint()["sha256"] for data in sets]
    assert len(set(digests)) == len(digests)
    spread = torch.zeros(6, 4, dtype=torch.uint8).t()
    assert one_split(spread).fingerprint() == one_split(x).fingerprint()
