"""The table of the ops of three maps, a row an op: how its registered operators are called, and what torch computes."""

import conv2d_cases
import conv_cases
import torch
import upsample_conv_cases
from cases import LAYOUTS

import aeup


class MapOp:
    """The inputs are [N, 4, H, W], the weights have the two kernel sizes last, the output has 6 channels or 3 * groups.

    arguments: of the registered forward, for input [2, 4, 3, 4] and kernel 3x2; `few` of them for what takes long;
    `transformed`: for input [.., 4, 3, 5] and kernel 3x3. fast_mode: gradcheck's, for the many activations.
    least_height: of an input that all `layers` take.
    """

    least_height = 2

    def __str__(self):
        return self.name

    @property
    def function(self):
        return getattr(aeup, self.name)

    @property
    def forward(self):
        return getattr(torch.ops.aeup, self.name)

    @property
    def gradients(self):
        """The operators of the gradients of the input and of the weight."""
        return tuple(getattr(torch.ops.aeup, f"{self.name}_{of}_gradient") for of in ("input", "weight"))

    def leaves(self, arguments, shape, kernel, dtype=torch.float64):
        """x, weight and bias."""
        g = torch.Generator().manual_seed(0)
        shapes = shape, *self.parameters(self.keywords(arguments)["groups"], kernel)
        return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]

    def tensors(self, arguments, dtype=torch.float64, layout="nchw", grad=True, batch=2):
        """x, weight, bias and a gradient of the output for a row of `arguments`."""
        x, w, b = self.leaves(arguments, (batch, 4, 3, 4), (3, 2), dtype)
        y = self.by_torch(x, w, b, **self.keywords(arguments))
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        x, dy = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, dy))
        return tuple(t.requires_grad_(grad) for t in (x, w, b, dy))

    def of_gradients(self, x, w, dy, arguments):
        """The arguments of the operators of the two gradients."""
        shared = self.shared(arguments)
        return (dy, w, x.shape[2:], *shared), (dy, x, w.shape[2:], *shared)


class ConvTranspose(MapOp):
    name = "conv_transpose2d"
    by_torch = staticmethod(conv_cases.by_torch)
    takes_unbatched = True
    fast_mode = False
    arguments = (  # stride, padding, output_padding, groups, dilation
        ((2, 1), (1, 0), (1, 0), 1, (1, 1)),
        ((1, 1), (0, 0), (0, 0), 2, (1, 2)),
        ((2, 3), (1, 0), (0, 3), 4, (3, 4)),
    )
    few = arguments[:1]
    transformed = (((2, 2), (1, 1), (1, 1), 2, (1, 1)),)

    def parameters(self, groups, kernel):
        return (4, 3, *kernel), (3 * groups,)

    def keywords(self, arguments):
        return dict(zip(("stride", "padding", "output_padding", "groups", "dilation"), arguments, strict=True))

    def shared(self, arguments):
        stride, padding, _, groups, dilation = arguments
        return stride, padding, groups, dilation

    def layers(self):
        return (
            aeup.ConvTranspose2d(4, 6, 4, 2, 1, activation="relu"),
            aeup.ConvTranspose2d(6, 3, 3, 2, 1, 1, groups=3, activation=("leaky_relu", 0.2)),
            aeup.ConvTranspose2d(3, 2, 3, activation="gelu"),
            aeup.ConvTranspose2d(2, 3, 3, 2, 1, 1),
        )


class UpsampleConv(MapOp):
    name = "upsample_conv2d"
    by_torch = staticmethod(upsample_conv_cases.by_torch)
    takes_unbatched = False
    fast_mode = True
    arguments = (  # size, mode, align_corners, scale_h, scale_w, padding, groups
        ((6, 8), "nearest", False, 2.0, 2.0, (1, 0), 1),
        ((9, 8), "nearest-exact", False, None, None, (0, 3), 2),
        ((6, 8), "bilinear", False, 2.0, 2.0, (1, 1), 2),
        ((5, 7), "bicubic", True, None, None, (1, 0), 1),
    )
    few = arguments[::2]
    transformed = tuple(((6, 10), mode, False, 2.0, 2.0, (1, 1), 2) for mode in ("nearest", "bilinear", "bicubic"))

    def parameters(self, groups, kernel):
        return (6, 4 // groups, *kernel), (6,)

    def keywords(self, arguments):
        size, mode, align, scale_h, scale_w, padding, groups = arguments
        how = {"size": size} if scale_h is None else {"scale_factor": (scale_h, scale_w)}
        return how | {"mode": mode, "align_corners": align or None, "padding": padding, "groups": groups}

    def shared(self, arguments):
        return arguments

    def layers(self):
        return (
            aeup.UpsampleConv2d(4, 6, 3, padding=1, activation="relu"),
            aeup.UpsampleConv2d(6, 3, 3, mode="bilinear", padding="same", groups=3, activation=("leaky_relu", 0.2)),
            aeup.UpsampleConv2d(3, 2, 2, (1.5, 2), padding="same", activation="gelu"),
            aeup.UpsampleConv2d(2, 3, 3, mode="bicubic"),
        )


class Conv(MapOp):
    name = "conv2d"
    least_height = 8
    by_torch = staticmethod(conv2d_cases.by_torch)
    takes_unbatched = True
    fast_mode = False
    arguments = (  # stride, padding, dilation, groups
        ((2, 1), (1, 0), (1, 1), 1),
        ((1, 1), (0, 1), (1, 2), 2),
        ((3, 2), (2, 3), (2, 1), 2),
    )
    few = arguments[:1]
    transformed = (((2, 2), (1, 1), (1, 1), 2),)

    def parameters(self, groups, kernel):
        return (6, 4 // groups, *kernel), (6,)

    def keywords(self, arguments):
        return dict(zip(("stride", "padding", "dilation", "groups"), arguments, strict=True))

    def shared(self, arguments):
        return arguments

    def layers(self):
        """The function: on a CPU the module is torch's."""
        return (
            _Conv2d(4, 6, 4, 2, 1, activation="relu"),
            _Conv2d(6, 3, 3, 1, 1, groups=3, activation=("leaky_relu", 0.2)),
            _Conv2d(3, 2, 3, 1, 2, 2, activation="gelu"),
            _Conv2d(2, 3, 2, 2, 1),
        )


class _Conv2d(aeup.Conv2d):
    def _refuses(self, input):
        return None


CONV_TRANSPOSE, UPSAMPLE_CONV, CONV = ConvTranspose(), UpsampleConv(), Conv()
OPS = (CONV_TRANSPOSE, UPSAMPLE_CONV, CONV)
