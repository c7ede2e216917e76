"""aeup.swap on real decoders, with random weights: outputs and gradients against the unswapped model."""

import copy
from functools import lru_cache

import pytest
import torch
from swap_helpers import classes_of, library, output_and_gradients, outputs
from torch import nn

import aeup
from aeup import swap, unswap

pytestmark = pytest.mark.usefixtures("one_thread")


class PoseHead(nn.Module):
    """SimpleBaseline's (Xiao et al., 2018, arXiv 1804.06208), small: three transposed convolutions and a 1x1 one."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 12
        for _ in range(3):
            layers += [nn.ConvTranspose2d(channels, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
            channels = 8
        self.deconv_layers = nn.Sequential(*layers)
        self.final_layer = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.final_layer(self.deconv_layers(x))


class Unet(nn.Module):
    """With transposed convolutions and an activation after them."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, 2, 1)
        self.up = nn.Sequential(nn.ConvTranspose2d(6, 6, 2, 2), nn.GELU())
        self.out = nn.ConvTranspose2d(9, 3, 3, 1, 1)

    def forward(self, x):
        return self.out(torch.cat([self.up(self.down(x)), x], 1))


def sequential():
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.ConvTranspose2d(5, 3, 4, 2, 1),
        nn.ReLU(),
    )


def vae():
    diffusers = library("diffusers")
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
    ).decoder  # fmt: skip


def tiny():
    diffusers = library("diffusers")
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3, num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3,
    ).decoder  # fmt: skip


def dc():
    diffusers = library("diffusers")
    return diffusers.AutoencoderDC(
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        decoder_norm_types="batch_norm", decoder_act_fns="relu", encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), upsample_block_type="interpolate", latent_channels=4,
    ).decoder  # fmt: skip


def smp(name, **options):
    def make():
        models = library("segmentation_models_pytorch")
        options.setdefault("encoder_depth", 3)
        return getattr(models, name)(encoder_name="mobilenet_v2", encoder_weights=None, classes=2, **options)

    return make


def torchvision_model(name):
    def make():
        found = library("torchvision.models.segmentation")
        torchvision = library("torchvision")
        if name == "lraspp":
            backbone = nn.Sequential(nn.Conv2d(3, 6, 3, 4, 1), nn.Conv2d(6, 8, 3, 2, 1))
            getter = torchvision.models._utils.IntermediateLayerGetter(backbone, {"0": "low", "1": "high"})
            return found.LRASPP(getter, 6, 8, 3, 16)
        backbone = nn.Sequential(nn.Conv2d(3, 6, 3, 4, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1))
        getter = torchvision.models._utils.IntermediateLayerGetter(backbone, {"1": "aux", "2": "out"})
        if name == "fcn":
            return found.FCN(getter, found.fcn.FCNHead(8, 3), found.fcn.FCNHead(6, 3))
        return found.DeepLabV3(getter, found.deeplabv3.DeepLabHead(8, 3, (2, 4, 6)), None)

    return make


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        ops = library("torchvision.ops")
        self.fpn = ops.FeaturePyramidNetwork([3, 6, 6], 8)

    def forward(self, x):
        half = torch.cat([x, x], 1)[:, :, ::2, 1::2]
        return self.fpn({"a": x, "b": half, "c": half[:, :, 1::2, ::2]})


class Heads(nn.Module):
    """Mask R-CNN's and Keypoint R-CNN's predictors."""

    def __init__(self):
        super().__init__()
        detection = library("torchvision.models.detection")
        self.mask = detection.mask_rcnn.MaskRCNNPredictor(6, 5, 3)
        self.points = detection.keypoint_rcnn.KeypointRCNNPredictor(6, 4)

    def forward(self, x):
        return self.mask(x), self.points(x)


