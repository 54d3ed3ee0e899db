from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from treelora_ray.core.errors import GuideError
from treelora_ray.core.layout import IntArray
from treelora_ray.core.tree import Children, Tree

quick = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Nest:
    """What a tree means, without arrays: a task, or a group of nests."""

    what: int | tuple[Nest, ...]
    height: float = 0.0

    @property
    def tasks(self) -> list[int]:
        return [self.what] if isinstance(self.what, int) else [task for part in self.what for task in part.tasks]

    def nodes(self, parent: int = -1, first: int = 0) -> list[tuple[int, int, float]]:
        if isinstance(self.what, int):
            return [(parent, self.what, 0.0)]
        nodes = [(parent, -1, self.height)]
        for part in self.what:
            nodes += part.nodes(first, first + len(nodes))
        return nodes

    def tree(self) -> Tree:
        return Tree.from_nodes(self.nodes())


def nest(tree: Tree, node: int = 0) -> Nest:
    """Read off by `parent`, `task` and `height` alone."""
    if tree.task[node] >= 0:
        return Nest(int(tree.task[node]))
    below = tuple(nest(tree, child) for child in range(len(tree)) if tree.parent[child] == node)
    return Nest(below, float(tree.height[node]))


def group(height: float, *parts: Nest | int) -> Nest:
    return Nest(tuple(Nest(part) if isinstance(part, int) else part for part in parts), height)


def sets(partition: Sequence[IntArray]) -> set[frozenset[int]]:
    return {frozenset(map(int, members)) for members in partition}


def assert_partition(partition: Sequence[IntArray], tasks: Sequence[int] | IntArray) -> None:
    assert sorted(int(task) for members in partition for task in members) == sorted(map(int, tasks))
    assert all(len(members) for members in partition)


shapes: st.SearchStrategy[Any] = st.recursive(
    st.none(), lambda inner: st.lists(inner, min_size=2, max_size=4), max_leaves=12
)


@st.composite
def nests(draw: st.DrawFn, heights: str = "falling", spread: int = 1) -> Nest:
    """Random groups of groups. Heights fall from a group to its parts, or are any, below zero too."""
    shape = draw(st.lists(shapes, min_size=2, max_size=3) | st.just([None]))
    count = str(shape).count("None")
    numbers = iter(draw(st.permutations([spread * task for task in range(count)])))

    def build(shape: Any, above: float) -> Nest:
        if shape is None:
            return Nest(next(numbers))
        low, high = (0, int(4 * above)) if heights == "falling" else (-8, 8)
        height = draw(st.integers(low, high)) / 4
        return Nest(tuple(build(part, height) for part in shape), height)

    return build(shape, 4.0)


any_nests = nests() | nests(heights="any") | nests(spread=3)


class TestNodes:
    @given(any_nests)
    @quick
    def test_a_tree_means_what_its_nodes_say(self, expected: Nest) -> None:
        assert nest(expected.tree()) == expected

    @given(any_nests)
    @quick
    def test_derived_arrays_agree_with_the_parents(self, given_nest: Nest) -> None:
        tree = given_nest.tree()
        parts = [nest(tree, node) for node in range(len(tree))]
        for node in range(len(tree)):
            above: list[int] = []
            while (parent := int(tree.parent[above[-1] if above else node])) >= 0:
                above.append(parent)
            assert tree.depth[node] == len(above)
            assert tree.size[node] == len(parts[node].tasks)
            assert tree.end[node] == node + len(parts[node].nodes())
            assert tree.order[tree.first[node] : tree.first[node] + tree.size[node]].tolist() == parts[node].tasks
            assert tree.members(node).tolist() == sorted(parts[node].tasks)
            assert tree.children[node].tolist() == [n for n in range(len(tree)) if tree.parent[n] == node]
        assert [nodes.tolist() for nodes in tree.levels] == [
            np.flatnonzero(tree.depth == level).tolist() for level in range(tree.depth.max() + 1)
        ]
        assert tree.max_depth == max(tree.depth[tree.task < 0])

    @given(any_nests)
    @quick
    def test_parents_come_first_and_subtrees_are_contiguous(self, given_nest: Nest) -> None:
        assert_preorder(given_nest.tree())

    @given(any_nests)
    @quick
    def test_each_task_is_found_at_its_own_node_below_its_path(self, given_nest: Nest) -> None:
        tree = given_nest.tree()
        assert tree.tasks.tolist() == sorted(given_nest.tasks)
        for task in given_nest.tasks:
            node, path = tree.node(task), tree.path(task)
            assert tree.task[node] == task
            assert path == [group for group in range(len(tree)) if tree.task[group] < 0 and task in tree.members(group)]
            assert path[-1] == tree.parent[node]
            assert set(tree.siblings(task)) == set(tree.members(path[-1])) - {task}

    @given(any_nests, st.integers(-3, 40))
    @quick
    def test_an_unknown_task_is_an_error(self, given_nest: Nest, task: int) -> None:
        assume(task not in given_nest.tasks)
        tree = given_nest.tree()
        lookups: list[Callable[[int], object]] = [tree.node, tree.path, tree.siblings]
        for lookup in lookups:
            with pytest.raises(GuideError, match=f"task {task} is not in the tree; it holds {len(given_nest.tasks)}"):
                lookup(task)

    def test_tasks_in_one_group(self) -> None:
        assert nest(Tree.of_tasks([2, 0, 1], 0.5)) == group(0.5, 2, 0, 1)
        assert nest(Tree.of_tasks([0])) == group(0.0, 0)

    def test_a_lone_task_has_no_groups(self) -> None:
        tree = Nest(4).tree()
        assert tree.max_depth == -1
        assert tree.order.tolist() == [4]
        assert tree.path(4) == []


