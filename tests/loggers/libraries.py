"""The libraries that runs are logged with, each offline in a folder, and what they have stored there."""

from __future__ import annotations

import csv
import functools
import importlib
import io
import json
import re
import sqlite3
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.wandb_history import read_history

PICTURES = ["layers/effective_rank_heatmap", "layers/effective_rank_profile"]


class Stored(NamedTuple):
    """Values and pictures by their key and step, as they are in the files of a library."""

    numbers: dict[str, dict[int, float]]
    pictures: dict[str, dict[int, np.ndarray]]


def pixels(image: str | Path | bytes) -> np.ndarray:
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return np.asarray(opened.convert("RGB"))


class Library:
    """One of them."""

    package: str
    # Of the Hugging Face Trainer.
    settings: ClassVar[dict[str, Any]]
    # Before the keys that the Hugging Face Trainer logs in training.
    prefix = "train/"
    logger: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Everything into the folder, nothing anywhere else."""

    def make_logger(self, package: str) -> Any:
        """Lightning's."""
        return getattr(importlib.import_module(f"{package}.loggers"), self.logger)(**self.arguments())

    def arguments(self) -> dict[str, Any]:
        raise NotImplementedError

    def reporters(self) -> list[Any]:
        """Callbacks for the Hugging Face Trainer, where it has none of its own."""
        return []

    def start_run(self) -> Any:
        """Start a run, for a loop of one's own."""
        raise NotImplementedError

    def finish(self) -> None:
        """Have it written, where the end of training does not."""

    def stored(self) -> Stored:
        raise NotImplementedError


class Wandb(Library):
    package, logger = "wandb", "WandbLogger"
    settings: ClassVar = {"report_to": ["wandb"]}

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import wandb

        wandb.teardown()
        monkeypatch.setenv("WANDB_DIR", str(self.folder))

    def arguments(self) -> dict[str, Any]:
        return {"save_dir": self.folder, "offline": True}

    def finish(self) -> None:
        import wandb

        wandb.finish()
        wandb.teardown()

    def stored(self) -> Stored:
        stored = Stored(defaultdict(dict), defaultdict(dict))
        for row in read_history(self.folder):
            # The Trainer's own count; W&B counts the records.
            step = row.get("train/global_step", row.get("trainer/global_step"))
            for key, value in row.items():
                if key.endswith(("/path", "/filenames")):
                    (path,) = [value] if isinstance(value, str) else value
                    (file,) = self.folder.rglob(Path(path).name)
                    stored.pictures[key.rpartition("/")[0]][step] = pixels(file)
                elif isinstance(value, float):
                    stored.numbers[key][step] = value
        return stored


class TensorBoard(Library):
    package, logger = "tensorboard", "TensorBoardLogger"
    settings: ClassVar = {"report_to": ["tensorboard"]}

    def arguments(self) -> dict[str, Any]:
        return {"save_dir": self.folder}

    def stored(self) -> Stored:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        # The Hugging Face Trainer's are in its own folder, beside this one.
        (file,) = self.folder.parent.rglob("events*")
        events = EventAccumulator(str(file), {"images": 0, "scalars": 0})
        events.Reload()
        tags = events.Tags()
        return Stored(
            {key: {e.step: e.value for e in events.Scalars(key)} for key in tags["scalars"]},
            {key: {e.step: pixels(e.encoded_image_string) for e in events.Images(key)} for key in tags["images"]},
        )


