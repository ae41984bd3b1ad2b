"""The framework-neutral monitor."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from matent_callbacks import EffectiveRank, EntropyMonitor, SequenceEffectiveRank, SequenceMatrixEntropy
from matent_callbacks.accumulate.catalogue import CATALOGUE
from matent_callbacks.functional import curvature, matrix_entropy, spectral_summary, spectrum
from tests.conftest import collate, text_examples
from tests.slow import slow_lidar


def hidden_states(model, batch, layer: int = -1):
    with torch.no_grad():
        return model(**batch, output_hidden_states=True).hidden_states[layer]


def test_every_name_of_the_catalogue_is_what_its_metric_or_summary_says(make_llama, batch):
    model = make_llama(dropout=0.0)
    monitor = EntropyMonitor(model, metrics=CATALOGUE, dtype=torch.float64)
    with monitor:
        model(**batch)
    readings = monitor.compute()
    shares = {f"spectrum_top_{k}": k for k in (1, 2, 4, 8, 16)}
    assert set(readings) == {f"{name}/last" for name in (*CATALOGUE, *shares) if name != "spectrum"}

    hidden, mask = hidden_states(model, batch), batch["attention_mask"]
    rows = torch.cat([z[m.bool()] for z, m in zip(hidden, mask, strict=True)]).double()
    own_centre = torch.cat([z - z.mean(0) for z in (h[m.bool()].double() for h, m in zip(hidden, mask, strict=True))])
    pooled = spectral_summary(spectrum(own_centre, center=False))
    raw = spectral_summary(spectrum(rows, center=False, normalize=False))
    vectors = torch.stack([h[m.bool()].double().mean(0) for h, m in zip(hidden, mask, strict=True)])
    centred = nn.functional.normalize(vectors, dim=-1)
    of = {
        "pooled": pooled,
        "raw": raw,
        "embedding": spectral_summary(spectrum(centred - centred.mean(0), center=False, normalize=False)),
        "raw_embedding": spectral_summary(spectrum(vectors, center=False, normalize=False)),
        "embedding_covariance": spectral_summary(spectrum(vectors - vectors.mean(0), center=False, normalize=False)),
    }
    units = nn.functional.normalize(own_centre, dim=-1)
    scaled = units / units.norm(dim=0)
    of["correlation"] = spectral_summary(spectrum(scaled, center=False, normalize=False))
    expected = {
        name: of[row.source][row.quantity or name]
        for name, row in CATALOGUE.items()
        if row.source in of and name not in ("spectrum", "holevo_information", "top_dimension_share")
    }
    expected["top_dimension_share"] = units.square().sum(0).max() / units.square().sum()
    lengths = rows.norm(dim=1)
    expected["token_norm"] = lengths.square().mean().sqrt()
    logs = [h[m.bool()].double().norm(dim=1).log() for h, m in zip(hidden, mask, strict=True)]
    expected["max_norm_ratio"] = torch.stack([(own.max() - own.mean()).exp() for own in logs]).mean()
    expected["sink_tokens"] = torch.zeros(())
    cosines = nn.functional.cosine_similarity(rows[None], rows[:, None], dim=-1)
    expected["anisotropy"] = (cosines.sum() - len(rows)) / (len(rows) * (len(rows) - 1))
    expected |= {name: spectrum(own_centre, center=False)[:k].sum() for name, k in shares.items()}
    for name, cls in [
        ("sequence_matrix_entropy", SequenceMatrixEntropy),
        ("sequence_effective_rank", SequenceEffectiveRank),
    ]:
        metric = cls(dtype=torch.float64)
        metric.update(hidden, mask)
        expected[name] = metric.compute()
    counts = mask.sum(1).double()
    within = (counts * matrix_entropy(hidden.double(), mask)).sum() / counts.sum()
    expected["holevo_information"] = pooled["matrix_entropy"] - within
    expected["curvature"] = curvature(hidden.double(), mask).mean()
    expected["lidar"] = torch.tensor(slow_lidar([(hidden, mask.bool())]), dtype=torch.float64)
    for name, value in expected.items():
        assert readings[f"{name}/last"] == pytest.approx(value.item(), rel=1e-8), name
    assert {f"{name}/last" for name in expected} == set(readings)


def test_compute_pools_the_forwards_since_the_last_and_starts_afresh(make_llama):
    model = make_llama(dropout=0.0)
    batches = [collate(text_examples(4, start=s)) for s in (0, 4, 8)]
    monitor = EntropyMonitor(model, metrics="effective_rank")

    def expected(*chosen):
        metric = EffectiveRank()
        for b in chosen:
            metric.update(hidden_states(model, b), b["attention_mask"])
        return metric.compute().item()

    with monitor:
        model(**batches[0])
    model(**batches[2])  # outside: not read
    with monitor:
        model(**batches[1])
    assert monitor.compute() == {"effective_rank/last": pytest.approx(expected(*batches[:2]), rel=1e-5)}
    with monitor:
        model(**batches[2])
    assert monitor.compute() == {"effective_rank/last": pytest.approx(expected(batches[2]), rel=1e-5)}
    with pytest.warns(UserWarning, match="No valid token was seen, so there is no reading of: last"):
        assert monitor.compute() == {"effective_rank/last": pytest.approx(math.nan, nan_ok=True)}


def test_a_layer_without_a_forward_is_told_with_names_that_would_work(make_llama, batch):
    class Model(nn.Module):
        """A tower that is not always run, attention that uses the weights of a module inside, and blocks."""

        def __init__(self):
            super().__init__()
            self.language_model = make_llama(dropout=0.0)
            self.tower = nn.ModuleDict({"block": nn.TransformerEncoderLayer(32, 2, 32, batch_first=True)})
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, **inputs):
            hidden = self.language_model(**inputs, output_hidden_states=True).hidden_states[-1]
            return self.attention(hidden, hidden, hidden)[0]

    model = Model()
    monitor = EntropyMonitor(model, ["attention.out_proj", "tower.block.linear1", "language_model.model.norm"])
    with monitor:
        model(**batch)
    with pytest.warns(UserWarning, match="No valid token was seen") as caught:
        values = monitor.compute()
    assert {key.split("/")[1] for key in values} == set(monitor.layers)
    assert {key.split("/")[1] for key, value in values.items() if not math.isnan(value)} == {
        "language_model.model.norm"
    }
    (told,) = (str(w.message) for w in caught)
    assert "No forward of attention.out_proj, tower.block.linear1 ran, although Model was run: a module is not" in told
    names = told.removesuffix(".").split("Names that would have a reading: ")[1].split(", ")
    assert names == ["language_model.model.norm", "last", "all", "attention"]
    monitor = EntropyMonitor(model, names)
    with monitor:
        model(**batch)
    assert {key.split("/")[1] for key in monitor.compute()} == set(monitor.layers)


def test_why_no_forward_counted(make_llama, batch):
    model, other = make_llama(), make_llama()
    monitor = EntropyMonitor(model, ["last", 1])
    monitor.start(training_only=True)
    with torch.no_grad():
        model(**batch)
    monitor.stop()
    message = "no reading of: last, layer_01. Their forwards are not counted: .* key-value cache, or had no gradients"
    with pytest.warns(UserWarning, match=message):
        assert all(map(math.isnan, monitor.compute().values()))
    with monitor:
        other(**batch)
    with pytest.warns(UserWarning, match="No forward of LlamaForCausalLM was watched: perhaps another module is run"):
        assert all(map(math.isnan, monitor.compute().values()))
    with monitor:
        model(**{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])})
    with pytest.warns(UserWarning, match=r"no reading of: last, layer_01\.$"):
        assert all(map(math.isnan, monitor.compute().values()))


def test_compute_later_gives_the_same_numbers(make_llama, batch):
    model = make_llama(dropout=0.0)
    monitor = EntropyMonitor(model, layers="all", metrics=("matrix_entropy", "rankme", "sequence_effective_rank"))
    with monitor:
        model(**batch)
    finish = monitor.compute_later()
    with monitor:
        model(**batch)
    assert finish() == monitor.compute()


def test_read_leaves_no_trace(make_llama, batch):
    class Counting(nn.Module):
        """Counts its forwards in a buffer and in a plain attribute, and puts a new buffer in place of another."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.calls = 0
            self.register_buffer("counter", torch.zeros(1))
            self.register_buffer("replaced", torch.zeros(1))

        def forward(self, **kwargs):
            self.calls += 1
            self.counter += 1
            self.register_buffer("replaced", torch.ones(2))
            torch.rand(3)
            return self.inner(**kwargs)

    model = Counting(make_llama())
    model.train()
    model.inner.model.layers[1].eval()  # frozen on purpose
    modes = [module.training for module in model.modules()]
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    monitor = EntropyMonitor(model)
    monitor.read([batch, batch])
    assert "matrix_entropy/last" in monitor.compute()
    assert [module.training for module in model.modules()] == modes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())

    class Fails(nn.Module):
        def forward(self, *args, **kwargs):
            raise RuntimeError("no")

    model.inner.model.layers[2] = Fails()
    with pytest.raises(RuntimeError, match="no"):
        monitor.read(batch)
    assert [m.training for m in model.modules() if not isinstance(m, Fails)][:5] == modes[:5]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_generation_and_recomputation_are_not_counted(make_llama, batch):
    model = make_llama(dropout=0.0)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    plain = EntropyMonitor(model, layers="all")
    with plain:
        model(**inputs)
    expected = plain.compute()

    monitor = EntropyMonitor(model, layers="all")
    with monitor:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
        model(**inputs)
    assert monitor.compute() == expected

    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        with monitor:
            model(**batch).loss.backward()
        tokens = monitor._recording.accumulators["layer_01"].tokens["pooled"].moments().num_tokens
        assert tokens == batch["attention_mask"].sum()
        assert monitor.compute() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_forward_with_a_cache_is_generation_whatever_its_name(name):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return self.layer(x)

    monitor, hidden = EntropyMonitor(model := Model(), "layer"), torch.randn(2, 5, 8)
    with monitor:
        model(hidden, **{name: None})
    expected = monitor.compute()
    with monitor:
        model(hidden, **{name: False})  # a switch of the model's own
        model(torch.randn(2, 5, 8), **{name: object()})
    assert monitor.compute() == expected


