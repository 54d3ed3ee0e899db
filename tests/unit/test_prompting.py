"""Prompts within an encoder: against attention written out, for every kind of encoder that takes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from tests import tiny, toys
from treelora_ray.models.backbone import Model, load_model
from treelora_ray.models.errors import ModelError
from treelora_ray.models.prompting import KNOWN, Inserted, Prompting, widened

SMALL = {
    "hidden_size": 16, "dim": 16, "num_hidden_layers": 2, "n_layers": 2, "num_attention_heads": 2, "n_heads": 2,
    "intermediate_size": 32, "hidden_dim": 32, "mlp_ratio": 2, "vocab_size": 40, "max_position_embeddings": 30,
    "embedding_size": 8, "image_size": 8, "patch_size": 4, "num_channels": 1,
}  # fmt: skip
TEXTS = ["good film", "the book is not very good a film", "bad"]


def encoder(kind: str) -> Any:
    config = AutoConfig.for_model(kind)
    for name in SMALL.keys() & config.to_dict().keys():
        setattr(config, name, SMALL[name])
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def given(net: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if net.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 1, 8, 8)}
    return {"input_ids": torch.randint(3, 40, (2, 5))}


def stand_in(net: Any) -> Any:
    outer = SimpleNamespace(base_model=SimpleNamespace(model=net))
    return SimpleNamespace(net=outer, config=SimpleNamespace(backbone=net.config.model_type), is_plain=False)


@pytest.mark.parametrize("kind", KNOWN)
def test_a_prefix_of_a_samples_own_keys_and_values_changes_nothing(kind: str) -> None:
    """Whatever is attended to twice has the same share; so heads, scale and order must be right."""
    net, says = encoder(kind), Inserted()
    prompting = Prompting(stand_in(net), lambda _: says)
    inputs = given(net)
    seen: list[Tensor] = []
    parts = [part for block in prompting.blocks for part in (block.key, block.value)]
    hooks = [part.register_forward_hook(lambda *a: seen.append(a[2])) for part in parts]
    with torch.no_grad():
        plain = net(**inputs).last_hidden_state
        for hook in hooks:
            hook.remove()
        says = Inserted(prefixes={n: (seen[2 * n], seen[2 * n + 1]) for n in range(2)})
        prompting.begin(inputs)
        torch.testing.assert_close(net(**inputs).last_hidden_state, plain, rtol=0, atol=1e-5)
        says = Inserted(prefixes={1: (seen[2], -seen[3])})
        prompting.begin(inputs)
        assert not torch.allclose(net(**inputs).last_hidden_state, plain, atol=1e-3)


def prompted(folder: Path, kind: str, says: Inserted, **changes: Any) -> Model:
    made = toys.config((tiny.vit if kind == "image" else tiny.bert)(folder), model={"max_length": 32, **changes})
    model = load_model(made.model, kind, 0)
    model.prompting = Prompting(model, lambda _: says)
    return model


def of_each(count: int, tokens: int, rows: int) -> Inserted:
    """Other tokens before each sample, other rows in each block."""
    draw = torch.Generator().manual_seed(3)
    prefixes = {n: tuple(torch.randn(count, rows, 16, generator=draw) for _ in range(2)) for n in range(2)}
    found = torch.randn(count, tokens, 16, generator=draw) if tokens else None
    return Inserted(found, prefixes if rows else {})  # type: ignore[arg-type]


def one_of(says: Inserted, place: int) -> Inserted:
    """What stands before one of the samples."""
    part = slice(place, place + 1)
    tokens = None if says.tokens is None else says.tokens[part]
    return Inserted(tokens, {n: (k[part], v[part]) for n, (k, v) in says.prefixes.items()})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("tokens", "rows"), [(3, 0), (0, 2), (3, 2)])
def test_texts_of_different_lengths_say_together_what_each_says_alone(
    attention: str, tokens: int, rows: int, tmp_path: Path
) -> None:
    says = of_each(3, tokens, rows)
    model = prompted(tmp_path, "text", says, attention=attention)
    assert model.prompting is not None
    with torch.no_grad():
        together = model.features(model.inputs({"text": TEXTS}))
        for place, text in enumerate(TEXTS):
            model.prompting.prompt = lambda _, place=place: one_of(says, place)  # type: ignore[misc]
            alone = model.features(model.inputs({"text": [text]}))
            torch.testing.assert_close(alone[0], together[place], rtol=0, atol=1e-5)


def test_tokens_stand_before_those_of_the_input_and_their_mean_is_the_feature(tmp_path: Path) -> None:
    says = of_each(4, 3, 0)
    model = prompted(tmp_path, "image", says)
    inputs, net = model.inputs(toys.images(0, 4, 0).take(range(4))), model.net.base_model.model
    assert says.tokens is not None
    with torch.no_grad():
        model.prompting.now = None  # type: ignore[union-attr]
        hidden = torch.cat([says.tokens, net.embeddings(inputs["pixel_values"])], dim=1)
        for layer in net.layers:
            hidden = layer(hidden, None)
        expected = net.layernorm(hidden)[:, :3].mean(1)
        torch.testing.assert_close(model.features(inputs), expected, rtol=0, atol=1e-5)


def test_without_adapters_there_is_no_prompt_either(tmp_path: Path) -> None:
    model = prompted(tmp_path, "image", of_each(4, 3, 2))
    inputs = model.inputs(toys.images(0, 4, 0).take(range(4)))
    with torch.no_grad():
        said = model.features(inputs)
        with model.plain():
            plain = model.features(inputs)
        assert torch.equal(model.features(inputs), said)
        model.prompting = None
    assert torch.equal(load_model(model.config, "image", 0).features(inputs), plain)
    assert not torch.allclose(said, plain, atol=1e-3)


def test_gradients_are_the_same_with_checkpointing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        tokens, rows = torch.ones(1, 2, 16, requires_grad=True), torch.ones(1, 2, 16, requires_grad=True)
        says = Inserted(tokens, {1: (rows, 2 * rows)})
        model = prompted(tmp_path, "image", says, gradient_checkpointing=checkpointing)
        weights = torch.arange(16.0)
        (model.features(model.inputs(toys.images(0, 4, 0).take(range(4)))) @ weights).sum().backward()
        assert tokens.grad is not None
        assert rows.grad is not None
        found.append((tokens.grad, rows.grad))
    for one, other in zip(*found, strict=True):
        assert torch.count_nonzero(one)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_models_whose_places_are_not_in_the_embedding_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"^beit is a model of type 'beit', into which .* types take them: bert, .*vit"
    ):
        Prompting(stand_in(encoder("beit")), lambda _: Inserted())


def test_masks_of_padding_show_what_stands_in_front() -> None:
    assert widened(None, 2) is None
    mask = torch.tensor([[1, 0]])
    assert widened(mask, 2).tolist() == [[1, 1, 1, 0]]  # type: ignore[union-attr]
    seen = torch.tensor([True, False]).expand(1, 1, 2, 2)
    assert widened(seen, 1)[0, 0].tolist() == [[True, True, False]] * 3  # type: ignore[index]
    added = torch.tensor([0.0, -9.0]).expand(1, 1, 2, 2)
    assert widened(added, 1)[0, 0].tolist() == [[0.0, 0.0, -9.0]] * 3  # type: ignore[index]
    with pytest.raises(ModelError, match=r"set model\.attention to sdpa or eager"):
        widened(torch.zeros(1, 2, 2), 1)
