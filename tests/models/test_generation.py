"""Images that the trainer and the tools draw, by plain diffusers."""

import numpy as np
import torch
from PIL import Image

from trl_diffusion_sdpo import Candidate
from trl_diffusion_sdpo.models.generation import draw_images, quiet_copy
from trl_diffusion_sdpo.reporting.sample_images import SampleImagesCallback
from trl_diffusion_sdpo.tools.demo import pipeline as demo
from trl_diffusion_sdpo.tools.evaluation.images import ImageSettings, generate_images, image_path

CALL = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 32, "width": 32}
PROMPT = "a red circle"


def test_sample_images_evaluation_and_demo_draw_what_plain_diffusers_draws(tmp_path):
    """Each starts from the noise of seed 5, and all pixels are equal."""
    pipeline = demo.load_base_pipeline()
    expected = pipeline(PROMPT, generator=torch.Generator().manual_seed(5), **CALL).images[0]
    sampled = SampleImagesCallback(pipeline, [PROMPT], every_n_steps=None, seed=5, call_options=CALL).generate()[0]
    generate_images(
        Candidate("loaded", pipeline), [PROMPT], ImageSettings(seeds=(5,), noise="shared", call_kwargs=CALL), tmp_path
    )
    with Image.open(image_path(tmp_path, "loaded", 0, 5)) as image:
        evaluated = np.asarray(image)
    latents = torch.randn(1, *demo.LATENT_SHAPE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        demonstrated = demo.generate_images(pipeline, [PROMPT], latents, steps=3)[0]
    for drawn in (sampled, evaluated, demonstrated):
        assert (np.asarray(drawn) == np.asarray(expected)).all()


def test_a_copy_shares_networks_and_leaves_the_pipeline_as_it_was(sd_pipeline):
    scheduler = sd_pipeline.scheduler
    before = dict(sd_pipeline.config)
    copied = quiet_copy(sd_pipeline)
    draw_images(copied, PROMPT, num_inference_steps=2)
    assert copied.unet is sd_pipeline.unet and copied.scheduler is not scheduler
    assert sd_pipeline.scheduler is scheduler and scheduler.num_inference_steps is None
    assert dict(sd_pipeline.config) == before


def test_of_a_video_the_first_frame_is_drawn():
    frames = [Image.new("RGB", (2, 2), (value, 0, 0)) for value in (7, 8)]

    def video(prompt, generator, return_dict):
        return ([frames for _ in prompt],)

    assert [image.getpixel((0, 0))[0] for image in draw_images(video, ["a", "b"])] == [7, 7]
