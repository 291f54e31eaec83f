"""The grammar of all pictures: five forms on axes in inches, in one look, as PNG.

``lines`` (with bands and levels), ``forest``, ``heat_map``, ``scatter`` and ``bars`` draw series of
numbers and return what they drew; a study says which rows go to which form. Draws on figures of its
own (no global plotting state). Refuses to know what a picture shows.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from persona_lora.core.files import atomic_path
from persona_lora.report.resampling import Array
from persona_lora.report.wording import number, title_of

Inches = tuple[float, float, float, float]  # left, bottom, width and height on a figure

# After Okabe and Ito's palette (two hues darkened for text), safe for the common colour blindness.
TRAIT, COHERENCE = "#0072B2", "#D55E00"
PROMPTS = {"prompt_pos": "#00795A", "prompt_neutral": "#6B6B3A", "prompt_neg": "#9C4F82"}
INK, MUTED, FAINT, SHADE = "#1f2328", "#656d76", "#d8dee4", "#f3f4f6"
CONTROL = "#77808a"
# Without its yellow, for lines that are told apart by their labels.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#3b3f45")
CHANGE = colormaps["RdBu"]  # light in the middle, where nothing changes
DPI = 160
LABEL_GAP = 0.22  # inches between the axes and the labels beside them
DASHED, DOTTED = (0, (4, 3)), (0, (1, 2))
HATCHED = {"facecolor": "none", "edgecolor": "#00000055", "linewidth": 0, "hatch": "/////"}
_NAME_LENGTH = 24  # longer names of traits are shortened beside the curves


@dataclass(frozen=True)
class Look:
    """How a series looks: a line of ``width`` and dots of ``size`` (0: none), and its interval.

    ``band`` is the opacity of the area between the bounds, ``whiskers`` of a line at each
    point.
    """

    colour: str = TRAIT
    width: float = 1.8
    size: float = 0.0
    dashes: Any = "-"
    band: float = 0.13
    whiskers: float = 0.0
    alpha: float = 1.0
    edge: str | None = None
    marker: str = "o"
    bold: bool = False
    order: int = 2

    def apart(self, at: int) -> Look:
        """Return it in the colour of the ``at``-th of several, dashed once all are taken."""
        dashes = self.dashes if at < len(PALETTE) else DASHED
        return replace(self, colour=PALETTE[at % len(PALETTE)], dashes=dashes)


class Bounded(Protocol):
    """A mean with its interval; None where there is none."""

    @property
    def mean(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


@dataclass(frozen=True)
class Series:
    """What is drawn of one thing: values ``y`` (NaN: none) at ``x``, with bounds where it has any.

    Without ``x`` it is a level, or a row of a forest. ``label`` stands beside its end, ``marks``
    beside its points; ``hollow`` points are those that do not count.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    look: Look = field(default_factory=Look)
    label: str | None = None
    marks: tuple[str, ...] = ()
    hollow: tuple[bool, ...] = ()

    @property
    def end(self) -> float | None:
        """The height of its label: the last value that is there; None without a label."""
        known = [value for value in self.y if np.isfinite(value)]
        return known[-1] if known and self.label is not None else None

    def labelled(self, digits: int) -> Series:
        """Return the series with its name and last value as its label, if it has that value."""
        told = bool(self.y) and np.isfinite(self.y[-1])
        label = f"{short(self.name)} {number(self.y[-1], digits)}" if told else None
        return replace(self, label=label)


def series(
    name: str, x: Sequence[float], values: Sequence[Bounded | None], look: Look, **more: Any
) -> Series:
    """Return a series of means with their intervals."""
    rows = [(None,) * 3 if each is None else (each.mean, each.low, each.high) for each in values]
    mean, low, high = np.array(rows, dtype=float).reshape(-1, 3).T.tolist()
    return Series(name, tuple(x), tuple(mean), tuple(low), tuple(high), look, **more)


