"""Tune a text-to-image pipeline on preference pairs: a LoRA with `--use_peft`, otherwise all weights.

A LoRA of Stable Diffusion 1.5; put `sdxl`, `sd35` or `flux` in place of `sd15` for another model:

```bash
python examples/scripts/diffusion_sdpo.py --config sd15_lora --dataset_name OWNER/PREFERENCES
```

All weights of Stable Diffusion 1.5's UNet, on eight GPUs:

```bash
accelerate launch --num_processes 8 examples/scripts/diffusion_sdpo.py --config sd15_sigmoid \
    --dataset_name OWNER/PREFERENCES
```

It takes every option of `trl-diffusion-sdpo train`, except those that launch processes. `--config` reads options from
a YAML file: its path, or the name of one in `examples/configs`. The command line wins over the file. `--help` lists all
options. `--load_in_4bit true` quantizes the frozen base of a LoRA and needs bitsandbytes.
"""

import sys

from trl import get_peft_config, get_quantization_config

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.cli.pair_arguments import load_datasets, public_name
from trl_diffusion_sdpo.cli.train import parse


def main(argv=None):
    script_args, training_args, model_args = parse(sys.argv[1:] if argv is None else argv)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset = load_datasets(script_args, training_args)
    trainer = DiffusionSDPOTrainer(
        model_args.model_name_or_path,
        None,  # reference: the base without the LoRA, or a frozen copy if all weights are trained
        training_args,
        train_dataset,
        eval_dataset,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=public_name(script_args))


if __name__ == "__main__":
    main()
