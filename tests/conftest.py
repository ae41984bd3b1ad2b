"""Real text, real architectures built small, and the slow definition that everything is compared with."""

from __future__ import annotations

import os

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing is told to the makers of what is only imported here.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("COMET_ERROR_TRACKING_ENABLE", "false")
os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

VOCABULARY = 128

# Places of the tests that `make check` leaves out: they train, start processes, or open a browser.
SLOW = (
    *("accumulate/test_reduction.py", "capture/test_vision_language.py", "cli/test_ranks.py", "cli/test_measure.py"),
    *("cli/test_adapters.py", "cli/test_baseline.py", "monitor/test_pretrained.py"),
    *(
        "distributed/",
        "docs/",
        "frameworks/",
        "integrations/",
        "loggers/",
        "loop/",
        "plot/",
        "quantized/",
        "report/",
        "sweep/",
        "trl/",
        "lightning/",
        "transformers/",
    ),
    *("test_collapse.py", "test_examples.py", "test_plateau.py", "test_scaling_law.py"),
)

LONGEST = ("sweep/test_auto_classes.py", "test_examples.py", "sweep/test_faults_on_ranks.py", "cli/test_ranks.py")

# The models are tiny: threads would only wait for each other, and for those of the processes of distributed tests.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cuda", help="where the tests marked `cuda` run; without a GPU they are skipped"
    )
    parser.addoption("--small", action="store_true", help="make these tests small")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    places = {item: item.path.relative_to(root).as_posix() for item in items if item.path.is_relative_to(root)}
    slow = {item for item, place in places.items() if place.startswith(SLOW)}
    for item in slow:
        item.add_marker(pytest.mark.slow)

    def order(item: pytest.Item) -> tuple[bool, bool]:
        # A file stays in one process: a long one that began last would keep the others waiting.
        return not places.get(item, "").startswith(LONGEST), item not in slow

    items.sort(key=order)


def slow_entropy(z: Tensor, mask: Tensor | None = None) -> float:
    """The paper's procedure for one sequence: d x d covariance, all singular values, float64."""
    z = z.double() if mask is None else z[mask.bool()].double()
    z = z - z.mean(0)
    norms = z.norm(dim=1, keepdim=True)
    z = torch.where(norms > 0, z / norms, z)
    covariance = z.T @ z / z.shape[0]
    values = torch.linalg.svd(covariance / covariance.trace())[1]
    values = values[values > 0]
    return float(-(values * values.log()).sum())


def slow_pooled_entropy(hidden: Tensor, mask: Tensor | None = None) -> float:
    """One covariance of all tokens of all sequences, each centred by its sequence; float64."""
    rows = []
    for i, z in enumerate(hidden):
        z = (z if mask is None else z[mask[i].bool()]).double()
        z = z - z.mean(0)
        rows.append(z / z.norm(dim=1, keepdim=True))
    stacked = torch.cat(rows)
    values = torch.linalg.eigvalsh(stacked.T @ stacked / stacked.square().sum())
    return float(torch.special.entr(values.clamp(min=0)).sum())


def text_examples(count: int, length: int = 24, *, start: int = 0) -> list[dict[str, Any]]:
    """English text that ships with CPython as character codes; every third example is shorter."""
    text = "".join(c for topic in sorted(topics) for c in topics[topic] if ord(c) < VOCABULARY)
    examples = []
    for i in range(start, start + count):
        size = length if i % 3 else length // 2
        ids = [ord(c) for c in text[i * length : i * length + size]]
        examples.append({"input_ids": ids, "attention_mask": [1] * size, "labels": list(ids)})
    return examples


def collate(examples: list[dict[str, Any]], *, side: str = "right") -> dict[str, Tensor]:
    """Pad to the longest."""
    longest = max(len(e["input_ids"]) for e in examples)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}

    def padded(values: list[int], fill: int) -> list[int]:
        rest = [fill] * (longest - len(values))
        return values + rest if side == "right" else rest + values

    return {key: torch.tensor([padded(e[key], fill) for e in examples]) for key, fill in padding.items()}


def llama(*, layers: int = 3, hidden: int = 32, dropout: float = 0.1, seed: int = 0) -> Any:
    """A small causal language model with random weights, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        attention_dropout=dropout,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(autouse=True)
def precision_is_not_handed_on() -> Iterator[None]:
    """Before 5.0 the Trainer leaves the precision of a run in the environment, where the next one finds it."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture
def own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A W&B session of this test's own: one that is running keeps its folder, and processes started later join it."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield tmp_path
    wandb.finish()
    wandb.teardown()


@pytest.fixture(scope="session")
def batch() -> dict[str, Tensor]:
    return collate(text_examples(6))


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    return llama


@pytest.fixture
def make_trainer(make_llama: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """A real Trainer on real text, with dropout, that logs each step and reports nowhere unless told."""

    def make(
        callbacks: list[Any] | None = None,
        *,
        model: Any = None,
        examples: int = 96,
        cls: type | None = None,
        **arguments: Any,
    ) -> Any:
        from transformers import Trainer, TrainingArguments

        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        settings: dict[str, Any] = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 6,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
        }
        return (cls or Trainer)(
            model=model if model is not None else make_llama(),
            args=TrainingArguments(**{**settings, **arguments}),
            train_dataset=text_examples(examples),
            eval_dataset=text_examples(10, start=examples),
            data_collator=collate,
            callbacks=callbacks,
        )

    return make
