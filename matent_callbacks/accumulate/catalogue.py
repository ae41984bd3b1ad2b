"""The names that ``metrics=`` takes, and what each of them needs to accumulate."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, cast, get_args

Source = Literal[
    "pooled",
    "raw",
    "embedding",
    "raw_embedding",
    "between_documents",
    "within_documents",
    "sequence",
    "sequence_by_tokens",
    "curvature",
]
"""What a metric is computed from.

- ``pooled``: one covariance of all tokens, each centred by the mean of its sequence and scaled to unit length;
- ``raw``: one covariance of all tokens as they are;
- ``embedding``: one covariance of one vector per sequence, each scaled to unit length, centred by the mean of all;
- ``raw_embedding``: one covariance of one vector per sequence, as they are;
- ``between_documents``: one covariance of the means of documents (sequences), relative to ``within_documents``, that
  of the parts of each document about its mean;
- ``sequence``: one covariance for each sequence, whose entropies are averaged;
- ``sequence_by_tokens``: the same, with each sequence weighted by its number of tokens;
- ``curvature``: the angles along each sequence.
"""

MEANS: tuple[Source, ...] = ("sequence", "sequence_by_tokens", "curvature")
"""The sources that average one number per sequence. All others are one covariance."""

Embedding = Literal["mean", "last", "first"]
"""Which vector stands for a sequence: the mean, the last or the first of the tokens that count."""

CATALOGUE: dict[str, Source] = {
    "matrix_entropy": "pooled",
    "normalized_matrix_entropy": "pooled",
    "effective_rank": "pooled",
    "renyi_2": "pooled",
    "participation_ratio": "pooled",
    "stable_rank": "pooled",
    "top_share": "pooled",
    "numerical_rank": "pooled",
    "alpha_req": "pooled",
    "spectrum": "pooled",
    "rankme": "raw",
    "sequence_matrix_entropy": "sequence",
    "sequence_effective_rank": "sequence",
    "embedding_matrix_entropy": "embedding",
    "embedding_effective_rank": "embedding",
    "embedding_participation_ratio": "embedding",
    "embedding_rankme": "raw_embedding",
    "embedding_alpha_req": "raw_embedding",
    "curvature": "curvature",
    "holevo_information": "pooled",
    "lidar": "between_documents",
}
# The second source of metrics that need two. The Holevo information is the entropy of all tokens minus that within
# sequences.
_FURTHER_SOURCES: dict[str, Source] = {"holevo_information": "sequence_by_tokens", "lidar": "within_documents"}

SPECTRUM_TOP = "spectrum_top_"
"""``spectrum`` is logged under several names: this prefix and a number of directions."""

Solver = Literal["exact", "approximate"]
# What the approximate solver can compute: it estimates the entropy of a covariance, and has no eigenvalues.
_WITHOUT_EIGENVALUES = (
    "matrix_entropy",
    "normalized_matrix_entropy",
    "effective_rank",
    "embedding_matrix_entropy",
    "embedding_effective_rank",
)


def quantity(name: str) -> str:
    """Return the quantity of a spectrum that a metric is, or is computed from, whatever the spectrum's source."""
    return {"holevo_information": "matrix_entropy", "lidar": "effective_rank"}.get(
        name, name.removeprefix("embedding_")
    )


def sources_of(metrics: Iterable[str]) -> frozenset[Source]:
    """Return all sources that have to be accumulated for ``metrics``."""
    names = frozenset(metrics)
    further = frozenset(source for name, source in _FURTHER_SOURCES.items() if name in names)
    return frozenset(CATALOGUE[name] for name in names) | further


def check_embedding(embedding: str) -> Embedding:
    """Return ``embedding``, or raise if it is not known."""
    if embedding not in get_args(Embedding):
        raise ValueError(f"`embedding` must be 'mean', 'last' or 'first', got {embedding!r}.")
    return cast(Embedding, embedding)


def check_solver(solver: str, metrics: Iterable[str]) -> None:
    """Raise if ``solver`` is not known, or cannot compute one of ``metrics``."""
    if solver not in ("exact", "approximate"):
        raise ValueError(f"`solver` must be 'exact' or 'approximate', got {solver!r}.")
    for name in metrics:
        if solver == "approximate" and CATALOGUE[name] not in MEANS and name not in _WITHOUT_EIGENVALUES:
            raise ValueError(
                f"`solver='approximate'` gives {', '.join(_WITHOUT_EIGENVALUES)}, and `metrics` asks for {name!r}."
            )


def check_metrics(metrics: str | Iterable[str]) -> tuple[str, ...]:
    """Return ``metrics`` as a tuple without duplicates; the error for an unknown name lists near matches."""
    names = (metrics,) if isinstance(metrics, str) else tuple(dict.fromkeys(metrics))
    if not names:
        raise ValueError(f"`metrics` must name at least one of {', '.join(CATALOGUE)}; got none.")
    for name in names:
        if name not in CATALOGUE:
            near = difflib.get_close_matches(str(name), CATALOGUE, n=3) or list(CATALOGUE)
            raise ValueError(f"`metrics` asks for {name!r}, which is not in the catalogue. Near: {', '.join(near)}.")
    return names
