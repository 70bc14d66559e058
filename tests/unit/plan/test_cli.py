"""The commands, started as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron3_megatron.cli import VERBS, main

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative run directories, into which the plan draws, are not the checkout's."""
    monkeypatch.chdir(tmp_path)


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_plan_as_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json", "recipe=tiny"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["recipe"], plan["world_size"], plan["tokens_per_step"], plan["steps"]) == ("tiny", 2, 4096, 293)
    assert [layer["kind"] for layer in plan["layers"][:4]] == ["mamba", "moe", "mamba", "attention"]
    ends = 2 * 4096 * 128 + 128  # embedding, output layer and final norm
    assert plan["parameters"]["total"] == ends + sum(layer["parameters"] for layer in plan["layers"])


def test_plan_for_people_shows_origins_and_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=nano_bf16", "parallel.recompute=selective", "parallel.recompute_modules=[moe]"]) == 0
    shown = capsys.readouterr().out
    assert "31,577,940,288" in shown
    assert "command line" in shown
    assert "recipe/nano_bf16.yaml:" in shown
    assert "[moe]" in shown


def test_plan_as_json_has_every_row_of_the_precision_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json", "recipe=super_nvfp4"]) == 0
    plan = json.loads(capsys.readouterr().out)
    rows = plan["precision"]
    # 40 Mamba layers of 2 linears, 8 attention of 2, 40 MoE of 6, and MTP's eh_proj + 2 + 6.
    assert len(rows) == len({row["module"] for row in rows}) == 40 * 2 + 8 * 2 + 40 * 6 + 9
    by_name = {row["module"]: row for row in rows}
    row = by_name["decoder.layers.2.mixer.out_proj"]
    assert (row["layer"], row["role"], row["format"], row["rule"]) == (
        2, "mamba.out_proj", "mxfp8", "role mamba.out_proj",
    )  # fmt: skip
    assert [operand["tensor"] for operand in row["wgrad"]] == ["gradient", "input"]
    assert by_name["mtp.layers.0.eh_proj"]["layer"] is None
    assert sum(share["modules"] for share in plan["precision_shares"]) == len(rows)


def test_plan_draws_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ([], ["--json"]):
        out = tmp_path / f"run{len(flag)}"
        assert main(["plan", *flag, "recipe=tiny_nvfp4", f"run_dir={out}"]) == 0
        captured = capsys.readouterr()
        assert captured.err == f"precision map: {out}/precision_map.png\nmemory chart: {out}/memory.png\n"
        for name in ("precision_map.png", "memory.png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert "precision_map" not in captured.out


def test_plan_of_a_run_directory_elsewhere_is_shown_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=tiny_nvfp4", "run_dir=/proc/cluster"]) == 0
    captured = capsys.readouterr()
    assert "mamba.out_proj" in captured.out
    assert captured.err.startswith("no precision map: /proc/cluster/precision_map.png")


def test_options_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=tiny", "--json", "world_size=4"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["dp"] == 4


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"nemotron3 {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["pln"], ["plan"], ["plan", "recipe=tiny", "parallel.tp=3"], ["doctor", "a=b"]])
def test_user_errors_exit_2_with_a_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert not captured.out


def test_plan_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from nemotron3_megatron.cli import main;"
        f"main(['plan', 'recipe=super_nvfp4', 'run_dir={tmp_path}']);"
        "sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    done = start("-c", code)
    assert done.returncode == 0, done.stderr


def test_train_help_lists_groups_and_keys() -> None:
    done = start("train.py", "--help")
    assert done.returncode == 0
    recipes = "|".join(sorted(path.stem for path in (ROOT / "recipes" / "recipe").glob("*.yaml")))
    for text in (
        f"recipe={recipes}",
        "parallel.tp = 1",
        "stages.NAME.tokens  (duration, required)",
        "precision.rules[N].format  (nvfp4 | mxfp8 | bf16, required)",
        "precision.nvfp4.hadamard = {size: 16, on: wgrad_inputs}  (mapping or null)",
    ):
        assert text in done.stdout


def test_train_shows_a_user_error_once_and_without_a_trace() -> None:
    first = start("train.py", "recipe=tiny", "modle.hidden_size=1", RANK="0", WORLD_SIZE="2")
    assert (first.returncode, "modle" in first.stderr, "Traceback" in first.stderr) == (2, True, False)
    second = start("train.py", "recipe=tiny", "modle.hidden_size=1", RANK="1", WORLD_SIZE="2")
    assert (second.returncode, second.stderr) == (2, "")


def test_train_takes_the_world_from_the_launcher() -> None:
    done = start("train.py", "recipe=tiny", "world_size=4", RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "torchrun --nproc-per-node=4" in done.stderr
