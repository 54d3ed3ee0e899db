"""On a GPU: what the CPU learns, in bf16 and resumed too; copies and pulls that are not waited for; nccl. No Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from treelora_ray import Run, run
from treelora_ray.cluster.comm import TorchComm
from treelora_ray.config import RunConfig, load
from treelora_ray.core import Layout
from treelora_ray.core.penalty import AdapterPull, DirectionPull, InnerPull
from treelora_ray.methods.learner import Learner
from treelora_ray.training.errors import Stopped
from treelora_ray.training.stream import Listener

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


def digits(folder: Path, device: str, *more: str) -> RunConfig:
    """Four tasks of the built-in stream, of which two are related."""
    small = ["stream.tasks=4", "stream.rows=320", "stream.test_rows=200", "train.epochs=3", "train.checkpoint_every=7"]
    return load("quickstart", [f"folder={folder}", f"model.device={device}", *small, *more])


class Watch(Listener):
    """Keeps the losses, and stops in the middle of the third task where it is asked to."""

    def __init__(self) -> None:
        self.unit, self.steps, self.losses = 0, 0, list[float]()

    def begins(self, number: int, of: int, name: str) -> None:  # noqa: ARG002
        self.unit, self.steps = number, 0

    def step(self, step: int, of: int, loss: float) -> None:  # noqa: ARG002
        self.steps += 1
        self.losses.append(loss)

    def stop(self) -> bool:
        return self.unit == 2 and self.steps == 9


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it whatever makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def leans(done: Run) -> list[str | None]:
    return [name for record in done.result["records"] for name in record["report"].get("leans_on", [])]


def groups(done: Run) -> set[frozenset[str]]:
    """The tree as the sets of tasks below its nodes."""
    tree = done.method.guide.tree  # type: ignore[attr-defined]
    return {frozenset(done.tasks[task] for task in tree.members(node)) for node in range(len(tree))}


def adapters(done: Run) -> dict[str, Tensor]:
    files = [path / "adapter_model.safetensors" for path in done.adapters.values()]
    return {f"{path.parent.name} {name}": value for path in files for name, value in load_file(path).items()}


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(digits(tmp_path_factory.mktemp("cpu"), "cpu"))


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(digits(tmp_path_factory.mktemp("gpu"), "cuda"))


def test_a_gpu_chooses_and_scores_as_the_cpu_does(on_cpu: Run, on_gpu: Run) -> None:
    assert on_gpu.result["device"].startswith("cuda")
    assert any(leans(on_cpu))
    assert leans(on_gpu) == leans(on_cpu)
    assert groups(on_gpu) == groups(on_cpu)
    np.testing.assert_allclose(on_gpu.matrix, on_cpu.matrix, rtol=0, atol=3.0)


def test_bf16_trains_float32_adapters_with_finite_losses(on_gpu: Run, tmp_path: Path) -> None:
    watch = Watch()
    done = run(digits(tmp_path, "cuda", "train.precision=bf16"), listener=watch)
    assert watch.losses
    assert all(math.isfinite(loss) for loss in watch.losses)
    trained = [done.method.learner.theta, *adapters(done).values()]
    assert {value.dtype for value in trained} == {torch.float32}
    assert all(value.isfinite().all() for value in trained)
    np.testing.assert_allclose(done.matrix[-1].mean(), on_gpu.matrix[-1].mean(), rtol=0, atol=8.0)


@pytest.mark.parametrize("then", ["cuda", "cpu"])
def test_a_stopped_run_goes_on_with_the_same_result(then: str, on_gpu: Run, tmp_path: Path) -> None:
    watch = Watch()
    with pytest.raises(Stopped):
        run(digits(tmp_path, "cuda"), listener=watch, stop=watch.stop)
    done = run(digits(tmp_path, then))
    assert done.finished
    assert leans(done) == leans(on_gpu)
    np.testing.assert_allclose(done.matrix, on_gpu.matrix, rtol=0, atol=3.0)
    found, expected = adapters(done), adapters(on_gpu)
    assert found.keys() == expected.keys()
    assert all((found[name] - value).norm() <= 0.1 * value.norm() for name, value in expected.items())


def test_batches_are_copied_from_pinned_memory_and_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, fetch, copies = Tensor.to, Learner.fetch, []

    def to(self: Tensor, *given: Any, **named: Any) -> Tensor:
        out = original(self, *given, **named)
        if out.is_cuda and not self.is_cuda:
            copies.append((self.is_pinned(), bool(named.get("non_blocking"))))
        return out

    def fetching(self: Learner, refs: Any) -> Any:
        with monkeypatch.context() as patch, no_waiting():
            patch.setattr(Tensor, "to", to)
            batch = fetch(self, refs)
        assert all(tensor is not None and tensor.is_cuda for tensor in (*batch.inputs.values(), batch.targets))
        return batch

    monkeypatch.setattr(Learner, "fetch", fetching)
    run(digits(tmp_path, "cuda", "stream.tasks=1", "train.steps=3"))
    assert len(copies) >= 6
    assert set(copies) == {(True, True)}


@pytest.mark.parametrize("penalty", ["l1", "prox"])
def test_the_pull_of_a_run_never_waits_for_the_gpu(
    penalty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"l1": "add_", "prox": "prox_"}[penalty]
    original, calls = getattr(AdapterPull, name), [0]

    def pulling(*given: Any) -> None:
        calls[0] += 1
        with no_waiting():
            original(*given)

    monkeypatch.setattr(AdapterPull, name, pulling)
    run(digits(tmp_path, "cuda", f"method.penalty={penalty}", "method.lambda=0.1", "stream.tasks=2"))
    assert calls[0] > 10


def test_what_the_guide_exchanges_with_a_step_never_waits_for_the_gpu() -> None:
    """Layers of two sizes: their numbers are index tensors, made at the first call on a device."""
    layout = Layout.of_sizes([600, 200, 600, 200])
    theta, grad, target = torch.randn(3, layout.total, device="cuda")
    adapter, direction = AdapterPull(layout, "cuda"), DirectionPull(layout, torch.zeros_like(theta))
    inner = InnerPull(layout, "cuda")
    adapter.aim(target, torch.tensor([True, False, True, True]))
    moment = theta.square()

    def step() -> None:
        direction.aim(target)
        inner.aim(target)
        distances = direction.measure(theta)
        direction.add_(grad, 0.1)
        adapter.add_(grad, theta, 0.1)
        inner.add_(grad, theta, 0.1, distances.sum())
        adapter.prox_(theta, 0.1, 0.1)
        adapter.prox_(theta, 0.1, 0.1, moment)
        adapter.density(theta)

    step()
    with no_waiting():
        step()
        with pytest.raises(RuntimeError, match="synchroni"):
            float(theta.sum())


# -- nccl


def joined(rank: int, workers: int, store: str) -> TorchComm:
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=rank, world_size=workers)
    return TorchComm()


needs_nccl = pytest.mark.skipif(not dist.is_nccl_available(), reason="this build of torch has no nccl")


@needs_nccl
def test_one_worker_adds_up_and_tells_over_nccl(tmp_path: Path) -> None:
    comm = joined(0, 1, str(tmp_path / "store"))
    try:
        assert (comm.rank, comm.workers) == (0, 1)
        assert comm.gather("a") == ["a"]
        comm.workers = 2  # alone it would not ask the group
        for device in ("cuda", "cpu"):
            tensor = torch.arange(5.0, device=device)
            comm.sum_(tensor)
            assert tensor.tolist() == [0, 1, 2, 3, 4]
        assert comm.share({"step": 3}) == {"step": 3}
    finally:
        dist.destroy_process_group()


def speak(rank: int, store: str, answers: str) -> None:
    comm = joined(rank, 2, store)
    tensor = torch.full((3,), rank + 1.0, device="cuda")
    comm.sum_(tensor)
    said = {"sum": tensor.tolist(), "share": comm.share(f"of {rank}"), "gather": comm.gather(rank)}
    Path(answers, str(rank)).write_text(json.dumps(said))
    dist.destroy_process_group()


@needs_nccl
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: nccl refuses two workers on one")
def test_two_workers_add_up_and_tell_over_nccl(tmp_path: Path) -> None:
    spawn(speak, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in ("0", "1"):
        said = json.loads((tmp_path / rank).read_text())
        assert said == {"sum": [3.0, 3.0, 3.0], "share": "of 0", "gather": [0, 1]}
