"""Which releases the tests run on, and the mark of a test that needs a newer one."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def older(package: str, release: str) -> bool:
    """Whether the installed ``package`` is older than ``release``."""
    return Version(version(package)) < Version(release)


def needs(package: str, release: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(older(package, release), reason=f"needs {package} {release}")


def require(package: str, release: str) -> None:
    """:func:`needs` for a fixture, which takes no marks."""
    if older(package, release):
        pytest.skip(f"needs {package} {release}")


BOTH_PACKAGES = pytest.mark.parametrize(
    # Where both are installed, before 2.6 a Trainer of the second takes no callback of the first.
    "package",
    ["lightning.pytorch", pytest.param("pytorch_lightning", marks=needs("lightning", "2.6"))],
)
