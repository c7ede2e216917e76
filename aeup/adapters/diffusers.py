"""diffusers: the upsampling block of AutoencoderKL's decoder and of the U-Nets (nearest x2, then a 3x3 convolution)."""

from collections.abc import Callable

from torch import Tensor, nn

from aeup.adapters import Adapter
from aeup.adapters.pairs import pair


def _forward(plain: Callable) -> Callable:
    def forward(self, hidden_states: Tensor, output_size=None, *args, **kwargs) -> Tensor:
        if args or kwargs or hidden_states.shape[1] != self.channels or _path(self) is None:
            return plain(self, hidden_states, output_size, *args, **kwargs)
        conv = self.conv if self.name == "conv" else self.Conv2d_0
        # Channels-last stays channels-last at any size, where the library copies around limits of torch's kernels.
        if output_size is None:
            return pair(conv, hidden_states, None, 2.0, "nearest")
        return pair(conv, hidden_states, output_size, None, "nearest")

    return forward


def _path(module: nn.Module) -> str | None:
    if module.use_conv_transpose or not module.use_conv or not module.interpolate or module.norm is not None:
        return None
    return "conv" if module.name == "conv" else "Conv2d_0"


UPSAMPLE_2D = Adapter(
    frozenset(
        "len get deprecate shape channels norm permute use_conv_transpose conv dtype torch bfloat16 "
        "is_torch_version to float32 contiguous interpolate max zip numel pow F use_conv name Conv2d_0".split()
    ),
    _forward,
    _path,
)
