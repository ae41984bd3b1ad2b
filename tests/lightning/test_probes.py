"""Probes in Lightning: what they are run through, with which mask, and what is told of those that cannot be run."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from matent_callbacks.lightning import AlignmentCallback, MatrixEntropyCallback
from tests.conftest import collate, llama, slow_pooled_entropy, text_examples
from tests.lightning.test_matrix_entropy_callback import loader
from tests.transformers.test_probes import NAMED, PROBE, Wrapper, first_half, last_hidden_states, peft_model

KEY = "matrix_entropy/last"


class Module(pl.LightningModule):
    """Without a `forward` of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if isinstance(self.model, Wrapper):
            return self.model(batch["input_ids"], batch["attention_mask"], batch["labels"]).loss
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Shifted(Module):
    """With one that trains a shift of the embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.requires_grad_(False))
        self.shift = nn.Parameter(torch.zeros(model.config.hidden_size))

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
        embedded = self.model.get_input_embeddings()(input_ids) + self.shift
        return self.model(inputs_embeds=embedded, attention_mask=attention_mask, labels=labels)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(**batch).loss


class PassesOn(Shifted):
    def forward(self, **batch: Any) -> Any:
        return super().forward(**batch)


class OtherNames(Shifted):
    def forward(self, text: Any) -> Any:
        return super().forward(**text)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch).loss


class Readings(pl.Callback):
    def __init__(self, key: str) -> None:
        self.key = key
        self.values: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.key in trainer.callback_metrics:
            self.values[trainer.global_step] = float(trainer.callback_metrics[self.key])


def fit(folder: Any, module: Any, *callbacks: Any, key: str = KEY) -> list[float]:
    torch.manual_seed(0)
    readings = Readings(key)
    trainer = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, readings],
    )
    trainer.fit(module, loader(16))
    return list(readings.values.values())


def shifted(module: Any, names: Any) -> torch.Tensor:
    ids, mask = list(names.values())[:2]
    net = module.net if isinstance(module, Wrapper) else module.model
    return last_hidden_states(net, inputs_embeds=net.get_input_embeddings()(ids) + module.shift, attention_mask=mask)


@pytest.mark.parametrize("kind", [Shifted, PassesOn])
def test_a_module_is_run_by_its_own_forward_if_the_names_fit(tmp_path, kind):
    module = kind(llama())
    values = fit(tmp_path, module, MatrixEntropyCallback(1, probe=PROBE))
    assert len(set(values)) == 4
    expected = slow_pooled_entropy(shifted(module, PROBE), PROBE["attention_mask"])
    assert values[-1] == pytest.approx(expected, rel=1e-4)


def test_a_module_inside_that_has_a_forward_is_run_by_it(tmp_path):
    module = Module(Wrapper(llama()))
    values = fit(tmp_path, module, MatrixEntropyCallback(1, probe=NAMED))
    assert len(set(values)) == 4
    expected = slow_pooled_entropy(shifted(module.model, NAMED), NAMED["mask"])
    assert values[-1] == pytest.approx(expected, rel=1e-4)


def test_the_model_inside_is_run_where_the_names_do_not_fit_and_it_is_told_that_it_never_changes(tmp_path, recwarn):
    module = OtherNames(llama())
    values = fit(tmp_path, module, MatrixEntropyCallback(1, probe=PROBE))
    expected = slow_pooled_entropy(last_hidden_states(module.model, **PROBE), PROBE["attention_mask"])
    assert values == [pytest.approx(expected, rel=1e-4)] * 4
    assert len(set(values)) == 1
    assert len([w for w in recwarn if "3 readings of `probe` in a row are the same" in str(w.message)]) == 1


@pytest.mark.filterwarnings("default:Monitoring failed")
def test_the_error_says_which_was_run(tmp_path, recwarn):
    probe = {"words": PROBE["input_ids"]}
    values = fit(tmp_path, OtherNames(llama()), MatrixEntropyCallback(1, probe=probe))
    assert all(map(math.isnan, values))
    (told,) = [str(w.message) for w in recwarn if "onitoring" in str(w.message) or "No valid" in str(w.message)]
    assert "run as LlamaForCausalLM(words), since OtherNames.forward(text) does not take these" in told


@pytest.mark.parametrize("kind", ["prompt", "p", "prefix", "lora"])
def test_a_probe_is_read_with_peft_around_the_model_inside(tmp_path, kind):
    module = Module(peft_model(kind, llama()))
    values = fit(tmp_path, module, MatrixEntropyCallback(1, probe=PROBE))
    assert len(set(values)) == 4
    hidden = last_hidden_states(module.model, **PROBE)
    mask = nn.functional.pad(PROBE["attention_mask"], (hidden.shape[1] - PROBE["labels"].shape[1], 0), value=1)
    assert values[-1] == pytest.approx(slow_pooled_entropy(hidden, mask), rel=1e-4)


class Own(pl.LightningModule):
    """A transformer of the user's, in a module of the user's, without any mask."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"embed": nn.Embedding(128, 16), "blocks": Blocks()})

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net["blocks"](self.net["embed"](batch["input_ids"])).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))

    def forward(self, hidden: Any) -> Any:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("several", [False, True])
def test_mask_holds_for_the_probe(tmp_path, several):
    module = Own()
    hidden = torch.randn(6, 24, 16)
    mask = first_half(PROBE)
    probe = {"one": {"hidden": hidden}, "two": [{"hidden": hidden}]} if several else {"hidden": hidden}
    callback = MatrixEntropyCallback(4, probe=probe, mask=lambda b: None if "input_ids" in b else mask)
    for prefix in ("one/", "two/") if several else ("",):
        values = fit(tmp_path, module, callback, key=f"{prefix}{KEY}")
        with torch.no_grad():
            expected = slow_pooled_entropy(module.net["blocks"](hidden), mask)
        assert values[-1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("callback", [MatrixEntropyCallback, AlignmentCallback])
@pytest.mark.parametrize("probe", [text_examples(4), "text", loader(8), [], {"english": text_examples(4)}])
def test_what_is_no_batch_is_refused_when_the_callback_is_made(callback, probe):
    with pytest.raises(ValueError, match=r"`probe` must .*got"):
        callback(2, probe=probe)


def test_rows_of_tensors_are_refused_before_training(tmp_path):
    rows = [{key: value[0] for key, value in collate(text_examples(1)).items()}]
    with pytest.raises(ValueError, match=r"`probe` must hold batches.*`input_ids` of shape"):
        fit(tmp_path, Module(llama()), MatrixEntropyCallback(1, probe=rows))
