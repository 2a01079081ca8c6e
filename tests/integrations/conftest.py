"""What the tests of the integrations share."""

import pytest
from datasets import Dataset


@pytest.fixture(scope="module")
def texts() -> Dataset:
    return Dataset.from_dict({"text": [f"{a} + {b} = {a + b}." for a in range(6) for b in range(4)]})
