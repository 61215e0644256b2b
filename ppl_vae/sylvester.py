"""Sylvester flows: planar steps across several directions at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from pyro.distributions.transforms import Transform
from pyro.distributions.transforms.householder import ConditionedHouseholder
from torch import Tensor

from ppl_vae.bijections import SylvesterStep
from ppl_vae.flow import Flow, RawNumbers

Kind = Literal["orthogonal", "householder", "triangular"]


class Sylvester(Flow):
    """Steps ``z + Q R tanh(S Q' z + b)``, with Q, R, S and b from the context.

    Source: van den Berg et al. 2018 (arXiv:1803.05649), section 3. R and S are upper triangular
    with diagonals in (-1, 1). Q, by kind:

    - "orthogonal": some orthonormal columns, by Gram-Schmidt, which is exact where the paper's
      iteration stops early;
    - "householder": a product of reflections;
    - "triangular": the identity and the reversal of coordinates in turn.

    Args:
        size, context, layers: as :class:`Flow`.
        kind: of Q.
        vectors: number of orthonormal columns, or of reflections; None: ``min(size, 8)``. Not for
            "triangular".
        hidden: hidden widths of the net from the context to all numbers.

    Raises:
        ValueError: as :class:`Flow`; an unknown kind; vectors below 1, more orthonormal ones
            than coordinates, or any for "triangular".
    """

    invertible = False

    def __init__(
        self,
        size: int,
        context: int = 0,
        *,
        layers: int = 4,
        kind: Kind = "orthogonal",
        vectors: int | None = None,
        hidden: Sequence[int] = (),
    ) -> None:
        super().__init__(size, context, layers=layers)
        if kind not in get_args(Kind):
            raise ValueError(f"Sylvester(kind={kind!r}): expected one of {get_args(Kind)}")
        if vectors is not None and (
            kind == "triangular" or vectors < 1 or (kind == "orthogonal" and vectors > size)
        ):
            raise ValueError(
                f"Sylvester(size={size}, kind={kind!r}, vectors={vectors}): expected 1 to {size} "
                "orthonormal columns, at least 1 reflection, or none for 'triangular'"
            )
        self.kind: Kind = kind
        self.vectors = 0 if kind == "triangular" else vectors or min(size, 8)
        self.width = self.vectors if kind == "orthogonal" else size  # M
        pairs = self.width * (self.width - 1) // 2
        # Vectors, b, both diagonals, and what stands above them.
        self.parts = [self.vectors * size, self.width, self.width, self.width, pairs, pairs]
        start = [torch.zeros(layers, part) for part in self.parts]
        start[0] = torch.randn(layers, self.parts[0])
        start[3] += 1  # S away from 0, since R begins near it, and learns by S
        self.raw = RawNumbers(context, hidden, torch.cat(start, -1))

    def transforms(self, context: Tensor | None) -> list[Transform]:
        raw = self.raw(context)  # (..., layers, numbers)
        vectors, bias, *factors = raw.split(self.parts, -1)
        outer, inner = (
            self._triangular(*pair) for pair in zip(factors[:2], factors[2:], strict=True)
        )
        vectors = vectors.unflatten(-1, (self.vectors, self.size))
        bases = orthonormal(vectors) if self.kind == "orthogonal" else vectors
        steps: list[Transform] = []
        matrices = (matrix.unbind(-3) for matrix in (outer, inner, bases))
        for layer, (b, r, s, q) in enumerate(zip(bias.unbind(-2), *matrices, strict=True)):
            if self.kind == "orthogonal":
                steps.append(SylvesterStep(r, s, b, q.mT))
            elif self.kind == "householder":
                there, back = ConditionedHouseholder(q), ConditionedHouseholder(q.flip(-2))
                steps += [there, SylvesterStep(r, s, b), back]
            else:  # with coordinates reversed, an upper triangle is a lower one
                steps.append(SylvesterStep(r.mT, s.mT, b) if layer % 2 else SylvesterStep(r, s, b))
        return steps

    def _triangular(self, diagonal: Tensor, above: Tensor) -> Tensor:
        """R ``(..., M, M)`` with a diagonal inside (-1, 1), from raw numbers."""
        rows, columns = torch.triu_indices(self.width, self.width, offset=1)
        # Off 1, which tanh reaches in float32, so that no determinant is 0.
        matrix = torch.diag_embed(0.999 * torch.tanh(diagonal))
        matrix[..., rows, columns] = above
        return matrix


def orthonormal(vectors: Tensor) -> Tensor:
    """Rows ``(..., M, size)`` made orthonormal, each against those before it: Gram-Schmidt.

    Each goes through twice: the second time takes out what rounding has left of the others.
    """
    done: list[Tensor] = []
    for vector in vectors.unbind(-2):
        for _ in range(2):
            if done:
                others = torch.stack(done, -2)
                shares = (others * vector.unsqueeze(-2)).sum(-1, keepdim=True)
                vector = vector - (shares * others).sum(-2)
            vector = vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
        done.append(vector)
    return torch.stack(done, -2)
