"""Puts aeup into an existing model, in place, and takes it out again."""

import inspect
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from aeup import nn as aeup_nn
from aeup.adapters import (
    MARK,
    SEQUENCE_NORMS,
    Refusal,
    derive,
    is_foreign,
    kind_of,
    known,
    methods,
    norm_names,
    original_of,
    paired_norms,
    pairs,
    rewrite,
)
from aeup.swap_benchmark import SwapBenchmark, compare

__all__ = ["SwapBenchmark", "SwapReport", "SwapRow", "swap", "unswap"]

_CLASSES = {
    nn.Conv2d: aeup_nn.Conv2d,
    nn.ConvTranspose2d: aeup_nn.ConvTranspose2d,
    nn.GroupNorm: aeup_nn.GroupNorm,
    nn.Upsample: aeup_nn.Upsample,
    nn.UpsamplingNearest2d: aeup_nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d: aeup_nn.UpsamplingBilinear2d,
}
_OURS = tuple(_CLASSES.values())


@dataclass(frozen=True)
class SwapRow:
    """What became of one place of the model. `status`: "replaced" (by aeup's equal), "fused" (modules that now run as
    one operation) or "left", with the `reason`."""

    path: str
    was: str
    status: str
    now: str = ""
    reason: str = ""


@dataclass
class SwapReport:
    """What :func:`swap` did: `rows`; prints as a table. `benchmark` is None, or what was measured."""

    rows: list[SwapRow] = field(default_factory=list)
    dry_run: bool = False
    benchmark: SwapBenchmark | None = None

    @property
    def replaced(self) -> list[SwapRow]:
        return [r for r in self.rows if r.status == "replaced"]

    @property
    def fused(self) -> list[SwapRow]:
        return [r for r in self.rows if r.status == "fused"]

    @property
    def left(self) -> list[SwapRow]:
        return [r for r in self.rows if r.status == "left"]

    @property
    def notes(self) -> list[str]:
        """What a swap cannot know."""
        notes = []
        if self.fused:
            notes.append(
                "Fused modules are not called themselves: a hook added later makes them run one by one again; code "
                "that calls or slices out one of them gets it as it is, unfused."
            )
        if any(r.now.startswith("aeup.Conv2d") for r in self.rows):
            notes.append("aeup.Conv2d has kernels for GPUs; on a CPU most calls go to torch.")
        if any(r.now.startswith("aeup.GroupNorm") for r in self.rows):
            notes.append(
                "aeup.GroupNorm serves 4-D input; what else comes, and on a CPU where torch is as fast, goes to torch: "
                "aeup.explain tells."
            )
        if any(r.now.startswith("aeup for ") for r in self.rows):
            notes.append("Rewritten methods are those of their classes now: a class that is patched later is not seen.")
        return notes

    def to_list(self) -> list[dict]:
        """The rows as dicts of strings, for JSON."""
        return [asdict(r) for r in self.rows]

    def __str__(self) -> str:
        head = ("path", "was", "", "now or why not")
        lines = [(r.path or "(the model)", r.was, r.status, r.now or r.reason) for r in self.rows]
        widths = [max(len(line[i]) for line in (head, *lines)) for i in range(3)]
        text = [
            "  ".join((*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3])).rstrip()
            for line in (head, *lines)
        ]
        done = "would be " if self.dry_run else ""
        text.append(
            f"{len(self.replaced)} {done}replaced, {len(self.fused)} {done}fused, {len(self.left)} left"
            if self.rows
            else "nothing here is what aeup serves"
        )
        text += self.notes
        if self.benchmark is not None:
            text.append(str(self.benchmark))
        return "\n".join(text)


