"""DeepSpeed is an extra: without it, everything else works."""

import subprocess
import sys
import textwrap

SCRIPT = textwrap.dedent(
    """
    import sys

    sys.modules["deepspeed"] = None  # as Python has it where the package cannot be imported

    import datasets
    from peft import LoraConfig

    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    model, pairs, output = sys.argv[1:]
    args = DiffusionSDPOConfig(
        output, max_steps=2, save_steps=1, safeguard="parameter", report_to="none", use_cpu=True, disable_tqdm=True,
        sample_prompts=["a"], sample_kwargs={"num_inference_steps": 1}, sync_ref_model=True, ref_model_sync_steps=1,
    )
    data = datasets.load_from_disk(pairs)
    trainer = DiffusionSDPOTrainer(model, None, args, data, data, peft_config=LoraConfig(r=2))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    """
)


def test_training_needs_no_deepspeed(sd_folder, make_pairs, tmp_path):
    make_pairs(8).save_to_disk(str(tmp_path / "pairs"))
    command = [sys.executable, "-c", SCRIPT, sd_folder, str(tmp_path / "pairs"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
