"""Writes the OpenAPI document: python -m maskgit.apps.serving.openapi docs/openapi.json"""

import json
import sys
from pathlib import Path

from maskgit.apps.serving.app import bare_app
from maskgit.foundation import files


def document() -> str:
    """Return the document as JSON text."""
    return json.dumps(bare_app().openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    files.write_bytes(Path(sys.argv[1]), document().encode())