def series_by(
    rows: Sequence[Mapping[str, Any]],
    by: str,
    x: str,
    y: str,
    look: Look,
    *,
    bounds: Sequence[str] = (),
    name: Callable[[str], str] = str,
) -> list[Series]:
    """Return a series for each value of the column ``by``, in a colour of its own, along ``x``."""
    found = []
    for at, key in enumerate(dict.fromkeys(row[by] for row in rows)):
        own = sorted((row for row in rows if row[by] == key), key=lambda row: row[x])
        of = {each: tuple(row[each] for row in own) for each in (x, y, *bounds)}
        low, high = (of[each] for each in bounds) if bounds else ((), ())
        found.append(Series(name(key), of[x], of[y], low, high, look.apart(at)))
    return found


@dataclass(frozen=True)
class Panel:
    """One set of axes: its title, and every series as it was drawn there."""

    title: str
    drawn: tuple[Series, ...]

    def of(self, name: str) -> Series:
        """Return the first series of that name."""
        return next(each for each in self.drawn if each.name == name)

    def named(self, title: str) -> Panel:
        """Return the panel under another title than that of its axes."""
        return replace(self, title=title)


@dataclass(frozen=True)
class Picture:
    """A figure and what was drawn in it, panel by panel."""

    figure: Figure
    panels: tuple[Panel, ...]

    def png(self) -> bytes:
        """Return the picture as PNG; equal pictures give equal bytes."""
        buffer = io.BytesIO()
        # The software's version would make bytes differ between installations.
        FigureCanvasAgg(self.figure).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()

    def save(self, path: Path) -> bytes:
        """Write the PNG to ``path``, atomically, and return its bytes."""
        png = self.png()
        with atomic_path(Path(path)) as temporary:
            temporary.write_bytes(png)
        return png


# -- figures and axes --------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """Return a white figure of that size in inches."""
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


_NOTE_LETTERS = 16  # that an inch of the note holds


def finish(
    figure: Figure, panels: Sequence[Panel], *, title: str = "", subtitle: str = "", note: str = ""
) -> Picture:
    """Write title and subtitle above, the note in lines that fit below; return the picture."""
    width, height = figure.get_size_inches()
    note_lines = wrapped(int(width * _NOTE_LETTERS), *note.splitlines())
    for inches, text, colour, size, weight, anchor in (
        (height - 0.4, title, INK, 14, "bold", "bottom"),
        (height - 0.47, subtitle, MUTED, 9, "normal", "top"),
        (0.13, note_lines, MUTED, 7.8, "normal", "bottom"),
    ):
        style: dict[str, Any] = {
            "color": colour,
            "fontsize": size,
            "fontweight": weight,
            "va": anchor,
        }
        figure.text(0.18 / width, inches / height, text, linespacing=1.45, **style)
    return Picture(figure, tuple(panels))


def add_axes(
    figure: Figure, inches: Inches, *, title: str = "", x: str = "", y: str = "", size: float = 10.5
) -> Axes:
    """Add quiet axes at left, bottom, width and height in inches, with a title and names."""
    width, height = figure.get_size_inches()
    left, bottom, across, up = inches
    axes = figure.add_axes((left / width, bottom / height, across / width, up / height))
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=MUTED)
    axes.tick_params(axis="x", which="both", length=3, labelsize=9, color=MUTED, labelcolor=INK)
    axes.set_title(title, fontsize=size, loc="left", color=INK)
    axes.set_xlabel(x, fontsize=9, color=MUTED)
    axes.set_ylabel(y, fontsize=9, color=MUTED)
    return axes


def rule(axes: Axes, at: float | None, *, upright: bool = False, dashes: Any = "-") -> None:
    """Draw a quiet line across all of the axes, at 0 or at what the rest is compared with."""
    if at is not None:
        line = axes.axvline if upright else axes.axhline
        line(at, color=MUTED, linewidth=0.9 if dashes == DASHED else 0.8, linestyle=dashes)


