"""How :func:`aeup.swap` changes a module: its class becomes a subclass made here, which only has another forward
(and other methods, where they upsample).

Parameters, buffers, attributes, hooks and the class's name stay what they are; the subclass pickles and copies as a
recipe (original class, kind), so that nothing but the importable original class needs to exist to load it.

An adapter for a class whose forward hides the pair (upsampling, convolution) from :mod:`aeup.adapters.rewrite` is one
entry of `KNOWN`.
"""

import importlib
import types
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from torch import nn

from aeup.adapters import pairs
from aeup.adapters.pairs import NormNames
from aeup.adapters.rewrite import Refusal, is_foreign, methods, norm_names, rewrite, rewritten
from aeup.nn import refuse_script

__all__ = [
    "KNOWN",
    "Adapter",
    "Refusal",
    "derive",
    "is_foreign",
    "kind_of",
    "known",
    "methods",
    "norm_names",
    "original_of",
    "paired_norms",
    "rewrite",
]

MARK = "_aeup_original"


class Adapter(NamedTuple):
    """A forward written for a known class.

    `names`: the names that the library's forward reads (its code's co_names); where they differ it is another version,
    and is left. `forward`: makes the forward from the plain one, which runs what is not fused. `pair`: of a module, the
    path of the submodule that takes the upsampled map (str), or None where this one has no such pair. `when`: the
    condition that only a call knows, for the report.
    """

    names: frozenset[str]
    forward: Callable[[Callable], Callable]
    pair: Callable[[nn.Module], str | None]
    when: str = ""


# "module:class" of the library -> "module:attribute" here. Looked up by a model's classes: no library is imported.
KNOWN = {
    "diffusers.models.upsampling:Upsample2D": "aeup.adapters.diffusers:UPSAMPLE_2D",
    "segmentation_models_pytorch.decoders.unet.decoder:UnetDecoderBlock": "aeup.adapters.smp:UNET",
    "segmentation_models_pytorch.decoders.unetplusplus.decoder:DecoderBlock": "aeup.adapters.smp:UNET_PLUS_PLUS",
    "segmentation_models_pytorch.decoders.manet.decoder:DecoderBlock": "aeup.adapters.smp:MANET",
    "segmentation_models_pytorch.decoders.fpn.decoder:SegmentationBlock": "aeup.adapters.smp:FPN_SEGMENTATION",
}

# Norms whose input has no four dimensions: they are left.
SEQUENCE_NORMS = {"diffusers.models.attention_processor:Attention": ("group_norm", "norm_cross")}


def known(cls: type) -> Adapter | None:
    """The adapter of a class, or None. Raises Refusal where the library's forward is not the one that it is for."""
    entry = KNOWN.get(f"{cls.__module__}:{cls.__qualname__}")
    if entry is None:
        return None
    module, _, name = entry.partition(":")
    adapter = getattr(importlib.import_module(module), name)
    forward = cls.forward
    if not isinstance(forward, types.FunctionType) or set(forward.__code__.co_names) != adapter.names:
        raise Refusal(f"its forward is not the one that aeup's adapter {name} is for")
    return adapter


@lru_cache(None)
def derive(original: type, kind: str) -> type:
    """The subclass of `original` with another forward (and other methods that it may call). Kinds: "sequence", "calls"
    (only calls replaced), "pairs" (and pairs fused; see :func:`kind_of`), "known" (an adapter's). Raises Refusal."""
    if kind == "sequence":
        made = {"forward": pairs.forward_of_sequence}
    elif kind == "known":
        try:
            plain = rewrite(original.forward, True).forward
        except Refusal:
            plain = original.forward
        made = {"forward": known(original).forward(plain)}
    else:
        found = rewritten(original, kind.startswith("pairs"), names_of(kind))
        made = {name: of.forward for name, of in found.items()}
    body = {
        **made,
        "__reduce_ex__": _reduce,
        "__prepare_scriptable__": refuse_script,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        MARK: original,
        "_aeup_kind": kind,
    }
    try:
        return type(original)(original.__name__, (original,), body)
    except Exception as error:  # of a metaclass, or of __init_subclass__
        raise Refusal(f"its class cannot be derived from: {error}") from error


def kind_of(names: NormNames) -> str:
    """The kind "pairs" for a module with these group norms and activations."""
    return "pairs:" + ";".join(map(",".join, names)) if names.norms else "pairs"


def names_of(kind: str) -> NormNames:
    """What :func:`kind_of` was given."""
    names = kind.partition(":")[2]
    return NormNames(*(tuple(filter(None, n.split(","))) for n in names.split(";"))) if names else pairs.NO_NORMS


def paired_norms(module: nn.Module) -> list[nn.Module]:
    """Of a swapped module: the norms that run with the activation after them, as long as nothing changes."""
    kind, names = type(module).__dict__.get("_aeup_kind", ""), module._modules
    if kind == "sequence":
        modules = list(names.values())
        return [modules[at] for at, _, reason in pairs.pairs_in(module) if reason is None]
    if not kind.startswith("pairs:"):
        return []
    found = rewritten(original_of(module), True, names_of(kind)).values()
    alone = {name for made in found for name in made.alone}
    return [
        names[n]
        for made in found
        for n, after in made.norms
        if n in names and n not in alone and not pairs.refuses_activated(names[n], names.get(after))
    ]


def _reduce(self, protocol):
    cls = type(self)
    original = cls.__dict__.get(MARK)
    if original is None:  # a class made from ours, by a parametrisation for example
        return super(_origin_of(cls), self).__reduce_ex__(protocol)
    return (_rebuild, (original, cls._aeup_kind), *object.__reduce_ex__(self, 2)[2:])


def _origin_of(cls: type) -> type:
    return next(c for c in cls.__mro__ if MARK in c.__dict__)


def _rebuild(original: type, kind: str) -> nn.Module:
    return (made := derive(original, kind)).__new__(made)


def original_of(module: nn.Module) -> type | None:
    """The class that a module had before it was swapped, or None."""
    return type(module).__dict__.get(MARK) or module.__dict__.get(MARK)
