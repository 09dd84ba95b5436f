"""A pretend accelerator: tensors that say they are on the device `pretend:0`, with real numbers computed by the CPU.

It detects on any machine a tensor left on the host (operations on mixed devices are errors), code that makes the host
wait for the device (`WAITS`), and a value that is read before it has arrived. Load pipelines first, because
transformers fills buffers while it loads. Then call `install` in a process of its own: torch stays patched.

The host waits in the cases that torch's `set_sync_debug_mode` reports on CUDA: Python reads a value (`item`, `tolist`,
`bool`), the shape of a result depends on values (`nonzero`, a boolean mask as an index), or a copy between host and
device is not `non_blocking`. A copy into pinned memory that does not wait holds wrong values until somebody waits for
an event that was recorded after it.

torch's Python back end for new devices, which this module uses, is experimental (torch 2.13).
"""

import contextlib
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map

NAME, DEVICE = "pretend", "pretend:0"
WAITS: Counter = Counter()  # "file::function" -> how often the host has waited there
READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__")
COPIES = ("aten::_to_copy", "aten::copy_")
SHAPED_BY_VALUES = (
    *("aten::nonzero", "aten::masked_select", "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"),
    *("aten::unique_dim", "aten::_unique", "aten::_unique2", "aten::unique_consecutive", "aten::bincount"),
)
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
# These are kernels on a real device. Their C++ code would look for the device here.
MADE_ON_DEVICE = ("arange", "linspace", "logspace", "eye", "full", "randperm")
SENT_TO_DEVICE = ("tensor", "as_tensor")
PROJECT = f"{Path(__file__).parents[1]}/"
_quiet = 0  # while above 0, nothing is noted


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device. Its numbers are in `raw`, on the CPU."""

    @staticmethod
    def __new__(cls, raw, requires_grad=False):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, **layout, device=DEVICE, requires_grad=requires_grad
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __getitem__(self, index):
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index, value):
        return super().__setitem__(_without_lists(index), value)

    def storage(self):
        return self.raw.storage()

    def untyped_storage(self):
        return self.raw.untyped_storage()

    def __reduce_ex__(self, protocol):
        return _restored, (self.raw, self.requires_grad)


def _restored(raw, requires_grad):
    return PretendTensor(raw, requires_grad)


def _without_lists(index):
    """Lists of numbers as tensors on the device, to which a real one copies them, too."""
    if isinstance(index, list):
        return torch.tensor(index, device=DEVICE)
    return tuple(_without_lists(part) for part in index) if isinstance(index, tuple) else index


# ---- Operations ----------------------------------------------------------------------------------------------------


def _run(func, args, kwargs):
    """One operation, with the rules of an accelerator."""
    name, leaves = func._schema.name, tree_leaves((args, kwargs))
    target = kwargs.get("device")
    here = any(isinstance(leaf, PretendTensor) for leaf in leaves)
    _note_waits(name, args, kwargs, here)
    if target is not None:
        here, kwargs = _is_here(target), {**kwargs, "device": torch.device("cpu")}
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}
    if len(devices) > 1 and name not in COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(devices)} in {name}")
    if name == "aten::copy_" and _arrives_later(args, kwargs):
        return args[0]
    plain_args, plain_kwargs = tree_map(
        lambda leaf: leaf.raw if isinstance(leaf, PretendTensor) else leaf, (args, kwargs)
    )
    plain_kwargs.pop("pin_memory", None)
    out = func(*plain_args, **plain_kwargs)
    if not func._schema.returns:
        return None
    if name.endswith("_") and not name.endswith("__"):  # in place: the caller's own tensor
        return args[0]
    return tree_map(lambda leaf: PretendTensor(leaf) if here and isinstance(leaf, torch.Tensor) else leaf, out)


def _is_here(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def _note_waits(name, args, kwargs, here) -> None:
    if name in SHAPED_BY_VALUES and here:
        _note()
    elif name == "aten::repeat_interleave" and here and kwargs.get("output_size") is None:
        _note()
    elif name in INDEXING and here and any(_is_mask(index) for index in args[1]):
        value = args[2] if len(args) > 2 else None
        if value is None or value.dim() > 0:  # a single number is filled in without counting
            _note()
    elif name == "aten::_to_copy":
        crosses = kwargs.get("device") is not None and _is_here(kwargs["device"]) != here and args[0].numel() > 0
        if crosses and not kwargs.get("non_blocking"):
            _note()
    elif name == "aten::copy_":
        crosses = isinstance(args[0], PretendTensor) != isinstance(args[1], PretendTensor) and args[1].numel() > 0
        if crosses and not _is_non_blocking(args, kwargs):
            _note()


def _is_mask(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _is_non_blocking(args, kwargs) -> bool:
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))


def _note() -> None:
    """Count a wait for the innermost function outside of torch and this file."""
    if _quiet:
        return
    # A comprehension is a function of its own up to Python 3.11, and a part of its function since.
    stack = traceback.extract_stack()
    frames = [frame for frame in stack if _is_of_others(frame.filename) and not frame.name.startswith("<")]
    if not frames:  # autograd calls backward formulas from a thread of its own
        WAITS["torch::backward"] += 1
        return
    file = frames[-1].filename
    for folder in ("site-packages/", PROJECT):
        file = file.rpartition(folder)[2]
    WAITS[f"{file}::{frames[-1].name}"] += 1


def _is_of_others(file: str) -> bool:
    return "/torch/" not in file and file != __file__ and not file.startswith("<")


@contextlib.contextmanager
def unnoticed():
    """Waits within are not counted: those of a test that looks at values."""
    global _quiet
    _quiet += 1
    try:
        yield
    finally:
        _quiet -= 1


def _read(method: str):
    def read(self, *args):
        _note()
        return getattr(self.raw, method)(*args)

    return read


# ---- Pinned memory and events --------------------------------------------------------------------------------------

_under_way: list[tuple[torch.Tensor, torch.Tensor]] = []  # where to, and what


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    tensor.is_pretend_pinned = True
    return tensor


def _is_pinned(tensor) -> bool:
    return "is_pretend_pinned" in vars(tensor)


def _arrives_later(args, kwargs) -> bool:
    into, values = args[0], args[1]
    if isinstance(into, PretendTensor) or not _is_non_blocking(args, kwargs) or not _is_pinned(into):
        return False
    _under_way.append((into, values.raw.clone()))
    into.copy_(~values.raw if values.dtype == torch.bool else -1 - values.raw)  # what is not read in time is wrong
    return True


class PretendEvent:
    """An event. Copies that were made before it was recorded have arrived when it has been waited for."""

    def __init__(self, device=None, **settings):
        self._copies = None

    def record(self, stream=None):
        self._copies = list(_under_way)
        _under_way.clear()

    def synchronize(self):
        for into, values in self._copies:
            into.copy_(values)
        self._copies = []

    wait = synchronize


# ---- The device, as torch knows it -----------------------------------------------------------------------------------


class DeviceModule:
    """The counterpart of `torch.cuda`."""

    is_initialized = is_available = staticmethod(lambda: True)
    is_bf16_supported = staticmethod(lambda *given, **settings: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    set_device = synchronize = empty_cache = staticmethod(lambda *given: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
    set_rng_state = staticmethod(lambda state, device=None: None)

    get_rng_state = staticmethod(lambda device=None: torch.zeros(1, dtype=torch.uint8))


class HostGenerator(torch.Generator):
    """A generator of the CPU that says it is of the device that was asked for. As on a real device, a seed there means
    other numbers than on the CPU."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.asked = torch.device(device)
        return made

    @property
    def device(self):
        return self.asked

    def manual_seed(self, seed):
        return super().manual_seed(seed + 1 if _is_here(self.asked) else seed)


