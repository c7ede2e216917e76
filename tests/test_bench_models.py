"""`aeup bench models`: its table, its gates, and that nothing wrong gets a speed."""

import contextlib
import json

import pytest
import torch
from aeup.bench import harness, models, nets, peers, steps, timing
from aeup.bench.cli import bench
from aeup.bench.layer import torch_other_layout
from aeup.bench.twins import twin
from bench_helpers import FAST
from click.testing import CliRunner
from torch import nn

import aeup
from aeup.models import MODELS
from aeup.train.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = dict(image_size=(12, 10), latent_dim=3, channels=(6, 4, 4), hidden=8)
STEP = models.Training("small", "vae", 6, 6, IMAGES)
LABELLED = models.Training("labelled", "fcn", 2, 2, dict(image_size=(40, 35), classes=3, channels=(4, 5, 6, 7, 8)))
SMALL_GAN = dict(image_size=(16, 16), width=4, latent_dim=5)
GAN = models.Training("gan", "dcgan", 6, 6, SMALL_GAN, player="generator")
ALONE = models.Training("alone", "dcgan", 6, 6, SMALL_GAN, cls=steps.Generator)
DECODER = models.Decoding("decoder", "this test", lambda: nets.taesd(8), (2, 4, 3, 5), (2, 4, 3, 5))


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    monkeypatch.setattr(timing, "cpu_seconds", lambda: None)


def step_case(workload=STEP, mode="eager", dtype="fp32", layout="NCHW"):
    return models.StepCase(workload.name, workload, mode, dtype, layout, "cpu")


def decode_case(mode="eager", dtype="fp32", layout="NCHW"):
    return models.DecodeCase(DECODER.name, DECODER, mode, dtype, layout, "cpu")


def measured(case, make=lambda c: c.aeup()):
    ours = peers.Peer("ours", make, subject=True)
    return harness.measure(case, *case.directions, [peers.torch_eager(), torch_other_layout(), ours], FAST)


# --- the table ---


def test_the_table_is_what_it_says():
    assert len({w.name for w in models.WORKLOADS}) == len(models.WORKLOADS)
    steps = [w for w in models.WORKLOADS if isinstance(w, models.Training) and w.set == "main"]
    assert {w.model for w in steps} == set(MODELS)
    assert {w.gpu for w in steps if w.model == "vae"} == {128} and {w.gpu for w in steps if w.model == "dcgan"} == {256}
    assert {w.options["upsample"] for w in steps if w.model == "dcgan"} == set(aeup.decoder.UPSAMPLE)
    on_cpu, on_gpu = models.model_cases("cpu"), models.model_cases("cuda")
    decoders = sum(isinstance(w, models.Decoding) and w.set == "main" for w in models.WORKLOADS)
    assert len(on_cpu) == len({c.id for c in on_cpu}) == 2 * decoders + len(steps)
    assert len(on_gpu) == len({c.id for c in on_gpu}) == 2 * (2 * decoders + len(steps))
    assert {(c.mode, c.dtype) for c in on_cpu} == {("eager", "fp32")} and all(c.source for c in on_cpu)
    assert {(c.mode, c.dtype) for c in on_gpu} == {("eager", "bf16"), ("graph", "bf16")}
    chosen = models.model_cases("cuda", (), ("sd_vae_1024",), ("graph",), ("tf32",), ("NCHW",))
    assert [c.id for c in chosen] == ["sd_vae_1024/graph/tf32/NCHW"]


@pytest.mark.parametrize("kw", [{"modes": ("graph",)}, {"dtypes": ("tf32",)}, {"shapes": ("vgg",)}])
def test_what_a_cpu_has_not_is_refused(kw):
    with pytest.raises(ValueError, match=r"a CPU has no tf32 and no CUDA graph|shapes: unknown .'vgg'."):
        models.model_cases("cpu", **kw)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_decoders_give_the_images_that_they_say(device):
    for case in models.model_cases(device, modes=("eager",), layouts=("NCHW",), sets=("main", "more")):
        if isinstance(case, models.DecodeCase):
            with torch.device("meta"):
                model = case.workload.made(device)
                assert model(torch.empty(case.input)).shape == case.output
            parameters = sum(p.numel() for p in model.parameters())
            assert case.bytes("forward") == case.torch_dtype.itemsize * (
                parameters + torch.Size(case.input).numel() + torch.Size(case.output).numel()
            )


