"""Draws docs/life-of-a-token.png from the arrays that the blocks of docs/life-of-a-token.md compute.

python docs/life_of_a_token.py
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent
TEXT = {0: "·", 1: "end", 2: "a", 3: "b", 4: "<", 5: ">"}

INK = "#22303c"
MUTED = "#7d8b97"
LINE = "#c9d2d9"
PANEL = "#f7f9fa"
PROMPT = "#e4e9ed"
SAMPLED = "#d3e5f5"
TOKEN = "#f28e2b"
BETTER = "#2c7fb8"
WORSE = "#b5544f"
MONO = "DejaVu Sans Mono"

CELL = 3.0
"""Side of a token's box, in units of the drawing."""


def arrays() -> dict[str, Any]:
    """What the blocks of the page define."""
    page = (FOLDER / "life-of-a-token.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "life-of-a-token.md", "exec"), names)
    return names


def draw(values: dict[str, Any], file: Path) -> None:
    """Writes the picture: six panels, clockwise, the token in orange wherever it is."""
    figure = Figure(figsize=(14.4, 8.6))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 144), ylim=(0, 86))
    axes.axis("off")

    panel(axes, (2, 47.5), 40, 36.5, "1", "a data row becomes ids")
    panel(axes, (52, 47.5), 40, 36.5, "2", "the decoder samples")
    panel(axes, (102, 47.5), 40, 36.5, "3", "rows [B, T], rewards, credit")
    panel(axes, (102, 1.5), 40, 39.3, "4", "packed: each token once")
    panel(axes, (52, 1.5), 40, 39.3, "5", "log-probs as rows, the loss")
    panel(axes, (2, 1.5), 40, 39.3, "6", "gradient and update")

    example_panel(axes, values)
    sampling_panel(axes, values)
    rows_panel(axes, values)
    forest_panel(axes, values)
    loss_panel(axes, values)
    update_panel(axes, values)

    flow(axes, (42.5, 65), (51.5, 65), "prompt")
    flow(axes, (92.5, 65), (101.5, 65), "stack")
    flow(axes, (122, 47), (122, 41.3), "pack")
    flow(axes, (101.5, 22), (92.5, 22), "score")
    flow(axes, (51.5, 22), (42.5, 22), "grad")
    loop(axes)

    figure.savefig(file, dpi=120)


def example_panel(axes: Axes, values: dict[str, Any]) -> None:
    example = values["example"]
    write(axes, 5, 75, "prompt", MUTED)
    write(axes, 15, 75, f"user: {example.prompt[0]['content']}", mono=True)
    write(axes, 5, 71.5, "answer", MUTED)
    write(axes, 15, 71.5, example.columns["answer"], mono=True)
    write(axes, 5, 68, "id", MUTED)
    write(axes, 15, 68, str(example.id), mono=True)

    write(axes, 5, 61.5, "through the chat template", MUTED)
    for place, token in enumerate(values["prompt"]):
        cell(axes, 5 + CELL * place, 56.5, TEXT[token], PROMPT)
        write(axes, 5 + CELL * (place + 0.5), 55, str(token), MUTED, size=7.5, align="center")
    write(axes, 18.5, 58, "ids; the policy speaks next", MUTED)
    write(axes, 5, 49.5, "The judge alone reads the answer.", MUTED)


def sampling_panel(axes: Axes, values: dict[str, Any]) -> None:
    write(axes, 55, 75, "key of the uniform number u", MUTED)
    parts = (
        f"fold(seed {values['seed']}, step 38, prompt {values['example'].id},",
        "     sample 0, position 0)",
    )
    for line, text in enumerate(parts):
        write(axes, 55, 72 - 2.6 * line, text, mono=True, size=8.5)

    probabilities = np.asarray(values["probabilities"])
    uniform = float(values["uniform"])
    left, width, base = 55.0, 34.0, 57.5
    start = 0.0
    for token, share in enumerate(probabilities):
        chosen = token == 3
        x = left + width * start
        box = Rectangle(
            (x, base), width * share, 4.2, facecolor=TOKEN if chosen else SAMPLED, edgecolor="white", lw=1.5
        )
        axes.add_patch(box)
        write(
            axes, x + width * share / 2, base + 2.1, TEXT[token], "white" if chosen else INK, align="center", mono=True
        )
        start += float(share)
    mark = left + width * uniform
    for end in (base - 0.7, base + 4.9):  # not across the letter
        axes.plot([mark, mark], [end - 0.5, end + 0.5], color=INK, lw=2)
    write(axes, mark, base + 6.3, f"u = {uniform:.4f}", align="center", size=9)
    write(axes, left, base - 2.2, "0", MUTED, size=8)
    write(axes, left + width, base - 2.2, "1", MUTED, size=8, align="right")
    write(axes, mark, base - 2.4, f"probability {probabilities[3]:.3f}", TOKEN, size=9, align="center", weight="bold")
    write(axes, 55, 49.5, "No batch row, slot or device enters the key.", MUTED)


