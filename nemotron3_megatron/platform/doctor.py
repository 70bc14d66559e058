"""What this machine has, what it lacks, what that costs and how to get it (``nemotron3 doctor``)."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from nemotron3_megatron.platform.base import core_count
from nemotron3_megatron.resilience.native import usable_tool

if TYPE_CHECKING:
    from rich.console import Console

Need = Literal["required", "cuda", "optional"]
"""Always needed; wanted where there is CUDA; wanted for one feature."""

State = Literal["ok", "missing", "broken", "untested version"]
"""Untested version: installed and importable, but of another series than the one this project is tested with."""

_LOCKED = "make env"
_CUDA = "make env-cuda"
_TORCH_SPEC = "the slower pure torch modules are used (model.spec=torch)"
_APEX = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."
)


@dataclass(frozen=True, slots=True)
class Package:
    """A package we use: distribution name, module that proves it works, what it is for, how to install it."""

    distribution: str
    module: str
    need: Need
    without: str
    """What is lost without it."""
    install: str = _LOCKED
    series: str = ""
    """Version prefix we are tested with; another version of a required package is an error."""


PACKAGES = (
    Package("torch", "torch", "required", "nothing runs", series="2.11."),
    Package("megatron-core", "megatron.core", "required", "nothing runs", series="0.19."),
    Package("triton", "triton", "required", "megatron-core cannot be imported"),
    Package("numpy", "numpy", "required", "nothing runs"),
    Package("einops", "einops", "required", "Mamba-2 layers cannot be built"),
    Package("psutil", "psutil", "required", "checkpoints cannot be saved"),
    Package("hydra-core", "hydra", "required", "recipes cannot be read"),
    Package("omegaconf", "omegaconf", "required", "recipes cannot be read"),
    Package("pyyaml", "yaml", "required", "recipes cannot be read"),
    Package("rich", "rich", "required", "nothing can be shown"),
    Package("safetensors", "safetensors", "required", "no exchange of weights with Hugging Face"),
    Package("tokenizers", "tokenizers", "required", "no text can be tokenised"),
    Package("tensorboard", "tensorboard", "required", "no TensorBoard files"),
    Package("matplotlib", "matplotlib", "required", "no loss curves"),
    Package("wandb", "wandb", "optional", "no Weights & Biases; metrics.jsonl and TensorBoard are written anyway"),
    Package("transformers", "transformers", "optional", "no Hugging Face tokenizers, no check of exported models"),
    Package("mistral-common", "mistral_common", "optional", "no tekken tokenizer"),
    Package("pyarrow", "pyarrow", "optional", "no parquet and no .zst input"),
    Package("datatrove", "datatrove", "optional", "no data preparation"),
    Package("warcio", "warcio", "optional", "no WARC input"),
    Package("trafilatura", "trafilatura", "optional", "no text out of HTML in WARC input"),
    Package(
        "transformer-engine",
        "transformer_engine.pytorch",
        "cuda",
        f"{_TORCH_SPEC}; NVFP4 and MXFP8 only emulated",
        _CUDA,
    ),
    Package("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined", "cuda", _TORCH_SPEC, _CUDA),
    Package("causal-conv1d", "causal_conv1d", "cuda", _TORCH_SPEC, _CUDA),
    Package("nvidia-modelopt", "modelopt", "cuda", "no `nemotron3 quantise`", _CUDA),
    Package(
        "nvidia-resiliency-ext",
        "nvidia_resiliency_ext",
        "cuda",
        "slow ranks are told by their steps and a fixed piece of work, not by the times of their kernels",
        _CUDA,
    ),
    Package(
        "apex",
        "fused_weight_gradient_mlp_cuda",
        "cuda",
        "weight gradients are added in a separate kernel (no gradient accumulation fusion)",
        _APEX,
    ),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """The state of one package here."""

    name: str
    version: str | None
    state: State
    need: Need
    consequence: str
    """What is lost, or why the import fails; empty when all is well."""
    install: str
    """Command that puts it right; empty when all is well."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """This machine as training sees it."""

    python: str
    system: str
    cores: int
    memory_gib: float
    free_disk_gib: float
    """Free space where the current directory lies."""
    devices: tuple[str, ...]
    """GPUs with memory and architecture; empty on a CPU machine."""
    cuda: str
    """CUDA version torch was built with and whether it is usable."""
    native_stacks: str
    """What shows the native stacks of a rank that hangs, or why nothing does."""
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Required packages that are not in order."""
        return tuple(f for f in self.findings if f.need == "required" and f.state != "ok")

    @property
    def exit_status(self) -> int:
        """0: training can run here; 1: something required is missing or broken."""
        return 1 if self.problems else 0


