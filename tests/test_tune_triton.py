"""The search of sizes for the Triton kernels, by a stand-in clock, on kernels that run (see triton_interpreter.py)."""

import importlib
import json
import random
from dataclasses import replace

import pytest
import torch
from aeup.bench import conv_transpose2d as conv
from aeup.bench import tune
from aeup.bench import tune_triton as search
from aeup.bench.layer import Case as Layer
from aeup.bench.timing import Timing
from aeup.kernels import plans
from bench_helpers import FAST, case
from triton_interpreter import DEVICE, HERE, MARKS, check_in_the_interpreter, select_tests
from triton_offline import compile_for, compiled, report

from aeup import tuned
from aeup.backends import Kernel

pytestmark = MARKS
FOREVER = tune.Deadline(float("inf"))
SMALL = case(geometry=tune.interpolate.Geometry(1, 1, 4, 4, 8, 8), shape="small")
LAYER = Layer("tiny", conv.Geometry(1, 3, 5, 4, 2, 4, 2, 1, 0), "fp32", "NCHW", "this test")


def test_in_the_interpreter():
    check_in_the_interpreter(__file__)


@pytest.fixture
def name(user_tables):
    """Of the device in the tuned tables, with the user's in a folder of their own."""
    return "interpreter" if DEVICE == "cpu" else torch.cuda.get_device_name()


OPERATOR = replace(tune.OPERATORS[0], cases=lambda device: [SMALL])


def todo(*cases, only=None):
    operator = conv.OPERATOR if isinstance(cases[0], Layer) else tune.OPERATORS[0]
    found = tune.tasks(DEVICE, [replace(operator, cases=lambda device: list(cases))])
    return [task for task in found if only in (None, task.features()["pass"])]


def clock(seconds, seen=None):
    """Times a call by `seconds` of the sizes that are tried."""

    def read(timed, s):
        (sizes,) = plans._trial.values()
        if seen is not None:
            seen.append(sizes)
        t = seconds(sizes)
        return {"triton": Timing(t, t, t, 3)}, None

    return read


def searched(name, tasks, seconds, seen=None):
    table = tune.Table(torch.device(DEVICE))
    left = search.tune_triton(
        table, search.problems(tasks), name, FAST, FOREVER, lambda problem: None, clock(seconds, seen)
    )
    assert left == 0
    return table


def test_problems_are_what_the_kernels_ask_for(name):

    found = search.problems(todo(case(), SMALL))
    assert set(found) == {"poly_forward.bilinear.nchw.fp32", "poly_backward.bilinear.nchw.fp32"}
    for problem, asking in found.items():
        assert [task.case.shape for task in asking] == ["small", "tiny"]
        assert plans.configuration(name, *problem.split("."))
    kernels = {problem.split(".")[0] for problem in search.problems(todo(LAYER))}
    assert kernels == {"conv_forward", "conv_input_gradient", "conv_weight_gradient"}
    assert all(".strict.nchw.n" in problem for problem in search.problems(todo(LAYER)))


def test_the_search_finds_the_least_and_the_plans_follow_the_table(name, tmp_path):
    tasks, seen = todo(SMALL, only="forward"), []
    table = searched(name, tasks, lambda sizes: 1 + abs(sizes["lanes"] - 64) / 64 + abs(sizes["rows"] - 2), seen)
    problem = "poly_forward.bilinear.nchw.fp32"
    best = table.sizes[problem]
    assert (best["lanes"], best["rows"]) == (64, 2) and table.searched[problem] < 1
    assert all(search.allowed(problem, sizes, 99 << 10) for sizes in seen)
    assert len(seen) < 36  # of 72 in all

    path = tmp_path / f"{name}.json"
    written = {"schema": tuned.SCHEMA, "device": name, "triton": table.sizes}
    tuned.check(written)
    path.write_text(json.dumps(written))
    tuned.forget()
    kernel = tasks[0].op.kernels["triton"]
    key = (1, 1, 4, 4, 8, 8, "bilinear", False, False, None, None, False, "fp32", False, name)
    assert plans.make_plan(*key).launches[0].constants["BW"] == 64
    with torch.no_grad():
        assert tune.Trial(tasks[0]).wrong("triton") is None and kernel.refuses(*tasks[0].args) is None


def test_noise_changes_nothing(name):
    tasks, rng = todo(SMALL, only="forward"), random.Random(0)
    flat = searched(name, tasks, lambda sizes: 1.0)
    assert flat.sizes == {} and list(flat.searched.values()) == [1.0]
    assert searched(name, tasks, lambda sizes: 1 + rng.random()).sizes == {}


