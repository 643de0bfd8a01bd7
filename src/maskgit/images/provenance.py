"""What a file says of where its picture comes from: IPTC's digital source type and this tool's name, in XMP.

Sources: IPTC Photo Metadata Standard 2025.1, Digital Source Type; ISO 16684-1 (XMP) and XMP Specification
part 3, for the place in each kind of file.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final
from xml.dom import minidom
from xml.parsers.expat import ExpatError
from xml.sax.saxutils import quoteattr

from PIL import Image

from maskgit.foundation.notes import note
from maskgit.foundation.version import __version__

_SCHEME = "http://cv.iptc.org/newscodes/digitalsourcetype/"
# A picture that the model made, and one that it made a part of or began from.
GENERATED: Final = _SCHEME + "trainedAlgorithmicMedia"
EDITED: Final = _SCHEME + "compositeWithTrainedAlgorithmicMedia"
# Where a PIL image's `info` says which of them it is; writers go by it.
KEY = "digital_source_type"
# Makes a signed file of a file: its bytes, its media type, and `GENERATED` or `EDITED`.
Sign = Callable[[bytes, str, str], bytes]
TOOL = f"maskgit {__version__}"

# Bytes of XMP that are read, and marks in it: what is parsed takes some hundred times as much memory.
MAX_XMP, MAX_PARTS = 2**20, 50_000

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMP = "http://ns.adobe.com/xap/1.0/"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_OURS = ((_IPTC, "DigitalSourceType"), (_XMP, "CreatorTool"))
# What is not true any more of a photo that was turned upright and edited; small copies show what is gone.
_STALE = (("http://ns.adobe.com/tiff/1.0/", "Orientation"), (_XMP, "Thumbnails"))


def say(pictures: Iterable[Image.Image], source: str | None) -> None:
    """Let pictures say what they are.

    Args:
        source: `GENERATED` or `EDITED`; None changes nothing.
    """
    for picture in pictures:
        if source is not None:
            picture.info[KEY] = source


def source_of(pictures: Sequence[Image.Image]) -> str | None:
    """Return what a picture made of several is: edited if one is, or else generated if one is, or else None."""
    said = {picture.info.get(KEY) for picture in pictures}
    return EDITED if EDITED in said else GENERATED if GENERATED in said else None


def packet(source: str, own: bytes | None = None) -> bytes:
    """Return XMP that says what a picture is and which tool made it.

    Args:
        source: `GENERATED` or `EDITED`.
        own: the XMP that the picture had, kept beside it. Where that cannot be read, or is too large, it is left
            out, which a note says.
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
    """Return a photo's XMP without what is not true of it any more once it is read upright, to be edited.

    XMP that cannot be read comes back as none, which a note says.
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
    # All descriptions are of one thing, and so is ours.
    about = _remove(root, _OURS)
    added = document.createElementNS(_RDF, "rdf:Description")
    # In a file that calls the name spaces otherwise, ours are named on the spot.
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
        # The standard allows UTF-8 alone in files of these kinds. Some end in the zero of C's strings.
        text = own.rstrip(b"\0 \n").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _UnreadableError("are not UTF-8") from error
    # Without a document type there are no entities, and none that expand.
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
        # Without the declaration, which a packet has none of.
        return document.toxml().partition("?>")[2].encode()
    except (RecursionError, ValueError) as error:
        raise _UnreadableError("are nested too deep") from error


def _remove(root: minidom.Element, names: Sequence[tuple[str, str]]) -> str:
    """Remove properties from all descriptions, and return what these are about."""
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
    """Return a GIF with XMP in it, before its end.

    Source: XMP Specification part 3, 1.1.2: the packet stands there as it is, and a trailer leads readers of
    blocks out of it wherever they come to stand.
    """
    assert data.endswith(b";"), "Pillow ends it"
    trailer = b"\1" + bytes(range(255, -1, -1)) + b"\0"
    return data[:-1] + b"\x21\xff\x0bXMP DataXMP" + xmp + trailer + b";"
