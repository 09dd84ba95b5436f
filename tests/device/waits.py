"""Code locations at which a training step waits for the accelerator. The lists may only shrink: remove a wait that is
gone; a new wait is a defect. The remaining waits are in code of diffusers and transformers."""

# Once a micro-batch, by family: most of them send a tokenizer's numbers to the device, in the pipelines' own
# `encode_prompt`; `_ignore_...` ask whether any token is masked.
_CAUSAL = {"transformers/masking_utils.py::_ignore_causal_mask_sdpa": 2}
_BOTH_WAYS = {"transformers/masking_utils.py::_ignore_bidirectional_mask_sdpa": 1}
_FLUX = {
    "diffusers/pipelines/flux/pipeline_flux.py::_get_clip_prompt_embeds": 1,
    "diffusers/pipelines/flux/pipeline_flux.py::_get_t5_prompt_embeds": 1,
    "diffusers/pipelines/flux/pipeline_flux.py::encode_prompt": 1,
}
_STABLE_DIFFUSION = {"diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion.py::encode_prompt": 1}
A_MICRO_BATCH = {
    "aura_flow": {"diffusers/pipelines/aura_flow/pipeline_aura_flow.py::encode_prompt": 2, **_BOTH_WAYS},
    "chroma": {
        "diffusers/pipelines/chroma/pipeline_chroma.py::_get_t5_prompt_embeds": 2,
        "diffusers/pipelines/chroma/pipeline_chroma.py::encode_prompt": 1,
        **_BOTH_WAYS,
    },
    "cogview4": {"diffusers/pipelines/cogview4/pipeline_cogview4.py::_get_glm_embeds": 1},
    "ernie_image": {"diffusers/pipelines/ernie_image/pipeline_ernie_image.py::encode_prompt": 2},
    "flux": _FLUX,
    "flux2": {
        "diffusers/pipelines/flux2/pipeline_flux2.py::_get_mistral_3_small_prompt_embeds": 2,
        "diffusers/pipelines/flux2/pipeline_flux2.py::encode_prompt": 1,
        **_CAUSAL,
    },
    "flux2_klein": {
        "diffusers/pipelines/flux2/pipeline_flux2_klein.py::_get_qwen3_prompt_embeds": 2,
        "diffusers/pipelines/flux2/pipeline_flux2_klein.py::encode_prompt": 1,
        **_CAUSAL,
    },
    "flux_schnell": _FLUX,
    "hidream": {
        "diffusers/pipelines/hidream_image/pipeline_hidream_image.py::_get_clip_prompt_embeds": 2,
        "diffusers/pipelines/hidream_image/pipeline_hidream_image.py::_get_t5_prompt_embeds": 2,
        "diffusers/pipelines/hidream_image/pipeline_hidream_image.py::_get_llama3_prompt_embeds": 2,
        "transformers/masking_utils.py::_ignore_bidirectional_mask_sdpa": 1,
        "transformers/masking_utils.py::_ignore_causal_mask_sdpa": 2,
    },
    "hunyuan_dit": {
        "diffusers/pipelines/hunyuandit/pipeline_hunyuandit.py::encode_prompt": 4,
        "transformers/masking_utils.py::_ignore_bidirectional_mask_sdpa": 2,  # two text encoders
    },
    "ideogram4": {
        "diffusers/pipelines/ideogram4/pipeline_ideogram4.py::encode_prompt": 3,
        "diffusers/pipelines/ideogram4/pipeline_ideogram4.py::_prepare_ids": 3,
        "transformers/masking_utils.py::_ignore_causal_mask_sdpa": 1,
    },
    "krea2": {"transformers/tokenization_utils_base.py::to": 4, **_CAUSAL},
    "longcat_image": {
        "diffusers/pipelines/longcat_image/pipeline_longcat_image.py::_encode_prompt": 2,
        **_CAUSAL,
    },
    "lumina2": {
        "diffusers/pipelines/lumina2/pipeline_lumina2.py::_get_gemma_prompt_embeds": 3,
        "transformers/cache_utils.py::lazy_initialization": 1,
    },
    "ovis_image": {
        "diffusers/pipelines/ovis_image/pipeline_ovis_image.py::_get_ovis_prompt_embeds": 2,
        "diffusers/pipelines/ovis_image/pipeline_ovis_image.py::_prepare_prompt_embeds": 1,
        **_CAUSAL,
    },
    "pixart_alpha": {"diffusers/pipelines/pixart_alpha/pipeline_pixart_alpha.py::encode_prompt": 2, **_BOTH_WAYS},
    "pixart_sigma": {"diffusers/pipelines/pixart_alpha/pipeline_pixart_sigma.py::encode_prompt": 2, **_BOTH_WAYS},
    "qwen_image": {
        "transformers/tokenization_utils_base.py::to": 2,
        "diffusers/pipelines/qwenimage/pipeline_qwenimage.py::_extract_masked_hidden": 2,
        "diffusers/pipelines/qwenimage/pipeline_qwenimage.py::encode_prompt": 1,
        **_CAUSAL,
    },
    "qwen_image_21": {
        "transformers/feature_extraction_utils.py::maybe_to": 2,
        "diffusers/pipelines/qwenimage21/pipeline_qwenimage21.py::_extract_masked_hidden": 2,
        "diffusers/pipelines/qwenimage21/pipeline_qwenimage21.py::_get_qwen_prompt_embeds": 2,
        "diffusers/pipelines/qwenimage21/pipeline_qwenimage21.py::encode_prompt": 1,
        **_CAUSAL,
    },
    "sana": {
        "diffusers/pipelines/sana/pipeline_sana.py::_get_gemma_prompt_embeds": 2,
        "diffusers/pipelines/sana/pipeline_sana.py::encode_prompt": 2,
        "transformers/cache_utils.py::lazy_initialization": 1,
    },
    "stable_diffusion": _STABLE_DIFFUSION,
    "stable_diffusion_3": {
        "diffusers/pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py::_get_clip_prompt_embeds": 2,
        "diffusers/pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py::_get_t5_prompt_embeds": 1,
    },
    "stable_diffusion_v": _STABLE_DIFFUSION,
    "stable_diffusion_xl": {
        "diffusers/pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py::encode_prompt": 2
    },
    "wan": {"diffusers/pipelines/wan/pipeline_wan.py::_get_t5_prompt_embeds": 2, **_BOTH_WAYS},
    "z_image": {"diffusers/pipelines/z_image/pipeline_z_image.py::_encode_prompt": 4, **_CAUSAL},
}
# Every call of the denoiser, in its own code: how many tokens the masks leave, and positions held on the CPU.
A_PREDICTION = {
    "chroma": {"diffusers/models/transformers/transformer_chroma.py::forward": 1},
    "hidream": {
        "diffusers/models/transformers/transformer_hidream_image.py::patchify": 1,
        "trl_diffusion_sdpo/families/hidream.py::route": 2,  # once a layer
    },
    "longcat_image": {},
    "lumina2": {
        "diffusers/models/transformers/transformer_lumina2.py::forward": 1,
        "diffusers/models/transformers/transformer_lumina2.py::_get_freqs_cis": 3,
    },
    "qwen_image_21": {
        "diffusers/models/transformers/transformer_qwenimage21.py::forward": 12,
        "diffusers/models/transformers/transformer_qwenimage21.py::build_token_metadata": 2,
        "diffusers/models/transformers/transformer_qwenimage21.py::_qwenimage21_prefix_segments": 1,
    },
    "qwen_image": {"diffusers/models/transformers/transformer_qwenimage.py::compute_text_seq_len_from_mask": 1},
}
# Every prediction whose inner layers all train: the gradient of tokens that were written by a mask.
A_BACKWARD = {"qwen_image_21": {"torch::backward": 1}}
A_LOG = {
    "transformers/trainer.py::_maybe_log_save_evaluate": 2,  # the loss and the gradient's norm
    "trl_diffusion_sdpo/step/meters.py::drain": 1,
}
AN_EVALUATION = {
    "transformers/trainer_pt_utils.py::nested_numpify": 1,  # the losses
    "trl_diffusion_sdpo/step/meters.py::drain": 1,
    "trl_diffusion_sdpo/step/pair_evaluation.py::drain": 1,  # of noise bins
    "accelerate/utils/operations.py::_pad_across_processes": 2,  # the numbers of pairs, before these are exchanged
}
