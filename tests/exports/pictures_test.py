"""Pictures are read as viewers show them: rotated, in colour, complete; others are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from geode_jax.exports import pictures
from geode_jax.exports.files import UserError

FLAG = 0x0112
SHOWN = np.zeros((12, 20, 3), np.uint8)
"""Red at the upper left, green at the upper right, blue at the lower left, the rest white."""
SHOWN[:6, :10], SHOWN[:6, 10:], SHOWN[6:, :10], SHOWN[6:, 10:] = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
)


def encoded(image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def flagged(array: np.ndarray, flag: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[FLAG] = flag
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    return encoded(array, kind, exif=exif, **options)


def read(data: bytes) -> np.ndarray:
    return np.asarray(pictures.read_picture(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("flag", range(1, 9))
def test_a_picture_is_turned_as_its_flag_says(tmp_path, kind, flag):
    # Rows and columns of the stored picture for each flag, as in the EXIF standard.
    stored = {
        1: SHOWN,
        2: SHOWN[:, ::-1],
        3: SHOWN[::-1, ::-1],
        4: SHOWN[::-1],
        5: SHOWN.swapaxes(0, 1),
        6: SHOWN.swapaxes(0, 1)[::-1],
        7: SHOWN[::-1, ::-1].swapaxes(0, 1),
        8: SHOWN.swapaxes(0, 1)[:, ::-1],
    }[flag]
    data = flagged(np.ascontiguousarray(stored), flag, kind)
    found = read(data)
    assert found.shape == SHOWN.shape
    # Away from the edges, where JPEG is exact to a few values.
    near = np.abs(found.astype(int) - SHOWN)[2:5, 2:8], np.abs(found.astype(int) - SHOWN)[8:, 12:]
    assert max(part.max() for part in near) < 4
    theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(found, np.asarray(theirs))
    path = tmp_path / "a.JPG"
    path.write_bytes(data)
    assert pictures.shown_size(path) == (20, 12) == pictures.read_picture(path).size


def test_flags_that_mean_nothing_turn_nothing():
    for flag in (0, 9, 65535):
        np.testing.assert_array_equal(read(flagged(SHOWN, flag, "PNG")), SHOWN)
    data = flagged(SHOWN, 6, "JPEG")
    broken = data.replace(b"Exif\0\0MM\0*", b"Exif\0\0\xff\xff\xff\xff").replace(
        b"Exif\0\0II*\0", b"Exif\0\0\xff\xff\xff\xff"
    )
    assert broken != data and read(broken).shape == SHOWN.shape


def _alpha(mode: str) -> Image.Image:
    image = Image.fromarray(SHOWN).convert("L" if mode == "LA" else "RGB").convert(mode)
    image.putalpha(
        Image.fromarray(
            np.where(np.arange(20) < 10, 255, 0).astype(np.uint8) * np.ones((12, 1), np.uint8)
        )
    )
    return image


def test_every_mode_becomes_what_is_shown():
    grey = np.asarray(Image.fromarray(SHOWN).convert("L"))
    half = SHOWN.copy()
    half[:, 10:] = 255  # transparent becomes white
    palette = Image.fromarray(SHOWN).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    np.testing.assert_array_equal(read(encoded(palette)), SHOWN)
    np.testing.assert_array_equal(read(encoded(palette, "GIF")), SHOWN)
    np.testing.assert_array_equal(read(encoded(_alpha("RGBA"))), half)
    np.testing.assert_array_equal(read(encoded(_alpha("RGBA"), "WEBP", lossless=True)), half)
    wanted = np.where(np.arange(20)[:, None] < 10, np.repeat(grey[..., None], 3, -1), 255)
    np.testing.assert_array_equal(read(encoded(_alpha("LA"))), wanted)
    np.testing.assert_array_equal(read(encoded(grey)), np.repeat(grey[..., None], 3, -1))
    index = palette.getpixel((15, 2))  # of green
    found = read(encoded(palette, transparency=index))
    assert (found[:6, 10:] == 255).all() and (found[:6, :10] == SHOWN[:6, :10]).all()
    found = read(encoded(SHOWN, transparency=(0, 0, 255)))  # a colour declared transparent
    assert (found[6:] == 255).all() and (found[:6] == SHOWN[:6]).all()
    bits = Image.fromarray(grey > 100)
    assert bits.mode == "1"
    np.testing.assert_array_equal(read(encoded(bits))[..., 0], np.where(grey > 100, 255, 0))
    cmyk = read(encoded(Image.fromarray(SHOWN).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(cmyk.astype(int) - SHOWN)[2:5, 2:8].max() < 4


def test_sixteen_bits_are_the_higher_byte():
    ramp = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    np.testing.assert_array_equal(read(encoded(ramp))[..., 1], ramp >> 8)
    np.testing.assert_array_equal(read(encoded(ramp, "PPM"))[..., 1], ramp >> 8)
    clear = int(ramp[3, 4])  # only this value is transparent, not others with the same higher byte
    shown = np.where(ramp == clear, 255, ramp >> 8)
    np.testing.assert_array_equal(read(encoded(ramp, transparency=clear))[..., 1], shown)
    # A PNG of 16 bits a channel, which Pillow itself does not write.
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in ramp)

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", 20, 12, 16, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(read(png)[..., 2], ramp >> 8)


def test_of_several_pictures_the_first_is_taken():
    frames = [Image.fromarray(np.full((4, 4, 3), n, np.uint8)) for n in (10, 200)]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("MPO", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.abs(read(data).astype(int) - 10).max() < 3


def bomb() -> bytes:
    data = bytearray(encoded(SHOWN))
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reader", [pictures.read_picture, pictures.read_depth])
def test_what_is_no_picture_is_one_line(tmp_path, reader, monkeypatch):
    depth = np.arange(240, dtype=np.uint16).reshape(12, 20)
    whole = encoded(depth if reader is pictures.read_depth else SHOWN)
    path = tmp_path / "a.png"
    for data, rule in (
        (b"", "none of"),
        (b"text", "none of"),
        (b"P6 9 ", "picture: "),
        (whole[:60], "picture: "),
        (whole[: len(whole) // 2], "picture: "),
        (bomb(), "more than 134,217,728 pixels"),
        (b"<svg/>", "none of"),
        (encoded(SHOWN, "TIFF"), "none of"),
    ):
        path.write_bytes(data)
        with pytest.raises(pictures.PictureError, match=rule) as caught:
            reader(path)
        assert str(caught.value).startswith(f"{path}: no ") and str(caught.value).isprintable()
    for name in ("nowhere.png", "."):
        with pytest.raises(UserError, match="cannot be read"):
            reader(tmp_path / name)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 239)
    with pytest.raises(pictures.PictureError, match="more than 239 pixels"):
        reader(whole)


def test_jpegs_that_are_cut_off_are_refused():
    data = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG")
    for size in (len(data) // 4, len(data) // 2, len(data) - 200):
        with pytest.raises(pictures.PictureError, match="no picture"):
            pictures.read_picture(data[:size])


def test_depth_is_what_is_stored():
    depth = np.array([[0, 1, 700], [1000, 40_000, 65535]], np.uint16)
    np.testing.assert_array_equal(pictures.read_depth(encoded(depth)), depth)
    np.testing.assert_array_equal(pictures.read_depth(encoded(depth, "PPM")), depth)
    # The header of a PGM has the largest value; Pillow scales values by it.
    small = np.minimum(depth, 1000)
    for head in (b"P5 3 2 1000\n", b"P5\n# made by hand 9 9\n3 2\n# most\n1000\n"):
        np.testing.assert_array_equal(
            pictures.read_depth(head + small.astype(">u2").tobytes()), small
        )
    with pytest.raises(pictures.PictureError, match="numbers of its header, such"):
        pictures.read_depth(b"P5 3 2 1000#c\n" + small.astype(">u2").tobytes())
    with pytest.raises(pictures.PictureError, match="with a header that is no PGM file's"):
        pictures.read_depth(
            b"P5\n#" + b"c" * 5000 + b"\n3 2 1000\n" + small.astype(">u2").tobytes()
        )
    for flag in (2, 3, 6):
        with pytest.raises(pictures.PictureError, match="with an orientation flag"):
            pictures.read_depth(flagged(depth, flag, "PNG"))
    for image in (depth.astype(np.uint8), np.zeros((2, 3, 3), np.uint8)):
        with pytest.raises(pictures.PictureError, match="not 16 bit"):
            pictures.read_depth(encoded(image))
