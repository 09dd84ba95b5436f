"""Whole evaluations of tiny Stable Diffusion pipelines, scored by functions of the pixels."""

import base64
import hashlib
import html
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from local_hub import HubRepo
from peft import LoraConfig
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from tiny_clip import save_clip

from trl_diffusion_sdpo import Candidate, evaluate_models
from trl_diffusion_sdpo.cli.evaluate import _image_settings, make_parser
from trl_diffusion_sdpo.cli.images import candidate_of
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.tools.evaluation import evaluate, scoring
from trl_diffusion_sdpo.tools.evaluation.evaluate import RESULTS_FILE
from trl_diffusion_sdpo.tools.evaluation.images import (
    ImageSettings,
    diversity,
    facts_of,
    generate_images,
    image_path,
    load_candidate,
    record_settings,
    saturation,
)
from trl_diffusion_sdpo.tools.evaluation.prompts import PromptList
from trl_diffusion_sdpo.tools.evaluation.report import _examples, _url_of_file
from trl_diffusion_sdpo.tools.evaluation.results import Evaluation
from trl_diffusion_sdpo.tools.rewards import FunctionScorer, load_scorer
from trl_diffusion_sdpo.tools.rewards.vlm_server import VLMServerJudge
from trl_diffusion_sdpo.utils.files import MANIFEST_FILE, write_atomically

PROMPTS = ["a red circle", "two squares", "a tree", "a cat <b>&", "a dog", "the sea"]
SERVER = {"url": "http://127.0.0.1:9/v1", "model": "model"}  # nothing listens there
CALL = {"num_inference_steps": 2, "guidance_scale": 1.0}


def redness(images, prompts):
    pixels = [np.asarray(image, dtype=np.float64) for image in images]
    return [float(image[..., 0].mean() - image[..., 2].mean()) for image in pixels]


def brightness(images, prompts):
    return [float(np.asarray(image).mean()) for image in images]


SCORERS = [FunctionScorer("redness", redness), FunctionScorer("brightness", brightness)]


