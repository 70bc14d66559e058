"""One node of a segment: torchrun in this process, and the exit codes that it would hide.

``python -m nemotron3_megatron.launch.node RUN NPROC [--numa-binding=node] -- train.py key=value ...`` runs once a node
under srun. It exits with the status of the first rank that ended otherwise than with 0.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nemotron3_megatron.launch import jit_cache
from nemotron3_megatron.launch.exit_record import DIRECTORY, leave_record
from nemotron3_megatron.launch.outcome import DONE, START_AGAIN, RankEnd, exits_directory, read_outcome, write_node
from nemotron3_megatron.launch.segments import begin

_FAILURE = 1


def main(arguments: Sequence[str]) -> int:
    """Run this node's ranks; returns the status for srun."""
    split = list(arguments).index("--")
    run_dir, processes, *options = arguments[:split]
    segment, node = os.environ["NEMOTRON3_SEGMENT"], int(os.environ.get("SLURM_NODEID", "0"))
    exits = exits_directory(Path(run_dir), segment)
    exits.mkdir(parents=True, exist_ok=True)
    os.environ[DIRECTORY] = str(exits)
    # Slurm sets it from the first requeue on, and knows nothing of restarts in the same job.
    os.environ["SLURM_RESTART_COUNT"] = segment.partition(".")[2]
    if node == 0:
        begin(Path(run_dir), segment, nodes=_nodes())
    cache = jit_cache.fill(Path(run_dir), os.environ.get("NEMOTRON3_JIT_CACHE"))
    try:
        torchrun = [*_torchrun(node, int(processes)), *options, *arguments[split + 1 :]]
        code = _run_ranks(Path(run_dir), segment, node * int(processes), torchrun)
        if cache is not None and node == 0 and code in (DONE, START_AGAIN):
            jit_cache.keep(Path(run_dir), cache)
        return code
    finally:
        jit_cache.discard(cache)


def _nodes() -> int:
    return int(os.environ.get("SLURM_NNODES", "1"))


def _torchrun(node: int, processes: int) -> list[str]:
    # Static rendezvous: node ranks are Slurm's, so rank 0 is on the first node.
    return [
        f"--nnodes={_nodes()}",
        f"--node-rank={node}",
        f"--nproc-per-node={processes}",
        f"--master-addr={os.environ['MASTER_ADDR']}",
        f"--master-port={os.environ['MASTER_PORT']}",
    ]


def _run_ranks(run_dir: Path, segment: str, first_rank: int, arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        ends = [RankEnd(rank, end.exitcode, end.timestamp) for rank, end in error.failures.items()]
        write_node(exits_directory(run_dir, segment), int(os.environ.get("SLURM_NODEID", "0")), ends)
        code = read_outcome(run_dir, segment, _FAILURE).code
        return code if code > 0 else _FAILURE
    except RuntimeError as error:  # torchrun's own: a port that is taken, a node that does not answer
        leave_record(_FAILURE, error, os.environ | {"RANK": str(first_rank)})
        raise
    except SignalException as error:
        return 128 + int(error.sigval)
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
