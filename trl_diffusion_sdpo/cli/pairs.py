"""`trl-diffusion-sdpo pairs`: sub-commands that make, score, check and upload preference pairs."""

from __future__ import annotations

import argparse
import logging
import sys
from datetime import timedelta
from pathlib import Path

from ..utils.errors import UserError
from . import EXIT_OK
from .errors import reading_data
from .images import (
    add_image_options,
    candidate_of,
    finish,
    image_settings,
    listed_prompts,
    load_scorers,
    mapping_option,
    scorer_named,
    show_log,
)
from .options import OneLineParser


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:12}  {text.partition('. ')[0]}." for name, (text, _, _) in SUBCOMMANDS.items())
    parser = OneLineParser(
        prog=prog,
        usage=f"{prog} SUBCOMMAND ...",
        description=f"Make preference pairs of images, and score and check pairs.\n\nsub-commands:\n{listed}",
        epilog=f"`{prog} SUBCOMMAND --help` lists the options of a sub-command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subcommand", choices=list(SUBCOMMANDS), help=argparse.SUPPRESS)
    return parser


def subcommand_parser(name: str, prog: str | None = None) -> argparse.ArgumentParser:
    text, add_options, _ = SUBCOMMANDS[name]
    parser = OneLineParser(prog=prog, description=text)
    add_options(parser)
    return parser


def run(arguments: list[str], prog: str) -> int:
    name = make_parser(prog).parse_args(arguments[:1]).subcommand
    options = subcommand_parser(name, f"{prog} {name}").parse_args(arguments[1:])
    if name in ("check", "score"):  # which print their own report
        logging.basicConfig(format="%(message)s", level=logging.ERROR)
    else:
        show_log()
    SUBCOMMANDS[name][2](options)
    return EXIT_OK


# ---- pairs generate -------------------------------------------------------------------------------------------------


# Options of `pairs generate` that not all recipes use, and the recipes that use them.
_BY_SCORES = ("scored", "spin", "partial", "local", "degraded")
USED_BY = {
    "model": ("scored", "negatives", "spin", "partial", "local"),
    "dtype": ("scored", "negatives", "spin", "partial", "local"),
    "scorers": _BY_SCORES,
    "scorer_settings": _BY_SCORES,
    "weights": _BY_SCORES,
    "combination": _BY_SCORES,
    "margin": _BY_SCORES,
    "negative_kwargs": ("negatives",),
    "images": ("scored", "negatives"),
    "prompt_column": ("scored", "negatives"),
    "max_prompts": ("scored", "negatives"),
    "batch_size": ("scored", "negatives"),
    "strength": ("partial", "local"),
}


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    model = "Hub id, folder of a pipeline or output folder of a run. `MODEL+LORA` adds a LoRA. `degraded` needs none."
    add("--model", help=model)
    add(
        "--recipe",
        choices=["scored", "negatives", "spin", "partial", "local", "degraded"],
        default="scored",
        help="How pairs are made. `scored` (default): scorers choose the best and the worst image of each prompt. "
        "`negatives`: each image is paired with a rejected one, generated from the same noise with "
        "`--negative_kwargs`. The others pair each image of `--from_images` with a rejected one that the model makes: "
        "`spin` generates it from the prompt alone, `partial` noises the image and denoises it, `local` redraws a "
        "region and saves its mask for training. `degraded` needs no model: it blurs, compresses or washes out the "
        "image, or adds noise. `--scorers` leave out pairs whose rejected image they prefer.",
    )
    unguided = {"guidance_scale": 1.0}
    negatives = "Arguments of the pipeline's call for the rejected images of `negatives` (default: no guidance)."
    add("--negative_kwargs", type=mapping_option, default=unguided, metavar="JSON", help=negatives)
    add("--from_images", metavar="FOLDER", help="Folder of good images that `pairs from-images` has listed.")
    strength = "Noise level for `partial` and `local`, in (0, 1] (default: 0.6)."
    add("--strength", type=float, default=0.6, metavar="X", help=strength)
    add("--images", type=int, default=4, metavar="K", help="Images to generate for each prompt (default: 4).")
    weights = 'Weight of each scorer by its name, such as {"pickscore": 2}; 1 if unset.'
    add("--weights", type=mapping_option, default={}, metavar="JSON", help=weights)
    add(
        "--combination",
        choices=["weighted", "majority", "pareto"],
        default="weighted",
        help="How to combine several scorers: `weighted` (default) sums weighted z-scores, `majority` takes a vote, "
        "`pareto` is like `weighted` without the pairs in which a scorer prefers the rejected image.",
    )
    margin = (
        "Pair any two images of a prompt whose rewards differ by at least X. Default: only the best and the worst. "
        "With `--from_images`: leave out pairs whose rewards differ by less."
    )
    add("--margin", type=float, metavar="X", help=margin)
    add_image_options(parser, prompt_split="train", is_prompts_required=False)
    add("--output_dir", required=True, metavar="FOLDER", help="Folder for images, scores and pairs.jsonl.")


