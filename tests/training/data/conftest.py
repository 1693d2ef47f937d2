"""Files that a person might have, and Phi-3's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Phi-3's, as training loads it."""
    from small_model import phi3_tokenizer

    from advisor.training.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    phi3_tokenizer().save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    """`write("a.jsonl", rows)` writes objects a line, bytes or text as they are; returns the path."""

    def written(name: str, content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return written
