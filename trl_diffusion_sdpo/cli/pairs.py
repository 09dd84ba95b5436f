"""`trl-diffusion-sdpo pairs`: sub-commands that make, check and publish pairs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
)
from .options import OneLineParser


class SubCommand(NamedTuple):
    """A sub-command: its help, its options, and the function that acts on them."""

    help: str
    description: str  # what its own help says besides
    add_options: Callable[[argparse.ArgumentParser], None]
    act: Callable[[argparse.Namespace], None]


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    width = max(map(len, SUBCOMMANDS))
    listed = "\n".join(f"  {name:{width}}  {command.help}" for name, command in SUBCOMMANDS.items())
    parser = OneLineParser(
        prog=prog,
        usage=f"{prog} SUBCOMMAND ...",
        description=f"Make pairs of images from your own taste, and check them.\n\nsub-commands:\n{listed}",
        epilog=f"`{prog} SUBCOMMAND --help` lists its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subcommand", choices=list(SUBCOMMANDS), help=argparse.SUPPRESS)
    return parser


def subcommand_parser(name: str, prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a sub-command."""
    command = SUBCOMMANDS[name]
    parser = OneLineParser(prog=prog, description=f"{command.help} {command.description}")
    command.add_options(parser)
    return parser


def run(arguments: list[str], prog: str) -> int:
    name = make_parser(prog).parse_args(arguments[:1]).subcommand
    options = subcommand_parser(name, f"{prog} {name}").parse_args(arguments[1:])
    logging.basicConfig(format="%(message)s", level=logging.ERROR if name == "check" else logging.WARNING)
    SUBCOMMANDS[name].act(options)
    return EXIT_OK


# ---- pairs generate -------------------------------------------------------------------------------------------------


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="A Hub id, a folder of a pipeline or a run; MODEL+LORA too.")
    add(
        "--recipe",
        choices=["scored", "negatives", "spin", "partial", "local"],
        default="scored",
        help="`scored`: as said above (default). `negatives` pairs each image with one of the same noise, generated "
        "with `--negative_kwargs`. The others pair each image of `--from_images` with a loser that the model makes: "
        "`spin` from its prompt alone, `partial` by noising the image and denoising it, `local` by drawing a region of "
        "it anew, whose mask is kept for training.",
    )
    add(
        "--negative_kwargs",
        type=mapping_option,
        default={"guidance_scale": 1.0},
        metavar="JSON",
        help="Arguments of the pipeline's call for the losers of `negatives` (default: no guidance).",
    )
    add("--from_images", metavar="FOLDER", help="Good images, a folder of `pairs from-images`.")
    add("--strength", type=float, default=0.6, metavar="X", help="Noise of `partial` and `local` (default: 0.6).")
    add("--images", type=int, default=4, metavar="K", help="Images of each prompt (default: 4).")
    add("--first_seed", type=int, default=0, metavar="N", help="Seeds are N, N + 1, ... (default: 0).")
    add("--weights", type=mapping_option, default={}, metavar="JSON", help='Weights, such as {"pickscore": 2}.')
    add(
        "--combination",
        choices=["weighted", "majority", "pareto"],
        default="weighted",
        help="How several scorers choose: by their weighted z-scores, by majority, or only where none disagrees.",
    )
    add("--margin", type=float, metavar="X", help="All pairs whose rewards differ by X; best and worst if unset.")
    add_image_options(parser, prompt_split="train", is_prompts_required=False)
    add("--output_dir", required=True, metavar="FOLDER", help="Folder of images, scores and pairs.jsonl.")


