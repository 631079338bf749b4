"""Checkpoints of the Hugging Face hub: fetched once, resumed as needed, found again without a network."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import re
from pathlib import Path

from pipeline.console import say
from storage.checkpoint import CONFIG, INDEX, WEIGHTS, listed_shards, weight_files
from storage.errors import CheckpointError, UsageError, reason

HUB = "https://huggingface.co"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a conversion reads beside the weights: configuration, tokenizer, templates.
SMALL_FILES = ("*.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
TEMPLATES = "additional_chat_templates/"
# A download that this machine refuses to keep; what the network refuses has other numbers.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def download(hub_id: str) -> Path:
    """The checkpoint's directory in the Hugging Face cache, fetched and resumed as needed.

    HF_HOME and HF_HUB_OFFLINE are huggingface_hub's own and honoured by it. Raises CheckpointError
    with the commands that fetch the checkpoint where there is no network, and with what this machine
    says where it cannot be kept, and UsageError for an id that the hub does not know, or gives to nobody
    who has not accepted its licence.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        # One request without retries, so that a missing network is noticed at once.
        siblings = HfApi().model_info(hub_id, timeout=10).siblings or ()
        listed = [sibling.rfilename for sibling in siblings]
        say(f"fetching {hub_id} from the Hugging Face hub (once)")
        small = [glob.escape(name) for name in small_files(listed)]
        first = next((name for name in WEIGHTS if name in listed), None)
        if first is not None and not first.endswith(INDEX):
            return Path(snapshot_download(hub_id, allow_patterns=[*small, first]))
        path = Path(snapshot_download(hub_id, allow_patterns=small))
        if first is None:
            raise CheckpointError(_no_weights(hub_id, listed))
        shards = [glob.escape(name) for name in listed_shards(path / first)]
        return Path(snapshot_download(hub_id, allow_patterns=[*small, *shards]))
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{hub_id} is only for those who have accepted its licence: accept it on "
            f"{HUB}/{hub_id}, log in with `hf auth login`, and run again"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UsageError(
            f"the Hugging Face hub has no model {hub_id} that you may read: check the name, "
            "or log in with `hf auth login`"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise CheckpointError(
                f"the checkpoint {hub_id} cannot be fetched into the Hugging Face cache, which HF_HOME "
                f"moves: {reason(error)}"
            ) from error
        if _is_refused(error):
            raise UsageError(
                f"the Hugging Face hub refuses your token for {hub_id}: log in with `hf auth login`"
            ) from error
        if not _is_unreachable(error):
            raise
        return _downloaded_before(hub_id, error)


def small_files(listed: list[str]) -> list[str]:
    """Those of a repository that a conversion reads beside the weights; what is nested is another model's."""
    top = [name for name in listed if "/" not in name]
    small = [name for name in top if any(fnmatch.fnmatch(name, one) for one in SMALL_FILES)]
    return [*small, *(name for name in listed if name.startswith(TEMPLATES))]


def _no_weights(hub_id: str, listed: list[str]) -> str:
    gguf = next((name for name in listed if name.endswith(".gguf")), None)
    if gguf is not None:
        return (
            f"{hub_id} has GGUF files alone, of which one is to be chosen: fetch it, such as with "
            f"`hf download {hub_id} {gguf} --local-dir .`, and name it with --model"
        )
    return f"{hub_id} has no weights at its top: none of {', '.join(WEIGHTS)}"


def _is_refused(error: Exception) -> bool:
    """Whether the hub answered, and refused who asks: an old token, or one that may not read."""
    return getattr(getattr(error, "response", None), "status_code", None) in {401, 403}


def _is_unreachable(error: Exception) -> bool:
    """Whether the hub could not be asked, or not to the end.

    Connection errors belong to the HTTP client, whose package differs between versions of the hub's.
    """
    return isinstance(error, OSError) or type(error).__module__.startswith("httpx")


def _downloaded_before(hub_id: str, reason: Exception) -> Path:
    """A checkpoint that an earlier download left whole. Raises CheckpointError."""
    from huggingface_hub import errors, snapshot_download

    with contextlib.suppress(OSError, errors.LocalEntryNotFoundError, CheckpointError):
        path = Path(snapshot_download(hub_id, local_files_only=True))
        if (path / CONFIG).is_file() and weight_files(path):
            return path
    local = hub_id.rpartition("/")[2]
    raise CheckpointError(
        f"the checkpoint {hub_id} is not on this machine and the Hugging Face hub cannot be reached; where "
        f"there is a network, fetch it with `hf download {hub_id} --local-dir {local}`, then run again with "
        f"`--model ./{local}`"
    ) from reason
