"""Finds which tokens are padding: collects the masks given to a running model's modules, and picks a layer's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from matent_callbacks.capture.stack import is_hugging_face

# For masks that are added to scores: exp of anything below is 0 in every floating-point type, so no weight is left.
_HIDES = -1e4
NOT_COUNTED = -100
"""The label of a token that does not count in the loss."""
_PADDING_OF_KEYS = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")


Among = Callable[[nn.Module, Mapping[str, Any]], Iterator[tuple[str, Tensor]]]


class Masks:
    """The masks that were given to the modules around and inside a layer during one forward, outermost first."""

    def __init__(
        self, model: nn.Module, outer: Tensor | None, batch: Tensor | None = None, *, among: Among | None = None
    ) -> None:
        """Start without any.

        Args:
            model: The model that is watched.
            outer: ``(B, T)``: holds for every layer, and overrides all masks that ``model`` is given.
            batch: ``(B, T)``: that of the batch, which holds for every layer if ``model`` is given none.
            among: Finds masks among the arguments of a call, with their names; ``None``: those of attention.
        """
        self._masks: list[_Mask] = []
        self._unknown: dict[str, tuple[Tensor, nn.Module]] = {}
        self._among = among or _masks_among
        self._outer = None if outer is None else outer.unsqueeze(0) if outer.ndim == 1 else outer
        if self._outer is not None:
            self._masks.append(_Mask(self._outer, "attention_mask", model, is_given=True, of_any_layer=True))
        self._of_batch: list[_Mask] = []
        if batch is not None:
            self._of_batch.append(_Mask(batch, "attention_mask", model, is_given=True, of_any_layer=True))

    def collect(self, module: nn.Module, arguments: Mapping[str, Any], *, is_given: bool = False) -> None:
        """Collect the masks among the arguments that ``module`` is called with, in place of those of its last call.

        ``is_given``: the module is a whole model, whose mask ``(B, T)`` is to multiply by unless it holds negatives.
        """
        found = list(self._among(module, arguments))
        for mask in self._masks:
            if not mask.of_any_layer and not any(mask.tensor is tensor for _, tensor in found):
                mask.give_to(module, no_more=True)
        self._masks = [mask for mask in self._masks if mask.modules]
        for name, tensor in found:
            known = next((mask for mask in self._masks if mask.tensor is tensor), None)
            if known is None:
                self._masks.append(_Mask(tensor, name, module, is_given=is_given))
            else:
                known.give_to(module)
        if not (found or is_hugging_face(module)):  # whose masks of padding are known by their names
            self._unknown.update((name, (tensor, module)) for name, tensor in _perhaps_masks(arguments))

    def fitting(self, hidden_states: Tensor, modules: Collection[nn.Module]) -> tuple[Tensor, Tensor | None]:
        """Return hidden states batch first, and which are valid tokens: ``(B, T)`` bool, or None if no mask fits.

        Args:
            hidden_states: ``(B, T, d)``, ``(T, B, d)`` or ``(B T, d)``.
            modules: Only masks that were given to one of these describe this layer.
        """
        masks = [mask for mask in self._known if mask.of_any_layer] or self._known
        flat = [mask for mask in masks if mask.tensor.ndim == 2 and mask.is_for(modules)]
        rows = hidden_states.shape[:-1]
        for mask in flat:
            if mask.tensor.shape == rows or (len(rows) == 1 and mask.tensor.numel() == rows[0]):
                return hidden_states, mask.values
        if len(rows) != 2:
            return hidden_states, None
        for mask in flat:
            if mask.tensor.shape == (rows[1], rows[0]):
                return hidden_states.transpose(0, 1), mask.values
        for mask in flat:
            if mask.tensor.shape == (1, rows[1]):
                return hidden_states, mask.values.expand(rows)
        for mask in reversed(masks):
            if mask.is_of_pairs and mask.is_for(modules) and mask.tensor.shape[-1] == rows[1]:
                tokens = mask.tokens() if len(mask.tensor) in (1, rows[0]) else None
                if tokens is not None:
                    return hidden_states, tokens.expand(rows)
        return hidden_states, None

    def has_given(self, modules: Collection[nn.Module]) -> bool:
        """Whether some of these modules were given a mask, and not only one that the model has made itself."""
        return any(mask.is_for(modules) and not mask.is_own for mask in self._masks)

    @property
    def _known(self) -> list[_Mask]:
        is_given_none = all(mask.is_own for mask in self._masks)
        return self._of_batch if self._of_batch and is_given_none else self._masks

    def outer(self, shape: torch.Size) -> Tensor | None:
        """Return the mask that holds for every layer, as bool of this shape ``(B, T)``; None if there is none."""
        if self._outer is None:
            return None
        if self._outer.ndim != 2 or self._outer.shape[1] != shape[1] or len(self._outer) not in (1, shape[0]):
            self.check_outer(shape)
        return allowed(self._outer, "attention_mask", is_given=True).expand(shape)

    def check_outer(self, rows: torch.Size) -> None:
        """Raise if the mask that holds for every layer cannot be that of hidden states with these ``rows``."""
        if self._outer is None or rows.numel() == len(self._outer):
            return
        raise ValueError(
            f"`mask` (of the callback; `attention_mask` of the monitor) must have the shape of the hidden states "
            f"without their features, {tuple(rows)}, got {tuple(self._outer.shape)}."
        )

    def length_of_unfit(self, hidden_states: Tensor, modules: Collection[nn.Module]) -> int | None:
        """Return the length of a mask that marks padding but does not fit these hidden states, if there is one."""
        for mask in self._known:
            # Hidden states with one vector per sample are not tokens.
            one_a_sample = hidden_states.shape[:-1].numel() == len(mask.tensor)
            if not one_a_sample and mask.is_for(modules) and mask.has_padding():
                return mask.tensor.shape[-1]
        return None

    def unknown(self, hidden_states: Tensor, modules: Collection[nn.Module]) -> str | None:
        """Return the name of an argument that may be a mask of these hidden states, but does not say of what."""
        shapes = (hidden_states.shape[:2], hidden_states.shape[:2][::-1])
        for name, (tensor, module) in self._unknown.items():
            if module in modules and tensor.shape in shapes and bool(tensor.amin() != tensor.amax()):
                return name
        return None


class _Mask:
    """One mask, and the modules that were given it."""

    def __init__(
        self, tensor: Tensor, name: str, module: nn.Module, *, is_given: bool = False, of_any_layer: bool = False
    ) -> None:
        self.tensor = tensor
        self.modules = {module}
        self._replaced: set[nn.Module] = set()
        self.of_any_layer = of_any_layer
        self.is_given = is_given
        self._name = name
        self._tokens: Tensor | None = None
        self._has_padding: bool | None = None

    @functools.cached_property
    def values(self) -> Tensor:
        """``(B, T)``, True where a token is valid; for a query-key mask, ``(B, Q, T)``, where a query sees a key."""
        return allowed(self.tensor, self._name, is_given=self.is_given)

    @property
    def is_of_pairs(self) -> bool:
        return self.tensor.ndim > 2

    @property
    def is_own(self) -> bool:
        """Whether the model seems to have made it itself: of pairs, it may know nothing of padding then."""
        return self.is_of_pairs and not self.is_given

    def is_for(self, modules: Collection[nn.Module]) -> bool:
        if self.of_any_layer:
            return True
        return not self.modules.isdisjoint(modules) and self._replaced.isdisjoint(modules)

    def give_to(self, module: nn.Module, *, no_more: bool = False) -> None:
        """Note that a module is given this mask; ``no_more``: or another one in its place, if it was."""
        if not no_more:
            self.modules.add(module)
            self._replaced.discard(module)
        elif module in self.modules:
            self.modules.discard(module)
            self._replaced.add(module)

    def tokens(self) -> Tensor | None:
        """Return the valid tokens ``(B, T)`` of a query-key mask, or None where they cannot be told from it."""
        if self._tokens is None and self._has_padding is None:
            self._tokens, self._has_padding = _tokens_of_pairs(self.values)
        return self._tokens

    def has_padding(self) -> bool:
        """Whether any token is padding. Costs one device-to-host sync, on first use."""
        if self._has_padding is None:
            if self.is_of_pairs:
                self.tokens()
            else:
                self._has_padding = not bool(self.values.all())
        return bool(self._has_padding)


def _masks_among(module: nn.Module, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    # In cross-attention both kinds of mask cover the keys, while the output has one row per query.
    if arguments.get("key_value_states") is not None:
        return
    if isinstance(module, nn.MultiheadAttention) and arguments.get("key") is not arguments.get("query"):
        return
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim in (2, 3, 4) and (is_hugging_face(module) or not _is_causal(mask)):
        yield "attention_mask", mask
    padding = [name for name in _PADDING_OF_KEYS if isinstance(arguments.get(name), Tensor)]
    # An nn.Transformer takes separate masks for its encoder and its decoder.
    if len(padding) == 1 and not isinstance(module, nn.Transformer) and arguments[padding[0]].ndim == 2:
        yield padding[0], arguments[padding[0]]


def _perhaps_masks(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or name in ("attention_mask", *_PADDING_OF_KEYS):
            continue
        if (value.dtype == torch.bool or "mask" in name.lower()) and not _is_causal(value):
            yield name, value


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask ``(T, T)`` is that of a causal model, which says nothing of padding."""
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        return False
    sees = allowed(mask, "attention_mask", is_given=False)
    return torch.equal(sees, torch.ones_like(sees).tril())


