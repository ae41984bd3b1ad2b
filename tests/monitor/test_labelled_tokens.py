"""``tokens="labels"``: only the tokens that count in the loss."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from matent_callbacks import EntropyMonitor
from matent_callbacks.functional import sink_tokens
from tests.conftest import collate, slow_pooled_entropy, text_examples
from tests.distributed.split_on_ranks import batches, parts
from tests.ranks import run_on_ranks

Batch = dict[str, Tensor]


@pytest.fixture
def tuned() -> Batch:
    """A batch of supervised fine-tuning: the prompt, half of each example, is not in the loss."""
    batch = collate(text_examples(6))
    batch["labels"][:, :8] = -100
    batch["labels"][2, 10] = -100  # a second turn
    return batch


def entropy(read: Callable[[], Any], model: nn.Module, layers: Any = "last", **arguments: Any) -> dict[str, float]:
    given = {key: arguments.pop(key) for key in ("labels", "attention_mask", "sample_mask") if key in arguments}
    monitor = EntropyMonitor(model, layers, metrics="matrix_entropy", tokens="labels", **arguments)
    monitor.start(**given)
    read()
    monitor.stop()
    return {name.removeprefix("matrix_entropy/"): value for name, value in monitor.compute().items()}


def expected(hidden: Tensor, *masks: Tensor) -> Any:
    counted = torch.ones_like(masks[0], dtype=torch.bool)
    for mask in masks:
        counted &= mask.bool()
    return pytest.approx(slow_pooled_entropy(hidden, counted), rel=1e-6)


def states(model: Any, batch: Batch) -> tuple[Tensor, ...]:
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    return getattr(output, "decoder_hidden_states", None) or output.hidden_states


@pytest.mark.parametrize("side", ["right", "left"])
def test_only_tokens_with_a_label_count_in_each_layer(make_llama, side):
    model = make_llama(dropout=0.0)
    batch = collate(text_examples(6), side=side)
    batch["labels"][:, 4:15] = -100
    batch["labels"][batch["attention_mask"] == 0] = 5  # the attention mask applies as well
    found = entropy(lambda: model(**batch), model, "all")
    for layer, hidden in zip(found, states(model, batch), strict=True):
        assert found[layer] == expected(hidden, batch["attention_mask"], batch["labels"] != -100), layer


def test_samples_and_an_own_mask_apply_as_well(make_llama, tuned):
    model, samples = make_llama(dropout=0.0), torch.tensor([1, 0, 1, 1, 0, 1])
    own = torch.arange(tuned["labels"].shape[1]).expand_as(tuned["labels"]) % 3 > 0
    hidden, counted = states(model, tuned)[-1], (tuned["labels"] != -100) & samples.unsqueeze(1).bool()
    found = entropy(lambda: model(**tuned), model, attention_mask=own, sample_mask=samples)
    assert found["last"] == expected(hidden, own, counted)
    unmasked = {key: value for key, value in tuned.items() if key != "attention_mask"}
    found = entropy(lambda: model(**unmasked), model, sample_mask=samples)
    assert found["last"] == expected(states(model, unmasked)[-1], counted)


def test_packed_documents_are_centred_by_their_own_labelled_tokens(make_llama):
    model, lengths = make_llama(dropout=0.0), (10, 14, 7, 17)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 128, (2, 24), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, -100, ids)
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 24)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    hidden = states(model, batch)[-1].flatten(0, 1).split(lengths)
    documents = [own[label != -100] for own, label in zip(hidden, labels.flatten().split(lengths), strict=True)]
    padded = nn.utils.rnn.pad_sequence(documents, batch_first=True)
    inside = torch.arange(padded.shape[1]) < torch.tensor([len(own) for own in documents]).unsqueeze(1)
    assert entropy(lambda: model(**batch), model)["last"] == expected(padded, inside)


def test_a_probe_holds_its_own_labels(make_llama, tuned):
    model = make_llama()
    monitor = EntropyMonitor(model, tokens="labels")
    monitor.start(labels=torch.full_like(tuned["labels"], -100))  # of the step, not of the probe
    monitor.read(tuned)
    found = monitor.compute()["matrix_entropy/last"]
    assert found == expected(states(model.eval(), tuned)[-1], tuned["labels"] != -100)


def test_sinks_are_left_out_of_the_tokens_with_labels(make_llama, tuned):
    model = make_llama(dropout=0.0)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 100
    tuned["input_ids"][:, 0] = tuned["input_ids"][:, 9] = 7
    labelled = tuned["labels"] != -100
    hidden = states(model, tuned)[1]
    sinks = sink_tokens(hidden, labelled)
    assert sinks[:, 9].all()
    with pytest.warns(UserWarning, match="Attention sinks"):
        found = entropy(lambda: model(**tuned), model, 1)
    assert found["layer_01"] == expected(hidden, labelled, ~sinks)
    found = entropy(lambda: model(**tuned), model, 1, exclude_sinks=False, dtype=torch.float64)
    assert found["layer_01"] == expected(hidden, labelled)


class Around(nn.Module):
    """As a LightningModule passes on a batch, or pops its labels."""

    def __init__(self, model: nn.Module, pops: bool) -> None:
        super().__init__()
        self.model, self.pops = model, pops

    def forward(self, batch: Batch) -> Any:
        return self.training_step(batch)

    def training_step(self, batch: Batch) -> Any:
        return self.model(**{key: value for key, value in batch.items() if not (self.pops and key == "labels")})


class Labelled(nn.Module):
    """A model of one's own, which takes its labels by place."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.encoder(x)


