"""Runs with W&B in a folder that takes no more than a few kilobytes; a process of its own, for its limit and W&B's."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import torch
import wandb

from tests.sweep.runs import Way, make_callback, train

LIMIT = 4096


def main(framework: str, folder: Path) -> None:
    # No privilege is needed for this, unlike for a small disk: beyond the limit a write fails all the same.
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    # The limit holds for what W&B starts as well: git would leave a broken index in the checkout.
    os.environ["WANDB_DISABLE_GIT"] = "true"
    runs = []
    for name, callbacks in (("watched", [make_callback(framework)]), ("alone", [])):
        own = folder / name
        own.mkdir()
        os.environ["WANDB_DIR"] = str(own)
        record = train(framework, Way(wandb=True), own, callbacks)
        try:
            wandb.finish()
        except OSError as error:
            print(error, file=sys.stderr)
        weights = {key: value.sum(dtype=torch.float64).item() for key, value in record.model.state_dict().items()}
        runs.append({"losses": record.losses, "weights": weights, "readings": record.readings})
    print(json.dumps(runs), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