@pytest.fixture(scope="module")
def redder_folder(sd_folder, tmp_path_factory):
    """The tiny pipeline with a VAE that draws everything redder."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias[0] += 0.5
    folder = tmp_path_factory.mktemp("redder")
    pipeline.save_pretrained(folder)
    return str(folder)


def settings(**overrides):
    return ImageSettings(**{"seeds": (0, 1), "call_kwargs": CALL, "batch_size": 3, **overrides})


@pytest.fixture(scope="module")
def evaluated(sd_folder, redder_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    candidates = [Candidate("base", sd_folder), Candidate("redder", redder_folder)]
    return folder, candidates, evaluate_models(candidates, [*PROMPTS, "", PROMPTS[0]], SCORERS, folder, settings())


def test_a_model_that_draws_redder_wins_by_redness(evaluated):
    folder, _, evaluation = evaluated
    redder = next(one for one in evaluation.comparisons if one.scorer == "redness")
    assert redder.result.rate == 1.0 and redder.result.mean_change > 0
    assert redder.adjusted == pytest.approx(2 * 2 / 2**6)  # six of six prompts, two comparisons
    results = json.loads((folder / RESULTS_FILE).read_text())
    assert results["comparisons"][0]["verdict"] == redder.verdict
    assert evaluation.prompts.empty == evaluation.prompts.duplicates == 1
    assert "1 empty and 1 repeated" in " ".join(evaluation.notes)


def test_the_manifest_lists_each_image_once(evaluated):
    folder, _, _ = evaluated
    rows = [json.loads(line) for line in (folder / MANIFEST_FILE).read_text().splitlines()]
    assert len(rows) == len({row["image"] for row in rows}) == 2 * len(PROMPTS) * 2
    with Image.open(folder / rows[3]["image"]) as image:
        assert (image.text["prompt"], int(image.text["seed"])) == (rows[3]["prompt"], rows[3]["seed"])


def test_the_examples_of_the_report_are_the_seeds_that_changed_most_with_their_own_numbers(tmp_path):
    """The first prompt gains most on average, and loses at seed 0. Only the third loses on average."""
    base = np.zeros((3, 2))
    tuned = np.array([[-1.0, 9.0], [2.0, np.nan], [-3.0, 0.5]])
    for model in ("base", "tuned"):
        for index in range(3):
            for seed in (0, 1):
                path = image_path(tmp_path, model, index, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (40 * index, 100 * seed, 0)).save(path)
    evaluation = Evaluation(
        *(PromptList(("a", "b", "c")), (0, 1), ("base", "tuned"), {"red": {"base": base, "tuned": tuned}}),
        *((), {}, {}, (), ()),
    )
    (_, gains), (_, losses) = _examples(tmp_path, evaluation, "tuned")
    assert [(one["prompt"], one["change"]) for one in gains] == [("a", "+9"), ("b", "+2"), ("c", "+0.5")]
    assert [(one["prompt"], one["change"]) for one in losses] == [("c", "-3"), ("a", "-1")]
    assert gains[0]["after"] == _url_of_file(image_path(tmp_path, "tuned", 0, 1))
    assert losses[1]["after"] == _url_of_file(image_path(tmp_path, "tuned", 0, 0)) != gains[0]["after"]


def digests(folder):
    files = [*sorted((folder / "images").rglob("*.png")), folder / MANIFEST_FILE]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_evaluation_that_is_killed_ten_times_ends_with_the_same_bytes(
    sd_folder, redder_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server = multiprocessing.get_context("forkserver")  # a fork of this process may stop at a lock of OpenMP
    server.set_forkserver_preload(["trl_diffusion_sdpo.tools.evaluation.evaluate", "diffusers", "transformers"])
    candidates = [Candidate("base", sd_folder), Candidate("redder", redder_folder)]

    def start(folder):
        arguments = (candidates, PROMPTS, SCORERS, folder, settings(batch_size=1, seeds=(0, 1, 2, 3)))
        process = server.Process(target=evaluate_models, args=arguments)
        process.start()
        return process

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start(whole).join()
    moments = random.Random(0)
    for _ in range(10):
        enough = len(list(killed.rglob("*.png"))) + moments.randint(1, 4)  # of 48 images
        process = start(killed)
        while process.is_alive() and len(list(killed.rglob("*.png"))) < enough:
            process.join(0.002)
        process.join(moments.uniform(0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it had not ended
    start(killed).join()
    assert digests(killed) == digests(whole)
    assert (killed / RESULTS_FILE).read_bytes() == (whole / RESULTS_FILE).read_bytes()


def test_win_rates_depend_neither_on_the_order_of_prompts_and_seeds_nor_on_batches(evaluated, tmp_path):
    _, candidates, evaluation = evaluated
    other = settings(batch_size=1, seeds=(1, 0))
    again = evaluate_models(candidates, PROMPTS[::-1], SCORERS[::-1], tmp_path, other)
    for name in ("redness", "brightness"):
        for model in ("base", "redder"):
            scores = again.scores[name][model][::-1, ::-1]
            np.testing.assert_allclose(scores, evaluation.scores[name][model], atol=1)  # of 255: rounding
        first, second = (
            next(one.result for one in found.comparisons if one.scorer == name) for found in (evaluation, again)
        )
        assert (first.rate, first.p_value) == (second.rate, second.p_value)
        assert (first.low, first.high) == pytest.approx((second.low, second.high), abs=0.02)  # other resamples


def test_the_protocol_of_the_authors():
    words = ["--models", "base=model", "--prompts", "prompts.txt", "--output_dir", "out", "--protocol", "authors"]
    settings = _image_settings(make_parser().parse_args(words), "cpu")
    assert (settings.noise, settings.seeds) == ("shared", (0,))
    assert settings.call_kwargs == {"num_inference_steps": 50, "guidance_scale": 8.5}
    assert (settings.protocol, settings.dtype) == ("authors", torch.bfloat16)
    plain = _image_settings(make_parser().parse_args(words[:-2]), "cpu")
    assert (plain.protocol, plain.dtype, plain.noise) == (None, torch.float32, "prompt")


@pytest.mark.parametrize(
    ("kind", "folder"), [("StableDiffusionPipeline", "sd_folder"), ("StableDiffusionXLPipeline", "sdxl_folder")]
)
def test_the_authors_draw_with_euler_and_the_encoded_empty_prompt(kind, folder, request, tmp_path):
    """A second writing of the protocol with plain diffusers."""
    folder = request.getfixturevalue(folder)
    ours = settings(protocol="authors", seeds=(0,), noise="shared", call_kwargs={**CALL, "guidance_scale": 8.5})
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    before = (pipeline.scheduler, dict(pipeline.config))
    generate_images(Candidate("loaded", pipeline), PROMPTS[:1], ours, tmp_path)
    assert (pipeline.scheduler, dict(pipeline.config)) == before  # a copy has drawn
    generate_images(Candidate("folder", folder), PROMPTS[:1], ours, tmp_path)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    if kind.endswith("XLPipeline"):
        assert pipeline.config.force_zeros_for_empty_prompt
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    generator = torch.Generator().manual_seed(0)
    expected = pipeline(PROMPTS[0], generator=generator, **ours.call_kwargs).images[0]
    for name in ("loaded", "folder"):
        with Image.open(image_path(tmp_path, name, 0, 0)) as image:
            assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1


def test_the_authors_networks_are_bfloat16_and_their_vae_is_float32(sd_folder, tmp_path):
    ours = settings(protocol="authors", dtype=torch.bfloat16, seeds=(0,))
    family = load_candidate(Candidate("base", sd_folder), ours)
    dtypes = {
        name: next(part.parameters()).dtype
        for name, part in family.pipeline.components.items()
        if name in ("unet", "vae", "text_encoder")
    }
    assert dtypes == {"unet": torch.bfloat16, "vae": torch.float32, "text_encoder": torch.bfloat16}
    generate_images(Candidate("base", sd_folder), PROMPTS[:1], ours, tmp_path)
    assert image_path(tmp_path, "base", 0, 0).is_file()


class Judge(VLMServerJudge):
    """Answers itself: the redder image is better, or always the first."""

    asked = 0
    fair = True

    def _answer(self, images, question):
        self.asked += 1
        first, second = redness(images, None)
        return f"Image {1 if first > second or not self.fair else 2} is better"


def test_a_judge_sees_the_images_of_both_models_in_both_orders(evaluated, sd_folder, redder_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(evaluated[0], folder)
    judge = Judge("http://127.0.0.1:9/v1", "org/model")
    evaluation = evaluate_models(evaluated[1], PROMPTS, [judge], folder, settings())
    result = evaluation.comparisons[0].result
    assert (result.rate, result.ties, judge.asked) == (1.0, 0, 2 * 12)
    assert any("vlm_judge(model)" in note for note in evaluation.notes)
    assert not any("same score" in note and "base" in note.split("images of")[1] for note in evaluation.notes[1:])
    evaluate_models(evaluated[1], PROMPTS, [judge], folder, settings())
    assert judge.asked == 2 * 12  # the answers were saved
    shutil.rmtree(folder / "images" / "base")
    judge.fair = False
    evaluation = evaluate_models(evaluated[1], PROMPTS, [judge], folder, settings())  # new images, new answers
    assert (evaluation.comparisons[0].result.rate, evaluation.comparisons[0].result.ties) == (0.5, 12)
    with pytest.raises(ValueError, match="vlm_judge"):
        judge([], [])


def test_the_noise_is_of_prompt_and_seed_or_of_the_seed_alone():
    def noise(kind, prompt, seed):
        return torch.randn(4, generator=settings(noise=kind).generator(prompt, seed)).tolist()

    assert noise("prompt", "a", 0) == noise("prompt", "a", 0)
    assert len({tuple(noise("prompt", prompt, seed)) for prompt in "ab" for seed in (0, 1)}) == 4
    assert (
        noise("shared", "a", 0)
        == noise("shared", "b", 0)
        == torch.randn(4, generator=torch.Generator().manual_seed(0)).tolist()
    )


def test_other_settings_in_the_same_folder_are_refused(evaluated):
    folder, candidates, _ = evaluated
    with pytest.raises(ValueError, match="shared_call_kwargs"):
        evaluate_models(candidates, PROMPTS, SCORERS, folder, settings(call_kwargs={"num_inference_steps": 3}))
    with pytest.raises(ValueError, match="prompts"):
        evaluate_models(candidates, PROMPTS[:2], SCORERS, folder, settings())


def remembered(folder, candidate, base=None, **overrides):
    """Record what the images of a candidate depend on, as if they were generated or used again."""
    target = folder / "images" / candidate.name
    record_settings(target, facts_of(candidate, base, PROMPTS, settings(**overrides)))
    Image.new("RGB", (8, 8)).save(target / "00000-0.png")


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def write_bin(folder):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"other weights")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: edit_json(folder / "scheduler" / "scheduler_config.json", beta_end=0.5), "scheduler_config"),
        (lambda folder: edit_json(folder / "vae" / "config.json", scaling_factor=0.5), "vae/config.json"),
        (write_bin, r"pytorch_model\.bin"),
    ],
)
def test_images_are_refused_after_any_file_of_the_model_has_changed(change, named, sd_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(sd_folder, model)
    write_bin(model)
    remembered(tmp_path, Candidate("base", str(model)))
    remembered(tmp_path, Candidate("base", str(model)))
    change(model)
    with pytest.raises(ValueError, match=named):
        remembered(tmp_path, Candidate("base", str(model)))


def scale_latents(pipeline):
    pipeline.vae.register_to_config(scaling_factor=0.5)


def euler(pipeline):
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)


def other_text(pipeline):
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).add_(1)


@pytest.mark.parametrize(
    ("change", "named"), [(euler, "scheduler"), (scale_latents, "scaling_factor"), (other_text, "text_encoder")]
)
def test_images_are_refused_after_any_part_of_a_loaded_pipeline_has_changed(change, named, sd_pipeline, tmp_path):
    remembered(tmp_path, Candidate("base", sd_pipeline))
    change(sd_pipeline)
    with pytest.raises(ValueError, match=named):
        remembered(tmp_path, Candidate("base", sd_pipeline))


def test_images_are_refused_with_another_device_or_base_and_of_an_earlier_version(sd_folder, redder_folder, tmp_path):
    base, other, tuned = (
        *(Candidate("base", folder) for folder in (sd_folder, redder_folder)),
        Candidate("tuned", redder_folder, scale=2.0),
    )
    remembered(tmp_path, tuned, base)
    with pytest.raises(ValueError, match="device"):
        remembered(tmp_path, tuned, base, device="meta")
    with pytest.raises(ValueError, match="base_files.pipeline"):
        remembered(tmp_path, tuned, other)
    path = tmp_path / "images" / "tuned" / "settings.json"
    before = {name: value for name, value in json.loads(path.read_text()).items() if name != "format"}
    for text in (json.dumps(before), "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"settings\.json"):
            remembered(tmp_path, tuned, base)
        assert path.read_text() == text


def test_a_model_on_the_hub_is_known_by_its_commit_from_the_first_call_on(hub_server, tmp_path):
    hub_server.repos["org/model"] = HubRepo("org/model", False, {"model_index.json": b"{}"}, ["1" * 40])
    base = Candidate("base", "org/model")
    for _ in range(2):
        remembered(tmp_path, base)
    hub_server.repos["org/model"].commits.append("2" * 40)
    with pytest.raises(ValueError, match="2222"):
        remembered(tmp_path, base)


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    def write_while_another_writes(file):
        file.write(b"first")
        write_atomically(tmp_path / "scores.json", b"second")

    write_atomically(tmp_path / "scores.json", write_while_another_writes)
    assert (tmp_path / "scores.json").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_long_prompts_are_told_once_and_not_by_each_batch(sd_folder, tmp_path, caplog):
    long = [f"{index} " + "word " * 100 for index in range(3)]
    diffusers.utils.logging.enable_propagation()
    generate_images(Candidate("base", sd_folder), long, settings(batch_size=1, seeds=(0,)), tmp_path)
    diffusers.utils.logging.disable_propagation()
    said = [record.getMessage() for record in caplog.records if record.name.startswith(("diffusers", "trl_"))]
    assert len(said) == 1 and "3 of 3" in said[0]


def test_black_images_have_no_score_and_are_counted(sd_folder, tmp_path):
    generate_images(Candidate("base", sd_folder), PROMPTS, settings(), tmp_path)
    with Image.open(image_path(tmp_path, "base", 1, 0)) as image:
        size = image.size
    Image.new("RGB", size).save(image_path(tmp_path, "base", 1, 0))
    evaluation = evaluate_models([Candidate("base", sd_folder)], PROMPTS, SCORERS, tmp_path, settings())
    assert np.isnan(evaluation.scores["redness"]["base"]).sum() == 1
    assert evaluation.looks["base"]["black"] == 1 and "1 images of base are black" in " ".join(evaluation.notes)


def test_images_without_any_score_are_an_error_that_names_the_model(sd_folder, tmp_path):
    candidates = [Candidate("base", sd_folder), Candidate("dark", sd_folder)]
    for candidate in candidates:
        generate_images(candidate, PROMPTS[:2], settings(seeds=(0,)), tmp_path)
    for path in (tmp_path / "images" / "dark").glob("*.png"):
        Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(ValueError, match="dark"):
        evaluate_models(candidates, PROMPTS[:2], SCORERS, tmp_path, settings(seeds=(0,)))


def test_an_interrupted_scoring_continues_where_it_stopped(sd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "_SCORED_AT_ONCE", 5)
    scored = []

    def judge(images, prompts):
        if len(scored) == 5 and not resumed:
            raise RuntimeError("the server is gone")
        scored.extend(prompts)
        return brightness(images, prompts)

    arguments = [Candidate("base", sd_folder)], PROMPTS, [FunctionScorer("judge", judge)], tmp_path, settings()
    resumed = False
    with pytest.raises(RuntimeError, match="the server is gone"):
        evaluate_models(*arguments)
    resumed = True
    scores = evaluate_models(*arguments).scores["judge"]["base"]
    assert scored == [prompt for prompt in PROMPTS for _ in range(2)]  # each image once
    images = [Image.open(image_path(tmp_path, "base", index, seed)) for index in range(6) for seed in (0, 1)]
    assert scores.flatten().tolist() == pytest.approx(brightness(images, PROMPTS))


@pytest.fixture
def decoded(monkeypatch):
    """How often each PNG file is decoded. The report's thumbnails are left out."""
    counts = Counter()
    end = PngImageFile.load_end
    monkeypatch.setattr(PngImageFile, "load_end", lambda self: (counts.update([str(self.filename)]), end(self))[1])
    monkeypatch.setattr(evaluate, "write_report", lambda *_: None)
    return counts


