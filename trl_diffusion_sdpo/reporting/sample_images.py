"""Generates sample images with fixed seeds before, during and after training."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..engines.engine_settings import training_autocast
from ..engines.processes import in_any_process
from ..engines.sharding import DenoiserView
from ..models.frozen_components import FrozenComponents
from ..models.generation import cast_floats, draw_images, in_own_precision, noise_generator, quiet_copy
from ..saving.setup import output_folder
from ..step.pair_forward import eval_mode
from ..utils.errors import UserError
from ..utils.identity import describe_component, short_hash
from ..utils.secrets import without_secrets
from .sample_scores import SampleScores
from .tracked_images import TrackedImages

SAMPLES_FOLDER = "samples"
INFERENCE_STEPS = 30  # default number of steps


@dataclass(frozen=True)
class SamplePair:
    """Two images of one prompt from equal noise, before and after training. Paths are relative to the output folder."""

    prompt: str
    seed: int
    before: str
    after: str


class SampleImagesCallback(TrainerCallback):
    """Generates an image of every prompt before, during and after training, always from the same seeds.

    At step 50, for example, the callback writes a file such as `samples/step-000050-0.png` for each prompt, with prompt
    and seed as PNG text. Training is not affected: the networks' modes and all random states are restored, and the
    scheduler is a copy.

    Args:
        pipeline (`DiffusionPipeline`): Pipeline with the trained denoiser. All components must be on the same device.
        prompts (`Sequence[str]`): Prompt `i` always starts from the noise of `seed + i`.
        sources (`Sequence[PIL.Image.Image]`): Image that each prompt edits, for pipelines that edit images. The first
            prompt's image is copied to `samples/source-0.png`, and so on.
        every_n_steps (`int`, *optional*): Generate images after every so many optimizer steps; if unset, only before
            and after training.
        call_options (`dict`, *optional*): Further arguments of the pipeline's call, such as the images' size.
        denoiser_name (`str`): Attribute of the pipeline that is the trained denoiser. It runs under the autocast of
            training, other components in the precision of their weights.
        every_process (`bool`): Whether all processes must generate images, because each holds a shard of the denoiser;
            the Trainer's `model` then takes its place. Otherwise the first process does.
        frozen ([`FrozenComponents`], *optional*): Moves VAE and text encoders to the device while images are generated.
        images ([`TrackedImages`], *optional*): Sends each prompt's image to trackers, as `samples/0` and so on.
        scores ([`SampleScores`], *optional*): Scores the images with reward models.
        log (`Callable`): Logs metrics of the trainer, called in all processes with the scores.
        at_evaluations (`bool`): Whether to also generate images before each evaluation.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        *,
        sources: Sequence[Image.Image] = (),
        every_n_steps: int | None,
        seed: int,
        call_options: dict[str, Any] | None = None,
        denoiser_name: str = "unet",
        every_process: bool = False,
        frozen: FrozenComponents | None = None,
        images: TrackedImages | None = None,
        scores: SampleScores | None = None,
        log: Callable[[dict[str, float]], None] = lambda metrics: None,
        at_evaluations: bool = False,
    ):
        self.pipeline = pipeline
        self.prompts = list(prompts)
        self.sources = list(sources)
        self.every_n_steps = every_n_steps
        self.seed = seed
        self.call_kwargs = {**(call_options or {})}
        self.denoiser_name = denoiser_name
        self.every_process = every_process
        self.scores = scores
        self._frozen = frozen
        self._images = images or TrackedImages(())
        self._log = log
        self._at_evaluations = at_evaluations
        self._untracked: int | None = None  # step of images that are not yet sent to trackers
        self._settings = short_hash([self.call_kwargs, describe_component(pipeline.scheduler)])
        self.last_step: int | None = None  # step of the newest images; `None` before the first

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.last_step = None
        self._untracked = None
        if self.scores is not None:
            self.scores.step = None
        self._generate_once(args, state, state.global_step, kwargs.get("model"))

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._track(args)  # the trackers start after `on_train_begin`, so send the first images here
        self._log_scores(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        is_due = self.every_n_steps is not None and state.global_step % self.every_n_steps == 0
        if is_due or (self._at_evaluations and control.should_evaluate):
            self._report(args, state, control, state.global_step, kwargs.get("model"))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self._at_evaluations and control.should_evaluate:
            self._report(args, state, control, state.global_step, kwargs.get("model"))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._report(args, state, control, final_step(args, state) or state.global_step, kwargs.get("model"))

    def _report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, step: int, model: nn.Module | None
    ) -> None:
        self._generate_once(args, state, step, model)
        self._track(args)
        self._log_scores(state, control)

    def gallery(self, step: int) -> list[tuple[str, str]]:
        """Return the paths of a step's images, relative to the output folder, each with its prompt."""
        return [(f"{SAMPLES_FOLDER}/step-{step:06d}-{i}.png", prompt) for i, prompt in enumerate(self.prompts)]

    def newest_gallery(self) -> list[tuple[str, str]]:
        """Return the paths and prompts of the newest images and of their sources, or `[]` before the first images."""
        if self.last_step is None:
            return []
        sources = [(_source_path(i), f"Source of: {self.prompts[i]}") for i in range(len(self.sources))]
        return [*self.gallery(self.last_step), *sources]

    def comparison(self, folder: Path, step: int | None = None) -> list[SamplePair]:
        """Return pairs of images with the same prompt and seed, from before training and from `step` (default: the
        newest), without those of which a file is missing or has another prompt, seed or settings."""
        step = step or self.last_step
        if not step:
            return []
        galleries = zip(self.gallery(0), self.gallery(step), strict=True)
        pairs = []
        for i, ((before, prompt), (after, _)) in enumerate(galleries):
            if all(self._is_made_so(folder / path, i) for path in (before, after)):
                pairs.append(SamplePair(prompt, self.seed + i, before, after))
        return pairs

    def _are_written(self, folder: Path, step: int) -> bool:
        """Return whether the images of a step exist, with this callback's prompts, seeds, sources and settings."""
        return all(self._is_made_so(folder / path, i) for i, (path, _) in enumerate(self.gallery(step)))

    def _is_made_so(self, file: Path, index: int) -> bool:
        """Return whether a prompt's image was made as this callback makes it. Images of earlier versions have no
        settings."""
        return {"settings": self._settings, **_notes(file)} == self._note(index)

    def _note(self, index: int) -> dict[str, str]:
        """Return the text fields to write into the PNG file of a prompt's image."""
        note = {
            "prompt": without_secrets(self.prompts[index]),  # the images are published with the card
            "seed": str(self.seed + index),
            "settings": self._settings,
        }
        if self.sources:
            note["source"] = hashlib.sha256(self.sources[index].tobytes()).hexdigest()[:16]
        return note

    def _generate_once(self, args: TrainingArguments, state: TrainerState, step: int, model: nn.Module | None) -> None:
        if step == self.last_step:
            return
        self.last_step = step
        if self.every_process or state.is_world_process_zero:
            images = self.generate(training_autocast(args), through=model if self.every_process else None)
            if state.is_world_process_zero:
                self._write(output_folder(args), step, images)
        if self.scores is not None:
            self._score(args, state, step)

    def _write(self, folder: Path, step: int, images: Sequence[Image.Image]) -> None:
        (folder / SAMPLES_FOLDER).mkdir(parents=True, exist_ok=True)
        for i, (image, (path, _)) in enumerate(zip(images, self.gallery(step), strict=True)):
            note = PngInfo()
            for name, value in self._note(i).items():
                note.add_itxt(name, value)
            image.save(folder / path, pnginfo=note)
        for i, source in enumerate(self.sources):
            source.save(folder / _source_path(i))
        self._untracked = step

    def _score(self, args: TrainingArguments, state: TrainerState, step: int) -> None:
        """Score the sample images of a step. Call it in all processes."""
        assert self.scores is not None, "The callers check it."
        folder = output_folder(args)
        with _restored_random_state(args.device):
            if self.scores.step is None:
                is_known = not state.is_world_process_zero or self._are_written(folder, 0)
                is_missing = in_any_process(not is_known, args.device)
                if is_missing and self._at_evaluations:
                    raise UserError(
                        f"`metric_for_best_model={args.metric_for_best_model!r}` needs the sample images before "
                        f"training, and {folder / SAMPLES_FOLDER} has no such images of these prompts. Copy the images "
                        "from the folder of the earlier run, or choose another metric."
                    )
                self.scores.begin([] if is_missing else [folder / path for path, _ in self.gallery(0)])
            self.scores.measure(step, [folder / path for path, _ in self.gallery(step)])

    def _log_scores(self, state: TrainerState, control: TrainerControl) -> None:
        """Log the newest scores, unless they are already logged or belong to an earlier step."""
        if self.scores is None or self.scores.step != state.global_step:
            return
        logged = (entry for entry in state.log_history if entry["step"] == state.global_step)
        if not any(self.scores.metrics.keys() <= entry.keys() for entry in logged):
            trainer_logs = control.should_log  # `_log` clears `should_log`, but the trainer must still log
            self._log(self.scores.metrics)
            control.should_log = trainer_logs

    def _track(self, args: TrainingArguments) -> None:
        """Send the newest images to the trackers, if they were not sent before."""
        if self._untracked is not None:
            for i, (path, prompt) in enumerate(self.gallery(self._untracked)):
                self._images.add(f"{SAMPLES_FOLDER}/{i}", output_folder(args) / path, self._untracked, prompt)
            self._untracked = None

    def generate(
        self,
        autocast: contextlib.AbstractContextManager | None = None,
        through: nn.Module | None = None,
    ) -> list[Image.Image]:
        """Generate one image for each prompt, in the order of the prompts, with the current weights.

        Args:
            autocast (context manager, *optional*): Context of each call of the denoiser, reusable.
            through (`nn.Module`, *optional*): The denoiser as the engine wrapped it, called in place of the pipeline's.
        """
        none = contextlib.nullcontext()
        with (
            none if self._frozen is None else self._frozen.in_use(),
            self._prepared(autocast or none, through) as pipeline,
        ):
            return [self._generate_one(pipeline, i) for i in range(len(self.prompts))]

    @contextlib.contextmanager
    def _prepared(
        self, autocast: contextlib.AbstractContextManager, through: nn.Module | None
    ) -> Iterator[DiffusionPipeline]:
        """Yield a copy of the pipeline. Calls of this copy do not affect training."""
        pipeline = quiet_copy(self.pipeline)
        if "safety_checker" in pipeline.components:
            pipeline.safety_checker = None  # the checker is not on the device, and would turn images black
        networks = [network for network in pipeline.components.values() if isinstance(network, nn.Module)]
        denoiser = pipeline.components[self.denoiser_name]
        view = _InTrainingPrecision(denoiser, denoiser if through is None else through, autocast)
        with torch.no_grad(), eval_mode(networks), _restored_random_state(pipeline.device):
            pipeline.register_modules(**{self.denoiser_name: view})
            with in_own_precision(pipeline.vae):
                yield pipeline

    def _generate_one(self, pipeline: DiffusionPipeline, index: int) -> Image.Image:
        source = {"image": self.sources[index]} if self.sources else {}
        options = {**source, **self.call_kwargs}
        return draw_images(pipeline, self.prompts[index], noise_generator(self.seed + index), **options)[0]


