"""Finds which tokens count in the loss, by the labels that modules are given during a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from matent_callbacks.capture.layers import ReadPoint
from matent_callbacks.capture.masks import Masks


class Unlabelled(NamedTuple):
    """Why the labels do not tell which tokens of a layer count in the loss."""

    cause: Literal["none", "shifted", "encoder", "unfit"]
    labels: tuple[int, ...] = ()
    """The shape of the labels, if they do not fit."""
    tokens: tuple[int, ...] = ()
    """The shape of the hidden states without their features, if the labels do not fit."""


class Labels:
    """The labels that were given to the modules around a layer during one forward, outermost first.

    Args:
        model: The model that is watched.
        given: ``(B, T)``: labels of the batch, for where no module is given those that fit.
    """

    def __init__(self, model: nn.Module, given: Tensor | None) -> None:
        self._masks = Masks(model, None, among=_labels_among)
        self._given = Masks(model, None, among=_labels_among)
        self._given.collect(model, {"labels": given})
        self._shape: tuple[int, ...] | None = None if given is None else tuple(given.shape)
        self._is_shifted = False

    def collect(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Collect the labels that ``module`` is called with, in place of those of its last call."""
        labels = _argument("labels", arguments)
        self._masks.collect(module, {"labels": labels})
        if labels is not None:
            self._shape = tuple(labels.shape)
        self._is_shifted |= _argument("shift_labels", arguments) is not None

    def fitting(self, point: ReadPoint, hidden_states: Tensor) -> tuple[Tensor, Tensor] | Unlabelled:
        """Return hidden states batch first, and which tokens count in the loss, ``(B, T)`` bool.

        Args:
            point: Where the hidden states were read.
            hidden_states: ``(B, T, d)``, ``(T, B, d)`` or ``(B T, d)``.
        """
        if not point.labelled_by:
            return Unlabelled("encoder")
        for labels in (self._masks, self._given):
            states, counted = labels.fitting(hidden_states, point.labelled_by)
            # Tokens that are batch first already stay so.
            if counted is not None and (states is hidden_states or not point.sequence_first):
                return states, counted.to(states.device)
        if self._shape is None:
            return Unlabelled("shifted" if self._is_shifted else "none")
        return Unlabelled("unfit", self._shape, tuple(hidden_states.shape[:-1]))


def up_to_last(counted: Tensor) -> Tensor:
    """``(B, T)`` bool: the tokens up to the last one that counts in each row. What follows is padding."""
    return counted.flip(1).cumsum(1).flip(1) > 0


def _argument(name: str, arguments: Mapping[str, Any]) -> Tensor | None:
    """Find a tensor by its name among arguments, or in the batch, if one is passed on as a mapping."""
    batches = (value for value in arguments.values() if isinstance(value, Mapping))
    found = (own[name] for own in (arguments, *batches) if isinstance(own.get(name), Tensor))
    return next(found, None)


def _labels_among(module: nn.Module, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    labels = arguments["labels"]
    # One class a sample is (B,), several classes or numbers a sample are floating point: these are not of tokens.
    if labels is not None and labels.ndim == 2 and not labels.is_floating_point():
        yield "labels", labels
