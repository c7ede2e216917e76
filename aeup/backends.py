"""Which kernel runs, and why. Each op has one kernel per backend; each kernel has one predicate that says why not, and
the tuned tables (aeup/tuned) say which of those that can is the fastest."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from aeup import tuned

NAMES = tuple(name for name in tuned.BACKENDS if name != "composed")
# "auto" takes what a tuned table names, else the first that serves. "composed", where an op has it, is made of other
# ops and cannot be asked for.
_ORDER = {"cpu": ("cpu", "composed", "torch"), "cuda": ("cuda", "triton", "composed", "torch")}


@dataclass(frozen=True, eq=False)
class Kernel:
    """A backend's implementation of an op. `run`, `refuses` and `yields` take the op's arguments. `refuses` gives the
    reason why it cannot serve the call, or None; `yields`, if given, why the choice "auto" goes on to the next backend
    although it could; `label`, if given, names what would run within the backend (its tensors are meta tensors).
    `plan`, if given, makes a function of the tensors alone that does what `run` does for all calls that are alike, or
    gives None."""

    run: Callable[..., Any]
    refuses: Callable[..., str | None]
    label: Callable[..., str] | None = None
    yields: Callable[..., str | None] | None = None
    plan: Callable[..., Callable | None] | None = None

    def passes(self, *args) -> str | None:
        """Why "auto" does not take it, or None."""
        return self.refuses(*args) or (self.yields(*args) if self.yields else None)


@dataclass(frozen=True, eq=False)
class Op:
    """`kind`, `problem` and `features`, where given, are for the tuned tables: what their rules go by. `kind`: of every
    call, "op" and maybe "pass". `problem` takes the op's arguments and gives, fast, a hashable that holds what else a
    rule may depend on; `features(problem, device)` says it in a rule's words: "dtype", "layout", "pixels", and "mode"
    and "family" where the op knows them."""

    name: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    kind: dict[str, str] = field(default_factory=dict)
    problem: Callable[..., Any] | None = None
    features: Callable[[Any, torch.device], dict] | None = None
    order: dict[str, tuple[str, ...]] = field(init=False)  # by device: what "auto" tries, in turn
    rules: dict = field(init=False)  # by device, "cpu" or torch's: what the tuned tables say, or None

    def __post_init__(self) -> None:
        order = {device: tuple(n for n in names if n in self.kernels) for device, names in _ORDER.items()}
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "rules", _ByDevice(self))


class Decision(NamedTuple):
    """The backend that a tuned table names, and why."""

    backend: str
    why: str


class _Rules:
    """What the tuned tables say about an op on a device. Decisions are kept by problem."""

    def __init__(self, op: Op, device: torch.device, rules: tuple[tuned.Rule, ...]) -> None:
        self.op, self.device, self.rules, self.decided = op, device, rules, {}

    def decision(self, args: tuple) -> Decision | None:
        problem = self.op.problem(*args)
        try:
            return self.decided[problem]
        except KeyError:
            features = self.op.kind | self.op.features(problem, self.device)
            found = next((Decision(r.backend, r.why) for r in self.rules if r.fits(features)), None)
            if len(self.decided) >= 4096:  # sizes that change from call to call
                self.decided.clear()
            return self.decided.setdefault(problem, found)


class _ByDevice(dict):
    """The rules of an op by device, read when first asked for; None where there are none."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op
        tuned.on_change.append(self.clear)

    def __missing__(self, device: torch.device | str) -> _Rules | None:
        kind, rules, device_ = self.op.kind, (), torch.device(device)
        if kind:
            rules = tuple(r for r in tuned.rules(device_) if r.may_fit(kind))
        return self.setdefault(device, _Rules(self.op, device_, rules) if rules else None)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


def _checked(name: str) -> str:
    if name not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of auto, {', '.join(NAMES)}; got {name!r}")
    return name


_default = _checked(os.environ.get("AEUP_BACKEND", "auto"))
_forced: ContextVar[str | None] = ContextVar("aeup_backend", default=None)


def set_backend(name: str) -> None:
    """Sets the backend of the process: "auto" (default), "cuda", "triton", "cpu" or "torch".

    A backend named here that cannot serve a call raises :class:`BackendError` with its reason. The environment
    variable ``AEUP_BACKEND`` sets it at import. Raises ValueError for another name.
    """
    global _default
    _default = _checked(name)


def get_backend() -> str:
    """The backend that calls made here ask for: that of the innermost :func:`backend`, else of :func:`set_backend`."""
    return _forced.get() or _default


@contextmanager
def backend(name: str):
    """``with aeup.backend("triton"): ...``: as :func:`set_backend`, inside the block and this thread (or task) only.
    The backward of what is computed inside uses the same backend."""
    token = _forced.set(_checked(name))
    try:
        yield
    finally:
        _forced.reset(token)