def shrunk(images, prompts):
    """A user's function that changes its images in place."""
    for image in images:
        image.thumbnail((2, 2))
    return brightness(images, prompts)


def unscored(evaluated, folder):
    shutil.copytree(evaluated[0], folder)
    shutil.rmtree(folder / "scores")
    return folder


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[0, 1], [2, 3]]])
def test_each_image_is_decoded_once_for_all_scorers_on_the_device(groups, evaluated, decoded, tmp_path, monkeypatch):
    folder = unscored(evaluated, tmp_path / "copy")
    clip = load_scorer("clip_score", model=save_clip(tmp_path / "clip"), batch_size=5)
    judge = Judge("http://127.0.0.1:9/v1", "org/model")
    scorers = [FunctionScorer("shrunk", shrunk), SCORERS[0], clip, judge]
    monkeypatch.setattr(scoring, "fitting", lambda *_: groups)
    monkeypatch.setattr(scoring, "_SCORED_AT_ONCE", 5)
    evaluation = evaluate_models(evaluated[1], PROMPTS, scorers, folder, settings())
    assert set(decoded.values()) == {len(groups)} and len(decoded) == 24
    for model in ("base", "redder"):
        images = [Image.open(image_path(folder, model, *row)) for row in itertools.product(range(6), (0, 1))]
        prompts = [prompt for prompt in PROMPTS for _ in range(2)]
        for scorer, score in (("redness", redness), (clip.name, clip), ("shrunk", shrunk)):
            parts = [torch.as_tensor(score(images[i : i + 5], prompts[i : i + 5])) for i in range(0, 12, 5)]
            assert evaluation.scores[scorer][model].flatten().tolist() == torch.cat(parts).tolist()
    assert judge.asked == 24 and evaluation.scores[judge.name]["redder"].tolist() == [[1.0, 1.0]] * 6
    assert evaluation.looks == evaluated[2].looks
    decoded.clear()
    evaluate_models(evaluated[1], PROMPTS, scorers, folder, settings())
    assert set(decoded.values()) == {1}  # for the looks alone
    assert judge.asked == 24


