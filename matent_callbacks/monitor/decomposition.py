"""Turns the matrices of layers into numbers, by their eigenvalues or by an estimate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from matent_callbacks.accumulate.catalogue import CATALOGUE, ENTROPY_ERROR, SPECTRUM_TOP, Source, quantity
from matent_callbacks.accumulate.documents import Discriminant
from matent_callbacks.accumulate.pooled_tokens import Matrix
from matent_callbacks.accumulate.probe_tokens import TokenPairs
from matent_callbacks.accumulate.statistics import STATISTICS
from matent_callbacks.functional._estimate import STEPS, Estimate, Projection, estimates, project
from matent_callbacks.functional._precision import full_precision, is_reduced_on_cpu
from matent_callbacks.functional.entropy import renyi_2_of_squares, summarized
from matent_callbacks.functional.spectrum import over_trace, solved
from matent_callbacks.monitor.recording import part
from matent_callbacks.monitor.solvers import side_by_side

# The most numbers in matrices that are decomposed in one call. Large matrices gain nothing from a common call, which
# takes three times their memory.
_BATCH_NUMBERS = 2**17
# From this width on, each matrix is decomposed on a thread of its own. A smaller one takes no longer than waking one.
_WORTH_A_THREAD = 256
_OF_DIRECTIONS = {"top_share", "stable_rank"}
NONFINITE = "nonfinite_tokens"
COUNTED = "counted"
# From this width on numbers are estimated, where that is asked for. On two CPU cores that is 2.6 times as fast, 5 and
# 11 times at 2,048 and 4,096 (benchmarks/solver.py).
WIDE = 1024
# An estimate has the shares of so many directions, at most. They take further products, so that those of a flat
# spectrum are right to 0.2 % as well.
_DIRECTIONS = 16
_STEPS_FOR_DIRECTIONS = 10

Unit = tuple[Source, str]
"""What has a spectrum of its own: a layer, and how its tokens were centred and normalised."""


Work = Matrix | Discriminant | TokenPairs
"""What the numbers of a unit are computed from."""


def decompose(
    work: dict[Unit, Work], names: Mapping[Unit, list[str]], estimated: Collection[Source] = ()
) -> dict[Unit, Tensor]:
    """Compute the numbers of each unit, ``(names,)``; NaN where too few tokens were seen. The counts come last.

    Matrices of one shape are decomposed together. Each is removed from the dict, so that it is freed afterwards. Those
    of ``estimated`` sources are not decomposed if they are wide.
    """
    matrices = {unit: own for unit, own in work.items() if not isinstance(own, TokenPairs)}
    pairs = {unit: own for unit, own in work.items() if isinstance(own, TokenPairs)}
    work.clear()
    with part("decompose"):
        return _decomposed(matrices, names, estimated) | _compared(pairs, names)


def _compared(pairs: dict[Unit, TokenPairs], names: Mapping[Unit, list[str]]) -> dict[Unit, Tensor]:
    """Compare tokens of now with those of the reference: on the CPU several layers at a time, one on each thread."""
    if not pairs:
        return {}
    units = list(pairs)
    own = [pairs.pop(unit) for unit in units]
    wanted = names[units[0]][:-2]
    threads = own[0].states.device.type == "cpu" and min(own[0].states.shape) >= _WORTH_A_THREAD
    compare = partial(TokenPairs.compare, names=wanted)
    found = side_by_side(compare, own) if threads else [compare(one) for one in own]
    return {
        unit: torch.stack([*(one[name] for name in wanted), one["count"].double(), one["count"].new_zeros(())])
        for unit, one in zip(units, found, strict=True)
    }


def _decomposed(
    matrices: dict[Unit, Matrix | Discriminant], names: Mapping[Unit, list[str]], estimated: Collection[Source]
) -> dict[Unit, Tensor]:
    alike: dict[tuple[int, int, Source, torch.device], list[Unit]] = defaultdict(list)
    for unit, matrix in matrices.items():
        alike[matrix.size, matrix.num_features, unit[0], matrix.moments.num_tokens.device].append(unit)
    found: dict[Unit, Tensor] = {}
    for (size, num_features, source, device), units in alike.items():
        wanted = names[units[0]][:-2]
        kind, moments = STATISTICS[source], [matrices[unit].moments for unit in units]
        num_tokens = torch.stack([own.num_tokens for own in moments])
        if kind.centers_sequences:
            num_sequences = torch.stack([own.num_sequences for own in moments])
            num_tokens = torch.where(num_tokens > num_sequences, num_tokens, 0)
        nonfinite = torch.stack([own.num_nonfinite for own in moments])
        del moments  # the matrices are freed one by one
        if size == 0:
            table = torch.full((len(units), len(wanted)), torch.nan, device=device)
        else:
            by_dimension = [_of_dimensions(matrices[unit], wanted) for unit in units]
            own = [matrices.pop(unit) for unit in units]
            compute = _estimates if size >= WIDE and source in estimated else _of_eigenvalues
            summary = compute(own, wanted, num_features)
            summary |= {name: torch.stack([own[name] for own in by_dimension]) for name in by_dimension[0]}
            table = torch.stack([summary[quantity(name)] for name in wanted], -1)
        table = torch.where(num_tokens.unsqueeze(-1) >= kind.fewest, table, torch.nan)
        table = torch.cat([table, torch.stack([num_tokens, nonfinite], -1).to(table.dtype)], -1)
        found.update(zip(units, table, strict=True))
    return found


def spectrum_names(num_features: int, *, estimated: bool) -> list[str]:
    """Return the names under which ``spectrum`` is logged: of 1, 2, 4, ... directions."""
    most = _DIRECTIONS if estimated and num_features >= WIDE else num_features
    return [f"{SPECTRUM_TOP}{2**i}" for i in range((num_features - 1).bit_length()) if 2**i <= most]


def estimated_sources(metrics: Iterable[str]) -> frozenset[Source]:
    """Return the sources of ``metrics`` of which no eigenvalue is needed."""
    rows = [CATALOGUE[name] for name in metrics]
    return frozenset(row.source for row in rows if row.solver == "any") - {
        row.source for row in rows if row.solver == "eigenvalues"
    }


def _of_eigenvalues(
    matrices: list[Matrix | Discriminant], names: Sequence[str], num_features: int
) -> dict[str, Tensor]:
    eigenvalues = _eigenvalues(matrices)
    quantities = {quantity(name) for name in names if name in CATALOGUE} - {"top_dimension_share"}
    return {
        **summarized(eigenvalues, quantities, num_features=num_features),
        **_shares(eigenvalues.cumsum(-1), names),
        ENTROPY_ERROR: torch.full_like(eigenvalues[:, 0], torch.nan),  # eigenvalues are exact
    }


def _estimates(matrices: list[Matrix | Discriminant], names: Sequence[str], num_features: int) -> dict[str, Tensor]:
    """Compute the numbers of wide matrices from products. The list is emptied, so that each matrix is freed."""
    of_directions = any(name in _OF_DIRECTIONS or name.startswith(SPECTRUM_TOP) for name in names)
    steps = _STEPS_FOR_DIRECTIONS if of_directions else STEPS
    size, counts = matrices[0].size, matrices[0].moments.num_tokens
    # The solver has no MPS kernel, and no float64 either.
    device = counts.device if counts.device.type == "cuda" else torch.device("cpu")
    # A setting of the process, which a background thread must leave alone. There all matrices are on the CPU.
    in_float64 = device.type == "cpu" and is_reduced_on_cpu()

    def estimate(some: list[Matrix | Discriminant]) -> Estimate:
        with torch.autocast("cpu", enabled=False) if device.type == "cpu" else full_precision(device):
            return estimates([_projected(some.pop(0).to(device)) for _ in range(len(some))], size)

    def _projected(matrix: Matrix | Discriminant) -> Projection:
        assert isinstance(matrix, Matrix)  # no quantity of the other is estimated
        blocks = [block.double() if in_float64 else block for block in matrix.blocks()]
        return project(blocks, steps=steps)

    on_threads = device.type == "cpu"
    batches = [[matrices.pop(0)] for _ in range(len(matrices))] if on_threads else [matrices]
    columns = zip(*(side_by_side(estimate, batches) if on_threads else map(estimate, batches)), strict=True)
    found = Estimate(*(torch.cat(column).to(counts.device, torch.float32) for column in columns))
    return {
        "matrix_entropy": found.entropy,
        "normalized_matrix_entropy": found.entropy / math.log(num_features),
        "effective_rank": found.entropy.exp(),
        ENTROPY_ERROR: found.error,
        "renyi_2": renyi_2_of_squares(found.squares),
        "participation_ratio": 1 / found.squares,
        "top_share": found.top[:, 0],
        "stable_rank": 1 / found.top[:, 0],
        **_shares(found.top.cumsum(-1), names),
    }


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


def _shares(cumulative: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The largest 1, 2, 4, ... eigenvalues of a unit-trace spectrum by their names, from their sums ``(..., k)``."""
    directions = {name: int(name.removeprefix(SPECTRUM_TOP)) for name in names if name.startswith(SPECTRUM_TOP)}
    last = cumulative.shape[-1] - 1
    # A Gram matrix may have fewer than that many eigenvalues: the others are 0.
    return {name: cumulative[..., min(k - 1, last)] for name, k in directions.items()}
