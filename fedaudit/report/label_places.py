"""Places for short labels beside marks, so that no label covers a mark or another label."""

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # left, bottom, right, top
DIRECTIONS = 16
FURTHEST = 12


def label_places(
    marks: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    mark: float,
    frame: tuple[float, float],
    lines: Sequence[Box] = (),
) -> list[tuple[float, float]]:
    """Centre of each label, near its mark and free of all marks and labels where there is room.

    Greedy, most crowded mark first: rings of growing radius around the mark are searched in `DIRECTIONS`
    directions, diagonals first, and the first place that is free and inside the frame is taken. All lengths
    in pixels.

    Args:
        marks: centres of the marks.
        sizes: width and height of each label.
        mark: diameter of a mark.
        frame: width and height of the panel; labels stay inside.
        lines: boxes around what labels should not cross, such as bars of intervals.

    Returns:
        Centres, in the order given. If no place is free, the one that covers least.

    >>> [(x, y)] = label_places([(50.0, 50.0)], [(20.0, 12.0)], 10.0, (100.0, 100.0))
    >>> round(x), round(y)
    (67, 55)
    """
    taken = [*(_box(x, y, mark, mark) for x, y in marks), *lines]
    crowding = [sum(math.dist(a, b) < 4 * mark for b in marks) for a in marks]
    found: dict[int, tuple[float, float]] = {}
    for i in sorted(range(len(marks)), key=lambda i: (-crowding[i], i)):
        best, least = marks[i], math.inf
        for place in _candidates(marks[i], sizes[i], mark):
            box = _box(*place, *sizes[i])
            cost = sum(_overlap(box, other) for other in taken) + _outside(box, frame)
            if cost < least:
                best, least = place, cost
            if not cost:
                break
        found[i] = best
        taken.append(_box(*best, *sizes[i]))
    return [found[i] for i in range(len(marks))]


def _candidates(
    mark: tuple[float, float], size: tuple[float, float], diameter: float
) -> list[tuple[float, float]]:
    places = []
    for ring in range(FURTHEST):
        gap = 8 * ring
        for step in sorted(range(DIRECTIONS), key=lambda step: (step % 4 != 2, step % 4 == 0, step)):
            angle = 2 * math.pi * step / DIRECTIONS
            across = math.cos(angle) * (diameter / 2 + gap + size[0] / 2 + 3)
            along = math.sin(angle) * (diameter / 2 + gap + size[1] / 2 + 1)
            places.append((mark[0] + across, mark[1] + along))
    return places


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    across, along = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return across * along if across > 0 and along > 0 else 0.0


def _outside(box: Box, frame: tuple[float, float]) -> float:
    """Area of a box that lies outside the panel."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return area - _overlap(box, (0.0, 0.0, *frame))
