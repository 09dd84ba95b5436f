"""Train the runs of a JSON file on the pretend device, and write each one's result: the waits of a step, or the
error."""

import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path

os.environ["ACCELERATE_TORCH_DEVICE"] = "pretend:0"

import datasets
import pretend_device
import torch
from peft import LoraConfig
from tiny_pipelines import quiet
from transformers import TrainerCallback

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.models.pipelines import load_pipeline
from trl_diffusion_sdpo.models.weight_copies import SecondDenoiser
from trl_diffusion_sdpo.step import pair_evaluation

pair_evaluation.MOST_DRAWS = 1  # as in tests/conftest.py


class BetweenSteps(TrainerCallback):
    """Counts waits from the end of one step to the end of the next. The first step, which allocates state, is left
    out."""

    def __init__(self):
        self.counts: list[Counter] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(pretend_device.WAITS.copy())
        pretend_device.WAITS.clear()

    def most(self) -> dict[str, int]:
        """The largest count of a step for every code location."""
        most: Counter = Counter()
        for counts in self.counts[1:]:
            most |= counts
        return dict(most)


class Watched(DiffusionSDPOTrainer):
    """Notes where frozen copies of the denoiser are while pairs are encoded, and whether batches come pinned."""

    def _prepare_data(self, *given):
        self.while_encoding = sorted({weight.device.type for weight in self._copies()})
        self.are_pinned: set[bool] = set()
        prepared = super()._prepare_data(*given)
        self.encoding_waits = sorted(place for place in pretend_device.WAITS if "/cache/encoding.py" in place)
        return prepared

    def _copies(self):
        for weights in self._weight_copies:
            yield from weights.second.module.parameters() if isinstance(weights.second, SecondDenoiser) else ()

    def _prepare_inputs(self, inputs):
        self.are_pinned |= {value.is_pinned() for value in inputs.values() if isinstance(value, torch.Tensor)}
        return super()._prepare_inputs(inputs)


def build(case: dict, pipeline, folder: Path, watch: BetweenSteps) -> Watched:
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1000,  # another case tests logs
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "adamw_torch",
    }
    if "precompute_latents" in case["args"]:
        settings["precompute_dir"] = str(folder / "cache")
    data = datasets.load_from_disk(case["data"])
    if case["edits"]:
        data = datasets.Dataset.from_list([{**row, "source": row["chosen"]} for row in data])
    return Watched(
        pipeline,
        None,
        DiffusionSDPOConfig(str(folder), **{**settings, **case["args"]}),
        data,
        data.select(range(3)) if case["evaluates"] else None,
        peft_config=LoraConfig(r=2) if case["tuning"] == "lora" else None,
        callbacks=[watch],
    )


def run(case: dict, pipeline, folder: Path) -> dict:
    watch = BetweenSteps()
    trainer = build(case, pipeline, folder, watch)
    if case["waits"]:
        loss_of = trainer.pair_forward.loss

        def with_item(*args, **kwargs):
            outputs = loss_of(*args, **kwargs)
            outputs.loss.item()
            return outputs

        trainer.pair_forward.loss = with_item
    trainer.train(resume_from_checkpoint=case["resumes"] and str(folder.parent / case["resumes"]))
    if case["saves"]:
        trainer.save_model()
    parts = (getattr(trainer.family.pipeline, name) for name in trainer.family.frozen_components)
    with pretend_device.unnoticed():
        weights = sum(float(weight.double().abs().sum()) for weight in trainer.denoiser.state_dict().values())
    return {
        "waits": watch.most(),
        "steps": trainer.state.global_step,
        "log": trainer.state.log_history,
        "sum": weights,
        "on_device": all(weight.device.type == pretend_device.NAME for weight in trainer.denoiser.parameters()),
        "frozen": sorted({weight.device.type for part in parts for weight in part.parameters()}),
        "copies": sorted({weight.device.type for weight in trainer._copies()}),
        "while_encoding": trainer.while_encoding,
        "encoding_waits": trainer.encoding_waits,
        "pinned": sorted(trainer.are_pinned),
    }


def main(file: str, folder: str) -> None:
    cases = json.loads(Path(file).read_text())
    pipelines = [quiet(load_pipeline(case["model"])) for case in cases]
    pretend_device.install()
    for case, pipeline in zip(cases, pipelines, strict=True):
        pretend_device.WAITS.clear()
        place = Path(folder) / case["name"]
        place.mkdir()  # started
        try:
            found = run(case, pipeline, place)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, FloatingPointError):
            found = {"error": traceback.format_exc()[-4000:]}
        (place / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
