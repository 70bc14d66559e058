"""``python -m data_prep recipe=NAME [key=value ...]``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from data_prep.libraries import library
from data_prep.manifest import Manifest
from data_prep.recipe import RECIPES, PreparationRecipe, compose
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.keys import group_lines, key_lines

_USAGE = """\
usage: python -m data_prep recipe=NAME [key=value ...]

Turns text into token ids in Megatron-Core's indexed format (.bin/.idx), with a tokenizer and a manifest.
Run again after an interruption: finished shards are kept.

examples:
  python -m data_prep recipe=quickstart
  python -m data_prep recipe=files input.paths=[/corpus/wiki] output=data/wiki validation_fraction=0.01
  python -m data_prep recipe=files input.paths=['dump/*.jsonl.zst'] tokenizer.path=tokenizer.json output=data/dump
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0 done, 2 the user's input is wrong, 130 interrupted."""
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write("\n".join([_USAGE, *group_lines(RECIPES), "", "keys:", *_keys(), ""]))
        return 0
    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        recipe = compose(arguments)
        library("datatrove")
        from data_prep.prepare import prepare

        manifest = prepare(recipe, console)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{error.filename or 'the output'}: {error.strerror}; finished shards are kept\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on, finished shards are kept\n")
        return 130
    if manifest is None:
        console.print(f"submitted; the last job writes {recipe.output}/manifest.json")
    else:
        _show(recipe, manifest, console)
    return 0


def _keys() -> list[str]:
    return [f"  {line}" for line in key_lines(PreparationRecipe) if not line.startswith("name ")]


def _show(recipe: PreparationRecipe, manifest: Manifest, console: Console) -> None:
    console.print(f"{recipe.output}: {manifest.tokenizer.file} with {manifest.tokenizer.vocab_size:,} entries")
    table = Table()
    for column in ("split", "documents", "tokens", "bytes per token"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, count in manifest.splits.items():
        per_token = count.text_bytes / count.tokens
        table.add_row(name, f"{count.documents:,}", f"{count.tokens:,}", f"{per_token:.2f}")
    console.print(table)
    if manifest.unigram is not None:
        console.print(
            f"unigram loss on validation: {manifest.unigram.validation_cross_entropy:.4f} nats per token "
            f"(its own entropy: {manifest.unigram.validation_entropy:.4f})"
        )
    for reason, dropped in sorted(manifest.dropped.items()):
        console.print(f"dropped: {dropped:,} documents, {reason}", markup=False)
    if manifest.defects:
        console.print(f"left out: {manifest.defects} defective pieces of input, such as", style="yellow")
        for example in manifest.defect_examples:
            console.print(f"  {example}", style="yellow", markup=False)
    if manifest.empty_documents:
        console.print(f"left out: {manifest.empty_documents} empty documents")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
