"""Models on the Hugging Face Hub, with its client's errors explained to users."""

import re
from pathlib import Path

from maskgit.errors import DownloadError, MaskGITError, OutputError
from maskgit.foundation.files import expand, output_error
from maskgit.foundation.proxies import missing_socks

PATTERNS = ["*.json", "*.safetensors", "*.md", "samples/*.webp"]
# A name on the Hugging Face Hub, and perhaps a revision.
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?")


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a model on the Hub, downloading what is not in the cache.

    Args:
        repo_id: "user/model".
        revision, token, cache_dir, local_files_only: see `hub.locate`.

    Raises:
        DownloadError: there is no such model or revision, or it cannot be downloaded.
        ConfigError: the environment names a proxy that needs a package.
        OutputError: the cache cannot be written.
    """
    from huggingface_hub import constants, snapshot_download

    folder = expand(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)
    if str(folder).startswith("~"):
        raise OutputError(
            f"This user has no home folder to cache {repo_id} in; set the environment variable HF_HOME, or cache_dir, "
            "to a writable folder."
        )
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=folder,
                local_files_only=local_files_only,
                allow_patterns=PATTERNS,
            )
        )
    except MaskGITError:
        raise
    # The Hub's client raises its own, its HTTP library's and the system's errors.
    except Exception as error:
        raise _explained(repo_id, revision, folder, local_files_only, error) from error


def _explained(
    repo_id: str, revision: str | None, folder: Path, local_files_only: bool, error: Exception
) -> MaskGITError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    if isinstance(error, ImportError) and (missing := missing_socks(error)):
        return missing
    wanted = f"{repo_id!r}" if revision is None else f"{repo_id!r} at the revision {revision!r}"
    # Errors of the system; the Hub's own are of the same class, but have no errno.
    if isinstance(error, OSError) and error.errno and not isinstance(error, HfHubHTTPError | ConnectionError):
        told = str(output_error(folder, error)).removesuffix(" Choose another folder.")
        return OutputError(
            f"{told} Set the environment variable HF_HOME, or cache_dir, to a writable folder."
        )
    if isinstance(error, RevisionNotFoundError):
        return DownloadError(
            f"{repo_id!r} on the Hugging Face Hub has no revision {revision or 'main'!r}: check its name."
        )
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"{repo_id!r} on the Hugging Face Hub is gated: request access on its page, and log in with "
            "`hf auth login` or give a token."
        )
    if constants.HF_HUB_OFFLINE or local_files_only:
        why = (
            "the environment variable HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) turns offline mode on: unset it"
            if constants.HF_HUB_OFFLINE
            else "local_files_only forbids downloads: leave it out"
        )
        return DownloadError(
            f"There is no folder {repo_id!r}, {wanted} of the Hugging Face Hub is not in the cache {folder}, and "
            f"{why} once to download it."
        )
    return DownloadError(
        f"There is no folder {repo_id!r}, and {wanted} could not be fetched from the Hugging Face Hub "
        f"({type(error).__name__}): check the name and the network, and log in with `hf auth login`, or give a "
        "token, if it is private."
    )


def upload(
    folder: Path, repo_id: str, *, private: bool, token: str | bool | None, commit_message: str
) -> str:
    """Upload a folder and return the URL of its repository; see `hub.push_to_hub`.

    Raises:
        DownloadError: the Hub refuses the upload or cannot be reached.
        ConfigError: the environment names a proxy that needs a package.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    # The Hub's client raises its own, its HTTP library's and the system's errors.
    except Exception as error:
        if isinstance(error, ImportError) and (missing := missing_socks(error)):
            raise missing from error
        raise DownloadError(f"{repo_id} could not be uploaded ({type(error).__name__}: {error}).") from error
    return commit.repo_url.url if hasattr(commit, "repo_url") else f"https://huggingface.co/{repo_id}"
