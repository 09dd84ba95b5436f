# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-diffusion-sdpo"]
# ///
"""Tune a LoRA of Stable Diffusion XL on preference pairs.

```bash
python examples/scripts/sdxl_lora.py --dataset_name OWNER/PREFERENCES --output_dir sdxl-sdpo-lora
```

Every option of `PairArguments`, of TRL's `ModelConfig` and of `DiffusionSDPOConfig` can be given, on the command line
or in a YAML file with `--config`; `--help` lists them.
"""

from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.cli.pair_arguments import PairArguments, load_datasets, public_name
from trl_diffusion_sdpo.cli.train import resume_point


def main(argv=None):
    parser = TrlParser((PairArguments, DiffusionSDPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0",
        output_dir="sdxl-sdpo-lora",
        dtype="bfloat16",  # the frozen base; the LoRA is float32
        bf16=True,
        use_peft=True,
        lora_dropout=0.0,  # dropout would part the policy from its reference
        max_steps=1000,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=64,
        gradient_checkpointing=True,
    )
    script_args, training_args, model_args = parser.parse_args_and_config(argv)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset = load_datasets(script_args, training_args)
    trainer = DiffusionSDPOTrainer(
        model_args.model_name_or_path,
        None,  # the reference: the model with its LoRA switched off
        training_args,
        train_dataset,
        eval_dataset,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.train(resume_from_checkpoint=resume_point(training_args.resume_from_checkpoint))
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=public_name(script_args))


if __name__ == "__main__":
    main()
