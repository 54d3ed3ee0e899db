"""Puts known defects into a copy of the library and checks that the golden tests notice each of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

# file, what stands there, the defect, tests that must fail
MUTATIONS = {
    "the search prefers distant tasks": (
        "bandit.py",
        "np.where(self.count > 0, self.mean - self.widths",
        "np.where(self.count > 0, -self.mean - self.widths",
        "test_bandit.py::test_golden_with_equal_counts_the_nearest_of_1_5_9_is_chosen_at_every_level",
    ),
    "the tree's bound prefers distant tasks": (
        "bandit.py",
        "bounds = total / count - self.widths",
        "bounds = -total / count - self.widths",
        "test_bandit.py::test_golden_with_equal_counts_the_nearest_of_1_5_9_is_chosen_at_every_level",
    ),
    "arms never observed wait": (
        "bandit.py",
        "self.widths(self.count, self.lines), -np.inf)",
        "self.widths(self.count, self.lines), np.inf)",
        "test_bandit.py::test_golden_an_arm_never_observed_comes_before_any_repeat_in_flat_search",
    ),
    "arms never observed wait in the leaf": (
        "bandit.py",
        "self.widths(self.count, self.lines), -np.inf)",
        "self.widths(self.count, self.lines), np.inf)",
        "test_bandit.py::test_golden_an_arm_never_observed_comes_first_within_the_leaf_reached",
    ),
    "the bonus swamps the means": (
        "bandit.py",
        "np.asarray(self.c * np.sqrt(np.log(max(self.pulls, 1)) / count))",
        "np.asarray(20 * self.c * np.sqrt(np.log(max(self.pulls, 1)) / count))",
        "test_bandit.py::test_golden_the_near_arm_takes_most_pulls_of_the_last_half",
    ),
    "only the first layer descends": (
        "bandit.py",
        "node = int(below[np.argmin(bounds[layer, below])])",
        "node = int(below[np.argmin(bounds[0, below])])",
        "test_bandit.py::test_deep_levels_change_the_choice",
    ),
    "the released scores are not normalised by their range": (
        "released.py",
        "softmax(sigma / (sigma.max() - sigma.min() + 1e-5))",
        "softmax(sigma)",
        "test_released.py::test_golden_means_1_5_9_after_30_pulls_each_give_the_probabilities_of_the_released_code",
    ),
    "the released running sum forgets its factor D": (
        "signature.py",
        "alpha=len(self.layout) / self.steps_per_epoch",
        "alpha=1 / self.steps_per_epoch",
        "test_signature.py::test_a_constant_weight_of_one_over_an_epoch_gives_q_equal_to_the_number_of_modules",
    ),
    "weights are taken for displacements": (
        "signature.py",
        "return mean if self.start is None else mean - self.start.to(mean.device)",
        "return mean",
        "test_signature.py::test_delta_is_the_mean_over_the_last_epoch_only",
    ),
    "the released regulariser is a plain inner product": (
        "penalty.py",
        "return strength * loss.detach() * product / (product + 1e-5)",
        "return strength * product",
        "test_penalty.py::test_its_value_is_lambda_times_the_loss_whatever_the_arms",
    ),
    "the ramp starts above zero": (
        "penalty.py",
        "self.value * (step % self.steps_per_epoch)",
        "self.value * (step % self.steps_per_epoch + 1)",
        "test_penalty.py::test_the_ramp_starts_at_zero_in_every_epoch_and_grows_evenly",
    ),
    "coinciding directions are pushed apart": (
        "penalty.py",
        "        self.buffer.sign_()\n        # A layer",
        "        self.buffer.copy_((self.buffer >= 0).float() * 2 - 1)\n        # A layer",
        "test_penalty.py::test_coinciding_directions_have_zero_value_and_zero_subgradient",
    ),
    "the released split leaves out the median": (
        "grow.py",
        "upper = product >= delta",
        "upper = product > delta",
        "test_grow.py::TestInnerSplit::test_golden_sizes_of_the_released_root_split",
    ),
    "the released split takes the upper median": (
        "grow.py",
        "delta = float(np.sort(product)[(len(product) - 1) // 2])",
        "delta = float(np.sort(product)[len(product) // 2])",
        "test_grow.py::TestInnerSplit::test_golden_sizes_of_the_released_root_split",
    ),
    "ties fall on one side of the radius split": (
        "grow.py",
        "if near.sum() == half:",
        "if near.any():",
        "test_grow.py::TestRadiusSplit::test_ties_are_halved_by_index",
    ),
    "the depth cap is one too deep": (
        "grow.py",
        "if level == depth:",
        "if level == depth + 1:",
        "test_grow.py::test_each_task_is_in_exactly_one_leaf_and_groups_lie_within_the_cap",
    ),
    "merging forgets the weights": (
        "merge.py",
        "torch.cat([b.double() * w for",
        "torch.cat([b.double() * (1 + 0 * w) for",
        "test_merge.py::test_merging_equal_adapters_changes_no_delta",
    ),
    "the budget is one too large": (
        "merge.py",
        "size = 0 if budget is None else budget + 1",
        "size = 0 if budget is None else budget + 2",
        "test_merge.py::test_the_pair_merged_is_the_one_with_the_least_mean_distance",
    ),
    "the gate forgets how many arms there were": (
        "signature.py",
        "quantile = float(torch.special.ndtri(torch.tensor(level / arms,",
        "quantile = float(torch.special.ndtri(torch.tensor(level + 0 * arms,",
        "test_signature.py::test_few_layers_pass_when_the_nearest_of_unrelated_tasks_is_chosen",
    ),
    "large groups look near": (
        "bandit.py",
        "square = np.round(x[lines], DIGITS) ** 2 + spread",
        "square = np.round(x[lines], DIGITS) ** 2 + 0 * spread",
        "test_bandit.py::test_the_other_half_is_known_without_a_pull",
    ),
    "groups have no slack": (
        "bandit.py",
        "estimate - slack, np.inf)",
        "estimate - 0 * slack, np.inf)",
        "test_bandit.py::test_tree_lcb_finds_a_member_of_the_right_family_among_512_tasks_with_64_pulls",
    ),
    "a snapshot leaves out the noise": (
        "bandit.py",
        '"fresh": self.fresh, **self.noise.arrays()}',
        '"fresh": self.fresh, **Noise(self.layers).arrays()}',
        "test_bandit.py::test_a_search_read_back_goes_on_as_if_never_stopped",
    ),
}


@pytest.mark.parametrize("defect", MUTATIONS)
def test_a_defect_put_in_is_noticed(defect: str, tmp_path: Path) -> None:
    name, stands, wrong, tests = MUTATIONS[defect]
    for folder in ("treelora_ray", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "out", "slow"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / "treelora_ray" / "core" / name
    text = source.read_text()
    assert text.count(stands) == 1, f"{name} has changed: the place of this defect is gone"
    source.write_text(text.replace(stands, wrong))
    command = [sys.executable, "-m", "pytest", f"tests/unit/{tests}", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, f"nothing noticed that {defect}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