def wrapped(width: int, *texts: str) -> str:
    """Return texts below one another, in lines of at most so many letters."""
    return "\n".join(line for text in texts for line in textwrap.wrap(text, width))


def score_scale(axes: Axes, top: float = 102) -> None:
    """Set the vertical scale of scores, 0–100."""
    axes.set_ylim(-2, top)
    axes.set_yticks([each for each in (0, 25, 50, 75, 100) if each <= top])


def legend(axes: Axes, **where: Any) -> None:
    """Name the series inside the axes."""
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK, **where)


# -- the five forms ----------------------------------------------------------------------------


def lines(axes: Axes, drawn: Sequence[Series], *, labels: float = 0.0) -> Panel:
    """Draw lines with their bands, and levels; their labels, of that size, stand at the right."""
    named: set[str] = set()
    for each in drawn:
        look = each.look
        shown = each.name if each.name not in named else None
        style = {"color": look.colour, "linewidth": look.width, "linestyle": look.dashes}
        style |= {"alpha": look.alpha, "zorder": look.order}
        if not each.x:
            axes.axhline(each.y[0], **style)
            if len(each.low) and np.isfinite(each.low[0]):
                axes.axhspan(
                    each.low[0], each.high[0], color=look.colour, alpha=look.band, linewidth=0
                )
            continue
        _bounds(axes, each)
        if look.width:
            axes.plot(each.x, each.y, label=shown, **style)
            named.add(each.name)
        _dots(axes, each.x, each.y, each, None if look.width else shown)
    if labels:
        axes.autoscale_view()
        place_labels(axes, drawn, size=labels)
    return _panel(axes, drawn)


def scatter(axes: Axes, drawn: Sequence[Series], *, marks: float = 7.0) -> Panel:
    """Draw points, joined where their look has a width, with marks of that size beside them."""
    for each in drawn:
        for x, y, mark in zip(each.x, each.y, each.marks, strict=False):
            axes.annotate(
                *(mark, (x, y), (4, 3)), textcoords="offset points", fontsize=marks, color=MUTED
            )
    return lines(axes, drawn)


def forest(
    axes: Axes, drawn: Sequence[Series], *, upwards: bool = False, named: bool = True
) -> Panel:
    """Draw a row for every name: values across with their intervals, labels at the right."""
    names = list(dict.fromkeys(each.name for each in drawn))
    for each in drawn:
        row = names.index(each.name)
        for low, high in zip(each.low, each.high, strict=True):
            if np.isfinite(low):
                axes.plot(
                    *([low, high], [row, row]),
                    color=each.look.colour,
                    linewidth=each.look.width,
                    solid_capstyle="butt",
                )
        _dots(axes, each.y, (row,) * len(each.y), each, None)
        if each.label is not None:
            axes.text(
                *(1.03, row, each.label),
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=8.5,
                color=INK,
            )
    _name_rows(axes, names if named else [""] * len(names), upwards=upwards)
    return _panel(axes, drawn)


def bars(axes: Axes, each: Series, names: Sequence[str] = ()) -> Panel:
    """Draw upright bars at ``x``; with names, bars across in rows, and their values beside them."""
    colours = [each.look.colour if value > 0 else COHERENCE for value in each.y]
    if not names:
        axes.bar(each.x, each.y, color=each.look.colour, width=0.8)
        rule(axes, 0)
        place_labels(axes, [each], size=8.5)
        return _panel(axes, [each])
    axes.barh(range(len(names)), each.y, color=colours, height=0.55)
    for place, value in enumerate(each.y):
        # Beside the bar, and on the free side of the axis where the bar goes left.
        axes.text(max(value, 0.0), place, f" {number(value, 2)}", va="center", fontsize=8.5)
    reach = 1.5 * max([abs(value) for value in each.y] + [0.1])
    axes.set_xlim(-reach, reach)
    rule(axes, 0, upright=True)
    _name_rows(axes, names, upwards=True)
    return _panel(axes, [each])