def final_step(args: TrainingArguments, state: TrainerState) -> int | None:
    """Return the step of the best checkpoint if the trainer loads it at the end of training, else `None`. It may be
    earlier than `best_global_step`: the best step is not always saved."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    return int(Path(state.best_model_checkpoint).name.rpartition("-")[2])


def _source_path(index: int) -> str:
    return f"{SAMPLES_FOLDER}/source-{index}.png"


def _notes(file: Path) -> dict[str, str]:
    """Read the fields of [`SampleImagesCallback._note`] from a PNG file. Return `{}` if the file cannot be read."""
    try:
        with Image.open(file) as image:
            return {name: image.info[name] for name in ("prompt", "seed", "source", "settings") if name in image.info}
    except OSError:
        return {}


class _InTrainingPrecision(DenoiserView):
    """Denoiser under autocast. Inputs are cast to its dtype and outputs back to theirs: the frozen components may have
    another precision."""

    def __init__(self, denoiser: nn.Module, model: nn.Module, autocast: contextlib.AbstractContextManager):
        super().__init__(denoiser, model)
        self.__dict__["_autocast"] = autocast

    def forward(self, *args: Any, **inputs: Any) -> Any:
        dtype = next(value.dtype for value in (*args, *inputs.values()) if isinstance(value, torch.Tensor))
        with self._autocast:
            output = super().forward(*cast_floats(args, self.dtype), **cast_floats(inputs, self.dtype))
        return cast_floats(output, dtype)


def _restored_random_state(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context that restores the random states of the CPU and of the device."""
    if device.type in ("cpu", "mps"):  # `fork_rng` does not support Apple's
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
