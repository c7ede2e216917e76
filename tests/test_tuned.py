"""The tuned tables: which are read, what is wrong with them, and what "auto" and the Triton plans make of them."""

import json
import subprocess
import sys
import warnings
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from aeup.kernels import plans

import aeup
from aeup import tuned
from aeup.backends import Kernel, Op, choose

H100, CPU = "NVIDIA H100 80GB HBM3", torch.device("cpu")
X = torch.randn(2, 3, 8, 8)


def write(choices=(), device=None, **more):
    name = device or tuned.device_name(CPU)
    table = {"schema": tuned.SCHEMA, "device": name, "choices": list(choices), **more}
    tuned.path_of(name).write_text(json.dumps(table))
    tuned.forget()


def features(**given):
    """Of any call that none of the rules names, but for what is given."""
    return defaultdict(lambda: "any", {"pixels": 1 << 16, **given})


# --- the shipped tables ---


def test_every_shipped_table_is_well_formed():
    assert {"default", "interpreter", "NVIDIA H100"} <= set(tuned._shipped())
    for table in tuned._shipped().values():
        tuned.check(table)
        for rule in table["choices"]:
            assert rule["backend"] == "cuda" or rule["why"]


@pytest.mark.parametrize(
    "device, family, which, dtype, layout, pixels, backend",
    [
        (H100, "hopper", "forward", "bfloat16", "NHWC", 1 << 16, None),
        (H100, "generic", "forward", "bfloat16", "NHWC", 1 << 16, "torch"),
        (H100, "generic", "weight_gradient", "float32", "NHWC", 1 << 16, "torch"),
        (H100, "hopper_float", "weight_gradient", "tf32", "NCHW", 2048, "torch"),
        (H100, "generic", "weight_gradient", "float32", "NCHW", 1 << 16, "torch"),
        (H100, "few", "forward", "tf32", "NCHW", 1 << 15, "torch"),
        (H100, "few", "forward", "tf32", "NCHW", (1 << 15) + 1, None),
        (H100, "few", "forward", "tf32", "NHWC", 1 << 15, None),
        (H100, "hopper_float", "input_gradient", "tf32", "NHWC", 1 << 16, None),
        (H100, "hopper_float", "weight_gradient", "tf32", "NHWC", 1 << 17, "torch"),
        (H100, "hopper_float", "weight_gradient", "tf32", "NCHW", 1 << 17, None),
        ("NVIDIA H200", "hopper_float", "weight_gradient", "tf32", "NCHW", 2048, "torch"),  # the nearest table
        ("NVIDIA A100-SXM4-80GB", "generic", "weight_gradient", "float32", "NHWC", 1 << 16, "torch"),
        ("", "few", "forward", "bfloat16", "NHWC", 1 << 16, None),
    ],
)
def test_first_fitting_rule_decides(device, family, which, dtype, layout, pixels, backend):
    call = features(family=family, dtype=dtype, layout=layout, pixels=pixels) | {"pass": which}
    rules = tuned.rules(torch.device("cuda"), device)
    found = next((r for r in rules if r.fits(call | {"op": "conv_transpose2d"})), None)
    assert (found and found.backend) == backend
    assert not found or not found.why or found.why.endswith("(tuned table)")
    found = next(r for r in rules if r.fits(call | {"op": "upsample_conv2d"}))
    fused = family != "generic" and (backend is None or family == "hopper_float")
    assert found.backend == ("cuda" if fused else "composed")


def test_a_cpu_has_no_rules_by_default(user_tables):
    assert tuned.rules(CPU) == () and tuned.rules(torch.device("meta")) == ()


# --- the user's table ---


def test_auto_and_explain_follow_the_users_table(user_tables):
    def choice(mode="bilinear", x=X):
        return aeup.explain(aeup.interpolate, x, scale_factor=2, mode=mode)

    assert [c.backend for c in choice()] == ["cpu", "cpu"]
    rule = {"op": "interpolate", "pass": "forward", "mode": "bilinear", "least_pixels": 1000, "most_pixels": 2000}
    write([rule | {"backend": "torch", "why": "torch was faster"}], measured={"date": "2026-01-02T03", "torch": "9.9"})
    forward, backward = choice()
    assert (forward.backend, backward.backend) == ("torch", "cpu")
    assert forward.others["cpu"] == "torch was faster (your tuned table, 2026-01-02, torch 9.9)"
    assert forward.others["cuda"] == "the tensor is on cpu"
    assert choice("bicubic")[0].backend == "cpu" and choice(x=X[:1])[0].backend == "cpu"  # another mode, too small
    assert choice(x=torch.cat([X, X]))[0].backend == "cpu"  # too large

    args = (X, aeup.ops.interpolate.Map(8, 8, 16, 16, "bilinear", False, False, None, None), False)
    op = aeup.ops.interpolate.OP
    assert choose(op, X, args) is op.kernels["torch"]
    assert choose(op, X, args, "cpu") is op.kernels["cpu"]
    with tuned.ignoring_users():
        assert choose(op, X, args) is op.kernels["cpu"]
    assert choose(op, X, args) is op.kernels["torch"]
    assert torch.equal(aeup.interpolate(X, scale_factor=2, mode="bilinear"), F.interpolate(X, None, 2, "bilinear"))