@dataclass(frozen=True)
class Cells:
    """The values of a heat map ``[rows, columns]`` (NaN: none), and how they are shown.

    ``at`` are the columns' places where they are not 0, 1, 2…; ``low`` and ``high`` the ends of the
    colours; ``missing`` what a cell without a value says.
    """

    values: Array
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    at: tuple[float, ...] = ()
    low: float = -1.0
    high: float = 1.0
    colours: Colormap = field(default_factory=lambda: CHANGE)
    missing: str = ""
    hatched: NDArray[np.bool_] | None = None  # [rows, columns]

    @property
    def is_hatched(self) -> NDArray[np.bool_]:
        """Which cells are hatched; none unless it is said."""
        return np.zeros(self.values.shape, bool) if self.hatched is None else self.hatched

    @property
    def places(self) -> tuple[float, ...]:
        """Where the columns stand."""
        return self.at or tuple(map(float, range(len(self.columns))))

    @property
    def half(self) -> float:
        """Half the width of a cell: columns that are not there are left blank."""
        return float(min(np.diff(self.places), default=1)) / 2

    def face(self, value: float) -> Any:
        """Return the colour of a value."""
        if not np.isfinite(value):
            return SHADE if self.missing else "white"
        return self.colours(Normalize(self.low, self.high)(value))


def heat_map(
    axes: Axes,
    cells: Cells,
    *,
    say: Callable[[int, int, float], str] = lambda row, column, value: number(value, 2),
    size: float = 8.5,
    upwards: bool = False,
    slanted: bool = False,
) -> Panel:
    """Draw a coloured cell for every value, with what ``say`` makes of it; a series is a row."""
    axes.grid(visible=False)
    for (row, column), value in np.ndenumerate(cells.values):
        place, face = cells.places[column], cells.face(value)
        layers: list[dict[str, Any]] = [{"facecolor": face, "edgecolor": "white", "linewidth": 0.7}]
        if cells.is_hatched[row, column]:
            layers.append(HATCHED)
        for style in layers:
            corner = (place - cells.half, row - 0.5)
            axes.add_patch(Rectangle(corner, 2 * cells.half, 1, **style))
        finite = bool(np.isfinite(value))
        axes.text(
            *(place, row, say(row, column, float(value)) if finite else cells.missing),
            ha="center",
            va="center",
            fontsize=size,
            color=("white" if _dark(face) else INK) if finite else MUTED,
        )
    axes.set_xlim(cells.places[0] - cells.half, cells.places[-1] + cells.half)
    slant: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(cells.places, cells.columns, fontsize=8, **(slant if slanted else {}))
    _name_rows(axes, cells.rows, upwards=upwards)
    axes.set_ylim(*((-0.5, len(cells.rows) - 0.5)[:: 1 if upwards else -1]))
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines["bottom"].set_visible(False)
    rows = zip(cells.rows, cells.values, strict=True)
    return _panel(axes, [Series(name, cells.places, tuple(each.tolist())) for name, each in rows])


# -- labels and ticks --------------------------------------------------------------------------


def place_labels(axes: Axes, drawn: Sequence[Series], *, size: float) -> None:
    """Write labels right of the axes, moved apart where they would collide, with leader lines."""
    bottom, top = axes.get_ylim()
    gap = 1.55 * size / 72 / inches_of(axes, "height") * (top - bottom)  # a line of text
    margin = (top - bottom) / 52
    ends = sorted((each.end, at) for at, each in enumerate(drawn) if each.end is not None)
    heights = spread([last for last, _ in ends], gap=gap, low=bottom + margin, high=top - margin)
    transform = axes.get_yaxis_transform()
    inch = 1 / inches_of(axes, "width")
    for (last, at), height in zip(ends, heights, strict=True):
        each = drawn[at]
        axes.plot(
            [1 + 0.02 * inch, 1 + 0.17 * inch],
            [last, height],
            transform=transform,
            color=each.look.colour,
            linewidth=0.8,
            alpha=0.7,
            clip_on=False,
        )
        axes.text(
            *(1 + LABEL_GAP * inch, height, each.label or ""),
            transform=transform,
            color=each.look.colour,
            fontsize=size,
            fontweight="bold" if each.look.bold else "normal",
            va="center_baseline",
        )


