"""Signed statements of where pictures come from: C2PA manifests, with the operator's own certificate.

Source: C2PA Technical Specification 2.2: §18.14 actions, §14.5 certificates.
"""

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from maskgit.errors import ConfigError, OutputError
from maskgit.foundation import __version__
from maskgit.images.provenance import EDITED, GENERATED, Sign

# How far the chain and the key may go, in bytes.
_MAX_PEM = 2**20
# What may be named as the photo that was opened.
_PHOTOS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
)
# Nothing is fetched, whatever address a photo's metadata name.
_OFFLINE: dict[str, Any] = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}


class Signer:
    """Signs picture files; may be used from any thread."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Read a certificate and its key.

        Args:
            cert: a PEM file of certificates: the signer's own, then those that vouch for it, each for the one before.
            key: a PEM file of its private key, without a password: elliptic curve (P-256, P-384, P-521), RSA or
                Ed25519.

        Raises:
            ConfigError: c2pa-python is missing, a file cannot be read, or the two do not belong together.
        """
        try:
            import c2pa
            from cryptography import x509
            from cryptography.hazmat.primitives import serialization
        except ImportError as error:
            raise ConfigError(
                f"C2PA signing needs the package {error.name}; install the extra c2pa."
            ) from error
        chain, secret = _read(cert, "certificate"), _read(key, "key")
        try:
            own = x509.load_pem_x509_certificates(chain)[0]
            private = serialization.load_pem_private_key(secret, None)
        except (ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"{cert} must hold certificates, and {key} a private key without a password, both in PEM."
            ) from error
        form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        if own.public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
            raise ConfigError(f"The key in {key} is not that of the first certificate in {cert}.")
        self._chain = chain
        self._key = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self._algorithm = _algorithm(private)
        self._context = c2pa.Context(c2pa.Settings.from_dict(_OFFLINE))
        self._try(cert)

    def _try(self, cert: Path) -> None:
        """Sign a picture of one pixel, so that a certificate that does not serve is told of at once."""
        from PIL import Image

        from maskgit.images import encode

        try:
            self.sign(encode(Image.new("RGB", (1, 1))), "image/png", GENERATED)
        except OutputError as error:
            raise ConfigError(
                f"Signing with {cert} failed: {error} The certificate must allow signing documents or e-mail, and must "
                "not be a certificate authority."
            ) from error

    def of(self, photo: bytes | None) -> Sign:
        """Return what signs pictures that were made from a photo, whose file is named as what was opened."""

        def sign(data: bytes, media_type: str, source: str) -> bytes:
            return self.sign(data, media_type, source, photo)

        return sign

    def sign(self, data: bytes, media_type: str, source: str, photo: bytes | None = None) -> bytes:
        """Return a file with a signed manifest in it: what was done to the picture, and with what.

        Args:
            data: a PNG, JPEG, WebP or GIF file.
            media_type: of it.
            source: `provenance.GENERATED` or `EDITED`.
            photo: the file that an edit began from, with what it says of itself.

        Raises:
            OutputError: it cannot be signed.
        """
        import c2pa

        kind = _kind(photo) if photo is not None and source == EDITED else None
        try:
            if kind is not None and photo is not None:
                # c2pa reads files more strictly than we do.
                with suppress(c2pa.C2paError), self._builder(media_type, source, opened=True) as builder:
                    parent = {"title": "photo", "relationship": "parentOf", "label": _PHOTO}
                    builder.add_ingredient(parent, kind, io.BytesIO(photo))
                    return self._finish(builder, data, media_type)
            with self._builder(media_type, source, opened=False) as builder:
                return self._finish(builder, data, media_type)
        except c2pa.C2paError as error:
            raise OutputError(f"The image cannot be signed: {str(error).strip().rstrip('.')}.") from error

    def _builder(self, media_type: str, source: str, *, opened: bool) -> Any:
        import c2pa

        # An edit whose photo is not at hand is a picture created from several sources.
        actions: list[dict[str, Any]] = [{"action": "c2pa.created", "digitalSourceType": source}]
        if opened:
            actions = [
                {"action": "c2pa.opened", "parameters": {"ingredientIds": [_PHOTO]}},
                {"action": "c2pa.edited", "digitalSourceType": source},
            ]
        manifest = {
            "claim_generator_info": [{"name": "maskgit", "version": __version__}],
            "format": media_type,
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
        }
        return c2pa.Builder(json.dumps(manifest), self._context)

    def _finish(self, builder: Any, data: bytes, media_type: str) -> bytes:
        import c2pa

        info = c2pa.C2paSignerInfo(
            alg=self._algorithm, sign_cert=self._chain, private_key=self._key, ta_url=None
        )
        signed = io.BytesIO()
        with c2pa.Signer.from_info(info) as signer:
            builder.sign(signer, media_type, io.BytesIO(data), signed)
        return signed.getvalue()


# What the manifest calls the photo.
_PHOTO = "photo"


def _kind(photo: bytes) -> str | None:
    if photo[:4] == b"RIFF" and photo[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _PHOTOS if photo.startswith(start)), None)


def _algorithm(private: Any) -> str:
    """Return C2PA's name for how a key signs.

    Raises:
        ConfigError: it is none of those.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    sizes = {256: "es256", 384: "es384", 521: "es512"}
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.key_size in sizes:
        return sizes[private.key_size]
    raise ConfigError("The C2PA key must be of type P-256, P-384, P-521, RSA or Ed25519.")


def _read(path: Path, what: str) -> bytes:
    path = path.expanduser()
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_PEM + 1)
    except OSError as error:
        raise ConfigError(f"The {what} {path} cannot be read: {error.strerror}.") from error
    if len(data) > _MAX_PEM:
        raise ConfigError(f"{path} is too large for a {what}.")
    return data
