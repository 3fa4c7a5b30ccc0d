"""What a UNet made for inpainting sees beside noisy latents (arXiv 2112.10752, section 4.5).

Its input has 1 + C channels more: a mask, one where it is to paint, and the latents of the picture without
what is masked. Where there is no picture to begin with, everything is to be painted.
"""

import torch
from torch import Tensor

from .unet import UNet
from .vae import VAE


class BlankCanvas:
    """A mask of ones and the latents of a grey picture, made once for every height and width."""

    def __init__(self, unet: UNet, vae: VAE) -> None:
        self.unet, self.vae = unet, vae
        self._made: dict[tuple[int, ...], Tensor] = {}

    def beside(self, x: Tensor) -> Tensor:
        """Noisy latents x, (B, C, h, w), with the canvas beside them, (B, 1 + 2C, h, w).

        An x that has all channels that the UNet takes comes back as it is: that of any other UNet, and one
        that shows a mask and a picture already.
        """
        if x.shape[1] == self.unet.config.in_channels:
            return x
        if x.shape[2:] not in self._made:
            self._made[x.shape[2:]] = self._make(x)
        return torch.cat([x, self._made[x.shape[2:]].expand(len(x), -1, -1, -1)], dim=1)

    @torch.no_grad()
    def _make(self, x: Tensor) -> Tensor:
        height, width = (side * self.vae.config.downscale for side in x.shape[2:])
        grey = self.vae.encode(torch.zeros(1, 3, height, width, device=x.device, dtype=self.vae.dtype)).mean
        latents = grey.to(x) * self.vae.config.scaling_factor
        return torch.cat([torch.ones_like(latents[:, :1]), latents], dim=1)
