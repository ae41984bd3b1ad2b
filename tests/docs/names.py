"""What the pages take as given: a small model and real text or pairs under the names that their blocks use.

A model has as few layers and a data set as few examples as the page's claims allow; no setting is changed, so what a
block asks for is what runs.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import CLIPModel, LlamaConfig, LlamaForCausalLM, LlamaModel, LlavaForConditionalGeneration

from tests.conftest import VOCABULARY, collate, text_examples
from tests.pairs import clip_examples, collate_pairs, llava_examples, make_clip, make_llava


def names_for(page: str) -> dict[str, Any]:
    return pair_names() if page == "docs/multimodal.md" else text_names()


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def text_names() -> dict[str, Any]:
    # As long as each other, as the Trainer's own collator wants them; 17 batches, since in its three epochs the pages
    # have a reading at step 50.
    examples = [example for example in text_examples(240) if len(example["input_ids"]) == 24]
    train_dataset, eval_dataset = examples[:136], examples[136:]
    batches = [collate(text_examples(4, start=4 * i)) for i in range(8)]
    model = small_llama()
    with torch.no_grad():
        hidden_states = model.model(batches[0]["input_ids"], batches[0]["attention_mask"]).last_hidden_state
    return {
        "model": model,
        "base": small_llama(),
        "module": LanguageModel(model),
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "batches": batches,
        "batches_of_this_rank": batches[:2],
        "batch": batches[0],
        "probe": batches[1],
        "hidden_states": hidden_states,
        "attention_mask": batches[0]["attention_mask"],
        "train_dataloader": DataLoader(train_dataset, batch_size=8, collate_fn=collate),
        "val_dataloader": DataLoader(eval_dataset, batch_size=8, collate_fn=collate),
    }


class LanguageModel(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(**batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def pair_names() -> dict[str, Any]:
    llava: LlavaForConditionalGeneration = make_llava()
    clip: CLIPModel = make_clip()
    pairs = collate_pairs(clip_examples(12))
    return {
        "model": llava,
        "train_dataset": llava_examples(16),
        "eval_dataset": llava_examples(16),
        "collate": collate_pairs,
        "probe": collate_pairs(llava_examples(4)),
        "clip_model": clip,
        "pairs": pairs,
        "my_model": OwnModel(),
        "my_batch": {
            "pixels": torch.randn(4, 9, 12),
            "patch_mask": torch.ones(4, 9, dtype=torch.bool),
            "ids": pairs["input_ids"][:4],
        },
        "embed_image": embed_image,
        "embed_text": embed_text,
        "embed_both": embed_both,
    }


class OwnModel(nn.Module):
    """A vision-language model that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.project = nn.Linear(12, 16)
        self.language_model = LlamaModel(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
            )
        )


def embed_image(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.project(model.vision(batch["pixels"])), batch["patch_mask"]


def embed_text(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.language_model.embed_tokens(batch["ids"]), batch["ids"] > 0


def embed_both(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    parts = (embed_image(model, batch), embed_text(model, batch))
    states, masks = zip(*parts, strict=True)
    return torch.cat(states, 1), torch.cat(masks, 1)
