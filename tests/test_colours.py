"""What a picture's numbers mean: profiles, PNG's chunks, EXIF, deep data, files that lack their end."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms

from maskgit import images
from maskgit.editing import photos
from maskgit.errors import ImageError
from maskgit.foundation.notes import PictureWarning, listening
from maskgit.images import profiles
from pictures import encoded, noise

P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290))
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), (0.3127, 0.3290))


def to_xyz(primaries):
    """RGB → XYZ, relative to the space's own white, by the definition of chromaticity."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


def linear(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def curved(values):
    values = values.clip(0, 1)
    return np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055)


def as_srgb(array, primaries, decode=linear):
    """What numbers of a space look like, as sRGB in [0, 255], by closed formulas (IEC 61966-2-1)."""
    light = decode(array / 255) @ to_xyz(primaries).T
    return 255 * curved(light @ np.linalg.inv(to_xyz(SRGB)).T)


def inner(height, width, seed=0):
    """Colours of little saturation, which lie in every space."""
    return 90 + noise(height, width, seed=seed) // 4


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunks(data, *chunks):
    """A PNG with chunks right after its header, which has 33 bytes."""
    return data[:33] + b"".join(chunk(name, body) for name, body in chunks) + data[33:]


def deep_png(array, *chunks):
    """A PNG of 16 bits a channel."""
    array = array.reshape(*array.shape[:2], -1)
    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    made = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    return with_chunks(made + chunk(b"IEND", b""), *chunks)


def said(call):
    """Return a call's result, and the notes made meanwhile."""
    notes = []
    with listening(notes.append):
        return call(), notes


def read(data):
    return np.asarray(images.read_image(data)).astype(int)


def p3_profile():
    return profiles.matrix_profile(P3, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))


# Reading


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_a_profile_is_applied_for_the_model(kind):
    array = inner(8, 9) if kind != "JPEG" else np.full((16, 16, 3), (180, 120, 90), np.uint8)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    data = encoded(Image.fromarray(array), kind, icc_profile=p3_profile(), **options)
    assert np.abs(read(data) - as_srgb(array, P3)).max() <= 1.5
    # A Display-P3 photo that is read as sRGB is wrong by far more than that.
    assert np.abs(as_srgb(array, P3) - array).max() > 10


def test_a_pictures_own_profile_is_applied_in_memory_too():
    array = inner(8, 9)
    image = Image.fromarray(array)
    image.info["icc_profile"] = p3_profile()
    seen = (images.to_tensor(image)[0].movedim(0, -1) * 255).numpy()
    assert np.abs(seen - as_srgb(array, P3)).max() <= 1.5


def test_what_is_srgb_keeps_its_bytes():
    array = noise(9, 7)
    for profile in (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        profiles.matrix_profile(SRGB, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)),
    ):
        assert np.array_equal(read(encoded(Image.fromarray(array), icc_profile=profile)), array)


@pytest.mark.parametrize(
    ("chunks", "primaries", "decode"),
    [
        ([(b"gAMA", struct.pack(">I", 100_000))], SRGB, lambda v: v),
        ([(b"gAMA", struct.pack(">I", 55_556))], SRGB, lambda v: v**1.8),
        ([(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))], P3, linear),
        ([(b"cICP", bytes([12, 13, 0, 1]))], P3, linear),
        # The first of these that is there counts.
        ([(b"cICP", bytes([12, 13, 0, 1])), (b"gAMA", struct.pack(">I", 100_000))], P3, linear),
        ([(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100_000))], SRGB, linear),
        # A gamma that stands for sRGB's curve, as most programs write it.
        ([(b"gAMA", struct.pack(">I", 45_455))], SRGB, linear),
    ],
)
def test_the_colour_chunks_of_png(chunks, primaries, decode):
    array = inner(6, 5)
    data = with_chunks(encoded(Image.fromarray(array)), *chunks)
    assert np.abs(read(data) - as_srgb(array, primaries, decode)).max() <= 1.5
    grey = with_chunks(encoded(Image.fromarray(array[..., 0])), *chunks)
    level = np.repeat(array[..., :1], 3, 2)
    assert np.abs(read(grey) - as_srgb(level, primaries, decode)).max() <= 1.5


