"""Training on encoded pairs equals training without a cache: batches, losses and weights. The cache is built once,
and its key holds all that it depends on."""

import json
import os
import resource
import shutil

import datasets
import pytest
import torch
from diffusers.utils import is_ftfy_available
from tiny_pairs import picture
from tiny_pipelines import case, quiet

from trl_diffusion_sdpo.cache import encoding, key
from trl_diffusion_sdpo.cache.key import EncoderKey
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.data.images import ImageReader
from trl_diffusion_sdpo.data.transforms import PairDraws
from trl_diffusion_sdpo.losses import loss_spec
from trl_diffusion_sdpo.models.loading import LoadedModel, load_model
from trl_diffusion_sdpo.models.pipelines import load_pipeline
from trl_diffusion_sdpo.trainer.components import epochs_of_run, pair_encoding, place_frozen_components
from trl_diffusion_sdpo.trainer.run_data import prepare_pairs
from trl_diffusion_sdpo.utils import identity

TIMES = ("runtime", "per_second", "flos")
RUN = {"num_train_epochs": 2, "max_steps": -1, "proportion_empty_prompts": 0.3, "eval_strategy": "epoch"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(encoding, "SHARD_PIXELS", 8 * 16 * 16)
    monkeypatch.setattr(encoding, "SHARD_PROMPTS", 4)


@pytest.fixture
def make_cached(make_trainer, tmp_path):
    """`make_cached(**overrides)`: a trainer that reads encoded pairs from a cache of this test."""

    def build(**overrides):
        return make_trainer(**{"precompute_latents": True, "precompute_dir": str(tmp_path / "cache"), **overrides})

    return build


@pytest.fixture
def walk(make_pairs):
    """`walk(make, **overrides)`: logs, weights and trainer of a run."""

    def train(make, **overrides):
        trainer = make(train=make_pairs(12), eval_dataset=make_pairs(6, seed=3), **{**RUN, **overrides})
        trainer.train()
        logs = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in trainer.state.log_history]
        return logs, {name: value.clone() for name, value in trainer.denoiser.state_dict().items()}, trainer

    return train


def files_of(trainer):
    """Return bytes and times of the files in the cache of the training data."""
    encoded = trainer.train_dataset._encoded
    folders = (encoded.images.path, encoded.prompts.path)
    return {
        (folder.name, path.name): (path.read_bytes(), path.stat().st_mtime_ns)
        for folder in folders
        for path in sorted(folder.iterdir())
    }


def batches(trainer, epochs, size=4):
    """Yield latents, conditioning and seeds of every batch."""
    data = trainer.train_dataset
    for epoch in epochs:
        data.set_epoch(epoch)
        for start in range(0, len(data), size):
            inputs = trainer._prepare_inputs(trainer.data_collator([data[i] for i in range(start, start + size)]))
            with torch.no_grad():
                latents, conditioning = trainer.pair_forward.encode(inputs)
            yield {"latents": latents, **conditioning}, (inputs["seeds"], inputs["prompts"], inputs["rows"].tolist())


def assert_equal_batches(one, other, epochs, size=4):
    for (ours, our_draws), (theirs, their_draws) in zip(
        batches(one, epochs, size), batches(other, epochs, size), strict=True
    ):
        assert our_draws == their_draws and ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def no_image(*args):
    raise AssertionError("an image was decoded")


def no_weights(*args):
    raise AssertionError("VAE and text encoders were loaded")


def test_two_epochs_are_those_without_a_cache_and_the_next_run_reads_no_image_and_no_encoder(
    make_trainer, make_cached, walk, monkeypatch
):
    """Losses, metrics, evaluations and weights are equal to the bit, with flips and dropped prompts."""
    logs, weights, _ = walk(make_trainer)
    first_logs, first_weights, first = walk(make_cached)
    assert first.encoding.report.encoded_images == images_drawn(first, 12, epochs=2) + 2 * 6
    assert first.encoding.report.encoded_prompts == 13 + 7  # with the empty one
    monkeypatch.setattr(ImageReader, "decode", no_image)
    monkeypatch.setattr(LoadedModel, "load_encoders", no_weights)
    again_logs, again_weights, again = walk(make_cached)
    assert logs == first_logs == again_logs and len(logs) > 8
    assert all(torch.equal(weights[name], first_weights[name]) for name in weights)
    assert all(torch.equal(weights[name], again_weights[name]) for name in weights)
    assert again.encoding.report.encoded_images == again.encoding.report.encoded_prompts == 0
    parts = [getattr(again.family.pipeline, name) for name in again.family.frozen_components]
    assert all(weight.is_meta for part in parts for weight in part.parameters())
    assert files_of(first) == files_of(again)


