"""Data that are malformed are refused, by split, column and row."""

import pytest
import torch

from ppl_vae.data import Dataset

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
        ({"train": {"x": ONES, "y": LABELS - 2}}, {}, ValueError, "label -2 in row 0"),
        (
            {"train": {"x": ONES, "y": LABELS - 2}},
            {},
            ValueError,
            "expected 0 or more, or -1 for a label that is withheld",
        ),
        (
            {"train": {"x": ONES, "y": LABELS}, "test": {"x": ONES, "y": LABELS - 1}},
            {},
            ValueError,
            "test['y'] has label -1 in row 0: expected 0 or more",
        ),
        (
            {"train": {"x": ONES, "y": torch.full((3,), -1)}},
            {},
            ValueError,
            "train['y'] has no label at all: drop the column, with Dataset.without_labels()",
        ),
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