def assert_preorder(tree: Tree) -> None:
    assert tree.parent[0] == -1
    assert (tree.parent[1:] >= 0).all()
    assert (tree.parent[1:] < np.arange(1, len(tree))).all()
    for node in range(len(tree)):
        assert nest(tree, node).nodes(int(tree.parent[node]), node) == [
            (tree.parent[n], tree.task[n], tree.height[n]) for n in range(node, tree.end[node])
        ]


class TestPartitions:
    @given(any_nests)
    @quick
    def test_every_level_is_a_partition_of_nodes_at_that_depth_and_tasks_above(self, given_nest: Nest) -> None:
        tree = given_nest.tree()
        for level in range(tree.max_depth + 4):
            partition = tree.groups(level)
            assert_partition(partition, given_nest.tasks)
            nodes = [n for n in range(len(tree)) if tree.depth[n] == level]
            assert sets(partition) >= {frozenset(tree.members(node).tolist()) for node in nodes}
            assert all(len(members) == 1 for members in partition) or level <= tree.max_depth
        assert sets(tree.groups(0)) == {frozenset(given_nest.tasks)}

    @given(any_nests, st.integers(-12, 20))
    @quick
    def test_a_cut_at_any_height_is_a_partition(self, given_nest: Nest, quarters: int) -> None:
        tree = given_nest.tree()
        assert_partition(tree.cut(quarters / 4), given_nest.tasks)

    @given(nests(), st.integers(0, 20))
    @quick
    def test_a_cut_takes_the_largest_groups_within_its_height(self, given_nest: Nest, quarters: int) -> None:
        tree, height = given_nest.tree(), quarters / 4

        def largest(part: Nest) -> list[Nest]:
            if isinstance(part.what, int) or part.height <= height:
                return [part]
            return [found for below in part.what for found in largest(below)]

        assert sets(tree.cut(height)) == {frozenset(part.tasks) for part in largest(given_nest)}

    @given(any_nests, st.integers(-12, 20), st.integers(0, 12))
    @quick
    def test_a_lower_cut_refines_a_higher_one(self, given_nest: Nest, quarters: int, more: int) -> None:
        tree = given_nest.tree()
        low, high = sets(tree.cut(quarters / 4)), sets(tree.cut((quarters + more) / 4))
        assert all(any(small <= large for large in high) for small in low)

    @given(any_nests, st.integers(1, 14))
    @quick
    def test_a_cut_into_k_groups_is_the_finest_with_at_most_k(self, given_nest: Nest, groups: int) -> None:
        tree = given_nest.tree()
        partition = tree.cut_into(groups)
        assert_partition(partition, given_nest.tasks)
        possible = [len(tree.cut(height)) for height in (*tree.height, *(tree.height - 0.1))]
        assert len(partition) == max(count for count in possible if count <= groups)

    def test_a_cut_into_groups_of_known_heights(self) -> None:
        tree = group(4, group(3, group(1, 0, 1), group(1, 2, 3)), group(2, 4, 5)).tree()
        everything = frozenset(range(6))
        halves = {frozenset({0, 1, 2, 3}), frozenset({4, 5})}
        thirds = {frozenset({0, 1}), frozenset({2, 3}), frozenset({4, 5})}
        assert sets(tree.cut_into(1)) == {everything}
        assert sets(tree.cut_into(2)) == halves
        assert sets(tree.cut_into(3)) == thirds
        assert sets(tree.cut_into(4)) == thirds - {frozenset({4, 5})} | {frozenset({4}), frozenset({5})}
        assert len(tree.cut_into(5)) == 4  # two groups of height 1 open together
        assert sets(tree.cut_into(6)) == sets(tree.cut_into(99)) == {frozenset({task}) for task in range(6)}

    @pytest.mark.parametrize("groups", [0, -1])
    def test_a_cut_into_no_groups_is_an_error(self, groups: int) -> None:
        with pytest.raises(GuideError, match="at least 1 is needed"):
            Tree.of_tasks([0, 1]).cut_into(groups)

    def test_families_are_cut_at_the_largest_gap_between_heights(self) -> None:
        tree = group(0.7, group(0.3, 0, group(0.2, 1, 4)), group(0.25, 2, 3), 5).tree()
        assert sets(tree.families()) == {frozenset({0, 1, 4}), frozenset({2, 3}), frozenset({5})}
        tree = group(0.7, group(0.6, group(0.1, 0, 1), 2), group(0.2, 3, 4)).tree()
        assert sets(tree.families()) == {frozenset({0, 1}), frozenset({2}), frozenset({3, 4})}

    def test_one_tight_pair_does_not_hide_the_families(self) -> None:
        """The largest gap lies right above the pair (0, 1), where all others still stand alone."""
        tree = group(0.7, group(0.45, group(0.1, 0, 1), 2), group(0.5, group(0.4, 3, 4), 5), group(0.5, 6, 7)).tree()
        assert sets(tree.families()) == {frozenset({0, 1, 2}), frozenset({3, 4, 5}), frozenset({6, 7})}

    @pytest.mark.parametrize("tree", [Tree.of_tasks([0]), Tree.of_tasks([0, 1], 0.4), Tree.of_tasks([0, 1, 2])])
    def test_a_single_group_is_one_family(self, tree: Tree) -> None:
        assert sets(tree.families()) == {frozenset(tree.tasks.tolist())}

    def test_groups_of_equal_heights_are_one_family(self) -> None:
        assert len(group(0.5, group(0.5, 0, 1), group(0.5, 2, 3)).tree().families()) == 1

    @given(any_nests)
    @quick
    def test_families_are_a_partition_whatever_the_heights(self, given_nest: Nest) -> None:
        assert_partition(given_nest.tree().families(), given_nest.tasks)