@pytest.mark.parametrize("how", ["forward", "forward that pops", "step"])
def test_labels_come_with_the_outermost_module_that_is_given_them(make_llama, tuned, how):
    model = make_llama(dropout=0.0)
    outer = Around(model, pops="pops" in how)
    run = outer.training_step if how == "step" else outer
    found = entropy(lambda: run(tuned), outer)
    assert found["last"] == expected(states(model, tuned)[-1], tuned["labels"] != -100)


def test_labels_by_place(tuned):
    model, x = Labelled(), torch.randn(*tuned["labels"].shape, 8)
    found = entropy(lambda: model(x, tuned["labels"]), model)
    assert found["last"] == expected(model(x).detach(), tuned["labels"] != -100)


def test_virtual_tokens_have_no_label(make_llama, tuned):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_llama(dropout=0.0), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    hidden = states(model, tuned)[-1][:, 3:]
    assert entropy(lambda: model(**tuned), model)["last"] == expected(hidden, tuned["labels"] != -100)


@pytest.mark.parametrize("part", ["all", "decoder"])
def test_compiled_modules(make_llama, tuned, part):
    model = make_llama(dropout=0.0)
    hidden = states(model, tuned)[-1]
    if part == "all":
        run: Any = torch.compile(model, backend="eager")
    else:
        model.model = torch.compile(model.model, backend="eager")
        run = model
    assert entropy(lambda: run(**tuned), run)["last"] == expected(hidden, tuned["labels"] != -100)


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("wrapped", [False, True])
def test_labels_of_an_encoder_decoder_are_the_decoders(tuned, wrapped):
    model = t5()  # labels are as long as the encoder's hidden states, which must not matter
    outer: Any = Around(model, pops=False) if wrapped else model
    path = "model.decoder" if wrapped else "decoder"
    run = (lambda: outer.training_step(tuned)) if wrapped else (lambda: model(**tuned))
    assert entropy(run, outer, module=path)["last"] == expected(states(model, tuned)[-1], tuned["labels"] != -100)
    with pytest.warns(UserWarning, match=r"labels` are of the decoder's tokens.* in: last\. Read the decoder"):
        assert math.isnan(entropy(run, outer, **({"module": "model.encoder"} if wrapped else {}))["last"])


@pytest.mark.parametrize("own_mask", [False, True])
def test_the_padding_of_a_decoder_is_known_by_labels_unless_it_has_a_mask(own_mask):
    model = t5()
    sources, targets = collate(text_examples(6)), collate(text_examples(6, start=50))
    used = targets["attention_mask"].bool()
    batch = {**sources, "labels": targets["labels"].masked_fill(~used, -100)}
    batch["labels"][:, :3] = -100  # a prompt, which is no padding
    if own_mask:
        used[:, -6:] = False
        batch["decoder_attention_mask"] = used.long()
    monitor = EntropyMonitor(model, "all", module="decoder", metrics="matrix_entropy")
    with monitor:
        model(**batch)
    for found, hidden in zip(monitor.compute().values(), states(model, batch), strict=True):
        assert found == expected(hidden, used)


