"""Files of all kinds against their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from data import UnreadableImageError
from data.decode import decode

WHOLE = np.array([1.0, 1.0, 0.5, 0.5])
Pixels = NDArray[np.float32]


def pixels_of(file: Path, shape: tuple[int, int, int], crop: NDArray[np.float64] = WHOLE) -> Pixels:
    pixels = decode(str(file), crop, shape)
    assert pixels.shape == shape and pixels.dtype == np.float32
    return pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_grey_of_16_bits_keeps_its_values(tmp_path: Path, channels: int, suffix: str, order: str) -> None:
    ramp = np.linspace(0, 65535, 8 * 12).reshape(8, 12).round()
    file = tmp_path / f"x.{suffix}"
    Image.fromarray(ramp.astype(order)).save(file)
    expected = np.broadcast_to(ramp / 65535, (channels, 8, 12))
    np.testing.assert_allclose(pixels_of(file, (channels, 8, 12)), expected, atol=1e-6)
    Image.fromarray(np.full((20, 30), round(0.265 * 65535), dtype=order)).save(file)
    assert abs(pixels_of(file, (channels, 8, 12)).mean() - 0.265) < 1e-5


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    """A picture stored in each of the eight ways: the same pixels, large enough that JPEG decodes a reduced size."""
    y, x = np.mgrid[0:128, 0:192]
    picture = Image.fromarray(np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8))
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # shown after a turn by 270 degrees
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture.transpose(back[orientation]) if orientation in back else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"x.{suffix}"
    stored.save(file, exif=exif, **({"quality": 98} if suffix in ("jpg", "webp") else {}))
    crop = np.array([0.25, 1.0, 1.0, 0.0])  # the top right quarter
    box = picture.resize((12, 8), Image.Resampling.BILINEAR, box=(96, 0, 192, 64))
    expected = np.asarray(box).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(pixels_of(file, (3, 8, 12), crop), expected, atol=0.02)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm"])
def test_the_first_frame_of_every_format(tmp_path: Path, suffix: str) -> None:
    grey = Image.fromarray(np.full((16, 16), 100, dtype=np.uint8))
    file = tmp_path / f"x.{suffix}"
    more = {"save_all": True, "append_images": [Image.new("L", (16, 16), 200)]} if suffix in ("gif", "tiff") else {}
    grey.save(file, **more)
    np.testing.assert_allclose(pixels_of(file, (3, 8, 8)), 100 / 255, atol=0.01)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_orientation_turns_nothing(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((16, 24), 100, dtype=np.uint8))
    for i, exif in enumerate((b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0")):
        file = tmp_path / f"{i}.jpg"
        grey.save(file, exif=exif)
        np.testing.assert_allclose(pixels_of(file, (1, 8, 12)), 100 / 255, atol=0.01)


def test_what_cannot_be_decoded_is_told_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    Image.new("L", (64, 64)).save(file)
    whole = file.read_bytes()
    deep = Image.fromarray(np.ones((8, 8), dtype=np.float32))
    for content in (b"", b"text\nof two lines", whole[:60], whole[:20]):
        file.write_bytes(content)
        with pytest.raises(UnreadableImageError, match=r"x\.png cannot be decoded \(.*\): replace or remove") as caught:
            pixels_of(file, (1, 8, 8))
        assert "\n" not in str(caught.value)
    deep.save(tmp_path / "x.tif", tiffinfo=TiffImagePlugin.ImageFileDirectory_v2())
    with pytest.raises(UnreadableImageError, match=r"nobody says what is white"):
        pixels_of(tmp_path / "x.tif", (1, 8, 8))
    with pytest.raises(UnreadableImageError, match=r"No such file"):
        pixels_of(tmp_path / "gone.png", (1, 8, 8))


def test_every_mode_has_its_colours(tmp_path: Path) -> None:
    """Palettes, transparency, CMYK, two levels, grey with transparency: as an RGB image of the same colours."""
    y, x = np.mgrid[0:32, 0:48]
    colours = np.stack([8 * y, 5 * x, 128 + 0 * x], axis=-1).astype(np.uint8)
    picture, alpha = Image.fromarray(colours), Image.fromarray((4 * x).astype(np.uint8))
    shown = {
        "rgba.png": Image.merge("RGBA", (*picture.split(), alpha)),
        "la.png": Image.merge("LA", (picture.split()[0], alpha)),
        "palette.png": picture.quantize(64),
        "palette.gif": picture.quantize(64),
        "cmyk.jpg": picture.convert("CMYK"),
        "cmyk.tif": picture.convert("CMYK"),
        "levels.png": picture.split()[0].point(lambda value: 255 * (value > 127)).convert("1"),
    }
    for name, image in shown.items():
        image.save(tmp_path / name, **({"quality": 98, "subsampling": 0} if name.endswith("jpg") else {}))
        expected = picture if name.startswith(("rgba", "cmyk")) else image.convert("RGB")
        pixels = pixels_of(tmp_path / name, (3, 32, 48))
        np.testing.assert_allclose(pixels, np.asarray(expected).transpose(2, 0, 1) / 255, atol=0.03, err_msg=name)
    ramp = np.linspace(0, 65535, 32 * 48).astype(">u2")
    (tmp_path / "deep.pgm").write_bytes(b"P5 48 32 65535\n" + ramp.tobytes())
    found = pixels_of(tmp_path / "deep.pgm", (1, 32, 48))[0]
    np.testing.assert_allclose(found, ramp.reshape(32, 48) / 65535, atol=1e-6)
