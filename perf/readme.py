"""Write the figures of the committed CSVs into README.md, between its markers.

python -m perf.readme
"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures: python -m perf.readme -->", "<!-- end of figures -->"


def pointwise_table() -> str:
    """Forward + backward as multiples of torch's BCE, one row per loss and target form."""
    with (ROOT / "perf/results/pointwise_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    ratio = {(r["loss"], r["provider"]): r["times_bce"] for r in rows}
    names = dict.fromkeys(r["loss"] for r in rows if r["provider"] == "eager")
    lines = ["| loss, targets | eager | compiled |", "|---|---|---|"]
    lines += [f"| {n} | {ratio[n, 'eager']} | {ratio[n, 'compiled']} |" for n in names]
    first = rows[0]
    head = (
        f"Forward + backward on a CPU, as multiples of `binary_cross_entropy_with_logits` "
        f"({first['median_ms']} ms in eager torch, median) in the same run: {first['anchors']} "
        f"anchors x {first['classes']} classes, float32, {first['threads']} thread, torch "
        f"{first['torch']}; `python -m perf.bench_pointwise_cpu`."
    )
    return f"{head}\n\n" + "\n".join(lines)


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{pointwise_table()}\n{END}{after}")


if __name__ == "__main__":
    main()
