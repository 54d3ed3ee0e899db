import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from treelora_ray.data.digits import APART, TRANSFORMS, digits_stream, recipes
from treelora_ray.data.errors import DataError
from treelora_ray.data.rows import column
from treelora_ray.models import digits_vit
from treelora_ray.models.digits_vit import digits_vit_folder


def pictures(task: int, seed: int = 0, split: str = "train") -> np.ndarray:
    rows = getattr(digits_stream(12, seed, 40, 40).tasks[task], split)
    return np.stack(column(rows, "image"))


def test_there_are_48_tasks_of_different_names_with_families_loners_and_a_pair_that_looks_alike() -> None:
    known = recipes()
    assert len({recipe.name for recipe in known}) == len(known) == 48
    families = [recipe.family for recipe in known[:12]]
    sizes = sorted(families.count(family) for family in set(families))
    assert sizes == [1, 1, 2, 4, 4]
    one, other = (recipe for recipe in known[:12] if recipe.family == "permuted")
    assert one.transform == other.transform
    assert not set(one.groups) & set(other.groups)


def test_members_of_a_family_share_most_digits_and_their_transformation() -> None:
    striped = [recipe for recipe in recipes() if recipe.family == "striped"]
    for one in striped:
        for other in striped:
            assert one.transform == other.transform
            assert len(set(one.groups) & set(other.groups)) >= 8


def test_transformations_move_pixels_and_lose_none() -> None:
    plain = np.random.default_rng(0).random((3, 16, 16)).astype(np.float32)
    for name, transform in TRANSFORMS.items():
        found = transform(plain)
        assert found.shape == plain.shape
        if name not in ("edges", "negative", "turned", "striped"):
            np.testing.assert_array_equal(np.sort(found, axis=None), np.sort(plain, axis=None), err_msg=name)
        assert name == "plain" or not np.array_equal(found, plain)


def test_source_images_of_pretraining_training_and_test_are_kept_apart() -> None:
    ends = sorted(APART.values())
    assert [low for low, _ in ends] == [0, *(high for _, high in ends[:-1])]
    assert ends[-1][1] == 1797


def test_the_seed_decides_the_pictures_and_nothing_else_does() -> None:
    np.testing.assert_array_equal(pictures(0), pictures(0))
    assert not np.array_equal(pictures(0), pictures(0, seed=1))
    assert not np.array_equal(pictures(0), pictures(0, split="test"))
    one, other = digits_stream(12, 0), digits_stream(12, 1)
    assert one.names == other.names


def test_labels_are_balanced_and_say_what_they_ask() -> None:
    task = digits_stream(1).tasks[0]
    labels = [str(label) for label in column(task.train, "label")]
    counts = [labels.count(label) for label in task.labels]
    assert max(counts) - min(counts) <= 1
    assert set(labels) == set(task.labels)


@pytest.mark.parametrize("count", [0, 49])
def test_other_numbers_of_tasks_are_refused(count: int) -> None:
    with pytest.raises(DataError, match=f"has 1 to 48 tasks, not {count}"):
        digits_stream(count)


def test_the_backbone_is_made_once_and_is_an_ordinary_folder() -> None:
    before = torch.get_rng_state()
    folder = digits_vit_folder()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert digits_vit_folder() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert torch.equal(torch.get_rng_state(), before)
    assert AutoModel.from_pretrained(folder, add_pooling_layer=False).config.hidden_size == 64
    assert AutoImageProcessor.from_pretrained(folder, backend="pil").size["height"] == 16
    assert not list(folder.parent.glob(".digits-vit-*/"))


def test_the_backbone_is_the_same_on_processors_that_round_differently(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else scores of the same run differed by points from machine to machine."""
    code = (
        "import sys; from safetensors.torch import save_file; from treelora_ray.models import digits_vit;"
        "digits_vit.STEPS = 40; save_file(digits_vit._pretrain().state_dict(), sys.argv[1])"
    )
    other = tmp_path / "other.safetensors"
    plain = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    with subprocess.Popen([sys.executable, "-c", code, str(other)], env={**os.environ, **plain}) as process:
        monkeypatch.setattr(digits_vit, "STEPS", 40)
        here = digits_vit._pretrain().state_dict()
    assert process.returncode == 0
    there = load_file(other)
    assert all(torch.equal(there[name], weight) for name, weight in here.items())


def test_settling_takes_away_what_processors_differ_by() -> None:
    found = []
    for off in (0.0, 1e-9, -1e-9):
        weight = torch.nn.Parameter(torch.tensor([0.0, 0.3, -1.7], dtype=torch.float64) + off)
        optimizer = torch.optim.AdamW([weight])
        weight.grad = torch.tensor([1.0, -0.3, 1e-5], dtype=torch.float64) * (1 + off)
        optimizer.step()
        digits_vit._settle(optimizer)
        kept = optimizer.state[weight]
        found.append(torch.cat([weight.detach(), kept["exp_avg"], kept["exp_avg_sq"]]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    zero = torch.nn.Parameter(torch.tensor([-1e-9], dtype=torch.float64))
    digits_vit._settle(torch.optim.AdamW([zero]))
    assert not zero.signbit().item(), "files would differ by the sign of a zero"


def test_any_worker_may_be_the_one_that_makes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers saves nothing on workers but the first."""
    monkeypatch.setenv("TREELORA_CACHE", str(tmp_path))
    monkeypatch.setattr(digits_vit, "STEPS", 10)
    with monkeypatch.context() as second:
        second.setattr(torch.distributed, "is_initialized", lambda: True)
        second.setattr(torch.distributed, "get_rank", lambda *_: 1)
        folder = digits_vit_folder()
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert AutoModel.from_pretrained(folder, add_pooling_layer=False).config.hidden_size == 64
