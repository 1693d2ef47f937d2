"""A small Phi-3 in a folder: random weights, Phi-3's module names, and its real vocabulary and chat template.

The vocabulary and merges are Llama-2's, as npm's llama-tokenizer-js 1.2.2 (MIT) packs them, written as a tokenizer.json
in data/llama2-tokenizer; Phi-3 adds the tokens from 32000 on. Source of those and of the template:
tokenizer_config.json of Phi-3-mini-4k-instruct.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parent / "data" / "llama2-tokenizer" / "tokenizer.json.gz"

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|assistant|>",
    *(f"<|placeholder{n}|>" for n in range(1, 5)),
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

VOCABULARY = 32064
HEAD_STD = 0.3
"""Larger than the usual 0.02: with a frozen head of this size, adapters must be able to move the logits."""


def phi3_tokenizer() -> Any:
    """The tokenizer of Phi-3-mini: its padding token is eos, as the real one's is."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(gzip.decompress(TOKENIZER.read_bytes()).decode())
    added = [
        AddedToken(text, rstrip=text != "<|endoftext|>", special=True, normalized=False) for text in SPECIAL_TOKENS
    ]
    tokenizer.add_special_tokens(added)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def small_config(*, kv_heads: int = 4, hidden: int = 64, layers: int = 2) -> dict[str, Any]:
    """The keys of its config.json; fewer key-value heads make the grouped-query variant."""
    return {
        "model_type": "phi3",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    }


def make_small_model(folder: Path, *, kv_heads: int = 4, hidden: int = 64, layers: int = 2) -> Path:
    """Writes config.json, safetensors and tokenizer; returns the folder."""
    import torch
    from transformers import AutoModelForCausalLM, Phi3Config

    config = small_config(kv_heads=kv_heads, hidden=hidden, layers=layers)
    del config["model_type"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Phi3Config(**config), dtype=torch.bfloat16)
    torch.nn.init.normal_(model.lm_head.weight, std=HEAD_STD)
    model.save_pretrained(folder)
    phi3_tokenizer().save_pretrained(folder)
    return folder
