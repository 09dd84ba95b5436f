# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-diffusion-sdpo"]
# ///
"""Tune all weights of Stable Diffusion 1.5's UNet on preference pairs.

```bash
accelerate launch examples/scripts/sd15_full.py --dataset_name OWNER/PREFERENCES --output_dir sd15-sdpo \\
    --learning_rate 2.05e-5 --per_device_train_batch_size 4 --gradient_accumulation_steps 64
```

Every option of `PairArguments`, of TRL's `ModelConfig` and of `DiffusionSDPOConfig` can be given, on the command line
or in a YAML file with `--config`; `--help` lists them.
"""

from trl import ModelConfig, TrlParser

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.cli.pair_arguments import PairArguments, load_datasets, public_name
from trl_diffusion_sdpo.cli.train import resume_point


def main(argv=None):
    parser = TrlParser((PairArguments, DiffusionSDPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        output_dir="sd15-sdpo",
        max_steps=2000,
        warmup_steps=500,
        proportion_empty_prompts=0.2,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
    )
    script_args, training_args, model_args = parser.parse_args_and_config(argv)
    if model_args.use_peft:
        parser.error("this script tunes all weights; a LoRA and its options belong to sd15_lora.py")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset = load_datasets(script_args, training_args)
    trainer = DiffusionSDPOTrainer(
        model_args.model_name_or_path,
        None,  # the reference: a frozen copy of the model as it is now
        training_args,
        train_dataset,
        eval_dataset,
    )
    trainer.train(resume_from_checkpoint=resume_point(training_args.resume_from_checkpoint))
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=public_name(script_args))


if __name__ == "__main__":
    main()