def test_exif_says_adobe_rgb():
    array = np.full((16, 16, 3), (150, 120, 100), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ColorSpace: 2}
    data = encoded(Image.fromarray(array), "JPEG", exif=exif, quality=100, subsampling=0)
    expected = as_srgb(array, ADOBE, lambda v: v ** (563 / 256))
    assert np.abs(read(data) - expected).max() <= 2
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.ColorSpace: 0xFFFF,
        ExifTags.IFD.Interop: {ExifTags.Interop.InteropIndex: "R03"},
    }
    assert np.abs(read(encoded(Image.fromarray(array), exif=exif)) - expected).max() <= 2
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ColorSpace: 1}
    assert np.array_equal(read(encoded(Image.fromarray(array), exif=exif)), array)


def grey_profile(gamma):
    """A grey profile of a gamma, by ICC.1:2001, version 2."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65_536 * v) for v in (0.9642, 1, 0.8249)))
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, 14)
    head = struct.pack(">I4sI4s4s4s", 192, b"", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    head = (head + bytes(12) + b"acsp").ljust(68, b"\0") + white[8:]
    return head.ljust(128, b"\0") + table + white + curve


def cmyk_profile():
    """A printer of which each ink takes away a share of the light, as a table with two steps an axis."""
    corners = []
    for index in range(16):
        c, m, y, k = ((index >> bit) & 1 for bit in (3, 2, 1, 0))
        lightness = 100 * (1 - k) * (1 - 0.3 * c) * (1 - 0.4 * m) * (1 - 0.1 * y)
        corners.append((lightness, (70 * m - 30 * c) * (1 - k), (80 * y - 40 * c) * (1 - k)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", *(65_536 * (row == column) for row in range(3) for column in range(3)))
    table += bytes(range(256)) * 4
    table += b"".join(
        bytes([round(2.55 * lab[0]), round(lab[1] + 128), round(lab[2] + 128)]) for lab in corners
    )
    table += bytes(range(256)) * 3
    start = 132 + 12
    head = struct.pack(">I4sI4s4s4s", start + len(table), b"", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head = (head + bytes(12) + b"acsp").ljust(68, b"\0")
    head += struct.pack(">3i", *(round(65_536 * v) for v in (0.9642, 1, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", start, len(table)) + table


def lab_to_srgb(lab):
    """L*a*b* relative to D50 → sRGB in [0, 255], adapted by Bradford's matrix (CIE 15; ICC.1, annex E)."""
    f = (lab[..., 0] + 16) / 116
    f = np.stack([f + lab[..., 1] / 500, f, f - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.96422, 1, 0.82521)
    to_d65 = np.array(
        [
            [0.9555766, -0.0230393, 0.0631636],
            [-0.0282895, 1.0099416, 0.0210077],
            [0.0122982, -0.020483, 1.3299098],
        ]
    )
    return 255 * curved(xyz @ to_d65.T @ np.linalg.inv(to_xyz(SRGB)).T)


def test_grey_with_a_profile():
    grey = noise(6, 7, 1)
    data = encoded(Image.fromarray(grey), icc_profile=grey_profile(1.0))
    expected = 255 * curved(grey / 255)
    assert np.abs(read(data) - expected[..., None]).max() <= 1.5


def test_inks_with_a_profile():
    inks = np.zeros((1, 4, 4), np.uint8)
    inks[0, 1, 3] = inks[0, 2, 1] = inks[0, 3, 0] = 255
    data = encoded(Image.fromarray(inks, "CMYK"), "TIFF", icc_profile=cmyk_profile())
    seen = read(data)[0]
    # White, black, magenta, cyan; black point compensation makes the black one black.
    corners = np.array([[100.0, 0, 0], [0, 0, 0], [60, 70, 0], [70, -30, -40]])
    assert np.abs(seen - lab_to_srgb(corners)).max() <= 4


def test_lab_pictures_are_read():
    rgb = Image.fromarray(inner(6, 7))
    lab = ImageCms.profileToProfile(
        rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB", 5000), outputMode="LAB"
    )
    assert np.abs(read(encoded(lab, "TIFF")) - np.asarray(rgb)).max() <= 3


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (b"rubbish", "its pixels are RGB"),
        (p3_profile()[:200], "broken colour profile"),
        (grey_profile(2.2), "its pixels are RGB"),
        (p3_profile()[:36] + b"xxxx" + p3_profile()[40:], "broken colour profile"),
    ],
)
def test_a_broken_profile_is_said_and_left_out(profile, reason, tmp_path):
    array = noise(5, 6)
    path = tmp_path / "odd.png"
    Image.fromarray(array).save(path, icc_profile=profile)
    with pytest.warns(PictureWarning, match=rf"odd\.png .*{reason}.*read as sRGB"):
        assert np.array_equal(read(path), array)


