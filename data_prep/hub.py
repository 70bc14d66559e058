"""Datasets of the Hugging Face hub, downloaded before they are read."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.libraries import library
from nemotron3_megatron.config.errors import UserError

HUB = "hf://datasets/"

_ENTRY = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<pattern>.+))?$")


def download(entry: str) -> Path:
    """The local directory of ``hf://datasets/OWNER/NAME[@REVISION][/PATTERN]``; only files of the pattern are fetched.

    ``@refs%2Fconvert%2Fparquet`` is the branch with the hub's own conversion of a dataset to parquet.
    Finished files are kept in huggingface_hub's cache, so a restart continues.

    Raises:
        UserError: it is misspelt, does not exist, or the hub cannot be reached.
    """
    match = _ENTRY.match(entry)
    if match is None:
        raise UserError(f"input.paths: {entry}", nearest="hf://datasets/OWNER/NAME[@REVISION][/PATTERN]")
    hub, errors = library("huggingface_hub"), library("huggingface_hub.errors")
    revision = match["revision"].replace("%2F", "/") if match["revision"] else None
    try:
        return Path(
            hub.snapshot_download(
                match["name"], repo_type="dataset", revision=revision, allow_patterns=match["pattern"] or None
            )
        )
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"input.paths: {entry} cannot be downloaded", why=reason) from error
