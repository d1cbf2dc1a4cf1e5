import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from utils.image import (
    PALETTE,
    Reading,
    denormalize,
    normalize,
    picture_size,
    read_image,
    read_mask,
    rescale,
    voc_palette,
    write_mask,
)

INDICES = np.array([[0, 1, 20], [255, 5, 0]], dtype=np.uint8)


def test_normalize_and_back():
    image = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    assert normalize(image).dtype == torch.float32 and normalize(image.double()).dtype == torch.float64
    torch.testing.assert_close(denormalize(normalize(image)), image.float(), atol=1e-4, rtol=0)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(normalize(image), (image / 255 - mean) / std)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "1", "I;16"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode, suffix):
    if (mode == "CMYK" and suffix == ".png") or (mode in ("P", "RGBA", "LA", "I;16") and suffix == ".jpg"):
        return
    image = (
        Image.fromarray(np.full((4, 6), 40000, dtype=np.uint16))
        if mode == "I;16"
        else Image.new("L", (6, 4), 255).convert(mode)
    )
    image.save(tmp_path / f"a{suffix}")
    read = read_image(tmp_path / f"a{suffix}")
    assert read.mode == "RGB" and read.size == (6, 4)
    expected = 155 if mode == "I;16" else 255
    assert np.abs(np.asarray(read).astype(int) - expected).max() <= 1


