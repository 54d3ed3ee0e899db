"""What a run hands to programs that know only peft or transformers: a task's adapter, or a model it is merged into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from treelora_ray.api import Run
from treelora_ray.files import new_folder
from treelora_ray.methods.catalogue import METHODS
from treelora_ray.models.adapters import load_exported
from treelora_ray.models.errors import ModelError
from treelora_ray.models.loading import folder_of, from_pretrained, quiet
from treelora_ray.training.errors import RunError

CARD = "treelora.json"
OURS = (CARD, "MLmodel")  # one of them lies in every folder that is written here


@contextmanager
def placed(target: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, that stands at `target` once it is whole; `force` replaces what was made here before."""
    if target.exists() and not force:
        raise RunError(f"{target} is there already: give --force to replace it, or name another folder")
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not _ours(target))):
        raise RunError(f"{target} is no export and no model, so it is not replaced: remove it, or name another folder")
    with new_folder(target) as folder:
        yield folder


def _ours(folder: Path) -> bool:
    return any((folder / name).is_file() for name in OURS)


def origin(backbone: str) -> str:
    """A backbone's name: its hub id, or the last part of its folder."""
    return Path(backbone).expanduser().resolve().name if Path(backbone).expanduser().is_dir() else backbone


def export_task(run: Run, task: str, target: Path, merge: bool = False, force: bool = False) -> None:
    """Writes a task's adapter as peft loads it; with `merge`, the backbone with the adapter in its weights."""
    if task not in run.tasks:
        near = get_close_matches(task, run.tasks, 1, 0)
        raise RunError(f"run {run.address} has learnt no task {task!r}; did you mean {near[0]!r}?")
    if said := METHODS[run.config.method.name].unexported:
        raise RunError(f"run {run.address} has no adapter of {task}: {said}")
    source = run.adapters[task]
    if not (source / "adapter_config.json").is_file():
        raise RunError(f"run {run.address} lacks the adapter of {task}: there is no {source / 'adapter_config.json'}")
    with placed(target, force) as folder:
        card: dict[str, Any] = {
            "task": task,
            "merged": merge,
            "backbone": origin(run.config.model.backbone),
            "method": run.config.method.name,
            "digest": run.config.digest,
            "treelora_ray": version("treelora-ray"),
        }
        if merge:
            card |= _merged(run, source, folder)
            (folder / "README.md").write_text(_readme(card))
            for name in ("head.safetensors", "labels.json"):
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
        else:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / CARD).write_text(json.dumps(card, ensure_ascii=False, indent=1))


def _merged(run: Run, source: Path, folder: Path) -> dict[str, Any]:
    """Saves backbone and adapter as one model; says how it is used."""
    import peft

    config, kind = run.config.model, str(run.checkpoint().meta["kind"])
    net, helper = from_pretrained(folder_of(config), config, kind)
    shared = getattr(net.get_input_embeddings(), "weight", None)
    if any(net.get_submodule(name).weight is shared for name in load_exported(source)):
        raise ModelError(
            f"{origin(config.backbone)} uses one matrix as input and as output embedding, and the adapter changes the "
            "output alone: it cannot be merged; export the adapter without --merge"
        )
    with quiet():
        model = peft.PeftModel.from_pretrained(net, str(source)).merge_and_unload(safe_merge=True)
        model.save_pretrained(folder)
        helper.save_pretrained(folder)
    pooling = ("cls" if kind == "image" else "mean") if config.pooling == "auto" else config.pooling
    if kind == "image":
        return {"kind": kind, "pooling": pooling, "mode": "L" if net.config.num_channels == 1 else "RGB"}
    return {"kind": kind, "max_length": config.max_length} | ({"pooling": pooling} if kind == "text" else {})


TITLE = """# {backbone}, task {task}

A transformers model: {backbone} with the LoRA adapter of task {task} merged into its weights.
"""
CAUSAL = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
inputs = tokenizer(["a prompt"], return_tensors="pt")
```

The task was learnt on the prompt's tokens, the answer's, and the end-of-sequence token, {max_length} at most.
"""
ENCODER = """
The task's classifier lies beside it: `head.safetensors` has `weight` [classes, features] and `bias` [classes], and
`labels.json` the names of the classes in the same order.

```python
import json

{imports}
from safetensors.torch import load_file
from transformers import AutoModel, {reader}

model, reader = AutoModel.from_pretrained(".").eval(), {reader}.from_pretrained("."{options})
head, labels = load_file("head.safetensors"), json.load(open("labels.json"))
inputs = reader({inputs}, return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
features = {features}
logits = features @ head["weight"].T + head["bias"]
print([labels[place] for place in logits.argmax(-1)])
```

Other outputs of the model, such as that of a pooler, were not trained.
"""
IMAGE = {
    "imports": "import numpy as np\nimport torch\nfrom PIL import Image",
    "reader": "AutoImageProcessor",
    "options": ', backend="pil"',
    "inputs": 'images=[np.atleast_3d(np.asarray(Image.open("picture.png").convert("{mode}")))], '
    'input_data_format="channels_last"',
    "mean": "hidden.mean(1)",
}
TEXT = {
    "imports": "import torch",
    "reader": "AutoTokenizer",
    "options": "",
    "inputs": '["a text"], padding=True, truncation=True, max_length={max_length}',
    "mean": '(hidden * (mask := inputs["attention_mask"].unsqueeze(-1))).sum(1) / mask.sum(1)',
}


def _readme(card: dict[str, Any]) -> str:
    if card["kind"] == "prompt":
        return (TITLE + CAUSAL).format(**card)
    how = IMAGE if card["kind"] == "image" else TEXT
    features = "hidden[:, 0]" if card["pooling"] == "cls" else how["mean"]
    return (TITLE + ENCODER).format(**{**card, **how, "inputs": how["inputs"].format(**card), "features": features})