def _generate(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from ..pairing.generate import Pairing, generate_pairs, pairs_of_negatives
    from ..pairing.recipes import pairs_from_images

    reads_prompts = options.recipe in ("scored", "negatives")
    needed, excluded = options.prompts, options.from_images
    if not reads_prompts:
        needed, excluded = excluded, needed
    if needed is None or excluded is not None:
        raise ValueError(
            f"The recipe `{options.recipe}` reads {'`--prompts`' if reads_prompts else '`--from_images`'} alone, got "
            f"prompts {options.prompts} and images {options.from_images}."
        )
    if options.recipe != "scored" and options.scorers:
        raise ValueError(f"`--scorers` belong to the recipe `scored`, got {options.recipe}. Leave them out.")
    pairing = Pairing(options.combination, options.weights, options.margin)
    state = PartialState(cpu=options.device == "cpu")
    seeds = range(options.first_seed, options.first_seed + options.images)
    settings = image_settings(options, options.device or str(state.device), seeds)
    model = candidate_of(f"model={options.model}")
    folder = options.output_dir
    if not reads_prompts:
        pairs = pairs_from_images(options.recipe, model, options.from_images, folder, settings, options.strength)
        lines = [f"{pairs} pairs are in {folder}/pairs.jsonl. Its README.md says how to train on them."]
    else:
        prompts = listed_prompts(options)
        scorers = load_scorers(options.scorers, options.scorer_settings)
        if options.recipe == "scored":
            pairs = generate_pairs(model, prompts, scorers, folder, settings, pairing)
        else:
            pairs = pairs_of_negatives(model, prompts, folder, settings, options.negative_kwargs)
        skipped = f" ({prompts.empty} empty and {prompts.duplicates} repeated prompts were skipped)"
        listed = f"{len(prompts.prompts)} prompts{skipped if prompts.empty or prompts.duplicates else ''}"
        if pairs:
            lines = [
                f"{pairs} pairs of {listed} are in {folder}/pairs.jsonl.",
                f"Look at them with: trl-diffusion-sdpo pairs check {folder} --sheet pairs.html",
            ]
        else:
            lines = [f"Images of {listed} are in {folder}.", f"Go on with: trl-diffusion-sdpo pairs pick {folder}"]
    if state.is_main_process:
        print("\n".join(lines))
    finish(state)


# ---- pairs pick -----------------------------------------------------------------------------------------------------


def _add_pick_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="Folder of images.")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="Address to serve the page at (default: 127.0.0.1, this machine only). 0.0.0.0 opens it to the network, "
        "such as for a phone.",
    )
    parser.add_argument("--port", type=int, metavar="N", help="Port of the page; 8765, or a free one, if unset.")


def _pick(options: argparse.Namespace) -> None:
    from ..pairing.manifest import MANIFEST_FILE
    from ..pairing.own_images import list_images
    from ..pairing.picks import PAIRS_FILE
    from ..pairing.server import LOCAL_HOST, PickServer
    from ..pairing.session import PickSession

    folder = Path(options.folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if not (folder / MANIFEST_FILE).is_file():
        print("\n".join(list_images(folder)))
    session = PickSession(folder)
    try:
        server = PickServer(session, options.host, options.port)
        for reason, count in session.left_out.items():
            print(f"Left out: {count} images {reason}.")
        if options.host != LOCAL_HOST:
            print(
                "Anyone in the network who learns this address can see these images and pick. The connection is not "
                "encrypted. Use it at home only.",
                file=sys.stderr,
            )
        print(f"Pick at {server.address}\nEach pick is saved at once. Press Ctrl-C to end.", flush=True)
        with server:
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        session.close()
    print(f"\n{len(session.log.picks)} picks so far, {session.pairs} pairs in {folder / PAIRS_FILE}.")
    for sentence in session.result():
        print(sentence)


# ---- pairs from-images ----------------------------------------------------------------------------------------------


def _add_from_images_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="Folder of images, with subfolders.")
    add("--liked", nargs="+", metavar="NAME", help="Names of subfolders of images that you like; `liked` and others.")
    add("--disliked", nargs="+", metavar="NAME", help="Names of subfolders of images that you do not like.")
    add("--from_names", action="store_true", help="Use the name of an image as its prompt if it has no other.")


def _from_images(options: argparse.Namespace) -> None:
    from ..pairing.own_images import DISLIKED, LIKED, list_images

    liked = [name.lower() for name in options.liked or LIKED]
    disliked = [name.lower() for name in options.disliked or DISLIKED]
    lines = list_images(Path(options.folder), liked=liked, disliked=disliked, from_names=options.from_names)
    print("\n".join(lines))
    print(f"Go on with: trl-diffusion-sdpo pairs pick {options.folder}")


# ---- pairs push -----------------------------------------------------------------------------------------------------


