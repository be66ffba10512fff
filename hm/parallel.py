"""Several processes, one per GPU (or on CPUs), that share the training of one cell.

Every process runs the same code on its rows of each batch. Rank 0 alone decides and writes: it holds the claim, asks
for a stop, saves checkpoints and evaluates, and the others wait for its word. Such words go through a process group
of their own on the CPU (`exchange`), so that no GPU waits for them and an error of rank 0 reaches the others
wherever they wait for it. Without a launcher's environment all of this is one process, and costs nothing.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hm import progress
from hm.errors import Interrupted, UserError
from hm.objectives import FineTune, Objective, decoder, decoder_layers
from hm.store import Store

T = TypeVar("T")
PATIENCE = timedelta(days=2)
"""The others wait this long while rank 0 tokenises or evaluates."""
_alone = 0
_words: Any = None


# --- who is there


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """While the context lasts, the processes that accelerate launch, torchrun or srun started are one group.

    Each takes the GPU of its place on its machine, and all but rank 0 are silent.
    """
    global _words
    from_srun()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    _words = dist.new_group(backend="gloo", timeout=PATIENCE)
    progress.silent = rank() > 0
    yield
    state.destroy_process_group()


def from_srun() -> None:
    """Where srun started several tasks itself, what torchrun would have set."""
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    hosts = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
    first, *others = subprocess.run(hosts, check=True, capture_output=True, text=True).stdout.split()
    first = first if others else "127.0.0.1"  # a node's name need not be that of its host
    port = 20000 + int(env["SLURM_JOB_ID"]) % 20000
    env |= {"RANK": env["SLURM_PROCID"], "LOCAL_RANK": env["SLURM_LOCALID"], "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "MASTER_ADDR": first, "MASTER_PORT": str(port)}  # fmt: skip


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


# --- what rank 0 says


def exchange(value: Any) -> list:
    """The values of all processes, by rank. The first exception among them is raised by all."""
    if processes() == 1:
        return [value]
    values: list[Any] = [None] * processes()
    dist.all_gather_object(values, value, group=_words)
    for found in values:
        if isinstance(found, Exception):
            vars(found)["known"] = True
            raise found
    return values


@contextmanager
def telling() -> Iterator[None]:
    """Hands an error of this process to the others, who meet it at their next `exchange`."""
    try:
        yield
    except (UserError, Interrupted) as error:
        if "known" not in vars(error):
            exchange(error)
        raise


def on_main(call: Callable[[], T]) -> T:
    """What `call` gives (or raises, if UserError or Interrupted) on rank 0, which is alone meanwhile; the others wait."""
    global _alone
    if processes() == 1:
        return call()
    with telling():
        outcome: Any = None
        if rank() == 0:
            _alone += 1
            try:
                outcome = call()
            finally:
                _alone -= 1
        return exchange(outcome)[0]


def artifact(store: Store, kind: str, key: str, build: Callable[[Path], dict | None], describe: Mapping | None) -> Path:
    """`store.artifact`, where all processes take part in `build`: rank 0 claims and publishes, and says when to begin.

    In the others `build` gets the same folder, in which it must write nothing.
    """
    if processes() == 1:
        return store.artifact(kind, key, build, describe)

    def announced(work: Path) -> dict | None:
        exchange(("build", work))
        try:
            return build(work)
        except (UserError, Interrupted):
            raise
        except Exception as error:  # such as a lost claim: the others are deep in the build, and only their launcher ends them
            traceback.print_exc()
            raise SystemExit(f"{kind}/{key}: {error!r}; the other processes can't go on without this one") from error

    with telling():
        if rank() == 0:
            ready = store.artifact(kind, key, announced, describe)
            exchange(("ready", ready))
            return ready
        while True:
            word, folder = exchange(None)[0]
            if word == "ready":
                return folder
            build(folder)


# --- a training run


def rows(batch_size: int, flags: str) -> int:
    """Rows of a batch for each process. Raises UserError where they can't be equally many."""
    if batch_size % processes():
        raise UserError(
            f"{flags}batch_size={batch_size} can't be cut over {processes()} processes; make it a multiple of {processes()}."
        )
    return batch_size // processes()


