"""Turns the matrices of layers into numbers, by their eigenvalues or by an estimate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from matent_callbacks.accumulate.catalogue import CATALOGUE, SPECTRUM_TOP, Source, quantity
from matent_callbacks.accumulate.documents import Discriminant
from matent_callbacks.accumulate.pooled_tokens import Matrix
from matent_callbacks.accumulate.probe_tokens import TokenPairs
from matent_callbacks.accumulate.statistics import STATISTICS
from matent_callbacks.functional._estimate import estimate_entropy
from matent_callbacks.functional._precision import full_precision
from matent_callbacks.functional.entropy import summarized
from matent_callbacks.functional.spectrum import over_trace, solved
from matent_callbacks.monitor.solvers import side_by_side

# The most numbers in matrices that are decomposed in one call. Large matrices gain nothing from a common call, which
# takes three times their memory.
_BATCH_NUMBERS = 2**17
# From this width on, each matrix is decomposed on a thread of its own. A smaller one takes no longer than waking one.
_WORTH_A_THREAD = 256
NONFINITE = "nonfinite_tokens"
COUNTED = "counted"
ERROR = "matrix_entropy_error"
# From this width on the approximate solver is at least 5 times as fast as the eigenvalues, with an error below 1 %
# (benchmarks/solver.py).
_WIDE = 1024

Unit = tuple[Source, str]
"""What has a spectrum of its own: a layer, and how its tokens were centred and normalised."""


Work = Matrix | Discriminant | TokenPairs
"""What the numbers of a unit are computed from."""


def decompose(work: dict[Unit, Work], names: Mapping[Unit, list[str]]) -> dict[Unit, Tensor]:
    """Compute the numbers of each unit, ``(names,)``; NaN where too few tokens were seen. The counts come last.

    Each matrix is removed from the dict, so that it is freed afterwards.
    """
    matrices = {unit: own for unit, own in work.items() if not isinstance(own, TokenPairs)}
    pairs = {unit: own for unit, own in work.items() if isinstance(own, TokenPairs)}
    work.clear()
    return _decomposed(matrices, names) | _compared(pairs, names)


def _compared(pairs: dict[Unit, TokenPairs], names: Mapping[Unit, list[str]]) -> dict[Unit, Tensor]:
    """Compare tokens of now with those of the reference: on the CPU several layers at a time, one on each thread."""
    units = list(pairs)
    own = [pairs.pop(unit) for unit in units]
    threads = bool(own) and own[0].states.device.type == "cpu" and min(own[0].states.shape) >= _WORTH_A_THREAD
    found = side_by_side(TokenPairs.compare, own) if threads else [one.compare() for one in own]
    return {
        unit: torch.stack(
            [*(one[name] for name in names[unit][:-2]), one["count"].double(), one["count"].new_zeros(())]
        )
        for unit, one in zip(units, found, strict=True)
    }


def _decomposed(matrices: dict[Unit, Matrix | Discriminant], names: Mapping[Unit, list[str]]) -> dict[Unit, Tensor]:
    """Decompose the matrices of one shape together."""
    alike: dict[tuple[int, int, Source], list[Unit]] = defaultdict(list)
    for unit in matrices:
        alike[matrices[unit].size, matrices[unit].num_features, unit[0]].append(unit)
    found: dict[Unit, Tensor] = {}
    for (size, num_features, source), units in alike.items():
        wanted = names[units[0]][:-2]
        num_tokens = torch.stack([matrices[unit].moments.num_tokens for unit in units])
        nonfinite = torch.stack([matrices[unit].moments.num_nonfinite for unit in units])
        if size == 0:
            table = torch.full((len(units), len(wanted)), torch.nan, device=num_tokens.device)
        else:
            by_dimension = [_of_dimensions(matrices[unit], wanted) for unit in units]
            eigenvalues = _eigenvalues([matrices.pop(unit) for unit in units])
            quantities = {quantity(name) for name in wanted if name in CATALOGUE} - by_dimension[0].keys()
            summary = {
                **summarized(eigenvalues, quantities, num_features=num_features),
                **_shares(eigenvalues, wanted),
                **{name: torch.stack([own[name] for own in by_dimension]) for name in by_dimension[0]},
                ERROR: torch.full_like(eigenvalues[:, 0], torch.nan),  # eigenvalues are exact
            }
            table = torch.stack([summary[quantity(name)] for name in wanted], -1)
        table = torch.where(num_tokens.unsqueeze(-1) >= STATISTICS[source].fewest, table, torch.nan)
        table = torch.cat([table, torch.stack([num_tokens, nonfinite], -1).to(table.dtype)], -1)
        found.update(zip(units, table, strict=True))
    return found


def estimate(work: dict[Unit, Work], names: Mapping[Unit, list[str]]) -> dict[Unit, Tensor]:
    """Like :func:`decompose`, but with the approximate solver for wide matrices."""
    estimated = {}
    for unit in list(work):
        matrix = work[unit]
        if not isinstance(matrix, TokenPairs) and matrix.size >= _WIDE:
            del work[unit]
            estimated[unit] = _estimated(matrix, names[unit], STATISTICS[unit[0]].fewest)
            del matrix
    return {**decompose(work, names), **estimated}


def _estimated(matrix: Matrix | Discriminant, names: Sequence[str], fewest: int) -> Tensor:
    full = matrix.full()
    # TF32 is a setting of the process, which a background thread must leave alone. There all matrices are on the CPU.
    with full_precision(full.device) if full.device.type == "cuda" else nullcontext():
        entropy, error = estimate_entropy(full)
    usable = torch.isfinite(full.sum()) & (matrix.moments.num_tokens >= fewest)
    values = {
        "matrix_entropy": entropy,
        "normalized_matrix_entropy": entropy / math.log(matrix.num_features),
        "effective_rank": entropy.exp(),
        ERROR: error,
        **_of_dimensions(matrix, names),
    }
    numbers = [torch.where(usable, values[quantity(name)], torch.nan) for name in names[:-2]]
    counts = (matrix.moments.num_tokens, matrix.moments.num_nonfinite)
    return torch.stack([*numbers, *(count.to(entropy.dtype) for count in counts)])


def _of_dimensions(matrix: Matrix | Discriminant, names: Sequence[str]) -> dict[str, Tensor]:
    """Compute what takes the matrix, and not its eigenvalues."""
    if "top_dimension_share" not in names or isinstance(matrix, Discriminant):
        return {}
    return {"top_dimension_share": matrix.top_dimension_share()}


def _eigenvalues(matrices: list[Matrix | Discriminant]) -> Tensor:
    """``(matrices, k)``: unit-trace spectra. The list is emptied, so that each matrix is freed once it is decomposed.

    Small matrices are decomposed several in one call; large ones on the CPU one on each thread.
    """
    size = matrices[0].size
    threads = matrices[0].moments.num_tokens.device.type == "cpu" and size >= _WORTH_A_THREAD
    most = 1 if threads else max(1, _BATCH_NUMBERS // size**2)
    batches = [matrices[start : start + most] for start in range(0, len(matrices), most)]
    matrices.clear()
    found = side_by_side(_solve, batches) if threads else [_solve(batch) for batch in batches]
    eigenvalues, traces = zip(*found, strict=True)
    return over_trace(torch.cat(eigenvalues), torch.cat(traces))


def _solve(batch: list[Matrix | Discriminant]) -> tuple[Tensor, Tensor]:
    lower = [batch.pop(0).lower() for _ in range(len(batch))]
    return solved(lower[0].unsqueeze(0) if len(lower) == 1 else torch.stack(lower), overwrite=True)


def _shares(eigenvalues: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Sums of the largest 1, 2, 4, ... eigenvalues of a unit-trace spectrum ``(..., k)``, under their names."""
    directions = {name: int(name.removeprefix(SPECTRUM_TOP)) for name in names if name.startswith(SPECTRUM_TOP)}
    if not directions:
        return {}
    cumulative = eigenvalues.cumsum(-1)
    last = eigenvalues.shape[-1] - 1
    # A Gram matrix may have fewer than that many eigenvalues: the others are 0.
    return {name: cumulative[..., min(k - 1, last)] for name, k in directions.items()}
