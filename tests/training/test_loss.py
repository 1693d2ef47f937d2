"""The chunked loss against the standard one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from advisor.chunks import FEWEST_ROWS, chunk_rows
from advisor.errors import PlanError
from advisor.training import loss as chunks
from advisor.training.build import build_model
from advisor.training.loss import chunked_cross_entropy
from advisor.training.step import make_batch


def gradients(loss: str, method: str, make_plan: Any, architecture: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    torch.manual_seed(0)
    plan = make_plan(method, loss=loss)
    built = build_model(plan, architecture, "cpu")
    torch.manual_seed(1)
    for name, parameter in built.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    batch = {**make_batch(plan, 512, "cpu")}
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :5] = -100
    result = built.model(**batch)["loss"]
    result.backward()
    return result.item(), {name: p.grad for name, p in built.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [True, False], ids=["torch", "loop"])
def test_it_equals_the_standard_loss_and_its_gradients(
    fused: bool, method: str, make_plan: Any, architecture: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(chunks, "_torch_has_chunks", lambda: False)
    standard, expected = gradients("standard", method, make_plan, architecture)
    chunked, found = gradients("chunked", method, make_plan, architecture)
    assert chunked == pytest.approx(standard, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_under_autocast_the_head_multiplies_in_16_bits_and_gets_its_gradient() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 512, bias=False)
    hidden = torch.randn(2, 100, 64, requires_grad=True)
    labels = torch.randint(0, 512, (2, 100))
    exact = chunked_cross_entropy(hidden, head, labels, None)
    exact.backward()
    expected, head.weight.grad = head.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_cross_entropy(hidden, head, labels, None)
    found.backward()
    assert found.dtype == torch.float32
    # bfloat16 has 8 bits: the sum over 198 tokens and the gradients are as coarse.
    assert found.item() == pytest.approx(exact.item(), rel=0.01)
    assert head.weight.grad is not None
    assert expected is not None
    assert head.weight.grad.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(head.weight.grad.flatten(), expected.flatten(), dim=0) > 0.999


def test_float16_holds_the_loss_of_many_tokens() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 512, bias=False).half().requires_grad_(False)
    hidden = torch.randn(1, 16_384, 64).half().requires_grad_()
    labels = torch.randint(0, 512, (1, 16_384))
    found = chunked_cross_entropy(hidden, head, labels, None)
    found.backward()
    # The sum, near 16,384 × 6.4, is above the largest float16.
    expected = torch.nn.functional.cross_entropy(head(hidden).float()[0, :-1], labels[0, 1:])
    assert found.item() == pytest.approx(expected.item(), rel=0.01)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary", "rows"),
    [
        (4096, 3072, 32064, 256),
        (2048, 5120, 32064, 256),
        (1, 3072, 32064, 1),
        (100, 64, 64, 100),
        (2048, 3072, 200064, 128),
        (32768, 3072, 200064, 256),
    ],
)
def test_a_chunk_has_torchs_rows_but_not_so_few_that_the_head_is_all_that_is_read(
    tokens: int, hidden: int, vocabulary: int, rows: int
) -> None:
    assert chunk_rows(tokens, hidden, vocabulary) == rows
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch 2.13 brought the loss in chunks")
    options = torch.nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio:2")
    torchs: int = options._compute_batch_chunk_size(tokens, hidden, vocabulary)
    assert rows == min(max(torchs, FEWEST_ROWS), tokens)


def test_a_model_that_transforms_its_logits_is_refused(make_plan: Any, architecture: dict[str, Any]) -> None:
    capped = {**architecture, "model_type": "gemma2", "head_dim": 32, "final_logit_softcapping": 30.0}
    with pytest.raises(PlanError, match="final_logit_softcapping"):
        build_model(make_plan("lora", loss="chunked", attention="eager"), capped, "meta")