def _generate(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from ..tools.pairing.generate import Pairing, generate_pairs, pairs_of_negatives
    from ..tools.pairing.recipes import pairs_from_images

    reads_prompts = options.recipe in ("scored", "negatives")
    _refuse_unused(options)
    needed = options.prompts if reads_prompts else options.from_images
    excluded = options.from_images if reads_prompts else options.prompts
    if needed is None or excluded is not None:
        raise UserError(
            f"The recipe `{options.recipe}` needs {'`--prompts`' if reads_prompts else '`--from_images`'} and not "
            f"{'`--from_images`' if reads_prompts else '`--prompts`'}. Got `--prompts {options.prompts}` and "
            f"`--from_images {options.from_images}`."
        )
    if options.model is None and options.recipe != "degraded":
        raise UserError(f"The recipe `{options.recipe}` needs a model, got none. Name it with `--model`.")
    pairing = Pairing(options.combination, options.weights, options.margin)
    # Processes wait for the slowest, which can take longer than the default timeout of ten minutes.
    state = PartialState(cpu=options.device == "cpu", timeout=timedelta(days=1))
    settings = image_settings(options, options.device or str(state.device), range(options.images))
    model = None if options.model is None else candidate_of(f"model={options.model}")
    folder = options.output_dir
    if model is None or not reads_prompts:
        scorers = load_scorers(options.scorers, options.scorer_settings)
        source = options.from_images
        pairs = pairs_from_images(options.recipe, model, source, folder, settings, options.strength, scorers, pairing)
        lines = [f"Wrote {pairs} pairs to {folder}/pairs.jsonl. {folder}/README.md says how to train on them."]
    else:
        prompts = listed_prompts(options)
        scorers = load_scorers(options.scorers, options.scorer_settings)
        if options.recipe == "scored":
            pairs = generate_pairs(model, prompts, scorers, folder, settings, pairing)
        else:
            pairs = pairs_of_negatives(model, prompts, folder, settings, options.negative_kwargs)
        skipped = f" ({prompts.empty} empty and {prompts.duplicates} repeated prompts skipped)"
        listed = f"{len(prompts.prompts)} prompts{skipped if prompts.empty or prompts.duplicates else ''}"
        if pairs:
            lines = [
                f"Wrote {pairs} pairs of {listed} to {folder}/pairs.jsonl.",
                f"To look at them: trl-diffusion-sdpo pairs check {folder} --sheet pairs.html",
            ]
        else:
            lines = [
                f"The images of {listed} are in {folder}.",
                f"To judge them: trl-diffusion-sdpo pairs pick {folder}",
            ]
    if state.is_main_process:
        print("\n".join(lines))
    finish(state)


def _refuse_unused(options: argparse.Namespace) -> None:
    """Raise `ValueError` for an option that the recipe does not use."""
    default = subcommand_parser("generate").get_default
    for name, recipes in USED_BY.items():
        value = getattr(options, name)
        if options.recipe not in recipes and value != default(name):
            raise UserError(
                f"`--{name}` is only used by the recipes {', '.join(recipes)}, got {value} with the recipe "
                f"`{options.recipe}`. Leave it out."
            )


# ---- pairs pick -----------------------------------------------------------------------------------------------------


def _add_pick_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="Folder of images, or output folder of `evaluate`.")
    host = "Address of the page (default: 127.0.0.1, only for this machine). Use 0.0.0.0 to open it on a phone."
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=host)
    parser.add_argument("--port", type=int, metavar="N", help="Port of the page (default: 8765, or a free one).")
    thumbs = "Show one image at a time, to like or dislike, and write images.jsonl instead of pairs.jsonl."
    parser.add_argument("--thumbs", action="store_true", help=thumbs)


