import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from treelora_ray.core.errors import LayoutError
from treelora_ray.core.layout import Layout

# Grouped-query attention: q and v of different sizes in turn, each an A and a B factor.
GQA = {
    "0.q": ((2, 3), (3, 2)),
    "0.v": ((2, 3), (1, 2)),
    "1.q": ((2, 3), (3, 2)),
    "1.v": ((2, 3), (1, 2)),
}

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
layers = st.lists(shapes, min_size=1, max_size=3).map(tuple)
layouts = st.lists(layers, min_size=1, max_size=7).map(
    lambda s: Layout(tuple(f"m{i}" for i in range(len(s))), tuple(s))
)
check = settings(deadline=None, max_examples=40)


def gqa() -> Layout:
    return Layout(tuple(GQA), tuple(GQA.values()))


def tensors_of(layout: Layout) -> dict[str, tuple[Tensor, ...]]:
    """Every value another number, in forward order."""
    numbers = iter(torch.arange(1.0, layout.total + 1).split(1))
    return {
        name: tuple(torch.cat([next(numbers) for _ in range(torch.Size(s).numel())]).view(s) for s in parts)
        for name, parts in zip(layout.names, layout.shapes, strict=True)
    }


def parameters_of(layout: Layout, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    return {name: [nn.Parameter(part.to(dtype)) for part in parts] for name, parts in tensors_of(layout).items()}


@check
@given(layouts)
def test_flatten_then_views_gives_every_tensor_back(layout: Layout) -> None:
    tensors = tensors_of(layout)
    flat = layout.flatten(tensors)
    assert flat.dtype == torch.float32
    assert sorted(flat.tolist()) == list(range(1, layout.total + 1))
    views = dict(layout.views(flat))
    assert tuple(views) == layout.names
    for name, parts in tensors.items():
        assert all(torch.equal(view, part) for view, part in zip(views[name], parts, strict=True))


@check
@given(layouts)
def test_each_segment_is_its_layers_values_and_an_alias(layout: Layout) -> None:
    tensors = tensors_of(layout)
    flat = torch.stack([layout.flatten(tensors), -layout.flatten(tensors)])
    for i, name in enumerate(layout.names):
        expected = torch.cat([part.flatten() for part in tensors[name]])
        assert torch.equal(layout.segment(flat, i), torch.stack([expected, -expected]))
        layout.segment(flat, i).zero_()
    assert not flat.any()


@check
@given(layouts)
def test_blocks_partition_the_layers_and_the_vector(layout: Layout) -> None:
    assert sorted(i for block in layout.blocks for i in block.layers) == list(range(len(layout)))
    assert layout.blocks[0].start == 0
    assert layout.blocks[-1].stop == layout.total == sum(layout.sizes)
    for before, block in zip(layout.blocks, layout.blocks[1:], strict=False):
        assert before.stop == block.start
    sizes = [block.size for block in layout.blocks]
    assert len(set(sizes)) == len(sizes)
    for block in layout.blocks:
        assert {layout.sizes[i] for i in block.layers} == {block.size}
        rows = block.view(torch.arange(layout.total))
        for row, i in zip(rows, block.layers, strict=True):
            assert torch.equal(row, layout.segment(torch.arange(layout.total), i))


def test_layers_of_one_size_stand_together_whatever_their_order() -> None:
    assert gqa().sizes == (12, 8, 12, 8)
    assert gqa().offsets == (0, 24, 12, 32)


@check
@given(layouts, st.integers(0, 2))
def test_per_layer_equals_a_loop_over_layers(layout: Layout, extra: int) -> None:
    x = torch.randn(*[2] * extra, layout.total)
    y = torch.randn(layout.total)
    found = layout.per_layer(lambda a, b: (a * b).sum(-1), x, y)
    loop = [(layout.segment(x, i) * layout.segment(y, i)).sum(-1) for i in range(len(layout))]
    torch.testing.assert_close(found, torch.stack(loop, -1))


@check
@given(layouts)
def test_scale_and_pick_equal_a_loop_over_layers(layout: Layout) -> None:
    flat, factors = torch.randn(3, layout.total), torch.randn(3, len(layout))
    expected = flat.clone()
    for i in range(len(layout)):
        layout.segment(expected, i).mul_(factors[:, i, None])
    assert layout.scale_(flat, factors) is flat
    assert torch.equal(flat, expected)
    for number, block in enumerate(layout.blocks):
        assert torch.equal(layout.pick(factors, number), factors[:, list(block.layers)])


def test_a_single_tensor_a_layer_needs_no_tuple() -> None:
    tensors = {"a": torch.randn(2, 2), "b": torch.randn(3)}
    layout = Layout.of(tensors)
    assert layout == Layout(("a", "b"), (((2, 2),), ((3,),)))
    assert torch.equal(layout.flatten(tensors), torch.cat([tensors["a"].flatten(), tensors["b"]]))
    assert Layout.of_sizes([2, 5]) == Layout(("layer0", "layer1"), (((2,),), ((5,),)))
    assert Layout.of_sizes([2, 5], ["x", "y"]).names == ("x", "y")


def test_flatten_writes_into_out_and_leaves_autograd_alone() -> None:
    layout = gqa()
    out = torch.empty(layout.total, dtype=torch.float64)
    assert layout.flatten(parameters_of(layout), out) is out
    assert torch.equal(out, layout.flatten(tensors_of(layout)).double())
    assert not out.requires_grad


# -- bind


def test_bound_parameters_and_gradients_share_memory_with_the_flat_vectors() -> None:
    layout, parameters = gqa(), parameters_of(gqa())
    before = layout.flatten(parameters)
    theta, grad = layout.bind(parameters)
    assert torch.equal(theta, before)
    assert torch.equal(grad, torch.zeros(layout.total))
    theta.mul_(2)
    grad.copy_(torch.arange(layout.total))
    assert torch.equal(layout.flatten(parameters), 2 * before)
    grads = {name: [p.grad for p in parts if p.grad is not None] for name, parts in parameters.items()}
    assert torch.equal(layout.flatten(grads), grad)


def test_an_optimizer_step_on_bound_parameters_moves_theta() -> None:
    parameters = parameters_of(gqa())
    every = [part for parts in parameters.values() for part in parts]
    optimizer = torch.optim.SGD(every, lr=0.5)
    theta, grad = gqa().bind(parameters)
    before = theta.clone()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        torch.stack([part.square().sum() for part in every]).sum().backward()
        assert torch.equal(grad, 2 * theta)  # both passes: zeroing in place keeps the binding
        optimizer.step()
    assert torch.equal(theta, torch.zeros_like(before))  # x - 0.5 * 2x


def test_backward_accumulates_into_the_flat_gradient_and_keeps_what_was_there() -> None:
    layout, parameters = gqa(), parameters_of(gqa())
    parameters["0.q"][0].grad = torch.full((2, 3), 7.0)
    _, grad = layout.bind(parameters)
    for _ in range(2):
        torch.stack([part.sum() for parts in parameters.values() for part in parts]).sum().backward()
    expected = torch.full((layout.total,), 2.0)
    layout.segment(expected, 0)[:6] += 7
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_binding_keeps_the_parameters_dtype_and_bits(dtype: torch.dtype) -> None:
    parameters = {"a": nn.Parameter(torch.tensor([0.1, 1 / 3], dtype=dtype))}
    before = parameters["a"].detach().clone()
    theta, grad = Layout.of(parameters).bind(parameters)
    assert theta.dtype == grad.dtype == parameters["a"].dtype == dtype
    assert torch.equal(parameters["a"].detach(), before)


# -- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1.q": None}, "layer '1.q' is missing; given: 0.q, 0.v, 1.v"),
        ({"2.q": (torch.ones(1),)}, "layer '2.q' is not in the layout; it has: 0.q, 0.v, 1.q, 1.v"),
        (
            {"0.v": (torch.ones(2, 3), torch.ones(2, 1))},
            r"layer '0.v' has shapes \[\(2, 3\), \(2, 1\)\], .* \(1, 2\)\]",
        ),
        ({"0.v": torch.ones(2, 3)}, r"layer '0.v' has shapes \[\(2, 3\)\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, tuple[Tensor, ...] | None], message: str) -> None:
    tensors = {k: v for k, v in (tensors_of(gqa()) | change).items() if v is not None}
    for call in (gqa().check, gqa().flatten, gqa().bind):
        with pytest.raises(LayoutError, match=message):
            call(tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_values_that_are_not_finite_are_counted_and_their_layer_named(value: float, layer: int) -> None:
    layout, flat = gqa(), torch.zeros(gqa().total)
    layout.require_flat(flat, "gradient")
    layout.segment(flat, layer)[1:3] = value
    with pytest.raises(LayoutError, match=f"gradient has 2 NaN or infinite values in layer '{layout.names[layer]}'"):
        layout.require_flat(flat, "gradient")


@pytest.mark.parametrize("shape", [(39,), (41,), (1, 40), ()])
def test_a_vector_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    message = rf"theta has shape \[{', '.join(map(str, shape))}\], .* \[40\] \(4 layers: 0.q=12, 0.v=8, 1.q=12, ...\)"
    with pytest.raises(LayoutError, match=message):
        gqa().require_flat(torch.zeros(shape), "theta")
    with pytest.raises(LayoutError, match=r"\(2 layers: layer0=1, layer1=2\)"):
        Layout.of_sizes([1, 2]).require_flat(torch.zeros(4), "theta")


def test_a_layout_needs_named_layers_with_values() -> None:
    with pytest.raises(LayoutError, match="given twice: a, b"):
        Layout.of_sizes([1] * 5, ["b", "a", "b", "a", "c"])
    with pytest.raises(LayoutError, match="a layout needs layers: got 0 names, 0 shapes"):
        Layout((), ())
    with pytest.raises(LayoutError, match="got 2 names, 1 shapes"):
        Layout(("a", "b"), (((1,),),))
    with pytest.raises(LayoutError, match="layer 'empty' has no values"):
        Layout(("a", "empty"), (((1,),), ((0, 3),)))


# -- identity


@check
@given(layouts)
def test_a_layout_survives_json(layout: Layout) -> None:
    back = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert back == layout
    assert back.digest == layout.digest
    assert back.offsets == layout.offsets
    assert layout.first_difference(back) is None


def test_the_digest_knows_names_shapes_and_order() -> None:
    layout = gqa()
    others = [
        replace(layout, names=("0.q", "0.v", "1.q", "1.w")),
        replace(layout, names=layout.names[::-1]),
        replace(layout, shapes=(((2, 3), (2, 3)), *layout.shapes[1:])),
        Layout(layout.names[:3], layout.shapes[:3]),
    ]
    assert len({layout.digest, *(other.digest for other in others)}) == 5


def test_the_first_difference_is_said_in_words() -> None:
    layout = Layout.of_sizes([2, 3], ["a", "b"])
    shorter, other = Layout.of_sizes([2], ["a"]), Layout.of_sizes([2, 4], ["a", "b"])
    assert layout.first_difference(other) == "layer 1 is 'b' [[3]] here and 'b' [[4]] there"
    assert layout.first_difference(shorter) == "layer 1 is 'b' [[3]] here and missing there"
    assert shorter.first_difference(layout) == "layer 1 is missing here and 'b' [[3]] there"
    renamed = Layout.of_sizes([2, 3], ["z", "b"])
    assert layout.first_difference(renamed) == "layer 0 is 'a' [[2]] here and 'z' [[2]] there"


def test_parameters_of_several_dtypes_are_not_bound() -> None:
    parts = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(LayoutError, match=r"must share one dtype and device, got .*float32.*float64"):
        Layout.of(parts).bind(parts)