def images_drawn(trainer, pairs, epochs):
    """Return how many images the epochs draw if those of all pairs differ. A mirrored image is another."""
    seed = trainer.train_dataset.seed
    flips = [{PairDraws.from_key(seed, epoch, pair).flip < 0.5 for epoch in range(epochs)} for pair in range(pairs)]
    return 2 * sum(map(len, flips))


def test_a_run_encodes_what_it_draws_and_a_longer_one_adds_the_rest(make_trainer, make_cached, make_pairs):
    """A run that reads the cache meanwhile goes on, and its rows are in the end as if the longer run had made them."""
    given = {"train": make_pairs(12), "per_device_train_batch_size": 4}
    live, short = make_trainer(**given), make_cached(max_steps=3, **given)
    assert short.encoding.report.encoded_images == images_drawn(short, 12, epochs=1) == 24
    assert_equal_batches(live, short, [0])
    with pytest.raises(ValueError, match="`num_train_epochs`"):
        list(batches(short, range(1, 5)))
    with pytest.raises(ValueError, match="`eval_dataset`"):
        [short.train_dataset.for_evaluation()[pair] for pair in range(12)]

    two = make_cached(max_steps=6, **given)
    drawn = images_drawn(two, 12, epochs=2)
    assert two.encoding.report.encoded_images == drawn - 24 and two.encoding.report.images == drawn
    once_more = make_cached(max_steps=3, **given)
    assert (once_more.encoding.report.images, once_more.encoding.report.encoded_images) == (24, 0)
    assert_equal_batches(live, two, [0, 1])
    long = make_cached(max_steps=30, **given)
    assert long.encoding.report.encoded_images == 48 - drawn and long.encoding.report.encoded_prompts == 0
    assert_equal_batches(live, long, range(10))
    assert_equal_batches(live, short, [0])

    at_once = make_cached(max_steps=30, precompute_dir=long.args.output_dir, **given)
    assert at_once.encoding.report.encoded_images == 48
    ours, theirs = at_once.train_dataset._encoded.images, long.train_dataset._encoded.images
    for row in range(48):
        for name, value in ours.read(row).items():
            assert torch.equal(theirs.read(row)[name], value)


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({"max_steps": 3}, 1),
        ({"max_steps": 4}, 2),
        ({"max_steps": -1, "num_train_epochs": 1.5}, 2),
        ({"max_steps": 1, "gradient_accumulation_steps": 4}, 1),
        ({"max_steps": 2, "gradient_accumulation_steps": 2}, 2),
        ({"max_steps": 1, "winner_budget": 0.1}, None),
        ({"max_steps": 1, "precompute_ref_errors": True, "precompute_epochs": 2}, 2),
    ],
)
def test_the_epochs_of_a_run_are_never_too_few(settings, epochs, make_trainer, make_pairs):
    trainer = make_trainer(train=make_pairs(12), per_device_train_batch_size=4, **settings)
    assert epochs_of_run(trainer.args, trainer.train_dataset) == epochs


def rows_drawn(dataset, epochs):
    """Return the distinct winners and losers, plain or mirrored, of the first epochs."""
    drawn = set()
    for epoch in range(epochs):
        for pair in range(len(dataset)):
            is_mirrored = PairDraws.from_key(dataset.seed, epoch, pair).flip < 0.5
            loser = next(dataset.losers.candidates(pair, epoch))
            drawn |= {(is_mirrored, pair), (is_mirrored, loser)}
    return drawn