def test_colours_that_nobody_knows_are_said():
    array = noise(5, 6)
    plain = encoded(Image.fromarray(array))
    for name, body in (
        (b"cICP", bytes([9, 16, 0, 1])),
        (b"gAMA", bytes(4)),
        (b"cHRM", struct.pack(">8I", 31270, 32900, *[30000] * 6)),
        (b"cHRM", bytes(32)),
    ):
        seen, notes = said(lambda name=name, body=body: read(with_chunks(plain, (name, body))))
        assert np.array_equal(seen, array)
        assert len(notes) == 1
        assert "read as sRGB" in notes[0]


# Large chunks


def large(name):
    words = noise(1, 1_500_000, 1).tobytes()
    if name == b"iCCP":
        profile = p3_profile().ljust(3_000_000, b"\0")
        return b"large\0\0" + zlib.compress(struct.pack(">I", len(profile)) + profile[4:])
    if name == b"zTXt":
        return b"words\0\0" + zlib.compress(words)
    if name == b"iTXt":
        return b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<" * 2_000_000)
    return b"words\0" + words


@pytest.mark.parametrize("name", [b"iCCP", b"zTXt", b"iTXt", b"tEXt"])
def test_a_sound_png_may_have_a_large_chunk(name):
    array = inner(6, 5)
    data = with_chunks(encoded(Image.fromarray(array)), (name, large(name)))
    expected = as_srgb(array, P3) if name == b"iCCP" else array
    assert np.abs(read(data) - expected).max() <= 1.5
    late = encoded(Image.fromarray(array))
    if name != b"iCCP":
        late = late[:-12] + chunk(name, large(name)) + late[-12:]
        assert np.array_equal(read(late), array)


def test_settings_are_read_beside_large_chunks(tmp_path):
    images.save_png(tmp_path / "a.png", Image.fromarray(noise(4, 4)), settings={"seed": 3})
    data = with_chunks((tmp_path / "a.png").read_bytes(), (b"zTXt", large(b"zTXt")))
    assert images.read_settings(data) == {"seed": 3}


def test_a_profile_that_unpacks_without_end_is_left_out():
    bomb = b"bomb\0\0" + zlib.compress(bytes(2**26))
    array = noise(4, 4)
    seen, notes = said(lambda: read(with_chunks(encoded(Image.fromarray(array)), (b"iCCP", bomb))))
    assert np.array_equal(seen, array)
    assert "very large colour profile" in notes[0]


# Damaged files


def seeds():
    """Small files of every kind, with all that is read of them."""
    image = Image.fromarray(noise(12, 9))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (1.0, 2.0, 3.0)}
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.ColorSpace: 0xFFFF,
        ExifTags.IFD.Interop: {ExifTags.Interop.InteropIndex: "R03"},
    }
    made = [
        encoded(image, kind, icc_profile=p3_profile(), exif=exif.tobytes())
        for kind in ("PNG", "JPEG", "WEBP", "TIFF")
    ]
    made.append(encoded(image.convert("L"), icc_profile=grey_profile(1.0)))
    made.append(encoded(image.convert("CMYK"), "TIFF", icc_profile=cmyk_profile()))
    made.append(deep_png(noise(6, 7, 3, np.uint16), (b"sBIT", b"\x0c\x0c\x0c"), (b"tRNS", bytes(6))))
    chunks = ((b"gAMA", struct.pack(">I", 100_000)), (b"cICP", bytes([12, 13, 0, 1])))
    return [*made, with_chunks(encoded(image), *chunks)]


