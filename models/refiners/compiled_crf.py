"""The compiled ``pydensecrf`` behind the same door as our own CRF, for a comparison on one's own data."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.refiners.dense_crf import DenseCRF


@dataclass(frozen=True)
class CompiledCRF(DenseCRF):
    """``DenseCRF`` with the same arguments, computed by pydensecrf on the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            import pydensecrf.densecrf  # noqa: F401
        except ImportError as error:
            raise ImportError("refiner pydensecrf needs 'pip install pydensecrf2' and a compiler") from error

    @property
    def protocol(self) -> str:
        return f"pydense{super().protocol}"

    def refine_energies(self, image_rgb: Tensor, energies: Sequence[Tensor]) -> list[Tensor]:
        levels = (255 * image_rgb).round().byte().movedim(1, -1).cpu().numpy()  # (B, H, W, 3)
        return [
            torch.stack([self._infer(image, energy) for image, energy in zip(levels, stack)])
            for stack in energies
        ]

    def _infer(self, levels: np.ndarray, energy: Tensor) -> Tensor:
        """One image (H, W, 3) uint8 and its energies (L, H, W)."""
        from pydensecrf.densecrf import DenseCRF2D

        labels, height, width = energy.shape
        crf = DenseCRF2D(width, height, labels)
        crf.setUnaryEnergy(np.ascontiguousarray(energy.flatten(1).cpu().numpy(), dtype=np.float32))
        if self.gaussian_compat:
            crf.addPairwiseGaussian(sxy=self.gaussian_sigma_xy, compat=self.gaussian_compat)
        if self.bilateral_compat:
            crf.addPairwiseBilateral(
                sxy=self.bilateral_sigma_xy,
                srgb=self.bilateral_sigma_rgb,
                rgbim=np.ascontiguousarray(levels),
                compat=self.bilateral_compat,
            )
        probs = np.array(crf.inference(self.steps), dtype=np.float32)
        return torch.from_numpy(probs).view(labels, height, width).to(energy.device)
