"""Images and masks on disk, and the one normalisation that every network of the project uses.

H, W: pixels. Images are RGB; masks hold class indices (0 background, 255 ignore).
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from utils.device import constant
from utils.files import atomic_file
from utils.logging import warn_once

# ImageNet statistics on the 0..255 scale.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

IGNORE_INDEX = 255  # in masks and labels: the pixel does not count
MAX_CLASS = 2**16 - 1  # the highest index that a mask can hold

NO_FILE = (FileNotFoundError, PermissionError, IsADirectoryError)
_TIFF_WHITE = 0x0119  # MaxSampleValue
_SAVE_AS = "save it as an 8-bit grey or palette PNG whose pixel values are the class indices"


class UnreadableImageError(ValueError):
    """A file is there but holds no image that can be decoded."""


def normalize(image_rgb: Tensor) -> Tensor:
    """Map (..., 3, H, W) RGB values on 0..255, of any dtype, to the float range that the backbones expect."""
    image = image_rgb.clone() if image_rgb.is_floating_point() else image_rgb.to(torch.float32)
    return image.sub_(_channels(IMAGENET_MEAN, image)).div_(_channels(IMAGENET_STD, image))


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return constant(values, like.device, like.dtype)[:, None, None]


def denormalize(image: Tensor) -> Tensor:
    """Undo `normalize`: (..., 3, H, W) on 0..255, neither rounded nor clipped (what is next decides that)."""
    return image * _channels(IMAGENET_STD, image) + _channels(IMAGENET_MEAN, image)


def resize(maps: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Bilinear resize of (B, M, h, w) maps; untouched when the size is right."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    if not maps.numel():  # an image without tags has no map
        return maps.new_zeros(*maps.shape[:2], *size)
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)


def strided_size(size: Sequence[int], stride: int) -> tuple[int, int]:
    """Rows and columns of a map with one pixel for every started ``stride`` pixels of an image (H, W)."""
    return -(-size[0] // stride), -(-size[1] // stride)


def rescale_picture(picture: Image.Image, scale: float, nearest: bool = False) -> Image.Image:
    """The picture with sides ``round(side * scale)``; bicubic, or nearest for labels."""
    width, height = (max(round(side * scale), 1) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC)


def rescale(image: Tensor, scale: float) -> Tensor:
    """Normalised images (B, 3, H, W) at another scale, by `rescale_picture`.

    Bicubic and antialiased on whole grey levels: what the programs of PSA, IRN, SEAM, 1-stage-wseg and WS-FCN
    do with every scale of an image. Done by Pillow itself: torchvision's kernel for tensors rounds one pixel
    in a hundred to another grey level.
    """
    pixels = denormalize(image.float()).round().clamp(0, 255).to(torch.uint8).cpu()
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]
    arrays = [np.array(rescale_picture(picture, scale)) for picture in pictures]
    resized = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return normalize(resized.to(image.device)).to(image.dtype)


@dataclass(frozen=True)
class Reading:
    """How deep and multi-band pictures become RGB, the same for every image of a data set.

    Args:
        bands: the three that are red, green and blue, or the one that is grey, counted from 1; (): all.
        value_range: values of the file that become 0 and 255, further ones are cut; None: those of the type.
    """

    bands: tuple[int, ...] = ()
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if len(self.bands) not in (0, 1, 3) or min(self.bands, default=1) < 1:
            raise ValueError(f"data.bands={list(self.bands)}: name three bands or one, counted from 1")
        if self.value_range and self.value_range[0] >= self.value_range[1]:
            raise ValueError(f"data.value_range={list(self.value_range)} must be ascending")


AS_TYPED = Reading()


def read_image(path: str | Path, reading: Reading = AS_TYPED) -> Image.Image:
    """Read any picture that Pillow knows, and TIFF of any kind, as RGB.

    Transparent parts become white, and a camera's EXIF orientation is applied. Deeper pictures are scaled by
    ``reading``, or by their type: 16 bits from 0..65535 (or the largest value that a TIFF states), floats
    from 0..1.

    Raises:
        UnreadableImageError: the file is damaged, no image, or has other values or bands than those.
    """
    try:
        if reading != AS_TYPED:
            return _eight_bits(path, read_bands(path), None, reading)
        with Image.open(path) as image:
            if is_tiff(path) and getattr(image, "n_frames", 1) > 1:  # bands as pages, or smaller versions
                return _eight_bits(path, read_bands(path))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F" or image.mode.startswith("I"):
                return _eight_bits(path, np.asarray(image)[..., None], image.getexif().get(_TIFF_WHITE))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except NO_FILE:
        raise
    except Exception as error:
        # Decoders raise whatever the damage makes them trip over (OSError, SyntaxError, struct.error, ...).
        try:
            if isinstance(error, UnidentifiedImageError) and is_tiff(path):
                return _eight_bits(path, read_bands(path))  # Pillow does not know such colours
        except Exception as other:
            error = other
        raise UnreadableImageError(f"cannot read image {path}: {error}") from error


def picture_size(path: str | Path, reading: Reading = AS_TYPED) -> tuple[int, int]:
    """Width and height of a picture as `read_image` gives it; only the head of the file is read."""
    try:
        with Image.open(path) as image:
            if reading == AS_TYPED or not is_tiff(path):
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
                return (image.height, image.width) if turned else image.size
    except UnidentifiedImageError:
        if not is_tiff(path):
            raise UnreadableImageError(f"cannot read image {path}: it is of no known format") from None
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        rows, columns = _sides(series)
        return series.shape[columns], series.shape[rows]


def is_tiff(path: str | Path) -> bool:
    """Whether a file has the suffix of a TIFF."""
    return Path(path).suffix.lower() in (".tif", ".tiff")


def read_bands(path: str | Path) -> np.ndarray:
    """The values (H, W, N) of the bands of a picture, as its file has them."""
    with suppress(UnidentifiedImageError), Image.open(path) as image:
        is_grey = image.mode in ("L", "F") or image.mode.startswith("I")
        # Pillow makes 8 bits of deep colours, but decompresses more kinds of grey TIFF.
        if not is_tiff(path) or (is_grey and getattr(image, "n_frames", 1) == 1):
            turned = ImageOps.exif_transpose(image)
            values = np.asarray(turned.convert("RGB") if image.mode == "P" else turned)
            return values.reshape(*values.shape[:2], -1)
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        if series.size > 6 * (Image.MAX_IMAGE_PIXELS or np.inf):
            raise ValueError(f"{series.size} values are more than a photo has")
        values = np.moveaxis(series.asarray(), _sides(series), (0, 1))
    return values.reshape(*values.shape[:2], -1)


def _sides(series: Any) -> tuple[int, int]:
    """The axes of rows and columns of a TIFF. Bands may be the first axis, the last one, or pages."""
    if len(series.shape) == 3 and not set(series.axes) & set("SC"):
        # Programs that write an array page by page may slice it the wrong way; images have few bands.
        rows, columns = sorted(range(3), key=lambda axis: -series.shape[axis])[:2]
        return min(rows, columns), max(rows, columns)
    return series.axes.index("Y"), series.axes.index("X")


def _eight_bits(
    path: str | Path, values: np.ndarray, white: int | None = None, reading: Reading = AS_TYPED
) -> Image.Image:
    """The RGB picture of (H, W, N) values, scaled by what is known of all images, not by these values."""
    kind, bits, count = values.dtype.kind, 8 * values.dtype.itemsize, values.shape[2]
    if max(reading.bands, default=0) > count:
        raise ValueError(f"it has {count} bands, so data.bands={list(reading.bands)} are not all there")
    if reading.bands:
        values = values[..., [band - 1 for band in reading.bands]]
    if values.shape[2] not in (1, 3):
        raise ValueError(f"it has {count} bands: name red, green and blue, such as data.bands=[1,2,3]")
    if kind == "i" and values.max(initial=0) > 255:
        bits = 16  # Pillow widens some 16-bit files
    top = white or (1 if kind == "f" else {"u8": 255, "u16": 65535, "i16": 65535}.get(f"{kind}{bits}", 0))
    low, high = reading.value_range or (0, top)
    lowest, highest = values.min(initial=low), values.max(initial=low)
    if not reading.value_range and not (top and 0 <= lowest <= highest <= top):
        raise ValueError(
            f"{values.dtype} values from {lowest} to {highest}: set data.value_range or save 8 bits"
        )
    if np.isnan(highest):
        raise ValueError("some values are NaN: set them to a number")
    if not reading.value_range and (kind == "f" or bits > 8):
        depth = "floats" if kind == "f" else f"{bits} bits"
        scale = f"{low:g} to {high:g} (data.value_range)"
        warn_once(f"pictures of {depth} are read as {scale}", f", first {path}")
    # Whole numbers are cut, floats are rounded.
    scaled = (values.astype(np.float64) - low) / ((high - low) / 255) + (0.5 if kind == "f" else 0)
    scaled = scaled.clip(0, 255).astype(np.uint8)
    return Image.fromarray(scaled if scaled.shape[2] == 3 else scaled[..., 0]).convert("RGB")


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask as an (H, W) array of class indices: uint8, or int32 if one is above 255.

    Palette and grey pictures hold the indices themselves; colour pictures hold colours of the VOC palette.

    Raises:
        UnreadableImageError: the file is damaged.
        ValueError: a JPEG; a palette with VOC's colours at other indices; a colour picture with other colours
            or transparent parts; values above 65535.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except NO_FILE:
        raise
    except Exception as error:
        raise UnreadableImageError(f"cannot read mask {path}: {error}") from error
    if image.format in ("JPEG", "MPO"):
        raise ValueError(f"mask {path} is a JPEG, which changes class indices: save the original as PNG")
    if image.mode == "P":
        return _checked_palette(image, path)
    if image.mode in ("L", "1"):
        return np.array(image, dtype=np.uint8)
    if image.mode == "RGBA" and image.getextrema()[3][0] < 255:
        raise ValueError(f"mask {path} has transparent parts, which may hide colours: save it without them")
    if image.mode in ("RGB", "RGBA"):
        rgb = np.asarray(image.convert("RGB"))
        indices = _voc_indices(rgb)
        if len(foreign := np.argwhere(indices < 0)):
            y, x = foreign[0]
            raise ValueError(
                f"mask {path} is a colour image and {len(foreign)} of its pixels are not of the VOC palette, "
                f"first {tuple(rgb[y, x].tolist())} at row {y}, column {x}: {_SAVE_AS}"
            )
        return indices.astype(np.uint8)
    values = np.asarray(image)
    if values.ndim != 2 or values.min(initial=0) < 0 or values.max(initial=0) > MAX_CLASS:
        raise ValueError(f"mask {path} (Pillow mode {image.mode}) does not contain class indices: {_SAVE_AS}")
    return values.astype(np.uint8 if values.max(initial=0) <= 255 else np.int32)


def _checked_palette(image: Image.Image, path: str | Path) -> np.ndarray:
    """The indices of a palette picture, unless a program has put VOC's colours at other indices."""
    indices = np.array(image, dtype=np.uint8)
    used = np.unique(indices)
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    if used[-1:] < len(palette):
        colours = palette[used]
        meant = _voc_indices(colours)
        is_grey = (colours == used[:, None]).all()
        if (meant >= 0).all() and (meant != used).any() and not is_grey:
            wrong = int((meant != used).argmax())
            raise ValueError(
                f"mask {path} has VOC's colours at other indices (class {meant[wrong]} at {used[wrong]}): a "
                f"program has renumbered it; {_SAVE_AS}"
            )
    return indices


