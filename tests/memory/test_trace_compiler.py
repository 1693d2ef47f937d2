"""A trace leaves torch's compiler out, and whoever compiles afterwards has all of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

_TRACE = """
import sys
from advisor.memory.trace import trace
from advisor.plan import plan_from_fields
from advisor.profiles import load_model
plan = plan_from_fields(
    {"model": "phi-3-mini-4k", "method": "lora", "lora": {"rank": 8}, "micro_batch": 1, "seq_len": 64}
)
trace(plan, {**load_model("phi-3-mini-4k").architecture.config, "num_hidden_layers": 1})
"""
_IMPORTED = "print('torch._dynamo.symbolic_convert' in sys.modules)\n"


def _printed(*parts: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "".join(parts)], check=True, capture_output=True, text=True
    )
    return done.stdout.split()


def test_a_trace_does_not_import_it() -> None:
    assert _printed(_TRACE, _IMPORTED) == ["False"]


@pytest.mark.parametrize(
    "use",
    [
        "import torch\ncompiled = torch.compile(f, backend='eager', fullgraph=True)",
        "import torch._inductor\nimport torch\ncompiled = torch.compile(f, backend='eager')",
        "import torch\ncompiled = torch._dynamo.optimize('eager')(f)",
    ],
)
def test_whoever_compiles_afterwards_has_it(use: str) -> None:
    define = "\ndef f(x):\n    return torch.nn.functional.silu(x) * 2\n"
    run = f"{define}{use}\nprint(compiled(torch.zeros(2)).sum().item())\n"
    assert _printed(_TRACE, run, _IMPORTED) == ["0.0", "True"]


def test_what_was_marked_meanwhile_is_marked_in_the_compiler() -> None:
    marks = """
from advisor.memory.trace.compiler import compiler_postponed
with compiler_postponed():
    import torch
    @torch._dynamo.allow_in_graph
    def whole(x): return x + 1
    @torch.compiler.disable
    def apart(x): return x + 2
    print(apart(1))
graphs = []
def backend(graph, _):
    graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
    return graph.forward
compiled = torch.compile(lambda x: apart(whole(x) * 2) * 3, backend=backend)
print(compiled(torch.zeros(1)).item())
called = [target for graph in graphs for target in graph]
print(whole in called, any("apart" in str(target) for target in called), len(graphs))
"""
    # `apart` breaks the graph in two, and is in neither.
    assert _printed(marks) == ["3", "12.0", "True", "False", "2"]
