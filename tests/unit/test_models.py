import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tests import tiny
from treelora_ray.config import ModelConfig
from treelora_ray.models.adapters import load_exported
from treelora_ray.models.backbone import CausalModel, Model, TextModel, backbone_digest, load_model
from treelora_ray.models.errors import ModelError

MAKERS = {"image": tiny.vit, "text": tiny.bert, "prompt": tiny.llama}
PICTURES = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
ROWS: dict[str, dict[str, list[Any]]] = {
    "image": {"image": list(PICTURES)},
    "text": {"text": ["good film", "a very bad book is not the answer", "red"]},
    "prompt": {"prompt": ["what colour", "sum of one and two", "yes"]},
}
KINDS = pytest.mark.parametrize("kind", list(MAKERS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: maker(tmp_path_factory.mktemp(kind)) for kind, maker in MAKERS.items()}


def model(folders: dict[str, Path], kind: str, seed: int = 0, **changes: Any) -> Model:
    return load_model(
        ModelConfig.model_validate({"backbone": str(folders[kind]), "max_length": 48, **changes}), kind, seed
    )


def stir(made: Model) -> None:
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(1)
    for _, b in made.layers.values():
        b.data.copy_(torch.randn(b.shape, generator=generator))


@KINDS
def test_only_adapters_are_trained_and_they_stand_in_forward_order(kind: str, folders: dict[str, Path]) -> None:
    made = model(folders, kind)
    trained = {id(p) for p in made.net.parameters() if p.requires_grad}
    assert trained == {id(part) for pair in made.layers.values() for part in pair}
    ends = [name.split(".")[-1] for name in made.layers]
    assert ends in (["q_proj", "v_proj"] * 2, ["query", "value"] * 2)
    seen: list[str] = []
    for name in made.layers:
        made.linear(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    made.features(made.inputs(ROWS[kind]))
    assert seen == list(made.layers)


@KINDS
def test_adapters_are_drawn_from_the_seed_and_the_global_state_is_left_alone(
    kind: str, folders: dict[str, Path]
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = model(folders, kind, 3), model(folders, kind, 3), model(folders, kind, 4)
    assert torch.equal(torch.get_rng_state(), before)
    for name, (a, b) in one.layers.items():
        assert not b.any()
        assert a.abs().max() <= a.shape[1] ** -0.5
        assert torch.equal(a, same.layers[name][0])
        assert not torch.equal(a, other.layers[name][0])


@KINDS
def test_features_are_those_of_the_frozen_model_until_an_adapter_says_more(kind: str, folders: dict[str, Path]) -> None:
    made = model(folders, kind)
    inputs = made.inputs(ROWS[kind])
    frozen = made.features(inputs)
    assert frozen.shape == (len(next(iter(ROWS[kind].values()))), made.width)
    stir(made)
    changed = made.features(inputs)
    assert not torch.allclose(frozen, changed, atol=1e-3)
    with made.plain():
        with made.plain():
            assert torch.equal(made.features(inputs), frozen)
        assert torch.equal(made.features(inputs), frozen)
    assert torch.equal(made.features(inputs), changed)
    assert all(part.requires_grad for pair in made.layers.values() for part in pair)


@KINDS
def test_an_exported_adapter_gives_the_same_outputs_in_plain_peft(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    made = model(folders, kind)
    stir(made)
    made.export(tmp_path / "adapter", made.layers)
    loader = transformers.AutoModelForCausalLM if kind == "prompt" else transformers.AutoModel
    more = {"add_pooling_layer": False} if kind != "prompt" else {}
    base = loader.from_pretrained(folders[kind], **more)
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = made.inputs(ROWS[kind])
    name = "logits" if kind == "prompt" else "last_hidden_state"
    with torch.no_grad():
        assert torch.equal(getattr(plain(**inputs), name), getattr(made.net(**inputs), name))
    for layer, (a, b) in load_exported(tmp_path / "adapter").items():
        assert torch.equal(a, made.layers[layer][0])
        assert torch.equal(b, made.layers[layer][1])
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folders[kind]
    )


@KINDS
def test_bfloat16_weights_train_float32_adapters(kind: str, folders: dict[str, Path]) -> None:
    made = model(folders, kind, dtype="bfloat16")
    stir(made)
    with made.autocast("bf16"):
        made.features(made.inputs(ROWS[kind])).square().mean().backward()
    for a, b in made.layers.values():
        assert a.dtype == b.dtype == torch.float32
        assert a.grad is not None
        assert torch.isfinite(a.grad).all()
        assert a.grad.any()


@KINDS
def test_checkpointed_gradients_are_the_gradients(kind: str, folders: dict[str, Path]) -> None:
    grads = []
    for checkpointing in (False, True):
        made = model(folders, kind, gradient_checkpointing=checkpointing)
        stir(made)
        made.features(made.inputs(ROWS[kind])).square().mean().backward()
        grads.append(
            torch.cat([part.grad.flatten() for pair in made.layers.values() for part in pair if part.grad is not None])
        )
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].any()


@KINDS
def test_the_digest_sees_a_changed_weight_and_no_adapter(kind: str, folders: dict[str, Path]) -> None:
    made = model(folders, kind)
    before = backbone_digest(made)
    stir(made)
    assert backbone_digest(made) == before
    made.linear(next(iter(made.layers))).weight.data[0, 0] += 1
    assert backbone_digest(made) != before


def test_dropout_is_that_of_adapters_and_only_when_training(folders: dict[str, Path]) -> None:
    made = model(folders, "image", lora={"dropout": 0.5})
    stir(made)
    inputs = made.inputs(ROWS["image"])
    assert torch.equal(made.features(inputs), made.features(inputs))
    made.train(True)
    assert not torch.equal(made.features(inputs), made.features(inputs))
    with made.plain():
        assert torch.equal(made.features(inputs), made.features(inputs))


def test_pictures_of_the_models_size_are_read_as_the_processor_reads_them(folders: dict[str, Path]) -> None:
    made = model(folders, "image")
    straight = made.inputs(ROWS["image"])["pixel_values"]
    processor = transformers.AutoImageProcessor.from_pretrained(folders["image"], backend="pil")
    rgb = processor(images=[p[:, :, None] for p in PICTURES], return_tensors="pt", input_data_format="channels_last")
    torch.testing.assert_close(straight, rgb["pixel_values"])


def test_pictures_of_another_size_are_resized(folders: dict[str, Path]) -> None:
    large = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert model(folders, "image").inputs({"image": [large]})["pixel_values"].shape == (1, 1, 8, 8)


def causal(folders: dict[str, Path], **changes: Any) -> CausalModel:
    made = model(folders, "prompt", **changes)
    assert isinstance(made, CausalModel)
    return made


def test_labels_are_the_answer_and_its_end_alone(folders: dict[str, Path]) -> None:
    made = causal(folders)
    inputs = made.encode(["what colour is", "one"], ["red", "two and three"])
    words = made.tokenizer.convert_ids_to_tokens
    shown = [[words(int(i)) for i in row[row >= 0]] for row in inputs["labels"]]
    assert shown == [["red", "[EOS]"], ["two", "and", "three", "[EOS]"]]
    assert inputs["attention_mask"].sum(1).tolist() == [5, 5]
    kept = inputs["labels"] >= 0
    assert torch.equal(inputs["labels"][kept], inputs["input_ids"][kept])


def test_a_long_prompt_is_cut_from_its_left_and_an_answer_never_before(folders: dict[str, Path]) -> None:
    made = causal(folders, max_length=5)
    inputs = made.encode(["one one one two three"], ["red blue"])
    words = made.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert words == ["two", "three", "red", "blue", "[EOS]"]
    assert made.truncated == 1
    with pytest.raises(ModelError, match=r"a text has 8 tokens, more than model.max_length 5"):
        causal(folders, max_length=5, on_long="fail").encode(["one one one two three"], ["red blue"])


def test_generation_is_greedy_and_does_not_depend_on_the_batch(folders: dict[str, Path]) -> None:
    made = causal(folders)
    stir(made)
    prompts = [*ROWS["prompt"]["prompt"], "what is the sum of three and three", "a"]
    together = made.generate(prompts, 6)
    assert together == [made.generate([prompt], 6)[0] for prompt in prompts]
    assert together == made.generate(prompts[::-1], 6)[::-1]
    ids = made.inputs({"prompt": prompts[:1]})["input_ids"]
    for _ in range(6):
        ids = torch.cat([ids, made.net(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    new = ids[0, -6:].tolist()
    new = new[: new.index(made.end)] if made.end in new else new
    assert together[0] == made.tokenizer.decode(new, skip_special_tokens=True)


def test_text_features_do_not_depend_on_padding(folders: dict[str, Path]) -> None:
    made = model(folders, "text")
    stir(made)
    together = made.features(made.inputs(ROWS["text"]))
    alone = torch.cat([made.features(made.inputs({"text": [text]})) for text in ROWS["text"]["text"]])
    torch.testing.assert_close(together, alone)


def test_long_texts_are_cut_and_counted(folders: dict[str, Path]) -> None:
    made = model(folders, "text", max_length=3)
    assert isinstance(made, TextModel)
    assert made.inputs(ROWS["text"])["input_ids"].shape == (3, 3)
    assert made.truncated == 1


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("image", {"backbone": "/no/such/folder"}, "is no folder: check the path"),
        ("image", {"backbone": "builtin:other"}, "'builtin:other' is unknown; built in is builtin:digits-vit"),
        ("text", {"backbone": "builtin:digits-vit"}, "sees images, but the stream is of kind text"),
        ("text", {"max_length": 65}, "model.max_length is 65, but .* takes 64 tokens at most"),
        ("image", {"lora": {"targets": ["q_proj", "nix"]}}, "'nix', which no linear module ends in; these do: fc1"),
        ("image", {"lora": {"layers": [1, 7]}}, r"has \[7\], the model's blocks with targets are \[0, 1\]"),
        ("image", {"device": "cuda:3"}, "torch sees no CUDA device here"),
        ("image", {"device": "toaster"}, "is no device of torch"),
        ("image", {"quantize": "4bit"}, "4bit, which is not supported"),
        ("image", {"shard": "fsdp"}, "fsdp, which is not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_told(kind: str, changes: dict[str, Any], says: str, folders: dict[str, Path]) -> None:
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ModelError, match=says):
        model(folders, kind, **changes)


@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        ("image", "config.json"),
        ("image", "model.safetensors"),
        ("image", "preprocessor_config.json"),
        ("text", "tokenizer.json"),
    ],
)
def test_an_incomplete_folder_says_what_it_lacks(kind: str, gone: str, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path)
    (tmp_path / gone).unlink()
    name = r"\*.safetensors" if gone.endswith("safetensors") else gone
    with pytest.raises(ModelError, match=f"is incomplete: it lacks .*{name}"):
        model({kind: tmp_path}, kind)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    tiny.vit(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled files only, which can run code .* convert them"):
        model({"image": tmp_path}, "image")


def test_adapters_can_be_kept_to_some_blocks(folders: dict[str, Path]) -> None:
    made = model(folders, "image", lora={"layers": [1], "targets": ["fc1"]})
    assert list(made.layers) == ["layers.1.mlp.fc1"]


def test_loading_prints_nothing(folders: dict[str, Path]) -> None:
    code = (
        "from treelora_ray.config import ModelConfig; from treelora_ray.models.backbone import load_model; "
        f"load_model(ModelConfig(backbone={str(folders['text'])!r}, max_length=8), 'text', 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
