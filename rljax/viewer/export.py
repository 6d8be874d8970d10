"""The page as one file that needs no server: with all metrics, and the rollouts of some steps."""

import json
from pathlib import Path
from urllib.parse import urlencode

from rljax.viewer.answers import MOST_FOUND, Answers
from rljax.viewer.index import SEARCHES
from rljax.viewer.server import PAGE

MOST_STEPS = 5
"""Steps of each run, spread evenly, whose rollouts are in the file."""
MOST_GROUPS = 12
"""Groups of each of these steps."""

_ALL = 10**9


def export(answers: Answers, file: str | Path) -> None:
    """Writes the page for the runs of `answers`. Curves and alarms are whole; `MOST_STEPS` and `MOST_GROUPS` bound the
    rollouts, the first and the last step among them, and searches list what lies in these."""
    told: dict[str, object] = {}

    def ask(path: str, **params: object) -> dict:
        asked = {name: str(value) for name, value in params.items()}
        found = answers(path, asked)
        told[f"{path}?{urlencode(sorted(asked.items()))}"] = found
        return found

    runs = answers("runs", {})
    for number, run in enumerate(runs["runs"]):
        ask("metrics", run=number)
        run["rollouts"] = _spread(run["rollouts"], MOST_STEPS)

        kept = set()
        for step, is_untrained in run["rollouts"]:
            place = {"run": number, "step": step, "untrained": int(is_untrained)}
            groups = answers("groups", {name: str(value) for name, value in place.items()})[:MOST_GROUPS]
            told[f"groups?{urlencode(sorted(place.items()))}"] = groups
            for group in groups:
                ask("group", **place, group=group["group"])
                kept.add((step, int(is_untrained), group["group"]))

        for search in SEARCHES:
            # Others may be ahead of those that are kept, however many they are.
            every = answers("find", {"run": str(number), "search": search, "limit": str(_ALL)})["found"]
            found = [row for row in every if (row["step"], row["untrained"], row["prompts"]) in kept]
            told[f"find?run={number}&search={search}"] = {"pending": 0, "found": found[:MOST_FOUND]}
    told["runs?"] = runs

    page = (PAGE / "index.html").read_text(encoding="utf-8")
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    page = page.replace('<link rel="stylesheet" href="style.css">', f"<style>{style}</style>")
    for name in ("draw.js", "app.js"):
        script = (PAGE / name).read_text(encoding="utf-8")
        tag = f'<script src="{name}" defer></script>'
        page = page.replace(tag, "")
        page = page.replace("</body>", f"<script>{script}</script></body>")

    # Text of a rollout may hold </script>; no character of markup stays in the data.
    data = json.dumps(told, allow_nan=False)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = page.replace("<main", f'<script type="application/json" id="told">{data}</script><main', 1)
    Path(file).write_text(page, encoding="utf-8")


def _spread(items: list, most: int) -> list:
    """At most so many, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
