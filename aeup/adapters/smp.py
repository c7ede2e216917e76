"""segmentation_models_pytorch: decoder blocks that upsample, join a skip connection where there is one, and convolve.
In a block without one (the last, at the highest resolution) the upsampled map goes to the convolution alone."""

from collections.abc import Callable

from torch import Tensor, nn

from aeup.adapters import Adapter
from aeup.adapters.pairs import pair, watched
from aeup.functional import interpolate

_BLOCK = "F interpolate interpolation_mode torch cat conv1 conv2 "


def _conv1(module: nn.Module) -> str | None:
    return "conv1" if module.conv1 is not None else None


def _unet(plain: Callable) -> Callable:
    def forward(self, feature_map: Tensor, target_height: int, target_width: int, skip_connection=None) -> Tensor:
        if skip_connection is not None:
            return plain(self, feature_map, target_height, target_width, skip_connection)
        x = pair(self.conv1, feature_map, (target_height, target_width), None, self.interpolation_mode)
        return self.attention2(self.conv2(x))

    return forward


def _unet_plus_plus(plain: Callable) -> Callable:
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None or self.is_empty:
            return plain(self, x, skip)
        return self.attention2(self.conv2(pair(self.conv1, x, None, 2.0, self.interpolation_mode)))

    return forward


def _manet(plain: Callable) -> Callable:
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            return plain(self, x, skip)
        return self.conv2(pair(self.conv1, x, None, 2.0, self.interpolation_mode))

    return forward


def _fpn_stages(module: nn.Module) -> bool:
    """Whether the block is a chain of stages (convolution, normalisation, activation, perhaps bilinear x2)."""
    stages = module.block
    return watched(stages) is None and all(
        type(s).__name__ == "Conv3x3GNReLU" and type(s).__module__ == type(module).__module__ and watched(s) is None
        for s in stages
    )


def _fpn(plain: Callable) -> Callable:
    def forward(self, x: Tensor) -> Tensor:
        if not _fpn_stages(self):
            return plain(self, x)
        waits = False  # for the upsampling of the stage before
        for stage in self.block:
            x = pair(stage.block, x, None, 2.0, "bilinear", True) if waits else stage.block(x)
            waits = stage.upsample
        return interpolate(x, None, 2.0, "bilinear", True) if waits else x

    return forward


def _fpn_pair(module: nn.Module) -> str | None:
    return "block.1.block" if len(module.block) > 1 and module.block[0].upsample and _fpn_stages(module) else None


_WHEN = "in calls without a skip connection"
UNET = Adapter(frozenset(f"{_BLOCK} attention1 attention2".split()), _unet, _conv1, _WHEN)
UNET_PLUS_PLUS = Adapter(
    frozenset(f"{_BLOCK} attention1 attention2 is_empty shape new_empty".split()), _unet_plus_plus, _conv1, _WHEN
)
MANET = Adapter(frozenset(_BLOCK.split()), _manet, _conv1, _WHEN)
FPN_SEGMENTATION = Adapter(frozenset(["block"]), _fpn, _fpn_pair)
