"""Vision transformers as encoders: smp's DPT made to fit any patch size, and which image sizes it then takes.

smp scales the tokens' grid by patch size / 4, / 8, / 16 and / 32, rounded down. With patches of 14 px (DINOv2) the maps then fit
neither each other nor the image, and every image is refused. Here such a grid is scaled as one of 16 px patches: by 4, 2, 1 and 1/2,
as in the DPT of Depth Anything (Yang et al., CVPR 2024) and UniMatch V2, and the head scales the logits to the image's size.
"""

import math
from typing import Any

ARCHITECTURE = "dpt"


def takes_any_size(encoder: str) -> bool:
    """Whether timm has a switch, `dynamic_img_size`, that lets the vision transformer `tu-NAME` see other sizes than its own."""
    import timm
    import torch

    with torch.device("meta"):  # neither memory nor random numbers
        return hasattr(timm.create_model(encoder.removeprefix("tu-")), "dynamic_img_size")


def fit_patches(network: Any) -> None:
    """Changes a DPT of smp, in place, so that it makes logits of the image's size whatever the patch size. Of patches whose
    side is a power of two it leaves everything as it is. New layers are drawn from torch's RNG, as smp draws its own."""
    from segmentation_models_pytorch.base.initialization import initialize_decoder
    from segmentation_models_pytorch.decoders.dpt.decoder import ReassembleBlock

    patch = network.encoder.output_stride
    nominal = _nominal(patch)
    if patch == nominal:
        return
    blocks = network.decoder.reassemble_blocks
    for number, block in enumerate(blocks):
        project, last = block.project_to_out_channel, block.project_to_feature_dim
        factor = nominal / 2 ** (number + 2)
        blocks[number] = ReassembleBlock(project.in_channels, project.out_channels, last.out_channels, factor)
    initialize_decoder(blocks)
    network.segmentation_head.upsampling_factor = 2 * patch / nominal


def image_divisor(patch_px: int, maps: int = 4) -> int:
    """Returns the number that the sides in px of what a DPT sees must be multiples of, by the patch size and the maps it takes.

    The coarsest map has 2^(maps + 1) nominal px a cell, and maps fit each other where it needs no rounding.
    """
    coarsest_px = int(2 ** (maps + 1))
    return patch_px * max(1, coarsest_px // _nominal(patch_px))


def _nominal(patch: int) -> int:
    """The power of two next to a patch size: 16 for 14."""
    return int(2 ** round(math.log2(patch)))
