"""Tokenizers: round trips, special tokens stay text, and unusable files end in one clear message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.tokenizer import Tokenizer, load_tokenizer

SAMPLES = ["def f(x):\n\treturn x  # é 🙂\r\n", "", " ", "<|endoftext|> and </s> are text", "\x00\x7f", "日本語 عربي"]


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with two special tokens, the EOD not first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<stop>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer=trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def bpe(bpe_file: Path) -> Tokenizer:
    return load_tokenizer(bpe_file)


@pytest.fixture(scope="module")
def tekken() -> Tokenizer:
    pytest.importorskip("mistral_common")
    return load_tokenizer("tekken")


@pytest.mark.parametrize("kind", ["bpe", "tekken"])
def test_round_trip(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.eod not in ids
        assert tokenizer.decode([*ids, tokenizer.eod]) == text
    assert [ids.tolist() for ids in tokenizer.encode_batch(SAMPLES)] == [tokenizer.encode(text) for text in SAMPLES]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_round_trips(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text


def test_tekken_facts(tekken: Tokenizer) -> None:
    assert tekken.vocab_size == 131_072
    assert tekken.eod == 2


@pytest.mark.parametrize("kind", ["bpe", "tekken"])
def test_saved_tokenizer_is_the_same(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = request.getfixturevalue(kind)
    saved = tokenizer.save(tmp_path)
    for place in (saved, tmp_path):
        again = load_tokenizer(place)
        assert (again.eod, again.vocab_size, again.fingerprint) == (
            tokenizer.eod,
            tokenizer.vocab_size,
            tokenizer.fingerprint,
        )


def test_end_of_document(bpe_file: Path, tmp_path: Path) -> None:
    assert load_tokenizer(bpe_file).eod == 1
    assert load_tokenizer(bpe_file, eod="<stop>").eod == 0
    (tmp_path / "tokenizer.json").write_bytes(bpe_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert load_tokenizer(tmp_path).eod == 0


def test_saved_directory_is_a_hugging_face_tokenizer(bpe: Tokenizer, tmp_path: Path) -> None:
    """The independent reader: transformers' own AutoTokenizer."""
    transformers = pytest.importorskip("transformers")
    bpe.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the quick fox", add_special_tokens=False)["input_ids"] == bpe.encode("the quick fox")
    assert theirs.eos_token_id == bpe.eod


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (b"{}", "tokenizer.json", "is not a tokenizer.json"),
        (b"\x00\x01", "tokenizer.json", "is not a tokenizer.json"),
        (b"{}", "tekken.json", "is not a tekken tokenizer"),
        (b"not json", "tekken_1.json", "is not a tekken tokenizer"),
        (None, "tokenizer.json", "does not exist"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes | None, name: str, expected: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_tokenizer(path)


def test_unknown_end_of_document(bpe_file: Path) -> None:
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer(bpe_file, eod="<none>")
    with pytest.raises(UserError, match="has its own"):
        load_tokenizer("tekken", eod="<none>")


def test_directory_without_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data/tokeniser does not exist"):
        load_tokenizer("data/tokeniser")