def _add_push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="Folder of `pairs pick` or `pairs generate`.")
    parser.add_argument("repo", metavar="REPO", help="Name on the Hub, such as me/my-taste.")
    parser.add_argument("--private", action="store_true", help="Make a new data set private.")


def _push(options: argparse.Namespace) -> None:
    from ..pairing.publish import push_pairs

    pairs = push_pairs(options.folder, options.repo, private=options.private)
    print(f"{pairs} pairs are at https://huggingface.co/datasets/{options.repo}.")


# ---- pairs check ----------------------------------------------------------------------------------------------------


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", metavar="PATH", help="Data set: a folder, a file or an id of the Hub, as for `--dataset_name`.")
    add("--split", default="train", metavar="NAME", help="Split of the data set (default: train).")
    add("--dataset_format", metavar="NAME", help="Format of the columns; detected if unset.")
    add("--resolution", type=int, default=512, metavar="N", help="Side of the images in training (default: 512).")
    add("--min_side", type=int, metavar="N", help="Drop pairs with an image whose shorter side is smaller.")
    add("--look_at", type=int, default=500, metavar="N", help="Pairs to compare, score and show (default: 500).")
    add("--scorer", metavar="NAME", help="Scorer, such as pickscore, or your own `module:function`.")
    add("--scorer_settings", type=mapping_option, default={}, metavar="JSON", help='Such as {"device": "cuda"}.')
    add("--sheet", metavar="FILE", help="Write a contact sheet of the pairs to this HTML file.")


def _check(options: argparse.Namespace) -> None:
    from ..data import PairOptions, PairTransform, load_pairs
    from ..pairing.check import check_pairs

    sheet = None if options.sheet is None else Path(options.sheet)
    if sheet is not None and not sheet.absolute().parent.is_dir():
        raise ValueError(f"`--sheet` must be a file in a folder that exists, got {sheet}.")
    scorer = None if options.scorer is None else scorer_named(options.scorer, **options.scorer_settings)
    reading = PairOptions(
        PairTransform(options.resolution),
        dataset_format=options.dataset_format,
        verify_images="all",
        min_side=options.min_side or 1,
        compare=False,
    )
    path = Path(options.data).expanduser()
    folder = path if path.is_dir() else path.parent
    with reading_data(options.data):
        dataset = load_pairs(options.data, options.split)
        lines = check_pairs(dataset, reading, look_at=options.look_at, scorer=scorer, sheet=sheet, folder=folder)
    print("\n".join(lines))
    if sheet is not None:
        print(f"The contact sheet is {sheet}.")


SUBCOMMANDS = {
    "generate": SubCommand(
        "Generate several images of each prompt, score them, and pair the best with the worst.",
        "Without scorers, the folder is for `pairs pick`. A second call goes on where the first ended. Under "
        "`accelerate launch -m trl_diffusion_sdpo pairs generate` all processes share the work.",
        _add_generate_options,
        _generate,
    ),
    "pick": SubCommand(
        "Open a page that shows two images of a prompt, and save which one you prefer.",
        "Each pick is saved at once in picks.jsonl, and pairs.jsonl is what training reads. The folder is one of own "
        "images, or the output folder of `evaluate`, whose models are then compared without telling which is which. A "
        "second call goes on where the first ended. Ctrl-C ends the page.",
        _add_pick_options,
        _pick,
    ),
    "from-images": SubCommand(
        "List the images of a folder with their prompts, without duplicates, in manifest.jsonl for `pairs pick`.",
        "A prompt is in a text file beside the image, or in its metadata, as A1111, Forge, ComfyUI and SwarmUI write "
        "them. Images are never changed. Call it again when you have added images: your picks stay.",
        _add_from_images_options,
        _from_images,
    ),
    "push": SubCommand(
        "Upload the pairs of a folder to the Hub as a data set, images included.",
        "The folder's README.md becomes its page. Log in before, with `hf auth login`. `train --dataset_name REPO` "
        "then reads it.",
        _add_push_options,
        _push,
    ),
    "check": SubCommand(
        "Say what training would read of a data set of pairs, what it would drop, and what looks wrong.",
        "Nothing is trained.",
        _add_check_options,
        _check,
    ),
}
