"""Cache keys of VAE and text encoders: from facts about the model's files, or without files from weights and
configurations."""

from __future__ import annotations

import functools
from typing import Any

from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import nn

from ..models.frozen_components import VAE, FrozenComponents
from ..models.loading import LoadedModel
from ..utils.identity import (
    describe_component,
    describe_pipeline,
    describe_software,
    describe_source,
    plain,
    public_config,
)
from ..utils.processes import ALONE, Peers

VERSION = 4  # increase this if a code change alters encoded images, encoded prompts or reference errors
INDEX = "model_index.json"
WHERE = ("cache_dir", "revision", "token")  # arguments that say where files are. The key does not contain them


class EncoderKey:
    """Cache key of VAE and text encoders. Other models or settings have another."""

    def __init__(self, frozen: FrozenComponents, loaded: LoadedModel, peers: Peers = ALONE) -> None:
        self._frozen = frozen
        self._loaded = loaded
        self._peers = peers

    @functools.cached_property
    def facts(self) -> dict[str, dict[str, Any]]:
        """Name all that encoded images (`vae`) and encoded prompts (`text`) depend on, as values for JSON. Read it in
        all processes together: the first computes it for all."""
        return self._peers.first(self._facts)

    def _facts(self) -> dict[str, dict[str, Any]]:
        family = self._frozen.family
        options = self._loaded.options
        dtypes = {name: str(getattr(family.pipeline, name).dtype) for name in family.frozen_components}
        configuration: Any = self._loaded.denoiser.config  # sets FLUX.1's prompt length
        common = {
            "version": VERSION,
            "family": family.name,
            "options": {name: value for name, value in options.items() if name not in WHERE},
            "software": describe_software(),
        }
        model = self._files() or self._objects()
        facts = {
            "vae": {**common, "model": model["vae"], "dtype": dtypes[VAE]},
            "text": {
                **common,
                "model": model["text"],
                "dtypes": {name: dtype for name, dtype in dtypes.items() if name != VAE},
                "denoiser": public_config(configuration),
                "cleaning": {"bs4": is_bs4_available(), "ftfy": is_ftfy_available()},
            },
        }
        return plain(facts)

    def _files(self) -> dict[str, Any] | None:
        """Describe the model's files, or its commit on the Hub, or return `None` if it was loaded from neither."""
        origin = self._loaded.name_or_path
        options = self._loaded.options
        if origin is None or not options or any(isinstance(value, nn.Module) for value in options.values()):
            return None
        source = describe_source(origin, **options)
        if "files" not in source:
            return None if source["commit"] is None else {"vae": source, "text": source}
        # Files are known by sizes and times, so a folder may move.
        folders = {name: name.rpartition("/")[0] for name in source["files"]}
        if set(folders.values()) == {""}:  # one file has all weights
            return {"vae": source["files"], "text": source["files"]}
        others = (VAE, self._frozen.family.denoiser_name, "scheduler")
        texts = {name for name, folder in folders.items() if folder and folder.partition("/")[0] not in others}
        chosen = {"vae": {name for name, folder in folders.items() if folder == VAE}, "text": texts | {INDEX}}
        files = {kind: {n: v for n, v in source["files"].items() if n in names} for kind, names in chosen.items()}
        return files if all(files.values()) else None

    def _objects(self) -> dict[str, Any]:
        """Describe the VAE, and everything else in the pipeline that encodes prompts."""
        with self._frozen.in_use() as family:
            networks = {name for name, part in family.pipeline.components.items() if isinstance(part, nn.Module)}
            left_out = {VAE, "scheduler", *(networks - {*family.frozen_components})}
            text = describe_pipeline(family.pipeline, leave_out=left_out)
            return {"vae": describe_component(family.pipeline.vae), "text": text}
