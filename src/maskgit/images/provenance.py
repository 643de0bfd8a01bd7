"""Provenance metadata: IPTC's digital source type and this tool's name, in XMP.

Sources: IPTC Photo Metadata Standard 2025.1, Digital Source Type; ISO 16684-1 (XMP) and XMP Specification
part 3, for the place in each kind of file.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final
from xml.dom import minidom
from xml.parsers.expat import ExpatError
from xml.sax.saxutils import quoteattr

from PIL import Image

from maskgit.foundation import __version__
from maskgit.foundation.notes import note

_SCHEME = "http://cv.iptc.org/newscodes/digitalsourcetype/"
# A picture made by the model, and one made from a photo.
GENERATED: Final = _SCHEME + "trainedAlgorithmicMedia"
EDITED: Final = _SCHEME + "compositeWithTrainedAlgorithmicMedia"
# The key in a PIL image's `info` that holds one of them, for writers.
KEY = "digital_source_type"
# Signs a file, given its bytes, its media type, and `GENERATED` or `EDITED`.
Sign = Callable[[bytes, str, str], bytes]
TOOL = f"maskgit {__version__}"

# Limits on bytes of XMP and on markup in it: parsed XMP takes about a hundred times as much memory.
MAX_XMP, MAX_PARTS = 2**20, 50_000

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMP = "http://ns.adobe.com/xap/1.0/"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_OURS = ((_IPTC, "DigitalSourceType"), (_XMP, "CreatorTool"))
# Properties that are no longer true of a photo that was turned upright and edited; thumbnails show the original.
_STALE = (("http://ns.adobe.com/tiff/1.0/", "Orientation"), (_XMP, "Thumbnails"))


def say(pictures: Iterable[Image.Image], source: str | None) -> None:
    """Mark pictures with their source type.

    Args:
        source: `GENERATED` or `EDITED`; None changes nothing.
    """
    for picture in pictures:
        if source is not None:
            picture.info[KEY] = source


def source_of(pictures: Sequence[Image.Image]) -> str | None:
    """Return the source type of a picture composed of several: edited if any is, else generated if any is, else None."""
    said = {picture.info.get(KEY) for picture in pictures}
    return EDITED if EDITED in said else GENERATED if GENERATED in said else None


def packet(source: str, own: bytes | None = None) -> bytes:
    """Return XMP with a picture's source type and the tool that made it.

    Args:
        source: `GENERATED` or `EDITED`.
        own: the picture's own XMP, which is kept. If it cannot be read or is too large, it is dropped, with a note.
    """
    if own:
        try:
            return _merged(own, source)
        except _UnreadableError as error:
            note(f"The picture's own XMP metadata {error}; they are replaced.")
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}">\n'
        f" <rdf:Description{_attributes(source)}/>\n"
        '</rdf:RDF></x:xmpmeta>\n<?xpacket end="w"?>'
    ).encode()


def refreshed(own: bytes) -> bytes:
    """Return a photo's XMP without properties that no longer hold once the photo is turned upright and edited.

    XMP that cannot be read becomes empty, with a note.
    """
    if not any(name.encode() in own for _, name in _STALE):
        return own
    try:
        document, root = _parsed(own)
        _remove(root, _STALE)
        return _text(document)
    except _UnreadableError as error:
        note(f"The picture's own XMP metadata {error}; they are left out.")
        return b""


class _UnreadableError(Exception):
    """The message says why."""


def _attributes(source: str) -> str:
    return (
        f' rdf:about="" xmlns:xmp="{_XMP}" xmlns:Iptc4xmpExt="{_IPTC}"'
        f" xmp:CreatorTool={quoteattr(TOOL)} Iptc4xmpExt:DigitalSourceType={quoteattr(source)}"
    )


def _merged(own: bytes, source: str) -> bytes:
    document, root = _parsed(own)
    # All descriptions are about the same resource, and so is ours.
    about = _remove(root, _OURS)
    added = document.createElementNS(_RDF, "rdf:Description")
    # The file may use other prefixes, so ours are declared here.
    for name, value in (
        ("xmlns:rdf", _RDF),
        ("rdf:about", about),
        ("xmlns:xmp", _XMP),
        ("xmp:CreatorTool", TOOL),
        ("xmlns:Iptc4xmpExt", _IPTC),
        ("Iptc4xmpExt:DigitalSourceType", source),
    ):
        added.setAttribute(name, value)
    root.appendChild(added)
    return _text(document)


def _parsed(own: bytes) -> tuple[minidom.Document, minidom.Element]:
    """Return XMP as a document, and the element whose children describe the picture."""
    if len(own) > MAX_XMP:
        raise _UnreadableError(f"have {len(own):,} bytes, above {MAX_XMP:,}")
    try:
        # The standard allows only UTF-8 in these file formats. Some packets end with a C string's zero.
        text = own.rstrip(b"\0 \n").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _UnreadableError("are not UTF-8") from error
    # Without a document type there are no entities to expand.
    if "<!DOCTYPE" in text.upper() or text.count("<") + text.count("=") > MAX_PARTS:
        raise _UnreadableError("are not plain")
    try:
        document = minidom.parseString(text.encode())
        (root,) = document.getElementsByTagNameNS(_RDF, "RDF")
    except (ExpatError, ValueError, RecursionError, LookupError, AttributeError) as error:
        raise _UnreadableError("cannot be read") from error
    return document, root


def _text(document: minidom.Document) -> bytes:
    try:
        # Without the XML declaration, which a packet does not have.
        return document.toxml().partition("?>")[2].encode()
    except (RecursionError, ValueError) as error:
        raise _UnreadableError("are nested too deep") from error


def _remove(root: minidom.Element, names: Sequence[tuple[str, str]]) -> str:
    """Remove properties from all descriptions, and return what the descriptions are about."""
    about = ""
    for described in root.childNodes:
        if not isinstance(described, minidom.Element) or described.localName != "Description":
            continue
        about = described.getAttributeNS(_RDF, "about") or about
        for space, name in names:
            if described.hasAttributeNS(space, name):
                described.removeAttributeNS(space, name)
            for child in list(described.childNodes):
                if (child.namespaceURI, child.localName) == (space, name):
                    described.removeChild(child)
    return about


def into_gif(data: bytes, xmp: bytes) -> bytes:
    """Return a GIF with XMP inserted before its end.

    Source: XMP Specification part 3, 1.1.2: the packet is stored verbatim, and a trailer leads readers of blocks out
    of it from wherever they are.
    """
    assert data.endswith(b";"), "Pillow ends it"
    trailer = b"\1" + bytes(range(255, -1, -1)) + b"\0"
    return data[:-1] + b"\x21\xff\x0bXMP DataXMP" + xmp + trailer + b";"
