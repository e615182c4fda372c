"""A report's page taken apart with the standard library, and folders of points to make one of."""

from html.parser import HTMLParser
from pathlib import Path

from helpers_points import MS, gpu_environment, write_point

from tunescope.config import Point

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """tables: id -> rows of (text, data-sort) with the header first. ids, links, headings, tags in order; text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.text = ""
        self._open: list[str] = []
        self._table: list[list[tuple[str, str | None]]] | None = None
        self._cell: list[str] | None = None
        self._sort: str | None = None
        self._heading: list[str] | None = None
        self.feed(html)
        self.close()
        self.is_balanced = not self._open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = self.tables[found["id"]] = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("th", "td"):
            self._cell, self._sort = [], found.get("data-sort")
        elif tag in ("h1", "h2", "h3"):
            self._heading = []

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> without a start"
        assert self._open.pop() == tag
        if tag in ("th", "td"):
            self._table[-1].append(("".join(self._cell), self._sort))
            self._cell = None
        elif tag in ("h1", "h2", "h3"):
            self.headings.append((int(tag[1]), "".join(self._heading)))
            self._heading = None

    def handle_data(self, data):
        if self._open and self._open[-1] in ("style", "script"):
            return
        self.text += data
        for parts in (self._cell, self._heading):
            if parts is not None:
                parts.append(data)

    def column(self, table: str, header: str) -> list[tuple[str, str | None]]:
        rows = self.tables[table]
        place = [text for text, _ in rows[0]].index(header)
        return [row[place] for row in rows[1:]]


def point(dataset="cs", top_k=2, batch=1, preset="full", num_layers=32, model="mixtral", **more) -> Point:
    return Point(
        model=model, dataset=dataset, top_k=top_k, per_device_batch_size=batch, preset=preset, num_layers=num_layers,
        total_layers=num_layers, **more,
    )  # fmt: skip


def mixed_folder(folder: Path, *, factor: float = 1.0) -> Path:
    """Four points on an A40: two ok, one out of memory, one failed. factor: on the duration of every step."""
    scatter = [0, 30, -20, 10, -40, 25, 5, -15, 35, -30]
    for top_k, step_ms in ((2, 2900), (8, 3100)):
        durations = [round((step_ms + part) * MS * factor) for part in scatter * 2]
        write_point(
            folder / f"cs-k{top_k}-b1-full-nvidia-a40", point(top_k=top_k), durations,
            outcome_changes={"gpu_energy_j": 5000.0 * factor},
        )  # fmt: skip
    write_point(
        folder / "cs-k2-b8-full-nvidia-a40", point(batch=8), status="oom", cause="CUDA out of memory: tried 2 GiB"
    )
    write_point(
        folder / "cs-k8-b2-full-nvidia-a40", point(top_k=8, batch=2), status="failed",
        cause="FileNotFoundError: /home/alice/secret/data.json is missing on alice@box17",
    )  # fmt: skip
    return folder


HOSTILE = "<script>alert('x')</script>\"&\u202egpj.exe $\\frac{1}{0}$ \x07"


def hostile_folder(folder: Path) -> Path:
    """Two points whose device, commit, folder, cause and code path are markup, mathematics and control characters."""
    environment = gpu_environment(HOSTILE, 44.4) | {"git_revision": f"</style>{HOSTILE}"}
    durations = [1000 * MS + n for n in range(23)]
    write_point(folder / "a'\"><svg onload=x>", point(), durations, environment=environment)
    write_point(
        folder / "b", point(batch=2), status="failed", cause=HOSTILE * 3, environment=environment,
        point_changes={"moe": "]]>--><script>"},
    )  # fmt: skip
    return folder
