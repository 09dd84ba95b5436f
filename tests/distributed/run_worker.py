"""Whole runs of a JSON file, one after another in the processes of `torchrun`: checkpoints, drawings, evaluation and
uploads, until a kill if the run asks for one. What tests look at lies in each run's own folder."""

import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from worker import RecordingTrainer, check_engine, engine_args, take_turns

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.engines import shared_loading
from trl_diffusion_sdpo.models.weight_copies import SecondDenoiser
from trl_diffusion_sdpo.reporting import run_callbacks
from trl_diffusion_sdpo.step import pair_evaluation
from trl_diffusion_sdpo.trainer import components

pair_evaluation.MOST_DRAWS = 1
run_callbacks.plot_curves = lambda *given: None  # half a second at every save and end

shared_loading.SMALLEST = 1  # byte: the second process maps all weights

LOAD_ONCE = components.load_once
LARGE = 500  # elements; ZeRO-3 leaves smaller weights where they are once gathered, by `engine_args`


class Watch(TrainerCallback):
    """Notes how the reference is held and what becomes of it, and ends this process where the run says so."""

    def __init__(self, run: dict, folder: Path):
        self.run, self.folder = run, folder
        self.trainer: RecordingTrainer | None = None  # set once there is one
        self.facts: dict = {}
        self.walk: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.facts["began_at"] = state.global_step
        self.facts["reference"] = self.trainer.reference.kind
        self.facts["share_at_begin"] = self._share()
        self.walk.append(self._weights())

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.run["killed_after"] and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):
        if self.run["every_step"]:
            self.walk.append(self._weights())

    def on_train_end(self, args, state, control, **kwargs):
        self.facts["share"] = self._share()
        self.walk.append(self._weights())

    def _weights(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "policy": whole(trained(self.trainer), self.trainer.model_wrapped),
            "reference": whole(reference_weights(self.trainer), *wrapped(self.trainer)),
        }

    def _share(self) -> float:
        for model in wrapped(self.trainer):
            put_away(model)
        return held_share(reference_weights(self.trainer).values())


def wrapped(trainer: RecordingTrainer) -> list[torch.nn.Module]:
    """The policy and a second denoiser, as the engine has wrapped them."""
    second = trainer.reference.second
    return [trainer.model_wrapped, *([second.engine_model] if isinstance(second, SecondDenoiser) else [])]


def trained(trainer: RecordingTrainer) -> dict[str, torch.Tensor]:
    named = trainer.denoiser.named_parameters()
    return {name.replace(".default.", "."): weight for name, weight in named if weight.requires_grad}


def reference_weights(trainer: RecordingTrainer) -> dict[str, torch.Tensor]:
    """Return the weights of the reference: a second model, a second adapter, or the base under the LoRA."""
    kind, named = trainer.reference.kind, dict(trainer.denoiser.named_parameters())
    if kind == "frozen":
        return dict(trainer.reference.module.named_parameters())
    if kind == "ref_adapter":
        return {name.replace(".ref.", "."): weight for name, weight in named.items() if ".ref." in name}
    return {name.replace(".base_layer", ""): weight for name, weight in named.items() if "lora_" not in name}


def held_share(weights: Iterable[torch.Tensor]) -> float:
    """How much of the weights lies in this process: 1 where they are whole, a half where two processes share them."""
    held = total = 0
    for weight in weights:
        if isinstance(weight, DTensor):
            held, total = held + weight.to_local().numel(), total + weight.numel()
        elif "ds_tensor" in vars(weight):
            assert weight.ds_numel <= LARGE or weight.numel() == 0, "A weight that ZeRO-3 shards lies there whole."
            held, total = held + weight.ds_tensor.numel(), total + weight.ds_numel
        else:
            held, total = held + weight.numel(), total + weight.numel()
    return held / total


def put_away(model: torch.nn.Module) -> None:
    """Shard weights again, because FSDP2 leaves the outermost ones gathered after a forward pass without gradients."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def whole(weights: dict[str, torch.Tensor], *models: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of weights that processes share, or have whole."""
    for model in models:
        put_away(model)
    return {name: whole_one(weight) for name, weight in weights.items()}


def whole_one(weight: torch.Tensor) -> torch.Tensor:
    if isinstance(weight, DTensor):
        return weight.full_tensor().clone()
    if "ds_tensor" not in vars(weight):
        return weight.detach().clone()
    with GatheredParameters([weight]):
        return weight.detach().clone()


def build_trainer(run: dict, folder: Path) -> RecordingTrainer:
    differs = run.get("differs", {}) if dist.get_rank() == 1 else {}
    engine = engine_args(run["engine"])
    for name, settings in run["engine_settings"].items():
        engine[name] = {**engine[name], **settings}
    args = DiffusionSDPOConfig(
        str(folder.parent / run["output"]),
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **engine,
        **{**run["args"], **differs},
    )
    data = datasets.load_from_disk(run["data"])
    evaluated = data.select(range(run["evaluated"])) if run["evaluated"] else None
    if run.get("streamed"):
        sets = {"whole": evaluated, "single": data.select([0])}
        evaluated = {name: pairs.to_iterable_dataset() for name, pairs in sets.items()}
    peft_config = None if run["peft"] is None else LoraConfig(**run["peft"])
    components.load_once = (lambda load, args: load()) if run["each_loads"] else LOAD_ONCE
    watch = Watch(run, folder)
    trainer = RecordingTrainer(
        run["model"], run["ref_model"], args, data, evaluated, peft_config=peft_config, callbacks=[watch]
    )
    trainer.compute_metrics = (lambda found: {"compared": len(found.predictions)}) if run.get("streamed") else None
    watch.trainer = trainer
    trainer.watch = watch
    return trainer


def train(run: dict, folder: Path) -> None:
    trainer = build_trainer(run, folder)
    trainer.train(resume_from_checkpoint=run["resumes"])
    check_engine(trainer, run["engine"])
    trainer.save_model()
    if run["pushes"]:
        trainer.push_to_hub()
    if dist.get_rank() == 0:
        facts = {**trainer.watch.facts, "steps_taken": len(trainer.batches)}
        (folder / "facts.json").write_text(json.dumps(facts))
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
        torch.save(trainer.watch.walk, folder / "walk.pt")


def train_refused(run: dict, folder: Path) -> None:
    """A run that must end in an error, of the user's or of the machine, in all processes."""
    try:
        train(run, folder)
    except (ValueError, OSError) as error:
        (folder / f"refused{dist.get_rank()}.txt").write_text(str(error))
    else:
        raise AssertionError("The run was not refused.")


def act(run: dict, folder: Path) -> None:
    (train_refused if run["refused"] else train)(run, folder)


if __name__ == "__main__":
    sys.exit(take_turns(act))
