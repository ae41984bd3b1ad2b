"""Notices probes that the trained parameters have no influence on: their readings stay the same while these change."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from matent_callbacks.capture.sharded import is_sharded

# Readings with other weights each, of which none differs from the first, until it is told.
_READINGS = 3
_PARAMETERS, _ENTRIES = 16, 64


def sample_of_weights(model: nn.Module) -> list[Tensor]:
    """Copy a few entries of a few of the parameters that are trained, as far as this rank holds them."""
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_meta]
    return [_entries(parameter) for parameter in trained[:: -max(1, len(trained) // _PARAMETERS)]]


def _entries(parameter: Tensor) -> Tensor:
    flat = (parameter.to_local() if is_sharded(parameter) else parameter).detach().reshape(-1)
    return flat[:: max(1, len(flat) // _ENTRIES)].clone()


class Influence:
    """The last of the readings of a probe, and how many with other weights were the same as it."""

    MISSING = (
        f"{_READINGS} readings of {{probe}} in a row are the same, although the weights have changed: the parameters "
        "that are trained have no influence on what is read. Pass batches that the trained model itself takes, or "
        "leave `probe` out: then the training forward is read."
    )
    """The warning about a probe."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._weights: list[Tensor] = []
        self._same = 0

    def is_missing(self, values: Mapping[str, float], weights: list[Tensor]) -> bool:
        """Add a reading; return True once, at the third in a row that is bitwise the same with other weights."""
        # Whole numbers, such as counts of directions, and NaN do not tell.
        numbers = values.values()
        is_comparable = not all(map(float.is_integer, numbers)) and not any(map(math.isnan, numbers))
        if not is_comparable or values != self._values:
            self._values, self._weights, self._same = dict(values) if is_comparable else {}, weights, 1
        elif not _equal(weights, self._weights):
            self._weights = weights
            self._same += 1
            return self._same == _READINGS
        return False


def _equal(weights: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(own, other) for own, other in zip(weights, others, strict=True))