def test_work_is_counted():
    case = next(c for c in models.model_cases("cuda", shapes=("dcgan_decoder",)))
    pairs = [
        (100, 512, 1),
        (512, 256, 4),
        (256, 128, 8),
        (128, 64, 16),
        (64, 3, 32),
    ]  # k4: 16 products a pixel and pair
    assert case.flops("forward") == 2 * 128 * 16 * sum(a * b * side**2 for a, b, side in pairs)
    linear = models.Training("linear", "ae", 6, 6, dict(IMAGES, network="mlp", depth=0))
    assert step_case(linear).flops("step") == 2 * 6 * (2 * 120 * 3 + 3 * 3 * 120)  # the images need no gradient
    parameters = 2 * 120 * 3 + 120 + 3
    assert step_case(linear).sizes("step") == (4 * (3 * parameters + 6 * 120), 4 * 3 * parameters)


# --- training steps ---


def wrong_model(change):
    """aeup's step with another model."""

    def make(case):
        model = case.workload.made("cpu")
        model.load_state_dict(steps._bundled(case.workload, "cpu").state_dict())
        change(model)
        return case._step(model)

    return make


def bilinear(model):
    next(m for m in model.modules() if isinstance(m, aeup.UpsampleConv2d)).mode = "bilinear"


def untrained(model):
    next(m for m in model.modules() if isinstance(m, aeup.UpsampleConv2d)).requires_grad_(False)


def ascending(model):
    for p in model.parameters():
        p.register_hook(lambda g: -g)


@pytest.mark.parametrize("workload", [STEP, LABELLED, GAN, ALONE], ids=lambda w: w.name)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_right_step_is_timed(workload, dtype):
    row = measured(step_case(workload, dtype=dtype))
    assert {r.status for r in row.results.values()} == {"ok"}, row.results["ours"].reason
    assert set(row.results["ours"].checks) == {"first loss", "losses"} and row.ratio("torch") > 0


@pytest.mark.parametrize("change", [bilinear, untrained, ascending])
def test_a_wrong_step_gets_no_speed(change):
    row = measured(step_case(), wrong_model(change))
    ours = row.results["ours"]
    assert row.status == "red" and ours.timing is None and "loss" in ours.reason
    assert (ours.checks["first loss"].reason is None) is (change is not bilinear)
    assert measured(step_case(), wrong_model(lambda model: None)).status == "ok"


def test_the_exact_curve_is_that_of_the_step_in_float64():
    case = step_case()
    problem = case.problem("cpu", 0)
    first, losses = problem.parts("step")
    assert losses.reference.shape == (steps.CURVE, 4) and torch.equal(first.reference, losses.reference[:1])
    _, found = case.outcome(case.torch(), *problem.inputs)
    assert found.dtype == torch.float32 and (found - losses.reference).abs().max() < 1e-5 * losses.reference.abs().max()
    assert torch.equal(case.outcome(case.torch(), *problem.inputs)[1], found)  # the same noise at each call
    assert (losses.reference[0] - losses.reference[-1]).abs().max() > 100 * first.noise  # it learns


def test_noise_in_float64_is_that_of_float32():
    draws = (
        lambda x: torch.randn_like(x),
        lambda x: torch.rand_like(x[:, :1]),
        lambda x: torch.randn(2, 3, dtype=x.dtype),
        lambda x: torch.rand((2, 3), dtype=x.dtype),
    )
    x = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for draw in draws:
        torch.manual_seed(0)
        single = draw(x)
        torch.manual_seed(0)
        with steps.FloatNoise():
            double = draw(x.double())
        assert double.dtype == torch.float64 and torch.equal(double, single.double())


