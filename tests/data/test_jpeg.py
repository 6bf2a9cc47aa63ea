"""JPEGs by simplejpeg against Pillow: the same pixels, bit for bit, or Pillow's own."""

from __future__ import annotations

from io import BytesIO
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data import jpeg
from data.decode import CENTRE, decode
from data.errors import BadSampleError
from data.textures import photographs

pytest.importorskip("simplejpeg")


def test_its_pixels_are_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs at every scale, with and without colours at half the resolution, progressive, grey, of odd sizes."""
    assert jpeg._decoder() is not None and "simplejpeg" in jpeg.decoder_name()
    seen = 0
    for number, (mode, sampling, progressive) in enumerate(product(("RGB", "L"), (0, 1, 2), (False, True))):
        file = BytesIO()
        with Image.open(photographs()[number]) as photograph:
            side = (313 + number, 211 + 2 * number)
            photograph.convert(mode).resize(side).save(
                file, "JPEG", quality=88, subsampling=sampling, progressive=progressive
            )
        for scale, wanted in product((1, 2, 4, 8), ("RGB", "L")):
            with Image.open(file) as image:
                image.draft(wanted, (image.width // scale, image.height // scale))
                found = jpeg.decoded(image, file.getvalue())
                assert found is not None and np.array_equal(found, np.asarray(image))
                seen += 1
    assert seen == 96


def test_parts_are_pillows() -> None:
    """Boxes of photographs at every scale, of all samplings of colours, progressive, with restarts, grey."""
    if jpeg._library() is None:
        pytest.skip("the native module is not built, or Pillow has another libjpeg")
    assert "in parts" in jpeg.decoder_name()
    random, seen = np.random.default_rng(0), 0
    kinds = product(("RGB", "L"), ("4:4:4", "4:2:2", "4:2:0", "4:1:1"), (False, True))
    for number, (mode, sampling, progressive) in enumerate(kinds):
        file = BytesIO()
        with Image.open(photographs()[number % 12]) as photograph:
            small = photograph.convert(mode).resize((313 + number, 211 + 2 * number))
        restarts = number % 3
        small.save(file, "JPEG", subsampling=sampling, progressive=progressive, restart_marker_rows=restarts)
        for scale, wanted, _ in product((1, 2, 4, 8), ("RGB", "L"), range(3)):
            with Image.open(file) as image:
                image.draft(wanted, (image.width // scale, image.height // scale))
                top, left = int(random.integers(image.height)), int(random.integers(image.width))
                bottom, right = int(random.integers(top, image.height)) + 1, int(random.integers(left, image.width)) + 1
                found = jpeg.decoded_part(image, file.getvalue(), (top, bottom, left, right))
                assert found is not None and np.array_equal(found, np.asarray(image)[top:bottom, left:right])
                seen += 1
    assert seen == 384


def test_damaged_files_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a file is damaged its pixels are Pillow's; cut short or with a wrong segment it is bad for any crop."""
    file = BytesIO()
    with Image.open(photographs()[0]) as photograph:
        photograph.convert("RGB").resize((320, 240)).save(file, "JPEG", quality=90)
    good = file.getvalue()
    middle = len(good) // 2
    damaged = [good[:middle] + b"\xff\xd9" * 3 + good[middle + 6 :], good[:middle] + bytes(40) + good[middle + 40 :]]
    crops = [np.array([0.1, 1.0, 0.2, down]) for down in (0.0, 1.0)]

    def pixels() -> list[NDArray[np.float32]]:
        return [decode(BytesIO(content), crop, (3, 40, 40)) for content in (good, *damaged) for crop in crops]

    def are_bad() -> None:
        for crop, end in product(crops, (b"", b"\xff", b"\xff\xc4\0\0" + good[middle:])):
            with pytest.raises(BadSampleError, match=r"(?i)truncated|broken data"):
                decode(BytesIO(good[:middle] + end), crop, (3, 40, 40))

    in_parts = pixels()
    are_bad()
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    assert all(np.array_equal(*pair) for pair in zip(in_parts, pixels(), strict=True))
    are_bad()


def test_missing_scans_are_made_up_of_whole_images() -> None:
    """Blocks of progressive files are smoothed by their neighbours where scans are missing: parts have not all."""
    if jpeg._library() is None:
        pytest.skip("the native module is not built, or Pillow has another libjpeg")
    file = BytesIO()
    with Image.open(photographs()[0]) as photograph:
        photograph.convert("L").resize((160, 120)).save(file, "JPEG", progressive=True)
    good, start = file.getvalue(), b"\xff\xda"
    first = start.join(good.split(start)[:3]) + b"\xff\xd9"
    edges = (0, 60, 66, 120)
    with Image.open(BytesIO(good)) as image:
        assert jpeg.decoded_part(image, good, edges) is not None
    with Image.open(BytesIO(first)) as image:
        assert jpeg.decoded_part(image, first, edges) is None


def test_what_it_does_not_take_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    file = BytesIO()
    Image.new("RGB", (40, 30), (200, 100, 50)).save(file, "JPEG")
    whole = file.getvalue()
    by_both = [decode(BytesIO(whole + b"more"), CENTRE, (3, 8, 8))]
    with pytest.raises(BadSampleError, match=r"(?i)truncated"):
        decode(BytesIO(whole[: len(whole) // 2 + 200]), CENTRE, (3, 8, 8))
    monkeypatch.setattr(jpeg, "_decoder", lambda: None)
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    by_both.append(decode(BytesIO(whole + b"more"), CENTRE, (3, 8, 8)))
    assert np.array_equal(*by_both) and "Pillow" in jpeg.decoder_name()
    assert not jpeg._agrees(lambda *_, **__: np.zeros((48, 80, 3), np.uint8), "RGB", 1)
