r"""Plugin file for ms-swift, with the ``matent:`` section that :mod:`matent_callbacks.integrations` describes.

``python -m matent_callbacks.integrations.ms_swift`` prints the path of this file. The settings are in the environment
variable ``MATENT``: the section itself, as YAML or JSON, or the path of a YAML file that has it.

```yaml
external_plugins: /path/to/matent_callbacks/integrations/ms_swift.py
callbacks: matent
ENV:
  MATENT: {every_n_steps: 50, layers: all}
```

for ``swift sft train.yaml``, or on the command line

```bash
MATENT=matent.yaml swift sft --callbacks matent \
    --external_plugins "$(python -m matent_callbacks.integrations.ms_swift)" ...
```
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def read_settings(value: str) -> Any:
    """Read what ``MATENT`` holds: a section, or the path of a file with one.

    Raises:
        ValueError: If it is neither, or the section is wrong.
    """
    import yaml  # type: ignore[import-untyped]

    from matent_callbacks.integrations._section import Section

    try:
        settings = yaml.safe_load(value)
        if not isinstance(settings, str):
            return Section(settings)
        return Section.of(yaml.safe_load(Path(settings).read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(
            f"The environment variable MATENT must hold settings or the path of a YAML file, got {value!r}: {error}"
        ) from error


def _register() -> None:
    from swift.callbacks import callbacks_map

    from matent_callbacks.integrations._section import AddedCallbacks

    if "MATENT" not in os.environ:
        raise ValueError(
            "Set the environment variable MATENT to the settings of matent_callbacks, such as "
            "'{every_n_steps: 50, layers: all}', or to the path of a YAML file with a `matent:` section."
        )
    section = read_settings(os.environ["MATENT"])
    section.announce()
    callbacks_map["matent"] = lambda args, trainer: AddedCallbacks(section)


if __name__ == "__main__":
    print(__file__)
else:
    _register()