SEEDS = seeds()


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0, 1),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_damaged_photos_are_read_or_refused_and_nothing_else(data, changes, cut):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place**2 * (len(data) - 1))] = value
    if cut < 0.2:
        del damaged[int(cut * 5 * len(damaged)) :]
    with warnings.catch_warnings(), listening(lambda text: None):
        warnings.simplefilter("ignore")
        try:
            photo = photos.open_picture(bytes(damaged), "photo")
        except ImageError:
            return
        if photo.width * photo.height < 10_000:
            images.encode(photo)
            images.encode(photo, "jpeg")


# Deep data


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_data_of_fewer_bits_are_scaled_as_the_file_says(channels, bits):
    top = 2**bits - 1
    array = np.random.default_rng(bits).integers(0, top + 1, (6, 7, channels)).astype(np.uint16)
    if channels in (2, 4):
        array[..., -1] = top
    seen, notes = said(lambda: read(deep_png(array, (b"sBIT", bytes([bits] * channels)))))
    colours = array[..., : channels - (channels in (2, 4))].astype(float)
    assert np.abs(seen - 255 * colours / top).max() <= 0.5
    assert any(f"{bits}-bit values in 16 bits" in text for text in notes)


def test_data_that_are_spread_already_are_not_scaled_again():
    # As PNG's standard has it, dark as they are.
    twelve = np.random.default_rng(0).integers(0, 200, (6, 7)).astype(float)
    for spread in (np.rint(twelve * 65_535 / 4095), twelve * 16):
        array = spread.astype(np.uint16)
        assert array.max() < 4096
        seen, notes = said(lambda array=array: read(deep_png(array, (b"sBIT", b"\x0c"))))
        assert np.abs(seen[..., 0] - array / 257).max() <= 0.5
        assert notes == []


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_dark_data_that_say_nothing_are_taken_at_their_word(channels, tmp_path):
    array = np.random.default_rng(0).integers(0, 4096, (6, 7, channels)).astype(np.uint16)
    if channels in (2, 4):
        array[..., -1] = 65_535
    (tmp_path / "scan.png").write_bytes(deep_png(array))
    with pytest.warns(PictureWarning, match=r"scan\.png are below 4,096, .*read as 16-bit"):
        assert read(tmp_path / "scan.png").max() <= 16


@pytest.mark.parametrize("level", [0, 4096, 65_535])
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_data_that_are_black_or_reach_further_say_nothing(channels, level):
    seen, notes = said(lambda: read(deep_png(np.full((6, 7, channels), level, np.uint16))))
    assert (seen == round(level / 257)).all()
    assert notes == []


def test_a_transparent_colour_of_sixteen_bits():
    array = np.random.default_rng(0).integers(0, 65_536, (4, 5, 3)).astype(np.uint16)
    array[1, 2] = (1000, 300, 20)
    array[1, 3] = (1001, 300, 20)
    data = deep_png(array, (b"tRNS", struct.pack(">HHH", 1000, 300, 20)))
    seen = photos.read_photo(data)
    alpha = np.asarray(seen.alpha)
    assert alpha[1, 2] == 0
    assert (alpha == 0).sum() == 1
    level = deep_png(np.array([[1000, 60_000]], np.uint16), (b"tRNS", struct.pack(">H", 1000)))
    assert np.asarray(photos.read_photo(level).alpha).tolist() == [[0, 255]]