class _Plan:
    """What to change: (module, new class) pairs, and the rows of the report."""

    def __init__(self, model: nn.Module, fuse: bool) -> None:
        self.fuse, self.rows, self.changes = fuse, [], []
        self.paired, self.of_sequences = set(), set()  # norms, by id: in a pair; of another rank
        for path, module in model.named_modules():
            self.visit(path, module)

    def left(self, path: str, was: str, reason: str) -> None:
        self.rows.append(SwapRow(path, was, "left", reason=reason))

    def visit(self, path: str, module: nn.Module) -> None:
        cls = type(module)
        if original_of(module) is not None:
            self.left(path, cls.__name__, "is swapped already")
            self.paired.update(map(id, paired_norms(module)))
        elif isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
            self.left(path, cls.__name__, "was made from other code (TorchScript, fx): swap the model before that")
        elif cls in _OURS:
            self.left(path, f"aeup.{cls.__name__}", "is aeup's already")
        elif cls is nn.Conv2d:
            if pairs.serves_alone(module):
                self.single(path, module)
        elif cls is nn.GroupNorm:
            if id(module) in self.of_sequences:
                self.left(path, "GroupNorm", "its input has 3 dimensions: aeup normalises images")
            elif id(module) not in self.paired:
                self.single(path, module)
        elif isinstance(module, (nn.Upsample, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            self.single(path, module)
        elif "ConvTranspose" in cls.__name__ and "quantized" in cls.__module__:
            self.left(path, cls.__name__, pairs.refuses_type(module, pairs.TRANSPOSED))
        elif pairs.is_sequence(module):
            if self.fuse:
                self.sequence(path, module)
        else:
            self.of_sequences.update(
                id(module._modules.get(n)) for n in SEQUENCE_NORMS.get(f"{cls.__module__}:{cls.__qualname__}", ())
            )
            names = norm_names(module) if self.fuse else pairs.NO_NORMS
            if is_foreign(cls) and methods(cls, names):
                self.forward(path, module, names)
            elif self.fuse:
                self.adapter(path, module)

    def single(self, path: str, module: nn.Module) -> None:
        cls = type(module)
        if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose3d)):
            return self.left(path, cls.__name__, "is 1-D or 3-D: aeup upsamples images")
        if cls not in _CLASSES:
            return self.left(path, cls.__name__, pairs.refuses_type(module, tuple(_CLASSES)))
        if "forward" in module.__dict__:
            return self.left(path, cls.__name__, "has a forward of its own, set on the instance")
        if isinstance(module, (nn.ConvTranspose2d, nn.GroupNorm)) and not pairs.has_plain_weight(module):
            return self.left(path, cls.__name__, f"its weight is a {type(module.weight).__name__}")
        if isinstance(module, nn.Upsample):
            reason = pairs.refuses_upsampling(pairs.upsampling_of(module)._replace(recompute_scale_factor=None))
            if reason:
                return self.left(path, cls.__name__, reason)
        new = _CLASSES[cls]
        self.changes.append((module, new))
        self.rows.append(SwapRow(path, cls.__name__, "replaced", f"aeup.{new.__name__}"))

    def sequence(self, path: str, module: nn.Sequential) -> None:
        names, modules, derived = list(module._modules), list(module._modules.values()), None
        for at, size, reason in pairs.pairs_in(module):
            places = ", ".join(f"{path}.{n}".lstrip(".") for n in names[at : at + size])
            what = " -> ".join(type(m).__name__ for m in modules[at : at + size])
            try:
                if reason or "forward" in module.__dict__:
                    raise Refusal(reason or "the container has a forward of its own, set on the instance")
                derived = derive(type(module), "sequence")
            except Refusal as error:
                self.left(places, what, f"not fused: {error}")
                continue
            first = modules[at]
            now = "aeup.upsample_conv2d" if isinstance(first, nn.Upsample) else f"aeup.{first._get_name()}"
            now += " with activation" if size == 3 or not isinstance(first, nn.Upsample) else ""
            self.paired.add(id(first))
            self.rows.append(SwapRow(places, what, "fused", now))
        if derived:
            self.changes.append((module, derived))

    def adapter(self, path: str, module: nn.Module) -> bool:
        """By an adapter of the library's class, if there is one."""
        cls = type(module)
        try:
            found = known(cls)
            target = found.pair(module) if found else None
            if target is None:
                return False
            if "forward" in module.__dict__:
                raise Refusal("it has a forward of its own, set on the instance")
            derived = derive(cls, "known")
        except Refusal as error:
            self.left(path, f"{cls.__name__}'s pair", f"not fused: {error}")
            return False
        self.changes.append((module, derived))
        self.pair(path, module, target, found.when)
        return True

    def pair(self, path: str, module: nn.Module, target: str, when: str = "") -> None:
        after = _submodule(module, target)
        place = f"{path}.{target}".lstrip(".")
        if after is None:
            return
        reason = pairs.refuses_pair(after)
        what = f"interpolate -> {type(after).__name__}"
        if reason is None:
            self.rows.append(SwapRow(place, what, "fused", "aeup.upsample_conv2d" + (when and f", {when}")))
        elif "Conv" in type(after).__name__ or pairs.is_sequence(after):
            self.left(place, what, f"not fused: {reason}")

    def forward(self, path: str, module: nn.Module, names: pairs.NormNames) -> None:
        """By the class's own forward and the methods that upsample, with their calls replaced."""
        cls, found = type(module), []
        for name in methods(cls, names):
            made = self.method(path, module, name, names)
            found += [made] if made else []
        if not found or (self.fuse and self.adapter(path, module)):
            return
        self.changes.append((module, derive(cls, kind_of(names) if self.fuse else "calls")))
        for target in dict.fromkeys(t for made in found for t in made.pairs):
            self.pair(path, module, target)
        alone = {name for made in found for name in made.alone}
        for norm, activation in dict.fromkeys(p for made in found for p in made.norms):
            self.norm(path, module, norm, activation, norm in alone)

    def method(self, path: str, module: nn.Module, name: str, names: pairs.NormNames):
        cls = type(module)
        try:
            found = rewrite(inspect.getattr_static(cls, name), self.fuse, names)
            if not found.calls:
                return None
            if name in module.__dict__:
                raise Refusal(f"it has a {name} of its own, set on the instance")
            derive(cls, kind_of(names) if self.fuse else "calls")
        except Refusal as error:
            self.left(path, f"{name} of {cls.__name__}", f"{error}; see aeup.intercept")
            return None
        counts = {call: found.calls.count(call) for call in found.calls}
        now = ", ".join(f"aeup for {call}" + (f" ({n} calls)" if n > 1 else "") for call, n in counts.items())
        self.rows.append(SwapRow(path, f"{name} of {cls.__name__}", "replaced", now))
        return found

    def norm(self, path: str, module: nn.Module, name: str, after: str, alone: bool) -> None:
        norm, activation = module._modules[name], module._modules.get(after)
        places = ", ".join(f"{path}.{n}".lstrip(".") for n in (name, after) if n in module._modules)
        what = f"{type(norm).__name__} -> {type(activation).__name__ if activation else after}"
        reason = pairs.refuses_activated(norm, activation)
        if reason:
            return self.left(places, what, f"not fused: {reason}")
        if not alone:
            self.paired.add(id(norm))
        now = "aeup.GroupNorm with activation" + (", where one follows" if alone else "")
        self.rows.append(SwapRow(places, what, "fused", now))


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module


