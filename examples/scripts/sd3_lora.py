# /// script
# requires-python = ">=3.10"
# dependencies = ["trl-diffusion-sdpo"]
# ///
"""Tune a LoRA of Stable Diffusion 3.5 Medium on preference pairs.

```bash
python examples/scripts/sd3_lora.py --dataset_name OWNER/PREFERENCES --output_dir sd35-sdpo-lora
```

Every option of TRL's `ScriptArguments` and `ModelConfig` and of `DiffusionSDPOConfig` can be given, on the command line
or in a YAML file with `--config`; `--help` lists them. Stable Diffusion 3 Medium and 3.5 Large are other values of
`--model_name_or_path`.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer


def main(argv=None):
    parser = TrlParser((ScriptArguments, DiffusionSDPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="stabilityai/stable-diffusion-3.5-medium",
        output_dir="sd35-sdpo-lora",
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

    def load(split):
        name, config = script_args.dataset_name, script_args.dataset_config
        return load_dataset(name, name=config, split=split, streaming=script_args.dataset_streaming)

    trainer = DiffusionSDPOTrainer(
        model_args.model_name_or_path,
        None,  # the reference: the model with its LoRA switched off
        training_args,
        load(script_args.dataset_train_split),
        load(script_args.dataset_test_split) if training_args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main()
