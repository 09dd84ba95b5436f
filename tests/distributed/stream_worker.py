"""Train on a shuffled stream, in the processes of `torchrun` or in one, and note every micro-batch's prompts and
optimizer step. A second start resumes from the newest checkpoint."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets  # noqa: E402
from conftest import build_pairs  # noqa: E402
from tiny_pipelines import quiet, stable_diffusion  # noqa: E402

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer  # noqa: E402


class NotingTrainer(DiffusionSDPOTrainer):
    notes: Path

    def note(self, *what):
        with open(self.notes, "a") as file:
            file.write(json.dumps(what) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.note(
            self.state.global_step, [inputs["prompts"], inputs["pixel_values"].flatten(1).float().sum(1).tolist()]
        )
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def main(folder: Path, steps: int, workers: int, kind: str) -> None:
    rows = build_pairs(23, size=(16, 16)).cast_column("chosen", datasets.Image(decode=False)).to_list()
    rows = [{**row, "prompt": f"prompt {number}"} for number, row in enumerate(rows)]
    rows[4]["chosen"] = {"bytes": b"junk", "path": None}
    if kind == "single images":
        rows = [
            {"prompt": row["prompt"], "image": row["chosen"], "label": number % 3 > 0}
            for number, row in enumerate(rows)
        ]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=1, buffer_size=6)
    args = DiffusionSDPOConfig(
        str(folder / "run"),
        loss_type="tgo" if kind == "single images" else "sigmoid",
        max_steps=steps,
        save_steps=2,
        save_total_limit=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        dataloader_num_workers=workers,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    pipeline = quiet(stable_diffusion.build())
    trainer = NotingTrainer(pipeline, None, args, stream)
    trainer.notes = folder / f"notes-{args.process_index}.jsonl"
    trainer.note("start", [])
    trainer.train(resume_from_checkpoint="latest")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
