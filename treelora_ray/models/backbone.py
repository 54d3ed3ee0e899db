"""Frozen transformers models with LoRA adapters: one class for each kind of stream.

`net` is peft's wrapper of the transformers model; only its LoRA tensors are trained. The backbone stays in
evaluation mode always, so that features do not depend on chance; `train` switches the dropout of adapters alone.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from treelora_ray.config import ModelConfig
from treelora_ray.models import adapters
from treelora_ray.models.errors import ModelError
from treelora_ray.models.kept import Backbones
from treelora_ray.models.loading import folder_of, from_pretrained
from treelora_ray.models.prompting import Prompting

Inputs = dict[str, Tensor]


class Model:
    kind = ""
    task_type: str | None = None

    def __init__(self, net: Any, config: ModelConfig, seed: int) -> None:
        self.config, self.device = config, _device(config.device)
        net.requires_grad_(False)
        net.eval().to(self.device)
        self.backbone = net
        self.width = int(getattr(net.config, "hidden_size", 0) or net.config.get_text_config().hidden_size)
        self.truncated = 0
        self.digest = ""  # of the frozen model, where runs share it
        self.asked: Callable[[Inputs], None] | None = None  # told what is to be answered, before each pass that does
        targets = adapters.find_targets(net, config.lora)
        order = adapters.forward_order(net, targets, lambda: net(**self.probe()))
        self.net = adapters.inject(net, config.lora, order, self.task_type, seed).eval()
        self.layers = {name: adapters.factors(self.net, name) for name in order}
        self.scaling = float(self.net.base_model.model.get_submodule(order[0]).scaling[adapters.NAME])
        if config.gradient_checkpointing:
            self._checkpoint_gradients()
        self._off = 0
        self.prompting: Prompting | None = None  # what a method puts into the encoder

    def probe(self) -> Inputs:
        """The smallest input the model takes."""
        raise NotImplementedError

    def inputs(self, rows: Mapping[str, Sequence[Any]]) -> Inputs:
        raise NotImplementedError

    def features(self, inputs: Inputs) -> Tensor:
        """[B, d]; where a prompt's tokens stand before those of the inputs, the mean of what becomes of them."""
        raise NotImplementedError

    def embedded(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """[B, T, e] tokens as they enter the frozen model, without places; [B, T] which ask: no padding, no answer."""
        ids = inputs["input_ids"]
        asks = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        if "labels" in inputs:
            asks = asks & (inputs["labels"] < 0)
        return self._embed(ids), asks

    @torch.no_grad()
    def _embed(self, values: Tensor) -> Any:
        return self.backbone.get_input_embeddings()(values)

    def _tell(self, inputs: Inputs) -> None:
        if self.asked is not None:
            self.asked(inputs)

    def encoded(self, inputs: Inputs) -> tuple[Tensor, int]:
        """[B, n + T, d] what the last block says, and how many tokens n of a prompt stand first."""
        self._tell(inputs)
        tokens = 0 if self.prompting is None else self.prompting.begin(inputs)
        hidden: Tensor = self.net(**inputs).last_hidden_state
        return hidden, tokens

    def _checkpoint_gradients(self) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.backbone.enable_input_require_grads()
        for module in self.backbone.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # it works in training mode only; what lies within stays as it is

    def train(self, mode: bool) -> None:
        """Dropout of the adapters, on or off."""
        if not self.config.lora.dropout:
            return
        for name in self.layers:
            self.linear_with_adapter(name).lora_dropout.train(mode)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Within it no dropout, whatever it was before."""
        dropouts = [self.linear_with_adapter(name).lora_dropout for name in self.layers]
        before = [dropout.training for dropout in dropouts]
        self.train(False)
        try:
            yield
        finally:
            for dropout, mode in zip(dropouts, before, strict=True):
                dropout.train(mode)

    def linear_with_adapter(self, name: str) -> Any:
        return self.net.base_model.model.get_submodule(name)

    def linear(self, name: str) -> Any:
        """The frozen module below an adapter."""
        return self.linear_with_adapter(name).base_layer

    def transposed(self, name: str) -> bool:
        """Whether its weight is stored as [d_in, d_out]."""
        return not isinstance(self.linear(name), nn.Linear)

    @property
    def is_plain(self) -> bool:
        return self._off > 0

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within it the adapters are off."""
        self._off += 1
        if self._off == 1:
            self._switch(True)
        try:
            yield
        finally:
            self._off -= 1
            if self._off == 0:
                self._switch(False)

    def _switch(self, off: bool) -> None:
        for name in self.layers:
            # Not `enable_adapters`, which would also say which tensors require gradients.
            self.linear_with_adapter(name)._disable_adapters = off

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def export(self, folder: Path, parts: adapters.Factors) -> None:
        adapters.export(self.net, folder, parts, self.config.backbone, self.scaling)

    def to_device(self, inputs: Mapping[str, Any]) -> Inputs:
        """From pinned memory, of which a GPU takes its copy while the host goes on."""
        found = {name: torch.as_tensor(value) for name, value in inputs.items()}
        if self.device.type == "cuda":
            found = {name: value.pin_memory() for name, value in found.items()}
        return {name: value.to(self.device, non_blocking=True) for name, value in found.items()}


class ImageModel(Model):
    kind = "image"

    def __init__(self, net: Any, processor: Any, config: ModelConfig, seed: int) -> None:
        self.processor = processor
        size = getattr(net.config, "image_size", 224)
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.channels = int(getattr(net.config, "num_channels", 3))
        self.pooling = "cls" if config.pooling == "auto" else config.pooling
        super().__init__(net, config, seed)

    def probe(self) -> Inputs:
        shape = (1, self.channels, *self.size)
        return {"pixel_values": torch.zeros(shape, dtype=self.backbone.dtype, device=self.device)}

    def inputs(self, rows: Mapping[str, Sequence[Any]]) -> Inputs:
        from treelora_ray.data.images import decode

        pictures = [decode(value) for value in rows["image"]]
        fits = (*self.size, self.channels)
        if all(isinstance(picture, np.ndarray) and (*picture.shape, 1)[:3] == fits for picture in pictures):
            return self._straight(np.stack([np.asarray(picture) for picture in pictures]).reshape(len(pictures), *fits))
        mode = "L" if self.channels == 1 else "RGB"
        arrays = [np.atleast_3d(np.asarray(_image(picture).convert(mode))) for picture in pictures]
        done = self.processor(images=arrays, return_tensors="np", input_data_format="channels_last")
        pixels = np.asarray(done["pixel_values"], dtype=np.float32)
        return self.to_device({"pixel_values": torch.from_numpy(pixels).to(self.backbone.dtype)})

    def _straight(self, pixels: np.ndarray[Any, Any]) -> Inputs:
        """[B, H, W, C] bytes of the model's own size: rescaled and normalised as the processor does."""
        processor = self.processor
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        if processor.do_rescale:
            x = x * processor.rescale_factor
        if processor.do_normalize:
            mean = torch.tensor(processor.image_mean, dtype=torch.float32).view(-1, 1, 1)
            std = torch.tensor(processor.image_std, dtype=torch.float32).view(-1, 1, 1)
            x = (x - mean) / std
        return self.to_device({"pixel_values": x.to(self.backbone.dtype)})

    def embedded(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """[B, T, e] patches as they enter the model; [B, T] all of them ask."""
        found = self._embed(inputs["pixel_values"])
        found = found[0] if isinstance(found, tuple) else found
        patches = found.flatten(2).transpose(1, 2) if found.ndim == 4 else found
        return patches, torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)

    def features(self, inputs: Inputs) -> Tensor:
        """[B, d] the first token, or the mean of all."""
        hidden, tokens = self.encoded(inputs)
        if tokens:
            return hidden[:, :tokens].float().mean(1)
        return (hidden[:, 0] if self.pooling == "cls" else hidden.mean(1)).float()


def _image(picture: Any) -> Any:
    from PIL import Image

    return Image.fromarray(np.squeeze(picture)) if isinstance(picture, np.ndarray) else picture


class TextModel(Model):
    kind = "text"

    def __init__(self, net: Any, tokenizer: Any, config: ModelConfig, seed: int) -> None:
        self.tokenizer = tokenizer
        self.pooling = "mean" if config.pooling == "auto" else config.pooling
        _require_length(net, config)
        super().__init__(net, config, seed)

    def probe(self) -> Inputs:
        return self.to_device({"input_ids": torch.zeros(1, 2, dtype=torch.long)})

    def inputs(self, rows: Mapping[str, Sequence[Any]]) -> Inputs:
        texts = [str(text) for text in rows[self.kind]]
        ids = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        _count_long(self, [len(row) for row in ids])
        done = self.tokenizer(
            texts, truncation=True, max_length=self.config.max_length, padding=True, return_tensors="pt"
        )
        names = ("input_ids", "attention_mask", "token_type_ids")
        return self.to_device({name: done[name] for name in names if name in done})

    def features(self, inputs: Inputs) -> Tensor:
        """[B, d] the mean over the tokens of the text, or the first."""
        hidden, tokens = self.encoded(inputs)
        if tokens:
            return hidden[:, :tokens].float().mean(1)
        return hidden[:, 0].float() if self.pooling == "cls" else _mean(hidden, inputs["attention_mask"])


@dataclass(frozen=True)
class Shown:
    """What stands before every prompt."""

    examples: tuple[tuple[str, str], ...]  # prompts and their answers
    separator: str  # after each
    most: int  # tokens, with the prompt


class CausalModel(Model):
    kind = "prompt"
    task_type = "CAUSAL_LM"

    def __init__(self, net: Any, tokenizer: Any, config: ModelConfig, seed: int) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.eos_token_id
        if self.end is None:
            raise ModelError(f"the tokenizer of {config.backbone} has no end-of-sequence token: set eos_token in it")
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end
        _require_length(net, config)
        super().__init__(net, config, seed)

    def probe(self) -> Inputs:
        return self.to_device({"input_ids": torch.zeros(1, 2, dtype=torch.long)})

    def _ids(self, texts: Sequence[Any], special: bool) -> list[list[int]]:
        found = self.tokenizer([str(text) for text in texts], add_special_tokens=special, verbose=False)["input_ids"]
        # A prompt that its tokenizer ends is one that nothing would follow.
        return [row[:-1] if special and row and row[-1] == self.end else row for row in found]

    def encode(self, prompts: Sequence[Any], answers: Sequence[Any]) -> Inputs:
        """Prompt, answer, end; labels [B, T] are the answer's tokens and the end, -100 elsewhere."""
        most, rows = self.config.max_length, []
        for prompt, answer in zip(self._ids(prompts, True), self._ids(answers, False), strict=True):
            tail = [*answer, self.end]
            _count_long(self, [len(prompt) + len(tail)])
            tail = tail[:most]
            head = prompt[len(prompt) + len(tail) - most :] if len(prompt) + len(tail) > most else prompt
            rows.append((head, tail))
        longest = max(len(head) + len(tail) for head, tail in rows)
        ids = torch.full((len(rows), longest), self.pad)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (head, tail) in enumerate(rows):
            ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
            labels[row, len(head) : len(head) + len(tail)] = torch.tensor(tail)
            mask[row, : len(head) + len(tail)] = 1
        return self.to_device({"input_ids": ids, "attention_mask": mask, "labels": labels})

    def inputs(self, rows: Mapping[str, Sequence[Any]]) -> Inputs:
        """Prompts alone, padded on the right."""
        most = self.config.max_length
        ids = [row[-most:] for row in self._ids(rows["prompt"], True)]
        return self._padded(ids, left=False)

    def _padded(self, rows: Sequence[list[int]], left: bool) -> Inputs:
        longest = max(max(map(len, rows)), 1)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            part = slice(longest - len(row), longest) if left else slice(0, len(row))
            ids[number, part], mask[number, part] = torch.tensor(row, dtype=torch.long), 1
        return self.to_device({"input_ids": ids, "attention_mask": mask})

    def logits(self, inputs: Inputs) -> Tensor:
        """[B, T, vocabulary]; labels, where they are given, are not looked at."""
        self._tell(inputs)
        found: Tensor = self.net(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return found

    def features(self, inputs: Inputs) -> Tensor:
        """[B, d] the mean of the last hidden state over the tokens."""
        self._tell(inputs)
        done = self.net(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True
        )
        return _mean(done.hidden_states[-1], inputs["attention_mask"])

    def shown_ids(self, shown: Shown) -> list[list[int]]:
        """The tokens of each example: put together as a prompt and its answer are in training, then the separator."""
        if not shown.examples:
            return []
        prompts, answers = (self._ids(texts, False) for texts in zip(*shown.examples, strict=True))
        (gap,) = self._ids([shown.separator], False)
        return [[*prompt, *answer, *gap] for prompt, answer in zip(prompts, answers, strict=True)]

    def _after(self, shown: Shown, prompts: Sequence[Any], most: int) -> list[list[int]]:
        """The tokens of prompts, each after as many of the last examples as there is room for."""
        examples, rows = self.shown_ids(shown), []
        for whole, bare in zip(self._ids(prompts, True), self._ids(prompts, False), strict=True):
            first, room = len(examples), most - len(whole)
            while first > 0 and len(examples[first - 1]) <= room:
                first -= 1
                room -= len(examples[first])
            special = max(len(whole) - len(bare), 0)  # tokens that begin a text
            before = [token for example in examples[first:] for token in example]
            rows.append([*whole[:special], *before, *whole[special:]])
        return rows

    @torch.no_grad()
    def generate(self, prompts: Sequence[Any], max_new_tokens: int, shown: Shown | None = None) -> list[str]:
        """Greedy continuations, up to the end-of-sequence token; of what is shown, then the prompt."""
        from transformers import GenerationConfig

        most = self.config.max_length if shown is None else shown.most
        most = max(1, min(most, _positions(self.backbone) - max_new_tokens))
        rows = self._ids(prompts, True) if shown is None else self._after(shown, prompts, most)
        inputs = self._padded([row[-most:] for row in rows], left=True)
        greedy = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=self.end, pad_token_id=self.pad
        )
        self._tell(inputs)
        done = self.net.generate(**inputs, generation_config=greedy)
        new = done[:, inputs["input_ids"].shape[1] :].tolist()
        ends = [row.index(self.end) if self.end in row else len(row) for row in new]
        return [self.tokenizer.decode(row[:end], skip_special_tokens=True) for row, end in zip(new, ends, strict=True)]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def _positions(net: Any) -> int:
    return int(getattr(net.config.get_text_config(), "max_position_embeddings", 0) or 2**31)


def _require_length(net: Any, config: ModelConfig) -> None:
    if config.max_length > _positions(net):
        raise ModelError(
            f"model.max_length is {config.max_length}, but {config.backbone} takes {_positions(net)} tokens at most"
        )


def _count_long(model: Model, lengths: Sequence[int]) -> None:
    most = model.config.max_length
    if (long := [n for n in lengths if n > most]) and model.config.on_long == "fail":
        raise ModelError(
            f"a text has {max(long)} tokens, more than model.max_length {most}: raise it, or set model.on_long=truncate"
        )
    model.truncated += len(long)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"model.device {name!r} is no device of torch: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"model.device is {name!r}, but torch sees no CUDA device here: use auto or cpu")
    return device


def backbone_digest(model: Model) -> str:
    """Of all frozen weights; adapters do not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.net.state_dict().items()):
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


KINDS: dict[str, Callable[..., Model]] = {"image": ImageModel, "text": TextModel, "prompt": CausalModel}


def load_model(config: ModelConfig, kind: str, seed: int, backbones: Backbones | None = None) -> Model:
    """The backbone of a config with fresh adapters, for streams of a kind; kept ones are not loaded again."""
    if config.quantize != "none":
        raise ModelError("model.quantize is 4bit, which is not supported: use dtype bfloat16 to halve the memory")
    if config.shard != "none":
        raise ModelError("model.shard is fsdp, which is not supported: each worker holds the whole frozen model")
    if config.backbone.startswith("builtin:") and kind != "image":
        raise ModelError(
            f"{config.backbone} sees images, but the stream is of kind {kind}: name another model.backbone"
        )
    if backbones is None:
        net, helper = from_pretrained(folder_of(config), config, kind)
        return KINDS[kind](net, helper, config, seed)
    kept = backbones.get(config, kind, _device(config.device))
    made = KINDS[kind](kept.net(), kept.helper, config, seed)
    made.digest = kept.digest
    return made
