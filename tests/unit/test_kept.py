"""Streams and backbones that one run hands to the next are those it would open and load itself."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.integration.test_runs import write
from tests.unit.test_models import ROWS
from treelora_ray.config import ModelConfig, StreamConfig
from treelora_ray.data import kept as kept_streams
from treelora_ray.data.kept import Streams
from treelora_ray.models import kept, loading
from treelora_ray.models.backbone import Model, load_model
from treelora_ray.models.errors import ModelError
from treelora_ray.models.kept import Backbones, Packed

CPU = torch.device("cpu")
MAKERS: dict[str, Callable[[Path], Path]] = {"image": tiny.vit, "text": tiny.bert, "prompt": tiny.llama}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each backbone that is read from files."""
    found: list[str] = []
    real = loading.from_pretrained

    def from_pretrained(where: str, config: ModelConfig, kind: str) -> Any:
        found.append(where)
        return real(where, config, kind)

    monkeypatch.setattr(kept, "from_pretrained", from_pretrained)
    return found


def read_only(packed: Packed) -> Packed:
    """As Ray's object store gives it: arrays in memory that cannot be written to."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)
    found: Packed = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])
    assert not any(array.flags.writeable for array in found.arrays.values())
    return found


def answers(model: Model, kind: str) -> list[Tensor]:
    """Features, and gradients of the adapters."""
    for _, b in model.layers.values():
        b.data.fill_(0.01)
    features = model.features(model.inputs(ROWS[kind]))
    features.square().sum().backward()
    return [features.detach(), *(part.grad for pair in model.layers.values() for part in pair if part.grad is not None)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 1 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", list(MAKERS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kept_and_a_packed_backbone_give_what_a_loaded_one_gives(
    kind: str, dtype: str, tmp_path: Path, loads: list[str]
) -> None:
    config = ModelConfig.model_validate(
        {"backbone": str(MAKERS[kind](tmp_path / "b")), "dtype": dtype, "device": "cpu", "max_length": 32}
    )
    wanted = answers(load_model(config, kind, 3), kind)
    backbones = Backbones()
    for _ in range(3):
        assert equal(answers(load_model(config, kind, 3, backbones), kind), wanted)
    packed = read_only(backbones.pack(config, kind))
    assert len(loads) == 1
    given = load_model(config, kind, 3, Backbones(packed))
    assert equal(answers(given, kind), wanted)
    assert len(loads) == 1
    assert given.digest == load_model(config, kind, 4, backbones).digest != ""


def elsewhere(packed: Packed, config: ModelConfig, kind: str) -> list[Tensor]:
    """In a process that has made no model before."""
    torch.set_num_threads(1)
    return answers(load_model(config, kind, 3, Backbones(packed)), kind)


def test_a_packed_backbone_gives_the_same_in_a_process_that_never_saw_such_a_model(tmp_path: Path) -> None:
    configs = {
        kind: ModelConfig(backbone=str(made(tmp_path / kind)), device="cpu", max_length=32)
        for kind, made in MAKERS.items()
    }
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for kind, config in configs.items():
            packed = Backbones().pack(config, kind)
            Path(config.backbone).rename(tmp_path / f"{kind}-moved")
            found = [torch.from_numpy(x) for x in pool.submit(elsewhere_as_arrays, packed, config, kind).result(120)]
            assert equal(found, elsewhere(packed, config, kind))


def elsewhere_as_arrays(packed: Packed, config: ModelConfig, kind: str) -> list[Any]:
    return [tensor.numpy() for tensor in elsewhere(packed, config, kind)]


def test_what_a_run_does_to_its_model_the_next_one_does_not_see(tmp_path: Path, loads: list[str]) -> None:
    config = ModelConfig(backbone=str(tiny.vit(tmp_path / "b")), device="cpu", gradient_checkpointing=True)
    backbones = Backbones(note=pytest.fail)
    first = load_model(config, "image", 0, backbones)
    linear = first.linear(next(iter(first.layers)))
    linear.weight.data = torch.zeros_like(linear.weight)  # assigned, not written to: as merging adapters does
    first.backbone.register_forward_hook(lambda *_: pytest.fail("a hook of another run"))
    first.backbone.config.hidden_act = "relu"
    second = load_model(config, "image", 0, backbones)
    fresh = load_model(config, "image", 0, Backbones())
    assert equal(answers(second, "image"), answers(fresh, "image"))
    assert not any("lora" in name for name, _ in backbones.get(config, "image", CPU).net().named_modules())
    assert len(loads) == 2


def test_weights_that_a_run_has_written_to_are_loaded_anew(tmp_path: Path, loads: list[str]) -> None:
    config = ModelConfig(backbone=str(tiny.vit(tmp_path / "b")), device="cpu")
    notes: list[str] = []
    backbones = Backbones(note=notes.append)
    first = load_model(config, "image", 0, backbones)
    digest = first.digest
    first.linear(next(iter(first.layers))).weight.data[0, 0] += 1e-3
    second = load_model(config, "image", 0, backbones)
    assert second.digest == digest
    assert len(loads) == 2
    assert "were changed by an earlier run" in notes[0]


def test_a_backbone_that_has_changed_on_disk_is_another(tmp_path: Path, loads: list[str]) -> None:
    folder = tiny.vit(tmp_path / "b")
    config = ModelConfig(backbone=str(folder), device="cpu", max_length=32)
    backbones = Backbones()
    digest = load_model(config, "image", 0, backbones).digest
    file = folder / "preprocessor_config.json"
    file.write_text(file.read_text().replace("0.25", "0.26"))
    changed = load_model(config, "image", 0, backbones).digest
    file.write_text(file.read_text().replace("0.26", "0.25"))
    os.utime(file, ns=(1, 1))
    assert load_model(config, "image", 0, backbones).digest == digest != changed
    assert len(loads) == 3


def test_damaged_arrays_are_not_used_and_others_than_asked_for_neither(tmp_path: Path, loads: list[str]) -> None:
    config = ModelConfig(backbone=str(tiny.vit(tmp_path / "b")), device="cpu")
    packed = Backbones().pack(config, "image")
    other = ModelConfig(backbone=str(tiny.vit(tmp_path / "c")), device="cpu")
    load_model(other, "image", 0, Backbones(packed))
    assert loads == [str(tmp_path / "b"), str(tmp_path / "c")]
    next(iter(packed.arrays.values()))[0] ^= 1
    notes: list[str] = []
    made = load_model(config, "image", 0, Backbones(packed, notes.append))
    assert equal(answers(made, "image"), answers(load_model(config, "image", 0), "image"))
    assert "are damaged" in notes[0]


def test_a_packed_backbone_needs_no_folder(tmp_path: Path) -> None:
    folder = tiny.bert(tmp_path / "b")
    config = ModelConfig(backbone=str(folder), device="cpu", max_length=32)
    packed = Backbones().pack(config, "text")
    folder.rename(tmp_path / "moved")
    assert load_model(config, "text", 0, Backbones(packed)).width == 16
    with pytest.raises(ModelError, match="no folder"):
        load_model(config, "text", 0, Backbones())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "tied"
    words = tiny.tokenizer(folder)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), tie_word_embeddings=True, pad_token_id=0, eos_token_id=2, **shape)
    ).save_pretrained(folder)
    net = Backbones().get(ModelConfig(backbone=str(folder), device="cpu"), "prompt", CPU).net()
    assert net.lm_head.weight is net.model.embed_tokens.weight


def test_models_may_be_loaded_in_several_threads(tmp_path: Path) -> None:
    """transformers switches tying off in its classes while it loads: what one thread puts back another had changed."""
    from transformers import PreTrainedModel

    before, config = PreTrainedModel.tie_weights, ModelConfig(backbone=str(tiny.vit(tmp_path / "vit")), device="cpu")
    barrier = threading.Barrier(4)

    def load() -> None:
        barrier.wait(60)
        for _ in range(3):
            loading.from_pretrained(config.backbone, config, "image")

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    left = PreTrainedModel.tie_weights
    PreTrainedModel.tie_weights = before  # type: ignore[method-assign]
    assert left is before


def test_a_stream_is_opened_once_for_equal_settings(tmp_path: Path) -> None:
    streams = Streams()
    write(tmp_path / "data", 2)
    config = StreamConfig(source="parquet", path=str(tmp_path / "data"))
    first = streams.open(config, 0)
    assert streams.open(StreamConfig(source="parquet", path=str(tmp_path / "data")), 0) is first
    assert streams.open(config, 1) is not first
    assert streams.open(config.model_copy(update={"rows": 10}), 0) is not first
    assert streams.open(config, 0) is first
    os.utime(tmp_path / "data" / "t1" / "train.parquet", ns=(1, 1))
    again = streams.open(config, 0)
    assert again is not first
    assert [task.train.fingerprint for task in again.tasks] == [task.train.fingerprint for task in first.tasks]


def test_of_many_streams_those_used_last_stay_open() -> None:
    streams, config = Streams(), StreamConfig(tasks=1, rows=20, test_rows=10)
    first = [streams.open(config, seed) for seed in range(kept_streams.MOST)]
    assert streams.open(config, 0) is first[0]
    streams.open(config, kept_streams.MOST)
    assert streams.open(config, 0) is first[0]
    assert streams.open(config, 1) is not first[1]