def allowed(mask: Tensor, name: str, *, is_given: bool) -> Tensor:
    """The mask as bool: ``(B, T)``, True where a token counts, or ``(B, Q, T)``, True where a query sees a key."""
    is_flat = mask.ndim == 2
    if name == "labels":
        return mask != NOT_COUNTED
    if mask.ndim == 4:
        mask = mask[:, 0]  # heads do not differ in what is padding
    if name in _PADDING_OF_KEYS:
        return mask > _HIDES if mask.is_floating_point() else mask == 0
    if mask.dtype == torch.bool:
        if is_flat or mask.shape[1] != mask.shape[2] or mask.shape[1] < 2:
            return mask
        # MPT's is true where a query does not see a key: for all that come after it, and not for all.
        return mask ^ ((mask | mask.new_ones(mask.shape[1:]).tril()).all() & ~mask.all())
    # A mask to multiply by holds 0 and 1; one that is added to the scores holds 0 and large negative numbers. What all
    # zeros are depends on who made them: a model's own mask of tokens is to multiply by, others are added.
    is_added = (mask < 0).any()
    if mask.is_floating_point() and not (is_flat and is_given):
        is_added = is_added | ~(mask > 0).any() | (mask > 1).any()  # Longformer's has large numbers for global tokens
    return torch.where(is_added, mask > _HIDES, mask > 0)


def _tokens_of_pairs(sees: Tensor) -> tuple[Tensor | None, bool]:
    """The valid tokens of ``(B, Q, T)``, if it is bidirectional or causal on them, and whether there is padding."""
    if sees.shape[1] == 1:
        tokens, is_told = sees[:, 0], True
    elif sees.shape[1] == sees.shape[2]:
        tokens = torch.diagonal(sees, dim1=1, dim2=2)
        keys, is_padding = tokens.unsqueeze(1).expand_as(sees), ~tokens.unsqueeze(2)
        # Rows of padding are not compared: what padding attends to differs from model to model.
        is_told = bool(((sees == keys) | is_padding).all() | ((sees == keys.tril()) | is_padding).all())
    else:
        return None, False
    return (tokens if is_told else None), not bool(tokens.all())
