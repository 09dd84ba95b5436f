"""Train the cases of a JSON file one after another in the processes of `torchrun`, because engines start slowly and
run fast at this size. Each case writes below its own folder."""

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import datasets
import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

SECONDS = 60  # a process that waits longer for the other has lost it


class RecordingTrainer(DiffusionSDPOTrainer):
    """Notes which batches this process was given, and makes accelerate's FSDP2 path available on CPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.batches = []
        if self.args.fsdp_plugin_args is None:
            return
        # Several CPUs count as MULTI_CPU, for which accelerate has no branch: the plugin would be ignored.
        state = self.accelerator.state
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if self.args.mixed_precision != "no":
            plugin.set_mixed_precision(self.args.mixed_precision)
        state.fsdp_plugin = plugin
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True

    def precompute_reference_errors(self) -> None:
        """Counts the batches whose reference errors this process computes."""
        self.computed, compute = 0, self.pair_forward.reference_errors

        def counted(*given, **how):
            self.computed += 1
            return compute(*given, **how)

        self.pair_forward.reference_errors = counted
        super().precompute_reference_errors()

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(inputs)
        return super().training_step(model, inputs, num_items_in_batch)


def engine_args(engine: str) -> dict:
    """The arguments that choose an engine."""
    if engine == "ddp":
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
            "zero_optimization": {
                "stage": int(engine.removeprefix("zero")),
                "stage3_param_persistence_threshold": 500,  # larger weights come and go, smaller ones stay
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "zero_allow_untested_optimizer": True,
        }
    }


def build_trainer(case: dict, folder: Path) -> RecordingTrainer:
    model = case["model"]
    if case["lora"] is not None:
        # Load before making the arguments: afterwards transformers loads for ZeRO-3 and would shard the text encoder.
        model = StableDiffusionPipeline.from_pretrained(model)
        model.load_lora_weights(case["lora"], adapter_name="default")
    engine = engine_args(case["engine"])
    if case.get("own_linear"):  # as before ZeRO-3 replaces it
        engine["deepspeed"]["zero_optimization"]["memory_efficient_linear"] = False
    own_folder = {"precompute_dir": str(folder / "computed")} if "precompute_ref_errors" in case["args"] else {}
    args = DiffusionSDPOConfig(
        str(folder / "saved"),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **engine,
        **{**own_folder, **case["args"]},
    )
    peft_config = None if case["peft"] is None else LoraConfig(**case["peft"])
    data = datasets.load_from_disk(case["data"])
    return RecordingTrainer(model, case["ref_model"], args, data, peft_config=peft_config)


def check_engine(trainer: RecordingTrainer, engine: str) -> None:
    """An engine that silently is another one would pass every comparison."""
    state, wrapped = trainer.accelerator.state, trainer.model_wrapped
    assert dist.get_world_size() == state.num_processes == int(os.environ["WORLD_SIZE"]) == 2
    if engine == "ddp":
        assert state.distributed_type == DistributedType.MULTI_CPU
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    elif engine == "fsdp2":
        assert state.distributed_type == DistributedType.FSDP
        assert all(isinstance(parameter, DTensor) for parameter in wrapped.parameters())
    else:
        stage = int(engine.removeprefix("zero"))
        assert state.distributed_type == DistributedType.DEEPSPEED
        assert wrapped.zero_optimization_stage() == stage
        sharded = [parameter for parameter in wrapped.module.parameters() if "ds_tensor" in vars(parameter)]
        assert len(sharded) == (len(list(wrapped.module.parameters())) if stage == 3 else 0)


def run(case: dict, folder: Path) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)  # a fresh LoRA starts at random
    trainer = build_trainer(case, folder)
    if rank == 0 and case["peft"] is not None:
        torch.save(get_peft_model_state_dict(trainer.denoiser), folder / "start.pt")
    trainer.train()
    check_engine(trainer, case["engine"])
    trainer.save_model()
    torch.save(trainer.batches, folder / f"batches{rank}.pt")
    facts = {"reference": trainer.reference.kind, "computed": trainer.computed}
    (folder / f"reference{rank}.json").write_text(json.dumps(facts))
    if rank == 0:
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


def forget_engine() -> None:
    """Accelerate and transformers remember the last engine, in the environment and in state of their own."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    gc.collect()


def take_turns(act: Callable[[dict, Path], None]) -> int:
    """Do what the JSON file of the first argument lists, one after the other, each below the folder of the second.

    Returns:
        `int`: The exit code. One that fails is the last: the other process may wait elsewhere, and those left get a
        new group.
    """
    listed, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    gc.freeze()  # the many objects of the libraries need not be looked at after every turn
    rank = dist.get_rank()
    for entry in listed:
        folder = output / entry["name"]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            act(entry, folder)
            dist.barrier()
            (folder / f"done{rank}").touch()
        except Exception:
            (folder / f"error{rank}.txt").write_text(traceback.format_exc())
            return 1
        forget_engine()
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(take_turns(run))
