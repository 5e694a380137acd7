"""PSPNet as the paper's authors write it (pool, upsample, concatenate, convolve): what ours is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_core.network.pspnet import Logits, PSPNet


class PlainPSPNet(nn.Module):
    """The plain formulation over the modules, hence the weights, of one of our networks."""

    def __init__(self, model: PSPNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Logits:
        """Logits ``(B, C, H, W)`` of ``(B, N, H, W)`` uint8; the auxiliary ones in training only, as its authors do."""
        third, fourth = self.model.backbone(self.model.preprocess(images))
        main = self._resize(self._decode(fourth), images)
        if self.model.auxiliary is None or not self.training:
            return Logits(main, None)
        return Logits(main, self._resize(self.model.auxiliary(third), images))

    def _decode(self, feature: Tensor) -> Tensor:
        config = self.model.config
        grids = [
            self._resize(stage(F.adaptive_avg_pool2d(feature, size)), feature)
            for size, stage in zip(config.bins, self.model.pyramid.stages, strict=True)
        ]
        parts = [feature, *grids] if config.fusion_order == "feature_first" else [*grids, feature]
        fused = torch.cat(parts, dim=1)
        for layer in self.model.fusion.children():
            fused = layer(fused)
        logits: Tensor = self.model.decoder(fused)
        return logits

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=self.model.config.align_corners)