def why(model: nn.Module, *runs: Callable[[], Any], labels: Tensor | None = None) -> tuple[list[str], dict[str, float]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = EntropyMonitor(model, [0, -1], tokens="labels")
        found = {}
        for run in runs:
            monitor.start(labels=labels)
            run()
            monitor.stop()
            found = monitor.compute()
    return [str(w.message) for w in caught], found


NAMES = {f"{name}/{layer}" for name in ("matrix_entropy", "effective_rank") for layer in ("layer_00", "last")}


def test_without_labels_nothing_is_read_and_one_warning_says_why(make_llama, tuned):
    model = make_llama(dropout=0.0)
    unlabelled = {key: value for key, value in tuned.items() if key != "labels"}
    (told,), found = why(model, lambda: model(**unlabelled), lambda: model(**unlabelled))
    assert told.startswith("No `labels` came with the forward of LlamaForCausalLM, so")
    assert "in: layer_00, last. Where the loss is computed outside of it, pass `labels=`" in told
    assert found.keys() == NAMES
    assert all(map(math.isnan, found.values()))
    # The next forward has them.
    (told,), found = why(model, lambda: model(**unlabelled), lambda: model(**tuned))
    assert found["matrix_entropy/last"] == expected(states(model, tuned)[-1], tuned["labels"] != -100)
    # The loss is computed outside.
    assert why(model, lambda: model(**unlabelled), labels=tuned["labels"]) == ([], found)
    # Labels that the model is given itself come first.
    assert why(model, lambda: model(**tuned), labels=torch.full_like(tuned["labels"], -100)) == ([], found)


@pytest.mark.parametrize("labels", [torch.zeros(24, dtype=torch.int64), torch.zeros(6, 24), torch.zeros(6, 3).long()])
def test_labels_that_are_not_of_tokens_do_not_count(labels):
    model, x = Labelled(), torch.randn(6, 24, 8)
    (told,), found = why(model, lambda: model(x, labels))
    assert "have to be integers of the shape (6, 24)" in told
    assert f"and are {tuple(labels.shape)}" in told
    assert all(map(math.isnan, found.values()))


def test_shifted_labels_alone_are_told(make_llama, tuned):
    model = make_llama(dropout=0.0)
    tuned["shift_labels"] = nn.functional.pad(tuned.pop("labels"), (0, 1), value=-100)[:, 1:]
    (told,), found = why(model, lambda: model(**tuned))
    assert told.startswith("Only `shift_labels` came with the forward of LlamaForCausalLM")
    assert all(map(math.isnan, found.values()))


def test_training_is_bitwise_the_same(make_llama, tuned):
    def train(tokens: str | None) -> list[Tensor]:
        model, losses = make_llama(), []
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monitor = EntropyMonitor(model, "all", tokens=tokens) if tokens else None
        given = copy.deepcopy(tuned)
        for _ in range(3):
            if monitor is not None:
                monitor.start()
            loss = model(**given).loss
            if monitor is not None:
                monitor.stop()
                monitor.compute()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        assert all(torch.equal(value, tuned[key]) for key, value in given.items())
        return [*losses, torch.get_rng_state(), *model.state_dict().values()]

    plain = train(None)
    for tokens in ("all", "labels"):
        assert all(torch.equal(a, b) for a, b in zip(plain, train(tokens), strict=True))


def test_without_it_labels_change_nothing(make_llama, tuned):
    model, found = make_llama(dropout=0.0), []
    for left_out in ("", "labels"):
        monitor = EntropyMonitor(model, "all")
        with monitor:
            model(**{key: value for key, value in tuned.items() if key != left_out})
        found.append(monitor.compute())
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="`tokens` must be 'all' or 'labels', got 'response'"):
        EntropyMonitor(model, tokens="response")


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.tanh(x)


def labels_of(hidden: Tensor, mask: Tensor) -> Tensor:
    # By the values, so that the labels of parts are parts of the labels.
    return torch.where(mask.bool() & (hidden[..., 0].nan_to_num() > hidden[..., 1].nan_to_num()), 1, -100)


def read_parts(rank: int, world_size: int, **arguments: Any) -> dict[str, float]:
    seen = parts(0, rank) if world_size > 1 else batches(0)
    group = {"context_group": dist.group.WORLD} if world_size > 1 else {}
    monitor = EntropyMonitor(Tanh(), "tanh", tokens="labels", dtype=torch.float64, **group)
    with monitor:
        for hidden, mask in seen:
            monitor.model(hidden, labels=labels_of(hidden, mask))
    return monitor.compute()


def test_ranks_that_hold_parts_of_sequences_have_parts_of_the_labels():
    whole = {name: pytest.approx(value, rel=1e-9) for name, value in read_parts(0, 1).items()}
    assert not any(math.isnan(value.expected) for value in whole.values())
    for found in run_on_ranks(read_parts, 2, seconds=60):
        assert found == whole
