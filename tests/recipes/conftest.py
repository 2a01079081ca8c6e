"""What the tests of the recipes share: documents, a tokenizer of them, and a machine of known speed."""

import json
from pathlib import Path

import pytest
from documents import TEXTS, VOCABULARY

from recipes.corpus import CorpusArguments, train_tokenizer


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "url": "not used"}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXTS, VOCABULARY)


@pytest.fixture
def corpus(corpus_file):
    """corpus(**options): arguments for the file above, in rows of 16 tokens from blocks of 7 documents."""
    small = dict(
        dataset_name=str(corpus_file), vocab_size=VOCABULARY, max_length=16, shuffle_documents=7, eval_tokens=100
    )
    return lambda **options: CorpusArguments(**(small | options))


@pytest.fixture
def without_units(monkeypatch):
    """A machine that multiplies float32 faster, whichever this one is."""
    monkeypatch.setattr("recipes.precision.fast_dtype", lambda device: ("float32", "for the test"))
