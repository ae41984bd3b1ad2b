"""Several callbacks and several probes in one Lightning run, and readings of several steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from matent_callbacks.lightning import AlignmentCallback, MatrixEntropyCallback
from tests.conftest import collate, text_examples
from tests.lightning.test_matrix_entropy_callback import loader, make_module, make_trainer, pooled
from tests.versions import BOTH_PACKAGES

__all__ = ["make_module", "make_trainer"]

PROBES = {"english": collate(text_examples(4, start=300)), "german": [collate(text_examples(4, start=400))]}


def fit(
    make_module: Any, make_trainer: Any, *callbacks: Any, package: str = "lightning.pytorch", **settings: Any
) -> Any:
    torch.manual_seed(0)
    trainer = make_trainer(package, callbacks=list(callbacks), **{"max_steps": 4, **settings})
    trainer.fit(make_module(package), loader(16), loader(8))
    return trainer


@BOTH_PACKAGES
def test_names_keep_two_callbacks_with_the_same_layers_apart(make_module, make_trainer, package, tmp_path):
    of_probe = {name: {"probe": probe, "reference": "start"} for name, probe in PROBES.items()}
    callbacks = [MatrixEntropyCallback(2, name=name, **arguments) for name, arguments in of_probe.items()]
    trainer = fit(make_module, make_trainer, *callbacks, MatrixEntropyCallback(2), package=package)
    found = trainer.callback_metrics
    for name, arguments in of_probe.items():
        alone = fit(make_module, make_trainer, MatrixEntropyCallback(2, **arguments), package=package).callback_metrics
        for key in ("matrix_entropy/last", "diff_erank/last", "val_matrix_entropy/last"):
            named = f"val_{name}/{key.removeprefix('val_')}" if key.startswith("val_") else f"{name}/{key}"
            assert found[named] == alone[key], key
    plain = fit(make_module, make_trainer, MatrixEntropyCallback(2), package=package).callback_metrics
    assert found["matrix_entropy/last"] == plain["matrix_entropy/last"]
    assert found["english/matrix_entropy/last"] != found["german/matrix_entropy/last"]
    trainer.save_checkpoint(tmp_path / "named.ckpt")
    states = torch.load(tmp_path / "named.ckpt", weights_only=False)["callbacks"]
    assert len({str(state["reference_ranks"]) for state in states.values() if "reference_ranks" in state}) == 3


def test_one_callback_with_several_probes_reads_what_several_do(make_module, make_trainer):
    several = MatrixEntropyCallback(2, layers="all", probe=PROBES, reference="start")
    found = fit(make_module, make_trainer, several).callback_metrics
    for name, probe in PROBES.items():
        callback = MatrixEntropyCallback(2, layers="all", probe=probe, reference="start")
        alone = fit(make_module, make_trainer, callback).callback_metrics
        for key in ("matrix_entropy/layer_01", "diff_erank/last"):
            assert found[f"{name}/{key}"] == alone[key]
    assert "matrix_entropy/last" not in found


def test_two_that_would_log_the_same_names_are_an_error_before_training(make_module, make_trainer):
    with pytest.raises(ValueError, match=r"Two callbacks would log 'effective_rank/last' and more, .* a `name`"):
        fit(make_module, make_trainer, MatrixEntropyCallback(2), MatrixEntropyCallback(3, layers="all"))
    fit(make_module, make_trainer, MatrixEntropyCallback(2), MatrixEntropyCallback(3, layers="all", name="all"))
    with pytest.raises(ValueError, match=r"Two `AlignmentCallback`s would log the same values.* a `name`"):
        fit(make_module, make_trainer, AlignmentCallback(2), AlignmentCallback(3))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_window_covers_the_last_steps_also_across_the_end_of_an_epoch(make_module, make_trainer, accumulation):
    module = make_module(spy=True)
    values = []

    class Keep(MatrixEntropyCallback):
        def was_logged(self, trainer: Any, values_: dict[str, float], *, step: int) -> None:
            values.append((trainer.global_step, values_["matrix_entropy/last"]))

    trainer = make_trainer(
        callbacks=[Keep(4, window_steps=3)], max_steps=9, max_epochs=-1, accumulate_grad_batches=accumulation
    )
    trainer.fit(module, loader(12 * accumulation))  # three steps an epoch
    assert [step for step, _ in values] == [4, 8]
    for step, value in values:
        seen = module.seen[(step - 3) * accumulation : step * accumulation]
        assert len(seen) == 3 * accumulation
        assert value == pytest.approx(pooled(seen), rel=1e-5)
