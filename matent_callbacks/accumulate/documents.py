"""Accumulates the scatter between documents and within them, for LiDAR: documents are classes, their parts views."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from matent_callbacks.accumulate.moments import Moments
from matent_callbacks.accumulate.pieces import rows_of_a_piece, slices
from matent_callbacks.accumulate.sequences import Sequences
from matent_callbacks.accumulate.symmetric import lower_triangle, symmetric

VIEWS = 8
"""How many consecutive parts, about equally long, a document is split into."""

# As in the paper. It is added to the variances within documents, whatever their size is.
_DELTA = 1e-4


class Discriminant(NamedTuple):
    """The scatter between documents relative to that within them (the matrix of a linear discriminant analysis).

    It has the interface of :class:`.Matrix` for what is decomposed by eigenvalues.
    """

    moments: Moments
    """Of the means of documents."""
    within: Moments
    """Of their views, centred by the mean of their document, with the scatter about the origin."""

    @property
    def num_features(self) -> int:
        """Number of features d; 0 if no document was seen."""
        return self.moments.num_features

    @property
    def size(self) -> int:
        """Number of rows of the matrix."""
        return self.num_features if self.moments.has_scatter else 0

    def lower(self) -> Tensor:
        """``(d, d)``, W^(-1/2) B W^(-1/2) in the basis of the eigenvectors of W; B is a sum, not a mean."""
        device = self.moments.scatter.device
        within = symmetric(lower_triangle(self.within.scatter))
        within /= self.within.num_tokens.clamp(min=1)
        usable = torch.isfinite(within.trace())
        within = torch.where(usable, within, 0.0)
        # The solver has no MPS kernel.
        variances, vectors = torch.linalg.eigh(within.cpu() if device.type == "mps" else within)
        vectors = (vectors / (variances.clamp(min=0) + _DELTA).sqrt()).to(device)
        between = vectors.T @ symmetric(lower_triangle(self.moments.scatter)) @ vectors
        return torch.where(usable, between, torch.nan)

    def to(self, device: torch.device) -> Discriminant:
        """Copy to a device."""
        return Discriminant(self.moments.to(device), self.within.to(device))


def views_at_a_time(sequences: Sequences, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield views ``(b, VIEWS, d)``, which sequences have them ``(b,)``, and the number of tokens with NaN or Inf.

    ``dtype`` should be float64: dividing by small variances within documents amplifies rounding errors.
    """
    states, mask = sequences.states, sequences.mask
    length = states.shape[1]
    rows = rows_of_a_piece(states.shape[-1], dtype)
    for some in slices(len(states), max(1, rows // max(length, 2 * VIEWS))):
        own, valid = states[some], sequences.valid[some]
        parts = list(slices(length, max(1, rows // max(1, len(own)))))
        count = valid.sum(1)
        of_view = (valid.cumsum(1) - 1) * VIEWS // count.clamp(min=1).unsqueeze(1)
        views = torch.arange(VIEWS, device=states.device).unsqueeze(1)
        belongs = (of_view.unsqueeze(1) == views) & valid.unsqueeze(1)
        total = torch.zeros(len(own), VIEWS, states.shape[-1], dtype=dtype, device=states.device)
        for part in parts:
            x = torch.where(valid[:, part].unsqueeze(-1), own[:, part].to(dtype), 0.0)
            total.baddbmm_(belongs[:, :, part].to(dtype), x)
            del x
        mean = total.div_(belongs.sum(2).clamp(min=1).unsqueeze(-1))
        yield mean, count >= VIEWS, (mask[some] & ~valid).sum()
