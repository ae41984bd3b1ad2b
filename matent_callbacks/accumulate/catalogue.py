"""The table of all metrics: what each is computed from and how it is shown."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple, cast, get_args

from torch import Tensor

from matent_callbacks.functional.anisotropy import mean_cosine

Source = str
"""What a metric is computed from: one of the ``sources`` of :data:`.STATISTICS`."""

Embedding = Literal["mean", "last", "first"]
"""Which vector stands for a sequence: the mean, the last or the first of the tokens that count."""

Solver = Literal["auto", "exact", "approximate"]
"""``"approximate"`` is what ``"auto"`` was called first."""


class Metric(NamedTuple):
    """A row of the table."""

    source: Source
    """The statistic that it is computed from."""
    title: str
    """What it is called in a sentence."""
    unit: str = ""
    axis: str = ""
    """The label of an axis, if that is not title and unit."""
    logarithmic: bool = False
    """Whether ratios matter and not differences, so that its axis is logarithmic."""
    solver: Literal["any", "eigenvalues", "none"] = "eigenvalues"
    """What decomposes the statistic: any solver, or only the exact one, which has all eigenvalues. ``"none"``: nothing,
    as it is a mean."""
    quantity: str = ""
    """That of :func:`.spectral_summary`, if it is another than the name."""
    of_mean: Callable[[Tensor, Tensor], Tensor] = lambda mean, count: mean
    """The formula, if it is computed from a mean, and from the number of sequences or tokens."""
    further: tuple[Source, ...] = ()
    """Statistics that it takes besides."""

    @property
    def label(self) -> str:
        """The label of an axis, with the unit."""
        return self.axis or (f"{self.title} ({self.unit})" if self.unit else self.title)


# Where a picture has room for one rank, it is that of the first row that is logarithmic and was logged.
CATALOGUE: dict[str, Metric] = {
    "matrix_entropy": Metric("pooled", "matrix entropy", "nats", solver="any"),
    "normalized_matrix_entropy": Metric(
        "pooled", "normalised matrix entropy", axis="matrix entropy / log d", solver="any"
    ),
    "effective_rank": Metric("pooled", "effective rank", "dimensions", logarithmic=True, solver="any"),
    "sequence_matrix_entropy": Metric(
        "sequence", "matrix entropy (mean over sequences)", "nats", "matrix entropy (nats)", solver="none"
    ),
    "sequence_effective_rank": Metric(
        "sequence",
        "effective rank (of the mean entropy of sequences)",
        "dimensions",
        "effective rank (dimensions)",
        logarithmic=True,
        solver="none",
        of_mean=lambda mean, count: mean.exp(),
    ),
    "renyi_2": Metric("pooled", "Rényi entropy of order 2", "nats", "Rényi entropy (nats)", solver="any"),
    "rankme": Metric("raw", "RankMe", "dimensions", logarithmic=True),
    "participation_ratio": Metric("pooled", "participation ratio", "dimensions", logarithmic=True, solver="any"),
    "stable_rank": Metric("pooled", "stable rank", "dimensions", logarithmic=True, solver="any"),
    "numerical_rank": Metric("pooled", "numerical rank", "dimensions", logarithmic=True),
    "top_share": Metric("pooled", "share of the strongest direction", "share", "share of the variance", solver="any"),
    "spectrum": Metric("pooled", "shares of the strongest directions", "share", "share of the variance", solver="any"),
    "top_dimension_share": Metric(
        "pooled", "share of the largest dimension", "share", "share of the variance", solver="any"
    ),
    "correlation_effective_rank": Metric(
        "correlation",
        "effective rank of the correlations",
        "dimensions",
        "effective rank (dimensions)",
        logarithmic=True,
        solver="any",
        quantity="effective_rank",
    ),
    "alpha_req": Metric("pooled", "slope of the spectrum (alpha-ReQ)", axis="alpha"),
    "embedding_matrix_entropy": Metric(
        "embedding",
        "matrix entropy of sequence embeddings",
        "nats",
        "matrix entropy (nats)",
        solver="any",
        quantity="matrix_entropy",
    ),
    "embedding_effective_rank": Metric(
        "embedding",
        "effective rank of sequence embeddings",
        "dimensions",
        "effective rank (dimensions)",
        logarithmic=True,
        solver="any",
        quantity="effective_rank",
    ),
    "embedding_rankme": Metric(
        "raw_embedding",
        "RankMe of sequence embeddings",
        "dimensions",
        "RankMe (dimensions)",
        logarithmic=True,
        quantity="rankme",
    ),
    "embedding_participation_ratio": Metric(
        "embedding",
        "participation ratio of sequence embeddings",
        "dimensions",
        "participation ratio (dimensions)",
        logarithmic=True,
        solver="any",
        quantity="participation_ratio",
    ),
    "embedding_alpha_req": Metric(
        "raw_embedding",
        "slope of the spectrum of sequence embeddings (alpha-ReQ)",
        axis="alpha",
        quantity="alpha_req",
    ),
    "embedding_covariance_effective_rank": Metric(
        "embedding_covariance",
        "effective rank of the covariance of sequence embeddings",
        "dimensions",
        "effective rank (dimensions)",
        logarithmic=True,
        solver="any",
        quantity="effective_rank",
    ),
    "embedding_covariance_alpha_req": Metric(
        "embedding_covariance",
        "slope of the spectrum of the covariance of sequence embeddings (alpha-ReQ)",
        axis="alpha",
        quantity="alpha_req",
    ),
    "token_norm": Metric(
        "squared_norm",
        "length of the tokens (root mean square)",
        axis="length",
        logarithmic=True,
        solver="none",
        of_mean=lambda mean, count: mean.sqrt(),
    ),
    "max_norm_ratio": Metric(
        "longest_token",
        "longest token over the geometric mean of its sequence",
        axis="ratio of lengths",
        logarithmic=True,
        solver="none",
    ),
    "sink_tokens": Metric("sinks", "attention sinks a sequence", "tokens", solver="none"),
    "anisotropy": Metric("directions", "anisotropy", axis="mean cosine", solver="none", of_mean=mean_cosine),
    "holevo_information": Metric(
        "pooled",
        "Holevo information: entropy that tells sequences apart",
        "nats",
        "nats",
        solver="any",
        quantity="matrix_entropy",
        further=("sequence_by_tokens",),
    ),
    "curvature": Metric("curvature", "curvature of sequences", "radians", "mean angle (radians)", solver="none"),
    "lidar": Metric(
        "between_documents",
        "LiDAR, with documents as classes",
        "dimensions",
        "LiDAR (dimensions)",
        logarithmic=True,
        quantity="effective_rank",
        further=("within_documents",),
    ),
}

COMPARISONS: dict[str, Metric] = {
    "drift": Metric("reference", "drift from the reference", axis="1 - debiased CKA", solver="none"),
    "subspace_overlap": Metric(
        "reference", "overlap with the strongest directions of the reference", "share", solver="none"
    ),
    "token_cosine": Metric(
        "reference", "cosine between tokens in the reference and now", axis="mean cosine", solver="none"
    ),
}
"""The rows that compare the tokens of a probe with those of a reference, in the callbacks."""

METRICS: dict[str, Metric] = CATALOGUE | COMPARISONS
"""All rows."""

ENTROPIES = frozenset({"matrix_entropy", "normalized_matrix_entropy", "effective_rank"})
"""The quantities of a spectrum that an estimate of its entropy gives."""
ENTROPY_ERROR = "matrix_entropy_error"
"""The standard error of such an estimate; of another source than ``pooled`` that comes before it."""
SPECTRUM_TOP = "spectrum_top_"
"""``spectrum`` is logged under several names: this prefix and a number of directions."""


def quantity(name: str) -> str:
    """Return the quantity of a spectrum that a logged number is computed from, whatever the spectrum's source."""
    if name in METRICS:
        return METRICS[name].quantity or name
    return ENTROPY_ERROR if name.endswith(ENTROPY_ERROR) else name


