"""`trl-diffusion-sdpo pairs pick`: a local page on which a person picks the better of two images."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from . import EXIT_OK
from .options import OneLineParser


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Open a page that shows two images of a prompt, and save which one you prefer. Each pick is saved at once "
            "in picks.jsonl, and pairs.jsonl is what training reads. The folder is one of own images, or the output "
            "folder of `evaluate`, whose models are then compared without telling which is which. A second call goes "
            "on where the first ended. Ctrl-C ends the page."
        ),
    )
    parser.add_argument("folder", metavar="FOLDER", help="Folder of images.")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="Address to serve the page at (default: 127.0.0.1, this machine only). 0.0.0.0 opens it to the network, "
        "such as for a phone.",
    )
    parser.add_argument("--port", type=int, metavar="N", help="Port of the page; 8765, or a free one, if unset.")
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
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
    return EXIT_OK
