"""A module's own forward, and the methods that it calls, with their calls of torch's upsampling functions, and of its
group norms, made aeup's: no code is copied from any library, and nothing is patched outside of the new functions.

The source is parsed, the calls are renamed to free variables of a function that surrounds it, and the result is
compiled with the same globals, closure and line numbers. It is refused unless compiling the source as it stands gives
the very code that runs. An interpolate whose result goes to one call and nowhere else, as the code itself proves, joins
that call (:func:`aeup.adapters.pairs.pair`); so does a group norm the activation that takes its result
(:func:`aeup.adapters.pairs.activated`).
"""

import __future__

import ast
import copy
import inspect
import linecache
import types
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from aeup.adapters.pairs import (
    ACTIVATION_FUNCTIONS,
    GROUP_NORMS,
    NO_NORMS,
    SERVED,
    NormNames,
    Resampling,
    activated,
    activation_of_call,
    pair,
    refuses_upsampling,
)
from aeup.functional import conv_transpose2d, interpolate

_CALLS = {
    F.interpolate: "_aeup_interpolate",
    F.upsample: "_aeup_interpolate",
    F.upsample_nearest: "_aeup_interpolate",
    F.conv_transpose2d: "_aeup_conv_transpose2d",
    torch.conv_transpose2d: "_aeup_conv_transpose2d",
}
_FREE = {
    "_aeup_interpolate": interpolate,
    "_aeup_conv_transpose2d": conv_transpose2d,
    "_aeup_pair": pair,
    "_aeup_activated": activated,
}
_FUTURE = reduce(lambda a, b: a | b, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names))
NAMES = frozenset(f.__name__ for f in _CALLS)


class Rewritten(NamedTuple):
    """`calls`: the functions that were replaced, as the source writes them; `pairs`: the attributes of self ("conv",
    "head.0") that take an interpolate's result and now do so in one operation where they can; `norms`: group norms and
    the activations after them, as attributes of self, or as the source writes a function; `alone`: norms that it calls
    without an activation too, in another branch for example."""

    forward: Callable
    calls: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    norms: tuple[tuple[str, str], ...] = ()
    alone: frozenset[str] = frozenset()


class Refusal(Exception):
    """Why a method cannot be rewritten."""


def is_foreign(cls: type) -> bool:
    """Whether a class is a user's or a library's; the benchmarks' networks stand for a user's."""
    return not cls.__module__.startswith(("torch.", "aeup.")) or cls.__module__.startswith("aeup.bench.")


@lru_cache(None)
def _reached(cls: type) -> dict[str, frozenset[str]]:
    """The forward of a foreign class and the methods that it may call, with the names that each uses."""
    own = {name for c in cls.__mro__ if is_foreign(c) for name in vars(c)}
    found, waiting = {}, ["forward"]
    for method in waiting:
        function = inspect.unwrap(inspect.getattr_static(cls, method, None))
        if isinstance(function, types.FunctionType):
            codes = function.__code__, *_codes(function.__code__)
            found[method] = names = frozenset(n for code in codes for n in code.co_names)
            waiting += sorted(n for n in names & own if n not in waiting and not n.startswith("__"))
    return found


@lru_cache(None)
def methods(cls: type, norms: NormNames = NO_NORMS) -> tuple[str, ...]:
    """Those that name one of the functions, or one of the group norms: a guess, made without reading their source."""
    wanted = NAMES.union(norms.norms)
    return tuple(method for method, names in _reached(cls).items() if not names.isdisjoint(wanted))


def norm_names(module: nn.Module) -> NormNames:
    """Empty where its forward cannot have a pair of them."""
    norms, activations = (
        tuple(sorted(n for n, m in module._modules.items() if type(m) in kinds)) for kinds in (GROUP_NORMS, SERVED)
    )
    if norms and not activations:
        functions = {f.__name__ for f in ACTIVATION_FUNCTIONS}
        if all(names.isdisjoint(functions) for names in _reached(type(module)).values()):
            return NO_NORMS
    return NormNames(norms, activations) if norms else NO_NORMS


