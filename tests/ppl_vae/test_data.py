"""The type of every data set: batches, binarization, checks, and arrays made into it."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.data import Dataset, as_dataset, from_arrays


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
    from ppl_vae.data import dataset

    def three_rows(value):
        return ((start, value[start : start + 3]) for start in range(0, len(value), 3))

    monkeypatch.setattr(dataset, "_parts", three_rows)
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


# Checks at construction

ONES = torch.ones(3, 4)
LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("splits", "options", "error", "message"),
    [
        ({}, {}, ValueError, "splits must be 'train'"),
        ({"test": {"x": ONES}}, {}, ValueError, "splits must be 'train'"),
        ({"train": {"x": ONES}, "valid": {"x": ONES}}, {}, ValueError, "'valid'"),
        ({"train": {}}, {}, ValueError, "train has no columns"),
        ({"train": {"x": ONES[:0]}}, {}, ValueError, "train is empty"),
        ({"train": {"x": ONES}, "test": {"x": ONES[:0]}}, {}, ValueError, "test is empty"),
        ({"train": {"x": torch.ones(3, 0)}}, {}, ValueError, "hold no values"),
        ({"train": {"x": torch.tensor(1.0)}}, {}, ValueError, "single number"),
        ({"train": {"x": ONES * 1j}}, {}, TypeError, "complex64"),
        ({"train": {"x": ONES.numpy()}}, {}, TypeError, "from_arrays"),
        ({"train": {"x": ONES.to_sparse()}}, {}, TypeError, "to_dense"),
        ({"train": {"x": ONES, "y": LABELS[:2]}}, {}, ValueError, "{'x': 3, 'y': 2}"),
        ({"train": {"x": ONES, "y": LABELS - 1}}, {}, ValueError, "label -1 in row 0"),
        ({"train": {"x": ONES, "y": LABELS * 1.0}}, {}, TypeError, "int64 labels, not torch.float"),
        ({"train": {"x": ONES, "y": LABELS[:, None]}}, {}, ValueError, "vector of labels"),
        (
            {"train": {"x": ONES, "y": LABELS}},
            {"classes": ("a", "b")},
            ValueError,
            "train['y'] has label 2 in row 2: expected 0 .. 1, as there are 2 classes",
        ),
        ({"train": {"x": ONES}}, {"classes": ("a",)}, ValueError, "no column 'y'"),
        (
            {"train": {"x": ONES}, "test": {"x": ONES[:, :2]}},
            {},
            ValueError,
            "a row of test['x'] has shape (2,) but one of train['x'] has (4,)",
        ),
        (
            {"train": {"x": ONES}, "test": {"x": ONES.double()}},
            {},
            TypeError,
            "test['x'] is torch.f",
        ),
        (
            {"train": {"x": ONES, "y": LABELS}, "test": {"x": ONES}},
            {},
            ValueError,
            "test has columns",
        ),
        ({"train": {"x": ONES}}, {"image_shape": (1, 3, 3)}, ValueError, "flat rows x of 9 values"),
        ({"train": {"x": ONES}}, {"image_shape": (4,)}, ValueError, "(channels, height, width)"),
        ({"train": {"x": ONES}}, {"image_shape": (-1, -4, 1)}, ValueError, "(channels, height,"),
        ({"train": {"w": ONES}}, {"image_shape": (1, 2, 2)}, ValueError, "x is missing"),
        ({"train": {"x": ONES.view(3, 2, 2)}}, {"image_shape": (1, 2, 2)}, ValueError, "flat rows"),
        ({"train": {"x": ONES}}, {"unit": 0.0}, ValueError, "unit must be a positive number"),
        ({"train": {"x": ONES}}, {"unit": float("nan")}, ValueError, "unit must be"),
        ({"train": {"x": ONES}}, {"binarization": "maybe"}, ValueError, "binarization must be one"),
        ({"train": {"w": ONES}}, {"binarization": "static"}, ValueError, "there is no column 'x'"),
    ],
)
def test_malformed_data_are_refused_by_name(splits, options, error, message):
    with pytest.raises(error) as caught:
        Dataset("d", splits, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_that_are_not_finite_are_located(bad, dtype):
    x = torch.zeros(5000, 300, dtype=dtype)  # more than is looked at in one piece
    x[4321, 7] = x[4999, 0] = bad
    with pytest.raises(
        ValueError, match=r"validation\['w'\] has NaN or infinity, first in row 4321"
    ):
        Dataset("d", {"train": {"w": torch.zeros(1, 300, dtype=dtype)}, "validation": {"w": x}})


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


# Arrays


@pytest.mark.parametrize(("rows", "sizes"), [(3, (1, 1, 1)), (19, (17, 1, 1)), (50, (40, 5, 5))])
def test_a_bare_array_is_split_by_the_documented_permutation(rows, sizes):
    x, y = np.arange(rows * 2.0).reshape(rows, 2), np.arange(rows)
    data = from_arrays({"x": x, "y": y}, seed=7)
    order = np.random.RandomState(7).permutation(rows)
    assert tuple(len(data.split(s)) for s in ("train", "validation", "test")) == sizes
    stored = [torch.cat([c[name] for c in data.splits.values()]) for name in ("x", "y")]
    assert np.array_equal(stored[0].numpy(), x[order])
    assert np.array_equal(stored[1].numpy(), y[order])


def test_too_few_rows_to_split_are_refused_and_can_be_kept_whole():
    with pytest.raises(ValueError, match="2 rows cannot be split"):
        from_arrays(torch.ones(2, 3))
    assert len(as_dataset({"train": torch.ones(2, 3)}).split("train")) == 2
    with pytest.raises(ValueError, match="empty"):
        from_arrays(torch.ones(0, 3))
    with pytest.raises(ValueError, match="single number"):
        from_arrays(torch.tensor(3.0))
    with pytest.raises(ValueError, match="one row a datum"):
        from_arrays({"x": torch.ones(5, 3), "y": torch.ones(4).long()})


def test_given_splits_are_taken_as_they_are_without_a_copy():
    x = np.ones((4, 2), np.float32)
    data = from_arrays(x, test=x[:1])
    assert list(data.splits) == ["train", "test"]
    x[0, 0] = 5
    assert data.splits["train"]["x"][0, 0] == 5


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.uint8, torch.uint8),
        (np.bool_, torch.bool),
        (np.int32, torch.int32),
        (np.uint16, torch.int32),
        (np.uint32, torch.int64),
        (np.uint64, torch.int64),
        (np.float16, torch.float16),
        (np.dtype(">f4"), torch.float32),
        (np.dtype(">i2"), torch.int16),
    ],
)
def test_numpy_dtypes_keep_their_values(given, kept):
    array = np.arange(20).reshape(5, 2, 2).astype(given)[::-1]
    stored = as_dataset({"train": array}).splits["train"]["x"]
    assert stored.dtype == kept
    assert np.array_equal(stored.numpy(), array)


def test_read_only_arrays_are_copied():
    array = np.ones((5, 2), np.float32)
    array.flags.writeable = False  # torch could write into it nevertheless, and warns just once
    stored = as_dataset({"train": array}).splits["train"]["x"]
    assert not np.shares_memory(stored.numpy(), array)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([["a"], ["b"], ["c"]]), "dtype <U1"),
        (np.array([[None], [1], [2]], dtype=object), "dtype object"),
        (np.ones((3, 1), np.complex64), "dtype complex64"),
        (np.ones((3, 1), np.longdouble), "dtype float128"),
        (np.ma.masked_array(np.ones((3, 1)), False), "masked"),
        ([[1.0], [2.0], [3.0]], "not list"),
        (None, "not NoneType"),
        ("mnist", r"load_data\('mnist'\)"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(value, message):
    with pytest.raises(TypeError, match=message):
        as_dataset(value)


def test_unsigned_values_beyond_int64_are_refused():
    with pytest.raises(ValueError, match="more than int64 holds"):
        from_arrays(np.full((3, 1), 2**63, np.uint64))


def test_labels_of_any_integer_type_become_int64():
    data = from_arrays(
        {"x": ONES, "y": np.array([0, 1, 2], np.uint8)}, test={"x": ONES, "y": LABELS}
    )
    assert {c["y"].dtype for c in data.splits.values()} == {torch.int64}
    with pytest.raises(TypeError, match="int64 labels"):
        from_arrays({"x": ONES, "y": np.ones(3)})


def test_images_are_stored_flat_and_other_events_as_given():
    x = torch.arange(24.0).reshape(4, 1, 2, 3)
    for given in (x, x[:, 0], x.reshape(4, 6)):
        data = from_arrays(given, test=given, image_shape=(1, 2, 3))
        assert torch.equal(data.splits["train"]["x"], x.reshape(4, 6))
    assert from_arrays(x, test=x).splits["train"]["x"].shape == (4, 1, 2, 3)
    with pytest.raises(ValueError, match="flat rows"):
        from_arrays(x.movedim(1, 3), test=x.movedim(1, 3), image_shape=(1, 2, 3))


def test_as_dataset_reads_every_documented_form():
    data = grey_dataset()
    assert as_dataset(data) is data
    assert as_dataset(torch.ones(10, 2)).columns == ("x",)
    assert as_dataset({"w": torch.ones(10, 2), "v": torch.ones(10)}).columns == ("w", "v")
    split = as_dataset({"test": {"w": torch.ones(2, 1)}, "train": {"w": torch.ones(3, 1)}})
    assert {s: len(split.split(s)) for s in split.splits} == {"train": 3, "test": 2}
    with pytest.raises(ValueError, match="mix splits"):
        as_dataset({"train": ONES, "x": ONES})


def test_a_tensor_with_a_gradient_is_stored_without():
    x = torch.ones(4, 2, requires_grad=True)
    assert not as_dataset({"train": x}).split("train").batch(slice(None))["x"].requires_grad