@pytest.mark.parametrize(("scorers", "most"), [(SCORERS, 4), ([Judge("http://127.0.0.1:9/v1", "org/model")], 8)])
def test_few_decoded_images_are_held_at_once(scorers, most, evaluated, tmp_path, monkeypatch):
    folder = unscored(evaluated, tmp_path / "copy")
    images = []
    read = scoring._read

    def watched(path):
        image = read(path)
        images.append(weakref.ref(image))
        assert sum(each() is not None for each in images) <= most
        return image

    monkeypatch.setattr(scoring, "_read", watched)
    monkeypatch.setattr(scoring, "_SCORED_AT_ONCE", 4)
    evaluate_models(evaluated[1], PROMPTS, scorers, folder, settings())
    assert len(images) == 24


def test_scores_of_deleted_images_are_not_used_again(sd_folder, redder_folder, tmp_path):
    for folder in (sd_folder, redder_folder):
        candidates = [Candidate("base", sd_folder), Candidate("tuned", folder)]
        evaluation = evaluate_models(candidates, PROMPTS[:2], SCORERS, tmp_path, settings())
        shutil.rmtree(tmp_path / "images" / "tuned")  # so the error about other settings advises
    assert evaluation.comparisons[0].result.rate == 1.0


def test_a_model_that_could_not_be_loaded_can_be_corrected(sd_folder, tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        evaluate_models([Candidate("base", str(tmp_path))], PROMPTS[:1], SCORERS, tmp_path / "out", settings())
    evaluate_models([Candidate("base", sd_folder)], PROMPTS[:1], SCORERS, tmp_path / "out", settings())


def test_missing_and_constant_scores_are_noted(sd_folder, tmp_path):
    class Constant:
        """Gives the images of one prompt no score, like a server whose answer cannot be parsed."""

        name = "constant"

        def __call__(self, images, prompts):
            return torch.tensor([float("nan") if prompt == PROMPTS[1] else 1.0 for prompt in prompts])

    candidates = [Candidate("base", sd_folder), Candidate("same", sd_folder)]
    evaluation = evaluate_models(candidates, PROMPTS[:2], [Constant()], tmp_path, settings())
    assert evaluation.comparisons[0].result.rate == 0.5
    notes = " ".join(evaluation.notes)
    assert "constant gave no score to 2 images of same" in notes and "constant gave all images of same" in notes


@pytest.mark.parametrize(
    ("names", "prompts", "scorers", "match"),
    [
        ([], PROMPTS, ["red"], "models"),
        (["a", "a"], PROMPTS, ["red"], "models"),
        (["../x"], PROMPTS, ["red"], "name"),
        (["a"], PROMPTS, ["module:red", "module_red"], "module_red"),
        (["a"], "prompts.txt", ["red"], r"prompts\.txt"),
    ],
)
def test_wrong_names_and_prompts_are_refused(names, prompts, scorers, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        functions = [FunctionScorer(name, redness) for name in scorers]
        evaluate_models([Candidate(name, "model") for name in names], prompts, functions, tmp_path)


def test_without_scorers_the_report_shows_images_and_no_win_rates(sd_folder, tmp_path):
    settings = ImageSettings(call_kwargs={"num_inference_steps": 1, "guidance_scale": 1.0})
    models = [Candidate("base", sd_folder), Candidate("same", sd_folder)]
    evaluate_models(models, ["a bench", "a tree"], [], tmp_path, settings)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 4 and "Win rates" not in page
    assert "Win rate" not in (tmp_path / "report.md").read_text().split("A scorer is")[0]


def test_looks_by_hand():
    black, red = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert saturation(red) == 1.0 and saturation(black) == 0.0
    # One channel of three differs, in two of three pairs.
    assert diversity(np.stack([black, red, red])) == pytest.approx(2 / 3 * (1 / 3) ** 0.5)
    assert np.isnan(diversity(red[None]))


def test_images_of_other_weights_under_the_same_name_are_refused(sd_pipeline, tmp_path):
    evaluate_models([Candidate("base", sd_pipeline)], PROMPTS[:1], SCORERS, tmp_path, settings())
    with torch.no_grad():
        sd_pipeline.unet.conv_out.weight.mul_(1.1)
    with pytest.raises(ValueError, match="weights"):
        evaluate_models([Candidate("base", sd_pipeline)], PROMPTS[:1], SCORERS, tmp_path, settings())
    with pytest.raises(ValueError, match="`lora`"):
        Candidate("tuned", sd_pipeline, lora="folder")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base=org/model", ("base", "org/model", None, None)),
        ("a=org/model+folder/lora", ("a", "org/model", "folder/lora", None)),
        ("a=run@3", ("a", "run", None, 3.0)),
    ],
)
def test_models_are_named_on_the_command_line(text, expected):
    one = candidate_of(text)
    assert (one.name, one.model, one.lora, one.scale) == expected
    for wrong in ("org/model", "a=", "a=run@x"):
        with pytest.raises(ValueError, match="NAME=MODEL|scale"):
            candidate_of(wrong)


