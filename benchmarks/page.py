"""One HTML page that needs nothing else: sortable tables, pictures inside, no network."""

from __future__ import annotations

import base64
import html as markup
from collections.abc import Sequence
from pathlib import Path

from resnet_fused.bench.results import Record
from resnet_fused.bench.tables import Grid, conditions_line

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.05rem; margin-top: 2.2rem }
.wide { overflow-x: auto } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4;
  white-space: nowrap }
th { background: #f5f5f5; position: sticky; top: 0 }
th button { all: unset; cursor: pointer } th button:focus-visible { outline: 2px solid #c8553d }
th[aria-sort=ascending] button::after { content: " \\25b2" }
th[aria-sort=descending] button::after { content: " \\25bc" }
.word { text-align: left } tr.green { background: #f0f7f0 }
tr.bad { color: #b00020; font-weight: 600 } tr.dim { color: #777 }
code { background: #f5f5f5; padding: .1rem .3rem } li, .conditions { font-size: 13px; color: #555 }
"""

#: Cells sort by the number they begin with where both have one, else as words; an empty one comes
#: last, so that a model's name given once keeps the tables readable unsorted.
SCRIPT = """
const number = text => parseFloat(text.replace(/^[^0-9.+-]+/, ''));
const compare = (a, b) => {
  const [x, y] = [number(a), number(b)];
  return isNaN(x) || isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
};
document.querySelectorAll('th button').forEach(button => button.addEventListener('click', () => {
  const head = button.parentElement, body = head.closest('table').tBodies[0];
  const down = head.getAttribute('aria-sort') === 'ascending';
  head.parentElement.querySelectorAll('th').forEach(th => th.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const at = head.cellIndex, cell = row => row.cells[at].dataset.value;
  const rows = [...body.rows].sort((p, q) => {
    const [a, b] = [cell(p), cell(q)];
    if (a === '-' || b === '-') return (a === '-') - (b === '-');
    return down ? compare(b, a) : compare(a, b);
  });
  rows.forEach(row => body.append(row));
}));
"""


def html(
    record: Record, grids: Sequence[Grid], closing: Sequence[str], pictures: Sequence[Path]
) -> str:
    """Return the page."""
    conditions = record.conditions
    return "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>resnet_fused benchmark suite</title>",
        f"<style>{STYLE}</style></head><body>",
        "<h1>resnet_fused benchmark suite</h1>",
        f'<p class="conditions">{markup.escape(conditions_line(conditions))}<br>',
        f"<code>{markup.escape(str(conditions.get('command', '')))}</code></p>",
        *map(_picture, pictures),
        *map(_table, grids),
        "<h2>Notes</h2><ul>",
        *(f"<li>{markup.escape(line)}</li>" for line in closing),
        "</ul>",
        f"<h2>Conditions</h2>{_conditions(record)}",
        f"<script>{SCRIPT}</script></body></html>",
    ]) + "\n"  # fmt: skip


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img alt="{markup.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _table(grid: Grid) -> str:
    head = "".join(
        f"<th{_kind(grid, name)}><button>{markup.escape(name)}</button></th>"
        for name in grid.columns
    )
    body = "\n".join(_row(grid, index, row) for index, row in enumerate(_filled(grid)))
    return (
        f'<h2>{markup.escape(grid.title)}</h2>\n<div class="wide"><table><thead><tr>{head}'
        f"</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _filled(grid: Grid) -> list[list[str]]:
    """Return the rows with what a first column leaves out repeated, as sorting tears them apart."""
    filled: list[list[str]] = []
    for row in grid.rows:
        above = filled[-1] if filled else row
        blanks = next((i for i, cell in enumerate(row) if cell), len(row))
        filled.append([*above[:blanks], *row[blanks:]])
    return filled


def _row(grid: Grid, index: int, row: list[str]) -> str:
    style = (grid.styles or {}).get(index, "")
    kind = "bad" if "red" in style else style if style in ("green", "dim") else ""
    cells = "".join(
        f'<td{_kind(grid, name)} data-value="{markup.escape(cell)}">{markup.escape(cell)}</td>'
        for name, cell in zip(grid.columns, row, strict=True)
    )
    return f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>"


def _kind(grid: Grid, column: str) -> str:
    return ' class="word"' if column in grid.left else ""


def _conditions(record: Record) -> str:
    rows = [[name, str(value)] for name, value in record.conditions.items()]
    cells = "".join(
        f'<tr><td class="word">{markup.escape(name)}</td>'
        f'<td class="word">{markup.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<div class="wide"><table><tbody>{cells}</tbody></table></div>'
