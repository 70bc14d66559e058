"""Generation from a checkpoint on disk: the saved weights, the right next token, errors that say what to do."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.evaluate.generate import complete, continuation, generate_main, read_options
from nemotron3_megatron.evaluate.sampling import Sampling
from nemotron3_megatron.evaluate.trained import Trained, trained

if TYPE_CHECKING:
    Saved = Any  # of conftest.py, which tests cannot import

GREEDY = Sampling(temperature=0)


@pytest.fixture
def model(saved: Saved) -> Iterator[Trained]:
    with trained(saved.checkpoint) as loaded:
        yield loaded


def test_the_loaded_model_is_the_saved_one(model: Trained, saved: Saved) -> None:
    assert model.step == 7
    assert not model.model.training
    with torch.no_grad():
        logits = model.model(torch.tensor([saved.context]), torch.arange(len(saved.context))[None])[0]
    assert torch.equal(logits, saved.logits)
    assert saved.logits.std() > 0.1  # the comparison says something


def test_greedy_continuation_takes_the_most_likely_token_each_time(model: Trained, saved: Saved) -> None:
    prompt = model.tokenizer.decode(saved.context)
    tokens = list(saved.context)
    for _ in range(6):
        logits = model.model(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0, -1]
        token = int(logits[: model.tokenizer.vocab_size].argmax())
        if token == model.tokenizer.eod:
            break
        tokens.append(token)
    assert complete(model, prompt, GREEDY, max_new_tokens=6, seed=0) == model.tokenizer.decode(tokens)[len(prompt) :]


def test_the_seed_decides_the_text(model: Trained) -> None:
    def text(seed: int) -> str:
        return complete(model, "def ", Sampling(temperature=2.0, top_p=1.0), max_new_tokens=8, seed=seed)

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(5)}) > 1


@dataclasses.dataclass
class _Fixed:
    """Stands for a model whose next token is known: the last one plus one."""

    vocabulary: int

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert tokens.shape == positions.shape
        return torch.nn.functional.one_hot((tokens + 1) % self.vocabulary, self.vocabulary).double()


def test_text_ends_with_the_document(model: Trained) -> None:
    vocabulary = model.tokenizer.vocab_size
    counting = dataclasses.replace(model, model=_Fixed(vocabulary))  # type: ignore[arg-type]
    last = model.tokenizer.decode([vocabulary - 1])
    assert model.tokenizer.encode(last) == [vocabulary - 1]
    assert model.tokenizer.eod == 0
    assert complete(counting, last, GREEDY, max_new_tokens=10, seed=0) == ""


def test_tokens_the_tokenizer_does_not_know_are_never_drawn(model: Trained) -> None:
    class Padded:
        """Prefers the last entry of the model's vocabulary, which pads it; then token 65."""

        def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*tokens.shape, model.run.model.vocab_size)
            logits[..., -1], logits[..., 65] = 9.0, 5.0
            return logits

    assert model.run.model.vocab_size > model.tokenizer.vocab_size
    padded = dataclasses.replace(model, model=Padded())  # type: ignore[arg-type]
    assert complete(padded, "def", GREEDY, max_new_tokens=3, seed=0) == model.tokenizer.decode([65]) * 3


def test_a_character_spread_over_tokens_is_decoded_whole(model: Trained) -> None:
    tokens = model.tokenizer.encode("aé")  # é is two bytes, and this tokenizer has seen neither
    assert len(tokens) == 3
    assert continuation(model, tokens, 1) == "é"


def test_the_command_prints_prompt_and_continuation(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_main([f"checkpoint={saved.checkpoint}", "prompt=a = [b]", "max_new_tokens=3", "temperature=0"]) == 0
    assert capsys.readouterr().out.startswith("a = [b]")
    assert not dist.is_initialized()


def test_options_are_typed_and_the_prompt_is_taken_as_it_is() -> None:
    options = read_options(["checkpoint=/c", "prompt=x=1", "temperature=1", "top_p=5e-1", "seed=3"])
    assert options.prompt == "x=1"
    assert (options.temperature, options.top_p, options.seed, options.max_new_tokens) == (1.0, 0.5, 3, 64)
    assert read_options(["checkpoint=/c", "prompt=12"]).prompt == "12"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=x"], "checkpoint"),
        (["checkpoint=c"], "prompt"),
        (["checkpoint=c", "prompt=x", "temprature=1"], "nearest legal: temperature"),
        (["checkpoint=c", "prompt=x", "seed=1.5"], "seed"),
        (["checkpoint=c", "prompt=x", "seed=many"], "seed"),
        (["checkpoint=c", "prompt=x", "prompt=y"], "given twice"),
        (["checkpoint=c", "hello"], "is not key=value"),
    ],
)
def test_wrong_options_are_explained(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_options(words)


def test_wrong_checkpoints_are_explained(saved: Saved, tmp_path: Path) -> None:
    for checkpoint in (saved.checkpoint.parents[1], saved.checkpoint.with_name("step_00000001")):
        with pytest.raises(UserError, match=f"nearest legal: checkpoint={saved.checkpoint}"), trained(checkpoint):
            pass
    alone = tmp_path / "a" / "b" / "step_00000007"
    shutil.copytree(saved.checkpoint, alone)
    with pytest.raises(UserError, match=r"run\.json"), trained(alone):
        pass
    assert not dist.is_initialized()


def test_a_damaged_checkpoint_ends_in_one_clear_error(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved.checkpoint.parents[1], tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / saved.checkpoint.name
    next(damaged.glob("*.distcp")).write_bytes(b"")
    with pytest.raises(UserError, match="not complete"), trained(damaged):
        pass
    assert not dist.is_initialized()


@pytest.mark.parametrize(("prompt", "count", "message"), [("", 4, "prompt"), ("x", 0, "max_new_tokens=0")])
def test_nothing_to_do_is_explained(model: Trained, prompt: str, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        complete(model, prompt, GREEDY, max_new_tokens=count, seed=0)


def test_a_tokenizer_larger_than_the_model_is_refused(saved: Saved, tmp_path: Path) -> None:
    import tokenizers

    words = {f"w{n}": n for n in range(400)} | {"<|endoftext|>": 400}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    with (
        pytest.raises(UserError, match="has 401 entries, the model 320"),
        trained(saved.checkpoint, str(tmp_path / "tokenizer.json")),
    ):
        pass
