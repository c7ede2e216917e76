"""torch.nn's upsampling modules on aeup's kernels: subclasses with the same constructors and state_dict keys."""

from torch import Tensor, nn

from aeup.functional import Activation, conv_transpose2d, interpolate, parse_activation

__all__ = ["ConvTranspose2d", "Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d"]


class Upsample(nn.Upsample):
    """:class:`torch.nn.Upsample` by :func:`aeup.interpolate`: the same arguments, results and errors.

    Shapes: [N, C, H, W] -> [N, C, oh, ow]; other ranks go to torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        return interpolate(
            input, self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor
        )


class UpsamplingNearest2d(Upsample):
    """:class:`torch.nn.UpsamplingNearest2d` by :func:`aeup.interpolate`."""

    def __init__(self, size=None, scale_factor=None) -> None:
        super().__init__(size, scale_factor, mode="nearest")


class UpsamplingBilinear2d(Upsample):
    """:class:`torch.nn.UpsamplingBilinear2d` by :func:`aeup.interpolate`: bilinear with ``align_corners=True``."""

    def __init__(self, size=None, scale_factor=None) -> None:
        super().__init__(size, scale_factor, mode="bilinear", align_corners=True)


class ConvTranspose2d(nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` by :func:`aeup.conv_transpose2d`: the same constructor, ``state_dict``, results
    and errors, and keyword-only `activation`, applied with the bias: "relu", "leaky_relu" (or ("leaky_relu", slope)),
    "silu", "gelu", "tanh", "sigmoid" or None.

    Shapes: [N, in_channels, H, W] -> [N, out_channels, oh, ow], or both without N. ``forward(input, output_size=None)``
    takes the output's size (H, W) where the stride leaves more than one.

    Raises:
        ValueError: an unknown `activation`, a `padding_mode` other than "zeros", an `output_size` out of range.
    """

    activation: Activation = None

    def __init__(self, *args, activation: Activation = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if activation is not None:
            parse_activation(activation)
        self.activation = activation

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose2d")
        output_padding = self.output_padding
        if output_size is not None:
            output_padding = self._output_padding(
                input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
            )
        return conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation,
            activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")
