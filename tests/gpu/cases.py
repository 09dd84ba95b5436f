"""The runs of the smallest models on a GPU, as data."""

import importlib.util

STEPS = 4
# What a run does besides training: `resume` from its checkpoint of step 2, generate `samples`, `push`, `compile`, have
# an average and a `budget`, count the host's `waits` in each step, train bf16 weights with `stochastic` rounding.
PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
EMA_AND_BUDGET = {"ema_decay": 0.9, "winner_budget": 0.01, "winner_budget_kwargs": {"pairs": 2, "steps": 2}}
SAMPLES = {"sample_prompts": ["a cat"], "sample_steps": 2, "sample_kwargs": {"num_inference_steps": 2}}
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def entry(engine: str, tuning: str, safeguard: str, precision: str, *extras: str, family: str = "stable_diffusion"):
    stochastic = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
    stochastic |= {"model_init_kwargs": {"dtype": "bfloat16"}, "gradient_accumulation_steps": 1, "max_grad_norm": 0}
    name = "-".join([engine, tuning, safeguard, precision, *extras, *[family][: family != "stable_diffusion"]])
    args = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "steps" if "resume" in extras else "no",
        "save_steps": 2,
        "optim": "adamw_torch",
        "beta": 100.0,
        "safeguard": safeguard,
        "gradient_accumulation_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        **PRECISIONS[precision],
        **(EMA_AND_BUDGET if "budget" in extras else {}),
        **(SAMPLES if "samples" in extras else {}),
        **({"torch_compile": True} if "compile" in extras else {}),
        **(stochastic if "stochastic" in extras else {}),
    }
    return {"name": name, "engine": engine, "tuning": tuning, "family": family, "extras": extras, "args": args}


PLAIN = [
    entry("plain", "lora", "output", "fp32", "resume", "samples", "push"),
    entry("plain", "full", "parameter", "fp32", "resume"),
    entry("plain", "lora", "parameter", "bf16", "waits"),
    entry("plain", "full", "output", "bf16", "budget", "waits"),
    entry("plain", "full", "output", "bf16", "stochastic", "resume", "waits"),
    entry("plain", "lora", "output", "fp16"),
    entry("plain", "full", "parameter", "fp16"),
    entry("plain", "lora", "output", "bf16", "compile"),
    entry("plain", "qlora", "output", "bf16", "resume"),
    entry("plain", "lora", "parameter", "fp16", family="stable_diffusion_xl"),
    entry("plain", "full", "output", "bf16", family="flux"),
]
SHARDED = [
    made
    for engine in ENGINES
    for made in (
        entry(engine, "lora", "output", "bf16", "resume", "samples"),
        entry(engine, "full", "parameter", "fp32", "resume"),
        entry(engine, "full", "output", "fp16"),
    )
]
CASES = PLAIN + SHARDED


def engine_args(engine: str) -> dict:
    """The training arguments that choose an engine."""
    if engine in ("plain", "ddp"):
        return {}
    if engine == "fsdp2":
        wrapped = ["BasicTransformerBlock", "ResnetBlock2D"]
        return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": wrapped}}
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto", "initial_scale_power": 8},
            "zero_optimization": {
                "stage": int(engine.removeprefix("zero")),
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "zero_allow_untested_optimizer": True,
        }
    }


def skipped(run: dict) -> str | None:
    """Why a run is skipped; `None` if it is not."""
    if run["tuning"] == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if "stochastic" in run["extras"] and importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    if run["engine"].startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    return None