@functools.cache
def _empty_database() -> bytes:
    """MLflow's tables, which it needs seconds to make."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return (Path(folder) / "mlflow.db").read_bytes()


class MLflow(Library):
    package, prefix, logger = "mlflow", "", "MLFlowLogger"
    settings: ClassVar = {"report_to": ["mlflow"]}

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import mlflow

        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "text")
        (self.folder / "mlflow.db").write_bytes(_empty_database())
        mlflow.set_tracking_uri(self.uri)
        mlflow.create_experiment("text", artifact_location=(self.folder / "artifacts").as_uri())

    def arguments(self) -> dict[str, Any]:
        return {"experiment_name": "text", "tracking_uri": self.uri}

    def finish(self) -> None:
        import mlflow

        mlflow.set_tracking_uri(None)

    def stored(self) -> Stored:
        import mlflow

        client = mlflow.MlflowClient(self.uri)
        (run,) = client.search_runs([client.get_experiment_by_name("text").experiment_id])
        assert run.info.status == "FINISHED"
        history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        pictures: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
        for path in (self.folder / "artifacts" / run.info.run_id / "artifacts" / "images").glob("*.png"):
            # Name and step are in that of the file; how they are set apart in it has changed.
            name, step = re.fullmatch(r"(.+?)[+%]step[+%](\d+)[+%].+", path.name).groups()
            pictures[re.sub("[~#]", "/", name)][int(step)] = pixels(path)
        in_order = {name: dict(sorted(steps.items())) for name, steps in pictures.items()}
        return Stored({key: {m.step: m.value for m in values} for key, values in history.items()}, in_order)


class Comet(Library):
    package, logger = "comet_ml", "CometLogger"
    settings: ClassVar = {"report_to": ["comet_ml"]}

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COMET_START_ONLINE", "0")
        # These it would ask the clouds and the network for.
        monkeypatch.setenv("COMET_AUTO_LOG_ENV_DETAILS", "0")
        monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(self.folder))

    def arguments(self) -> dict[str, Any]:
        # Offline by the environment: Lightning turns an experiment off altogether that is made with `online=False`.
        return {"save_dir": str(self.folder)}

    def finish(self) -> None:
        import comet_ml

        experiment = comet_ml.get_running_experiment()
        if experiment is not None:
            experiment.end()

    def stored(self) -> Stored:
        stored = Stored(defaultdict(dict), defaultdict(dict))
        (path,) = self.folder.rglob("*.zip")
        with zipfile.ZipFile(path) as archive:
            for line in archive.read("messages.json").splitlines():
                message = json.loads(line)
                payload = message["payload"]
                if message["type"] == "metric_msg":
                    metric = payload["metric"]
                    stored.numbers[metric["metricName"]][metric["step"]] = metric["metricValue"]
                elif payload.get("upload_type") == "visualization":
                    told = payload["additional_params"]
                    stored.pictures[told["figName"]][told["step"]] = pixels(archive.read(payload["file_path"]))
        return stored


class Trackio(Library):
    package = "trackio"
    # Older versions of transformers would have it on the web.
    settings: ClassVar = {"report_to": ["trackio"], "trackio_space_id": None}

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Where it writes is settled when it is imported.
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setenv("TRACKIO_DIR", str(self.folder))

    def start_run(self) -> Any:
        import trackio

        return trackio.init(project="text", embed=False)

    def finish(self) -> None:
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            trackio.finish()

    def stored(self) -> Stored:
        stored = Stored(defaultdict(dict), defaultdict(dict))
        (path,) = self.folder.glob("*.db")
        with sqlite3.connect(path) as connection:
            rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
        connection.close()
        for own_step, metrics in rows:
            row = json.loads(metrics)
            # The Trainer's own count, where it logs; Trackio counts the records.
            step = row.get("train/global_step", own_step)
            for key, value in row.items():
                if isinstance(value, dict):
                    stored.pictures[key][step] = pixels(self.folder / "media" / value["file_path"])
                elif isinstance(value, float):
                    stored.numbers[key][step] = value
        return stored


class SwanLab(Library):
    package = "swanlab"
    logger = "SwanLabLogger"
    settings: ClassVar = {"report_to": "none"}

    def reporters(self) -> list[Any]:
        return [importlib.import_module("swanlab.integration.transformers").SwanLabCallback()]

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SWANLAB_MODE", "offline")
        monkeypatch.setenv("SWANLAB_LOG_DIR", str(self.folder))

    def make_logger(self, package: str) -> Any:
        # From SwanLab itself, for both packages.
        return importlib.import_module("swanlab.integration.pytorch_lightning").SwanLabLogger()

    def start_run(self) -> Any:
        import swanlab

        return swanlab.init(project="text")

    def finish(self) -> None:
        import swanlab

        if swanlab.has_run():
            swanlab.finish()

    def stored(self) -> Stored:
        from swanlab.proto.swanlab.record.v1.record_pb2 import Record
        from swanlab.sdk.internal.core_python.store import DataStoreReader

        stored = Stored(defaultdict(dict), defaultdict(dict))
        (path,) = self.folder.rglob("*.swanlab")
        reader = DataStoreReader()
        reader.open(path)
        for record in map(Record.FromString, reader):
            if record.HasField("scalar"):
                stored.numbers[record.scalar.key][record.scalar.step] = record.scalar.value.number
            elif record.HasField("media"):
                (item,) = record.media.value.items
                (file,) = self.folder.glob(f"*/media/image/{item.filename}")
                stored.pictures[record.media.key][record.media.step] = pixels(file)
        reader.close()
        return stored


class SwanLabByTransformers(SwanLab):
    logger = None
    settings: ClassVar = {"report_to": ["swanlab"]}

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().prepare(monkeypatch)
        # It looks for a run before it starts one, which is an error in newer versions of SwanLab.
        self.start_run()

    def reporters(self) -> list[Any]:
        return []


ALL: tuple[type[Library], ...] = (Wandb, TensorBoard, MLflow, Comet, Trackio, SwanLab, SwanLabByTransformers)


def in_csv(folder: Path, key: str) -> dict[int, float]:
    """What Lightning's `CSVLogger` has stored of a key."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}
