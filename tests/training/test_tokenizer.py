"""The padding token is never one that ends a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from advisor.errors import EnvironmentLacksError, InputError
from advisor.training.tokenizer import load_tokenizer


def tokenizer_of(words: list[str], **special: str) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    backend.add_special_tokens(words)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_phi3_pads_with_unk_though_its_own_padding_is_eos(tmp_path: Path) -> None:
    from small_model import phi3_tokenizer

    original = phi3_tokenizer()
    assert original.pad_token == original.eos_token
    original.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.pad_token, loaded.pad_token_id) == ("<unk>", 0)
    assert loaded.eos_token == "<|endoftext|>"
    loaded.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).pad_token == "<unk>"


def test_a_tokenizer_without_unk_pads_with_a_token_held_in_reserve(tmp_path: Path) -> None:
    words = ["<|endoftext|>", "a", "<|reserved_1|>"]
    end = "<|endoftext|>"
    tokenizer_of(words, eos_token=end, bos_token=end, unk_token=end, pad_token=end).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<|reserved_1|>"


def test_a_tokenizer_that_can_pad_with_eos_only_is_refused(tmp_path: Path) -> None:
    end = "<|endoftext|>"
    tokenizer_of([end, "a"], eos_token=end, pad_token=end).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="can pad only with") as caught:
        load_tokenizer(str(tmp_path))
    assert "would not stop" in caught.value.why


def test_a_folder_without_a_tokenizer_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
    with pytest.raises(InputError):
        load_tokenizer(str(tmp_path))


def test_a_hub_id_without_a_network_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentLacksError):
        load_tokenizer("nobody-of-this-name/no-such-model")
