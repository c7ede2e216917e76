"""2-D upsampling with the convolution after it: torch.ops.aeup.upsample_conv2d and its two gradients.

With x [N, CI, ih, iw], w [CO, CI / groups, kh, kw] and y [N, CO, oh, ow] the maps (aeup/ops/maps.py) are Y, y =
conv2d(R x, w) with R the resampling to the size that the op is given (the upsampled map, which is never written); X,
the adjoint in x; and W, a sum over pixels. Nearest by whole scales is a transposed convolution (aeup/ops/
upsample_conv_shapes.py), as Odena et al., 2016, "Deconvolution and checkerboard artifacts", Distill, remark.
"""

from torch import Tensor

from aeup.ops.conv_shapes import W, X, Y
from aeup.ops.epilogue import check_activation
from aeup.ops.interpolate import Map
from aeup.ops.maps import Forward, Maps
from aeup.ops.upsample_conv_kernels import MAPS, NAMES, joint
from aeup.ops.upsample_conv_plain import CHOSEN
from aeup.ops.upsample_conv_shapes import UpsampleGeometry, upsample_geometry

_REST = "SymInt[2] size, str mode, bool align_corners, float? scale_h, float? scale_w, SymInt[2] padding, SymInt groups"


class _UpsampleConv2d(Forward):
    pass


class _Maps(Maps):
    name = "upsample_conv2d"
    schemas = {
        Y: f"Tensor input, Tensor weight, Tensor? bias, {_REST}, str? activation=None, float slope=0.01",
        X: f"Tensor grad_output, Tensor weight, SymInt[2] input_size, {_REST}",
        W: f"Tensor grad_output, Tensor input, SymInt[2] kernel_size, {_REST}",
    }
    ops = MAPS
    by_torch = (MAPS[Y].kernels["composed"], MAPS[Y].kernels["torch"])
    function = _UpsampleConv2d

    def arguments(self, kind: int, g: UpsampleGeometry) -> tuple:
        m = g.m
        rest = (g.size, m.mode, m.align_corners, m.scale_h, m.scale_w, g.padding, g.groups)
        return rest if kind == Y else (g.input_size if kind == X else g.kernel_size, *rest)

    def checked(
        self, x, w, bias, size, mode, align_corners, scale_h, scale_w, padding, groups, activation=None, slope=0.01
    ) -> tuple:
        name = NAMES[Y]
        _check_kind(name, x, w)
        if x.dim() != 4:
            raise RuntimeError(f"aeup.{name}: expected a 4-D input [N, C, H, W], got shape {list(x.shape)}")
        m = Map(*x.shape[2:], *size, mode, align_corners, False, scale_h, scale_w)
        g = upsample_geometry(f"aeup.{name}", m, x.shape[1], w.shape, *padding, groups)
        if bias is not None and (bias.shape != (g.co,) or bias.dtype != x.dtype):
            given = f"{list(bias.shape)} of {bias.dtype}"
            raise RuntimeError(f"aeup.{name}: expected bias to be [{g.co}] of {x.dtype}, got {given}")
        check_activation(activation, slope)
        return x, w, bias, g, activation, slope

    def of_gradient(self, kind: int, a, b, *rest) -> UpsampleGeometry:
        given, size, mode, align_corners, scale_h, scale_w, padding, groups = rest
        name = f"aeup.{NAMES[kind]}"
        _check_kind(NAMES[kind], a, b)
        if a.dim() != 4 or b.dim() != 4:
            raise RuntimeError(f"{name}: expected 4-D tensors, got shapes {list(a.shape)} and {list(b.shape)}")
        if groups < 1:
            raise RuntimeError(f"{name}: groups must be at least 1, got {groups}")
        image, ci = (given, b.shape[1] * groups) if kind == X else (b.shape[2:], b.shape[1])
        w_shape = b.shape if kind == X else (a.shape[1], ci // groups, *given)
        m = Map(*image, *size, mode, align_corners, False, scale_h, scale_w)
        g = upsample_geometry(name, m, ci, w_shape, *padding, groups)
        if a.shape[1:] != (g.co, g.oh, g.ow) or (kind == W and a.shape[0] != b.shape[0]):
            what = "weight" if kind == X else "input"
            raise RuntimeError(
                f"{name}: grad_output {list(a.shape)} does not fit {what} {list(b.shape)}: expected "
                f"[N, {g.co}, {g.oh}, {g.ow}]"
            )
        return g

    def shape(self, kind: int, g: UpsampleGeometry, n) -> tuple:
        if kind == W:
            return g.weight_shape
        return (n, g.ci, *g.input_size) if kind == X else (n, g.co, g.oh, g.ow)

    def call(self, x: Tensor, g: UpsampleGeometry) -> str:
        m = g.m
        p = g.ph if g.ph == g.pw else f"{g.ph}x{g.pw}"
        align = ", align_corners" if m.align_corners else ""
        return f"{list(x.shape)} -> {m.mode} {m.oh}x{m.ow}{align} -> {g.co}, k{g.kh}x{g.kw}, p{p}"

    def joint(self, kernel_x, kernel_w, g):
        return joint(kernel_x, kernel_w, g)


def _check_kind(name: str, a: Tensor, b: Tensor) -> None:
    if a.dtype != b.dtype or a.device != b.device:
        raise RuntimeError(
            f"aeup.{name}: expected one dtype and device, got {a.dtype} on {a.device} and {b.dtype} on {b.device}"
        )


UPSAMPLE_CONV2D = CHOSEN.maps = _Maps()
