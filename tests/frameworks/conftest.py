"""A small model, made on the spot, and a small data set, as the frameworks take them from a disk."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "the cat sat on a mat and dogs ran over hills while birds sang of rain that fell on every green field"


@pytest.fixture
def only_with(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Skips a test where a package is not installed; it is not imported."""

    def check(package: str) -> None:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: make test-frameworks")

    return check


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Qwen2 of two layers and its tokenizer, which knows the bytes only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
        model_max_length=512,
    )
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of short conversations, in the fields that all three know."""
    path = tmp_path / "data.jsonl"
    words, rows = TEXT.split(), []
    for i in range(32):
        question, answer = (" ".join(words[(i + j * k) % len(words)] for j in range(6)) for k in (1, 5))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "instruction": question, "output": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program of this environment in a folder of its own, offline and on the CPU."""

    def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        offline = {
            **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "USE_HF"), "1"),
            **{"CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "WANDB_MODE": "offline"},
            **{"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | offline | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        (tmp_path / "output.txt").write_text(done.stdout, encoding="utf-8")
        return done

    return run


def log_history(folder: Path) -> list[dict[str, Any]]:
    """The records of the last checkpoint below a folder."""
    paths = sorted(folder.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(paths[-1].read_text(encoding="utf-8"))["log_history"]


def assert_same_training(watched: Path, alone: Path) -> None:
    """Whether the losses and the weights at the end are bitwise the same."""
    histories = [log_history(folder) for folder in (watched, alone)]
    losses = [[r[key] for r in history for key in ("loss", "eval_loss") if key in r] for history in histories]
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 10
    weights = [list(folder.rglob("checkpoint-8/*.safetensors")) for folder in (watched, alone)]
    assert len(weights[0]) == len(weights[1]) == 1
    assert weights[0][0].read_bytes() == weights[1][0].read_bytes()


def steps_with(history: list[dict[str, Any]], key: str) -> list[int]:
    return [record["step"] for record in history if key in record]
