"""Embedding models under their own Trainer, which calls ``forward`` of the transformer inside and not the module."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from matent_callbacks import EntropyMonitor
from matent_callbacks.transformers import MatrixEntropyCallback
from tests.conftest import VOCABULARY, slow_entropy, slow_pooled_entropy, text_examples

with warnings.catch_warnings():
    # Version 6 has these modules elsewhere, and still here.
    warnings.simplefilter("ignore", DeprecationWarning)
    sentence_transformers = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")
    modules = pytest.importorskip("sentence_transformers.models")

STEPS, BATCH = 4, 6
LAYERS = ("layer_00", "layer_01", "last")


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[[], Any]:
    """Characters as tokens, two blocks, dropout, mean pooling; the same weights each time."""
    words = {"<pad>": 0, "<unk>": 1, **{chr(i): i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    folder = str(tmp_path / "transformer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)

    def make() -> Any:
        parts = [modules.Transformer(folder), modules.Pooling(32), modules.Normalize()]
        return sentence_transformers.SentenceTransformer(modules=parts, device="cpu")

    return make


def pairs(count: int, *, start: int = 0) -> Dataset:
    """Texts of unlike lengths, and what follows them: columns of unlike lengths, too."""
    # No blanks: older versions strip them.
    texts = ["_".join("".join(map(chr, e["input_ids"])).split()) for e in text_examples(2 * count, 40, start=2 * start)]
    columns = {"anchor": texts[::2], "positive": [text[: 5 + i % 9] for i, text in enumerate(texts[1::2])]}
    return Dataset.from_dict(columns)


@dataclass
class Forward:
    """What one forward of the transformer gave."""

    hidden_states: tuple[Tensor, ...]
    mask: Tensor
    training: bool
    with_gradient: bool
    step: int


def train(
    model: Any,
    folder: Path,
    make_loss: Callable[..., nn.Module],
    callbacks: list[Any],
    **arguments: Any,
) -> tuple[list[Forward], list[dict[str, float]], list[Tensor]]:
    """All forwards, as the class of the transformer sees them, all log records, and the weights and random state."""
    forwards: list[Forward] = []
    whole = BertModel.forward
    trainer: Any = None

    def spied(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = whole(self, *args, **{**kwargs, "output_hidden_states": True})
        states = tuple(h.detach() for h in output.hidden_states)
        forwards.append(
            Forward(states, kwargs["attention_mask"], self.training, torch.is_grad_enabled(), trainer.state.global_step)
        )
        return output

    settings: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BertModel, "forward", spied)
        trainer = sentence_transformers.SentenceTransformerTrainer(
            model=model,
            args=sentence_transformers.SentenceTransformerTrainingArguments(
                output_dir=str(folder / "run"), **{**settings, **arguments}
            ),
            train_dataset=pairs(STEPS * BATCH),
            eval_dataset=pairs(2 * BATCH + 2, start=STEPS * BATCH),
            loss=make_loss(model),
            callbacks=callbacks,
        )
        trainer.train()
    left = [*(p.detach().clone() for p in model.parameters()), torch.get_rng_state()]
    return forwards, trainer.state.log_history, left


def texts_of(forwards: list[Forward], layer: int) -> list[Tensor]:
    """The tokens of each text, one column of a pair after the other."""
    return [z[m.bool()] for f in forwards for z, m in zip(f.hidden_states[layer], f.mask, strict=True)]


def plain(model: Any) -> nn.Module:
    return losses.MultipleNegativesRankingLoss(model)


def cached(model: Any) -> nn.Module:
    """Embeds without gradients first, and once more, piece by piece, in the backward pass."""
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)


def nested(model: Any) -> nn.Module:
    """Puts a ``forward`` of its own around the model's for each batch."""
    return losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 8])


class Calls(nn.Module):
    """A wrapper that calls the transformer by itself."""

    def __init__(self, model: Any, *, forward: bool) -> None:
        super().__init__()
        self.model = model
        self.forward_of_it = forward

    def forward(self, features: list[dict[str, Tensor]], labels: Any = None) -> Tensor:
        transformer = self.model[0].auto_model
        call = transformer.forward if self.forward_of_it else transformer
        embedded = [call(f["input_ids"], attention_mask=f["attention_mask"])[0][:, 0] for f in features]
        return nn.functional.cross_entropy(embedded[0] @ embedded[1].T, torch.arange(len(embedded[0])))


