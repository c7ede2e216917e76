"""The table of real decoders: each row's sizes are the model's, and aeup gives torch's result on each."""

from dataclasses import replace

import pytest
import torch
from aeup.bench import conv_transpose2d, decoders, interpolate, upsample_conv2d
from cases import check_budget

CASES = {
    "interpolate": interpolate.interpolate_cases,
    "conv_transpose2d": conv_transpose2d.conv_transpose2d_cases,
    "upsample_conv2d": upsample_conv2d.upsample_conv2d_cases,
}
# Sizes that the sources give, [h, w] of the output.
MADE = {
    "dcgan_z": (4, 4), "dcgan_32": (64, 64), "pix2pix_128": (256, 256), "cyclegan_64": (128, 128), "pose_32": (64, 48),
    "fcn32s": (416, 544), "fcn8s_score": (26, 34), "fcn8s_last": (440, 568), "unet_32": (64, 64), "mask_rcnn": (28, 28),
    "keypoint_rcnn": (28, 28), "pythae_4": (7, 7), "pythae_7": (14, 14), "pythae_14": (28, 28), "celeba_8": (15, 15),
    "celeba_15": (31, 31), "celeba_31": (62, 62), "celeba_62": (64, 64), "vae64_2": (4, 4), "vae64_32": (64, 64),
    "sd_256": (512, 512), "sdxl_512": (1024, 1024), "esrgan_256": (512, 512), "wan": (480, 832),
}  # fmt: skip


def found(op, device):
    return CASES[op](device, sets=("models",), dtypes=("fp32",))


def test_each_row_is_a_case_of_its_operator():
    assert {row.op for row in decoders.ROWS} == set(CASES)
    assert len({row.name for row in decoders.ROWS}) == len(decoders.ROWS)
    for op in CASES:
        for device in ("cpu", "cuda"):
            shapes = [c.shape for c in found(op, device)[::2]]  # two layouts
            assert shapes == [row.name for row in decoders.rows(op)]
        for c in found(op, "cuda"):
            assert ".py" in c.source or ".yaml" in c.source
            assert MADE.get(c.shape, c.geometry.output[2:]) == c.geometry.output[2:], c.id
        for c in found(op, "cpu"):
            assert c.flops("forward") < 1.3e9 and c.bytes("forward") < 6e7, c.id
    made = {c.shape for op in CASES for c in found(op, "cuda")}
    assert set(MADE) <= made


@pytest.mark.parametrize("op", CASES)
def test_aeup_gives_torchs_result(op):
    """With few channels and a batch of one, forward and backward, each in one layout."""
    for i, c in enumerate(found(op, "cpu")):
        if i % 2 != i // 2 % 2:
            continue
        g = c.geometry
        small = {k: min(getattr(g, k), 3 + i % 3) for k in ("c", "ci", "co") if hasattr(g, k)}
        if op == "interpolate" and g.oh > 256:
            small |= {k: getattr(g, k) // 4 for k in ("h", "w", "oh", "ow")}
        c = replace(c, geometry=replace(g, n=1, **small))
        problem = c.problem("cpu", i)
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in problem.inputs]
        results = []
        for fn in (c.torch(), c.aeup()):
            y = fn(*leaves)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, problem.grad)))
        references = [part.reference for way in ("forward", "backward") for part in problem.parts(way)]
        for expected, got, reference in zip(*results, references, strict=True):
            at_least_2d = [t.reshape(1, -1) if t.ndim < 2 else t for t in (got, reference, expected)]
            check_budget(*at_least_2d, floor_ulps=4)