def rows_panel(axes: Axes, values: dict[str, Any]) -> None:
    batch = values["batch"]
    left, top = 105.0, 70.5
    write(axes, left, 75.8, "prompt", MUTED, size=8.5)
    write(axes, left + 4 * CELL + 0.3, 75.8, "sampled", MUTED, size=8.5)
    write(axes, left + 9.2 * CELL, 75.8, "R", MUTED, size=8.5, align="right")
    write(axes, left + 11.2 * CELL, 75.8, "A", MUTED, size=8.5, align="right")
    for row in range(4):
        y = top - 4.4 * row
        for column in range(7):
            token = int(batch.tokens[row, column])
            is_ours = column == 4 and token == 3
            fill = TOKEN if is_ours else PROMPT if column < 4 else SAMPLED
            cell(axes, left + CELL * column, y, TEXT[token], fill, "white" if is_ours else INK)
        credit = float(values["advantages"][row, 4])
        write(axes, left + 9.2 * CELL, y + 1.5, f"{float(batch.reward[row]):.1f}", mono=True, align="right")
        write(axes, left + 11.2 * CELL, y + 1.5, f"{credit:+.2f}", colour(credit), mono=True, align="right")
    write(axes, left, 53.2, "Two rows began with b: one is right,", MUTED)
    write(axes, left, 50.6, "one is half right.  A = (R - mean) / std", MUTED)


def forest_panel(axes: Axes, values: dict[str, Any]) -> None:
    """The packed sequence, its tree above, and who sees whom below."""
    forest = values["forest"]
    count = len(forest.tokens)
    left, size = 106.6, 2.45
    base = 29.2
    for index in range(count):
        token = int(forest.tokens[index])
        before = int(forest.predecessor[index])
        ours = index == 4
        fill = TOKEN if ours else PROMPT if index < 4 else SAMPLED
        cell(axes, left + size * index, base, TEXT[token], fill, "white" if ours else INK, size=size)
        if before >= 0:
            start = (left + size * (before + 0.5), base + size + 0.2)
            end = (left + size * (index + 0.5), base + size + 0.2)
            bend = -0.55 if index - before > 1 else -0.8
            axes.add_patch(
                FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-", color=MUTED, lw=1.0)
            )

    # One line of the triangle for each query: the keys that it sees.
    unit = 1.45
    x, y = 108.2, 26.0
    for query in range(count):
        for key in range(query + 1):
            if query < forest.subtree_end[key]:
                ours = key == 4 or query == 4
                box = (x + unit * key, y - unit * (query + 1))
                axes.add_patch(Rectangle(box, unit * 0.9, unit * 0.9, color=TOKEN if ours else "#9fb3c3", lw=0))
    write(axes, 119, 24.9, "query q sees key k iff", MUTED, size=8.5)
    write(axes, 119, 22.6, "k <= q < subtree_end[k]", mono=True, size=8.5)
    write(axes, x - 0.9, y - unit * 4.6, "b", TOKEN, mono=True, size=9, align="center", weight="bold")
    write(axes, x + unit * 4.45, y - unit * 14.8, "b", TOKEN, mono=True, size=9, align="center", weight="bold")
    flat = int(values["batch"].lengths.sum())
    write(axes, 119, 19.6, f"{flat} tokens of rows,", MUTED, size=8.5)
    write(axes, 119, 17.3, f"{count} computed", MUTED, size=8.5)


def loss_panel(axes: Axes, values: dict[str, Any]) -> None:
    """Scored tokens, and the rows that gather them."""
    index = values["row_index"]
    logprobs = np.asarray(values["logprobs"])[0]
    left, size = 56.0, 3.25
    top = 29.0
    write(axes, left, 33.8, "log-prob of each scored token  [K]", MUTED, size=8.5)
    for k, token in enumerate(values["forest"].tokens[values["score_index"]]):
        cell(
            axes, left + size * k, top, TEXT[int(token)], TOKEN if k == 0 else SAMPLED, "white" if k == 0 else INK, size
        )
        write(axes, left + size * (k + 0.5), top - 1.3, f"{logprobs[k]:.2f}", MUTED, size=6.8, align="center")

    row_left, row_top = 66.0, 20.4
    for row in range(4):
        y = row_top - 4.1 * row
        for column in range(3):
            k = int(index[row, 4 + column])
            ours = k == 0
            cell(axes, row_left + CELL * column, y, str(k), TOKEN if ours else SAMPLED, "white" if ours else INK)
        credit = float(values["advantages"][row, 4])
        write(axes, row_left + 3 * CELL + 1.4, y + 1.5, f"A {credit:+.2f}", colour(credit), mono=True, size=9)
    write(axes, row_left, row_top + 4.6, "row_index", mono=True, size=8.5)
    write(axes, row_left + 8.6, row_top + 4.6, "[B, T]", MUTED, size=8.5)
    for y in (row_top + 1.5, row_top - 4.1 * 3 + 1.5):
        axes.add_patch(
            FancyArrowPatch(
                (left + size * 0.35, top - 2.4),
                (row_left - 0.3, y),
                connectionstyle="arc3,rad=0.25",
                arrowstyle="-|>",
                mutation_scale=9,
                color=TOKEN,
                lw=1.4,
            )
        )
    write(axes, 56, 5.2, "loss = sum of  -A r / 12,   r = exp(lp - lp_old) = 1", MUTED, size=8.5)