def _pick(options: argparse.Namespace) -> None:
    from ..tools.pairing.manifest import MANIFEST_FILE
    from ..tools.pairing.own_images import list_images
    from ..tools.pairing.server import LOCAL_HOST, PickServer
    from ..tools.pairing.session import PickSession

    folder = Path(options.folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Check the path.")
    if not (folder / MANIFEST_FILE).is_file():
        print("\n".join(list_images(folder)))
    session = PickSession(folder, thumbs=options.thumbs)
    try:
        server = PickServer(session, options.host, options.port)
        for reason, count in session.left_out.items():
            print(f"Left out: {count} images {reason}.")
        if options.host != LOCAL_HOST:
            print(
                "Anyone in your network who knows the address below can see the images and pick, and the connection is "
                "not encrypted. Use it only in a network that you trust.",
                file=sys.stderr,
            )
        print(f"Open {server.address} in a browser.\nEach pick is saved at once. Press Ctrl-C to end.", flush=True)
        with server:
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        session.close()
    kind = "images" if options.thumbs else "pairs"
    print(f"\n{session.judged} picks so far. {folder / session.file_name} has {session.rows} {kind}.")
    for reason, count in session.unused.items():
        print(f"Not used: {count} picks {reason}.")
    for sentence in session.result():
        print(sentence)


# ---- pairs from-images ----------------------------------------------------------------------------------------------


def _add_from_images_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="Folder of images. Subfolders are read too.")
    add("--from_names", action="store_true", help="Use the file name as the prompt of an image without one.")
    add("--keep_duplicates", action="store_true", help="Also list images of a prompt that look equal.")


def _from_images(options: argparse.Namespace) -> None:
    from ..tools.pairing.own_images import list_images

    kept = options.keep_duplicates
    print("\n".join(list_images(Path(options.folder), from_names=options.from_names, keep_duplicates=kept)))
    print(f"To judge the images: trl-diffusion-sdpo pairs pick {options.folder}")


# ---- pairs score ----------------------------------------------------------------------------------------------------


def _add_score_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_data_options(parser, "Split to score (default: train).")
    scorers = "Scorers, such as `pickscore hpsv2.1`, or your own function as `module:function`. Losses read the first."
    add("--scorer", "--scorers", dest="scorers", nargs="+", required=True, metavar="NAME", help=scorers)
    settings = 'Settings of each scorer by its name, such as {"pickscore": {"dtype": "bfloat16"}}.'
    add("--scorer_settings", type=mapping_option, default={}, metavar="JSON", help=settings)
    add("--device", metavar="NAME", help="Device for the scorers. Default: a GPU if there is one, else cpu.")
    output = "Folder for the scored pairs, for `train --dataset_name FOLDER`."
    add("--output", "--output_dir", dest="output_dir", required=True, metavar="FOLDER", help=output)


def _score(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from ..data import load_pairs
    from ..tools.pairing.score import score_pairs

    state = PartialState(cpu=options.device == "cpu")
    if state.num_processes > 1:
        raise UserError(f"`pairs score` runs as one process, got {state.num_processes}. Start it without a launcher.")
    with reading_data(options.data):
        dataset = load_pairs(options.data, options.split, config=options.config)
    lines = score_pairs(
        dataset,
        load_scorers(options.scorers, options.scorer_settings),
        options.output_dir,
        dataset_format=options.dataset_format,
        device=options.device or state.device,
    )
    print("\n".join(lines))
    print(
        f"Wrote the scored pairs. To train on them: trl-diffusion-sdpo train --dataset_name {options.output_dir} ..."
    )


# ---- pairs push -----------------------------------------------------------------------------------------------------


def _add_push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="Output folder of `pairs pick`, `generate` or `score`.")
    parser.add_argument("repo", metavar="REPO", help="Hub id of the data set, such as me/my-taste.")
    parser.add_argument("--private", action="store_true", help="Make the data set private if it is new.")


def _push(options: argparse.Namespace) -> None:
    from ..tools.pairing.publish import push_pairs

    with reading_data(options.folder):
        pairs = push_pairs(options.folder, options.repo, private=options.private)
    print(f"Uploaded {pairs} rows to https://huggingface.co/datasets/{options.repo}.")