def _voc_indices(rgb: np.ndarray) -> np.ndarray:
    """Index of each colour (..., 3) in the VOC palette, -1 for other colours."""
    bits = (((rgb[..., bit % 3] >> 7 - bit // 3) & 1) << bit for bit in range(8))
    index = reduce(np.bitwise_or, bits)
    return np.where((PALETTE[index] == rgb).all(-1), index.astype(int), -1)


def label_dtype(num_classes: int) -> torch.dtype:
    """Of labels of ``num_classes`` with background: bytes where they suffice."""
    return torch.uint8 if num_classes <= IGNORE_INDEX else torch.int32


def write_mask(path: str | Path, mask: np.ndarray | Tensor) -> None:
    """Write (H, W) class indices as a PNG; a reader never sees half a file.

    It has the VOC palette, unless an index is above 255: then it is 16-bit grey.
    """
    mask = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    if mask.ndim != 2 or mask.min(initial=0) < 0 or mask.max(initial=0) > MAX_CLASS:
        raise ValueError(
            f"cannot write {path}: a mask is (H, W) with values 0..{MAX_CLASS}, not {mask.shape} {mask.dtype}"
        )
    if mask.max(initial=0) > 255:
        image = Image.fromarray(mask.astype(np.uint16))
    else:
        image = Image.fromarray(mask.astype(np.uint8))
        image.putpalette(voc_palette())
    with atomic_file(Path(path)) as file:
        image.save(file, format="PNG")


# Of VOC and on, (65536, 3): a class index deals its bits to red, green and blue in turn, highest first.
PALETTE = np.zeros((MAX_CLASS + 1, 3), np.uint8)
for _bit in range(16):
    PALETTE[:, _bit % 3] |= ((np.arange(MAX_CLASS + 1) >> _bit & 1) << 7 - _bit // 3).astype(np.uint8)


def voc_palette() -> list[int]:
    """The 256 colours of the PASCAL VOC palette, flat: r, g, b, r, g, b, ..."""
    return PALETTE[:256].flatten().tolist()
