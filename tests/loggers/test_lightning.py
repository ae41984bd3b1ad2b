"""What reaches the loggers of Lightning."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from matent_callbacks.lightning import MatrixEntropyCallback
from tests.loggers.libraries import ALL, PICTURES, in_csv
from tests.versions import BOTH_PACKAGES


@BOTH_PACKAGES
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind.logger])
def test_numbers_and_pictures_are_stored_under_their_steps(kind, package, prepare, fit, drawn, tmp_path):
    library = prepare(kind)
    others = importlib.import_module(f"{package}.loggers").CSVLogger(tmp_path / "csv")
    fit(package, [others, library.make_logger(package)], [MatrixEntropyCallback(1, layers="all")])
    library.finish()
    stored = library.stored()

    for layer in ("layer_00", "layer_01", "layer_02", "last"):
        logged = in_csv(tmp_path / "csv", f"matrix_entropy/{layer}")
        # Lightning counts from 0.
        assert sorted(logged) == list(range(8))
        assert stored.numbers[f"matrix_entropy/{layer}"] == {step: pytest.approx(v) for step, v in logged.items()}

    assert sorted(stored.pictures) == PICTURES
    for name in PICTURES:
        # Ever more rarely, and at the end of training, where Lightning's count is one further.
        assert list(stored.pictures[name]) == [1, 2, 3, 4, 6, 8]
        for seen, pictures in zip(stored.pictures[name].values(), drawn, strict=True):
            np.testing.assert_array_equal(seen, pictures[name])
