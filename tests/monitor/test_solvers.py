"""Decompositions side by side."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os
import torch
from matent_callbacks.monitor import decomposition, solvers
from matent_callbacks.accumulate.layer_statistics import LayerAccumulator
from matent_callbacks.monitor.readings import PendingReadings

torch.manual_seed(0)
torch.set_num_threads(2)
matrix = torch.randn(500, 500)
product, threads = matrix @ matrix, torch.get_num_threads()

def read():
    return PendingReadings(accumulators, ("matrix_entropy", "rankme")).result().values

accumulators = {}
for index in range(5):
    layer = LayerAccumulator(
        frozenset({"pooled", "raw"}), max_tokens=None, dtype=torch.float32, device=torch.device("cpu")
    )
    layer.update(torch.randn(4, 100, 256), None)
    accumulators[f"layer_{index}"] = layer
side_by_side = read()
# On this thread and another one, ...
assert len(solvers._helpers(os.getpid())._threads) == 1
# ... and training computes as before.
assert torch.get_num_threads() == threads
assert torch.equal(matrix @ matrix, product)

# Every item once, in order, whoever works on it; what goes wrong is told once all have stopped.
for number in range(10):
    assert solvers.side_by_side(str, range(number)) == [str(item) for item in range(number)]
seen = []
def divide(item):
    seen.append(torch.get_num_threads())
    return 1 / item
for items in (range(6), range(-1, 6), range(-5, 1)):
    try:
        solvers.side_by_side(divide, items)
    except ZeroDivisionError:
        assert torch.get_num_threads() == threads
    else:
        raise AssertionError(items)
assert set(seen) == {1, 2}

# A process that is forked has no thread of its parent, and must not wait for one.
parents = solvers._helpers(os.getpid()), solvers.background()
child = os.fork()
if child == 0:
    own = solvers._helpers(os.getpid()), solvers.background()
    os._exit(0 if not set(own) & set(parents) else 1)
assert os.waitpid(child, 0)[1] == 0

decomposition.side_by_side = lambda solve, items: [solve(item) for item in items]
for layer, values in read().items():
    for name, value in values.items():
        assert abs(side_by_side[layer][name] - value) < 1e-4 * value
"""


def test_layers_are_decomposed_side_by_side_with_the_same_outcome_and_no_trace():
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120)
