"""Draw a prompt at several scales of preference guidance, one row of a grid for each, all from the same noise.

Scale 1 is the tuned model. Larger scales go further away from the reference, the model before training, and scale 0 is
the reference itself if classifier-free guidance is off. Here guidance acts only at noise levels below 0.62:

```bash
python examples/scripts/guided_sampling.py --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --lora path/to/run --prompt "a photo of a fox" --scales 0 1 2 3 4 --interval 0 0.62
```

A negative model, tuned with `--swap_labels`, can be the reference instead. `--form npo` combines the two as
Diffusion-NPO does, without a scale:

```bash
python examples/scripts/guided_sampling.py --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --lora path/to/run --negative_lora path/to/negative --form npo --prompt "a photo of a fox"
```
"""

import argparse

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from trl_diffusion_sdpo import preference_guidance


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Hub id or folder of the base pipeline")
    parser.add_argument("--lora", required=True, help="output folder of the training run, or Hub id of the LoRA")
    parser.add_argument("--negative_lora", help="LoRA of a run with `swap_labels`: the reference")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 2.0, 3.0, 4.0])
    parser.add_argument("--form", default="conditional", choices=("conditional", "npo"))
    parser.add_argument(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range of noise levels in [0, 1]"
    )
    parser.add_argument(
        "--allow_distilled", action="store_true", help="guide a model that was distilled to few steps, too"
    )
    parser.add_argument(
        "--guidance_scale", type=float, help="classifier-free guidance; the pipeline's default if unset"
    )
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=4, help="images at each scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="guided.png")
    return parser.parse_args(argv)


def load(args):
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(args.model_name_or_path, dtype=dtype)
    pipeline.load_lora_weights(args.lora, adapter_name="tuned")
    if args.negative_lora is not None:
        pipeline.load_lora_weights(args.negative_lora, adapter_name="negative")
    pipeline.set_adapters("tuned")
    return pipeline.to("cuda" if on_gpu else "cpu")


def main(argv=None):
    args = parse(argv)
    pipeline = load(args)
    call = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    guided = {
        "reference": None if args.negative_lora is None else "negative",
        "form": args.form,
        "allow_distilled": args.allow_distilled,
        "interval": None if args.interval is None else tuple(args.interval),
    }
    scales = [None] if args.form == "npo" else args.scales
    images = []
    for scale in scales:
        generators = [torch.Generator().manual_seed(args.seed + image) for image in range(args.images)]
        with preference_guidance(pipeline, scale, **guided):
            prompts = [args.prompt] * args.images
            steps = args.num_inference_steps
            images += pipeline(prompts, num_inference_steps=steps, generator=generators, **call).images
    make_image_grid(images, rows=len(scales), cols=args.images).save(args.output)
    print(f"Wrote {args.output}. Its rows have the scales {', '.join(map(str, scales))}")


if __name__ == "__main__":
    main()
