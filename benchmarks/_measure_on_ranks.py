"""Runs ``matent measure`` once, alone or under torchrun, and prints how long it took, imports left out."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time

from transformers import AutoModel, AutoTokenizer

from matent_callbacks.cli import _measure_models
from matent_callbacks.cli._app import run

IMPORTED = (AutoModel, AutoTokenizer, _measure_models)


def main() -> None:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = run(["measure", *sys.argv[1:]])
    if os.environ.get("RANK", "0") == "0":
        print(time.perf_counter() - start)
    sys.exit(code)


if __name__ == "__main__":
    main()
