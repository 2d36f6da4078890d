"""Whole small models on two processes (gloo, CPU): DDP and FSDP2 train as one process on the whole batch.

The two processes are this file run as a script; they write what they computed, and the tests compare.
"""

import datetime
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rule import needs_native
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from whole_models import close, same, small_lm, tokens_of

import slmkernels

pytestmark = needs_native
RANKS, STEPS = 2, 2
# The load-balance loss is not a mean over tokens: each process has that of its own.
build = small_lm(expert_balance=0.0)


def ddp() -> nn.Module:
    """All parameters in the graph, experts without tokens too: no search for unused ones."""
    return DistributedDataParallel(build())


def fsdp(recompute: bool = False, **options) -> nn.Module:
    """Every block sharded, then the embedding and the last norm."""
    whole = build()
    whole.model.checkpoint_activations = recompute
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in whole.model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(whole, mesh=mesh, **options)


def fsdp_bfloat16() -> nn.Module:
    """Parameters and gradients float32, what is computed bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp(mp_policy=policy)


SCENARIOS = {
    "ddp": ddp,
    "fsdp": fsdp,
    "fsdp_recomputed": lambda: fsdp(recompute=True),
    "fsdp_bfloat16": fsdp_bfloat16,
}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, gathered where they are sharded, under the names they have in a single process."""
    gathered = {n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in tensors.items()}
    return {name.removeprefix("module."): x.detach().clone() for name, x in gathered.items()}


def train(module: nn.Module, rows: slice) -> dict[str, dict[str, Tensor]]:
    """Some steps on these rows of each batch: the gradients of the first, and all that the last leaves."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4)  # eps: a gradient of 0 stays small
    for step in range(STEPS):
        module(tokens_of(4, 48, step)[rows])[1].backward()
        if step == 0:
            first = whole({name: p.grad for name, p in module.named_parameters()})
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    moments = {n: optimizer.state[p]["exp_avg"] for n, p in module.named_parameters()}
    return {"gradients": first, "state": whole(module.state_dict()), "moments": whole(moments)}


def work(rank: int, folder: Path) -> None:
    """One of the processes: every scenario, or where it fails."""
    dist.init_process_group(
        "gloo",
        f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {}
    for name, scenario in SCENARIOS.items():
        try:
            results[name] = train(scenario(), slice(2 * rank, 2 * rank + 2))
        except Exception:
            results[name] = traceback.format_exc()
            break  # the other process may wait for this one: no more in step
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each process computed, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(Path(slmkernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    commands = [[sys.executable, __file__, str(rank), str(folder)] for rank in range(RANKS)]
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, **options) for command in commands]
    try:
        output = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # no effect on one that has ended
    for process, text in zip(processes, output, strict=True):
        assert process.returncode == 0, text
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """The same training in one process, on whole batches."""
    return train(build(), slice(None))


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_recomputed"])
def test_training_equals_one_process(name, ranks, alone):
    for results in ranks:
        assert name in results, list(results.values())[-1]
        assert isinstance(results[name], dict), results[name]
        close(results[name]["gradients"], alone["gradients"])
        for part in ("state", "moments"):
            ours, expected = ({n: x.float() for n, x in r[part].items()} for r in (results[name], alone))
            close(ours, expected, 1e-4)


def test_recomputed_layers_give_the_same_bits(ranks):
    for part in ("gradients", "state"):
        same(ranks[0]["fsdp_recomputed"][part], ranks[0]["fsdp"][part])


def test_mixed_precision_keeps_float32_parameters(ranks, alone):
    assert isinstance(ranks[0].get("fsdp_bfloat16"), dict), ranks[0].get("fsdp_bfloat16")
    for part in ("gradients", "state"):
        ours = ranks[0]["fsdp_bfloat16"][part]
        assert {x.dtype for n, x in ours.items() if x.is_floating_point()} == {torch.float32}
        assert all(x.isfinite().all() for x in ours.values())
    ours, exact = (
        torch.cat([x.flatten() for x in r["gradients"].values()]) for r in (ranks[0]["fsdp_bfloat16"], alone)
    )
    assert (ours - exact).norm() < 0.3 * exact.norm()  # which experts are chosen turns on the last digits


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
