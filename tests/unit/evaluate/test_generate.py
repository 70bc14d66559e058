"""Generation from a checkpoint on disk: the saved weights, the right next token, errors that say what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from nemotron3_megatron.checkpoint.huggingface import export_model
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.evaluate.generate import (
    complete,
    continued,
    generate_main,
    read_options,
    rules_of,
    summary,
    token_ids,
)
from nemotron3_megatron.evaluate.generation import Round
from nemotron3_megatron.evaluate.sampling import Sampling
from nemotron3_megatron.evaluate.trained import Trained, trained

if TYPE_CHECKING:
    Saved = Any  # of conftest.py, which tests cannot import

GREEDY = Sampling(temperature=0)


@pytest.fixture
def model(saved: Saved) -> Iterator[Trained]:
    with trained(saved.checkpoint, spec="torch") as loaded:
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


def _says(model: Trained, preferences: dict[int, float]) -> None:
    """Make a model give these tokens these logits, and others none, whatever the context."""
    with torch.no_grad():
        model.model.output_layer.weight.zero_()
        model.model.decoder.final_norm.weight.zero_()  # logits are then 0, and a bias is all that is left

    def biased(module: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, None]) -> tuple[torch.Tensor, None]:
        for token, logit in preferences.items():
            outputs[0][..., token] = logit
        return outputs

    model.model.output_layer.register_forward_hook(biased)


def test_text_ends_with_the_document(model: Trained) -> None:
    assert model.tokenizer.eod == 0
    _says(model, {0: 9.0})
    assert complete(model, "def", GREEDY, max_new_tokens=10, seed=0) == ""


def test_tokens_the_tokenizer_does_not_know_are_never_drawn(model: Trained) -> None:
    assert model.run.model.vocab_size > model.tokenizer.vocab_size
    _says(model, {model.run.model.vocab_size - 1: 9.0, 65: 5.0})  # prefers the last entry, which pads the vocabulary
    assert complete(model, "def", GREEDY, max_new_tokens=3, seed=0) == model.tokenizer.decode([65]) * 3


def test_pieces_of_text_come_with_the_tokens(model: Trained) -> None:
    rules = rules_of(read_options(["checkpoint=c", "prompt=x", "temperature=3", "draft=2", "seed=5"]), model.tokenizer)
    rounds = list(continued(model, "def ", rules, [5, 6]))
    assert len(rounds) > 20
    assert all(len(pieces) == len(each.new) == 2 for each, pieces in rounds)
    for row in (0, 1):
        tokens = [token for each, _ in rounds for token in each.new[row]]
        whole = model.tokenizer.decode(model.tokenizer.encode("def ") + tokens)
        assert "def " + "".join(pieces[row] for _, pieces in rounds) == whole


def test_the_end_of_thinking_is_a_token_by_name_or_id_or_a_text(model: Trained) -> None:
    assert token_ids("</think>", model.tokenizer) == (1,)
    assert token_ids("17", model.tokenizer) == (17,)
    assert token_ids("def add", model.tokenizer) == tuple(model.tokenizer.encode("def add"))
    with pytest.raises(UserError, match="end_think=999"):
        token_ids("999", model.tokenizer)
    words = ["checkpoint=c", "prompt=x", "temperature=0", "max_new_tokens=6", "stop_at_eod=false", "think_budget=2"]
    rules = rules_of(read_options(words), model.tokenizer)
    assert rules.eod is None
    tokens = [token for each, _ in continued(model, "def ", rules, [0]) for token in each.new[0]]
    assert (len(tokens), tokens[2], tokens.count(1)) == (6, 1, 1)


def test_the_summary_counts_tokens_and_accepted_drafts() -> None:
    rounds = [Round(((1,),), 0, (0,)), Round(((2, 3),), 2, (1,)), Round(((4, 5, 6),), 2, (2,))]
    assert summary(rounds[:1], 0.5) == "1 tokens in 0.50 s, 2.0 tokens/s"
    expected = "6 tokens in 3.00 s, 2.0 tokens/s; 2 drafts a pass, acceptance length 2.50 of 3"
    assert summary(rounds, 3.0) == expected


def test_an_exported_model_generates_what_the_checkpoint_does(saved: Saved, tmp_path: Path) -> None:
    with trained(saved.checkpoint) as model:
        text = complete(model, "def ", GREEDY, max_new_tokens=8, seed=0)
    export_model(saved.checkpoint, tmp_path / "hf")
    with trained(tmp_path / "hf", recipe=saved.recipe) as published:
        assert complete(published, "def ", GREEDY, max_new_tokens=8, seed=0) == text
        assert published.tokenizer.fingerprint == model.tokenizer.fingerprint
    with pytest.raises(UserError, match="recipe=NAME"), trained(tmp_path / "hf"):
        pass
    with pytest.raises(UserError, match=r"run\.json describes"), trained(saved.checkpoint, recipe="tiny"):
        pass


def test_the_command_prints_prompt_and_continuation(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    common = [f"checkpoint={saved.checkpoint}", "prompt=a = [b]", "max_new_tokens=3"]
    assert generate_main([*common, "temperature=0"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("a = [b]")
    assert "tokens/s" in printed.err
    assert not dist.is_initialized()
    assert generate_main([*common, "samples=2", "seed=8", "draft=1"]) == 0
    printed = capsys.readouterr()
    assert [printed.out.count(text) for text in ("a = [b]", "seed 8\n", "seed 9\n")] == [2, 1, 1]
    assert "acceptance length" in printed.err


def test_a_file_gets_every_character(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """Tabs are tabs, whatever a terminal would show."""
    common = [f"checkpoint={saved.checkpoint}", "prompt=a\t= [b]\r\n\x0c", "max_new_tokens=1", "temperature=0"]
    assert generate_main(common) == 0
    assert capsys.readouterr().out.startswith("a\t= [b]\r\n\x0c")
    assert generate_main([*common, "samples=2"]) == 0
    assert capsys.readouterr().out.count("a\t= [b]\r\n\x0c") == 2


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
        (["checkpoint=c", "prompt=x", "samples=0"], "samples=0"),
        (["checkpoint=c", "prompt=x", "seed=-1"], "seed=-1"),
        (["checkpoint=c", "prompt=x", "samples=2", f"seed={2**63 - 1}"], "seeds are 0 to"),
        (["checkpoint=c", "prompt=x", "top_p=0"], "top_p=0.0"),  # before a model is read
        (["checkpoint=c", "prompt=x", "end_think=stop"], "think_budget=N"),
        (["checkpoint=c", b"prompt=\xff".decode("utf-8", "surrogateescape")], "prompt .*is not UTF-8"),
        (["checkpoint=c", "prompt=x", "stop_at_eod=perhaps"], "stop_at_eod"),
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
