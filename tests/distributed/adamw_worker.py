"""A few steps with lambda bounded by AdamW's own step, under the engine that the first argument names; writes the
logged lambdas to the file that the second names."""

import json
import sys
import tempfile
from pathlib import Path

import datasets
from worker import RecordingTrainer, check_engine, engine_args

from trl_diffusion_sdpo import DiffusionSDPOConfig

engine, file, model, data, metric = sys.argv[1:]
args = DiffusionSDPOConfig(
    tempfile.mkdtemp(),
    per_device_train_batch_size=2,
    max_steps=3,
    learning_rate=1e-3,
    beta=500.0,
    weight_decay=0.01,
    safeguard="parameter",
    safeguard_mu=0.1,
    safeguard_anchor="error",
    safeguard_preconditioner=metric,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    **engine_args(engine),
)
trainer = RecordingTrainer(model, None, args, datasets.load_from_disk(data))
trainer.train()
check_engine(trainer, engine)
if trainer.is_world_process_zero():
    scales = [entry["safeguard/scale"] for entry in trainer.state.log_history if "safeguard/scale" in entry]
    Path(file).write_text(json.dumps(scales), encoding="utf-8")
