"""Arrays in memory made into a data set."""

import numpy as np
import pytest
import torch

from ppl_vae.data import Dataset, as_dataset, from_arrays

ONES = torch.ones(3, 4)
LABELS = torch.tensor([0, 1, 2])


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
    data = Dataset("ones", {"train": {"x": ONES}})
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
