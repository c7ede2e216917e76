"""The upsamplings of real decoders: one table, from which each operator takes its set "models".

Batch sizes are ours where the source leaves them open, and `cpu` is what a CPU can do in a moment. Sizes are those of
the source file's defaults, at the picture size that the row's model is known for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One upsampling of a model. `input`: [n, c, h, w] on a GPU. `cpu`: of the layers, batch size, height and width on
    a CPU; of interpolate, batch size and channels. `arguments`: those of the operator's geometry, by name."""

    op: str
    name: str
    source: str
    input: tuple[int, int, int, int]
    cpu: tuple[int, ...]
    arguments: Mapping


def rows(op: str) -> list[Row]:
    """The rows of one operator, in table order."""
    return [row for row in ROWS if row.op == op]


def _transposed(source: str, **layers) -> list[Row]:
    """name=(input, output channels, kernel, stride, padding, output_padding, cpu)."""
    keys = ("co", "k", "stride", "padding", "output_padding")
    return [
        Row("conv_transpose2d", name, source, shape, cpu, dict(zip(keys, arguments, strict=True)))
        for name, (shape, *arguments, cpu) in layers.items()
    ]


def _fused(source: str, mode: str = "nearest", **layers) -> list[Row]:
    """Upsampling x2 and a 3x3 convolution: name=(input, output channels, cpu)."""
    return [
        Row("upsample_conv2d", name, source, shape, cpu, {"co": co, "mode": mode})
        for name, (shape, co, cpu) in layers.items()
    ]


def _resized(name: str, source: str, shape, size, mode: str, cpu, by="scale", align_corners=None) -> Row:
    arguments = {"size": size, "mode": mode, "by": by, "align_corners": align_corners}
    return Row("interpolate", name, source, shape, cpu, arguments)