# Files that lack their end


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_that_lacks_its_end_marker_alone_is_read(mode, progressive, missing, tmp_path):
    image = Image.fromarray(noise(50, 61)).convert(mode)
    data = encoded(image, "JPEG", progressive=progressive, quality=92)
    path = tmp_path / "phone.jpg"
    path.write_bytes(data[:-missing])
    with pytest.warns(PictureWarning, match=r"phone\.jpg lacks its end marker"):
        assert np.array_equal(read(path), read(data))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_some_of_its_picture_is_refused(progressive):
    data = encoded(Image.fromarray(noise(50, 61)), "JPEG", progressive=progressive, quality=92)
    for missing in (12, 40, 300, len(data) // 2):
        with pytest.raises(ImageError, match="cut short"):
            images.read_image(data[:-missing])
    if progressive:
        # At the end of each scan but the last, nothing is cut short, but bits are missing.
        places = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
        for place in places[2:]:
            before = max(
                i for i in range(place) if data[i] == 0xFF and data[i + 1] in (0xC4, 0xDA) and i < place
            )
            cut = before if data[before + 1] == 0xC4 else place
            with pytest.raises(ImageError):
                images.read_image(data[:cut])


def test_metadata_of_a_jpeg_that_lacks_its_end_stay():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(Image.fromarray(inner(16, 24)), "JPEG", exif=exif, icc_profile=p3_profile())[:-2]
    photo, notes = said(lambda: photos.read_photo(data))
    assert photo.size == (16, 24)
    assert photo.profile == p3_profile()
    assert len(notes) == 1


@pytest.mark.parametrize("missing", [4, 8, 12])
def test_a_png_that_lacks_its_end_marker_alone_is_read(missing):
    array = noise(20, 30)
    data = encoded(Image.fromarray(array))
    seen, notes = said(lambda: read(data[:-missing]))
    assert np.array_equal(seen, array)
    assert len(notes) == 1
    for more in (80, 400):
        with pytest.raises(ImageError):
            images.read_image(data[:-more])


def test_a_gif_that_lacks_its_end_marker_alone_is_read():
    indexed = Image.fromarray(noise(20, 30)).quantize(16)
    data = encoded(indexed, "GIF")
    assert np.array_equal(read(data[:-1]), read(data))


# Photos that are edited


def edited(tiny, source, **options):
    (made,) = tiny.edit(source, (20, 20, 8, 8), 1, steps=1, **options).photos
    return made


def test_an_edited_photo_keeps_its_profile_and_bytes(tiny, tmp_path):
    array = inner(64, 96)
    path = tmp_path / "p3.png"
    Image.fromarray(array).save(path, icc_profile=p3_profile())
    made = edited(tiny, path)
    images.save_png(tmp_path / "out.png", made)
    with Image.open(tmp_path / "out.png") as written:
        assert written.info["icc_profile"] == p3_profile()
        result = np.asarray(written)
    assert np.array_equal(result[48:], array[48:])
    assert np.array_equal(result[:, 60:], array[:, 60:])
    assert (result[20:28, 20:28] != array[20:28, 20:28]).any()
    assert np.abs(read(tmp_path / "out.png")[48:] - read(path)[48:]).max() == 0


def test_what_is_new_in_a_photo_of_other_colours_looks_as_the_model_made_it(tiny):
    array = inner(32, 32)
    image = Image.fromarray(array)
    image.info["icc_profile"] = p3_profile()
    mask = np.ones((32, 32), np.bool_)
    made, _ = said(lambda: tiny.inpaint(image, mask, 1, steps=2))
    expected = np.asarray(tiny.generate(1, steps=2).to_pil()[0])
    # P3 holds all of sRGB.
    light = linear(expected / 255) @ to_xyz(SRGB).T
    in_p3 = 255 * curved(light @ np.linalg.inv(to_xyz(P3)).T)
    assert np.abs(np.asarray(made.photos[0]) - in_p3).max() <= 1.5


def test_the_model_sees_srgb(tiny):
    array = inner(32, 32)
    image = Image.fromarray(array)
    image.info["icc_profile"] = p3_profile()
    before = tiny.edit(image, (4, 4, 8, 8), 1, steps=1).before
    seen = (before[0] * 255).movedim(0, -1).numpy()
    assert np.abs(seen - as_srgb(array, P3)).max() <= 1.5


def test_grey_with_a_profile_comes_back_as_colours_of_that_curve(tiny, tmp_path):
    grey = noise(64, 64, 1)
    path = tmp_path / "grey.png"
    Image.fromarray(grey).save(path, icc_profile=grey_profile(1.8))
    made = edited(tiny, path)
    result = np.asarray(made)
    assert np.array_equal(result[48:], np.repeat(grey[48:, :, None], 3, 2))
    assert np.abs(read(images.encode(made))[48:] - read(path)[48:]).max() <= 1


def test_inks_and_lab_come_back_as_they_look(tiny):
    inks = Image.fromarray(noise(64, 64)).convert("CMYK")
    data = encoded(inks, "TIFF", icc_profile=cmyk_profile())
    made = edited(tiny, data)
    assert "icc_profile" not in made.info
    assert np.array_equal(np.asarray(made)[48:], read(data)[48:])
    jpeg = encoded(inks, "JPEG", quality=95)
    assert np.array_equal(np.asarray(edited(tiny, jpeg))[48:], read(jpeg)[48:])


def test_transparency_and_a_profile_stay_together(tiny, tmp_path):
    array = np.concatenate([inner(64, 64), noise(64, 64, 1)[..., None]], 2)
    path = tmp_path / "clear.png"
    Image.fromarray(array).save(path, icc_profile=p3_profile())
    made = edited(tiny, path)
    assert made.mode == "RGBA"
    assert made.info["icc_profile"] == p3_profile()
    assert np.array_equal(np.asarray(made)[48:], array[48:])


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_metadata_stay_with_an_edited_photo(tiny, form, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.IFD.GPSInfo] = {1: "N"}
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ExposureTime: 0.01, ExifTags.Base.ExifImageWidth: 96}
    path = tmp_path / "turned.jpg"
    Image.fromarray(inner(64, 96)).save(path, exif=exif, icc_profile=p3_profile())
    made = edited(tiny, path)
    assert made.size == (64, 96)
    with Image.open(io.BytesIO(images.encode(made, form))) as written:
        assert written.size == (64, 96)
        kept = written.getexif()
        assert ExifTags.Base.Orientation not in kept
        assert kept[ExifTags.Base.Make] == "Camera"
        assert kept.get_ifd(ExifTags.IFD.GPSInfo) == {1: "N"}
        assert set(kept.get_ifd(ExifTags.IFD.Exif)) == {ExifTags.Base.ExposureTime}
        assert written.info["icc_profile"] == p3_profile()


