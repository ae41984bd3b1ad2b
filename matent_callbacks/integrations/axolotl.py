"""Plugin for axolotl, with the ``matent:`` section that :mod:`matent_callbacks.integrations` describes.

```yaml
plugins:
  - matent_callbacks.integrations.axolotl.MatentPlugin
matent:
  every_n_steps: 50
  layers: all
```

Then ``axolotl train config.yaml`` as usual. Axolotl only logs a plugin that cannot be imported, and trains without it;
this one prints a line with its callbacks when the file is read.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator
from transformers import TrainerCallback

from matent_callbacks.integrations._section import Section


class MatentArgs(BaseModel):
    """The ``matent:`` section among the settings of axolotl."""

    matent: dict[str, Any]

    @field_validator("matent", mode="before")
    @classmethod
    def _checked(cls, settings: Any) -> Any:
        # Without None, which axolotl leaves out of what it has checked.
        return Section(settings).settings


class MatentPlugin(BasePlugin):
    """Adds the callbacks that the ``matent:`` section asks for to axolotl's Trainer."""

    def register(self, cfg: Any) -> None:
        """Check the section, and say what it asks for."""
        Section.of(cfg).announce()

    def get_input_args(self) -> str:
        """Return where the model of the section is."""
        return f"{__name__}.{MatentArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """Make the callbacks."""
        return Section.of(cfg).callbacks(trainer.processing_class)
