"""aeup.swap: group norms, and the activations after them in a sequence and in a module's own forward, against the same
model without aeup."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from aeup.bench import nets
from swap_helpers import classes_of, close, library, output_and_gradients
from torch import nn

import aeup
from aeup import swap, unswap
from aeup.adapters import norm_names, rewrite
from aeup.ops import group_norm as norms
from aeup.ops.eager import Plans

pytestmark = pytest.mark.usefixtures("one_thread", "own_kernels")


@pytest.fixture
def own_kernels(monkeypatch):
    """On a CPU small images go to torch: not here."""
    for op in (norms.OP, norms.BACKWARD):
        monkeypatch.setitem(op.kernels, "cpu", dataclasses.replace(op.kernels["cpu"], yields=None))
    monkeypatch.setattr(norms, "PLANS", Plans())


class Block(nn.Module):
    """Pairs in several forms: two statements, one expression, a function, branches."""

    def __init__(self, act=nn.SiLU):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(2, 4) for _ in range(3))
        self.conv, self.act, self.deep = nn.Conv2d(4, 4, 3, padding=1), act(), True

    def forward(self, x, shift=None):
        y = self.norm1(x)
        y = self.act(y)
        y = self.conv(F.silu(self.norm2(y)))
        if shift is not None:
            y = y + shift
            y = self.norm3(y)
        elif self.deep:
            y = self.norm3(y * 2)
        else:
            y = y + 1
        y = self.act(y)
        return x + y


class Others(Block):
    """Results that something else may see, and what is no activation."""

    def forward(self, x):
        y = self.norm1(x)
        z = self.act(y)
        y = self.norm2(y + z)
        y = self.conv(y)
        return torch.softmax(self.norm3(y), 1)

    def tried(self, x):
        try:
            x = self.norm1(x)
            x = self.act(x)
        except RuntimeError:
            x = x * 3
        return x

    def kept(self, x):
        keep = lambda: x  # noqa: E731
        x = self.norm1(x)
        x = self.act(x)
        return x + keep()

    def with_arguments(self, x):
        x = self.norm1(input=x)
        x = self.act(x)
        x = F.gelu(self.norm3(x), approximate="tanh")
        return F.leaky_relu(self.norm2(x), x.shape[0] / 10)


class Options(Block):
    """Functions with arguments that the source shows."""

    def forward(self, x):
        x = F.silu(self.norm1(x), inplace=True)
        x = self.norm2(x)
        x = F.leaky_relu(x, 0.3)
        return F.leaky_relu(self.norm3(x), negative_slope=0.1, inplace=False)


def made(make=Block):
    torch.manual_seed(0)
    model = make().double()
    for p in model.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return model, torch.randn(2, 4, 6, 5, dtype=torch.float64)


def ops(model, *args):
    """What explain says of group norms; the backward left out."""
    return [c for c in aeup.explain(model, *args) if c.op == "aeup.group_norm"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_forward_of_its_own(layout):
    model, x = made()
    x = x.contiguous(memory_format=layout)
    plain, classes, keys = copy.deepcopy(model), classes_of(model), list(model.state_dict())
    report = swap(model)
    assert [(r.path, r.was, r.status) for r in report.rows] == [
        ("", "forward of Block", "replaced"),
        ("norm1, act", "GroupNorm -> SiLU", "fused"),
        ("norm2", "GroupNorm -> F.silu", "fused"),
        ("norm3, act", "GroupNorm -> SiLU", "fused"),
    ]
    assert "aeup for self.norm1, aeup for self.norm2, aeup for self.norm3 (2 calls)" in str(report)
    assert list(model.state_dict()) == keys and type(model.norm1) is nn.GroupNorm
    assert [("silu" in c.call) for c in ops(model, x)] == [True] * 3
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(output_and_gradients(again, x), output_and_gradients(plain, x))
        close([again(x, x)], [plain(x, x)])
        again.deep = plain.deep = False
        close([again(x)], [plain(x)])
        again.deep = plain.deep = True
    assert classes_of(unswap(model)) == classes
    close([model(x)], [plain(x)])


def test_what_something_else_may_see_is_left():
    model, x = made(Others)
    plain = copy.deepcopy(model)
    report = swap(model)
    assert not report.fused and [r.path for r in report.replaced] == ["norm1", "norm2", "norm3"]  # the norms alone
    close(output_and_gradients(model, x), output_and_gradients(plain, x))
    for name in ("tried", "kept", "with_arguments"):
        assert not rewrite(getattr(Others, name), True, norm_names(model)).norms


def test_functions_with_arguments():
    model, x = made(Options)
    plain = copy.deepcopy(model)
    assert [r.was for r in swap(model).fused] == [
        "GroupNorm -> F.silu",
        "GroupNorm -> F.leaky_relu",
        "GroupNorm -> F.leaky_relu",
    ]
    assert [c.call.split(", ")[-2] for c in ops(model, x)] == ["silu", "leaky_relu", "leaky_relu"]
    close(output_and_gradients(model, x), output_and_gradients(plain, x))
    model.norm2.register_forward_hook(lambda *args: None)
    close(output_and_gradients(model, x), output_and_gradients(plain, x))


def test_a_norm_alone_and_in_a_sequence():
    torch.manual_seed(0)
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6, affine=False), nn.LeakyReLU(0.2))
    model, x = model.double(), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    report = swap(model)
    assert [(r.path, r.status, r.now) for r in report.rows] == [
        ("2, 3", "fused", "aeup.GroupNorm with activation"),
        ("0", "replaced", "aeup.GroupNorm"),
    ]
    assert type(model[0]) is aeup.GroupNorm and type(model[2]) is nn.GroupNorm
    close(output_and_gradients(model, x), output_and_gradients(plain, x))
    single = swap(unswap(model), fuse=False)
    assert [r.path for r in single.replaced] == ["0", "2"] and not single.fused
    close(output_and_gradients(model, x), output_and_gradients(plain, x))


def hooked(module):
    module.register_forward_hook(lambda *args: None)
    return module


def test_what_is_left_has_a_reason():
    model, x = made()
    hooked(model.norm1)
    reasons = [r.reason for r in swap(model).left]
    assert reasons == ["not fused: the norm has hooks, which would see other values"]
    model, x = made(lambda: Block(lambda: nn.GELU("tanh")))
    plain = copy.deepcopy(model)
    report = swap(model)
    assert [r.path for r in report.fused] == ["norm2"] and len(report.left) == 2
    assert all("GELU(approximate='tanh') is not one of aeup's activations" in r.reason for r in report.left)
    close(output_and_gradients(model, x), output_and_gradients(plain, x))
    mine = nn.Sequential(type("Mine", (nn.GroupNorm,), {})(2, 4), nn.ReLU())
    assert "Mine is a subclass: exact types only" in str(swap(mine))


def test_what_changes_after_the_swap_runs_one_by_one():
    model, x = made()
    plain = copy.deepcopy(model)
    swap(model)
    seen = []
    handle = model.norm1.register_forward_hook(lambda module, args, out: seen.append(out.min()))
    close([model(x)], [plain(x)])
    handle.remove()
    assert seen[0] < -0.5  # before the activation
    for m in (model, plain):
        m.act = nn.Softplus()
    close(output_and_gradients(model, x), output_and_gradients(plain, x))
    for m in (model, plain):
        m.norm1 = nn.InstanceNorm2d(4)
    close(output_and_gradients(model, x), output_and_gradients(plain, x))


def test_a_second_swap_changes_nothing():
    """A norm in a pair keeps its class."""
    model, x = made()
    model = nn.Sequential(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU()), model, nn.GroupNorm(2, 4)).double()
    plain = copy.deepcopy(model)
    swap(model[1]), swap(model)
    classes = classes_of(model)
    again = swap(model)
    assert not again.replaced and not again.fused and classes_of(model) == classes
    assert type(model[1].norm1) is type(model[0][0]) is nn.GroupNorm and type(model[2]) is aeup.GroupNorm
    close(output_and_gradients(model, x), output_and_gradients(plain, x))
    model[1].act = nn.Softplus()  # so that only one is in a pair
    assert [r.path for r in swap(model).replaced] == ["1.norm1", "1.norm3"]


def test_the_compiler_and_transforms():
    model, x = made()
    plain = copy.deepcopy(model)
    swap(model)
    close([torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(x)], [plain(x)])
    close([torch.fx.symbolic_trace(copy.deepcopy(model), {"shift": None})(x)], [plain(x)])
    stack = torch.stack([x, x.sin()])
    close([torch.func.vmap(model)(stack)], [torch.func.vmap(plain)(stack)])
    close([torch.func.jvp(model, (x,), (x.sin(),))[1]], [torch.func.jvp(plain, (x,), (x.sin(),))[1]])


def autoencoder():
    torch.manual_seed(0)
    diffusers = library("diffusers")
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():  # no gradient vanishes
            p.add_(0.02 * torch.randn(p.shape))
    return model.eval()


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = autoencoder()

    def forward(self, x):
        return self.model.decode(self.model.encode(x).latent_dist.mean).sample


def test_diffusers_autoencoder_has_no_pair_left():
    model = autoencoder()
    report = swap(model)
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert norms == sum(r.was == "GroupNorm -> SiLU" for r in report.fused) + 2
    assert {(r.path.split(".")[-1], r.reason) for r in report.left} == {
        ("group_norm", "its input has 3 dimensions: aeup normalises images")
    }
    assert {type(m).__name__ for m in model.modules()} >= {"ResnetBlock2D", "Decoder", "Encoder"}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_diffusers_autoencoder(layout):
    """Outputs and all gradients: alike in float64, within the budget in float32 and bfloat16."""
    plain, x = Whole(), torch.randn(2, 3, 12, 20).contiguous(memory_format=layout)
    plain = plain.to(memory_format=layout)
    want = output_and_gradients(copy.deepcopy(plain).double(), x.double())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        theirs = output_and_gradients(copy.deepcopy(plain).to(dtype), x.to(dtype))
        model = copy.deepcopy(plain).to(dtype)
        swap(model)
        assert len(ops(model, x.to(dtype))) == sum(isinstance(m, nn.GroupNorm) for m in model.modules()) - 2
        ours = output_and_gradients(model, x.to(dtype))
        if dtype is torch.float64:
            close(ours, want)
            continue
        scale = max(w.norm() for w in want) / 100
        distance = [
            max(((a.double() - w).norm() / w.norm().clamp_min(scale)).item() for a, w in zip(found, want, strict=True))
            for found in (ours, theirs)
        ]
        assert distance[0] <= 2 * distance[1] + 4 * torch.finfo(dtype).eps


def test_diffusers_unet_with_time_embeddings():
    """ResnetBlock2D with an embedding, in both of its forms: the norm after it is followed by a scale in one."""
    diffusers = library("diffusers")
    for shift in ("default", "scale_shift"):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            resnet_time_scale_shift=shift,
        ).double().eval()  # fmt: skip
        x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
        want = unet(x, 3).sample
        report = swap(unet)
        assert any(r.path == "conv_norm_out, conv_act" for r in report.fused)
        # The second norm of a block is called in both ways.
        second = [r for r in report.fused if ".norm2" in r.path]
        assert second and all(r.now == "aeup.GroupNorm with activation, where one follows" for r in second)
        assert {type(m.norm2) for m in unet.modules() if hasattr(m, "norm2")} == {aeup.GroupNorm}
        assert {type(m.norm1) for m in unet.modules() if hasattr(m, "norm1")} == {nn.GroupNorm}
        assert len(ops(unet, x, 3)) == sum(isinstance(m, nn.GroupNorm) for m in unet.modules()) - len(report.left)
        assert not swap(unet).replaced
        torch.testing.assert_close(unet(x, 3).sample, want, rtol=1e-9, atol=1e-9)


def test_stable_diffusions_decoder_written_otherwise():
    """`conv(F.silu(norm(x)))` in each residual block; attention normalises an image, without an activation."""
    torch.manual_seed(0)
    model = nets.sd_vae((32, 32, 32, 32)).double()
    plain, x = copy.deepcopy(model), torch.randn(1, 4, 4, 6, dtype=torch.float64)
    report = swap(model)
    assert [r.was for r in report.fused].count("GroupNorm -> F.silu") == 2 * 14
    assert [r.path for r in report.replaced if r.was == "GroupNorm"] == ["2.norm"] and not report.left
    assert len(ops(model, x)) == 2 * 14 + 2
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
