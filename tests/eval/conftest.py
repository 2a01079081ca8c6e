"""What the tests of the evaluation share."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer


@pytest.fixture
def model(llama_path, tmp_path) -> Path:
    """A tiny model whose files a test may overwrite, with room for the prompts and a padded vocabulary: 64 rows, of
    which its tokenizer uses fewer.
    """
    folder = shutil.copytree(llama_path, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    assert len(AutoTokenizer.from_pretrained(folder)) < 64
    return folder