def update_panel(axes: Axes, values: dict[str, Any]) -> None:
    """The gradient of each log-prob, and what the update makes of the probability."""
    gradient = np.asarray(values["gradient"])
    tokens = values["forest"].tokens[values["score_index"]]
    left, size, zero = 6.0, 3.25, 26.0
    write(axes, left, 33.8, "- d loss / d log-prob", MUTED, size=8.5)
    axes.plot([left, left + size * 10], [zero, zero], color=LINE, lw=1)
    for k, value in enumerate(-gradient):
        height = 44 * float(value)
        fill = TOKEN if k == 0 else BETTER if value > 0 else WORSE
        axes.add_patch(Rectangle((left + size * k + 0.5, zero), size - 1.0, height, color=fill, lw=0))
        offset = -1.3 if value > 0 else 1.3
        write(axes, left + size * (k + 0.5), zero + offset, TEXT[int(tokens[k])], mono=True, size=8.5, align="center")
    credit = values["advantages"][[0, 3], 4]
    write(
        axes,
        left,
        17.2,
        f"b: ({credit[0]:.4f} + {credit[1]:.4f}) / 12 = {-gradient[0]:.4f}",
        TOKEN,
        size=9.5,
        weight="bold",
    )
    write(axes, left, 14.6, "what its two rows say, added up", MUTED, size=8.5)

    before = float(values["probabilities"][3])
    after = before * float(values["ratios"][0])
    write(axes, left, 9.8, "probability of b behind <ab>", MUTED, size=8.5)
    for y, share, text in ((7.0, before, "before"), (4.4, after, "after")):
        write(axes, left, y + 0.8, text, MUTED, size=8)
        axes.add_patch(
            Rectangle((left + 6, y), 90 * share, 1.7, color=TOKEN, alpha=0.45 if text == "before" else 1, lw=0)
        )
        write(axes, left + 6.8 + 90 * share, y + 0.8, f"{share:.3f}", size=8.5)


def loop(axes: Axes) -> None:
    """From the update back to the decoder."""
    height = 44.1
    axes.plot([22, 22, 72, 72], [41.2, height, height, height + 0.5], color=INK, lw=2, solid_joinstyle="round")
    axes.add_patch(FancyArrowPatch((72, height), (72, 47.1), arrowstyle="-|>", mutation_scale=16, color=INK, lw=2))
    write(axes, 47, height + 1.6, "set_params", size=9.5, align="center")
    write(axes, 47, height - 1.5, "step 39 samples with the new weights", MUTED, size=8.5, align="center")


def panel(axes: Axes, corner: tuple[float, float], width: float, height: float, number: str, title: str) -> None:
    x, y = corner
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=1.2", facecolor=PANEL, edgecolor=LINE, lw=1.2
    )
    axes.add_patch(shape)
    axes.add_patch(Circle((x + 3.2, y + height - 3.4), 1.5, color=INK))
    write(axes, x + 3.2, y + height - 3.45, number, "white", size=10, align="center", weight="bold")
    write(axes, x + 6, y + height - 3.4, title, size=11.5, weight="bold")


def flow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color=INK, lw=2)
    axes.add_patch(arrow)
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    upright = start[0] == end[0]
    write(
        axes,
        x + (1.2 if upright else 0),
        y + (0 if upright else 1.6),
        text,
        size=9.5,
        align="left" if upright else "center",
    )


def cell(axes: Axes, x: float, y: float, text: str, fill: str, ink: str = INK, size: float = CELL) -> None:
    axes.add_patch(Rectangle((x, y), size, size, facecolor=fill, edgecolor="white", lw=1.5))
    small = 3 * size if len(text) == 1 else 2.1 * size
    write(axes, x + size / 2, y + size / 2, text, ink, size=min(small, 10.5), align="center", mono=True)


def write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    ink: str = INK,
    *,
    size: float = 9.5,
    align: str = "left",
    mono: bool = False,
    weight: str = "normal",
) -> None:
    family = {"family": MONO} if mono else {}
    axes.text(x, y, text, color=ink, fontsize=size, ha=align, va="center", weight=weight, **family)


def colour(credit: float) -> str:
    return BETTER if credit > 0 else WORSE


if __name__ == "__main__":
    draw(arrays(), FOLDER / "life-of-a-token.png")