# name: (model, input shape, (replaced, fused) by a swap)
MODELS = {
    "sequential": (sequential, (2, 4, 5, 3), (3, 3)),
    "pose": (PoseHead, (2, 12, 5, 3), (3, 3)),
    "unet": (Unet, (2, 3, 10, 6), (2, 1)),
    "AutoencoderKL": (vae, (2, 4, 5, 7), (29, 19)),
    "AutoencoderTiny": (tiny, (2, 4, 5, 7), (2, 2)),
    "AutoencoderDC": (dc, (2, 4, 5, 7), (2, 1)),
    "smp.Unet": (smp("Unet", decoder_channels=(8, 6, 4)), (2, 3, 32, 24), (3, 9)),
    "smp.UnetPlusPlus": (smp("UnetPlusPlus", decoder_channels=(8, 6, 4)), (2, 3, 32, 24), (4, 12)),
    "smp.MAnet": (smp("MAnet", decoder_channels=(8, 6, 4), decoder_pab_channels=4), (2, 3, 32, 24), (5, 11)),
    "smp.Linknet": (smp("Linknet"), (2, 3, 32, 24), (3, 9)),
    "smp.FPN": (
        smp("FPN", encoder_depth=5, decoder_pyramid_channels=8, decoder_segmentation_channels=32),
        (2, 3, 64, 32),
        (11, 9),
    ),
    "smp.PSPNet": (smp("PSPNet", psp_out_channels=16), (2, 3, 32, 24), (5, 4)),
    "smp.DeepLabV3Plus": (
        smp("DeepLabV3Plus", encoder_depth=5, decoder_channels=8), (2, 3, 32, 64), (3, 8)
    ),
    "torchvision.deeplab": (torchvision_model("deeplab"), (2, 3, 33, 26), (2, 6)),
    "torchvision.fcn": (torchvision_model("fcn"), (2, 3, 33, 26), (1, 2)),
    "torchvision.lraspp": (torchvision_model("lraspp"), (2, 3, 33, 26), (2, 1)),
    "torchvision.fpn": (Pyramid, (2, 3, 16, 12), (1, 0)),
    "torchvision.heads": (Heads, (2, 6, 7, 5), (3, 1)),
}  # fmt: skip


@lru_cache(None)
def made(name):
    """The model in eval mode in float32, its input, and its output and gradients in float64."""
    make, shape, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():  # no gradient vanishes
            p.copy_(p + 0.02 * torch.randn(p.shape))
    x = torch.randn(shape)
    return model, x, output_and_gradients(copy.deepcopy(model).double(), x.double())


def distances(got, reference):
    """Of outputs or gradients: each tensor's distance to `reference`, relative to its norm; or to a hundredth of the
    largest norm, where it is smaller still: a sum that cancels carries the errors of its terms."""
    least = max(b.norm() for b in reference) / 100
    for a, b in zip(got, reference, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
        yield ((a.double() - b).norm() / b.norm().clamp_min(least)).item()


@pytest.mark.parametrize("name", MODELS)
def test_the_same_in_float64_and_back(name):
    model, x, reference = made(name)
    model, x = copy.deepcopy(model).double(), x.double()
    classes, keys = classes_of(model), list(model.state_dict())
    report = swap(model)
    assert (len(report.replaced), len(report.fused)) == MODELS[name][2], str(report)
    assert list(model.state_dict()) == keys and all(
        isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True)
    )
    assert any(
        c.op in ("aeup.interpolate", "aeup.conv_transpose2d", "aeup.upsample_conv2d") for c in aeup.explain(model, x)
    )
    assert max(distances(output_and_gradients(model, x), reference)) < 1e-9
    assert max(distances(output_and_gradients(copy.deepcopy(model), x), reference)) < 1e-9
    assert classes_of(unswap(model)) == classes


def check_budget(ours, theirs, reference, outputs, floor):
    """Of the first `outputs` tensors, and of the gradients after them: errors at most twice torch's."""
    for what, at in (("outputs", slice(0, outputs)), ("gradients", slice(outputs, None))):
        allowed, got = (max(distances(found[at], reference[at])) for found in (theirs, ours))
        assert got <= 2 * allowed + floor, f"{what}: {got:.3g}, torch {allowed:.3g}"


