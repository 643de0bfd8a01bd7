"""The page: generate, edit, look inside and compare in a browser (`maskgit app`)."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def _private_folder() -> Path:
    """Return a new folder for uploads and results, which is removed when the program ends.

    Gradio serves and fills the folder that the environment variable GRADIO_TEMP_DIR names, whatever else lies
    in it, or one in the system's temporary folder that all users would share.
    """
    folder = Path(tempfile.mkdtemp(prefix="maskgit-page-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


# Here, because Gradio reads the variable both when it is imported and later.
PRIVATE_FOLDER = _private_folder()
