"""Run the real training step on tensors that have shapes but no storage, and add up what would be alive."""

from advisor.memory.trace.run import Trace, trace

__all__ = ["Trace", "trace"]