def install() -> None:
    """Patch torch, for the rest of this process."""
    import torch.utils.backend_registration as registration

    class Hook(torch._C._acc.PrivateUse1Hooks):
        def is_available(self):
            return True

        def has_primary_context(self, index):
            return True

        is_built = is_available

    registration._setup_privateuseone_for_python_backend(NAME, backend_module=DeviceModule, hook=Hook())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), dispatch_key="PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, dispatch_key="AutocastPrivateUse1")
    _kept.append(library)
    for method in READS:
        setattr(PretendTensor, method, _read(method))
    for name in (*MADE_ON_DEVICE, *SENT_TO_DEVICE):
        setattr(torch, name, _through_the_host(getattr(torch, name), waits=name in SENT_TO_DEVICE))
    torch.empty = _pinning(torch.empty)
    torch.Tensor.pin_memory = lambda self, device=None: _pinned(self.clone())
    torch.Tensor.is_pinned = lambda self, device=None: _is_pinned(self)
    torch.Generator, torch.Event = HostGenerator, PretendEvent
    torch.serialization.add_safe_globals([_restored, PretendTensor])


_kept: list = []  # a library acts as long as it lives


def _pinning(make):
    def empty(*args, pin_memory=False, **kwargs):
        made = make(*args, **kwargs)
        return _pinned(made) if pin_memory else made

    return empty


def _through_the_host(make, *, waits: bool):
    def on_device(*args, device=None, requires_grad=False, **kwargs):
        wanted = {"requires_grad": True} if requires_grad else {}
        if not _is_here(device):
            return make(*args, **({} if device is None else {"device": device}), **wanted, **kwargs)
        if args and isinstance(args[0], PretendTensor):
            return args[0].to(**kwargs) if kwargs else args[0]
        with contextlib.nullcontext() if waits else unnoticed():
            made = make(*args, **kwargs).to(DEVICE)
        return made.requires_grad_() if requires_grad else made

    return on_device
