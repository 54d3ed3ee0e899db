"""What a step of treelora and of o-lora costs beside seqlora's, on random models of real size, with tasks stored.

    python benchmarks/gpu_step.py [--models 0.5B 1B 7B vit] [--stored 24] [--steps 20] [--repeats 5] [--tiny] [--out F]

Decoders learn rows of 1,024 tokens in bfloat16, ViT-B/16 batches of 192 images; rank 8 on q and v. Each method first
learns `stored` tasks of one step (decoders of few rows), then a further one, whose steps are timed: methods in turn,
over the same frozen weights and batches that lie on the device. Made for a GPU; `--tiny` are models of a few thousand
weights, for any machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from treelora_ray.config import RunConfig, from_mapping
from treelora_ray.data.rows import MemoryRows
from treelora_ray.data.task import Task
from treelora_ray.methods.base import Method
from treelora_ray.methods.catalogue import make
from treelora_ray.methods.learner import Learner, Ref
from treelora_ray.models.backbone import CausalModel, ImageModel
from treelora_ray.objectives.base import Batch
from treelora_ray.training import loop

METHODS: dict[str, dict[str, Any]] = {
    "seqlora": {},
    "treelora": {"probe_rounds": 2, "guide": {"gate": 0.0}},  # leans on a stored task, whatever it is
    "o-lora": {},
}
WORDS = 1000
# Hidden width, layers, heads, key-value heads, width of the feed-forward part; rows of one forward pass.
DECODERS = {
    "0.5B": (1024, 24, 16, 16, 4096, 8),
    "1B": (2048, 16, 32, 8, 8192, 8),
    "7B": (4096, 32, 32, 32, 11008, 4),
}
Built = tuple[Any, Any, list[Task], dict[str, Any]]  # net, what reads its inputs, tasks, the config's sections


def decoder(size: str, stored: int, tiny: bool, device: torch.device) -> Built:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    width, layers, heads, pairs, inner, micro = (32, 2, 4, 2, 48, 2) if tiny else DECODERS[size]
    tokens, rows = (64, 4) if tiny else (1024, 32)
    names = ["[PAD]", "[UNK]", "[EOS]", *(f"w{number}" for number in range(WORDS))]
    plain = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=tokens
    )
    config = LlamaConfig(
        vocab_size=len(names) if tiny else 32000, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, intermediate_size=inner,
        max_position_embeddings=tokens, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    net = _made(LlamaForCausalLM, config, torch.bfloat16, device)
    rng, told = np.random.default_rng(0), tokens // 4
    texts = [[f"w{n}" for n in rng.integers(0, WORDS, tokens - 1)] for _ in range(rows)]
    columns = {
        "prompt": [" ".join(text[told:]) for text in texts],
        "answer": [" ".join(text[:told]) for text in texts],
    }
    table, few = MemoryRows(columns), MemoryRows({key: column[:micro] for key, column in columns.items()})
    tasks = [*(Task(f"t{number}", few, few, ()) for number in range(stored)), Task(f"t{stored}", table, table, ())]
    model = {"max_length": tokens, "dtype": "bfloat16", "gradient_checkpointing": not tiny}
    train = {"batch": rows, "micro_batch": micro, "precision": "bf16"}
    return net, words, tasks, {"model": model, "train": train, "objective": {"routing": "last"}}


def images(stored: int, tiny: bool, device: torch.device) -> Built:
    from transformers import AutoImageProcessor, ViTConfig, ViTModel

    side, rows = (32, 8) if tiny else (224, 192)
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    net = _made(
        lambda config: ViTModel(config, add_pooling_layer=False),
        ViTConfig(image_size=side, **(small if tiny else {})),
        torch.float32,
        device,
    )
    reads = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}
    with tempfile.TemporaryDirectory() as name:
        Path(name, "preprocessor_config.json").write_text(json.dumps(reads))
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (rows, side, side, 3), dtype=np.uint8))
    tasks = []
    for number in range(stored + 1):
        labels = [f"{number}-{row % 4}" for row in range(rows)]
        table = MemoryRows({"image": pictures, "label": labels})
        tasks.append(Task(f"t{number}", table, table, tuple(sorted(set(labels)))))
    train = {"batch": rows, "precision": "fp32" if tiny else "bf16"}
    return net, processor, tasks, {"train": train, "objective": {"routing": "last"}}


def _made(kind: Any, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Drawn where it is to lie: 7 billion weights are too many to move."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return kind(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def methods(built: Built, steps: int) -> dict[str, Method]:
    """Each with modules of its own around the same weights, all stored tasks learnt and the next one begun."""
    net, helper, tasks, sections = built
    weights = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    found = {}
    for name, options in METHODS.items():
        learner = _learner(_config(name, options, sections, 1), copy.deepcopy(net, dict(weights)), helper)
        learner.tasks, method = tuple(tasks), make(learner)
        _still(learner)
        for number in range(len(tasks) - 1):
            loop.begin_task(method, (number,))
            loop.train_task(method, 0, lambda *_: None, lambda _: None)
            loop.end_task(method)
        learner.config = _config(name, options, sections, steps)
        loop.begin_task(method, (len(tasks) - 1,))
        choice = getattr(method, "choice", None)
        if name == "treelora" and (choice is None or (choice.warm < 0).any()):
            raise SystemExit("treelora leans on nothing: its steps say nothing of the pull")
        found[name] = method
    return found


def _config(name: str, options: dict[str, Any], sections: dict[str, Any], steps: int) -> RunConfig:
    model = {"lora": {"rank": 8, "alpha": 32}, **sections.get("model", {})}
    train = {"steps": steps, "lr": 1e-4, **sections["train"]}
    method = {"name": name, **options}
    return from_mapping({**sections, "model": model, "train": train, "method": method})


def _learner(config: RunConfig, net: Any, helper: Any) -> Learner:
    kind = CausalModel if hasattr(net, "lm_head") else ImageModel
    return Learner(config, kind(net, helper, config.model, config.seed))


def _still(learner: Learner) -> None:
    """Batches of one size are one batch, which stays on the device: reading rows is no part of the step."""
    fetch, kept = learner.fetch, dict[tuple[int, int], Batch]()

    def still(refs: Sequence[Ref]) -> Batch:
        key = refs[0][0], len(refs)
        if key not in kept:
            kept.clear()
            kept[key] = fetch(refs)
        return kept[key]

    learner.fetch = still  # type: ignore[method-assign]


def measure(found: dict[str, Method], repeats: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """By method the median seconds of a step, and the most memory, of each repeat."""
    told: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "bytes": []} for name in found}
    for _ in range(repeats):
        for name, method in found.items():
            times: list[float] = []

            def look(*_: Any, times: list[float] = times) -> None:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter())

            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            loop.train_task(method, 0, look, lambda _: None)
            told[name]["seconds"].append(statistics.median(np.diff(times).tolist()))
            told[name]["bytes"].append(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)
    return told


def show(model: str, told: dict[str, dict[str, list[float]]], tokens: int) -> None:
    plain = told["seqlora"]
    for name, each in told.items():
        pairs = zip(each["seconds"], plain["seconds"], strict=True)
        slower, seconds = statistics.median(a / b for a, b in pairs), statistics.median(each["seconds"])
        most, least = max(each["bytes"]), max(plain["bytes"])
        memory = f"{most / 2**30:.2f} | {most / least:.3f}" if least else " | "
        rate = f"{tokens / seconds:,.0f}"
        print(f"| {model} | {name} | {1000 * seconds:.1f} | {slower:.3f} | {rate} | {memory} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[*DECODERS, "vit"], default=[*DECODERS, "vit"])
    parser.add_argument("--stored", type=int, default=24, help="tasks learnt before")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["TREELORA_TRACKING"] = "none"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no CUDA device here: --tiny runs the same on models of a few thousand weights")
    chip = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{chip}, torch {torch.__version__}, {options.stored} stored tasks\n")
    print("| model | method | ms a step | over seqlora | tokens or images a second | GiB at most | over seqlora |")
    print("|---|---|---:|---:|---:|---:|---:|")
    result: dict[str, Any] = {"device": chip, "stored": options.stored, "models": {}}
    for model in options.models:
        if model == "vit":
            built = images(options.stored, options.tiny, device)
        else:
            built = decoder(model, options.stored, options.tiny, device)
        sections = built[3]
        told = measure(methods(built, options.steps), options.repeats, device)
        show(model, told, sections["train"]["batch"] * sections.get("model", {}).get("max_length", 1))
        result["models"][model] = told
        del built
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