LOSSES = {
    "plain": plain,
    "cached": cached,
    "nested": nested,
    "calls the module": lambda model: Calls(model, forward=False),
    "calls its forward": lambda model: Calls(model, forward=True),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_layer_of_both_columns_in_training_and_evaluation(name, make_model, tmp_path):
    metrics = ("matrix_entropy", "sequence_matrix_entropy")
    forwards, log, left = train(
        make_model(), tmp_path, LOSSES[name], [MatrixEntropyCallback(1, "all", metrics=metrics)]
    )
    _, log_alone, left_alone = train(make_model(), tmp_path, LOSSES[name], [])

    assert all(torch.equal(a, b) for a, b in zip(left, left_alone, strict=True))
    assert [r["loss"] for r in log if "loss" in r] == [r["loss"] for r in log_alone if "loss" in r]
    assert [r["eval_loss"] for r in log if "eval_loss" in r] == [r["eval_loss"] for r in log_alone if "eval_loss" in r]

    readings = [("", r, r["step"] - 1) for r in log if "loss" in r]
    readings += [("eval_", r, r["step"]) for r in log if "eval_loss" in r]
    assert len(readings) == STEPS + STEPS // 2
    for prefix, record, step in readings:
        own = [f for f in forwards if f.step == step and f.training == (not prefix) and f.with_gradient == f.training]
        for index, layer in enumerate(LAYERS):
            texts = texts_of(own, index)
            assert len(texts) == 2 * (BATCH if not prefix else 2 * BATCH + 2)
            pooled = slow_pooled_entropy(texts)
            assert record[f"{prefix}matrix_entropy/{layer}"] == pytest.approx(pooled, rel=1e-5)
            mean = sum(map(slow_entropy, texts)) / len(texts)
            assert record[f"{prefix}sequence_matrix_entropy/{layer}"] == pytest.approx(mean, rel=1e-5)


def test_the_default_callback(make_model, tmp_path, recwarn):
    forwards, log, _ = train(
        make_model(), tmp_path, plain, [MatrixEntropyCallback(2)], eval_strategy="no", gradient_accumulation_steps=2
    )
    readings = {r["step"]: r["matrix_entropy/last"] for r in log if "matrix_entropy/last" in r}
    assert list(readings) == [2, 4]
    for step, value in readings.items():
        texts = texts_of([f for f in forwards if f.step == step - 1], -1)
        assert len(texts) == 2 * 2 * BATCH
        assert value == pytest.approx(slow_pooled_entropy(texts), rel=1e-5)
    assert not [w for w in recwarn if "no reading" in str(w.message) or "Reading layer" in str(w.message)]


def test_modules_that_give_mappings(make_model, tmp_path):
    """They begin with the ids and the mask; the tokens in them are those of the last layer until they are pooled."""
    callback = MatrixEntropyCallback(1, ["last", "0", "1"], metrics="matrix_entropy")
    _, log, _ = train(make_model(), tmp_path, plain, [callback], max_steps=2)
    for prefix, record in (("", log[0]), ("eval_", next(r for r in log if "eval_loss" in r))):
        values = [record[f"{prefix}matrix_entropy/{layer}"] for layer in ("last", "0", "1")]
        assert values == [pytest.approx(values[0], rel=1e-6)] * 3


def test_copies_and_saved_models_are_not_watched(make_model, tmp_path):
    """A copy that is made in the middle of a monitored step runs by itself."""
    model = make_model().eval()
    monitor = EntropyMonitor(model)
    with monitor:
        copies = [copy.deepcopy(model[0].auto_model), pickle.loads(pickle.dumps(model[0].auto_model))]
    for transformer in copies:
        assert "forward" not in vars(transformer) or transformer.forward.__self__ is transformer
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.zero_()
            assert not transformer.forward(torch.ones(1, 4, dtype=torch.long))[0].any()
    assert "forward" not in vars(model[0].auto_model)


def test_sentence_embeddings_are_read_at_the_pooling_layer_and_after(make_model):
    model = make_model().eval()
    texts = pairs(40)["anchor"]
    monitor = EntropyMonitor(
        model, ["0", "1", "2"], metrics=["embedding_rankme", "embedding_matrix_entropy"], dtype=torch.float64
    )
    with monitor:
        vectors = torch.tensor(model.encode(texts, batch_size=7)).double()
    readings = monitor.compute()
    lengths = torch.linalg.svdvals(vectors)
    p = lengths / lengths.sum()
    # The last layer gives unit vectors; the pooling layer the means, which the tokens give, too.
    assert readings["embedding_rankme/2"] == pytest.approx((-p * p.log()).sum().exp().item(), rel=1e-4)
    shares = torch.linalg.svdvals(vectors - vectors.mean(0)).square()
    shares = shares / shares.sum()
    for layer in "012":
        expected = torch.special.entr(shares).sum().item()
        assert readings[f"embedding_matrix_entropy/{layer}"] == pytest.approx(expected, rel=1e-5)
    assert readings["embedding_rankme/0"] == pytest.approx(readings["embedding_rankme/1"], rel=1e-5)
    assert readings["embedding_rankme/1"] != pytest.approx(readings["embedding_rankme/2"], rel=1e-5)