ROWS: tuple[Row, ...] = (
    *_transposed(
        "pytorch/examples dcgan/main.py",
        dcgan_z=((64, 100, 1, 1), 512, 4, 1, 0, 0, (16, 1, 1)),
        dcgan_4=((64, 512, 4, 4), 256, 4, 2, 1, 0, (4, 4, 4)),
        dcgan_8=((64, 256, 8, 8), 128, 4, 2, 1, 0, (4, 8, 8)),
        dcgan_16=((64, 128, 16, 16), 64, 4, 2, 1, 0, (4, 16, 16)),
        dcgan_32=((64, 64, 32, 32), 3, 4, 2, 1, 0, (8, 32, 32)),
    ),
    *_transposed(
        "pytorch-CycleGAN-and-pix2pix models/networks.py, UnetGenerator",
        pix2pix_1=((1, 512, 1, 1), 512, 4, 2, 1, 0, (1, 1, 1)),
        pix2pix_8=((1, 1024, 8, 8), 512, 4, 2, 1, 0, (1, 4, 4)),
        pix2pix_16=((1, 1024, 16, 16), 256, 4, 2, 1, 0, (1, 8, 8)),
        pix2pix_128=((1, 128, 128, 128), 3, 4, 2, 1, 0, (1, 128, 128)),
    ),
    *_transposed(
        "pytorch-CycleGAN-and-pix2pix models/networks.py, ResnetGenerator",
        cyclegan_64=((1, 256, 64, 64), 128, 3, 2, 1, 1, (1, 16, 16)),
    ),
    *_transposed(
        "human-pose-estimation.pytorch lib/models/pose_resnet.py",
        pose_8=((32, 2048, 8, 6), 256, 4, 2, 1, 0, (1, 4, 3)),
        pose_32=((32, 256, 32, 24), 256, 4, 2, 1, 0, (1, 16, 12)),
    ),
    *_transposed(
        "pytorch-fcn torchfcn/models/fcn32s.py",
        fcn32s=((1, 21, 12, 16), 21, 64, 32, 0, 0, (1, 12, 16)),
    ),
    *_transposed(
        "pytorch-fcn torchfcn/models/fcn8s.py",
        fcn8s_score=((1, 21, 12, 16), 21, 4, 2, 0, 0, (1, 12, 16)),
        fcn8s_last=((1, 21, 54, 70), 21, 16, 8, 0, 0, (1, 27, 35)),
    ),
    *_transposed(
        "Pytorch-UNet unet/unet_parts.py",
        unet_32=((4, 1024, 32, 32), 512, 2, 2, 0, 0, (1, 16, 16)),
    ),
    *_transposed(
        "torchvision models/detection/mask_rcnn.py, MaskRCNNPredictor",
        mask_rcnn=((512, 256, 14, 14), 256, 2, 2, 0, 0, (4, 14, 14)),
    ),
    *_transposed(
        "torchvision models/detection/keypoint_rcnn.py, KeypointRCNNPredictor",
        keypoint_rcnn=((100, 512, 14, 14), 17, 4, 2, 1, 0, (4, 14, 14)),
    ),
    *_transposed(
        "pythae models/nn/benchmarks/mnist/convnets.py",
        pythae_4=((100, 1024, 4, 4), 512, 3, 2, 1, 0, (4, 4, 4)),
        pythae_7=((100, 512, 7, 7), 256, 3, 2, 1, 1, (4, 7, 7)),
        pythae_14=((100, 256, 14, 14), 1, 3, 2, 1, 1, (16, 14, 14)),
    ),
    *_transposed(
        "pythae models/nn/benchmarks/celeba/convnets.py",
        celeba_8=((100, 1024, 8, 8), 512, 5, 2, 2, 0, (1, 4, 4)),
        celeba_15=((100, 512, 15, 15), 256, 5, 2, 1, 0, (1, 10, 10)),
        celeba_31=((100, 256, 31, 31), 128, 5, 2, 2, 1, (1, 21, 21)),
        celeba_62=((100, 128, 62, 62), 3, 5, 1, 1, 0, (4, 62, 62)),
    ),
    *_transposed(
        "PyTorch-VAE models/vanilla_vae.py",
        vae64_2=((64, 512, 2, 2), 256, 3, 2, 1, 1, (16, 2, 2)),
        vae64_4=((64, 256, 4, 4), 128, 3, 2, 1, 1, (16, 4, 4)),
        vae64_8=((64, 128, 8, 8), 64, 3, 2, 1, 1, (16, 8, 8)),
        vae64_16=((64, 64, 16, 16), 32, 3, 2, 1, 1, (16, 16, 16)),
        vae64_32=((64, 32, 32, 32), 32, 3, 2, 1, 1, (16, 32, 32)),
    ),
    *_fused(
        "diffusers models/autoencoders/vae.py, Decoder (Stable Diffusion, 512x512)",
        sd_64=((1, 512, 64, 64), 512, (1, 8, 8)),
        sd_128=((1, 512, 128, 128), 512, (1, 10, 14)),
        sd_256=((1, 256, 256, 256), 256, (1, 16, 16)),
    ),
    *_fused(
        "generative-models configs/inference/sd_xl_base.yaml (SDXL, 1024x1024)",
        sdxl_256=((1, 512, 256, 256), 512, (1, 9, 11)),
        sdxl_512=((1, 256, 512, 512), 256, (1, 16, 16)),
    ),
    *_fused("taesd taesd.py, Decoder", taesd_256=((1, 64, 256, 256), 64, (1, 64, 64))),
    *_fused(
        "taming-transformers configs/imagenet_vqgan.yaml",
        vqgan_16=((12, 512, 16, 16), 512, (1, 8, 8)),
        vqgan_64=((12, 256, 64, 64), 256, (1, 16, 16)),
        vqgan_128=((12, 128, 128, 128), 128, (1, 32, 32)),
    ),
    *_fused(
        "ESRGAN RRDBNet_arch.py",
        esrgan_128=((1, 64, 128, 128), 64, (1, 48, 48)),
        esrgan_256=((1, 64, 256, 256), 64, (1, 64, 64)),
    ),
    *_fused(
        "diffusers models/autoencoders/autoencoder_kl_wan.py, WanResample",
        "nearest-exact",
        wan=((4, 192, 240, 416), 96, (1, 24, 32)),
    ),
    _resized(
        "unet_bilinear",
        "Pytorch-UNet unet/unet_parts.py, last Up at 512x512",
        (4, 64, 256, 256), (512, 512), "bilinear", (1, 16), align_corners=True,
    ),
    _resized(
        "fpn",
        "torchvision ops/feature_pyramid_network.py, top-down path",
        (2, 256, 25, 34), (50, 68), "nearest", (2, 256), by="size",
    ),
    _resized(
        "deeplab",
        "torchvision models/segmentation/_utils.py",
        (8, 21, 65, 65), (520, 520), "bilinear", (1, 21), by="size", align_corners=False,
    ),
    _resized(
        "bifpn",
        "effdet efficientdet.py, EfficientDet-D0",
        (8, 64, 32, 32), (64, 64), "nearest", (8, 64),
    ),
    _resized(
        "nvae_nearest",
        "NVAE neural_operations.py",
        (200, 256, 4, 4), (8, 8), "nearest", (200, 256),
    ),
    _resized(
        "nvae_bilinear",
        "NVAE neural_operations.py",
        (200, 64, 16, 16), (32, 32), "bilinear", (50, 64), align_corners=True,
    ),
    _resized(
        "raft",
        "torchvision models/optical_flow/_utils.py, upsample_flow",
        (1, 2, 55, 128), (440, 1024), "bilinear", (1, 2), by="size", align_corners=True,
    ),
    _resized(
        "keypoint",
        "torchvision models/detection/keypoint_rcnn.py, KeypointRCNNPredictor",
        (100, 17, 28, 28), (56, 56), "bilinear", (50, 17), align_corners=False,
    ),
    _resized(
        "wan_exact",
        "diffusers models/autoencoders/autoencoder_kl_wan.py, WanUpsample",
        (4, 192, 240, 416), (480, 832), "nearest-exact", (1, 16),
    ),
    _resized(
        "vit_position",
        "torchvision models/vision_transformer.py, interpolate_embeddings",
        (1, 768, 14, 14), (24, 24), "bicubic", (1, 768), by="size", align_corners=True,
    ),
)  # fmt: skip
