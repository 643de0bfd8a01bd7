"""C2PA manifests, made with a certificate of the test's own and read by c2pa-python's reader."""

import base64
import datetime
import io
import json
from types import SimpleNamespace

import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from maskgit import explain, images
from maskgit.apps.cli import commands as cli
from maskgit.apps.cli.flags import Marking
from maskgit.apps.cli.signing import Signer
from maskgit.apps.serving.service import Limits
from maskgit.errors import ConfigError
from maskgit.images import provenance
from maskgit.images.provenance import EDITED, GENERATED
from pictures import encoded, noise, picture
from servers import in_thread

NOW = datetime.datetime.now(datetime.UTC)


def pem(cert):
    return cert.public_bytes(serialization.Encoding.PEM)


def certificate(name, key, issuer=None, *, authority=False):
    """A certificate as C2PA asks for it (specification 2.2, §14.5.1), from an issuer (name, key) or its own."""

    def called(text):
        return x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, text),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"),
            ]
        )

    by, signing = issuer or (name, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(called(name))
        .issuer_name(called(by))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=1))
        .not_valid_after(NOW + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(authority, None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), False)
        .add_extension(
            x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False), True
        )
    )
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
    return builder.sign(signing, hashes.SHA256())


KEYS = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ps256": lambda: rsa.generate_private_key(65_537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


def said():
    made = picture()
    provenance.say([made], GENERATED)
    return made


@pytest.fixture(scope="module")
def root():
    key = KEYS["es256"]()
    return SimpleNamespace(key=key, cert=certificate("Root", key, authority=True))


def operator(root, folder, kind="es256", form=serialization.PrivateFormat.PKCS8):
    """Write an operator's certificates and key, and return their paths."""
    key = KEYS[kind]()
    cert = certificate("Operator", key, ("Root", root.key))
    (folder / "cert.pem").write_bytes(pem(cert) + pem(root.cert))
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(secret)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def papers(root, tmp_path):
    return operator(root, tmp_path)


def manifest(root, data, media_type):
    """Return the valid manifest of a file that trusts the root, by c2pa-python's reader."""
    trusting = {
        "verify": {"verify_trust": True, "remote_manifest_fetch": False, "ocsp_fetch": False},
        "trust": {"trust_anchors": pem(root.cert).decode()},
    }
    context = c2pa.Context(c2pa.Settings.from_dict(trusting))
    with c2pa.Reader(media_type, io.BytesIO(data), context=context) as reader:
        assert reader.get_validation_state() == "Trusted"
        return reader.get_active_manifest()


def actions(found):
    (listed,) = [a["data"]["actions"] for a in found["assertions"] if a["label"].startswith("c2pa.actions")]
    return [(action["action"], action.get("digitalSourceType")) for action in listed]


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_a_made_picture_is_signed_without_touching_a_pixel(root, papers, tiny, form):
    signer = Signer(*papers)
    (made,) = tiny.generate(1, steps=1).to_pil()
    data = images.encode(made, form, settings={"seed": 1}, sign=signer.of(None))
    found = manifest(root, data, f"image/{form}")
    assert actions(found) == [("c2pa.created", GENERATED)]
    assert found["claim_generator_info"][0]["name"] == "maskgit"
    with Image.open(io.BytesIO(data)) as signed, Image.open(io.BytesIO(images.encode(made, form))) as plain:
        assert np.array_equal(np.asarray(signed), np.asarray(plain))
    if form == "png":
        assert images.read_settings(data) == {"seed": 1}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_an_edit_names_the_photo_that_was_opened(root, papers, tiny, kind):
    photo = encoded(picture(40, 40), kind)
    made = tiny.edit(photo, (8, 8, 8, 8), 1, steps=1).to_pil()[0]
    found = manifest(root, images.encode(made, sign=Signer(*papers).of(photo)), "image/png")
    assert actions(found) == [("c2pa.opened", None), ("c2pa.edited", EDITED)]
    assert [part["relationship"] for part in found["ingredients"]] == ["parentOf"]


def test_an_edit_of_an_edit_keeps_the_chain(root, papers, tiny):
    signer = Signer(*papers)
    first = images.encode(tiny.generate(1, steps=1).to_pil()[0], sign=signer.of(None))
    again = tiny.edit(first, (8, 8, 8, 8), 1, steps=1).to_pil()[0]
    found = manifest(root, images.encode(again, sign=signer.of(first)), "image/png")
    assert found["ingredients"][0]["active_manifest"]


@pytest.mark.parametrize("photo", [None, encoded(picture(), "BMP"), b"\x89PNG\r\n\x1a\nrubbish"])
def test_an_edit_whose_photo_cannot_be_named(root, papers, tiny, photo):
    made = tiny.edit(noise(40, 40), (8, 8, 8, 8), 1, steps=1).to_pil()[0]
    found = manifest(root, images.encode(made, sign=Signer(*papers).of(photo)), "image/png")
    assert actions(found)[-1][1] == EDITED


def test_an_animation_is_signed(root, papers, tiny, tmp_path):
    made = tiny.generate(1, steps=2, return_steps=True)
    for name in ("a.gif", "a.webp"):
        frames = explain.animation(tiny, made)
        explain.save_animation(tmp_path / name, frames, sign=Signer(*papers).of(None))
        found = manifest(root, (tmp_path / name).read_bytes(), f"image/{name[2:]}")
        assert actions(found) == [("c2pa.created", GENERATED)]


