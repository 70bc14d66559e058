"""What else is in an exported directory, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from saved_models import EVERY_KIND, Save, Saved
from transformers import AutoTokenizer, GenerationConfig

from nemotron3_megatron.checkpoint.huggingface import export_model
from nemotron3_megatron.cli import main
from nemotron3_megatron.config.errors import UserError

TEXT = "def add(first, second):\n    return first + second\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A small byte-level tokenizer whose files name its special tokens."""
    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "<|endoftext|>"]
    trained.train_from_iterator([TEXT] * 3, vocab_size=280, special_tokens=special, show_progress=False)
    place = tmp_path / "tokenizer"
    place.mkdir()
    trained.save(str(place / "tokenizer.json"))
    names = {
        "eos_token": "<|endoftext|>",
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "pad_token": "<pad>",
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}", **names}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    return place


def test_tokenizer_and_generation_config(save: Save, tokenizer: Path, tmp_path: Path) -> None:
    saved = save(*EVERY_KIND, "model.vocab_size=288", f"data.tokenizer={tokenizer / 'tokenizer.json'}")
    out = export_model(saved.path, tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(out)
    expected = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert loaded(TEXT)["input_ids"] == expected.encode(TEXT).ids
    assert (loaded.eos_token_id, loaded.chat_template) == (2, "{{ messages }}")
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (0, 1, 2)
    config = json.loads((out / "config.json").read_text())
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 1, 2)


def test_tokenizer_file_alone(every_kind: Saved, tokenizer: Path, tmp_path: Path) -> None:
    """What nothing says, is not made up."""
    (tokenizer / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="has 280 entries, the model 96"):
        export_model(every_kind.path, tmp_path / "hf", tokenizer=str(tokenizer / "tokenizer.json"))
    with pytest.raises(UserError, match=r"(?s)does not exist.*tokenizer=none"):
        export_model(every_kind.path, tmp_path / "hf", tokenizer=str(tokenizer / "missing.json"))
    assert not (tmp_path / "hf").exists()


def test_without_a_tokenizer_there_is_a_warning(
    every_kind: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = export_model(every_kind.path, tmp_path / "hf")
    assert "without a tokenizer" in caplog.text
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]


def test_nothing_is_written_over(every_kind: Saved, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    export_model(every_kind.path, tmp_path / "hf")  # empty: fine
    before = {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with pytest.raises(UserError, match="not an empty directory"):
        export_model(every_kind.path, tmp_path / "hf")
    assert {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before


def test_damage_is_found_before_anything_appears(every_kind: Saved, tmp_path: Path) -> None:
    copy = tmp_path / "run" / "checkpoints" / "step_00000007"
    shutil.copytree(every_kind.path, copy)
    with pytest.raises(UserError, match=r"holds no run\.json"):
        export_model(copy, tmp_path / "hf")
    shutil.copyfile(every_kind.path.parents[1] / "run.json", copy.parents[1] / "run.json")
    export_model(copy, tmp_path / "whole")
    shard = next(copy.glob("__0_*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        export_model(copy, tmp_path / "hf")
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match="bytes"):
        export_model(copy, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_a_checkpoint_of_another_model(every_kind: Saved, save: Save, tmp_path: Path) -> None:
    other = save(*EVERY_KIND, "precision=bf16", "model.moe_latent_size=48")
    shutil.copyfile(other.path.parents[1] / "run.json", tmp_path / "run.json")
    copy = tmp_path / "checkpoints" / "step_00000007"
    shutil.copytree(every_kind.path, copy)
    with pytest.raises(
        UserError, match=r"(?s)not of the model in its run.json.*fc1_latent_proj.weight +32 x 64 +48 x 64"
    ):
        export_model(copy, tmp_path / "hf")


def test_verbs(every_kind: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, back = tmp_path / "hf", tmp_path / "back"
    assert main(["export", f"checkpoint={every_kind.path}", f"out={hf}", "shard_gb=0.0001"]) == 0
    assert capsys.readouterr().out == f"{hf}\n"
    assert main(["import", f"hf={hf}", "recipe=tiny", f"out={back}", *EVERY_KIND, "precision=bf16"]) == 0
    assert capsys.readouterr().out == f"{back}\n"
    assert main(["export", f"checkpoint={back}", f"out={tmp_path / 'again'}"]) == 0
    assert len(list(hf.glob("model-*"))) > 1
    for arguments, message in (
        (["export", f"checkpoint={every_kind.path}"], "out"),
        (["export", f"checkpoint={every_kind.path.parents[1]}", "out=x"], f"checkpoint={every_kind.path}"),
        (["export", f"checkpoint={every_kind.path.parent}", "out=x"], f"checkpoint={every_kind.path}"),
        (["export", "checkpoint=nowhere", "out=x"], "there is no such directory"),
        (["export", f"checkpoint={every_kind.path}", "out=x", "shard_gb=none"], "not a positive number"),
        (["export", f"checkpoint={every_kind.path}", "out=x", "format=quantised"], "quantises nothing"),
        (["export", f"checkpoint={every_kind.path}", "out=x", "out=y"], "given twice"),
        (["import", f"hf={hf}", "recipe=tony", "out=x"], "tiny"),
        (["import", f"hf={hf}", "recipe=tiny", "out=x", "model.hiden_size=64"], "hidden_size"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err, arguments
    assert not Path("x").exists()
