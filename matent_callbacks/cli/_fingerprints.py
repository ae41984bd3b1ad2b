"""Fingerprints of models, by which a results file knows whether what it holds is of the model that is there now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from matent_callbacks.cli._adapters import ModelError, find_adapter

Fingerprint = dict[str, str | None]
"""By folder, or name on the hub: a hash of the files, or the commit; ``None`` where it is not known."""

# What a model is made of; other files in a folder, such as those of an optimizer, do not change what is measured.
_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt", ".py")
_OF_TRAINING = ("trainer_state.json", "training_args.bin", "optimizer.bin", "scheduler.bin", "generation_config.json")
# A file up to this size is read as a whole, of a larger one as many blocks of a few bytes, and some of each tensor.
_WHOLE, _BLOCKS, _BLOCK = 2**26, 1024, 2**12
_LONGEST_HEADER = 10**8


def fingerprint(name: str, *, baseline: str | None) -> Fingerprint:
    """Return that of a model, and of the base that it is put on if it is an adapter."""
    try:
        adapter = find_adapter(name, baseline=baseline)
    except ModelError:
        adapter = None
    names = [name, adapter.base] if adapter else [name]
    return {own: _of_folder(Path(own)) if Path(own).is_dir() else _commit(own) for own in names}


def joined(before: Mapping[str, str | None], after: Mapping[str, str | None]) -> Fingerprint:
    """Return the fingerprint of what was loaded in between.

    Files may have been replaced while they were loaded: then what was there before is told from what is there later.
    What is on the hub may have been downloaded.
    """
    return {name: before.get(name) if Path(name).is_dir() else mark for name, mark in after.items()}


def differ(one: Mapping[str, str | None], other: Mapping[str, str | None]) -> bool:
    """Whether two fingerprints are of unlike models, as far as both are known."""
    common = [(one[name], other[name]) for name in one.keys() & other.keys()]
    return one.keys() != other.keys() or any(None not in marks and marks[0] != marks[1] for marks in common)


def _of_folder(folder: Path) -> str | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in sorted(folder.iterdir()):
            if file.suffix in _SUFFIXES and file.name not in _OF_TRAINING and file.is_file():
                digest.update(f"{file.name}: {file.stat().st_size}\n".encode())
                with file.open("rb") as content:
                    for part in _parts(content, file):
                        digest.update(part)
    except OSError:
        return None
    return digest.hexdigest()


def _parts(content: BinaryIO, file: Path) -> Iterable[bytes]:
    size = file.stat().st_size
    if size <= _WHOLE:
        yield content.read()
        return
    places = {block * (size - _BLOCK) // (_BLOCKS - 1) for block in range(_BLOCKS)}
    if file.suffix == ".safetensors":
        places |= _places_of_tensors(content)
    for place in sorted(places):
        content.seek(place)
        yield content.read(_BLOCK)


def _places_of_tensors(content: BinaryIO) -> set[int]:
    """Return where each tensor begins and has its middle."""
    try:
        length = int.from_bytes(content.read(8), "little")
        tensors = json.loads(content.read(min(length, _LONGEST_HEADER)))
        ranges = [of["data_offsets"] for name, of in tensors.items() if name != "__metadata__"]
        return {8 + length + place for start, end in ranges for place in (start, (start + end) // 2)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return set()


def _commit(name: str) -> str | None:
    """Return the commit of a model of the hub that is on this machine, and is loaded where there is no newer one."""
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name on the hub
        return None
    return Path(file).parent.name if isinstance(file, str) else None