@pytest.mark.parametrize("kind", KEYS)
def test_every_kind_of_key_signs(root, kind, tmp_path):
    form = serialization.PrivateFormat.TraditionalOpenSSL if kind in ("es256", "ps256") else None
    cert, key = operator(root, tmp_path, kind, form or serialization.PrivateFormat.PKCS8)
    made = said()
    manifest(root, images.encode(made, sign=Signer(cert, key).of(None)), "image/png")
    # What says nothing of itself is not signed.
    assert b"c2pa" not in images.encode(picture(), sign=Signer(cert, key).of(None))


def test_papers_that_do_not_serve_are_told_of_before_anything_is_made(root, papers, tmp_path):
    cert, key = papers
    other = tmp_path / "other.pem"
    other.write_bytes(
        KEYS["es256"]().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        KEYS["es256"]().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    itself = tmp_path / "root.pem"
    itself.write_bytes(pem(root.cert))
    own_key = tmp_path / "root-key.pem"
    own_key.write_bytes(
        root.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    for pair, reason in (
        ((cert, other), "is not that of the first certificate"),
        ((cert, locked), "without a password"),
        ((key, key), "must hold certificates"),
        ((cert, cert), "must hold certificates"),
        ((tmp_path / "none.pem", key), "cannot be read"),
        ((itself, own_key), "Signing with"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Signer(*pair)
    with pytest.raises(ConfigError, match="both a certificate and its key"):
        Marking(c2pa_cert=cert).writing()


def test_the_environment_names_the_papers(root, papers, monkeypatch):
    monkeypatch.setenv("MASKGIT_C2PA_CERT", str(papers[0]))
    monkeypatch.setenv("MASKGIT_C2PA_KEY", str(papers[1]))
    writing = Marking(mark=False).writing()
    assert writing["mark"] is False
    manifest(root, images.encode(said(), **writing), "image/png")


def test_the_command_line_signs_all_that_it_writes(root, papers, tiny_folder, tmp_path):
    signed = ["--c2pa-cert", str(papers[0]), "--c2pa-key", str(papers[1]), "--model", str(tiny_folder)]
    out = tmp_path / "out"
    made = ["generate", "--class", "1", "--steps", "2", "--explain", "--out", str(out), *signed]
    assert cli.main(made) == 0
    for path in out.iterdir():
        found = manifest(root, path.read_bytes(), f"image/{path.suffix[1:]}")
        assert actions(found) == [("c2pa.created", GENERATED)]
    photo = next(out.glob("1-*.png"))
    edit = ["edit", str(photo), "--box", "4", "4", "8", "8", "--class", "2", "--steps", "2"]
    assert cli.main([*edit, "--out", str(tmp_path / "edit"), *signed]) == 0
    (edited,) = (tmp_path / "edit").glob(f"{photo.stem}*")
    found = manifest(root, edited.read_bytes(), "image/png")
    assert actions(found) == [("c2pa.opened", None), ("c2pa.edited", EDITED)]
    # The photo's own manifest is inside.
    assert found["ingredients"][0]["active_manifest"]


def test_a_server_signs_and_marks(root, papers, tiny):
    marking = Marking(c2pa_cert=papers[0], c2pa_key=papers[1])
    photo = base64.b64encode(encoded(picture(40, 40), "JPEG")).decode()
    with in_thread(Limits(), model=tiny, marking=marking) as (client, _):
        for form in ("png", "jpeg", "webp"):
            body = {"class": 1, "steps": 1, "format": form}
            answer = client.post("/v1/generate", json=body).json()
            data = base64.b64decode(answer["images"][0]["image"])
            assert actions(manifest(root, data, f"image/{form}")) == [("c2pa.created", GENERATED)]
            assert GENERATED.encode() in data
            edit = {"image": photo, "boxes": [[8, 8, 8, 8]], **body}
            answer = client.post("/v1/edit", json=edit, headers={"accept": f"image/{form}"})
            assert actions(manifest(root, answer.content, f"image/{form}"))[-1] == ("c2pa.edited", EDITED)
            assert EDITED.encode() in answer.content
    with in_thread(Limits(), model=tiny, marking=Marking(mark=False)) as (client, _):
        answer = client.post("/v1/generate", json={"class": 1, "steps": 1}, headers={"accept": "image/png"})
        assert b"DigitalSourceType" not in answer.content


def test_what_is_said_of_a_request_is_in_its_answer(tiny):
    photo, mask = (base64.b64encode(encoded(p)).decode() for p in (picture(40, 40), Image.new("L", (40, 40))))
    body = {"image": photo, "mask": mask, "class": 1, "steps": 1}
    with in_thread(Limits(), model=tiny) as (client, _):
        answer = client.post("/v1/inpaint", json=body).json()
        assert len(answer["notes"]) == 1
        assert "marks nothing" in answer["notes"][0]
        whole = client.post("/v1/inpaint", json={**body, "invert": True}).json()
        assert whole["images"] != answer["images"]
        assert "100%" in whole["notes"][0]
        assert json.dumps(whole["settings"]).count('"invert": true') == 1
