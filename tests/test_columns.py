"""The extension's matrix of a convolution's taps, and its adjoint, in every layout, dtype and instruction set."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import aeup  # noqa: F401

LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16)
# (n, c, ih, iw), kernel, stride, padding, dilation, how much of the image no tap reaches at its end.
GEOMETRIES = [
    ((2, 5, 4, 3), (4, 4), (2, 2), (1, 1), (1, 1), (0, 0)),
    ((1, 3, 5, 6), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
    ((3, 17, 2, 9), (5, 3), (3, 1), (2, 1), (1, 1), (2, 0)),
    ((2, 16, 3, 3), (2, 2), (4, 4), (0, 0), (1, 1), (2, 3)),  # pixels between the taps
    ((1, 2, 3, 20), (7, 8), (4, 4), (3, 6), (1, 1), (0, 0)),
    ((2, 3, 4, 4), (3, 2), (2, 3), (2, 1), (2, 3), (1, 0)),
    ((1, 1, 1, 4), (1, 5), (1, 2), (0, 4), (1, 1), (0, 1)),  # taps outside altogether
    ((2, 3, 5, 37), (2, 2), (2, 2), (0, 0), (1, 1), (0, 0)),  # no two taps a pixel
    ((2, 3, 5, 18), (3, 2), (3, 2), (0, 0), (1, 1), (0, 0)),
    ((1, 40, 6, 5), (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)),
]


def sizes(shape, kernel, stride, padding, dilation, beyond):
    return [
        (i - 1) * s - 2 * p + d * (k - 1) + 1 + more
        for i, k, s, p, d, more in zip(shape[2:], kernel, stride, padding, dilation, beyond, strict=True)
    ]


def options(geometry, last):
    shape, kernel, stride, padding, dilation, _ = geometry
    return *shape[2:], *kernel, *stride, *padding, *dilation, last


def unfolded(image, geometry):
    """By torch, [n, c, kh, kw, ih, iw], in float64."""
    (n, c, ih, iw), kernel, stride, padding, dilation, _ = geometry
    found = F.unfold(image.double(), kernel, dilation, padding, stride)
    down, along = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(image.shape[2:], kernel, stride, padding, dilation, strict=True)
    )
    return found.view(n, c, *kernel, down, along)[..., :ih, :iw]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_against_unfold_and_its_gradient(geometry, dtype):
    n, c = geometry[0][:2]
    torch.manual_seed(0)
    for layout in LAYOUTS:
        last = layout is torch.channels_last
        image = torch.randn(n, c, *sizes(*geometry)).to(dtype).contiguous(memory_format=layout)
        leaf = image.double().requires_grad_()
        expected = unfolded(leaf, geometry)
        expected = (expected.permute(0, 4, 5, 2, 3, 1) if last else expected.permute(1, 2, 3, 0, 4, 5)).flatten(0, 2)
        expected = expected.flatten(1) if last else expected.flatten(0, 0).flatten(1)
        columns = torch.ops.aeup_native.to_columns(image, *options(geometry, last))
        assert torch.equal(columns.double(), expected)

        bias, grad = torch.randn(c).to(dtype), torch.randn(columns.shape).to(dtype)
        (sums,) = torch.autograd.grad(expected, leaf, grad.double())
        for added in (None, bias):
            found = torch.empty_like(image)
            torch.ops.aeup_native.from_columns(found, grad, added, 0, n, *options(geometry, last))
            true = sums if added is None else sums + added.double()[:, None, None]
            assert found.dtype is dtype and found.is_contiguous(memory_format=layout)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(found.double(), true, rtol=eps, atol=16 * torch.finfo(torch.float32).eps)


def test_more_threads_give_the_same_bits():
    geometry, threads = GEOMETRIES[0], torch.get_num_threads()
    columns = torch.randn(5 * 16, 2 * 12)
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(torch.empty(2, 5, 8, 6))
            torch.ops.aeup_native.from_columns(found[-1], columns, None, 0, 2, *options(geometry, False))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_refusals():
    ops, image = torch.ops.aeup_native, torch.randn(2, 5, 8, 6)
    right = options(GEOMETRIES[0], False)
    columns = ops.to_columns(image, *right)
    for wrong, message in (
        (lambda: ops.to_columns(image.double(), *right), "float32 and bfloat16"),
        (lambda: ops.to_columns(image[0], *right), "4 dimensions"),
        (lambda: ops.to_columns(image, 4, 3, 4, 4, 0, 2, 1, 1, 1, 1, False), "at least 1"),
        (lambda: ops.from_columns(image, columns[1:], None, 0, 2, *right), "not that of the images"),
        (lambda: ops.from_columns(image, columns, torch.randn(4), 0, 2, *right), "5 elements"),
        (lambda: ops.from_columns(image, columns, None, 1, 2, *right), "no such images"),
        (lambda: ops.from_columns(image, columns.bfloat16(), None, 0, 2, *right), "differs in dtype"),
        (lambda: ops.from_columns(image.mT, columns, None, 0, 2, *right), "not dense"),
    ):
        with pytest.raises(RuntimeError, match=message):
            wrong()


@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_other_instruction_sets(isa):
    program = "import pytest, sys; sys.exit(pytest.main([sys.argv[1], '-q', '-k', 'unfold', '-p', 'no:cacheprovider']))"
    done = subprocess.run(
        [sys.executable, "-c", program, __file__],
        env={**os.environ, "AEUP_ISA": isa},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(__file__),
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_empty_batch():
    for last, geometry in itertools.product((False, True), GEOMETRIES[:1]):
        found = torch.ops.aeup_native.to_columns(torch.randn(0, 5, 8, 6), *options(geometry, last))
        assert found.numel() == 0
        torch.ops.aeup_native.from_columns(torch.empty(0, 5, 8, 6), found, None, 0, 0, *options(geometry, last))


def test_some_images_of_a_batch():
    geometry = GEOMETRIES[0]
    for last, layout in zip((False, True), LAYOUTS, strict=True):
        image = torch.randn(2, 5, 8, 6).contiguous(memory_format=layout)
        columns = torch.ops.aeup_native.to_columns(image, *options(geometry, last))
        whole, parts = torch.empty_like(image), torch.full_like(image, torch.nan)
        torch.ops.aeup_native.from_columns(whole, columns, None, 0, 2, *options(geometry, last))
        for i in (1, 0):
            columns = torch.ops.aeup_native.to_columns(image[i : i + 1], *options(geometry, last))
            torch.ops.aeup_native.from_columns(parts, columns, None, i, 1, *options(geometry, last))
        assert torch.equal(whole, parts)
