"""``matent measure``: the paper's data-set quantities of models on disk or on the hub."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of the command; its options and their help are made of these fields."""

    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Folder of a model or of a PEFT adapter, or a name on the Hugging Face hub."
        ),
    ]
    text: Annotated[
        str, typer.Option(metavar="PATH", help="A file with one document a line, a folder of such files, or - (stdin).")
    ]
    field: Annotated[
        str | None, typer.Option(metavar="NAME", help="The text is JSON Lines, with each document in this field.")
    ] = None
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYERS",
            help="last, all, every:4, numbers, module names or globs like *.mlp; several with commas.",
            show_default="last",
        ),
    ] = None
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Any others of the catalogue besides, without interval: effective_rank, rankme, curvature, "
            "holevo_information, embedding_effective_rank, ...",
            show_default="the paper's, which are always there",
        ),
    ] = None
    embedding: Annotated[
        Literal["mean", "last", "first"],
        typer.Option(help="Which vector stands for a document in embedding_...: of its tokens."),
    ] = "mean"
    include_sinks: Annotated[
        bool,
        typer.Option(
            "--include-sinks",
            help="Count attention sinks: a few tokens many times as long as the others, which are left out otherwise.",
        ),
    ] = False
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare each model with this one, on the same documents."),
    ] = None
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a document that count, from its beginning.")] = 2048
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many documents.", show_default="all")
    ] = None
    batch_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens in one batch, padding included: more for a GPU, 1 for one document at a time."
        ),
    ] = 2048
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Also measure the same model with fresh random weights: Diff-eRank.")
    ] = False
    seed: Annotated[int, typer.Option(min=0, help="Of the untrained weights and the bootstrap.")] = 0
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16", "float16", "auto"],
        typer.Option(help="What the model computes in; auto: as its weights are stored."),
    ] = "float32"
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="a GPU if there is one")
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(metavar="MAP", help="auto: spread a model that is larger than one device over all of them."),
    ] = None
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write results here as JSON, and go on from what is there.")
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw all models by depth, and the differences: .png, .svg, .pdf. With --layers all."
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model.")
    ] = False
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Load weights that are not .safetensors; a pickle can run code.")
    ] = False


def measure(**arguments: Any) -> int:
    """Measure matrix entropy and effective rank of models over text.

    For each model and layer: the mean entropy of the sequences in nats, that over log d, and the effective rank
    exp(mean entropy), each with a 95 % bootstrap interval; with --untrained also Diff-eRank. What is read is the last
    hidden state of `AutoModel` (of an encoder-decoder: its encoder), or the layers asked for. Attention sinks are left
    out, as the callbacks leave them out.

    Two checkpoints over the documents of a file, into a file for `matent scaling`:

        matent measure runs/small runs/large --text held_out.txt --untrained --out results.json

    Every layer of a model of the hub over a stream of JSON Lines, 1,000 documents:

        zcat corpus.jsonl.gz | matent measure gpt2 --text - --field text --layers all --max-sequences 1000

    What fine-tuning did to each layer of its base, with the picture:

        matent measure runs/lora --baseline gpt2 --text held_out.txt --layers all --plot layers.png

    On four GPUs, each with a share of the documents:

        torchrun --nproc-per-node 4 -m matent_callbacks measure gpt2 --text held_out.txt --out results.json

    Interrupted (Ctrl-C) and started again with the same --out, it goes on where it was.
    """
    # Torch and transformers take seconds to import, which `--help` and bad arguments need not wait for.
    from matent_callbacks.cli._measure_models import run

    return run(Request(**arguments))


# What typer reads the options from.
_SIGNATURE = inspect.signature(Request, eval_str=True)
measure.__signature__ = _SIGNATURE.replace(return_annotation=int)  # type: ignore[attr-defined]
measure.__annotations__ = {name: parameter.annotation for name, parameter in _SIGNATURE.parameters.items()}
