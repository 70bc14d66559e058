"""Training a byte-level BPE on the training split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

from datatrove.data import Document

from data_prep.filters import filter_state, filters
from data_prep.inputs import FileRecord, InputFile
from data_prep.readers import Keys
from data_prep.recipe import PreparationRecipe
from data_prep.splits import Losses, documents, side
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.tokenizer import HuggingFaceTokenizer

END_OF_TEXT = "<|endoftext|>"


def train_bpe(
    recipe: PreparationRecipe, files: Sequence[InputFile], advance: Callable[[int], None]
) -> HuggingFaceTokenizer:
    """Train on at most ``tokenizer.train_bytes`` of the training split; the end of document has id 0.

    Args:
        advance: called with the bytes of text read since the last call.

    Raises:
        UserError: the text cannot be read, or is too little for the vocabulary.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    config = recipe.tokenizer
    eod = config.eod or END_OF_TEXT
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[eod],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(recipe, files, advance), trainer=trainer)
    if (trained := tokenizer.get_vocab_size()) < config.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={config.vocab_size}",
            why="there is too little text to fill it",
            nearest=f"tokenizer.vocab_size={trained}",
        )
    return HuggingFaceTokenizer.of(tokenizer, eod, "just trained")


def training_fingerprint(recipe: PreparationRecipe, files: Sequence[InputFile]) -> str:
    """Changes with everything that the trained tokenizer depends on."""
    parts = [asdict(recipe.tokenizer), filter_state(recipe.filters)]
    settings = [*parts, recipe.validation_fraction, recipe.validation_by, recipe.input.text_field, recipe.on_error]
    inputs = [(record.name, record.sha256) for record in map(FileRecord.of, files)]
    return hashlib.sha256(json.dumps([settings, inputs]).encode()).hexdigest()[:16]


def _training_text(
    recipe: PreparationRecipe, files: Sequence[InputFile], advance: Callable[[int], None]
) -> Iterator[str]:
    """Texts of the training split that pass the filters, from files in an order that does not follow their names."""
    left = recipe.tokenizer.train_bytes
    texts: Iterable[Document] = _all(recipe, files)
    for step in filters(recipe.filters):
        texts = step(texts)
    for document in texts:
        if side(document, recipe) == "train":
            yield document.text
            size = len(document.text.encode())
            advance(size)
            left -= size
            if left <= 0:
                return


def _all(recipe: PreparationRecipe, files: Sequence[InputFile]) -> Iterator[Document]:
    for file in sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest()):
        # Losses are counted where tokens are made, which reads the same files again.
        for document in documents(file, Keys(recipe.input.text_field), recipe.on_error, Losses()):
            yield Document(document.text, document.where, metadata={"file": file.name})
