"""The doctor's findings, verdict and forms of output."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from nemotron3_megatron.platform import doctor
from nemotron3_megatron.platform.doctor import PACKAGES, Diagnosis, Finding, Package, diagnose, examine, render

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    return diagnose()


def finding(name: str, **other: object) -> Finding:
    values = {"version": "1", "state": "ok", "need": "required", "consequence": "", "install": ""} | other
    return Finding(name=name, **values)  # type: ignore[arg-type]


def install_fake(folder: Path, name: str, version: str, code: str) -> None:
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def shown(diagnosis: Diagnosis) -> str:
    out = io.StringIO()
    render(diagnosis, Console(file=out, width=200))
    return out.getvalue()


def test_this_machine_is_ready(here: Diagnosis) -> None:
    assert here.problems == ()
    assert here.exit_status == 0
    assert here.cores >= 1
    assert here.memory_gib > 1
    assert "Ready to train on" in shown(here)


def test_every_core_dependency_is_examined_as_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]}  # type: ignore[index]
    assert names == {package.distribution for package in PACKAGES if package.need == "required"}


def test_every_extra_but_dev_is_examined() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {re.match(r"[\w.-]+", line)[0] for extra in ("cuda", "data", "track") for line in extras[extra]}  # type: ignore[index]
    assert wanted <= {package.distribution for package in PACKAGES}


def test_states_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install_fake(tmp_path, "n3_fine", "2.1.0", "")
    install_fake(tmp_path, "n3_broken", "2.1.0", "raise OSError('libfoo.so: undefined symbol\\nmore')")

    def state(name: str, series: str = "") -> tuple[str, str | None, str, str]:
        found = examine(Package(name, name, "optional", "no foo", "pip install foo", series))
        return found.state, found.version, found.consequence, found.install

    assert state("n3_fine", "2.1.") == ("ok", "2.1.0", "", "")
    assert state("n3_fine", "2.2.") == (
        "untested version", "2.1.0", "this project is tested with 2.2.x", "pip install foo",
    )  # fmt: skip
    assert state("n3_absent") == ("missing", None, "no foo", "pip install foo")
    assert state("n3_broken") == ("broken", "2.1.0", "OSError: libfoo.so: undefined symbol", "pip install foo")


def test_only_required_packages_decide_the_exit_status(here: Diagnosis) -> None:
    optional = dataclasses.replace(here, findings=(finding("a", state="missing", need="optional", install="x"),))
    required = dataclasses.replace(here, findings=(finding("a", state="broken", install="make env"),))
    assert (optional.exit_status, required.exit_status) == (0, 1)
    assert "Not ready: a is broken" in shown(required)
    assert "To get a: make env" in shown(required)


def test_gpu_packages_matter_only_with_a_gpu(here: Diagnosis) -> None:
    lacking = (finding("mamba-ssm", version=None, state="missing", need="cuda", consequence="slow", install="get it"),)
    on_cpu = shown(dataclasses.replace(here, devices=(), findings=lacking))
    on_gpu = shown(dataclasses.replace(here, devices=("NVIDIA H100, 80 GiB, sm_90",), findings=lacking))
    assert "not used on CPU" in on_cpu
    assert "get it" not in on_cpu
    assert "slow" in on_gpu
    assert "To get mamba-ssm: get it" in on_gpu


def test_json_is_the_whole_diagnosis_and_nothing_else(
    here: Diagnosis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: here)
    assert doctor.run_doctor(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exit_status"] == 0
    assert {row["name"] for row in report["findings"]} == {package.distribution for package in PACKAGES}
