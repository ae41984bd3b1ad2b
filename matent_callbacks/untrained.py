"""The untrained model that Diff-eRank compares with."""

from __future__ import annotations

import copy

import torch
from torch import nn

from matent_callbacks.capture.randomness import same_random_numbers
from matent_callbacks.capture.stack import unwrap


def untrained_like(model: nn.Module, *, seed: int | None = None) -> nn.Module:
    """Create the same architecture with fresh random weights, on the same device, keeping the global random state.

    A Hugging Face model is created anew from its config, without adapters and wrappers. Any other model is copied, and
    every module that has weights of its own must be able to draw them again by ``reset_parameters``.

    Args:
        model: The model, trained or not; it is not changed.
        seed: Of the fresh weights; ``None``: they follow from the current random state.

    Returns:
        The untrained model, in evaluation mode.

    Raises:
        ValueError: If a module has parameters and no ``reset_parameters``; it is named.

    Example:
        >>> import torch
        >>> from matent_callbacks import untrained_like
        >>> model = torch.nn.Linear(3, 3)
        >>> torch.equal(untrained_like(model, seed=0).weight, model.weight)
        False
    """
    inner = unwrap(model)
    first = next(inner.parameters(), torch.empty(0))
    with same_random_numbers():
        if seed is not None:
            torch.manual_seed(seed)
        # On the CPU, so that nothing is drawn from the random state of another device.
        if hasattr(inner, "config") and hasattr(inner, "base_model"):
            fresh = type(inner)(copy.deepcopy(inner.config))
        else:
            fresh = copy.deepcopy(inner).cpu()
            _reset(fresh)
    return fresh.to(device=first.device, dtype=first.dtype).eval()


def _reset(model: nn.Module) -> None:
    for name, module in model.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif hasattr(module, "_reset_parameters"):  # nn.MultiheadAttention
            module._reset_parameters()
        elif own:
            raise ValueError(
                f"`model` must be able to draw all its weights again, but {name or 'the model itself'} "
                f"({type(module).__name__}) has {', '.join(own)} and no reset_parameters method."
            )