@pytest.mark.parametrize("backend", ("torch", "composed", "cpu"))
def test_convolutions_follow_it_with_their_gradients(user_tables, backend):
    x, w = torch.randn(1, 32, 32, 32), torch.randn(32, 32, 3, 3)

    def run(upsample_conv, dtype=torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        return torch.autograd.grad(upsample_conv(*leaves).square().mean(), leaves)

    def ours(x, w):
        return aeup.upsample_conv2d(x, w, scale_factor=2, padding=1)

    def by_torch(x, w):
        return F.conv2d(F.interpolate(x, scale_factor=2), w, padding=1)

    rule = {"op": "upsample_conv2d", "dtype": "float32", "family": "fold", "why": "measured"}
    write([rule | {"pass": ["input_gradient", "forward"], "backend": backend}, rule | {"backend": "torch"}])
    assert [c.backend for c in aeup.explain(ours, x, w)] == [backend, backend, "torch"]
    for own, torchs, exact in zip(run(ours), run(by_torch), run(by_torch, torch.float64), strict=True):
        error, budget = ((g - exact).abs().max() for g in (own, torchs))
        assert error <= 2 * budget + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_gradients_have_their_own_rules(user_tables):
    """Autograd's own way is taken only where it is what the tables choose."""
    x, w = torch.randn(1, 32, 32, 32, requires_grad=True), torch.randn(32, 32, 3, 3)

    def backward():
        choices = [c.backend for c in aeup.explain(aeup.upsample_conv2d, x, w, scale_factor=2, padding=1)]
        return choices, aeup.upsample_conv2d(x, w, scale_factor=2, padding=1).grad_fn.name()

    rule = {"op": "upsample_conv2d", "backend": "torch"}
    write([rule])
    assert backward() == (["torch"] * 3, "ConvolutionBackward0")
    write([rule | {"pass": "forward"}, {"op": "upsample_conv2d", "pass": "input_gradient", "backend": "cpu"}])
    choices, name = backward()
    assert choices[:2] == ["torch", "cpu"] and name == "_UpsampleConv2dBackward"


def test_a_rule_lifts_a_yield_but_no_refusal(user_tables):
    def op(**refusals):
        kernels = {n: Kernel(lambda x, n=n: n, lambda x, n=n: refusals.get(n)) for n in ("cuda", "cpu", "torch")}
        kernels["triton"] = Kernel(lambda x: "triton", lambda x: refusals.get("triton"), yields=lambda x: "unmeasured")
        return Op("aeup.test", kernels, {"op": "test"}, lambda x: x.shape, lambda shape, device: {"pixels": shape[0]})

    x = torch.zeros(1)
    assert choose(op(cpu="no"), x, (x,)).run(x) == "torch"
    write([{"op": "test", "backend": "triton"}])
    assert choose(op(), x, (x,)).run(x) == "triton"
    assert choose(op(triton="no Triton"), x, (x,)).run(x) == "cpu"
    assert choose(op(), x, (x,), "torch").run(x) == "torch"
    assert choose(Op("aeup.other", op().kernels), x, (x,)).run(x) == "cpu"


def test_auto_goes_past_a_kernel_that_yields_and_a_name_insists():
    kernels = {"cpu": Kernel(lambda x: "cpu", lambda x: None, yields=lambda x: "torch is faster")}
    kernels |= {n: Kernel(lambda x, n=n: n, lambda x: None) for n in ("cuda", "triton", "torch")}
    op, x = Op("aeup.test", kernels), torch.zeros(1)
    assert choose(op, x, (x,), "auto").run(x) == "torch"
    assert choose(op, x, (x,), "cpu").run(x) == "cpu"
    assert kernels["cpu"].passes(x) == "torch is faster"


RULE = {"op": "interpolate", "backend": "torch", "why": "measured"}
BAD = {
    "not JSON": ("{", "Expecting property name"),
    "no table": ("[]", "names no device"),
    "newer": ({"schema": 2}, "its schema is 2, this aeup reads 1"),
    "another device": ({"device": "NVIDIA H100"}, "it is for 'NVIDIA H100', this is "),
    "backend": ({"choices": [RULE | {"backend": "cudnn"}]}, "must be one of cuda, triton, cpu, composed, torch"),
    "feature": ({"choices": [RULE | {"stride": "2"}]}, "cannot have stride='2'"),
    "bound": ({"choices": [RULE | {"most_pixels": "many"}]}, "cannot have most_pixels='many'"),
    "rules": ({"choices": {}}, "choices must be a list"),
    "kernel": ({"triton": {"poly_sideways": {}}}, "'poly_sideways' must be a known kernel's"),
    "sizes": ({"triton": {"poly_forward.nearest": {"lanes": 64}}}, "with sizes ['lanes', 'rows', 'warps']"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_left_out_with_one_warning(user_tables, name):
    changed, says = BAD[name]
    good = {"schema": tuned.SCHEMA, "device": tuned.device_name(CPU), "choices": [RULE]}
    path = tuned.path_of(tuned.device_name(CPU))
    path.write_text(changed if isinstance(changed, str) else json.dumps(good | changed))
    tuned.forget()
    with pytest.warns(UserWarning) as caught:
        assert aeup.explain(aeup.interpolate, X, scale_factor=2)[0].backend == "cpu"
        aeup.interpolate(X, scale_factor=2)
    (warning,) = caught
    assert str(path) in str(warning.message) and says in str(warning.message)


def test_where_the_users_tables_are(monkeypatch, tmp_path):
    monkeypatch.delenv("AEUP_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.path_of("AMD EPYC(TM) 9.1, 2 threads") == tmp_path / "aeup/tuned/AMD-EPYC-TM-9.1-2-threads.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.folder() == tmp_path / ".cache/aeup/tuned"
    monkeypatch.setenv("AEUP_TUNED", "")
    assert tuned.folder() is None and tuned.path_of("x") is None and tuned.users("any") == {}


def test_a_table_is_for_its_number_of_threads(user_tables):
    before = torch.get_num_threads()
    write([RULE])
    assert aeup.explain(aeup.interpolate, X, scale_factor=2)[0].backend == "torch"
    try:
        torch.set_num_threads(before + 1)
        tuned.forget()
        assert aeup.explain(aeup.interpolate, X, scale_factor=2)[0].backend == "cpu"
    finally:
        torch.set_num_threads(before)


def test_nothing_is_read_at_import(user_tables):
    tuned.path_of(tuned.device_name(CPU)).write_text("{")
    code = "import aeup.tuned as t; print(t.users.cache_info().misses, t._shipped.cache_info().misses)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "0"], done.stderr


# --- sizes of the Triton kernels ---


def test_triton_sizes_come_from_the_users_then_the_nearest_then_the_default_table(user_tables):
    problem = ("poly_forward", "bicubic", "nhwc", "bf16")
    assert plans.configuration(H100, *problem) == plans.configuration("default", "poly_forward", "bicubic")
    sizes = {"lanes": 64, "rows": 2, "warps": 2}
    write(device=H100, triton={"poly_forward.bicubic.nhwc": sizes})
    assert plans.configuration(H100, *problem) == sizes
    assert plans.configuration("NVIDIA H200", *problem) == plans.configuration("default", *problem)
    with pytest.raises(KeyError, match="no configuration for nonsense"):
        plans.configuration(H100, "nonsense")


def test_plans_follow_a_trial_and_tell_what_they_ask_for(user_tables):
    key = (1, 4, 64, 64, 128, 128, "bilinear", False, False, None, None, False, "fp32", False, "default")

    def lanes():
        return plans.make_plan(*key).launches[0].constants["BW"]

    before = lanes()
    with plans.trying({"poly_forward.bilinear": {"lanes": before * 2, "rows": 1, "warps": 4}}):
        assert lanes() == before * 2
    assert lanes() == before
    assert plans.problems(lambda: plans.make_plan(*key)) == ("poly_forward.bilinear.nchw.fp32",)
    assert lanes() == before


def test_good_tables_warn_of_nothing(user_tables):
    write([RULE], measured={}, rows={"x": {}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert aeup.explain(aeup.interpolate, X, scale_factor=2)[0].backend == "torch"