def test_only_the_player_asked_for_takes_a_step():
    case = step_case(GAN)
    model = twin(steps._bundled(GAN, "cpu"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    case._step(model)(*case.problem("cpu", 0).inputs)
    moved = {k.split(".")[0] for k, _ in model.named_parameters() if not torch.equal(model.state_dict()[k], before[k])}
    assert moved == {"generator"}


# --- decoders ---


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_swapped_decoder_is_timed_and_a_wrong_one_is_not(layout, dtype):
    case = decode_case(dtype=dtype, layout=layout)
    row = measured(case)
    assert {r.status for r in row.results.values()} == {"ok"}, row.results["ours"].reason

    def wrong(case):
        model = case._swapped()
        next(m for m in model if isinstance(m, nn.Upsample)).mode = "bilinear"
        return model

    assert measured(case, wrong).status == "red"
    ours = peers.aeup_peer()
    backend, kernel = ours.explain(case, "forward", case.problem("cpu", 0).inputs)
    assert (
        backend
        and [c.op for c in case.chosen("forward", case.problem("cpu", 0).inputs)] == ["aeup.upsample_conv2d"] * 3
    )


def test_the_subject_is_the_swapped_copy_with_the_same_weights():
    case = decode_case()
    plain, swapped = case._model(), case._swapped()
    assert not [m for m in plain.modules() if type(m).__module__.startswith("aeup.nn")]
    assert sum(isinstance(m, aeup.Upsample) for m in swapped.modules()) == 3
    for a, b in zip(plain.parameters(), swapped.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b and not a.requires_grad


class Graph:
    """Stands for a CUDA graph where there is no GPU: capturing runs nothing, a replay runs all."""

    made = []

    def __init__(self):
        self.replays = 0
        Graph.made.append(self)

    def replay(self):
        self.replays += 1
        self.owner.y.copy_(self.owner.fn(self.owner.x))


@pytest.fixture
def without_gpu(without_streams, monkeypatch):
    def capture(step, slot):
        graph = Graph()
        graph.replay = lambda: setattr(slot, "losses", step._update(slot))
        slot.graph = graph

    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    monkeypatch.setattr(Step, "_capture", capture)


def test_graph_rows_replay_one_capture(without_gpu):
    case = decode_case("graph")
    run = case.aeup()
    for seed in (1, 2):
        z = torch.randn(case.input, generator=torch.Generator().manual_seed(seed))
        if seed == 1:
            run._capture(z)
            run.graph.owner = run
        torch.testing.assert_close(run(z), case._model()(z))
    assert len(Graph.made) == 1 and run.graph.replays == 2
    row = measured(step_case(mode="graph"))
    assert {r.status for r in row.results.values()} == {"ok"} and len(
        Graph.made
    ) == 1 + 4  # torch sets the budget first


def test_memory_is_that_of_one_eager_call():
    calls = []
    made = lambda *inputs: calls.append(len(inputs))  # noqa: E731
    step_case(LABELLED).peak("step", made, (1, 2), None)()
    decode_case().peak("forward", made, (1,), None)()
    assert calls == [2, 1]
    assert decode_case("graph").peak("forward", made, (1,), None) is None


# --- the command ---


def invoke(path, *more):
    fixed = ["models", "--device", "cpu", "--min-time", "0.002", "--json", str(path)]
    return CliRunner().invoke(bench, [*fixed, *more])


def test_command_measures_aeup(tmp_path):
    path = tmp_path / "out.json"
    chosen = ("--shape", "vae", "--shape", "dcgan_decoder", "--layout", "NHWC")
    result = invoke(path, *chosen)
    assert result.exit_code == 0, result.output
    data = json.loads(path.read_text())
    assert data["complete"] and data["kind"] == "models" and "µs" not in result.output
    assert {r["id"]: r["status"] for r in data["rows"]} == {
        "dcgan_decoder/eager/fp32/NHWC/forward": "ok",
        "vae/eager/fp32/NHWC/step": "ok",
    }
    for row in data["rows"]:
        assert row["flops"] > 0 and row["results"]["aeup"]["backend"] and row["ratio_to_best"] > 0
        assert {"torch", "torch-other", "aeup"} == set(row["results"])
    assert "graph" in data["gaps"] and path.with_suffix(".html").stat().st_size > 0
    result = invoke(tmp_path / "again.json", *chosen, "--direction", "step", "--compare", str(path))
    assert result.exit_code == 0 and "compared: 1 rows" in result.output, result.output


def test_command_fails_where_aeup_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(models.StepCase, "aeup", lambda self: self._step(untrained_copy(self)))
    result = invoke(tmp_path / "out.json", "--shape", "vae")
    assert result.exit_code == 1 and "(vae/eager/fp32/NHWC/step)" in result.output


def untrained_copy(case):
    model = twin(steps._bundled(case.workload, "cpu"))
    model.decoder.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "more, message",
    [
        (("--mode", "graph"), "a CPU has no tf32 and no CUDA graph"),
        (("--shape", "vae", "--direction", "forward"), "no row is left"),
        (("--direction", "backward"), "'backward' is not one of 'forward', 'step'"),
    ],
)
def test_command_rejects_what_there_is_not(tmp_path, more, message):
    result = invoke(tmp_path / "out.json", *more)
    assert result.exit_code == 2 and message in result.output and not list(tmp_path.iterdir())