def test_permuted_losers_are_encoded_as_the_epochs_draw_them(make_trainer, make_cached, make_pairs):
    """A longer run adds flips, and all batches are those without a cache, to the bit."""
    pairs = make_pairs(12).select_columns(["prompt", "chosen"]).rename_column("chosen", "image")
    given = {"train": pairs, "losers": "permute", "per_device_train_batch_size": 4}
    live, short = make_trainer(**given), make_cached(max_steps=3, **given)
    one, two = (len(rows_drawn(live.train_dataset, epochs)) for epochs in (1, 2))
    assert short.encoding.report.encoded_images == one < two <= 24
    assert_equal_batches(live, short, [0])
    longer = make_cached(max_steps=6, **given)
    assert longer.encoding.report.encoded_images == two - one and longer.encoding.report.images == two
    assert_equal_batches(live, longer, [0, 1])
    assert make_cached(max_steps=6, **given).encoding.report.encoded_images == 0
    assert_equal_batches(live, make_cached(max_steps=30, **given), range(10))


def test_liked_images_are_each_others_losers_cached_as_live_even_if_all_are_verified(make_trainer, make_cached):
    """Verified pairs of images that are not permuted are matched anew."""
    rows = [{"prompt": f"p {i // 2}", "image": picture(10 * i), "label": i % 2} for i in range(16)]
    given = {"train": datasets.Dataset.from_list(rows), "losers": "permute", "dataset_format": "single_images"}
    given |= {"verify_images": "all", "per_device_train_batch_size": 4}
    assert_equal_batches(make_trainer(**given), make_cached(max_steps=2, **given), [0])


def test_losers_in_place_of_undecodable_ones_are_encoded_too(make_trainer, make_cached, make_pairs, tmp_path):
    """Even if another run has found them undecodable."""
    pairs = with_spoiled(make_pairs(8), tmp_path).select_columns(["prompt", "chosen"])
    given = {"train": pairs.rename_column("chosen", "image"), "losers": "permute", "verify_images": "none"}
    given |= {"per_device_train_batch_size": 4}
    assert_equal_batches(make_trainer(**given), make_cached(max_steps=2, **given), [0])
    for seed in range(4):
        live, cached = make_trainer(seed=seed, **given), make_cached(seed=seed, max_steps=4, **given)
        assert_equal_batches(live, cached, [0, 1])


CASES = {"one pair": (1, {}), "bfloat16": (4, {"vae_dtype": "bfloat16"})}


@pytest.mark.parametrize("case", CASES)
def test_batches_have_the_latents_of_a_run_without_a_cache(make_trainer, make_cached, make_pairs, case):
    size, settings = CASES[case]
    given = {"per_device_train_batch_size": size, "train": make_pairs(12 if size == 4 else 6), **settings}
    cached = make_cached(**given)
    assert_equal_batches(make_trainer(**given), cached, [0], size)
    assert cached.train_dataset[0]["moments"].dtype == getattr(torch, settings.get("vae_dtype", "float32"))


def test_random_crops_are_those_of_the_first_epochs_and_then_repeat(
    make_trainer, make_cached, make_pairs, sdxl_folder
):
    """SDXL's conditioning has the corner of each crop."""
    given = {"model": sdxl_folder, "train": make_pairs(8, size=(24, 40)), "random_crop": True}
    live, cached = make_trainer(**given), make_cached(precompute_epochs=2, max_steps=9, **given)
    assert_equal_batches(live, cached, [0, 1])
    (first, draws), (third, other_draws) = (next(batches(cached, [epoch])) for epoch in (0, 2))
    assert torch.equal(first["time_ids"], third["time_ids"]) and draws[0] != other_draws[0]
    (second, _), (live_third, _) = next(batches(cached, [1])), next(batches(live, [2]))
    assert not torch.equal(first["time_ids"], second["time_ids"])
    assert not torch.equal(third["time_ids"], live_third["time_ids"])
    with pytest.raises(ValueError, match="`eval_dataset`"):
        cached.train_dataset.for_evaluation()[0]


