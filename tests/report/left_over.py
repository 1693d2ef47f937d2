"""What is left of English in a Japanese text."""

from __future__ import annotations

import re

JAPANESE = re.compile(r"[぀-ヿ一-鿿]")

# What a person may see in English on a Japanese screen: commands, options, names of files, formats, cards and models,
# and whatever somebody else's program said.
STAYS = re.compile(
    r"""phi3-advise[^。]*|--[\w-]+|`[^`]*`|"[^"]*"|'[^']*'|\S*[/_.=<>{}\[\]]\S*|\([^)]*\w=\w[^)]*\)
    |autocast\ \w+|(?:compute\ capability|expandable\ segments|flash\ attention|memory-efficient)
    |pip\ install\ [\w -]+|python\ -m|hf\ auth\ login|Runtime|nvidia-smi\ mig""",
    re.VERBOSE,
)


def left_in_english(text: str) -> list[str]:
    """Runs of English words that no name explains."""
    return re.findall(r"(?<![\w-])[A-Za-z]{2,}(?: [a-z]{2,})+(?![\w-])", STAYS.sub(" ", text))