def test_models_in_paths_with_the_signs_of_loras_and_scales_are_found(tmp_path):
    model, lora = tmp_path / "a+b@c", tmp_path / "lo+ra@2"
    for folder in (model, lora):
        folder.mkdir()
    for source, expected in (
        (f"{model}", (str(model), None, None)),
        (f"{model}@3", (str(model), None, 3.0)),
        (f"{model}+{lora}", (str(model), str(lora), None)),
        (f"{model}+{lora}@0.5", (str(model), str(lora), 0.5)),
        (f"org/model+{lora}", ("org/model", str(lora), None)),
        ("/no/such+lora@2", ("/no/such", "lora", 2.0)),
    ):
        one = candidate_of(f"name={source}")
        assert (one.model, one.lora, one.scale) == expected


def command(sd_folder, redder_folder, folder, prompts):
    return [
        "evaluate",
        *("--models", f"base={sd_folder}", f"redder={redder_folder}"),
        *("--prompts", str(prompts), "--scorers", f"{__name__}:redness", "--device", "cpu"),
        *("--call_kwargs", json.dumps(CALL), "--batch_size", "2", "--output_dir", str(folder)),
    ]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def test_the_command_writes_the_report_and_prints_the_verdict(sd_folder, redder_folder, prompt_file, tmp_path, capsys):
    assert main(command(sd_folder, redder_folder, tmp_path, prompt_file)) == 0
    printed = capsys.readouterr().out
    assert "redder is better than base" in printed and "report.html" in printed
    page = (tmp_path / "report.html").read_text()
    assert "a cat &lt;b&gt;&amp;" in page and "<b>&" not in page  # a prompt is text
    assert "http" not in page.replace("http://www.w3.org", "")
    assert f"diffusers {diffusers.__version__}" in page
    assert "redder is better" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--max_prompts", "-1"], "-1"),
        (["--call_kwargs", '{"steps": 2}'], "'steps'"),
        (["--scorer_settings", '{"pickscore": {"batch_size": 2}}'], "pickscore"),
        (["--scorer_settings", "[1]"], "[1]"),
        (["--scorers", "vlm_server", "--scorer_settings", json.dumps({"vlm_server": SERVER})], "127.0.0.1:9"),
        (["--scorers", "no_such_module:judge"], "no_such_module"),
        (["--call_kwargs", '{"prompt": "x"}'], "'prompt'"),
        (["--call_kwargs", '{"num_inference_steps": 0}'], "got 0"),
        (["--call_kwargs", '{"height": 7, "width": 8}'], "7"),
        (["--call_kwargs", '{"guidance_scale": "strong"}'], "strong"),
        (["--models", "base=/no/such/model"], "/no/such/model"),
        (["--device", "gpu"], "gpu"),
        pytest.param(
            ["--device", "cuda"], "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
        ),
        (["--output_dir", __file__], __file__),
        (["--output_dir", f"{__file__}/below"], __file__),
    ],
)
def test_a_bad_option_is_one_line(words, match, sd_folder, redder_folder, prompt_file, tmp_path, capsys):
    assert main([*command(sd_folder, redder_folder, tmp_path, prompt_file), *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and match in lines[0]


def test_the_report_shows_the_training_of_a_run(plotted, sd_folder, make_trainer, make_pairs, tmp_path):
    run = tmp_path / "run"
    evaluations = {"eval_dataset": make_pairs(4, seed=5), "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(peft_config=LoraConfig(r=2), **evaluations)
    trainer.train()
    trainer.save_model()
    candidates = [
        Candidate("base", sd_folder),
        *(Candidate(f"tuned-{scale}", str(run), scale=scale) for scale in (1.0, 2.0)),  # one run, shown once
    ]
    evaluate_models(candidates, PROMPTS[:1], SCORERS, tmp_path / "evaluation", settings(seeds=(0,)))
    page = (tmp_path / "evaluation" / "report.html").read_text()
    for name in ("curves.png", "noise_bins.png"):
        assert page.count(base64.b64encode((run / name).read_bytes()).decode()) == 1
    assert html.escape(json.loads((run / "verdict.json").read_text())["sentence"]) in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_two_processes_write_what_one_does(sd_folder, redder_folder, prompt_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(command(sd_folder, redder_folder, one, prompt_file)) == 0
    arguments = command(sd_folder, redder_folder, two, prompt_file)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(Path(__file__).parent), *(str(Path(__file__).parents[up]) for up in (2, 3))])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launched = [*launch, "-m", "trl_diffusion_sdpo", *arguments]
    done = subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert digests(two) == digests(one)
    assert json.loads((two / RESULTS_FILE).read_text()) == json.loads((one / RESULTS_FILE).read_text())
