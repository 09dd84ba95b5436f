"""State of a pick page: which pair each browser tab shows, the picks, and the progress."""

from __future__ import annotations

import json
import secrets
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from filelock import Timeout

from ...utils.errors import UserError
from ...utils.files import write_atomically
from ...utils.locks import FolderLock
from .manifest import is_inside, read_manifest
from .orders import BlindOrder, RankOrder, SingleOrder
from .picks import IMAGES_FILE, PAIRS_FILE, SHARES, THUMBS, ImagesFile, PairsFile, PickLog

HUMAN_FILE = "human.json"
LOCK_FILE = ".picks.lock"


class PickSession:
    """State of a running `pairs pick` on a folder with `manifest.jsonl`, shared by all browser tabs.

    If the column `model` of the manifest names several models, the page compares them without showing their names.
    Otherwise, picks rate the images of each prompt. The page names images by random codes, as file names would reveal
    the model.

    Args:
        thumbs (`bool`): Whether the page shows one image at a time, to like or dislike.
    """

    def __init__(self, folder: Path, *, thumbs: bool = False) -> None:
        self.folder = folder
        listed, self.left_out = read_manifest(folder)
        self.images = {image.name: image for image in listed}
        self._lock = threading.RLock()
        self._file_lock = FolderLock(folder / LOCK_FILE)
        try:
            self._file_lock.acquire(0)
        except Timeout:
            raise UserError(
                f"Only one `pairs pick` can use a folder at a time, and another one is using {folder}. Use the page of "
                "that command, or end it first."
            ) from None
        self.log = PickLog(folder, self.images)
        self.thumbs = thumbs
        self.file_name = IMAGES_FILE if thumbs else PAIRS_FILE
        self._file = (ImagesFile if thumbs else PairsFile)(folder, self.images)
        models = {image.facts.get("model") for image in listed}
        self.is_blind = not thumbs and len(models) > 1 and None not in models
        kind = SingleOrder if thumbs else BlindOrder if self.is_blind else RankOrder
        self.order: SingleOrder | RankOrder | BlindOrder = kind(self.images, self.log)
        if isinstance(self.order, BlindOrder) and self.order.alone:
            self.left_out["without an image of the same prompt and seed to compare"] = self.order.alone
        self.gone: set[str] = set()  # images whose files were deleted while the page was open
        self.rows = 0  # pairs or single images in the file for training
        self.unused: Counter[str] = Counter()  # picks without a row because of their images, by reason
        self.problem = ""  # error message if this file could not be written
        self._shown: dict[str, frozenset[str]] = {}  # tab -> its pair
        self.codes = {secrets.token_urlsafe(12): name for name in self.images}
        self._code_of = {name: code for code, name in self.codes.items()}
        if next(iter(self.order.offers(self.gone)), None) is None and not self.judged:
            reasons = "".join(f" {count} were left out: {reason}." for reason, count in self.left_out.items())
            prompts = len({image.prompt for image in listed})
            needed = "an image with a prompt" if thumbs else "a prompt with two images to compare"
            raise UserError(
                f"`pairs pick` needs {needed}, and {folder} has none: it has {len(listed)} images of {prompts} "
                f"prompts.{reasons}"
            )
        # Pairs of `pairs generate`, whose manifests have no ratings, are replaced only after the first pick.
        if self.judged or self._file.rated or not (folder / self.file_name).is_file():
            self._write_rows()

    @property
    def judged(self) -> int:
        """Number of picks that this page shows: of pairs, or with `thumbs` of single images."""
        return sum(pick.is_thumb == self.thumbs for pick in self.log.picks.values())

    def close(self) -> None:
        """Close the log and release the lock of the folder."""
        self.log.close()
        self._file_lock.release()

    def state(self, tab: str, wanted: frozenset[str] | None = None) -> dict[str, Any]:
        """Return the pair that a tab shows next (`wanted`, if set), and the progress."""
        with self._lock:
            last = self.log.last
            last = last if last is None or last.is_thumb == self.thumbs else None
            return {
                "pair": self._next(tab, wanted),
                "judged": self.judged,
                "left": self.order.left(self.gone),
                "verdicts": self.log.verdicts,
                "rows": self.rows,
                "last": None if last is None else last.number,
                "blind": self.is_blind,
                "thumbs": self.thumbs,
                "file": self.file_name,
                "gone": len(self.gone),
                "left_out": dict(self.left_out),
                "unused": dict(self.unused),
                "problem": self.problem,
                "folder": str(self.folder),
            }

    def pick(self, tab: str, first: str, second: str, verdict: str) -> dict[str, Any]:
        """Save a verdict on the two images with these codes, and return the new state with the next pair."""
        with self._lock:
            names = [self.codes.get(code, "") for code in (first, second)]
            is_shown = "" not in names and (names[0] == names[1]) == self.thumbs
            if (
                verdict not in (THUMBS if self.thumbs else SHARES)
                or not is_shown
                or len({self.images[name].prompt for name in names}) > 1
            ):
                shown = "the image shown" if self.thumbs else "two images of one prompt"
                raise UserError(f"A pick needs {shown} and a known verdict. Reload the page.")
            self.log.add(names[0], names[1], verdict)
            return self._changed(tab, names[0])

    def undo(self, tab: str, number: int) -> dict[str, Any]:
        """Undo the last pick, and return the new state, in which the tab shows its pair again."""
        with self._lock:
            pick = self.log.undo(number)
            return self._changed(tab, pick.first, pick.pair)

    def edit_prompt(self, tab: str, code: str, prompt: str) -> dict[str, Any]:
        """Replace the prompt of an image, and of all others with this prompt, and return the new state."""
        with self._lock:
            name = self.codes[code]
            self.log.edit_prompt(self.images[name].prompt, prompt)
            return self._changed(tab, name, self._shown.get(tab))

    def ranking(self) -> list[dict[str, Any]]:
        """Return the images of each prompt with their ratings, from the best to the worst."""
        if not isinstance(self.order, RankOrder):
            return []
        with self._lock:
            return [
                {
                    "prompt": self.log.prompts.get(prompt, prompt),
                    "images": [
                        {"code": self._code_of[name], "rating": round(rating, 2), "uncertain": uncertain}
                        for name, rating, uncertain in group.ranking()
                    ],
                }
                for prompt, group in self.order.groups.items()
            ]

    def result(self) -> list[str]:
        """Return the win rates of a blind comparison as sentences, and write them to `human.json`."""
        if not isinstance(self.order, BlindOrder):
            return []
        with self._lock:
            sentences, numbers = self.order.result()
            write_atomically(self.folder / HUMAN_FILE, json.dumps(numbers, indent=1).encode() + b"\n")
            return sentences

    def file(self, name: str) -> Path | None:
        """Return the path of an image, or `None` if its file is missing or links to outside of the folder."""
        path = self.folder / name
        return path if path.is_file() and is_inside(self.folder, name) else None

    def _changed(self, tab: str, name: str, wanted: frozenset[str] | None = None) -> dict[str, Any]:
        """Return the new state, after updating ratings and the file for a pick, an undo or a changed prompt of an
        image."""
        if name in self.images:  # the manifest may no longer list the images of an undone pick
            self.order.update(self.images[name].prompt, self.gone)
        self._write_rows()
        return self.state(tab, wanted)

    def _write_rows(self) -> None:
        try:
            self.rows, self.unused = self._file.write(self.log, self.gone)
            self.problem = ""
        except OSError as error:  # the picks are safe in `picks.jsonl`
            self.problem = (
                f"{self.file_name} could not be written ({error.strerror}). Your picks are safe in picks.jsonl."
            )

    def _offered(self) -> tuple[str, str] | None:
        """Return the best offer that no other tab shows, or else the best offer."""
        shown = set(self._shown.values())
        best = None
        for offer in self.order.offers(self.gone):
            if frozenset(offer) not in shown:
                return offer
            best = best or offer
        return best

    def _next(self, tab: str, wanted: frozenset[str] | None) -> dict[str, Any] | None:
        """Return the pair that a tab shows next: the wanted one, or else one that no other tab shows, or else any."""
        self._shown.pop(tab, None)
        while True:
            pair = tuple(wanted) if wanted else self._offered()
            if pair is None:
                return None
            missing = {name for name in pair if name not in self.images or not self.file(name)}
            if not missing:
                break
            wanted = None
            self.gone |= missing
            for name in missing & self.images.keys():
                self.order.update(self.images[name].prompt, self.gone)
        self._shown[tab] = frozenset(pair)
        # In random order, because people may prefer one side.
        left, right = (pair[0], pair[-1]) if secrets.randbelow(2) else (pair[-1], pair[0])
        prompt = self.images[left].prompt
        return {
            "first": self._code_of[left],
            "second": self._code_of[right],
            "prompt": self.log.prompts.get(prompt, prompt),
        }