def _apply(changes: list[tuple[nn.Module, type]]) -> list[tuple[nn.Module, type]]:
    """Changes every class, or none. Gives what :func:`_take_out` takes."""
    done = []
    try:
        for module, new in changes:
            old = type(module)
            module.__class__ = new
            done.append((module, old))
            if MARK not in new.__dict__:
                module.__dict__[MARK] = old
    except BaseException:
        _take_out(done)
        raise
    return done


def _take_out(done: list[tuple[nn.Module, type]]) -> None:
    for module, old in done:
        module.__class__ = old
        module.__dict__.pop(MARK, None)


def swap(model: nn.Module, *, fuse: bool = True, dry_run: bool = False, benchmark=None) -> SwapReport:
    """Makes an existing model use aeup, in place: the same parameters (the same objects), ``state_dict`` keys, buffers,
    hooks and results; :func:`unswap` takes it out again.

    What it finds:

    - ``nn.ConvTranspose2d``, ``nn.Upsample`` and its 2-D kin, and ``nn.GroupNorm`` become aeup's, by exact type.
    - ``nn.Conv2d`` with a bias, of any stride, dilation 1, a kernel larger than 1 and 16 channels or more becomes
      ``aeup.Conv2d``, which on a GPU adds the bias as it writes the result.
    - modules whose forward, or a method that it calls, calls ``F.interpolate`` or ``F.conv_transpose2d`` (torchvision's
      segmentation models and feature pyramids, segmentation_models_pytorch, timm, transformers, your own): the same
      methods with these calls by aeup, rebuilt from their source, inside their decorators. Where the source is not what
      runs, or is not there, the module is left; :func:`aeup.intercept` may serve it.
    - with `fuse`, pairs that become one operation: in an ``nn.Sequential``, upsampling and the convolution after it
      (and its activation), a convolution or a transposed one and its activation, and an ``nn.BatchNorm2d`` or
      ``nn.GroupNorm`` and its activation (:func:`aeup.batch_norm`, :func:`aeup.group_norm`; the norm keeps its class
      and its running statistics); in a rewritten forward, an interpolate whose result goes to one module only, and an
      ``nn.GroupNorm`` whose result goes to an activation only, as the code proves (diffusers' ``ResnetBlock2D``, the
      ends of its encoders, decoders and U-Nets); and by adapters diffusers' ``Upsample2D`` (AutoencoderKL and the
      U-Nets) and the decoder blocks of segmentation_models_pytorch.

    Pairs are looked at again whenever they run: what has got a hook, another class or another neighbour since runs
    module by module. Not fused: a convolution with a dilation or a padding mode other than zeros, an upsampling before
    a convolution with a stride, modules with hooks, subclasses, ``nn.SyncBatchNorm``, parametrised, lazy and quantised
    modules, containers with a forward of their own. The gradient of a fused (transposed) convolution with
    ``nn.LeakyReLU`` needs the result: code that changes it in place gets autograd's error, where torch's activation out
    of place allows it.

    A module is changed by its class alone, to a subclass of it, so that ``isinstance``, deepcopy, pickling, DDP, EMA,
    ``torch.compile``, ``torch.export`` and ``.to(...)`` go on. ``torch.jit.trace`` and
    ``torch.onnx.export`` record torch's operators; ``torch.jit.script`` does not know aeup: unswap first.

    Under autocast aeup keeps the dtype of what it upsamples or normalises, where torch goes to float32 for some modes,
    and for group norm on a GPU: the results differ by the rounding of the low precision, and the next layer gets the
    low precision. Layouts are kept.

    Args:
        fuse: False replaces single modules and calls only.
        dry_run: True changes nothing, and reports the same.
        benchmark: the model's input (a tensor, a tuple of arguments or a dict of keyword arguments): times the forward
            without gradients in eval mode before and after, interleaved, compares the outputs, and reports both.

    Raises:
        TypeError: `model` is not a module. Where anything fails the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"aeup.swap: model must be a torch.nn.Module, got {type(model).__name__}")
    plan = _Plan(model, fuse)
    report = SwapReport(plan.rows, dry_run)
    if benchmark is not None:
        done = []

        def swapped(on: bool) -> None:
            done[:] = _apply(plan.changes) if on else _take_out(done) or []

        report.benchmark = compare(model, benchmark, swapped)
    if not dry_run:
        _apply(plan.changes)
    return report


def unswap(model: nn.Module) -> nn.Module:
    """Takes out of a model what :func:`swap` put in: every module gets its class back. aeup's modules that were there
    before stay. Returns the model.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: the class of a swapped module was changed since; nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"aeup.unswap: model must be a torch.nn.Module, got {type(model).__name__}")
    found = []
    for path, module in model.named_modules():
        old = original_of(module)
        if any(MARK in c.__dict__ for c in type(module).__mro__[1:]) or (
            MARK in module.__dict__ and type(module) not in _OURS
        ):
            raise RuntimeError(
                f"aeup.unswap: the class of {path or 'the model'} was changed to {type(module).__name__} after the "
                "swap (by a parametrisation, for example): undo that first"
            )
        if old is not None:
            found.append((module, old))
    _take_out(found)
    return model