def with_spoiled(pairs, spoiled):
    """Return pairs whose chosen images are files, two of them damaged."""
    rows = []
    for number, row in enumerate(pairs):
        path = spoiled / f"{number}.png"
        row["chosen"].save(path)
        if number in (2, 3):
            path.write_bytes(path.read_bytes()[:60])
        rows.append({**row, "chosen": {"path": str(path), "bytes": path.read_bytes()}})
    features = datasets.Features({**pairs.features, "chosen": datasets.Image(decode=False)})
    return datasets.Dataset.from_list(rows, features=features)


def test_pairs_of_images_that_cannot_be_decoded_are_replaced_as_without_a_cache(
    make_trainer, make_cached, make_pairs, tmp_path, caplog
):
    pairs = with_spoiled(make_pairs(8), tmp_path)
    live, cached = make_trainer(train=pairs, verify_images="none"), make_cached(train=pairs, verify_images="none")
    assert (
        "train data: 2 images cannot be decoded" in caplog.text and "pair 2: image 0 cannot be decoded" in caplog.text
    )
    assert_equal_batches(live, cached, [0])
    assert cached.train_dataset.report.undecodable == live.train_dataset.report.undecodable == 2


def test_an_image_of_several_pairs_and_a_prompt_of_several_rows_are_encoded_once(
    make_trainer, make_cached, make_pairs
):
    images = [row["chosen"] for row in make_pairs(6)]
    rows = [
        {"prompt": "the same", "image_path": images[:3], "human_preference": [0, 1, 0]},
        {"prompt": "the same", "image_path": images[3:], "human_preference": [1, 0, 0]},
    ]
    rows = [{**row, "rank": [2 - value for value in row.pop("human_preference")]} for row in rows]
    pairs = datasets.Dataset.from_list(rows)
    live, cached = make_trainer(train=pairs), make_cached(train=pairs, num_train_epochs=9, max_steps=-1)
    assert len(live.train_dataset) > 3
    assert cached.encoding.report.encoded_images == 2 * 6 and cached.encoding.report.encoded_prompts == 2
    assert_equal_batches(live, cached, [0], size=len(live.train_dataset))


@pytest.fixture
def other_vae(sd_folder, tmp_path):
    """Folder of the pipeline with one changed number in its VAE."""
    pipeline = load_pipeline(sd_folder)
    with torch.no_grad():
        next(pipeline.vae.parameters()).flatten()[0] += 1e-3
    pipeline.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.fixture
def caches_of(sd_folder, make_args, make_pairs, tmp_path):
    """`caches_of(model=, pairs=, training=, **settings)`: folders of the images' and the prompts' cache."""

    def find(model=sd_folder, pairs=None, training=True, **settings):
        args = make_args(**{"precompute_latents": True, "resolution": 16, **settings})
        args.precompute_dir = str(tmp_path / "cache")
        loaded = load_model(model, model_init_kwargs=args.model_init_kwargs, encoders=False)
        pairs = make_pairs(8) if pairs is None else pairs
        dataset = prepare_pairs(pairs, args, loss_spec("sigmoid"), name="train", training=training)
        frozen = place_frozen_components(loaded, args)
        made = pair_encoding(frozen, EncoderKey(frozen, loaded), args)
        cache = made._cache_of(dataset, "train")
        return cache.images.path, cache.prompts.path

    return find


def test_whatever_changes_the_moments_is_another_key(caches_of, make_pairs, other_vae):
    images, prompts = caches_of()
    changes = {
        "resolution": {"resolution": [32, 16]},
        "crops": {"random_crop": True},
        "flips": {"random_flip": False},
        "seed of crops": {"random_crop": True, "seed": 7},
        "dtype": {"vae_dtype": "bfloat16"},
        "weights": {"model": other_vae},
        "images": {"pairs": make_pairs(8, seed=1)},
    }
    again = caches_of(pairs=make_pairs(8).map(lambda row: {"prompt": row["prompt"] + "!"}))
    assert again[1] != prompts
    caches = {name: caches_of(**given) for name, given in changes.items()}
    assert len({images, *(changed for changed, _ in caches.values())}) == 1 + len(changes)
    assert {other for name, (_, other) in caches.items() if name != "weights"} == {prompts}
    assert caches_of(per_device_train_batch_size=2, seed=7) == (images, prompts)


