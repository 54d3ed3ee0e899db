"""Backbones from a hub id or a folder, with what reads their inputs; errors say what is missing."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from treelora_ray.config import ModelConfig
from treelora_ray.models.errors import ModelError

BUILTIN = "builtin:digits-vit"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def folder_of(config: ModelConfig) -> str:
    """Where the backbone lies: a folder, or else a hub id."""
    name = config.backbone
    if name.startswith("builtin:"):
        if name != BUILTIN:
            raise ModelError(f"model.backbone {name!r} is unknown; built in is {BUILTIN}")
        from treelora_ray.models.digits_vit import digits_vit_folder

        return str(digits_vit_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"model.backbone {name} is no folder: check the path, or give a hub id such as owner/name")
    return name


def stored(config: ModelConfig, kind: str) -> Path:
    """The folder with the backbone's files: of a hub id its place in the cache, without the network."""
    where = folder_of(config)
    folder = Path(where)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(where, revision=config.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise ModelError(
                f"the backbone {where} is not in the hub's cache here: answer a row with `treelora predict` first, "
                "or keep the hub id alone"
            ) from None
    _check_folder(folder, kind)
    return folder


def _check_folder(folder: Path, kind: str) -> None:
    here = {path.name for path in folder.iterdir()}
    missing = [] if "config.json" in here else ["config.json"]
    if not any(name.endswith(".safetensors") for name in here):
        if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in here):
            raise ModelError(
                f"{folder} has its weights in pickled files only, which can run code when they are read: convert them "
                "to safetensors (save_pretrained of transformers writes these)"
            )
        missing.append("*.safetensors")
    if kind == "image" and not here & {"preprocessor_config.json", "processor_config.json"}:
        missing.append("preprocessor_config.json")
    readers = {"tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model"}
    if kind != "image" and not here & readers:
        missing.append("tokenizer.json")
    if missing:
        raise ModelError(f"the backbone folder {folder} is incomplete: it lacks {', '.join(missing)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers says nothing."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# transformers changes its classes while it loads; of two threads at once one leaves them changed for good, after which
# no model ties its weights.
LOADING = threading.RLock()


def from_pretrained(where: str, config: ModelConfig, kind: str) -> tuple[Any, Any]:
    """The model in evaluation mode, and its image processor or tokenizer."""
    import transformers

    local = Path(where).is_dir()
    if local:
        _check_folder(Path(where), kind)
    options: dict[str, Any] = {"revision": config.revision} if config.revision and not local else {}
    loader = transformers.AutoModelForCausalLM if kind == "prompt" else transformers.AutoModel
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    # Some vision models bring a pooler that is never used and often not stored.
    pooler = {"add_pooling_layer": False} if kind == "image" and _has_pooler(where, options) else {}
    # What a folder does not hold is drawn: always the same, and without a trace in the global state.
    with LOADING, quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            net = loader.from_pretrained(
                where, dtype=DTYPES[config.dtype], use_safetensors=True, **attention, **options, **pooler
            )
            helper = _helper(transformers, where, kind, options)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(_explain(where, config, local, error)) from error
    return net, helper


def _has_pooler(where: str, options: dict[str, Any]) -> bool:
    import transformers

    try:
        with quiet():
            kind = transformers.AutoConfig.from_pretrained(where, **options).model_type
    except (OSError, ValueError):
        return False  # the loading proper says what is wrong
    return kind in ("vit", "deit", "beit")


def _helper(transformers: Any, where: str, kind: str, options: dict[str, Any]) -> Any:
    if kind == "image":
        return transformers.AutoImageProcessor.from_pretrained(where, backend="pil", **options)
    return transformers.AutoTokenizer.from_pretrained(where, **options)


def _explain(where: str, config: ModelConfig, local: bool, error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    if local:
        return f"the backbone folder {where} cannot be loaded: {first}"
    if "flash" in str(error).lower():
        return f"model.attention is {config.attention}, which is not installed: use sdpa ({first})"
    return (
        f"model.backbone {where!r} is no folder here and cannot be had from the hub: {first}. "
        "Give the folder of a downloaded model, or allow the network"
    )