def choose(op: Op, src: torch.Tensor, args: tuple, name: str | None = None) -> Kernel:
    """The kernel that serves op(*args) on the device of `src`. Raises BackendError where `name` (default:
    get_backend()) cannot."""
    name = name or _forced.get() or _default
    if name != "auto":
        kernel = op.kernels[name]
        reason = kernel.refuses(*args)
        if reason:
            raise BackendError(f"{op.name}: backend {name!r} cannot serve this call: {reason}")
        return kernel
    cpu = src.is_cpu
    rules = op.rules["cpu" if cpu else src.device]
    if rules is not None:
        decision = rules.decision(args)
        if decision is not None:
            kernel = op.kernels.get(decision.backend)
            if kernel and kernel.refuses(*args) is None:
                return kernel
    for candidate in op.order["cpu"] if cpu else op.order.get(src.device.type, ("torch",)):
        kernel = op.kernels[candidate]
        if kernel.passes(*args) is None:
            return kernel
    raise BackendError(f"{op.name}: no backend serves this call on {src.device}")


# --- explain ---


@dataclass(frozen=True)
class Choice:
    """What one call of one op would run: `backend` and `kernel`, and why each other backend would not."""

    op: str
    call: str
    backend: str
    kernel: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}({self.call}) -> {self.backend}" + (f" [{self.kernel}]" if self.kernel else "")]
        lines += [f"    {name}: {reason}" for name, reason in self.others.items()]
        return "\n".join(lines)


class Explanation(list):
    """A list of :class:`Choice`, one per call of an aeup op; prints as text."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self else "no aeup op was called"


_record: ContextVar[list | None] = ContextVar("aeup_record", default=None)


def note(op: Op, device: torch.device, args: tuple, call: str) -> None:
    """Remembers a call while :func:`explain` runs. `args` hold fake tensors."""
    record = _record.get()
    if record is not None:
        record.append((op, device, args, call))


def note_torch(name: str, call: str | Callable[[], str], reason: str) -> None:
    """Remembers a call outside the kernels' domain, which torch serves. `call`: its description, or what makes it."""
    if torch.compiler.is_compiling():
        return
    record = _record.get()
    if record is not None:
        call = call if isinstance(call, str) else call()
        record.append(Choice(name, call, "torch", "", {n: reason for n in NAMES if n != "torch"}))


def _on_meta(x):
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta") if torch.is_tensor(x) else x


def _explained(op: Op, device: torch.device, args: tuple, call: str) -> Choice:
    name = get_backend()
    auto = name == "auto"
    refusals = {n: k.refuses(*args) for n, k in op.kernels.items()}
    rules = op.rules["cpu" if device.type == "cpu" else device] if auto else None
    decision = rules and rules.decision(args)
    if decision and refusals.get(decision.backend, "") is None:
        taken, why = decision.backend, decision.why or "comes after " + decision.backend
        reasons = refusals
    else:
        reasons = {n: k.passes(*args) for n, k in op.kernels.items()} if auto else refusals
        order = op.order.get(device.type, ("torch",)) if auto else (name,)
        taken = next((n for n in order if reasons[n] is None), None)
        why = f"comes after {taken}" if auto else f"{taken} was asked for"
    if taken is None:
        return Choice(op.name, call, "none", "", {n: r or "not asked for" for n, r in reasons.items()})
    label = op.kernels[taken].label
    kernel = label(device, *map(_on_meta, args)) if label else ""
    return Choice(op.name, call, taken, kernel, {n: r or why for n, r in reasons.items() if n != taken})


def calls(fn: Callable, *args, **kwargs) -> list:
    """The calls of aeup's ops that ``fn(*args, **kwargs)`` would make, forward and backward, in turn: (op, device,
    arguments, text), the arguments' tensors fake; or a :class:`Choice`, where torch serves. Nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class Unwritten(TorchDispatchMode):
        """The fake mode runs sums of a real tensor and a number: in place they would count a batch norm's batches."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.is_mutable:
                args, kwargs = tree_map_only(torch.Tensor, fake, (args, kwargs))
            return func(*args, **kwargs or {})

    def fake(t: torch.Tensor) -> torch.Tensor:
        return t if isinstance(t, FakeTensor) else mode.from_tensor(t)

    token = _record.set([])
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), Unwritten():
            args, kwargs = tree_map_only(torch.Tensor, fake, (args, kwargs))
            fn(*args, **kwargs)
        return _record.get()
    finally:
        _record.reset(token)


def explain(fn: Callable, *args, **kwargs) -> Explanation:
    """Which kernels ``fn(*args, **kwargs)`` would run, forward and backward, and why each other backend would not.

    `fn` is a function or module that uses aeup's ops. Nothing is computed: `fn` runs on fake tensors (shapes and
    dtypes only), so it must not read tensor values. Returns an :class:`Explanation`; ``print`` it.
    """
    return Explanation(c if isinstance(c, Choice) else _explained(*c) for c in calls(fn, *args, **kwargs))