def test_palettes_and_single_bits_with_transparency(tiny):
    indexed = Image.fromarray(noise(64, 64)).quantize(8)
    data = encoded(indexed, transparency=3)
    made = edited(tiny, data)
    clear = np.asarray(indexed) == 3
    assert np.array_equal(np.asarray(made)[48:, :, 3], np.where(clear, 0, 255)[48:])
    bits = Image.fromarray(noise(64, 64, 1)).convert("1")
    assert set(np.unique(np.asarray(edited(tiny, encoded(bits)))[48:])) <= {0, 255}
    both = encoded(Image.fromarray(noise(64, 64, 4)).convert("LA"))
    assert edited(tiny, both).mode == "RGBA"


# Outpainting


def test_outpainting_keeps_transparency(tiny):
    array = noise(32, 32, 4, seed=2)
    made = tiny.outpaint(array, right=16, label=1, steps=1)
    (result,) = made.to_pil()
    assert result.mode == "RGBA"
    pixels = np.asarray(result)
    assert np.array_equal(pixels[:, :29], array[:, :29])
    assert (pixels[:, 32:, 3] == 255).all()
    assert made.images.shape == (1, 3, 32, 48)


def test_outpainting_keeps_a_profile_and_metadata(tiny, tmp_path):
    array = inner(32, 32)
    path = tmp_path / "p3.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    Image.fromarray(array).save(path, icc_profile=p3_profile(), exif=exif)
    (result,) = tiny.outpaint(path, left=16, label=1, steps=1).to_pil()
    assert result.info["icc_profile"] == p3_profile()
    assert b"Camera" in result.info["exif"]
    assert np.array_equal(np.asarray(result)[:, 19:], array[:, 3:])


def test_outpainting_a_plain_photo_is_as_before(tiny):
    array = noise(32, 32)
    made = tiny.outpaint(array, left=16, label=1, steps=1)
    assert made.photos is None
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    (told,) = tiny.outpaint(encoded(Image.fromarray(array), exif=exif), left=16, label=1, steps=1).to_pil()
    assert np.array_equal(np.asarray(told), np.asarray(made.to_pil()[0]))


def test_colours_under_transparency_do_not_shine_through(tiny):
    array = np.full((64, 64, 4), 200, np.uint8)
    array[..., 3] = 255
    array[:, 40:] = (255, 0, 0, 0)
    made = tiny.outpaint(array, left=16, label=1, steps=1)
    (result,) = made.to_pil()
    # Scaled down, edges of what is transparent stay free of the red below it.
    seen = np.asarray(result)
    shown = seen[..., 3] > 20
    shown[:, :20] = False
    assert (seen[shown][:, 0].astype(int) - seen[shown][:, 1]).max() <= 2