class TestChange:
    @given(nests(), st.data())
    @quick
    def test_a_subtree_means_what_its_node_meant(self, given_nest: Nest, data: st.DataObject) -> None:
        tree = given_nest.tree()
        node = data.draw(st.integers(0, len(tree) - 1))
        part = tree.subtree(node)
        assert_preorder(part)
        assert nest(part) == nest(tree, node)
        assert nest(tree) == given_nest

    @given(nests(), nests(), st.data())
    @quick
    def test_replacing_changes_one_node_and_no_other(self, given_nest: Nest, other: Nest, data: st.DataObject) -> None:
        tree = given_nest.tree()
        node = data.draw(st.integers(0, len(tree) - 1))
        numbers = iter(range(len(tree)))

        def replaced(part: Nest) -> Nest:
            if next(numbers) == node:
                return other
            if isinstance(part.what, int):
                return part
            below = []
            for child in part.what:
                below.append(replaced(child))
                if below[-1] is other:
                    for _ in range(len(child.nodes()) - 1):
                        next(numbers)
            return Nest(tuple(below), part.height)

        new = tree.replace(node, other.tree())
        assert_preorder(new)
        assert nest(new) == replaced(given_nest)
        assert nest(tree) == given_nest

    @given(nests(), st.data())
    @quick
    def test_replacing_a_node_by_itself_changes_nothing(self, given_nest: Nest, data: st.DataObject) -> None:
        tree = given_nest.tree()
        node = data.draw(st.integers(0, len(tree) - 1))
        assert nest(tree.replace(node, tree.subtree(node))) == given_nest

    @given(nests(), nests() | st.just(Nest(7)), st.integers(0, 8))
    @quick
    def test_joining_puts_both_below_a_new_root(self, left: Nest, right: Nest, height: int) -> None:
        joined = left.tree().join(right.tree(), height / 2)
        assert_preorder(joined)
        assert nest(joined) == group(height / 2, left, right)

    @given(nests())
    @quick
    def test_adopting_appends_a_child_to_the_root(self, given_nest: Nest) -> None:
        adopted = given_nest.tree().adopt(99)
        assert_preorder(adopted)
        assert isinstance(given_nest.what, tuple)
        assert nest(adopted) == group(given_nest.height, *given_nest.what, 99)


