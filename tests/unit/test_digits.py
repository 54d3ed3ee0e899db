from pathlib import Path

import numpy as np
import pytest
import torch
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
