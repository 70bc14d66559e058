"""Text to token ids and back, whatever kind of file the tokenizer lies in.

Text is only ever text: a document that spells out ``<|endoftext|>`` does not produce the special token.
Neither tokenizer library is needed to train; they are imported when a tokenizer is loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.words import WordTable, word_pattern

if TYPE_CHECKING:
    import tokenizers

TEKKEN = "tekken"
"""Names the tekken file that ships with mistral-common."""

# What well-known tokenizers call the token that ends a document, tried where the file does not say.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer(Protocol):
    """What generation and data preparation need of a tokenizer."""

    @property
    def eod(self) -> int:
        """Id of the token that ends a document."""

    @property
    def vocab_size(self) -> int:
        """All ids are below it."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the sha256 of what defines the tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of several texts, (tokens,) int64 each."""

    def token_id(self, name: str) -> int | None:
        """Id of a token, special ones included; None: there is none of this name."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens, the EOD among them, are left out."""

    def save(self, directory: Path) -> Path:
        """Write the tokenizer so that ``load_tokenizer`` of the returned file or the directory gives it back."""


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer of the ``tokenizers`` library."""

    tokenizer: tokenizers.Tokenizer
    eod: int

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, eod_name: str | None, place: str) -> HuggingFaceTokenizer:
        """Adopt a tokenizer; ``eod_name`` None: the well-known name it has.

        Raises:
            UserError: it has no such token.
        """
        tokenizer.encode_special_tokens = True  # special tokens spelt out in a text stay text
        tokenizer.no_padding()
        tokenizer.no_truncation()
        names = _END_NAMES if eod_name is None else (eod_name,)
        ids = [token for name in names if (token := tokenizer.token_to_id(name)) is not None]
        if not ids:
            raise UserError(
                f"the tokenizer {place} has no end-of-document token",
                why=f"none of {', '.join(names)} is in its vocabulary",
                nearest="tokenizer.eod=NAME, a token of its vocabulary",
            )
        return cls(tokenizer, ids[0])

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Of the serialised tokenizer and the EOD."""
        return hashlib.sha256(f"{self.eod} {self.tokenizer.to_str()}".encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _words(self) -> WordTable | None:
        pattern = word_pattern(self.tokenizer)
        return None if pattern is None else WordTable(self.tokenizer, pattern, self._encode_whole)

    def _encode_whole(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        # "fast" leaves out the places of the tokens in the text, which nobody here reads
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of several texts, (tokens,) int64 each; keeps the ids of the words it has seen."""
        return self._encode_whole(texts) if self._words is None else self._words.encode(texts)

    def token_id(self, name: str) -> int | None:
        """Id of a token, special ones included; None: there is none of this name."""
        found: int | None = self.tokenizer.token_to_id(name)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def save(self, directory: Path) -> Path:
        """Write ``tokenizer.json`` and the ``tokenizer_config.json`` that names the EOD."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.tokenizer.id_to_token(self.eod)}
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save(str(directory / "tokenizer.json"))
        return directory / "tokenizer.json"


@dataclass(frozen=True)
class TekkenTokenizer:
    """A tekken tokenizer of mistral-common; the EOD is its end-of-sequence token."""

    tokenizer: Any
    path: Path

    @property
    def eod(self) -> int:
        """Id of ``</s>``."""
        return int(self.tokenizer.eos_id)

    @property
    def vocab_size(self) -> int:
        """Special and ordinary tokens."""
        return int(self.tokenizer.n_words)

    @cached_property
    def fingerprint(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token."""
        return list(self.tokenizer.encode(text, bos=False, eos=False))

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of several texts, (tokens,) int64 each."""
        return [np.array(self.encode(text), dtype=np.int64) for text in texts]

    def token_id(self, name: str) -> int | None:
        """Id of a special token; None: there is none of this name."""
        try:
            return int(self.tokenizer.get_special_token(name))
        except ValueError:
            return None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids without special tokens."""
        return str(self.tokenizer.decode(list(ids)))

    def save(self, directory: Path) -> Path:
        """Copy the file as ``tekken.json``."""
        target = directory / "tekken.json"
        target.write_bytes(self.path.read_bytes())
        return target


def load_tokenizer(path: str | Path, eod: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a ``tokenizer.json``, a directory with one or with a Hugging Face tokenizer, a ``tekken*.json``, a
            directory with ``tekken.json``, ``"tekken"`` for the one in mistral-common (131,072 entries), or the id
            of a tokenizer on the Hugging Face hub.
        eod: name of the end-of-document token; None: what the files say. Not for tekken, which has one.

    Raises:
        UserError: nothing usable is there, or a library is missing.
    """
    place = Path(path)
    if place.is_dir():
        present = [place / name for name in ("tokenizer.json", "tekken.json") if (place / name).is_file()]
        place = present[0] if present else place
    if str(path) == TEKKEN or (place.name.startswith(TEKKEN) and place.is_file()):
        if eod is not None:
            raise UserError(f"tokenizer.eod={eod}", why="a tekken tokenizer has its own end-of-document token, </s>")
        return _load_tekken(place if place.is_file() else _bundled_tekken())
    if place.is_file():
        return _load_file(place, eod or _eos_name(place.parent))
    if not place.exists() and not _may_be_hub_id(place):
        raise UserError(f"the tokenizer {path} does not exist", nearest="a tokenizer.json, its directory, or 'tekken'")
    return _load_with_transformers(str(path), eod)


def _may_be_hub_id(path: Path) -> bool:
    """``name`` or ``owner/name``, as opposed to a misspelt path below a directory that exists."""
    if path.suffix == ".json" or path.is_absolute() or len(path.parts) > 2:
        return False
    return len(path.parts) == 1 or not path.parent.is_dir()


def _library(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this tokenizer needs the package {package}",
            why=str(error),
            nearest=f"pip install {package} (part of the extra [data])",
        ) from error


def _bundled_tekken() -> Path:
    """The newest tekken file of 131,072 entries in mistral-common (its files carry their date)."""
    package = _library("mistral_common", "mistral-common")
    files = sorted((Path(package.__file__).parent / "data").glob("tekken_*.json"))
    if not files:
        raise UserError("the installed mistral-common holds no tekken file", nearest="tokenizer.path=FILE")
    return files[-1]


def _load_tekken(path: Path) -> TekkenTokenizer:
    library = _library("mistral_common.tokens.tokenizers.tekken", "mistral-common")
    try:
        return TekkenTokenizer(library.Tekkenizer.from_file(path), path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is not a tekken tokenizer", why=_brief(error)) from error


def _load_file(path: Path, eod: str | None) -> HuggingFaceTokenizer:
    library = _library("tokenizers", "tokenizers")
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for any file it cannot read
        raise UserError(f"{path} is not a tokenizer.json", why=_brief(error)) from error
    return HuggingFaceTokenizer.of(tokenizer, eod, str(path))


def _eos_name(directory: Path) -> str | None:
    """The EOS token that ``tokenizer_config.json`` names."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text()).get("eos_token")
    except ValueError as error:
        raise UserError(f"{path} is not JSON", why=_brief(error)) from error
    return token.get("content") if isinstance(token, dict) else token


def _load_with_transformers(name: str, eod: str | None) -> HuggingFaceTokenizer:
    library = _library("transformers", "transformers")
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"no tokenizer at {name}",
            why=_brief(error),
            nearest="a tokenizer.json, the directory of a Hugging Face tokenizer, or 'tekken'",
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {name} has no fast form", nearest="one with a tokenizer.json")
    return HuggingFaceTokenizer.of(tokenizer.backend_tokenizer, eod or tokenizer.eos_token, name)


def _brief(error: Exception) -> str:
    """The first line of a library's message."""
    return str(error).strip().split("\n")[0][:200]
