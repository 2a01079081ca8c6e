"""This module skips tests that the oldest allowed versions of other packages fail (`make test-oldest`)."""

from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.version import Version


def skip_before(package: str, first: str, reason: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test if ``package`` is installed in a version before ``first``.

    reason: what these versions do or lack, as a phrase that follows the package's name. If the package is not
    installed, the test is not skipped.
    """
    try:
        found = Version(version(package))
    except PackageNotFoundError:
        return pytest.mark.skipif(False, reason=reason)
    return pytest.mark.skipif(found < Version(first), reason=f"{package} before {first} {reason}")