class TestChildren:
    @given(nests(), st.data())
    @quick
    def test_children_ascend_by_rank_and_then_by_number(self, given_nest: Nest, data: st.DataObject) -> None:
        tree = given_nest.tree()
        rank = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(tree), max_size=len(tree))))
        children = Children.of(tree.parent, rank)
        for node in range(len(tree)):
            expected = sorted(np.flatnonzero(tree.parent == node), key=lambda n: (rank[n], n))
            assert children[node].tolist() == expected
            assert children.count[node] == len(expected)

    def test_several_nodes_may_be_left_out(self) -> None:
        children = Children.of(np.array([-1, -1, 0, -1, 0]))
        assert [children[node].tolist() for node in range(5)] == [[2, 4], [], [], [], []]


class TestShowing:
    def test_drawing(self) -> None:
        tree = group(0.75, group(0.5, 3, group(0.125, 0, 2)), group(0.25, 1, 4), 5).tree()
        assert tree.draw(["agnews", "amazon", "dbpedia", "imdb", "yelp", "日本"]) == "\n".join(
            [
                "δ 0.750",
                "├─ δ 0.500",
                "│  ├─ imdb",
                "│  └─ δ 0.125",
                "│     ├─ agnews",
                "│     └─ dbpedia",
                "├─ δ 0.250",
                "│  ├─ amazon",
                "│  └─ yelp",
                "└─ 日本",
            ]
        )

    def test_drawing_below_a_last_child_leaves_no_rail(self) -> None:
        tree = group(1, 0, group(0.5, group(0.25, 1, 2), 3)).tree()
        assert tree.draw("abcd") == "\n".join(
            [
                "δ 1.000",
                "├─ a",
                "└─ δ 0.500",
                "   ├─ δ 0.250",
                "   │  ├─ b",
                "   │  └─ c",
                "   └─ d",
            ]
        )

    def test_drawing_one_task(self) -> None:
        assert Tree.of_tasks([0]).draw(["only"]) == "δ 0.000\n└─ only"

    @given(any_nests)
    @quick
    def test_drawing_takes_a_line_a_node_and_names_each_task_once(self, given_nest: Nest) -> None:
        tree = given_nest.tree()
        lines = tree.draw([f"<{task}>" for task in range(int(tree.task.max()) + 1)]).split("\n")
        assert len(lines) == len(tree)
        assert [line[line.index("<") :] for line in lines if "<" in line] == [f"<{task}>" for task in tree.order]
        assert [len(line) - len(line.lstrip("│├└─ ")) for line in lines] == (3 * tree.depth).tolist()

    @given(any_nests)
    @quick
    def test_data_are_enough_to_rebuild_the_nesting(self, given_nest: Nest) -> None:
        names = [f"task {task}" for task in range(99)]
        data = given_nest.tree().to_data(names)
        assert [entry["node"] for entry in data] == list(range(len(data)))

        def rebuilt(node: int) -> Nest:
            entry = data[node]
            if entry["task"] is not None:
                return Nest(names.index(entry["task"]))
            below = [rebuilt(other["node"]) for other in data if other["parent"] == node]
            assert entry["size"] == sum(data[other["node"]]["size"] for other in data if other["parent"] == node)
            assert all(other["depth"] == entry["depth"] + 1 for other in data if other["parent"] == node)
            return Nest(tuple(below), entry["height"])

        assert rebuilt(0) == given_nest
        assert (data[0]["parent"], data[0]["depth"]) == (-1, 0)


class TestState:
    @given(any_nests)
    @quick
    def test_a_tree_comes_back_from_its_state(self, given_nest: Nest) -> None:
        assert nest(Tree.from_state(given_nest.tree().state_dict())) == given_nest

    def test_state_shares_no_memory_with_the_tree(self) -> None:
        expected = group(0.5, 0, group(0.25, 1, 2))
        tree = expected.tree()
        state = tree.state_dict()
        again = Tree.from_state(state)
        for tensor in state.values():
            tensor.zero_()
        assert nest(tree) == nest(again) == expected

    def test_state_is_three_tensors(self) -> None:
        state = group(0.5, 0, 1).tree().state_dict()
        assert {name: (value.dtype, value.tolist()) for name, value in state.items()} == {
            "parent": (torch.int64, [-1, 0, 0]),
            "task": (torch.int64, [-1, 0, 1]),
            "height": (torch.float64, [0.5, 0.0, 0.0]),
        }