def diagnose(packages: tuple[Package, ...] = PACKAGES) -> Diagnosis:
    """Look at this machine; imports every listed package, since an installed one may still not load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        findings = tuple(examine(package) for package in packages)
    devices, cuda = find_devices()
    page = os.sysconf("SC_PAGE_SIZE")
    return Diagnosis(
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=core_count(),
        memory_gib=page * os.sysconf("SC_PHYS_PAGES") / 2**30,
        free_disk_gib=shutil.disk_usage(".").free / 2**30,
        devices=devices,
        cuda=cuda,
        native_stacks=usable_tool(),
        findings=findings,
    )


def examine(package: Package) -> Finding:
    """Whether ``package`` is installed, in a tested version, and can be imported."""

    def finding(version: str | None, state: State, why: str) -> Finding:
        install = "" if state == "ok" else package.install
        return Finding(package.distribution, version, state, package.need, why, install)

    try:
        version: str | None = importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = None
    try:
        importlib.import_module(package.module)
    except Exception as error:  # any failure of third-party start-up code is a finding, not our failure
        if version is None:
            return finding(None, "missing", package.without)
        return finding(version, "broken", f"{type(error).__name__}: {str(error).strip().partition('\n')[0]}")
    if version is not None and not version.startswith(package.series):
        return finding(version, "untested version", f"this project is tested with {package.series}x")
    return finding(version, "ok", "")


def find_devices() -> tuple[tuple[str, ...], str]:
    """The GPUs with memory and architecture, and CUDA's version or why there are none."""
    try:
        import torch
    except (ImportError, OSError):
        return (), "torch is not installed"
    if torch.version.cuda is None:
        return (), "torch was built without CUDA"
    if not torch.cuda.is_available():
        return (), f"torch was built for CUDA {torch.version.cuda}; no GPU or no driver here"
    names = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        names.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return tuple(names), f"CUDA {torch.version.cuda}, {len(names)} GPUs"


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Show ``diagnosis``: the machine, a table of packages, and a verdict."""
    from rich.table import Table
    from rich.text import Text

    for label, value in (
        ("Python", diagnosis.python),
        ("System", diagnosis.system),
        ("Cores", str(diagnosis.cores)),
        ("Memory", f"{diagnosis.memory_gib:.1f} GiB"),
        ("Free disk", f"{diagnosis.free_disk_gib:.1f} GiB"),
        ("Devices", "; ".join(diagnosis.devices) or "CPU only"),
        ("CUDA", diagnosis.cuda),
        ("Stacks", f"of a rank that hangs: {diagnosis.native_stacks}"),
    ):
        console.print(Text.assemble((f"{label:<10}", "bold"), value))

    table = Table("package", "version", "state", "what that means", title_justify="left")
    for finding in diagnosis.findings:
        unused = finding.need == "cuda" and not diagnosis.devices and finding.state == "missing"
        state = "not used on CPU" if unused else finding.state
        style = {"ok": "green", "not used on CPU": "dim"}.get(state, "red" if finding.need == "required" else "yellow")
        meaning = "" if unused else finding.consequence
        table.add_row(finding.name, finding.version or "", Text(state, style), Text(meaning))
    console.print(table)

    wanted = [f for f in diagnosis.findings if f.install and (f.need != "cuda" or diagnosis.devices)]
    for command in dict.fromkeys(finding.install for finding in wanted):
        names = ", ".join(finding.name for finding in wanted if finding.install == command)
        console.print(Text.assemble(f"To get {names}: ", (command, "bold")), soft_wrap=True)
    if diagnosis.problems:
        console.print(Text("Not ready: " + ", ".join(f"{f.name} is {f.state}" for f in diagnosis.problems), "bold red"))
    else:
        console.print(Text(f"Ready to train on {'CUDA' if diagnosis.devices else 'CPU'}.", "bold green"))


def run_doctor(as_json: bool) -> int:
    """Diagnose this machine on stdout, as one JSON object or for reading; returns the exit status."""
    diagnosis = diagnose()
    if as_json:
        report = asdict(diagnosis) | {"exit_status": diagnosis.exit_status}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        from rich.console import Console

        render(diagnosis, Console())
    return diagnosis.exit_status