def source_of(name: str) -> Source:
    """Return the statistic that a logged number is computed from."""
    return METRICS["spectrum" if name.startswith(SPECTRUM_TOP) else name].source


def sources_of(metrics: Iterable[str]) -> frozenset[Source]:
    """Return all statistics that have to be accumulated for ``metrics``."""
    rows = [CATALOGUE[name] for name in metrics]
    return frozenset(source for row in rows for source in (row.source, *row.further))


def measured_settings(measured: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of a run that say what is measured, from that by the name of the callback or probe."""
    return {f"matent_callbacks.measured{name and '.'}{name}": data for name, data in measured.items()}


def check_embedding(embedding: str) -> Embedding:
    """Return ``embedding``, or raise if it is not known."""
    if embedding not in get_args(Embedding):
        raise ValueError(f"`embedding` must be 'mean', 'last' or 'first', got {embedding!r}.")
    return cast(Embedding, embedding)


def check_solver(solver: str) -> None:
    """Raise if ``solver`` is not known."""
    if solver not in get_args(Solver):
        raise ValueError(f"`solver` must be 'auto', 'exact' or 'approximate', got {solver!r}.")


def check_metrics(metrics: str | Iterable[str], *, no_reference: str = "") -> tuple[str, ...]:
    """Return ``metrics`` as a tuple without duplicates; the error for an unknown name lists near matches.

    Where there is no reference to compare with, ``no_reference`` says what such a metric needs.
    """
    names = (metrics,) if isinstance(metrics, str) else tuple(dict.fromkeys(metrics))
    if not names:
        raise ValueError(f"`metrics` must name at least one of {', '.join(CATALOGUE)}; got none.")
    for name in names:
        if name in COMPARISONS and no_reference:
            raise ValueError(f"`metrics` asks for {name!r}, which compares with a reference: {no_reference}.")
        if name not in METRICS:
            near = difflib.get_close_matches(str(name), METRICS, n=3) or list(METRICS)
            raise ValueError(f"`metrics` asks for {name!r}, which is not in the catalogue. Near: {', '.join(near)}.")
    return names
