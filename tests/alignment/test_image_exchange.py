"""Images moved on by one sample, in every family, against a batch whose image inputs were moved by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from matent_callbacks.alignment.image_exchange import exchange_images
from matent_callbacks.alignment.joint_forward import JointForward
from matent_callbacks.alignment.vision_language import Stage, stages_of, vision_language_stages
from matent_callbacks.capture.inference import side_effect_free
from tests.alignment.families import FAMILIES, IMAGE, PAD, Probe, Sample, collate, make_probe
from tests.versions import needs

# One image and two, of different sizes, a sample without, and one whose size no other has.
BATCH = (
    Sample([(24, 12)], [3, 4]),
    Sample([(4, 24), (24, 24)], [2, 3, 5]),
    Sample([], [9]),
    Sample([(24, 24)], [6, 7]),
    Sample([(24, 12)], [2, 6]),
    Sample([(4, 24), (24, 24)], [4, 2, 3]),
    Sample([(24, 12)], [5, 5]),
)
OF_ONE_SIZE = {0: 3, 3: 4, 4: 6, 6: 0, 1: 5, 5: 1}
OF_MANY_SIZES = {0: 4, 4: 6, 6: 0, 1: 5, 5: 1}
MANY_SIZES = ("llava with pixtral", "llava next", "llava onevision", "qwen2 vl", "qwen2.5 vl", "qwen3 vl")


def with_labels(batch: dict[str, Any], rows: Sequence[int] | None = None) -> dict[str, Any]:
    """All text counts, of all samples or of some."""
    labels = batch["input_ids"].masked_fill((batch["input_ids"] == IMAGE) | (batch["attention_mask"] == 0), -100)
    if rows is not None:
        labels[[row for row in range(len(labels)) if row not in rows]] = -100
    return {**batch, "labels": labels}


def moved_by_hand(probe: Probe, donors: dict[int, int]) -> Probe:
    """Other images, and what is said of their sizes, with the same tokens."""
    donors = {i: donors.get(i, i) for i in range(len(probe.ids))}
    samples = [Sample(probe.samples[donor].sizes, probe.samples[i].text) for i, donor in donors.items()]
    return Probe(samples, probe.ids, [probe.images[donor] for donor in donors.values()])


def explicit(model: Any, batch: dict[str, Any], rows: Sequence[int]) -> tuple[float, Tensor]:
    """Loss on some samples, and the last hidden states."""
    with torch.no_grad():
        output = model(**with_labels(batch, rows), output_hidden_states=True)
    return output.loss.item(), output.hidden_states[-1]


@needs("transformers", "5.0")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_forward_of_a_batch_whose_images_were_moved(name, side, models):
    family, model = FAMILIES[name], models(name)
    probe = make_probe(family, model, BATCH)
    batch = collate(family, probe, side)
    donors = OF_MANY_SIZES if name in MANY_SIZES else OF_ONE_SIZE
    with side_effect_free(model):
        forward = JointForward(model, with_labels(batch), with_labels=True)
        stages, _ = stages_of(forward)
        found = exchange_images(forward)
    with_image = [i for i, sample in enumerate(BATCH) if sample.sizes]
    assert found.exchanged.tolist() == [i in donors for i in with_image]
    own_loss, own_states = explicit(model, batch, list(donors))
    moved_loss, moved_states = explicit(model, collate(family, moved_by_hand(probe, donors), side), list(donors))
    assert abs(moved_loss - own_loss) > 1e-4
    tokens = found.num_labels[found.exchanged].sum()
    assert tokens == (with_labels(batch, list(donors))["labels"][:, 1:] != -100).sum()
    assert (found.nats[found.exchanged].sum() / tokens).item() == pytest.approx(own_loss, abs=2e-6)
    assert (found.moved_nats[found.exchanged].sum() / tokens).item() == pytest.approx(moved_loss, abs=2e-6)
    assert torch.equal(found.nats[~found.exchanged], found.moved_nats[~found.exchanged])
    mask = found.image_text.mask
    assert torch.equal(mask, stages["image_text"].mask)
    torch.testing.assert_close(stages["image_text"].hidden_states[mask], own_states[with_image][mask])
    torch.testing.assert_close(found.image_text.hidden_states[mask], moved_states[with_image][mask])


def test_all_alike_are_moved_around_once(models):
    family, model = FAMILIES["llava"], models("llava")
    probe = make_probe(family, model, [Sample([(24, 24)], [2, 3 + i]) for i in range(5)])
    batch = collate(family, probe)
    donors = {0: 1, 1: 2, 2: 3, 3: 4, 4: 0}
    with side_effect_free(model):
        found = exchange_images(JointForward(model, with_labels(batch), with_labels=True))
    loss, _ = explicit(model, collate(family, moved_by_hand(probe, donors)), list(donors))
    assert found.exchanged.all()
    assert (found.moved_nats.sum() / found.num_labels.sum()).item() == pytest.approx(loss, abs=2e-6)


@needs("transformers", "5.0")
def test_as_many_tokens_in_another_shape_are_no_equal(models):
    family, model = FAMILIES["qwen2 vl"], models("qwen2 vl")
    wide, high, text = [(4, 24)], [(24, 4)], [3, 4]
    probe = make_probe(family, model, [Sample(size, text) for size in (wide, high, wide, wide)])
    assert [row.count(IMAGE) for row in probe.ids] == [6] * 4
    batch = collate(family, probe)
    with side_effect_free(model):
        found = exchange_images(JointForward(model, with_labels(batch), with_labels=True))
    assert found.exchanged.tolist() == [True, False, True, True]
    donors = {0: 2, 2: 3, 3: 0}
    loss, _ = explicit(model, collate(family, moved_by_hand(probe, donors)), list(donors))
    nats, tokens = found.moved_nats[found.exchanged].sum(), found.num_labels[found.exchanged].sum()
    assert (nats / tokens).item() == pytest.approx(loss, abs=2e-6)


@needs("transformers", "5.0")
def test_only_one_forward_more_and_no_more_logits_than_labels(models):
    family, model = FAMILIES["smolvlm"], models("smolvlm")
    batch = with_labels(collate(family, make_probe(family, model, BATCH)))
    length = batch["input_ids"].shape[1]
    batch["labels"][:, : length - 3] = -100
    calls, kept = [], []
    handles = [
        model.register_forward_hook(lambda m, args, output: kept.append(output.logits.shape[1])),
        model.get_decoder().register_forward_hook(lambda m, args, output: calls.append(1)),
    ]
    try:
        with side_effect_free(model):
            forward = JointForward(model, batch, with_labels=True)
            stages_of(forward)
            exchange_images(forward)
    finally:
        for handle in handles:
            handle.remove()
    assert kept == [4, 4]
    assert len(calls) == 4  # the image alone, the text alone, both, and both once more
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("labels", [None, "nothing counts", "of another shape"])
def test_without_labels_only_the_states_are_moved(labels, models):
    family, model = FAMILIES["llava"], models("llava")
    batch = collate(family, make_probe(family, model, BATCH))
    if labels == "nothing counts":
        # The first token of a sequence is foretold by nothing.
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][:, 0] = 5
    elif labels == "of another shape":
        batch["labels"] = batch["input_ids"][:, :3]
    with side_effect_free(model):
        found = exchange_images(JointForward(model, batch, with_labels=True))
    assert found.num_labels.sum() == found.nats.sum() == found.moved_nats.sum() == 0
    assert found.exchanged.tolist() == [True] * 6
    assert found.image_text.hidden_states.shape[0] == 6


def test_a_model_without_a_head_has_no_losses(models):
    family, model = FAMILIES["llava"], models("llava")
    batch = with_labels(collate(family, make_probe(family, model, BATCH)))
    with side_effect_free(model):
        found = exchange_images(JointForward(model.model, batch, with_labels=True))
    assert found.num_labels.sum() == 0
    assert found.exchanged.all()


@needs("transformers", "5.0")
def test_reading_of_ones_own(models):
    family, model = FAMILIES["qwen3 vl"], models("qwen3 vl")
    batch = with_labels(collate(family, make_probe(family, model, BATCH)))

    def read() -> Stage:
        return vision_language_stages(model, batch)[0]["image_text"]

    with side_effect_free(model):
        expected = exchange_images(JointForward(model, batch, with_labels=True))
        found = exchange_images(JointForward(model, batch, with_labels=True), read)
        assert torch.equal(found.image_text.hidden_states, expected.image_text.hidden_states)
        assert torch.equal(found.moved_nats, expected.moved_nats)
        before = read()
        # What does not meet the exchanged images, or has other rows than the samples with images, is no reading.
        assert exchange_images(JointForward(model, batch), lambda: before).image_text is None
        fewer = exchange_images(JointForward(model, batch), lambda: Stage(*(part[1:] for part in read())))
        assert fewer.image_text is None


def test_compiled_models(models):
    family, model = FAMILIES["llava"], models("llava")
    compiled = torch.compile(family.build(), backend="eager")
    batch = with_labels(collate(family, make_probe(family, model, BATCH)))
    with side_effect_free(model):
        compiled(**batch)
        expected = exchange_images(JointForward(model, batch, with_labels=True))
        found = exchange_images(JointForward(compiled, batch, with_labels=True))
    assert torch.equal(found.moved_nats, expected.moved_nats)
    assert not torch.equal(found.moved_nats, found.nats)


def test_the_hook_is_gone_after_an_exception(models):
    family, model = FAMILIES["llava"], models("llava")
    batch = collate(family, make_probe(family, model, BATCH))
    assert (batch["input_ids"] == PAD).any()

    def fail() -> Stage:
        raise KeyError("no")

    with pytest.raises(KeyError), side_effect_free(model):
        exchange_images(JointForward(model, batch), fail)
    assert not any(module._forward_pre_hooks for module in model.modules())
