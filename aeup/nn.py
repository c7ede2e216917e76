"""torch.nn's upsampling modules on aeup's kernels: subclasses with the same constructors and state_dict keys."""

from torch import Tensor, nn

from aeup.functional import interpolate

__all__ = ["Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d"]


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
