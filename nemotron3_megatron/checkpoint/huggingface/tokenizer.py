"""The tokenizer of a run beside the exported model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nemotron3_megatron.checkpoint.huggingface.config import PUBLISHED_TOKENS
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer

NO_TOKENIZER = "none"
"""In place of a path: export without one."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def load(path: str | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer that will be exported; None: there is to be none.

    Raises:
        UserError: there is no usable one at ``path``, or it has more entries than the model.
    """
    if path is None or path == NO_TOKENIZER:
        return None
    try:
        found = load_tokenizer(path)
    except UserError as error:
        nearest = f"tokenizer=PATH, or tokenizer={NO_TOKENIZER} to export without"
        raise UserError(error.what, where=error.where, why=error.why, nearest=nearest) from error
    if found.vocab_size > vocab_size:
        why = f"has {found.vocab_size:,} entries, the model {vocab_size:,}"
        raise UserError(f"the tokenizer {path}", why=why, nearest="tokenizer=PATH of the one that made the data")
    return found


def special_tokens(tokenizer: Tokenizer | None, path: str | None) -> dict[str, int | None]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``; the published ones where there is no tokenizer.

    The end of text is what ended documents in training. The others are what ``tokenizer_config.json`` beside the
    tokenizer names; a tokenizer without such a file has none.
    """
    if tokenizer is None:
        return dict(PUBLISHED_TOKENS)
    names = _config(path)

    def named(key: str) -> int | None:
        token = names.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str) or not isinstance(tokenizer, HuggingFaceTokenizer):
            return None
        found: int | None = tokenizer.tokenizer.token_to_id(token)
        return found

    return {
        "bos_token_id": named("bos_token"),
        "eos_token_id": tokenizer.eod,
        "pad_token_id": named("pad_token"),
    }


def save(tokenizer: Tokenizer, path: str, directory: Path) -> None:
    """Copy a Hugging Face tokenizer's files as they are; write others in their own format."""
    source = _directory(path)
    if (source / "tokenizer.json").is_file() and (source / "tokenizer_config.json").is_file():
        for name in _FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
    else:
        tokenizer.save(directory)


def _config(path: str | None) -> dict[str, Any]:
    file = _directory(path) / "tokenizer_config.json" if path else None
    if file is None or not file.is_file():
        return {}
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _directory(path: str) -> Path:
    place = Path(path)
    return place if place.is_dir() else place.parent
