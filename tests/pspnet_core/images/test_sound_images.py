"""Each sort of file in ``tests/support/sound_images.py`` has the pixels that viewers show, or its true kind."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pspnet_core.errors import ImageError
from pspnet_core.images.decoding import decode_image, decode_views, open_image, picture_to_array
from tests.support.sound_images import SOUND, Pixels, Sound

pytestmark = pytest.mark.filterwarnings("ignore")  # which the product does, too


def _pixels(decode: Callable[[bytes], Pixels], sound: Sound) -> None:
    """Check what a decoder makes of a file."""
    if sound.pixels is None:
        with pytest.raises(ImageError) as caught:
            decode(sound.data)
        assert caught.value.kind == sound.kind, caught.value
        return
    found = decode(sound.data)
    assert found.shape == sound.pixels.shape
    assert np.abs(found.astype(int) - sound.pixels).max() <= sound.within


DECODERS: dict[str, Callable[[bytes], Pixels]] = {
    "at once": decode_image,
    "opened before": lambda data: decode_image(open_image(data)),
    "as a view": lambda data: decode_views(data, lambda height, width: [(height, width)]).views[0],
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sort_of_file(name: str) -> None:
    sound = SOUND[name]()
    for decode in DECODERS.values():
        _pixels(decode, sound)


@pytest.mark.parametrize("name", [name for name in SOUND if name.startswith(("tif", "other bmp"))])
def test_pictures_that_pillow_has_opened_become_the_same(name: str) -> None:
    sound = SOUND[name]()
    if sound.pixels is not None and name != "tif orientation as byte":
        _pixels(lambda data: picture_to_array(Image.open(io.BytesIO(data))), sound)


@pytest.mark.parametrize("name", [name for name in SOUND if name.startswith("jpg no end")])
def test_a_small_view_needs_no_end_either(name: str) -> None:
    sound = SOUND[name]()
    assert sound.pixels is not None
    height, width, _ = sound.pixels.shape
    found = decode_views(sound.data, lambda height, width: [(5, 6)])
    assert (found.height, found.width, found.views[0].shape) == (height, width, (5, 6, 3))
