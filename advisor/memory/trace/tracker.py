"""Follow the life of every storage that an operation makes.

A dispatch mode sees each operation below autograd; the storages of its outputs are followed by weak
reference, so a tensor dies in the record when it dies in the program.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from advisor.memory import kernels
from advisor.memory.kernels import Gpu, Hardware
from advisor.memory.trace.answers import Answers, depends_on_values
from advisor.memory.trace.attention import MathAttention
from advisor.memory.trace.experts import grouped_operation, grouped_product
from advisor.memory.trace.libraries import chunked_loss_operation, run_chunked_loss
from advisor.memory.trace.result import LOADING, WARM_UP, Allocation, Component, Event
from advisor.memory.trace.results import Results, is_pure, returns_views

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)(?:\.|$)")
_ADD = torch.ops.aten.add.Tensor
_ADD_IN_PLACE = torch.ops.aten.add_.Tensor
_is_dense = torch._prims_common.is_non_overlapping_and_dense_or_false
_SEQUENCE_NUMBER: Callable[[], int] = torch._C._autograd._get_sequence_nr


@dataclass(slots=True)
class Places:
    """Where the program is: module by module in forward, layer by layer in backward."""

    phase: str = LOADING
    modules: list[str] = field(default_factory=list)
    made_by: dict[int, str] = field(default_factory=dict)
    last: str = ""
    moment: str = LOADING
    running: tuple[str, str] = ("", "")
    """The last operation, and its module."""

    @property
    def operation(self) -> str:
        """The last operation, for a person."""
        return " in ".join(filter(None, self.running))


@dataclass(slots=True, frozen=True)
class _Treatment:
    """What is done about one operator."""

    name: str
    select: Callable[..., Any] | None
    rule: Callable[[kernels.Call], kernels.Inside] | None
    uses_blas: bool
    last_first: bool
    pure: bool
    views: bool


class Tracker(TorchDispatchMode):
    """Records every allocation of a meta tensor while it is active.

    Args:
        hardware: whose kernels' inner allocations are added.
        padded: as `Answers` has it.
        tokens: the same.
        samples: the same.
    """

    def __init__(self, hardware: Hardware, *, padded: bool = False, tokens: int = 1, samples: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.places = Places()
        self.vocabulary = 0
        """The size by which logits are recognised."""
        self._hardware = hardware
        self._answers = Answers(padded=padded, tokens=tokens, samples=samples)
        self._selections = self._answers.selections()
        self._live: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self._rules = kernels.rules(hardware)
        self._last_first = kernels.last_output_first(hardware)
        self._blas = kernels.cublas_operations() if isinstance(hardware, Gpu) else frozenset()
        self._treatments: dict[Any, _Treatment] = {}
        self._results = Results()
        self._workspaces: set[bool] = set()
        self._lone_uses = _uses_of_a_lone_gradient()
        self._chunked_loss = chunked_loss_operation()
        self._grouped = grouped_operation()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self._answers.value(args[0], phase=self.places.phase, operation=self.places.operation)
        treatment = self._treatments.get(func) or self._decide(func)
        if treatment.select is not None and depends_on_values(func, args):
            with self:
                return treatment.select(*args)
        if func is _ADD_IN_PLACE:
            self._label_addend(args)
        if func is self._chunked_loss:
            with self:
                return run_chunked_loss(args, self._hardware)
        module = self._locate()
        self.places.running = (treatment.name, module)
        if treatment.views:
            return func(*args, **kwargs)
        if treatment.uses_blas:
            self._use_workspace()
        inside = treatment.rule(kernels.Call(args, kwargs, self._hardware)) if treatment.rule else kernels.NOTHING
        temporary = [self._temporary(size, treatment.name, module) for size in inside.first]
        if func is self._grouped and args[0].is_meta and args[0].dtype != torch.bfloat16:
            result = grouped_product(args, kwargs)
        else:
            result = self._results.of(func, args, kwargs) if treatment.pure else func(*args, **kwargs)
        if func is _ADD and self._is_in_place(args):
            self._take_over(args[0], result)
        else:
            self._register_outputs(result[::-1] if treatment.last_first else result, treatment.name, module)
        if inside is not kernels.NOTHING:
            self._release([self._temporary(size, treatment.name, module) for size in inside.brief])
            self._release(temporary + [self._temporary(size, treatment.name, module) for size in inside.then])
        return result

    def _decide(self, func: Any) -> _Treatment:
        """What is done about an operator, from now on."""
        treatment = self._treatments[func] = _Treatment(
            name=str(func),
            select=self._selections.get(func),
            rule=self._rules.get(func),
            uses_blas=func in self._blas,
            last_first=func in self._last_first,
            pure=is_pure(func),
            views=returns_views(func),
        )
        return treatment

    def _is_in_place(self, args: tuple[Any, ...]) -> bool:
        """Whether a real device would add into the first tensor, where a dispatch mode makes torch copy.

        Autograd adds a second gradient of one tensor into the first if nobody else holds that; math attention
        adds its mask to the scores.
        Source: torch/csrc/autograd/input_buffer.cpp (accumulate), ATen/native/transformers/attention.cpp
        (_scaled_dot_product_attention_math).
        """
        old, new = args[:2]
        if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
            return False
        if old.untyped_storage()._cdata not in self._live:
            return False
        if MathAttention.running:
            return True
        if self.places.phase != "backward" or self.places.modules or torch.is_grad_enabled():
            return False
        uses: int = old._use_count()  # type: ignore[attr-defined]
        alone = uses <= self._lone_uses and not old._is_view()
        return alone and bool(_is_dense(old)) and old.shape == new.shape and old.dtype == new.dtype

    def _label_addend(self, args: tuple[Any, ...]) -> None:
        """What is added to a gradient is a gradient: a later micro-batch's, alive until it is added up."""
        if not isinstance(args[1], torch.Tensor):
            return
        total, addend = (self._live.get(tensor.untyped_storage()._cdata) for tensor in args[:2])
        if total is not None and addend is not None and total[1].component == "gradients":
            addend[1].component, addend[1].module = "gradients", total[1].module

    def _take_over(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Follow the new tensor as the continuation of the old one."""
        _, allocation = self._live.pop(old.untyped_storage()._cdata)
        self._follow(new.untyped_storage(), allocation)

    def _follow(self, storage: Any, allocation: Allocation) -> None:
        key = storage._cdata
        self._live[key] = (weakref.ref(storage, lambda _: self._free(key)), allocation)

    def _locate(self) -> str:
        """The module that the running operation belongs to; sets the moment in backward."""
        places = self.places
        if places.modules:
            module = places.modules[-1]
            if torch.is_grad_enabled():
                # The node of this operation, if it has one, is the last that was numbered.
                places.made_by.setdefault(_SEQUENCE_NUMBER() - 1, module)
        elif places.phase == "backward":
            node = torch._C._current_autograd_node()
            module = places.made_by.get(node._sequence_nr(), places.last) if node is not None else places.last
        else:
            return ""
        if module != places.last:
            places.last = module
            if places.phase == "backward":
                self._enter_backward_of(module)
        return module

    def _enter_backward_of(self, module: str) -> None:
        layer = _LAYER.search(module)
        if layer is not None:
            self.places.moment = f"backward of layer {layer[1]}"
        elif self.places.moment.startswith("backward of") and "embed" in module:
            self.places.moment = "embedding backward"

    def _register_outputs(self, result: Any, operation: str, module: str) -> None:
        if isinstance(result, torch.Tensor):
            self._register(result, operation, module)
        elif isinstance(result, (list, tuple)):
            for item in result:
                self._register_outputs(item, operation, module)

    def _register(self, tensor: torch.Tensor, operation: str, module: str) -> None:
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            self._begin(tensor, storage, self._component(tensor), operation, module)

    def _component(self, tensor: torch.Tensor) -> Component:
        if self.places.phase == LOADING:
            return "weights"
        if self.places.phase == "optimizer step":
            return "optimizer"
        is_logits = tensor.dim() >= 2 and tensor.size(-1) == self.vocabulary and tensor.is_floating_point()
        return "logits" if is_logits else "activations"

    def adopt(self, tensor: torch.Tensor, component: Component, operation: str, module: str) -> None:
        """Start to follow a tensor's storage, or say what one that is followed already is for."""
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is not None:
            known[1].component = component
            known[1].module = module or known[1].module
            return
        self._begin(tensor, storage, component, operation, module)

    def _begin(self, tensor: torch.Tensor, storage: Any, component: Component, operation: str, module: str) -> None:
        size = storage.nbytes()
        if size == 0:
            return
        allocation = Allocation(
            size, tuple(tensor.shape), str(tensor.dtype)[6:], module, operation, self.places.moment, component
        )
        self.events.append(Event(allocation, False, self.places.moment))
        self._follow(storage, allocation)

    def _free(self, key: int) -> None:
        entry = self._live.pop(key, None)
        if entry is not None:
            self.events.append(Event(entry[1], True, self.places.moment))

    def _temporary(self, size: int, operation: str, module: str) -> Allocation:
        allocation = Allocation(size, (size,), "uint8", module, f"inside {operation}", self.places.moment, "workspace")
        self.events.append(Event(allocation, False, self.places.moment))
        return allocation

    def _release(self, temporary: Iterable[Allocation]) -> None:
        for allocation in temporary:
            self.events.append(Event(allocation, True, self.places.moment))

    def _use_workspace(self) -> None:
        """cuBLAS keeps one workspace for each thread: the caller's and autograd's."""
        assert isinstance(self._hardware, Gpu)
        in_backward = self.places.phase == "backward"
        if in_backward not in self._workspaces:
            self._workspaces.add(in_backward)
            size = kernels.cublas_workspace_bytes(self._hardware)
            thread = "autograd's" if in_backward else "the caller's"
            allocation = Allocation(
                size, (size,), "uint8", f"{thread} thread", "cuBLAS", self.places.moment, "workspace"
            )
            self.events.append(Event(allocation, False, self.places.moment))

    def warm_up(self, size: int) -> None:
        """What is allocated before loading, and freed at once."""
        allocation = Allocation(size, (size // 2,), "float16", "", WARM_UP, LOADING, "weights")
        self.events += [Event(allocation, freed, LOADING) for freed in (False, True)]

    def stop(self) -> None:
        """Record nothing more: what dies from now on is not the program's doing."""
        self._live.clear()

    def enter(self, phase: str) -> None:
        """Called by the step at each of its turns."""
        places = self.places
        places.phase = phase
        places.moment = "loss backward" if phase == "backward" else phase
        places.last = ""
        if phase == "forward":
            places.made_by.clear()

    @contextmanager
    def following_modules(self, root: torch.nn.Module, decoder: torch.nn.Module) -> Iterator[None]:
        """Know which module is running, and when the decoder has ended and the loss begins."""
        names = {id(module): name for name, module in root.named_modules()}
        stack = self.places.modules

        def before(module: torch.nn.Module, _: Any) -> None:
            stack.append(names.get(id(module), stack[-1] if stack else ""))

        def after(module: torch.nn.Module, _: Any, __: Any) -> None:
            if stack:
                stack.pop()
            if module is decoder and self.places.phase == "forward":
                self.places.moment = "loss"

        hooks = (
            torch.nn.modules.module.register_module_forward_pre_hook(before),
            torch.nn.modules.module.register_module_forward_hook(after, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            stack.clear()


@cache
def _uses_of_a_lone_gradient() -> int:
    """How often a gradient that only autograd holds is counted when a dispatch mode sees it: ask torch."""
    seen: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is _ADD:
                seen.append(args[0]._use_count())
            return func(*args, **(kwargs or {}))

    with _disable_current_modes(), torch.enable_grad(), torch.device("meta"):
        leaf = torch.empty(4, requires_grad=True)
        branch = leaf * 1.0
        # Each product gives its input a gradient of its own, and the second is added to the first.
        loss = torch.cat([branch * 2.0, branch * 3.0]).sum()
        with Watch():  # type: ignore[no-untyped-call]
            loss.backward()
    return min(seen)


def adopt_model(tracker: Tracker, model: torch.nn.Module) -> None:
    """Record a model's parameters and buffers, in its own order."""
    for name, parameter in model.named_parameters():
        statistics = tuple(_statistics(parameter))
        # As the closed form has it: what is stored in 4 bits counts as quantization, with what it takes to read it.
        tracker.adopt(parameter, "quantization" if statistics else _kind(name), "load", name)
        for tensor in statistics:
            tracker.adopt(tensor, "quantization", "load", name)
    for name, buffer in model.named_buffers():
        tracker.adopt(buffer, "weights", "load", name)


def _kind(name: str) -> Component:
    if "lora_" in name:
        return "adapters"
    return "weights"


def _statistics(parameter: torch.nn.Parameter) -> Iterable[torch.Tensor]:
    """The tensors of a 4-bit weight's QuantState."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        for name in ("absmax", "code", "offset"):
            tensor = getattr(state, name, None)
            if isinstance(tensor, torch.Tensor):
                yield tensor
        state = state.state2
