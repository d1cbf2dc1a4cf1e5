"""DenseCRF parameters of the published programs, all with 10 steps and symmetric normalisation."""


def _weights(gaussian: tuple[float, float], bilateral: tuple[float, float, float]) -> dict[str, float]:
    """Parameters from (sigma xy, weight) and (sigma xy, sigma rgb, weight)."""
    smoothness = dict(zip(("gaussian_sigma_xy", "gaussian_compat"), gaussian))
    appearance = zip(("bilateral_sigma_xy", "bilateral_sigma_rgb", "bilateral_compat"), bilateral)
    return smoothness | dict(appearance)


_FINAL_SEGMENTATION = _weights((1, 1), (121, 5, 4))
_HARD_LABELS = _weights((3, 3), (50, 5, 10))
_SOFT_MASKS = _weights((3, 3), (80, 13, 10))

PRESETS: dict[str, dict[str, float]] = {
    "toco": _FINAL_SEGMENTATION,  # multi-scale logits of the final segmentation, VOC and COCO
    "seco": _FINAL_SEGMENTATION,
    "mcc": _FINAL_SEGMENTATION,
    "toco_pseudo_label": _weights((3, 3), (36, 3, 4)),  # softmax over [threshold plane, CAMs]
    "irn": _HARD_LABELS,  # thresholded CAMs as labels of confidence 0.7; also CDA
    "ws_fcn_label": _HARD_LABELS,
    "psa": _SOFT_MASKS,  # [(1 - largest CAM)^alpha, CAMs]
    "seam": _SOFT_MASKS,
    "one_stage": _SOFT_MASKS,  # predicted masks
    "clip_es": _weights((1, 3), (67, 3, 4)),  # [1 - largest CAM, CAMs]
    "ws_fcn": _weights((3, 3), (30, 13, 10)),
}