def test_whatever_changes_the_conditioning_is_another_key(caches_of, make_pairs, sd_folder, tmp_path):
    _, prompts = caches_of()
    pipeline = load_pipeline(sd_folder)
    pipeline.tokenizer.model_max_length = 8
    pipeline.save_pretrained(tmp_path / "tokenizer")
    pipeline = load_pipeline(sd_folder)
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).flatten()[0] += 1e-3
    pipeline.save_pretrained(tmp_path / "text")
    text = make_pairs(8).map(lambda row: {"prompt": row["prompt"] + "!"})
    changes = [{"model": str(tmp_path / name)} for name in ("tokenizer", "text")] + [{"pairs": text}, {"bf16": True}]
    assert len({prompts, *(caches_of(**given)[1] for given in changes)}) == 1 + len(changes)


@pytest.fixture
def facts_of(make_args):
    """`facts_of(model)`: the cache key of its VAE and text encoders."""

    def find(model):
        args = make_args(precompute_latents=True)
        loaded = load_model(model, encoders=False)
        return EncoderKey(place_frozen_components(loaded, args), loaded).facts

    return find


def test_models_that_differ_in_the_length_of_prompts_share_no_prompts(facts_of, tmp_path):
    """FLUX.1 dev and schnell have equal encoders, and 512 or 256 tokens by the configuration of the transformer."""
    pipeline = case("flux").build()
    pipeline.save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    facts = []
    for guidance in (True, False):
        config.write_text(json.dumps({**json.loads(config.read_text()), "guidance_embeds": guidance}))
        facts.append(facts_of(str(tmp_path)))
    assert facts[0]["text"] != facts[1]["text"] and facts[0]["vae"] == facts[1]["vae"]


def scale(pipeline):
    pipeline.vae.register_to_config(scaling_factor=0.5)


def clip(pipeline):
    pipeline.text_encoder.config.eos_token_id += 1


def template(pipeline):
    pipeline.tokenizer.chat_template = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("family", "change", "changed"),
    [
        ("stable_diffusion", scale, "vae"),
        ("stable_diffusion", clip, "text"),
        ("krea2", template, "text"),
        ("krea2", lambda pipeline: pipeline.register_to_config(text_encoder_select_layers=[0, 2, 1]), "text"),
    ],
)
def test_a_configuration_changed_in_memory_is_another_key(family, change, changed, facts_of, family_folder):
    pipeline = quiet(load_pipeline(family_folder(family)))
    before = facts_of(pipeline)
    assert facts_of(pipeline) == before
    change(pipeline)
    after = facts_of(pipeline)
    assert {name for name in before if before[name] != after[name]} == {changed}


def test_a_model_moved_to_another_folder_keeps_its_key_and_a_changed_file_does_not(facts_of, sd_folder, tmp_path):
    model = shutil.copytree(sd_folder, tmp_path / "model")
    before = facts_of(str(model))
    model = model.rename(tmp_path / "moved")
    assert facts_of(str(model)) == before
    for name, changed in {"scheduler": set(), "unet": set(), "vae": {"vae"}, "tokenizer": {"text"}}.items():
        file = next(iter(sorted((model / name).glob("*.json"))))
        file.write_text(file.read_text() + " ")
        after = facts_of(str(model))
        assert {kind for kind in before if before[kind] != after[kind]} == changed, name
        before = after


def test_another_precision_of_matrix_products_is_another_key(facts_of, sd_folder):
    before = facts_of(sd_folder)
    torch.set_float32_matmul_precision("high")
    after = facts_of(sd_folder)
    torch.set_float32_matmul_precision("highest")
    assert facts_of(sd_folder) == before
    assert all("matmul" in str(identity.differences(before[kind], after[kind])) for kind in ("vae", "text"))


def test_other_libraries_are_another_key(facts_of, sd_folder, monkeypatch):
    before = facts_of(sd_folder)
    assert facts_of(sd_folder) == before
    monkeypatch.setattr(key, "is_ftfy_available", lambda: not is_ftfy_available())
    assert facts_of(sd_folder)["text"] != before["text"] and facts_of(sd_folder)["vae"] == before["vae"]
    monkeypatch.setattr(identity.diffusers, "__version__", "another")
    assert facts_of(sd_folder)["vae"] != before["vae"]