def test_sizes_that_are_wrong_or_fail_are_not_taken(name, monkeypatch):
    tasks = todo(SMALL, only="forward")
    op = tasks[0].op
    real = op.kernels["triton"]

    def run(*args):
        (sizes,) = plans._trial.values() or ({},)
        if sizes.get("lanes") == 64:
            raise RuntimeError("out of resources")
        return real.run(*args) + (0.1 if sizes.get("lanes") == 512 else 0)

    monkeypatch.setitem(op.kernels, "triton", Kernel(run, real.refuses))
    seen = []
    table = searched(name, tasks, lambda sizes: 1 / sizes["lanes"] if sizes["lanes"] > 64 else 0.0, seen)
    assert all(sizes["lanes"] in (128, 256) for sizes in seen)
    assert all(sizes["lanes"] == 256 for sizes in table.sizes.values())


def test_what_was_searched_is_kept(name):
    tasks, table = todo(SMALL), tune.Table(torch.device(DEVICE))
    problems, steps = search.problems(tasks), []
    passed = tune.Deadline(0.0)
    assert search.tune_triton(table, problems, name, FAST, passed, steps.append, clock(lambda sizes: 1.0)) == 2
    first = next(iter(problems))

    def stop(sizes):
        if table.searched:
            raise KeyboardInterrupt
        return float(sizes["rows"])

    with pytest.raises(KeyboardInterrupt):
        search.tune_triton(table, problems, name, FAST, FOREVER, steps.append, clock(stop))
    assert list(table.searched) == [first] == steps
    again = []
    search.tune_triton(table, problems, name, FAST, FOREVER, steps.append, clock(lambda sizes: 1.0, again))
    assert list(table.searched) == list(problems) and again and not plans._trial


def test_convolutions(name):
    """Smaller tiles of a product; every candidate's result passes the gate."""
    table = searched(name, todo(LAYER, only="forward"), lambda sizes: sizes["m"] / 64 + sizes["k"] / 16)
    (sizes,) = table.sizes.values()
    assert (sizes["m"], sizes["k"]) == (64, 16) and max(table.searched.values()) < 1
    tuned.check({"schema": tuned.SCHEMA, "device": name, "triton": table.sizes})


def test_only_what_may_fit_is_compiled():
    fits = {"m": 128, "n": 128, "k": 32, "warps": 8, "stages": 3}
    problem = "conv_forward.bf16.nhwc.n128.many"
    assert search.allowed(problem, fits, 99 << 10)
    assert not search.allowed(problem, fits | {"stages": 5, "k": 64}, 99 << 10)  # shared memory
    assert search.allowed(problem, fits | {"stages": 5, "k": 64}, 227 << 10)
    assert not search.allowed(problem, fits | {"m": 256, "n": 256}, 227 << 10)  # registers
    assert not search.allowed("conv_forward.strict.nhwc", fits | {"stages": 4}, 99 << 10)
    for kernel in tuned._shipped()["default"]["triton"]:
        assert set(search.space_of(kernel)) <= {"m", "n", "k", "warps", "stages", "lanes", "rows", "elements"}


def compile_two():
    """Two candidates on a CPU's tensors, for a GPU that is not there."""
    compile_for(90)
    host = importlib.import_module("aeup.kernels.interpolate")
    host.interpreted = lambda: True
    task = next(task for task in tune.tasks("cpu", [OPERATOR]) if task.features()["pass"] == "forward")
    problem, trial = "poly_forward.bilinear.nchw.fp32", tune.Trial(task)
    base = plans.configuration("default", *problem.split("."))
    search.compile_ahead(problem, [trial], [base | {"warps": 2}, base | {"warps": 8}, base | {"warps": 3}])
    (cache,) = host.kernels()["poly_forward"].device_caches[0][:1]
    report(sorted(kernel.metadata.num_warps for kernel in cache.values()))
    report(trial.wrong("triton"))  # a launch: there is no GPU


select_tests(globals())

if not HERE:

    def test_candidates_are_compiled_side_by_side_and_not_launched(tmp_path):
        warps, launched = compiled(__file__, 90, tmp_path)
        assert warps == [2, 8]  # 3 is no power of two: told when it is tried
        assert "launcher_cls" in launched
        assert len(list(tmp_path.glob("*/*.cubin"))) == 2 + 1


if __name__ == "__main__":
    compile_two()
