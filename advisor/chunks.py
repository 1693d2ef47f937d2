"""How many rows of logits the chunked loss makes at a time: the loss and its memory both ask here."""

from __future__ import annotations

FEWEST_ROWS = 128
"""A product with fewer rows spends its time reading the head.

In 16 bits a product of n rows makes n operations for each byte of weight that it reads; a T4 makes 203 in the time
that it reads one, an A100 153. torch's own rule takes 16 rows of Phi-4-mini's 200,064 logits at 2,048 tokens.
"""


def chunk_rows(tokens: int, hidden: int, vocabulary: int) -> int:
    """Rows of logits in a chunk: torch's rule for CUDA, and no fewer than `FEWEST_ROWS` where there are so many.

    Half the power of two at or above tokens / ⌈vocabulary / hidden⌉, "aspect_ratio:2".
    Source: torch/nn/modules/linear_cross_entropy_options.py.
    """
    target = -(-tokens // -(-vocabulary // hidden))
    return min(max((1 << (target - 1).bit_length()) // 2, FEWEST_ROWS), tokens)