def own_rows(tokens: Tensor) -> Tensor:
    """This process's rows of a batch (B, L + 1)."""
    return tokens if processes() == 1 else tokens.chunk(processes())[rank()]


def mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars as their means over all processes, in one message."""
    if processes() == 1:
        return values
    flat = torch.stack(list(values.values())) / processes()
    dist.all_reduce(flat)
    return dict(zip(values, flat.unbind(), strict=True))


def micro_batch(objective: Objective, last: bool) -> AbstractContextManager:
    """Around one micro-batch: DDP sends gradients in the last one only."""
    module = getattr(objective, "module", None)
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def reduce_gradients(objective: Objective) -> None:
    """Gradients as means over all processes, in one message, where `backward` has not seen to it."""
    if processes() == 1 or objective.reduced:
        return
    gradients = [p.grad for _, p, _ in objective.parameters if p.grad is not None]
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat / processes(), gradients)


@contextmanager
def sharing(objective: Objective, how: str, precision: str) -> Iterator[Objective]:
    """The objective as several processes train it together; afterwards each has all of its trained weights.

    how: ddp (auto), every process with a whole copy of the model, or fsdp, each with a part of weights and optimiser.
    Fine-tuning is what can be shared so; other gradients are left to `reduce_gradients`.
    """
    if processes() == 1 or not isinstance(objective, FineTune):
        yield objective
        return
    shared = copy.copy(objective)
    shared.reduced = True
    if how == "fsdp":
        shared.model = sharded(objective, precision)
        own = dict(shared.model.named_parameters())
        shared.parameters = [(n, own[n], new) for n, _, new in objective.parameters]
    else:
        shared.module = DistributedDataParallel(_Losses(shared), gradient_as_bucket_view=True)
    import torch._dynamo

    with torch._dynamo.config.patch(optimize_ddp=False):  # layers are compiled one by one, which is fine enough
        yield shared
    if how == "fsdp":
        with torch.no_grad():
            for (_, plain, _), (_, part, _) in zip(objective.parameters, shared.parameters, strict=True):
                plain.copy_(full(part))
        objective.model.to(device=shared.model.device)  # type: ignore[call-arg]


class _Losses(nn.Module):
    """What DDP wraps: the trained parameters (and no buffers, which never change), and the losses they give."""

    def __init__(self, objective: FineTune):
        super().__init__()
        self.trained = nn.ParameterList(p for _, p, _ in objective.parameters)
        self.losses = objective.losses

    def forward(self, tokens: Tensor) -> Any:
        return self.losses(tokens)


def sharded(objective: FineTune, precision: str) -> Any:
    """A copy of the objective's model, cut over the processes layer by layer (FSDP2); the model itself goes to the CPU.

    What isn't trained, the embeddings, stays whole in each process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = copy.deepcopy(objective.model)
    objective.model.to(device="cpu")  # type: ignore[call-arg]
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    mesh = init_device_mesh(model.device.type, (processes(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    fully_shard(decoder(model), mesh=mesh, mp_policy=policy, ignored_params=frozen)
    return model


def full(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part. All processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor, on the CPU of rank 0, where several processes hold a part of each."""
    if not any(isinstance(t, DTensor) for t in tensors.values()):
        return tensors
    found = {}
    for name, tensor in tensors.items():
        whole = full(tensor)
        found[name] = whole.cpu() if rank() == 0 else whole.new_empty(0)
    return found


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if `like` is held in parts."""
    if not isinstance(like, DTensor) or tensor.dim() == 0:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def micro_batches(batch_rows: int, micro_batch: int | None) -> int:
    """Into how many equal parts, of `micro_batch` rows at most, a process cuts its rows."""
    return batch_rows // math.gcd(batch_rows, micro_batch or batch_rows)