def test_a_pipeline_object_lends_its_encoders_and_gets_its_own_key(make_trainer, make_cached, sd_pipeline):
    cached = make_cached(model=sd_pipeline)
    assert cached.frozen_components.state == "offloaded"
    assert_equal_batches(make_trainer(), cached, [0])
    assert make_cached(model=sd_pipeline).encoding.report.encoded_images == 0
    with pytest.raises(ValueError, match="'unheard of'"):
        cached.train_dataset._encoded.conditioning("unheard of")


def test_streams_are_refused(make_cached, make_pairs):
    with pytest.raises(ValueError, match="`streaming=True`"):
        make_cached(train=make_pairs(8).to_iterable_dataset())


@pytest.fixture
def encode(sd_folder, make_pairs, tmp_path, capsys):
    """`encode(cache, *words)`: runs the command and returns its output."""
    if not (tmp_path / "pairs").exists():
        make_pairs(6).save_to_disk(str(tmp_path / "pairs"))
    words = f"encode --model_name_or_path {sd_folder} --dataset_name {tmp_path}/pairs --use_cpu true --dtype float32"
    words += f" --output_dir {tmp_path}/run --report_to none --precompute_dir {tmp_path}/"

    def run(cache, *more):
        assert main([*f"{words}{cache}".split(), *more]) == 0
        return capsys.readouterr().out

    return run


def files_in(folder):
    """Return the shards in a folder."""
    files = (path for path in sorted(folder.rglob("*.safetensors")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_command_writes_the_cache_of_a_trainer_without_reading_a_denoiser(
    encode, make_trainer, sd_folder, tmp_path, recwarn
):
    """The command also works on a pipeline without weights of a denoiser."""
    said = encode("cache")
    assert not [str(warning.message) for warning in recwarn if "no effect" in str(warning.message)]
    assert f"{tmp_path}/cache has 24 images" in said and "and 7 prompts" in said
    assert "encoded 24 and 7" in said
    given = {"train": datasets.load_from_disk(str(tmp_path / "pairs")), "precompute_latents": True}
    make_trainer(**given, precompute_dir=str(tmp_path / "of a trainer"), max_steps=-1, num_train_epochs=3)
    assert files_in(tmp_path / "cache") == files_in(tmp_path / "of a trainer")
    shutil.copytree(sd_folder, tmp_path / "model")
    for path in (tmp_path / "model" / "unet").glob("*.safetensors"):
        path.unlink()
    assert "encoded 24 and 7" in encode("copy", "--model_name_or_path", str(tmp_path / "model"))
    assert "encoded 0 and 0" in encode("copy", "--model_name_or_path", str(tmp_path / "model"))


def test_the_command_judges_held_out_images_as_a_trainer_does(sd_folder, tmp_path, capsys):
    """By the median of the training images, 4: all held-out ones of 5 and 6 are liked, and refused."""
    for name, scores in {"train": [1, 4, 6], "low": [1, 5], "high": [5, 6]}.items():
        rows = [{"prompt": "p", "image": picture(score), "score": score} for score in scores]
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
    words = f"encode --model_name_or_path {sd_folder} --dataset_name {tmp_path}/train --use_cpu true --loss_type tgo"
    words += f" --output_dir {tmp_path}/run --report_to none --precompute_dir {tmp_path}/cache --eval_dataset_name"
    assert main([*words.split(), str(tmp_path / "low")]) == 0
    assert main([*words.split(), str(tmp_path / "high")]) != 0
    assert "not below the threshold 4" in capsys.readouterr().err


def test_images_that_wait_for_their_shard_keep_no_files_open(make_cached, make_pairs, monkeypatch):
    """A tensor from a worker is in shared memory, which keeps a descriptor. Many small images wait for one shard."""
    monkeypatch.setattr(encoding, "SHARD_PIXELS", 256 * 512 * 512)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        trainer = make_cached(train=make_pairs(100), dataloader_num_workers=1, max_steps=900)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert trainer.encoding.report.encoded_images == 400  # plain and mirrored
