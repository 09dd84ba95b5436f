"""Draws docs/images/architecture.svg from the package's imports: the rooms on their floors, and which imports which.

Run it from the repository's root when `test_architecture_picture.py` says that the picture is out of date:

    python tests/architecture_picture.py
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from architecture_rules import FLOORS, PACKAGE, read_package

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
COMMAND = "python tests/architecture_picture.py"

# Rooms of a floor from left to right, such that few lines cross; others follow by their names.
ORDER = (
    *("cli", "demo", "trainer", "evaluation", "runs", "artifacts", "models", "step", "planning", "settings"),
    *("engines", "scoring", "cache", "sources", "data", "families"),
)
LABELS = {
    "cli": "commands",
    "demo": "embedded world",
    "trainer": "overrides of Trainer",
    "evaluation": "verdict",
    "guidance": "beside a reference",
    "runs": "folder, checkpoints",
    "artifacts": "files, Hub",
    "models": "networks, reference",
    "step": "one optimizer step",
    "planning": "memory beforehand",
    "settings": "groups, checks",
    "cache": "encoded pairs",
    "scoring": "weights, curriculum",
    "engines": "DDP, FSDP2, ZeRO",
    "data": "pairs of images",
    "sources": "a user's rows",
    "families": "one pipeline each",
    "losses": "every formula",
    "rewards": "scorers",
}
COLOURS = {
    "cli": "#8c6bb1",
    "demo": "#c2649a",
    "trainer": "#3d7fc1",
    "evaluation": "#8a8d2f",
    "guidance": "#5b8f3a",
    "runs": "#c47f17",
    "artifacts": "#2f9484",
    "models": "#cf5c3c",
    "step": "#4f9a3d",
    "settings": "#5b6ea8",
    "planning": "#9a7d2e",
    "cache": "#3f8fa3",
    "engines": "#a1705a",
    "scoring": "#7d6f9e",
}
OTHER_COLOUR = "#7c8694"

WIDTH, MARGIN, LEFT = 1280, 20, 110
ROOM_WIDTH, ROOM_HEIGHT, FLOOR_HEIGHT, GROUND_HEIGHT = 140, 48, 118, 56
LANE = 7  # between lines that run beside each other

STYLE = """
.panel { fill: #f6f5f1 } .floor { fill: #e9e7e0 } .room { fill: #ffffff }
.name { fill: #1f2328; font-weight: 600; font-size: 15px } .what, .where { fill: #57606a; font-size: 12px }
text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
.line { fill: none; stroke-width: 1.8 } .room { stroke-width: 2 }
@media (prefers-color-scheme: dark) {
.panel { fill: #1c1f24 } .floor { fill: #282c33 } .room { fill: #14161a }
.name { fill: #f0f3f6 } .what, .where { fill: #aab2bd }
}
"""


class Box(NamedTuple):
    """A room's place in the picture."""

    left: float
    top: float

    @property
    def middle(self) -> float:
        return self.left + ROOM_WIDTH / 2

    @property
    def bottom(self) -> float:
        return self.top + ROOM_HEIGHT


def imports_between_rooms(folder: Path) -> tuple[dict[str, set[str]], list[str]]:
    """Which room imports which, the ground left out; and the modules of the ground."""
    found: dict[str, set[str]] = defaultdict(set)
    files = read_package(folder).values()
    for file in files:
        modules = [name.split(".") for name, _ in file.imports]
        others = {parts[1] for parts in modules if parts[0] == PACKAGE and len(parts) > 1}
        found[file.room] |= {other for other in others if FLOORS.get(other) and other != file.room}
    rooms = {file.room for file in files} & set(FLOORS)
    ground = sorted(room for room in rooms if FLOORS[room] == 0)
    return {room: found[room] for room in sorted(rooms) if FLOORS[room]}, ground


def place(rooms: Iterable[str]) -> dict[str, Box]:
    """Boxes of the rooms, those of a floor side by side."""
    floors = defaultdict(list)
    for room in sorted(rooms, key=lambda room: (ORDER.index(room) if room in ORDER else len(ORDER), room)):
        floors[FLOORS[room]].append(room)
    boxes = {}
    for number, beside in floors.items():
        share = (WIDTH - LEFT - MARGIN) / len(beside)
        top = top_of(number, max(floors)) + (FLOOR_HEIGHT - ROOM_HEIGHT) / 2
        for index, room in enumerate(beside):
            boxes[room] = Box(LEFT + share * (index + 0.5) - ROOM_WIDTH / 2, top)
    return boxes


def top_of(floor: int, roof: int) -> float:
    return MARGIN + (roof - floor) * FLOOR_HEIGHT


class Routes:
    """Paths of the lines: from a lower edge, through gaps between the rooms of other floors, to an upper edge."""

    def __init__(self, boxes: dict[str, Box], edges: list[tuple[str, str]]):
        self.boxes = boxes
        self.downward = [edge for edge in edges if boxes[edge[0]].top < boxes[edge[1]].top]
        # Ends of lines at a room, and lines in a gap, in the order of their other ends, so that few cross.
        self.out = {room: self._others(room, 0) for room in boxes}
        self.into = {room: self._others(room, 1) for room in boxes}
        self.lanes: dict[tuple[float, float], list[tuple[str, str]]] = defaultdict(list)
        for edge in sorted(self.downward, key=lambda edge: boxes[edge[0]].middle + boxes[edge[1]].middle):
            for gap in self._gaps(edge):
                self.lanes[gap].append(edge)

    def path(self, edge: tuple[str, str]) -> str:
        source, target = (self.boxes[room] for room in edge)
        if edge not in self.downward:
            return self._beside(source, target)
        points = [(self._port(source, self.out[edge[0]], edge[1]), source.bottom)]
        for gap in self._gaps(edge):
            x = _spread(gap[0], self.lanes[gap], edge, LANE)
            points += [(x, gap[1] - 6), (x, gap[1] + ROOM_HEIGHT + 6)]
        points.append((self._port(target, self.into[edge[1]], edge[0]), target.top - 5))
        drawn = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
        for index, ((x, y), (to_x, to_y)) in enumerate(pairwise(points)):
            bend = 0 if index % 2 else 0.5 * (to_y - y)  # straight within a gap
            drawn.append(f"C{x:.1f} {y + bend:.1f} {to_x:.1f} {to_y - bend:.1f} {to_x:.1f} {to_y:.1f}")
        return "".join(drawn)

    def _others(self, room: str, end: int) -> list[str]:
        others = [edge[1 - end] for edge in self.downward if edge[end] == room]
        return sorted(others, key=lambda other: (self.boxes[other].middle, other))

    def _port(self, box: Box, ends: list[str], end: str) -> float:
        return _spread(box.middle, ends, end, min(14, (ROOM_WIDTH - 24) / max(1, len(ends) - 1)))

    def _gaps(self, edge: tuple[str, str]) -> list[tuple[float, float]]:
        """Middle and top of a gap between rooms, for each floor that a line passes."""
        source, target = (self.boxes[room] for room in edge)
        gaps = []
        for top in sorted({box.top for box in self.boxes.values() if source.top < box.top < target.top}):
            lefts = sorted(box.left for box in self.boxes.values() if box.top == top)
            share = (top - source.top) / (target.top - source.top)
            wanted = source.middle + share * (target.middle - source.middle)
            middles = [(left + ROOM_WIDTH + right) / 2 for left, right in pairwise(lefts)]
            middles += [lefts[0] - 26, lefts[-1] + ROOM_WIDTH + 26]
            gaps.append((min(middles, key=lambda middle: abs(middle - wanted)), top))
        return gaps

    def _beside(self, source: Box, target: Box) -> str:
        """To a room on the same floor: straight to a neighbour, above the rooms to others."""
        step = 1 if target.left > source.left else -1
        between = [box for box in self.boxes.values() if box.top == source.top]
        between = [box for box in between if min(source, target).left < box.left < max(source, target).left]
        if not between:
            y = source.top + ROOM_HEIGHT / 2
            start, end = source.middle + step * ROOM_WIDTH / 2, target.middle - step * (ROOM_WIDTH / 2 + 5)
            return f"M{start:.1f} {y:.1f}L{end:.1f} {y:.1f}"
        start, end = f"{source.middle + step * 56:.1f}", f"{target.middle - step * 56:.1f}"
        bends = f"{start} {source.top - 30:.1f} {end} {target.top - 30:.1f} {end} {target.top - 5:.1f}"
        return f"M{start} {source.top:.1f}C{bends}"


def _spread(middle: float, members: list, member, distance: float) -> float:
    """Coordinate of one of several members that are side by side around a middle."""
    return middle + (members.index(member) - (len(members) - 1) / 2) * distance


def picture(folder: Path) -> str:
    """The picture as SVG text: the same for the same imports."""
    imports, ground = imports_between_rooms(folder)
    boxes = place(imports)
    edges = [(room, other) for room in imports for other in sorted(imports[room])]
    routes = Routes(boxes, edges)
    roof = max(FLOORS[room] for room in imports)
    height = top_of(0, roof) + GROUND_HEIGHT + MARGIN
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        "<title>Rooms of the package on their floors, and which room imports which</title>",
        f"<style>{STYLE}</style>",
        "<defs>",
        *(_arrow(colour) for colour in sorted({*COLOURS.values(), OTHER_COLOUR})),
        "</defs>",
        f'<rect class="panel" width="{WIDTH}" height="{height:g}" rx="12"/>',
        *(_floor(number, roof) for number in range(roof, 0, -1)),
        *_ground(ground, roof),
        *(_line(routes.path(edge), COLOURS.get(edge[0], OTHER_COLOUR)) for edge in edges),
        *(text for room, box in boxes.items() for text in _room(room, box)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _arrow(colour: str) -> str:
    return (
        f'<marker id="arrow-{colour[1:]}" viewBox="0 0 8 8" refX="3" refY="4" markerWidth="5" markerHeight="5" '
        f'orient="auto"><path d="M0 0L8 4L0 8Z" fill="{colour}"/></marker>'
    )


def _floor(number: int, roof: int) -> str:
    top, left, right = top_of(number, roof), MARGIN, WIDTH - MARGIN
    label = "roof" if number == roof else f"floor {number}"
    slope = 46 if number == roof else 0
    points = f"{left + slope},{top + 4:g} {right - slope},{top + 4:g} {right},{top + FLOOR_HEIGHT - 4:g} "
    points += f"{left},{top + FLOOR_HEIGHT - 4:g}"
    words = f'<text class="where" x="{left + 14 + slope / 2:g}" y="{top + FLOOR_HEIGHT / 2 + 4:g}">{label}</text>'
    return f'<polygon class="floor" points="{points}"/>{words}'


def _ground(modules: list[str], roof: int) -> list[str]:
    top = top_of(0, roof)
    names = escape(", ".join(f"{module}.py" for module in modules)) + ": for all rooms, not drawn as lines"
    return [
        f'<rect class="floor" x="{MARGIN}" y="{top + 4:g}" width="{WIDTH - 2 * MARGIN}" height="{GROUND_HEIGHT - 8}"/>',
        f'<text class="where" x="{MARGIN + 14}" y="{top + GROUND_HEIGHT / 2 + 4:g}">ground</text>',
        f'<text class="what" x="{LEFT}" y="{top + GROUND_HEIGHT / 2 + 4:g}">{names}</text>',
    ]


def _room(room: str, box: Box) -> list[str]:
    colour = COLOURS.get(room, OTHER_COLOUR)
    return [
        f'<rect class="room" x="{box.left:.1f}" y="{box.top:.1f}" width="{ROOM_WIDTH}" height="{ROOM_HEIGHT}" rx="6" '
        f'stroke="{colour}"/>',
        f'<text class="name" x="{box.middle:.1f}" y="{box.top + 20:.1f}" text-anchor="middle">{room}</text>',
        f'<text class="what" x="{box.middle:.1f}" y="{box.top + 38:.1f}" text-anchor="middle">'
        f"{escape(LABELS.get(room, ''))}</text>",
    ]


def _line(path: str, colour: str) -> str:
    return f'<path class="line" d="{path}" stroke="{colour}" marker-end="url(#arrow-{colour[1:]})"/>'


if __name__ == "__main__":
    PICTURE.write_text(picture(ROOT / PACKAGE), encoding="utf-8")
    print(f"Drew {PICTURE.relative_to(ROOT)}.")
