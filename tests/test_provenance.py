"""What files say of where their pictures come from, read by ExifTool, in every format that is written."""

import io
import json
import shutil
import subprocess
import time

import numpy as np
import pytest
from PIL import ExifTags, Image

from maskgit import explain, images
from maskgit.apps.cli import commands as cli
from maskgit.editing import photos
from maskgit.foundation.notes import PictureWarning, listening
from maskgit.images import provenance
from pictures import encoded, noise, picture

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
EDITED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"


def exiftool(data, tmp_path):
    """Return what ExifTool reads in a file's XMP, by name."""
    program = shutil.which("exiftool")
    assert program, "These tests read with ExifTool; install it: apt-get install libimage-exiftool-perl"
    path = tmp_path / f"read-{time.monotonic_ns()}"
    path.write_bytes(data)
    done = subprocess.run([program, "-j", "-n", "-XMP:all", path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)[0]


def own_xmp(properties="", attributes=""):
    """XMP as another program writes it, which calls the name spaces otherwise."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="{RDF}"><r:Description r:about="uuid:1" '
        'xmlns:a="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        f'xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" {attributes}>'
        "<dc:creator><r:Seq><r:li>Ada &amp; Ida Ö</r:li></r:Seq></dc:creator>"
        f'{properties}</r:Description></r:RDF></x:xmpmeta>{" " * 40}<?xpacket end="w"?>'
    ).encode()


def generated(tiny):
    return tiny.generate(1, steps=1).to_pil()[0]


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_a_made_picture_says_so_in_every_format(tiny, form, tmp_path):
    made = generated(tiny)
    data = images.encode(made, form)
    said = exiftool(data, tmp_path)
    assert said["DigitalSourceType"] == GENERATED
    assert said["CreatorTool"].startswith("maskgit ")
    plain = images.encode(made, form, mark=False)
    assert "DigitalSourceType" not in exiftool(plain, tmp_path)
    assert b"http://cv.iptc.org" not in plain
    with Image.open(io.BytesIO(data)) as marked, Image.open(io.BytesIO(plain)) as unmarked:
        assert np.array_equal(np.asarray(marked), np.asarray(unmarked))


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_an_animation_says_so(tiny, name, tmp_path):
    made = tiny.generate(1, steps=2, return_steps=True)
    frames = explain.animation(tiny, made)
    explain.save_animation(tmp_path / name, frames)
    explain.save_animation(tmp_path / f"plain-{name}", frames, mark=False)
    assert exiftool((tmp_path / name).read_bytes(), tmp_path)["DigitalSourceType"] == GENERATED
    assert "DigitalSourceType" not in exiftool((tmp_path / f"plain-{name}").read_bytes(), tmp_path)
    with Image.open(tmp_path / name) as marked, Image.open(tmp_path / f"plain-{name}") as plain:
        assert marked.n_frames == plain.n_frames > 1
        for frame in range(marked.n_frames):
            marked.seek(frame)
            plain.seek(frame)
            assert np.array_equal(np.asarray(marked.convert("RGB")), np.asarray(plain.convert("RGB")))


def test_what_each_method_makes_is_called_by_its_name(tiny):
    photo = noise(32, 32)
    mask = np.zeros((32, 32), np.bool_)
    mask[8:16, 8:16] = True
    made = {
        GENERATED: [
            tiny.generate(1, steps=1),
            tiny.panorama(1, 48, steps=1),
            tiny.interpolate_classes(1, 2, steps=1),
        ],
        EDITED: [
            tiny.edit(photo, (4, 4, 8, 8), 1, steps=1),
            tiny.inpaint(photo, mask, 1, steps=1),
            tiny.outpaint(photo, left=8, label=1, steps=1),
            tiny.vary(photo, 0.5, 1, steps=1),
            tiny.interpolate_images(photo, noise(32, 32, seed=1), 1, steps=1),
            tiny.reconstruct(photo),
        ],
    }
    for source, outputs in made.items():
        for output in outputs:
            assert [shown.info[provenance.KEY] for shown in output.to_pil()] == [source]


def test_a_picture_that_says_nothing_is_not_marked(tmp_path):
    assert "CreatorTool" not in exiftool(images.encode(picture()), tmp_path)
    sheet = images.contact_sheet([picture(), picture(seed=1)])
    assert provenance.KEY not in sheet.info


def test_a_sheet_is_what_its_pictures_are(tiny):
    made, edited = generated(tiny), picture()
    provenance.say([edited], EDITED)
    assert images.contact_sheet([made, picture()]).info[provenance.KEY] == GENERATED
    assert images.contact_sheet([made, edited]).info[provenance.KEY] == EDITED


# An edited photo's own metadata


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_a_photos_own_xmp_stays_beside_the_mark(tiny, kind, form, tmp_path):
    own = own_xmp(
        "<a:Rating>4</a:Rating><a:CreatorTool>Other 1.0</a:CreatorTool>", f'i:DigitalSourceType="{GENERATED}"'
    )
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        chunks = PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", own.decode(), zip=True)
        data = encoded(picture(48, 48), pnginfo=chunks)
    elif kind == "TIFF":
        data = encoded(picture(48, 48), kind, tiffinfo={700: own})
    else:
        data = encoded(picture(48, 48), kind, xmp=own)
    (made,) = tiny.edit(data, (8, 8, 8, 8), 1, steps=1).photos
    said = exiftool(images.encode(made, form), tmp_path)
    assert said["Creator"] == "Ada & Ida Ö"
    assert said["Rating"] == 4
    assert said["DigitalSourceType"] == EDITED
    assert said["CreatorTool"].startswith("maskgit ")
    kept = exiftool(images.encode(made, form, mark=False), tmp_path)
    assert (kept["CreatorTool"], kept["Rating"]) == ("Other 1.0", 4)


def test_what_is_not_true_any_more_is_taken_out(tmp_path):
    own = own_xmp("<a:Thumbnails><r:Alt><r:li>AAAA</r:li></r:Alt></a:Thumbnails>", 'tiff:Orientation="6"')
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo = photos.open_picture(encoded(picture(16, 24), "JPEG", xmp=own, exif=exif), "photo")
    assert photo.size == (16, 24)
    provenance.say([photo], EDITED)
    data = images.encode(photo)
    assert not {"Orientation", "Thumbnails"} & set(exiftool(data, tmp_path))
    assert photos.read_photo(data).size == (16, 24)


def bombs():
    laughs = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    head = f'<!DOCTYPE x [<!ENTITY a0 "ha">{laughs}]>'
    body = own_xmp("<a:Nickname>&a9;</a:Nickname>").decode().partition("?>")[2]
    outside = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + body.replace("&a9;", "&e;")
    return {
        "entities": (head + body).encode(),
        "files": outside.encode(),
        "sixteen": (head + body).encode("utf-16"),
        "deep": own_xmp("<a:x>" * 20_000 + "</a:x>" * 20_000),
        "nested": own_xmp("<a:x>" * 2_000 + "</a:x>" * 2_000),
        "many": own_xmp("<a:x/>" * 100_000),
        "cut": own_xmp()[:300],
        "none": b"\xff\xfe rubbish",
        "other": b"<svg/>",
        "huge": own_xmp("x" * 2**20),
    }


@pytest.mark.parametrize("name", bombs())
def test_xmp_that_cannot_be_trusted_is_replaced(name):
    own = bombs()[name]
    notes = []
    with listening(notes.append):
        packet = provenance.packet(EDITED, own)
    assert EDITED.encode() in packet
    assert len(packet) < 2_000
    assert len(notes) == 1
    assert "are replaced" in notes[0]


def test_a_note_without_a_listener_is_a_warning():
    with pytest.warns(PictureWarning, match="are replaced"):
        provenance.packet(GENERATED, b"rubbish")


def test_metadata_too_long_for_a_jpeg_leave_the_mark(tmp_path):
    photo = picture(16, 16)
    photo.info["xmp"] = own_xmp(f"<a:Label>{'x' * 70_000}</a:Label>")
    photo.info["exif"] = b"Exif\0\0" + bytes(70_000)
    provenance.say([photo], EDITED)
    notes = []
    with listening(notes.append):
        data = images.encode(photo, "jpeg")
    assert len(notes) == 2
    assert exiftool(data, tmp_path)["DigitalSourceType"] == EDITED


# The command line


def test_the_command_line_marks_all_that_it_writes(tiny_folder, tmp_path):
    model = ["--model", str(tiny_folder), "--steps", "2"]
    out = tmp_path / "out"
    assert cli.main(["generate", "--class", "1", "--explain", "--out", str(out), *model]) == 0
    written = list(out.iterdir())
    assert sorted(path.suffix for path in written) == [".gif", ".png", ".png", ".png"]
    for path in written:
        assert exiftool(path.read_bytes(), tmp_path)["DigitalSourceType"] == GENERATED, path
    (made,) = out.glob("1-*")
    assert images.read_settings(made)["class"] == "1"

    edit = ["edit", str(made), "--box", "4", "4", "8", "8", "--class", "2", *model]
    assert cli.main([*edit, "--out", str(tmp_path / "edit")]) == 0
    for path in (tmp_path / "edit").iterdir():
        assert exiftool(path.read_bytes(), tmp_path)["DigitalSourceType"] == EDITED, path
    assert cli.main([*edit, "--no-mark", "--out", str(tmp_path / "plain")]) == 0
    for path in (tmp_path / "plain").iterdir():
        # The photo's own mark stays: it was made by this tool.
        said = exiftool(path.read_bytes(), tmp_path).get("DigitalSourceType")
        assert said == (None if path.name == "sheet.png" else GENERATED), path
    assert cli.main(["reconstruct", str(made), *model[:2], "--out", str(tmp_path / "again")]) == 0
    (again,) = (tmp_path / "again").glob("*reconstructed*")
    assert exiftool(again.read_bytes(), tmp_path)["DigitalSourceType"] == EDITED