def label_width(drawn: Sequence[Series], *, size: float) -> float:
    """Return the room that labels need beside the axes, in inches (a generous estimate)."""
    em = size / 72
    widths = [
        len(each.label or "") * em * (0.66 if each.look.bold else 0.57)
        for each in drawn
        if each.end is not None
    ]
    return LABEL_GAP + max(widths, default=0.0) + 0.1


def spread(values: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Return ascending values moved as little as possible so that neighbours are ``gap`` apart.

    The result stays within ``low`` and ``high`` where there is room for that.
    """
    if not values:
        return []
    gap = min(gap, (high - low) / max(1, len(values) - 1))
    steps = gap * np.arange(len(values))
    levels = isotonic_regression(np.array(values) - steps).x  # neighbours that would cross meet
    moved = np.minimum(np.maximum(levels, low), high - steps[-1]) + steps
    return [float(each) for each in moved]


def spread_ticks(points: Sequence[float], *, gap: float) -> list[float]:
    """Choose points to label: 0 and the ends first, then those with room between them."""
    if not points:
        return []
    chosen: list[float] = []
    first = [point for point in (0.0, points[0], points[-1]) if point in points]
    for point in [*first, *points]:
        if all(abs(point - other) >= gap for other in chosen):
            chosen.append(point)
    return sorted(chosen)


def short(name: str) -> str:
    """Return a name shortened to what fits beside a curve."""
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def short_title(trait: str) -> str:
    """Return a trait's name as a title, shortened to what fits beside a curve."""
    return short(title_of(trait))


def inches_of(axes: Axes, side: Literal["width", "height"]) -> float:
    """Return the width or height of axes in inches."""
    box = axes.get_window_extent()
    return float(box.width if side == "width" else box.height) / DPI


def _panel(axes: Axes, drawn: Sequence[Series]) -> Panel:
    return Panel(axes.get_title(loc="left"), tuple(drawn))


def _bounds(axes: Axes, each: Series) -> None:
    look = each.look
    if look.band and each.low:
        axes.fill_between(
            *(each.x, each.low, each.high), color=look.colour, alpha=look.band, linewidth=0
        )
    if look.whiskers and each.low:
        axes.vlines(
            *(each.x, each.low, each.high), color=look.colour, linewidth=1.0, alpha=look.whiskers
        )


def _dots(
    axes: Axes, x: Sequence[float], y: Sequence[float], each: Series, label: str | None
) -> None:
    """Draw the points of a series, those that do not count hollow."""
    if not each.look.size:
        return
    hollow = np.array(each.hollow or (False,) * len(each.y), dtype=bool)
    for chosen, face in ((~hollow, each.look.colour), (hollow, "white")):
        axes.plot(
            np.array(x, dtype=float)[chosen],
            np.array(y, dtype=float)[chosen],
            linestyle="none",
            marker=each.look.marker,
            markersize=each.look.size,
            markerfacecolor=face,
            markeredgecolor=each.look.edge or each.look.colour,
            markeredgewidth=0.9,
            alpha=each.look.alpha,
            zorder=each.look.order,
            label=label if face != "white" else None,
        )


def _name_rows(axes: Axes, names: Sequence[str], *, upwards: bool) -> None:
    axes.grid(visible=False, axis="y")
    axes.set_ylim(*((-0.6, len(names) - 0.4) if upwards else (len(names) - 0.5, -0.5)))
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelsize=8.5, labelcolor=INK)


def _dark(face: Any) -> bool:
    if isinstance(face, str):
        return False
    red, green, blue = face[:3]
    return bool(0.299 * red + 0.587 * green + 0.114 * blue < 0.5)
