"""Formats numbers, and names layers, metrics and data sets in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from matent_callbacks.accumulate.catalogue import METRICS
from matent_callbacks.functional.alignment import STAGES, TOWERS
from matent_callbacks.plot._style import LOGARITHMIC, UNITS

NAMES = {
    **{name: metric.title for name, metric in METRICS.items()},
    "loss": "training loss",
    "diff_erank": "Diff-eRank",
}
AXES = {**UNITS, "loss": "loss, as logged", "diff_erank": "Diff-eRank (dimensions)"}
PAIRS = {
    "image_text": "image-text alignment",
    "image_reduction_ratio": "image reduction ratio",
    "grounding": "grounding (nats per token that the right image saves)",
    "image_text_shift": "image-text alignment with exchanged images minus that of the pairs",
    "cka": "linear CKA of image and text",
    "cka_debiased": "debiased CKA of image and text",
    "cka_z": "linear CKA in standard deviations above random pairings",
    "mutual_knn": "mutual nearest neighbours",
    "mutual_knn_z": "mutual nearest neighbours in standard deviations above random pairings",
    "mutual_information": "matrix-based mutual information",
    "modality_gap": "modality gap",
    "mir": "modality integration rate",
}
ENTROPIES = (
    "matrix_entropy",
    "sequence_matrix_entropy",
    "normalized_matrix_entropy",
    "renyi_2",
    "embedding_matrix_entropy",
)
RANKS = LOGARITHMIC  # the curves of dimensions, in this order
_STAGES = {
    **{place: place.replace("_", " ") for place in (*STAGES, *TOWERS)},
    "image": "image alone",
    "text": "text alone",
    "image_text": "image and text together",
}


def number(value: float) -> str:
    """Format with four significant digits, and no exponent where people would not write one."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def capital(text: str) -> str:
    """Capitalise the first letter, and change no other."""
    return text[:1].upper() + text[1:]


def step(value: float) -> str:
    """Format a step for a sentence."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def metric_name(metric: str) -> str:
    """What a metric is called in a sentence."""
    return NAMES.get(metric, metric.replace("_", " "))


def place_name(place: str) -> str:
    """What a layer or stage is called in a sentence."""
    if place == "last":
        return "last layer"
    return _STAGES.get(place, place)


def pair_unit(place: str) -> str:
    """Return the label of the vertical axis for a measure of pairs."""
    return {"image_text": "mean / max (1: aligned)", "mutual_information": "nats"}.get(place, PAIRS[place])


def about_data(source: str | None, measured: str) -> str:
    """A sentence on the data that a picture shows: held-out data, or what was ``measured`` if that is known."""
    if source is not None:
        return f"Data: {held_out_name(source)}."
    return f"Measured on {measured}." if measured else ""


def held_out_name(name: str) -> str:
    """What held-out data are called in a sentence."""
    return f"held out ({name})" if name else "held out"


def named(name: str) -> str:
    """The heading of what was logged under the name of a callback or a probe."""
    return f"Readings named {name}"


def layers_only(places: list[str]) -> list[str]:
    """Leave out the stages of a multimodal model, which are not layers."""
    return [place for place in places if place not in (*STAGES, *TOWERS)]


def listed(names: Sequence[str], most: int = 6) -> str:
    """Enumerate names, the first of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