@lru_cache(None)
def rewrite(forward: Callable, fuse: bool, norms: NormNames = NO_NORMS) -> Rewritten:
    """A method, as its class holds it, by aeup, or as it is where it calls none of the functions. Raises Refusal."""
    if not isinstance(forward, types.FunctionType):
        raise Refusal("it is not a Python function")
    if hasattr(forward, "__wrapped__"):
        return _rewrapped(forward, fuse, norms)
    definition = _definition(forward)
    code = forward.__code__
    names = {n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(definition)
             if isinstance(n, (ast.Attribute, ast.Name))}  # fmt: skip
    if not names.isdisjoint(("locals", "vars", "eval", "exec")):
        raise Refusal("it looks at its own variables")
    if any(n.startswith("__") and not n.endswith("__") for n in names):
        raise Refusal("it uses names that are private to its class")
    if inspect.iscoroutinefunction(forward) or inspect.isgeneratorfunction(forward):
        raise Refusal("it is a generator or a coroutine")
    rewriter = _Rewriter(forward, definition, fuse, norms)
    definition.body = rewriter.statements(definition.body)
    if not rewriter.calls:
        return Rewritten(forward)
    free = (*code.co_freevars, *_FREE)
    arguments = ast.arguments(
        posonlyargs=[], args=[ast.arg(n) for n in free], kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    result = ast.Return(ast.Name(definition.name, ast.Load()))
    outer = ast.parse("def around(): pass").body[0]
    outer.args, outer.body = arguments, [definition, result]
    module = ast.fix_missing_locations(ast.Module([outer], []))
    made = compile(module, code.co_filename, "exec", code.co_flags & _FUTURE, dont_inherit=True)
    made = next(c for c in _codes(made) if c.co_name == code.co_name and c.co_firstlineno == definition.lineno)
    cells = dict(zip(code.co_freevars, forward.__closure__ or (), strict=True))
    cells |= {name: types.CellType(value) for name, value in _FREE.items()}
    closure = tuple(cells[name] for name in made.co_freevars)
    new = _like(forward, made, closure)
    called = {rewriter.attribute_of_self(n.func) for n in ast.walk(definition) if isinstance(n, ast.Call)}
    alone = called.intersection(norms.norms)
    return Rewritten(
        new, tuple(rewriter.calls.values()), tuple(rewriter.pairs), tuple(rewriter.norms), frozenset(alone)
    )


@lru_cache(None)
def rewritten(cls: type, fuse: bool, norms: NormNames = NO_NORMS) -> dict[str, Rewritten]:
    """The forward and the other :func:`methods` of a class that :func:`rewrite` changes."""
    found = {}
    for name in methods(cls, norms):
        try:
            found[name] = rewrite(inspect.getattr_static(cls, name), fuse, norms)
        except Refusal:
            continue
    return {name: made for name, made in found.items() if made.calls}


def _like(function: types.FunctionType, code: types.CodeType, closure: tuple) -> types.FunctionType:
    new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__, new.__annotations__ = function.__kwdefaults__, function.__annotations__
    new.__doc__, new.__qualname__, new.__module__ = function.__doc__, function.__qualname__, function.__module__
    new.__dict__.update(function.__dict__)
    return new


def _rewrapped(wrapper: types.FunctionType, fuse: bool, norms: NormNames) -> Rewritten:
    """A decorator's function (functools.wraps) around the rewritten forward, where a variable of its holds that."""
    inner = wrapper.__wrapped__
    cells = wrapper.__closure__ or ()
    at = [i for i, cell in enumerate(cells) if _content(cell) is inner]
    if len(at) != 1:
        raise Refusal("it is decorated, and the decorator does not show what it calls")
    found = rewrite(inner, fuse, norms)
    if not found.calls:
        return found._replace(forward=wrapper)
    closure = (*cells[: at[0]], types.CellType(found.forward), *cells[at[0] + 1 :])
    new = _like(wrapper, wrapper.__code__, closure)
    new.__dict__.update({name: found.forward for name, value in new.__dict__.items() if value is inner})
    return found._replace(forward=new)


def _content(cell: types.CellType):
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _codes(code: types.CodeType):
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


@lru_cache(64)
def _parsed(filename: str, source: str) -> tuple[ast.Module, tuple[types.CodeType, ...]]:
    try:
        return ast.parse(source), tuple(_codes(compile(source, filename, "exec", dont_inherit=True)))
    except SyntaxError as error:
        raise Refusal(f"its source cannot be read: {error}") from None


def _definition(forward: types.FunctionType) -> ast.FunctionDef:
    """A fresh syntax tree of the function."""
    code = forward.__code__
    source = "".join(linecache.getlines(code.co_filename, forward.__globals__))
    if not source:
        raise Refusal("its source cannot be found")
    tree, codes = _parsed(code.co_filename, source)
    if code not in codes:
        raise Refusal("its source is not what runs")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            if code.co_firstlineno == min([node.lineno, *(d.lineno for d in node.decorator_list)]):
                node = copy.deepcopy(node)
                node.decorator_list = []  # what they made of the function is around it, or in its attributes
                return node
    raise Refusal("it is not a plain function")


class _Rewriter(ast.NodeTransformer):
    def __init__(self, forward: types.FunctionType, definition: ast.FunctionDef, fuse: bool, names: NormNames) -> None:
        self.code, self.globals, self.fuse, self.names = forward.__code__, forward.__globals__, fuse, names
        self.me = self.code.co_varnames[0] if self.code.co_argcount else None
        self.calls, self.pairs = {}, []  # calls by their place: one that moves into two branches is one
        self.norms = {}
        nodes = list(ast.walk(definition))
        # Bound somewhere within, so perhaps no global: stored names, arguments, imports, inner functions.
        self.bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        self.bound |= {n.arg for n in nodes if isinstance(n, ast.arg)} | set(self.code.co_freevars)
        self.bound |= {(n.asname or n.name).partition(".")[0] for n in nodes if isinstance(n, ast.alias)}
        self.bound |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        # An exception between two statements that became one would find other values.
        self.joins = (
            fuse
            and not any(isinstance(n, ast.Try) for n in nodes)
            and self.me not in ({n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)})
        )

    def resolve(self, node: ast.expr):
        """The object that a chain of names is, where it starts at a global."""
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
        return self.globals.get(node.id) if isinstance(node, ast.Name) and node.id not in self.bound else None

    def target(self, node: ast.AST) -> str | None:
        """What the call of a function of torch's becomes."""
        found = self.resolve(node.func) if isinstance(node, ast.Call) else None
        return _CALLS.get(found) if isinstance(found, Callable) and found.__hash__ else None

    def note(self, call: ast.Call) -> None:
        self.calls[call.lineno, call.col_offset] = ast.unparse(call.func)

    def attribute_of_self(self, node: ast.expr) -> str | None:
        """ "a.0" for self.a[0]."""
        if isinstance(node, ast.Name):
            return "" if node.id == self.me else None
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            name = str(node.slice.value)
        else:
            return None
        owner = self.attribute_of_self(node.value)
        return None if owner is None else f"{owner}.{name}".lstrip(".")

    def joined(self, call: ast.Call, resampling: ast.Call) -> ast.Call | None:
        """call(resampling(...)) as one call, if `call` is of an attribute of self."""
        path = self.attribute_of_self(call.func) if self.fuse else None
        if not path or self.target(resampling) != "_aeup_interpolate" or _starred(resampling):
            return None
        given = dict(zip(("input", *Resampling._fields), resampling.args, strict=False))
        given |= {k.arg: k.value for k in resampling.keywords}
        of = ("mode", "recompute_scale_factor", "antialias")
        known = {k: given[k].value for k in of if isinstance(given.get(k), ast.Constant)}
        if "input" not in given or refuses_upsampling(Resampling(**known)):
            return None
        self.note(resampling)
        self.pairs.append(path)
        arguments = [self.visit(a) for a in resampling.args]
        keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in resampling.keywords]
        return ast.copy_location(
            ast.Call(ast.Name("_aeup_pair", ast.Load()), [call.func, *arguments], keywords), resampling
        )

    def norm_pair(self, call: ast.Call, norm: ast.expr) -> tuple[str, str] | None:
        """A group norm of self and an activation, if call(norm(...), ...) is of such: their names."""
        path = self.attribute_of_self(norm.func) if isinstance(norm, ast.Call) else None
        if path not in self.names.norms or len(norm.args) != 1 or norm.keywords or _starred(norm):
            return None
        after = self.attribute_of_self(call.func)
        if after in self.names.activations:
            return (path, after) if _takes_one(call) else None
        found = self.resolve(call.func)
        options = (call.args[1:], {k.arg: k.value for k in call.keywords})
        if not (isinstance(found, Callable) and found.__hash__) or _starred(call):
            return None
        if not all(isinstance(v, ast.Constant) for v in (*options[0], *options[1].values())):
            return None
        args, kwargs = tuple(v.value for v in options[0]), {k: v.value for k, v in options[1].items()}
        return (path, ast.unparse(call.func)) if activation_of_call(found, args, kwargs) else None

    def with_norm(self, call: ast.Call, norm: ast.expr) -> ast.Call | None:
        """call(norm(...), ...) as one call, if they are an activation and a group norm of self."""
        found = self.norm_pair(call, norm)
        if found is None:
            return None
        self.note(norm)
        self.norms[found] = None
        arguments = [norm.func, call.func, self.visit(norm.args[0]), *call.args[1:]]
        return ast.copy_location(ast.Call(ast.Name("_aeup_activated", ast.Load()), arguments, call.keywords), norm)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if node.args and isinstance(node.args[0], ast.Call):
            one = _takes_one(node) and self.joined(node, node.args[0])
            one = one or self.with_norm(node, node.args[0])
            if one:
                return one
        name = self.target(node)
        if name:
            self.note(node)
            node.func = ast.copy_location(ast.Name(name, ast.Load()), node.func)
        return self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name in ("body", "orelse"):
            block = getattr(node, name, None)
            if isinstance(block, list) and isinstance(node, (ast.If, ast.For, ast.While, ast.With)):
                setattr(node, name, self.statements(block))
        return super().generic_visit(node)

    def statements(self, block: list[ast.stmt]) -> list[ast.stmt]:
        """A block; ``x = interpolate(...); x = f(self.conv(x))`` (or a return of it) becomes one statement. Before an
        ``if self.a: ...`` of which a branch starts so, the interpolate moves into both branches."""
        out = []
        for statement in block:
            if out and self.follow(out[-1], statement):
                continue
            if out and (self.join(out[-1], statement) or self.sink(out[-1], statement)):
                out.pop()
            out.append(statement)
        return [self.visit(s) for s in out]

    def sink(self, first: ast.stmt, second: ast.stmt) -> bool:
        """Moves the interpolate of `first` into the branches of `second` where it joins there."""
        if not isinstance(second, ast.If) or not self.attribute_of_self(second.test):
            return False
        if not any(branch and self.join(first, copy.deepcopy(branch[0])) for branch in (second.body, second.orelse)):
            return False
        second.body.insert(0, first)
        second.orelse.insert(0, copy.deepcopy(first))
        return True

    def follow(self, first: ast.stmt, second: ast.stmt) -> bool:
        """Moves `second` to the end of the branches of `first` where one ends in a norm that it joins there."""
        if not isinstance(first, ast.If) or not self.ends_in_norm(first, second):
            return False
        for branch in (first.body, first.orelse):
            if not (branch and self.follow(branch[-1], second)):
                branch.append(copy.deepcopy(second))
        return True

    def ends_in_norm(self, first: ast.stmt, second: ast.stmt) -> bool:
        if isinstance(first, ast.If):
            return any(branch and self.ends_in_norm(branch[-1], second) for branch in (first.body, first.orelse))
        return (
            isinstance(first, ast.Assign)
            and isinstance(first.value, ast.Call)
            and self.attribute_of_self(first.value.func) in self.names.norms
            and self.join(first, copy.deepcopy(second))
        )

    def join(self, first: ast.stmt, second: ast.stmt) -> bool:
        """Moves the interpolate, or the group norm, of `first` into `second` where nothing else can see its result."""
        if not (
            isinstance(first, ast.Assign)
            and len(first.targets) == 1
            and isinstance(first.targets[0], ast.Name)
            and isinstance(first.value, ast.Call)
        ):
            return False
        norm = self.attribute_of_self(first.value.func) in self.names.norms
        if not norm and self.target(first.value) != "_aeup_interpolate":
            return False
        name = first.targets[0].id
        ends = isinstance(second, ast.Return) or (
            isinstance(second, ast.Assign)
            and len(second.targets) == 1
            and isinstance(second.targets[0], ast.Name)
            and second.targets[0].id == name
        )
        if not ends or not self.joins or name in self.code.co_cellvars or name not in self.code.co_varnames:
            return False
        call = second.value
        while isinstance(call, ast.Call) and call.args:
            if self.attribute_of_self(call.func) is None and self.resolve(call.func) is None:
                return False
            if isinstance(call.args[0], ast.Name):
                if call.args[0].id != name or _starred(first.value):
                    return False
                takes = _takes_one(call) and self.attribute_of_self(call.func)
                if not (self.norm_pair(call, first.value) if norm else takes):
                    return False
                call.args[0] = first.value
                return True
            if not _takes_one(call):
                return False
            call = call.args[0]
        return False


def _takes_one(call: ast.Call) -> bool:
    return len(call.args) == 1 and not call.keywords


def _starred(call: ast.Call) -> bool:
    return any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