def test_rankme_of_a_complete_collapse_is_exact_in_float64_and_ten_per_cent_high_at_most_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 256, 3, generator=generator) @ torch.randn(3, 768, generator=generator)
    share = torch.linalg.svdvals(hidden.flatten(0, 1).double())
    expected = float(torch.special.entr(share / share.sum()).sum().exp())
    found = {}
    for dtype in (torch.float32, torch.float64):
        monitor = EntropyMonitor(model := nn.Sequential(nn.Identity()), "0", metrics="rankme", dtype=dtype)
        with monitor:
            model(hidden)
        found[dtype] = monitor.compute()["rankme/0"]
    assert found[torch.float64] == pytest.approx(expected, rel=1e-4)
    assert expected < found[torch.float32] < 1.1 * expected


def test_autograd_is_not_touched_and_nothing_is_kept(make_llama, batch):
    model = make_llama(dropout=0.0)
    model(**batch).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    seen: list[weakref.ref[torch.Tensor]] = []
    handle = model.model.layers[0].register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    monitor = EntropyMonitor(model, layers="all", metrics=list(CATALOGUE))
    with monitor:
        model(**batch).loss.backward()
    handle.remove()
    gc.collect()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert seen[0]() is None


def test_autocast_and_its_cache_are_left_alone(make_llama, batch):
    model = make_llama(dropout=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(**batch, output_hidden_states=True)
        monitor = EntropyMonitor(model, layers="all")
        with monitor:
            watched = model(**batch)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(plain.logits, watched.logits)
    readings = monitor.compute()
    metric = EffectiveRank()
    metric.update(plain.hidden_states[1].float(), batch["attention_mask"])
    assert readings["effective_rank/layer_01"] == pytest.approx(metric.compute().item(), rel=1e-5)


def test_max_tokens_spans_forwards(make_llama):
    model = make_llama(dropout=0.0)
    batches = [collate(text_examples(2, start=1)) for _ in range(3)]
    monitor = EntropyMonitor(model, max_tokens=60)
    with monitor:
        for b in batches:
            model(**b)
    assert batches[0]["attention_mask"].sum() == 48
    assert monitor._recording.accumulators["last"].tokens["pooled"].moments().num_tokens == 60


def test_bad_arguments_are_named(make_llama):
    model = make_llama()
    for arguments, message in [
        ({"max_tokens": 1}, "`max_tokens` must be at least 2 or None, got 1"),
        ({"dtype": torch.float16}, r"`dtype` must be torch.float32 or torch.float64, got torch.float16"),
        ({"embedding": "cls"}, "`embedding` must be 'mean', 'last' or 'first', got 'cls'"),
        ({"on_error": "ignore"}, "`on_error` must be 'raise' or 'warn', got 'ignore'"),
        ({"metrics": []}, "`metrics` must name at least one of matrix_entropy"),
        ({"metrics": "efective_rank"}, "`metrics` asks for 'efective_rank'.*Near: effective_rank"),
    ]:
        with pytest.raises(ValueError, match=message):
            EntropyMonitor(model, **arguments)


def test_an_output_that_is_no_hidden_state_names_the_layer():
    class Scores(nn.Module):
        def forward(self, x):
            return {"score": 1.0} if x is None else x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = Scores()

        def forward(self, x):
            return self.scores(x)

    model = Model()
    with (
        pytest.raises(RuntimeError, match=r"Reading layer 'scores' failed: .* got NoneType"),
        EntropyMonitor(model, layers="scores"),
    ):
        model(None)
    monitor = EntropyMonitor(model, layers="scores", on_error="warn")
    with pytest.warns(UserWarning, match=r"Reading layer 'scores' failed: .*\(2, 3, 4, 5\)"), monitor:
        model(torch.randn(2, 3, 4, 5))
    with monitor:
        model(torch.ones(3, 4, dtype=torch.long))  # said once
    assert monitor.compute() == {}
    assert not model.scores._forward_hooks


def test_importing_the_package_imports_no_extra():
    code = "import sys, matent_callbacks.functional; from matent_callbacks import EntropyMonitor; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "matent_callbacks.monitor" in loaded
    assert not {"transformers", "lightning", "pytorch_lightning", "wandb", "matplotlib"} & set(loaded)


def test_tokens_that_are_alone_in_their_sequence_have_no_spectrum(make_llama):
    model = make_llama(dropout=0.0)
    monitor = EntropyMonitor(model, metrics=["effective_rank", "top_share", "rankme"])
    with monitor:
        model(torch.arange(8).unsqueeze(1))
    with pytest.warns(
        UserWarning, match=r"no effective_rank, top_share of: last. It takes at least 2 tokens of one seq"
    ):
        values = monitor.compute()
    assert math.isnan(values["effective_rank/last"])
    assert math.isnan(values["top_share/last"])
    assert values["rankme/last"] > 1
    with monitor:
        model(torch.arange(9).view(1, 9))
        model(torch.arange(8).unsqueeze(1))
    assert values.keys() == {key for key, value in monitor.compute().items() if value > 0}
