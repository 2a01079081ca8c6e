"""What the oldest versions that the package allows (`make test-oldest`) do otherwise than later ones."""

from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.version import Version


def skip_before(package: str, first: str, reason: str) -> pytest.MarkDecorator:
    """Skip where ``package`` is installed in a version before ``first``, the one that does not do what ``reason``
    says.
    """
    try:
        found = Version(version(package))
    except PackageNotFoundError:
        return pytest.mark.skipif(False, reason=reason)
    return pytest.mark.skipif(found < Version(first), reason=f"{package} before {first} {reason}")
