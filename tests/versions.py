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