def test_transparent_parts_are_white_and_camera_orientation_is_applied(tmp_path):
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert (np.asarray(read_image(tmp_path / "a.png")) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (4, 8)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n broken", None])
def test_broken_image_is_named(tmp_path, content):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    cut_off = (tmp_path / "a.png").read_bytes()[:900]
    (tmp_path / "a.png").write_bytes(cut_off if content is None else content)
    with pytest.raises(ValueError, match=r"cannot read image .*a\.png"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"cannot read mask .*a\.png"):
        read_mask(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.jpg")


def test_masks_read_back_from_palette_grey_and_voc_colours(tmp_path):
    write_mask(tmp_path / "p.png", INDICES)
    Image.fromarray(INDICES).save(tmp_path / "l.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.mode == "P" and image.getpalette() == voc_palette()
        image.convert("RGB").save(tmp_path / "rgb.png")
    Image.fromarray(INDICES.astype(np.uint16)).save(tmp_path / "u16.png")
    for name in ("p", "l", "rgb", "u16"):
        mask = read_mask(tmp_path / f"{name}.png")
        assert mask.dtype == np.uint8 and (mask == INDICES).all()
    write_mask(tmp_path / "new" / "t.png", torch.from_numpy(INDICES).long())
    assert (read_mask(tmp_path / "new" / "t.png") == INDICES).all()


def test_masks_above_255_are_16_bit_grey(tmp_path):
    mask = np.array([[0, 1, 254, 255], [256, 300, 40000, 65535]])
    write_mask(tmp_path / "wide.png", mask)
    with Image.open(tmp_path / "wide.png") as image:
        assert image.mode == "I;16"
    assert (
        read_mask(tmp_path / "wide.png").dtype == np.int32
        and (read_mask(tmp_path / "wide.png") == mask).all()
    )


def test_rescaled_tensors_are_pictures_that_pillow_rescales():
    pixels = np.random.RandomState(0).randint(0, 256, (12, 17, 3)).astype(np.uint8)
    image = normalize(torch.from_numpy(pixels).permute(2, 0, 1))[None]
    for scale, size in ((0.5, (8, 6)), (1.5, (26, 18)), (2.0, (34, 24))):
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        expected = normalize(torch.from_numpy(np.array(picture)).permute(2, 0, 1))[None]
        torch.testing.assert_close(rescale(image, scale), expected)


def test_foreign_colours_and_values_are_refused(tmp_path):
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "rgb.png")
    with pytest.raises(
        ValueError, match=r"rgb\.png is a colour image .* first \(1, 2, 3\) at row 0, column 0"
    ):
        read_mask(tmp_path / "rgb.png")
    Image.fromarray(np.full((2, 2), 65536, dtype=np.int32)).save(tmp_path / "i32.tif")
    with pytest.raises(ValueError, match=r"i32\.tif .* class indices"):
        read_mask(tmp_path / "i32.tif")
    with pytest.raises(ValueError, match=r"values 0\.\.65535"):
        write_mask(tmp_path / "bad.png", np.full((2, 2), -1))


def test_voc_palette_is_the_published_one():
    colours = list(map(tuple, PALETTE.tolist()))
    assert colours[1] == (128, 0, 0) and colours[15] == (192, 128, 128) and colours[20] == (0, 64, 128)
    assert colours[255] == (224, 224, 192) and len(set(colours)) == 2**16


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize(
    ("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1), (np.float64, 1)]
)
def test_deep_pictures_are_scaled_by_their_type(tmp_path, dtype, white, channels):
    """A dark frame stays darker than a bright one, whatever its own maximum is."""
    for share in (0.002, 0.25, 1.0):
        values = np.full((4, 6, *channels), share * white).astype(dtype)
        tifffile.imwrite(tmp_path / "a.tif", values)
        read = np.asarray(read_image(tmp_path / "a.tif"))
        assert read.shape == (4, 6, 3) and np.abs(read.astype(float) - 255 * share).max() <= 1


def test_a_compressed_grey_tiff_has_the_range_of_its_data_set(tmp_path):
    values = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.tif", compression="tiff_lzw")
    read = np.asarray(read_image(tmp_path / "a.tif", Reading((), (0, 4095))))
    assert (read == (values.astype(int) * 255 // 4095)[..., None]).all()


@pytest.mark.parametrize("layout", ["contig", "separate", None])
def test_bands_and_values_are_those_of_the_data_set(tmp_path, layout):
    """Bands may be interleaved, planes or pages; the scale is the same for a dark and a bright image."""
    for level in (300, 1500):
        values = np.zeros((9, 12, 5), np.uint16)
        values[..., 3], values[:4, :, 1], values[0, 0, 0] = level, 2300, 9000
        stored = np.moveaxis(values, -1, 0) if layout == "separate" else values
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=layout)
        read = np.asarray(read_image(tmp_path / "a.tif", Reading((4, 2, 1), (300, 2300)))).astype(int)
        assert read.shape == (9, 12, 3) and (read[..., 0] == (level - 300) * 255 // 2000).all()
        assert (read[:4, :, 1] == 255).all() and not read[4:, :, 1].any() and read[0, 0, 2] == 255
        assert picture_size(tmp_path / "a.tif", Reading((4, 2, 1))) == (12, 9)
    with pytest.raises(ValueError, match=r"5 bands: .* data\.bands"):
        read_image(tmp_path / "a.tif")
    for wrong in ((1, 2), (0, 1, 2), (1, 2, 6)):
        with pytest.raises(ValueError, match=r"data\.bands"):
            read_image(tmp_path / "a.tif", Reading(wrong))


@pytest.mark.parametrize("values", [np.float32([[0, 200]]), np.float32([[np.nan, 0]]), np.int32([[0, 9]])])
def test_values_without_a_known_white_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="8 bits"):
        read_image(tmp_path / "a.tif")


def test_a_tiff_may_state_its_white(tmp_path):
    picture = Image.fromarray(np.full((2, 2), 4095, np.uint16))
    picture.save(tmp_path / "a.tif", tiffinfo={281: 4095})
    assert (np.asarray(read_image(tmp_path / "a.tif")) == 255).all()


def test_masks_that_programs_have_changed_are_refused(tmp_path):
    mask = np.zeros((40, 50), np.uint8)
    mask[5:20, 5:25], mask[22:35, 20:45] = 15, 255
    renumbered = Image.fromarray(PALETTE[mask]).quantize(3)
    hidden = np.dstack([PALETTE[mask], np.where(mask == 15, 0, 255).astype(np.uint8)])
    grey = Image.fromarray(mask)
    for picture, options, term in (
        (renumbered, {}, "other indices"), (Image.fromarray(hidden), {}, "transparent"),
        (grey, {"format": "JPEG", "quality": 90}, "JPEG"),
    ):  # fmt: skip
        picture.save(tmp_path / "m.png", **options)
        with pytest.raises(ValueError, match=term):
            read_mask(tmp_path / "m.png")


@pytest.mark.parametrize("palette", ["voc", "grey", "own"])
def test_a_palette_of_ones_own_keeps_its_indices(tmp_path, palette):
    mask = np.array([[0, 1, 56], [128, 255, 2]], np.uint8)
    picture = Image.fromarray(mask)
    own = [(37 * k) % 251 for k in range(768)]
    picture.putpalette({"voc": voc_palette(), "grey": np.arange(256).repeat(3).tolist(), "own": own}[palette])
    picture.save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png") == mask).all()
