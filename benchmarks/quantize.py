"""How fast the Triton kernels quantise: share of this GPU's copy bandwidth, and time over the eager torch reference and
Transformer Engine's own Python reference.

    python benchmarks/quantize.py [--repeats 30] [--json]

Counted are the bytes that cannot be avoided: NVFP4 reads its source twice (the amax has to be known first), MXFP8 once,
and each direction is written once, all in BF16. A later pass may find part of the source in the L2 cache, so that more
than 100 % is possible. Times are medians, between CUDA events, of a device that is kept busy while the host launches;
the L2 cache is filled with other data before each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nemotron3_megatron.precision.emulation import reference
from nemotron3_megatron.precision.emulation.read import read
from nemotron3_megatron.precision.operands import Operand

COPIED_BYTES = 2**28
L2_BYTES = 2**27
"""More than the L2 cache of any GPU so far (an H100's has 50 MB)."""
BUSY_CYCLES = 2_000_000
"""About a millisecond: longer than launching takes."""

ROWS = Operand(tensor="input", format="nvfp4", block=(1, 16))
ROTATED = replace(ROWS, hadamard=16)
SQUARE = Operand(tensor="weight", format="nvfp4", block=(16, 16))
GRADIENT = Operand(tensor="gradient", format="nvfp4", block=(1, 16), rounding="stochastic")
MXFP8 = Operand(tensor="input", format="mxfp8", block=(1, 32))


@dataclass(frozen=True, slots=True)
class Case:
    """A source and how it is read."""

    name: str
    shape: tuple[int, int]
    rows: Operand
    columns: Operand | None
    experts: int = 1

    @property
    def bytes_moved(self) -> int:
        """Of reads and writes in BF16 that cannot be avoided."""
        passes = (2 if self.rows.format == "nvfp4" else 1) + (1 if self.columns is None else 2)
        return passes * 2 * self.shape[0] * self.shape[1]


def cases() -> list[Case]:
    """Activations, gradients and weights of Nano (hidden 2688, Mamba in_proj 10304) and Super (hidden 4096)."""
    found = []
    for shape in ((8192, 2688), (8192, 4096), (16384, 8192)):
        size = f"{shape[0]}x{shape[1]}"
        found += [
            Case(f"nvfp4 activation {size}", shape, ROWS, ROTATED),
            Case(f"nvfp4 gradient {size}", shape, GRADIENT, replace(GRADIENT, hadamard=16)),
            Case(f"mxfp8 activation {size}", shape, MXFP8, MXFP8),
        ]
    grouped = (49152, 2688)  # 8192 tokens, 6 experts each
    return [
        *found,
        Case("nvfp4 weight 2688x10304", (2688, 10304), SQUARE, None),
        Case("nvfp4 activation, 16 uneven experts", grouped, ROWS, ROTATED, experts=16),
        Case("nvfp4 gradient, 16 uneven experts", grouped, GRADIENT, replace(GRADIENT, hadamard=16), experts=16),
    ]


def main() -> None:
    """Time all cases and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    options = parser.parse_args()
    bandwidth = copy_bandwidth(options.repeats)
    results = [measure(case, bandwidth, options.repeats) for case in cases()]
    if options.json:
        device = torch.cuda.get_device_name()
        print(json.dumps({"device": device, "copy_bytes_per_s": bandwidth, "cases": results}, indent=2))
    else:
        show(bandwidth, results)


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written a second by a large device copy."""
    source = torch.randint(0, 255, (COPIED_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / seconds(lambda: target.copy_(source), repeats)


def measure(case: Case, bandwidth: float, repeats: int) -> dict[str, float | str | None]:
    """Times of a case in seconds, the share of the bandwidth, and how many times slower the references are."""
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(case.shape, generator=generator, device="cuda").bfloat16()
    offsets = uneven(case.shape[0], case.experts) if case.experts > 1 else None

    def timed(implementation: Callable[..., object], repeats: int) -> float:
        call = partial(implementation, x, case.rows, case.columns, offsets=offsets, generator=generator)
        return seconds(call, repeats)

    fused, eager = timed(read, repeats), timed(reference.read, max(2, repeats // 10))
    peer = transformer_engine(case)
    peer_seconds = None if peer is None else seconds(lambda: peer(x), max(2, repeats // 10))
    return {
        "case": case.name,
        "seconds": fused,
        "share_of_copy_bandwidth": case.bytes_moved / fused / bandwidth,
        "eager_ratio": eager / fused,
        "transformer_engine_ratio": None if peer_seconds is None else peer_seconds / fused,
    }


def uneven(tokens: int, experts: int) -> Tensor:
    """Offsets of experts whose shares of the tokens grow from 1 to ``experts``, in multiples of 32."""
    shares = torch.arange(1, experts + 1).cumsum(0)
    ends = (shares * tokens // shares[-1]) // 32 * 32
    return torch.cat([torch.zeros(1), ends]).int().cuda()


def transformer_engine(case: Case) -> Callable[[Tensor], object] | None:
    """TE's Python reference of a dense case, which rounds to nearest only; None where TE or such a case is absent."""
    try:
        from transformer_engine.pytorch.custom_recipes.reference_nvfp4 import NVFP4QuantizerRef
        from transformer_engine.pytorch.custom_recipes.reference_utils import Fp4Formats
    except ImportError:
        return None
    if case.rows.format != "nvfp4" or case.rows.rounding != "nearest" or case.experts > 1:
        return None
    assert case.rows.block is not None
    quantizer = NVFP4QuantizerRef(
        Fp4Formats.E2M1,
        columnwise=case.columns is not None,
        quant_tile_shape=case.rows.block,
        with_rht=case.columns is not None,
    )
    return lambda x: quantizer.quantize(x)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of ``call`` on the device, the first three left out."""
    other = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Reading leaves nothing that would have to be written back during the measurement.
        other.view(torch.int64).max()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def show(bandwidth: float, results: list[dict[str, float | str | None]]) -> None:
    """A table of all cases."""
    table = Table(title=f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, read and written")
    for column in ("case", "us", "share of copy", "eager torch", "TE's reference"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in results:
        te = row["transformer_engine_ratio"]
        table.add_row(
            str(row["case"]),
            f"{float(row['seconds'] or 0) * 1e6:.0f}",
            f"{float(row['share_of_copy_bandwidth'] or 0):.0%}",
            f"{float(row['eager_ratio'] or 0):.0f}x",
            "" if te is None else f"{float(te):.0f}x",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