@pytest.mark.parametrize("kind", ["float32", "autocast"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", MODELS)
def test_the_error_is_within_the_budget(name, layout, kind):
    model, x, reference = made(name)
    model = copy.deepcopy(model).to(memory_format=layout)
    x = x.contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        theirs = output_and_gradients(model, x)
        swap(model)
        ours = output_and_gradients(model, x)
    assert [t.stride() for t in outputs(model, x)] == [t.stride() for t in outputs(unswap(model), x)]
    check_budget(ours, theirs, reference, len(outputs(model, x)), 5e-7 if kind == "float32" else 4e-3)


@pytest.mark.parametrize("name", ["sequential", "AutoencoderTiny"])
def test_compiled_by_inductor(name, inductor):
    model, x, reference = made(name)
    model = copy.deepcopy(model)
    eager = output_and_gradients(model, x)
    swap(model)
    compiled = torch.compile(model, fullgraph=True)
    check_budget(output_and_gradients(compiled, x), eager, reference, len(outputs(model, x)), 5e-7)


def test_diffusers_output_size_batches_and_whole_models():
    diffusers = library("diffusers")
    block = library("diffusers.models.upsampling").Upsample2D(8, use_conv=True, out_channels=6).double()
    x = torch.randn(65, 8, 3, 4, dtype=torch.float64)  # the library copies batches of 64 and more
    for size in (None, (7, 8), (9, 12)):
        want = block(x, size)
        swap(block)
        torch.testing.assert_close(block(x, size), want, rtol=1e-10, atol=1e-12)
        with pytest.raises(AssertionError):
            block(x[:, :4])
        unswap(block)
    for options in ({"norm_type": "ln_norm"}, {"interpolate": False}):
        block = library("diffusers.models.upsampling").Upsample2D(8, use_conv=True, **{"eps": 1e-5, **options}).double()
        want = block(x)
        assert not any("not the one" in r.reason for r in swap(block).left)
        torch.testing.assert_close(block(x), want, rtol=1e-10, atol=1e-12)
    block = library("diffusers.models.upsampling").Upsample2D(8, use_conv_transpose=True).double()
    want = block(x)
    assert [r.now for r in swap(block).replaced if r.path == "conv"] == ["aeup.ConvTranspose2d"]
    torch.testing.assert_close(block(x), want, rtol=1e-10, atol=1e-12)
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=9, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, attention_head_dim=4,
    ).double().eval()  # fmt: skip
    x = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    want = unet(x, 3).sample
    report = swap(unet, benchmark={"sample": x, "timestep": 3})
    assert report.fused and report.benchmark.difference < 1e-9
    torch.testing.assert_close(unet(x, 3).sample, want, rtol=1e-9, atol=1e-9)


def test_blocks_that_are_called_or_hooked_otherwise():
    manet = library("segmentation_models_pytorch.decoders.manet.decoder")
    fpn = library("segmentation_models_pytorch.decoders.fpn.decoder")
    x, skip = (torch.randn(2, 4, *size, dtype=torch.float64) for size in ((3, 5), (6, 10)))
    block = manet.DecoderBlock(4, 4, 3).double().eval()
    want = block(x, skip)
    assert swap(block).fused
    torch.testing.assert_close(block(x, skip), want, rtol=1e-10, atol=1e-12)
    block, seen = fpn.SegmentationBlock(4, 32, 2).double(), []
    want = block(x)
    assert swap(block).fused
    block.block[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(block(x), want, rtol=1e-10, atol=1e-12)
    assert seen == [(2, 32, 6, 10)]
    block = library("diffusers.models.upsampling").Upsample2D(4, use_conv=True)
    block.forward = torch.tanh
    report = swap(block)
    assert "set on the instance" in str(report) and not report.fused


def test_a_changed_library_is_left(monkeypatch):
    Upsample2D = library("diffusers.models.upsampling").Upsample2D

    class Changed(Upsample2D):
        pass

    Changed.__module__, Changed.__qualname__ = Upsample2D.__module__, Upsample2D.__qualname__

    def forward(self, hidden_states, output_size=None):
        return self.conv(hidden_states)

    Changed.forward = forward
    report = swap(Changed(4, use_conv=True))
    assert "not the one that aeup's adapter UPSAMPLE_2D is for" in str(report) and not report.fused


def test_nothing_is_imported_for_its_own_sake():
    import subprocess
    import sys

    code = (
        "import sys, torch, aeup; aeup.swap(torch.nn.Sequential(torch.nn.Upsample(scale_factor=2)));"
        "print([m for m in ('diffusers', 'timm', 'torchvision', 'segmentation_models_pytorch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny", "pose", "smp.Unet"])
def test_on_a_gpu(name, layout):
    """bfloat16, eager and replayed from a CUDA graph."""
    model, x, _ = made(name)
    model = copy.deepcopy(model).cuda().bfloat16().to(memory_format=layout)
    x = x.cuda().bfloat16().contiguous(memory_format=layout)
    reference = outputs(copy.deepcopy(model).double(), x.double())
    with torch.no_grad():
        theirs = outputs(model, x)
        found = swap(model, benchmark=x).benchmark
        assert found.device == "cuda" and " ms -> " in str(found)
        ours = outputs(model, x)
        assert max(distances(ours, reference)) <= 2 * max(distances(theirs, reference)) + 4e-3
        if name == "AutoencoderKL":  # its attention's map is channels-last; torch's CUDA group norm loses that
            theirs = [t.contiguous(memory_format=torch.channels_last) for t in theirs]
        assert [t.stride() for t in ours] == [t.stride() for t in theirs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = outputs(model, x)
        for t in replayed:
            t.fill_(float("nan"))
        graph.replay()
    for a, b in zip(replayed, ours, strict=True):
        torch.testing.assert_close(a, b)
