"""Launcher for LLaMA-Factory, with the ``matent:`` section that :mod:`matent_callbacks.integrations` describes.

``python -m matent_callbacks.integrations.llamafactory train.yaml`` is ``llamafactory-cli train train.yaml`` with the
callbacks of a section in that file; on several GPUs
``torchrun --nproc-per-node 8 -m matent_callbacks.integrations.llamafactory train.yaml``. As there, ``key=value`` on the
command line replaces what the file says, such as ``matent.every_n_steps=10``.

```yaml
model_name_or_path: Qwen/Qwen2.5-0.5B
stage: sft
do_train: true
matent:
  every_n_steps: 50
  layers: all
```
"""

from __future__ import annotations

import sys

from matent_callbacks.integrations._section import NAME, AddedCallbacks, Section


def main() -> None:
    """Train as the YAML file says that is the first argument on the command line."""
    from llamafactory.hparams import read_args
    from llamafactory.train.tuner import run_exp

    config = read_args()
    if not isinstance(config, dict):
        sys.exit(f"Pass a YAML file with a `{NAME}:` section: python -m {__spec__.name} train.yaml")
    try:
        section = Section.of(config)
    except ValueError as error:
        sys.exit(str(error))
    section.announce()
    del config[NAME]
    run_exp(config, callbacks=[AddedCallbacks(section)])


if __name__ == "__main__":
    main()
