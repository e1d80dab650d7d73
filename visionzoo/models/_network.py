"""Whether published weights can be had, asked once before a download that would be tried for minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

WEIGHTS = ("pytorch_model.bin", "model.safetensors")  # what timm looks for where a model names no file


def check_reachable(name: str, repository: str, files: tuple[str, ...] = WEIGHTS, *, cache: Any = None) -> None:
    """Do nothing where one of the files is in the cache, or the hub answers; it may answer that it has none.

    Without this, huggingface_hub asks for each file again and again, for half a minute and, where a network swallows
    what is sent to it, for many. The wait here is its own `HF_HUB_ETAG_TIMEOUT`, 10 s unless set.

    Args:
        name: of the model, for the message.
        repository: USER/NAME on Hugging Face's hub, perhaps with @REVISION.
        files: any of which will do.
        cache: folder of the hub's cache, None for its default.

    Raises:
        LocalEntryNotFoundError: there is neither, with what to do.
    """
    repository, _, revision = repository.partition("@")
    where: Any = {"repo_id": repository, "revision": revision or None}
    if any(isinstance(try_to_load_from_cache(filename=file, cache_dir=cache, **where), str) for file in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(filename=files[-1], **where), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError:
        return  # it answered; what is wrong with the repository or the file, timm's own request finds
    except Exception as error:  # of requests or httpx, as the release of huggingface_hub has it
        raise LocalEntryNotFoundError(
            f"{unreachable(name, repository, error, cache=cache)}. Try again with a network and without "
            "HF_HUB_OFFLINE, or build the model without pretrained=True and load a file of them by "
            "visionzoo.load_weights(model, path)"
        ) from None  # its own cause is pages long


def unreachable(name: str, repository: str, error: BaseException, *, cache: Any = None) -> str:
    """Return where weights were looked for, and why they are not there."""
    folder, reason = Path(cache or constants.HF_HUB_CACHE), type(error).__name__
    return (
        f"the weights of {name} are neither in the cache {folder} nor to be fetched from "
        f"{constants.ENDPOINT}/{repository} ({reason})"
    )
