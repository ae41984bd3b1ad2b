"""What reaches the reporters of a Hugging Face Trainer."""

from __future__ import annotations

import numpy as np
import pytest

from matent_callbacks.transformers import MatrixEntropyCallback
from tests.loggers.libraries import ALL, PICTURES
from tests.versions import older


@pytest.mark.parametrize("kind", ALL)
def test_numbers_and_pictures_are_stored_under_their_steps(kind, prepare, make_trainer, drawn):
    library = prepare(kind)
    trainer = make_trainer(
        [*library.reporters(), MatrixEntropyCallback(2, layers="all")],
        max_steps=12,
        **library.settings,
        eval_strategy="steps",
        eval_steps=5,
    )
    trainer.train()
    library.finish()
    stored = library.stored()

    keys = [key for key in trainer.state.log_history[1] if key.startswith("matrix_entropy/")]
    assert len(keys) == 4
    for key in keys:
        logged = {record["step"]: record[key] for record in trainer.state.log_history if key in record}
        assert sorted(logged) == [2, 4, 6, 8, 10, 12]
        assert stored.numbers[library.prefix + key] == {step: pytest.approx(v) for step, v in logged.items()}
    evaluated = "eval/matrix_entropy/last" if library.prefix else "eval_matrix_entropy/last"
    at_the_end = [] if older("transformers", "5.0") else [12]
    assert sorted(stored.numbers[evaluated]) == [5, 10, *at_the_end]

    assert sorted(stored.pictures) == PICTURES
    for name in PICTURES:
        # Every reading has its picture until there are five of them, and the end of training has the last.
        assert list(stored.pictures[name]) == [4, 6, 8, 10, 12]
        for seen, pictures in zip(stored.pictures[name].values(), drawn, strict=True):
            np.testing.assert_array_equal(seen, pictures[name])
