"""A pretended GPU: real numbers computed on the CPU, by tensors that say they are on ``cuda:0``.

What would fail on a GPU fails here (an operation on tensors of both machines), and what would wait for it is
counted: operations, and reads and copies that stop the host, with the line of the project that asks.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = f"{Path(__file__).resolve().parents[1]}/"
DEVICE = torch.device("cuda", 0)
META = torch.device("meta")  # what torch itself takes the device for: it has no kernels there, and asks us
aten = torch.ops.aten

# The host needs a number, or a size that depends on numbers.
READS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.repeat_interleave,
    aten.bincount,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
# Nothing is computed.
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view, aten.alias}
FREE |= {aten._local_scalar_dense, aten._fused_sdp_choice, aten.detach, aten.lift_fresh, aten.set_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class GPUTensor(Tensor):
    """Holds the CPU tensor that is computed with."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> GPUTensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.size(), device=META, **layout)
        made.inner = inner
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    __torch_function__ = torch._C._disabled_torch_function_impl

    def numpy(self, **options: Any) -> Any:
        raise TypeError("a tensor on cuda:0 has no NumPy array: use Tensor.cpu() first")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunction():  # a checkpoint counts for nothing
            return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a tensor of the pretended GPU outlived it")


class PretendedGPU(TorchDispatchMode):
    """Counts what is done on the device; enter it with ``pretended_gpu``."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()  # by kind and line

    def clear(self) -> None:
        self.operations.clear()
        self.syncs.clear()

    def wait(self, kind: str) -> None:
        self.syncs[f"{kind} at {_project_line()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet, tensors = func.overloadpacket, list(_tensors((*args, *kwargs.values())))
        ours = [x for x in tensors if isinstance(x, GPUTensor)]
        target = kwargs.get("device")
        on_gpu = bool(ours) if target is None else torch.device(target).type != "cpu"
        if not ours and not on_gpu:
            return func(*args, **kwargs)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if packet is aten._to_copy and bool(ours) != on_gpu:
            self._transfer(args[0], on_gpu, kwargs.get("non_blocking", False))
        elif packet is aten.copy_ and len(ours) == 1:
            self._transfer(args[1], args[0] is ours[0], kwargs.get("non_blocking", len(args) > 2 and args[2]))
        elif strangers := [x for x in tensors if x.ndim and not isinstance(x, GPUTensor)]:
            if packet not in INDEXING or args[0] is strangers[0]:
                raise RuntimeError(f"{func} on tensors of the CPU and of cuda:0 at {_project_line()}")
            self.wait("index from the host")
        self._count(func, args, kwargs)
        made = func(*_inner(args), **{key: _inner(value) for key, value in kwargs.items()})
        if packet is aten.copy_:
            return args[0]
        return _outer(made, {id(x.inner): x for x in ours}) if on_gpu else made

    def _transfer(self, source: Tensor, to_gpu: bool, non_blocking: bool) -> None:
        # From pinned memory a copy does not stop the host.
        if not (to_gpu and non_blocking and hasattr(source, "is_pretended_pinned")):
            self.wait("copy from the host" if to_gpu else "copy to the host")

    def _count(self, func: Any, args: Any, kwargs: Any) -> None:
        packet = func.overloadpacket
        indices = args[1] if packet in INDEXING else ()
        by_mask = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)
        sized = packet is aten.repeat_interleave and kwargs.get("output_size") is not None
        if by_mask or (packet in READS and not sized):
            self.wait("boolean index" if by_mask else packet._qualified_op_name.removeprefix("aten::"))
        if not (func.is_view or packet in FREE):
            self.operations[packet._qualified_op_name.removeprefix("aten::")] += 1


class _Devices(TorchFunctionMode):
    """Names of the pretended device, and numbers of the host that become tensors of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            kwargs = dict(kwargs)
            target = kwargs.pop("device", None)
            if func is Tensor.new_tensor:
                source, *args = args
                kwargs, target = {"dtype": source.dtype} | kwargs, target or source.device
            made = (torch.as_tensor if func is torch.as_tensor else torch.tensor)(*args, **kwargs)
            return made if target is None else made.to(_named(target))
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_pretended_pinned = True
            return pinned
        if func is torch.device:
            return func(*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], GPUTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(x).to(META) if isinstance(x, list) else x for x in index)
            return func(args[0], index, *args[2:])
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        return func(*map(_named, args), **{key: _named(value) for key, value in kwargs.items()})

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        """The fused kernel, which every GPU has; torch would take it apart here."""
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = query.new_zeros(()).where(attn_mask, -torch.inf)
        fused = aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask)[0]


def _named(x: Any) -> Any:
    return META if isinstance(x, torch.device | str) and str(x).startswith("cuda") else x


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _tensors(part)


def _inner(x: Any) -> Any:
    """Arguments of an operation, with what is computed with in place of our tensors."""
    if isinstance(x, list | tuple):
        return type(x)(map(_inner, x))
    return x.inner if isinstance(x, GPUTensor) else x


def _outer(x: Any, known: Mapping[int, Tensor]) -> Any:
    """Results of an operation as our tensors; what was changed in place is the tensor that was given."""
    if isinstance(x, list | tuple):
        return type(x)(_outer(part, known) for part in x)
    if not isinstance(x, Tensor):
        return x
    return known[id(x)] if id(x) in known else GPUTensor(x)


def _project_line() -> str:
    frame: Any = sys._getframe(1)
    while frame := frame.f_back:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and path != __file__:
            return f"{path.removeprefix(ROOT)}:{frame.f_lineno}"
    return "torch"


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """A machine with one GPU, ``DEVICE``, that computes in float32."""
    gpu = PretendedGPU()
    replaced: dict[str, Callable[..., Any]] = {
        "torch.autocast": lambda *args, **kwargs: nullcontext(),
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.get_rng_state": lambda device: torch.get_rng_state(),
        "torch.cuda.set_rng_state": lambda state, device: torch.set_rng_state(state),
        "torch.cuda.max_memory_allocated": lambda device: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.get_device_name": lambda device: "pretended GPU",
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(gpu)
        stack.enter_context(_Devices())
        yield gpu
