"""JPEGs by simplejpeg against Pillow: the same pixels, bit for bit, or Pillow's own."""

from __future__ import annotations

from io import BytesIO
from itertools import product

import numpy as np
import pytest
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


def test_what_it_does_not_take_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    file = BytesIO()
    Image.new("RGB", (40, 30), (200, 100, 50)).save(file, "JPEG")
    whole = file.getvalue()
    by_both = [decode(BytesIO(whole + b"more"), CENTRE, (3, 8, 8))]
    with pytest.raises(BadSampleError, match=r"(?i)truncated"):
        decode(BytesIO(whole[: len(whole) // 2 + 200]), CENTRE, (3, 8, 8))
    monkeypatch.setattr(jpeg, "_decoder", lambda: None)
    by_both.append(decode(BytesIO(whole + b"more"), CENTRE, (3, 8, 8)))
    assert np.array_equal(*by_both) and "Pillow" in jpeg.decoder_name()
    assert not jpeg._agrees(lambda *_, **__: np.zeros((48, 80, 3), np.uint8), "RGB", 1)
