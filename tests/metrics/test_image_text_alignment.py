"""ImageTextAlignment: values, streaming, and what torchmetrics promises of a metric."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from matent_callbacks import ImageTextAlignment
from tests.conftest import slow_entropy
from tests.ranks import run_on_ranks

STAGES = ("vision_encoder", "connector", "image", "text", "image_text")


def batch(seed: int, size: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    stages = {}
    for i, name in enumerate(STAGES):
        hidden = torch.randn(size, 6 + i, 5 + i, generator=generator, dtype=torch.float64)
        mask = torch.ones(size, 6 + i)
        mask[0, 4:] = 0
        stages[name] = (hidden, mask)
    return stages


def expected(batches: list[dict[str, Any]], basis: str) -> dict[str, float]:
    e = {}
    for name in STAGES:
        each = [slow_entropy(h, m) for b in batches for h, m in zip(*b[name], strict=True)]
        mean = torch.tensor(sum(each) / len(each), dtype=torch.float64)
        e[name] = (mean if basis == "entropy" else mean.exp()).item()
    three = [e["image"], e["text"], e["image_text"]]
    ratio = (e["vision_encoder"] - e["connector"]) / e["vision_encoder"]
    return {"image_text": sum(three) / 3 / max(three), "image_reduction_ratio": ratio}


@pytest.mark.parametrize("basis", ["effective_rank", "entropy"])
def test_values_over_a_stream(basis):
    batches = [batch(0), batch(1, 1), batch(2, 4)]
    metric = ImageTextAlignment(basis=basis, dtype=torch.float64)
    for b in batches:
        metric.update(**b)
    values = expected(batches, basis)
    assert metric.compute().item() == pytest.approx(values["image_text"], abs=1e-9)
    assert metric.summary()["image_reduction_ratio"].item() == pytest.approx(values["image_reduction_ratio"], abs=1e-9)
    assert set(metric.summary()) >= {"effective_rank/image", "matrix_entropy/connector"}


def test_life_of_a_metric():
    first, second = ImageTextAlignment(dtype=torch.float64), ImageTextAlignment(dtype=torch.float64)
    first.update(**batch(0))
    second.update(**batch(1))
    whole = expected([batch(0), batch(1)], "effective_rank")["image_text"]
    first.merge_state(second)
    for metric in (first, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert metric.compute().item() == pytest.approx(whole, abs=1e-9)
    forwarded = ImageTextAlignment(dtype=torch.float64)
    alone = [forwarded(**batch(seed)).item() for seed in (0, 1)]
    assert alone[1] == pytest.approx(expected([batch(1)], "effective_rank")["image_text"], abs=1e-9)
    assert forwarded.compute().item() == pytest.approx(whole, abs=1e-9)
    assert forwarded.set_dtype(torch.float32).num_sequences.dtype == torch.int64
    forwarded.reset()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert forwarded.compute().isnan()


def test_vision_stages_may_be_left_out():
    given = batch(0)
    metric = ImageTextAlignment(dtype=torch.float64)
    metric.update(image=given["image"], text=given["text"], image_text=given["image_text"])
    assert metric.compute().item() == pytest.approx(expected([given], "effective_rank")["image_text"], abs=1e-9)
    assert metric.summary()["image_reduction_ratio"].isnan()


def alignment_on_rank(rank: int, world_size: int) -> float:
    metric = ImageTextAlignment(dtype=torch.float64)
    if rank != 1:
        metric.update(**batch(rank, 2 + rank))
    return metric.compute().item()


def test_every_rank_has_the_value_of_all():
    results = run_on_ranks(alignment_on_rank, 3)
    value = expected([batch(0, 2), batch(2, 4)], "effective_rank")["image_text"]
    assert results == [pytest.approx(value, abs=1e-9)] * 3


def test_bad_input_is_named():
    given = batch(0)
    with pytest.raises(ValueError, match=r"`text`: `attention_mask` must have the shape"):
        ImageTextAlignment().update(
            image=given["image"], text=(given["text"][0], torch.ones(1)), image_text=given["image_text"]
        )
    with pytest.raises(ValueError, match="`basis` must be one of"):
        ImageTextAlignment(basis="rank")
    with pytest.raises(ValueError, match="`dtype` must be"):
        ImageTextAlignment(dtype=torch.float16)
