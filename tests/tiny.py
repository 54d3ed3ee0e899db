# ruff: noqa: SIM905
"""Random backbones of a few thousand weights, in folders laid out as the hub lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = """good bad film book is was the a not very red blue one two three what colour sum of and answer question yes no
positive negative""".split()


def vit(folder: Path, size: int = 8, channels: int = 1, **changes: Any) -> Path:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=size, patch_size=4, num_channels=channels, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, **changes,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * channels,
        "image_std": [0.25] * channels, "resample": 2,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=64
    )
    fast.save_pretrained(folder)
    return fast


def bert(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    words = tokenizer(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    """With grouped-query attention: its v is smaller than its q."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