# ---- pairs check ----------------------------------------------------------------------------------------------------


def _add_data_options(parser: argparse.ArgumentParser, split: str) -> None:
    add = parser.add_argument
    add("data", metavar="PATH", help="Folder, file or Hub id of the data set, as for `train --dataset_name`.")
    add("--split", default="train", metavar="NAME", help=split)
    add("--config", metavar="NAME", help="Configuration of a data set on the Hub.")
    add("--dataset_format", metavar="NAME", help="Format of the columns; detected by default.")


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_data_options(parser, "Split to check (default: train).")
    resolution = "Resolution of the training, in pixels (default: 512)."
    add("--resolution", type=int, default=512, metavar="N", help=resolution)
    scorer = "Scorer of the images, such as pickscore, or your own function as `module:function`."
    add("--scorer", metavar="NAME", help=scorer)
    settings = 'Settings of the scorer, such as {"device": "cuda"}.'
    add("--scorer_settings", type=mapping_option, default={}, metavar="JSON", help=settings)
    add("--sheet", metavar="FILE", help="HTML file for a contact sheet of the examined pairs.")


def _check(options: argparse.Namespace) -> None:
    from ..data import PairOptions, PairTransform, load_pairs
    from ..tools.pairing.check import check_pairs

    sheet = None if options.sheet is None else Path(options.sheet)
    if sheet is not None and not sheet.absolute().parent.is_dir():
        raise UserError(f"`--sheet` must be a file in an existing folder, got {sheet}. Create the folder first.")
    if options.resolution < 1:
        raise UserError(f"`--resolution` must be 1 or more, got {options.resolution}. Use that of your training.")
    scorer = None if options.scorer is None else scorer_named(options.scorer, **options.scorer_settings)
    reading = PairOptions(
        PairTransform(options.resolution),
        dataset_format=options.dataset_format,
        verify_images="all",
        min_side=1,
    )
    path = Path(options.data).expanduser()
    folder = path if path.is_dir() else path.parent
    with reading_data(options.data):
        dataset = load_pairs(options.data, options.split, config=options.config)
        lines = check_pairs(dataset, reading, scorer=scorer, sheet=sheet, folder=folder)
    print("\n".join(lines))
    if sheet is not None:
        print(f"Wrote the contact sheet to {sheet}.")


# Sub-command -> description (its first sentence is shown in the list), function that adds its options, function that
# runs it.
SUBCOMMANDS = {
    "generate": (
        "Generate several images of each prompt, score them, and pair the best with the worst. Without scorers it only "
        "generates the images, and you can judge them with `pairs pick`. After an interruption, run the same command "
        "again to continue. For several GPUs: `accelerate launch -m trl_diffusion_sdpo pairs generate`.",
        _add_generate_options,
        _generate,
    ),
    "pick": (
        "Open a web page that shows you two images of a prompt at a time, and save which one you prefer. Each pick is "
        "saved at once in picks.jsonl, and the pairs for training are in pairs.jsonl. FOLDER is a folder of your "
        "images, or the output folder of `evaluate`: you then compare models without seeing which one made an image. "
        "Press Ctrl-C to end, and run the command again to continue.",
        _add_pick_options,
        _pick,
    ),
    "from-images": (
        "Find the prompts of the images in a folder, and list them in manifest.jsonl for `pairs pick`. The prompt of "
        "a.png comes from a.txt, or from metadata that A1111, Forge, ComfyUI or SwarmUI wrote into the image. Copies "
        "of an image are left out, and no image is changed. Run it again after you have added or renamed images: picks "
        "find their images by their pixels.",
        _add_from_images_options,
        _from_images,
    ),
    "score": (
        "Score the images of given pairs, and write the pairs with the scores and their scale, for the losses `smpo` "
        "and `capo` and the setting `pair_weights`. Each image is scored once. After an interruption, run the same "
        "command again to continue.",
        _add_score_options,
        _score,
    ),
    "push": (
        "Upload the pairs of a folder and their images to the Hub as a data set, with the folder's README.md as its "
        "page. Log in first with `hf auth login`. Train on it with `train --dataset_name REPO`.",
        _add_push_options,
        _push,
    ),
    "check": (
        "Report which pairs of a data set training would read, which it would drop, and which look doubtful.",
        _add_check_options,
        _check,
    ),
}
