"""The processes of a run: how they were started, their devices, and what they agree on.

torchrun's variables are what counts, on one node or several. Where Slurm's `srun` started the processes itself, its
variables are translated into those. OpenMPI's are understood by timm.
"""

import os
import re
import shlex
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed
from timm.utils import init_distributed_device

from visionzoo.engine.errors import UserError


@dataclass(frozen=True)
class Process:
    """The device of this process and its place among the others."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    distributed: bool = False
    control: Any = None  # a group over CPUs beside NCCL's, so that to agree does not wait for the GPU

    @property
    def is_primary(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def agree(self, number: int) -> int:
        """Return the largest of the numbers that all processes call this with."""
        if not self.distributed:
            return number
        numbers = torch.tensor(number)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=self.control)
        return int(numbers)

    def told(self, text: str | None) -> str | None:
        """Return the text of the first process that calls this with one; all call it."""
        if not self.distributed:
            return text
        texts: list[str | None] = [None] * self.world_size
        torch.distributed.all_gather_object(texts, text, group=self.control)
        return next((text for text in texts if text is not None), None)


def start_process(device: str | None) -> Process:
    """Pick the device and join the other processes when torchrun or Slurm started several.

    Args:
        device: as --device names it; None for a GPU where there is one.

    Raises:
        UserError: the device is not there.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise UserError(f"unknown device: {str(error).splitlines()[0]}") from error
    if kind == "meta":
        raise UserError("device 'meta' cannot compute; expected cuda, cpu, ...")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"no CUDA device here, device={name!r}; pass --device cpu")
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    translate_slurm()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no GPU, there are {torch.cuda.device_count()}; start as many "
            "processes as there are (torchrun --nproc-per-node gpu)"
        )
    place = SimpleNamespace(device=name)
    found = init_distributed_device(place)
    needs_control = place.distributed and torch.distributed.get_backend() != "gloo"
    control = torch.distributed.new_group(backend="gloo") if needs_control else None
    return Process(found, place.rank, place.world_size, place.distributed, control)


def translate_slurm() -> None:
    """Set torchrun's variables from Slurm's, where `srun` started the processes and nothing else did.

    In a batch script without `srun`, or in an interactive allocation, one process runs whatever the allocation holds:
    to wait for the others would be to wait for ever. MASTER_ADDR and MASTER_PORT win over the first node of the step
    and a port made from the job's number.
    """
    env = os.environ
    if "WORLD_SIZE" in env or int(env.get("SLURM_NTASKS", 1)) < 2:
        return
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        env["WORLD_SIZE"] = "1"
        return
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "localhost")
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    env.setdefault("MASTER_ADDR", "".join(filter(None, first.groups())) if first else "localhost")
    job, step = (int(env.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    env.setdefault("MASTER_PORT", str(15000 + (job + step) % 20000))
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    env.update({ours: env[theirs] for ours, theirs in names.items()})


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def starter(tool: str) -> str:
    """Return the words that start a tool again, in as many processes.

    Args:
        tool: a script's path, or `visionzoo COMMAND`, as `sys.argv` names it.
    """
    if not tool.startswith("visionzoo "):
        return f"{launcher()} {shlex.quote(tool)}"
    return tool if launcher() == "python" else f"{launcher()} -m {tool}"


def launcher() -> str:
    """Return the words that start as many processes again, before the script's name."""
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) < 2:
        return "python"
    if not under_torchrun():
        return "srun python" if "SLURM_PROCID" in env else "python"
    nodes, per_node = int(env.get("GROUP_WORLD_SIZE", 1)), env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])
    words = f"torchrun --nproc-per-node {per_node}"
    if nodes > 1:
        words += f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint {env['MASTER_ADDR']}:29400"
    return words
