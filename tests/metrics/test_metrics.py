"""The torchmetrics classes: accumulation, and everything torchmetrics promises of a metric."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torchmetrics import MetricCollection

from matent_callbacks import EffectiveRank, MatrixEntropy, SequenceEffectiveRank, SequenceMatrixEntropy
from matent_callbacks.accumulate import pooled_tokens
from matent_callbacks.functional.spectrum import solved
from tests.conftest import slow_entropy, slow_pooled_entropy

CLASSES = [MatrixEntropy, EffectiveRank, SequenceMatrixEntropy, SequenceEffectiveRank]


def fed(metric, *updates):
    for update in updates:
        metric.update(*update)
    return metric


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    found = []
    for size, length in [(3, 20), (1, 7), (2, 33)]:
        mask = torch.ones(size, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        found.append((torch.randn(size, length, 12, generator=generator, dtype=torch.float64), mask))
    return found


@pytest.mark.parametrize("d", [16, 64, 768])
@pytest.mark.parametrize("n", [2, 5, 64, 300])
def test_one_sequence_gives_the_papers_number(n, d):
    z = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(n + d))
    for cls in (MatrixEntropy, SequenceMatrixEntropy):
        assert fed(cls(dtype=torch.float64), (z,)).compute().item() == pytest.approx(slow_entropy(z), abs=1e-9)
    for cls in (EffectiveRank, SequenceEffectiveRank):
        assert fed(cls(dtype=torch.float64), (z,)).compute().log().item() == pytest.approx(slow_entropy(z), abs=1e-9)


def test_a_data_set_is_the_mean_over_sequences_and_the_exponential_of_that_mean(batches):
    each = [slow_entropy(h[i], m[i]) for h, m in batches for i in range(len(h))]
    mean = sum(each) / len(each)
    entropy = fed(SequenceMatrixEntropy(dtype=torch.float64), *batches).compute()
    rank = fed(SequenceEffectiveRank(dtype=torch.float64), *batches).compute()
    assert entropy.item() == pytest.approx(mean, abs=1e-9)
    assert rank.log().item() == pytest.approx(mean, abs=1e-9)
    assert entropy.shape == rank.shape == ()


def test_pooled_is_one_covariance_of_all_tokens(batches):
    longest = max(h.shape[1] for h, _ in batches)
    hidden = torch.cat([torch.nn.functional.pad(h, (0, 0, 0, longest - h.shape[1])) for h, _ in batches])
    mask = torch.cat([torch.nn.functional.pad(m, (0, longest - m.shape[1])) for _, m in batches])
    expected = slow_pooled_entropy(hidden, mask)
    assert fed(MatrixEntropy(dtype=torch.float64), *batches).compute().item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("center", ["global", None])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooled_does_not_depend_on_split_or_order_though_the_mean_dwarfs_the_spread(center, normalize):
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(0.2, 2, 32)
    mean = 1000 * torch.ones(32) * torch.randn(32, generator=generator).sign()
    tokens = mean + spread * torch.randn(999, 32, generator=generator)

    def value(*parts: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
        metric = MatrixEntropy(center=center, normalize=normalize, dtype=dtype)
        return fed(metric, *[(part,) for part in parts]).compute().item()

    reference = value(tokens.double(), dtype=torch.float64)
    shuffled = tokens[torch.randperm(999, generator=generator)]
    for parts in ([tokens], tokens.split(1), tokens.split(7), shuffled.split(100), [tokens[:1], tokens[1:]]):
        assert value(*parts) == pytest.approx(reference, rel=1e-5)
    # What E[xx'] - mm' in float32 would make of it, so that the test is known to be hard enough.
    naive = tokens.T @ tokens / 999 - torch.outer(tokens.mean(0), tokens.mean(0))
    share = torch.linalg.eigvalsh(naive).clamp(min=0)
    share = share / share.sum()
    if center == "global" and not normalize:
        assert torch.special.entr(share).sum().item() != pytest.approx(reference, rel=1e-3)


def test_pooled_by_sequence_does_not_depend_on_how_sequences_are_batched():
    hidden = 1000 + torch.randn(24, 40, 16, generator=torch.Generator().manual_seed(2))
    reference = slow_pooled_entropy(hidden)
    for size in (1, 5, 24):
        metric = fed(MatrixEntropy(), *[(part,) for part in hidden.split(size)])
        assert metric.compute().item() == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(cls, dtype, batches):
    half = [(h.to(dtype), m) for h, m in batches]
    expected = fed(cls(), *[(h.float(), m) for h, m in half]).compute()
    assert torch.equal(fed(cls(), *half).compute(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fed(cls(), *half).compute(), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_seen_is_nan_with_torchmetrics_own_warning(cls):
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert cls().compute().isnan()
    padded = fed(cls(), (torch.randn(2, 3, 4), torch.zeros(2, 3)))
    assert padded.compute().isnan()


@pytest.mark.parametrize("cls", CLASSES)
def test_life_of_a_metric(cls, batches):
    whole = fed(cls(dtype=torch.float64), *batches)
    value = whole.compute()

    for copied in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)), whole.clone(), whole.to("cpu")):
        assert torch.equal(copied.compute(), value)

    first, second = fed(cls(dtype=torch.float64), batches[0]), fed(cls(dtype=torch.float64), *batches[1:])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(value.item(), abs=1e-12)
    empty = cls(dtype=torch.float64)
    empty.merge_state(whole)
    assert torch.equal(empty.compute(), value)
    whole_again = copy.deepcopy(whole)
    whole_again.merge_state(cls(dtype=torch.float64))
    assert whole_again.compute().item() == pytest.approx(value.item(), abs=1e-15)

    whole.persistent(True)
    loaded = cls(dtype=torch.float64)
    loaded.persistent(True)
    loaded.load_state_dict(whole.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics counts updates, not states
        assert torch.equal(loaded.compute(), value)

    forwarded = cls(dtype=torch.float64)
    each = [forwarded(*b) for b in batches]
    assert [v.item() for v in each] == [
        pytest.approx(fed(cls(dtype=torch.float64), b).compute().item(), abs=1e-12) for b in batches
    ]
    assert forwarded.compute().item() == pytest.approx(value.item(), abs=1e-12)

    whole.reset()
    assert torch.equal(fed(whole, (torch.eye(5),)).compute(), fed(cls(dtype=torch.float64), (torch.eye(5),)).compute())

    figure, axis = forwarded.plot(each)
    assert figure is not None
    assert len(axis.lines) + len(axis.collections) > 0


@pytest.mark.parametrize("cls", CLASSES)
def test_set_dtype_keeps_counts_whole(cls, batches):
    metric = fed(cls(dtype=torch.float64), *batches).set_dtype(torch.float32)
    counters = [name for name, state in metric.metric_state.items() if name.startswith("num_")]
    assert counters
    assert all(metric.metric_state[name].dtype == torch.int64 for name in counters)
    assert metric.compute().item() == pytest.approx(fed(cls(), *batches).compute().item(), rel=1e-5)
    metric.update(*batches[0])
    assert metric.compute().dtype == torch.float32


def test_collections_share_one_state_and_keep_unlike_metrics_apart(batches):
    collection = MetricCollection(
        {
            "entropy": MatrixEntropy(dtype=torch.float64),
            "rank": EffectiveRank(dtype=torch.float64),
            "renyi": MatrixEntropy(alpha=2.0, dtype=torch.float64),
            "single": MatrixEntropy(),
            "sequence": SequenceMatrixEntropy(dtype=torch.float64),
            "sequence_rank": SequenceEffectiveRank(dtype=torch.float64),
            "sequence_renyi": SequenceMatrixEntropy(alpha=2.0, dtype=torch.float64),
        }
    )
    for b in batches:
        collection.update(*b)
    groups = {frozenset(names) for names in collection.compute_groups.values()}
    assert groups == {
        frozenset({"entropy", "rank", "renyi"}),
        frozenset({"single"}),
        frozenset({"sequence", "sequence_rank"}),
        frozenset({"sequence_renyi"}),
    }
    values = collection.compute()
    for name, metric in [
        ("entropy", MatrixEntropy(dtype=torch.float64)),
        ("rank", EffectiveRank(dtype=torch.float64)),
        ("renyi", MatrixEntropy(alpha=2.0, dtype=torch.float64)),
        ("sequence_rank", SequenceEffectiveRank(dtype=torch.float64)),
        ("sequence_renyi", SequenceMatrixEntropy(alpha=2.0, dtype=torch.float64)),
    ]:
        assert torch.equal(values[name], fed(metric, *batches).compute())


def test_groups_keep_unlike_metrics_apart_though_their_first_update_agrees():
    collection = MetricCollection(
        {"sequence": MatrixEntropy(normalize=False), "plain": MatrixEntropy(center=None, normalize=False)}
    )
    centred = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    collection.update(centred)
    collection.update(centred + 5)
    values = collection.compute()
    assert values["plain"].item() == pytest.approx(
        fed(MatrixEntropy(center=None, normalize=False), (centred,), (centred + 5,)).compute().item()
    )
    assert values["plain"] != values["sequence"]


def test_normalize_by_reaches_one_at_the_attainable_rank():
    d = 8
    few = torch.eye(d, dtype=torch.float64)[:5]  # 5 tokens, so rank 4 once they are centred
    by_rank = fed(MatrixEntropy(normalize_by="log_rank", dtype=torch.float64), (few,)).compute().item()
    by_d = fed(MatrixEntropy(normalize_by="log_d", dtype=torch.float64), (few,)).compute().item()
    entropy = slow_entropy(few)
    assert by_rank == pytest.approx(1.0)
    assert by_d == pytest.approx(entropy / torch.tensor(d).double().log().item())
    # Two sequences of 3 lose one dimension each.
    two = fed(MatrixEntropy(normalize_by="log_rank", dtype=torch.float64), (torch.eye(6).view(2, 3, 6),))
    assert two.compute().item() == pytest.approx(1.0)
    sequence = fed(SequenceMatrixEntropy(normalize_by="log_rank", dtype=torch.float64), (few,), (torch.eye(d)[:3],))
    assert sequence.compute().item() == pytest.approx(1.0)


def test_long_streams_keep_counting():
    metric = SequenceMatrixEntropy()
    metric.update(torch.randn(1, 6, 4))
    metric.num_sequences += 10**9
    before = metric.compute()
    metric.update(torch.randn(1, 6, 4))
    assert metric.compute().item() == pytest.approx(before.item())
    assert metric.num_sequences.item() == 10**9 + 2


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_input_is_named_and_loses_nothing(cls, batches):
    metric = fed(cls(dtype=torch.float64), *batches)
    value = metric.compute()
    for call in (metric.update, metric.forward):
        with pytest.raises(ValueError, match=r"must have 12 features as in the updates before .* got 5"):
            call(torch.randn(3, 5))
        with pytest.raises(ValueError, match=r"`attention_mask`"):
            call(torch.randn(3, 4, 12), torch.ones(3, 5))
        with pytest.raises(TypeError, match=r"`hidden_states` must be a floating point tensor"):
            call(torch.ones(3, 12, dtype=torch.long))
    metric._computed = None
    assert torch.equal(metric.compute(), value)
    with pytest.raises(ValueError, match="`num_features` must be at least 1"):
        cls(num_features=0)
    with pytest.raises(ValueError, match="must have 7 features"):
        cls(num_features=7).update(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"`dtype` must be torch.float32 or torch.float64, got torch.float16"):
        cls(dtype=torch.float16)
    with pytest.raises(ValueError, match="accumulated with other settings"):
        metric.merge_state(fed(cls(normalize=False, dtype=torch.float64), *batches))
    with pytest.raises(ValueError, match="`alpha` must be above 0"):
        cls(alpha=0)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`center` must be 'sequence', 'global' or None, got 'batch'"):
        MatrixEntropy(center="batch")
    for cls in (MatrixEntropy, SequenceMatrixEntropy):
        with pytest.raises(ValueError, match="`normalize_by` must be one of"):
            cls(normalize_by="d")


def test_nonfinite_tokens_are_counted_and_left_out():
    z = torch.randn(10, 6)
    dirty = torch.cat([z, torch.full((2, 6), float("nan"))])
    metric = fed(MatrixEntropy(), (dirty,))
    assert metric.num_nonfinite == 2
    assert metric.compute().item() == pytest.approx(fed(MatrixEntropy(), (z,)).compute().item(), rel=1e-6)


def test_no_gradient_is_kept():
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    metric = MatrixEntropy()
    assert not metric(hidden).requires_grad
    assert not metric.scatter.requires_grad


@pytest.mark.parametrize("center", ["sequence", "global", None])
@pytest.mark.parametrize("tokens", [30, 32, 33, 500])
def test_pooled_state_is_half_of_a_covariance_at_most_and_few_tokens_give_the_smaller_matrix(
    center, tokens, monkeypatch
):
    d, decomposed = 64, []

    def spy(matrix, **arguments):
        decomposed.append(matrix.shape[-1])
        return solved(matrix, **arguments)

    monkeypatch.setattr(pooled_tokens, "solved", spy)
    z = 5 + torch.randn(tokens, d, dtype=torch.float64)
    metric = fed(MatrixEntropy(center=center, dtype=torch.float64), *[(part,) for part in z.split(7)])
    assert sum(state.numel() for state in metric.metric_state.values()) <= d * (d + 1) // 2 + 2 * d
    value = metric.compute().item()
    assert decomposed == [tokens if tokens <= d // 2 else d]

    prepared = [part - part.mean(0) if center == "sequence" else part for part in z.split(7)]
    rows = torch.cat([part / part.norm(dim=1, keepdim=True).clamp(min=1e-30) for part in prepared])
    rows = rows - rows.mean(0) if center == "global" else rows
    shares = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0) / rows.square().sum()
    assert value == pytest.approx(torch.special.entr(shares).sum().item(), abs=1e-9)
    renyi = fed(MatrixEntropy(center=center, alpha=2.0, dtype=torch.float64), *[(part,) for part in z.split(7)])
    assert renyi.compute().item() == pytest.approx(-shares.square().sum().log().item(), abs=1e-9)


@pytest.mark.parametrize("length", [2, 60])
def test_updates_never_write_into_what_a_state_was_taken_from(length):
    def made(seed: int) -> MatrixEntropy:
        hidden = torch.randn(1, length, 12, generator=torch.Generator().manual_seed(seed))
        return fed(MatrixEntropy(center="global"), (hidden,))

    other, taken = made(0), MatrixEntropy(center="global")
    value = other.compute().item()
    taken.merge_state(other)
    other.persistent(True)
    checkpoint, loaded = other.state_dict(), MatrixEntropy(center="global")
    copies = {name: state.clone() for name, state in checkpoint.items()}
    loaded.persistent(True)
    loaded.load_state_dict(checkpoint)
    for metric in (taken, loaded):
        metric.update(torch.randn(3, 40, 12))
        metric.merge_state(made(1))
    assert other.clone().compute().item() == value
    other._computed = None
    assert other.compute().item() == value
    assert all(torch.equal(state, copies[name]) for name, state in checkpoint.items())
