"""Write the figures of the committed CSVs into README.md and pages of docs/, between markers.

python -m perf.readme
"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf" / "results"
BEGIN, END = "<!-- figures: python -m perf.readme -->", "<!-- end of figures -->"


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def table(*rows) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(str(c) for c in row)} |" for row in rows)


def pointwise() -> str:
    """Forward + backward as multiples of torch's BCE, one row per loss and target form."""
    rows = read("pointwise_cpu")
    ratio = {(r["loss"], r["provider"]): r["times_bce"] for r in rows}
    names = dict.fromkeys(r["loss"] for r in rows if r["provider"] == "eager")
    first = rows[0]
    return (
        f"Forward + backward as multiples of `binary_cross_entropy_with_logits` "
        f"({first['best_ms']} ms in eager torch): {first['anchors']} anchors x {first['classes']} "
        f"classes, best of the rounds, torch {first['torch']} "
        f"(`python -m perf.bench_pointwise_cpu`).\n\n"
    ) + table(
        ("loss, targets", "eager", "compiled"),
        *((n, ratio[n, "eager"], ratio[n, "compiled"]) for n in names),
    )


def ranking() -> str:
    """The published methods' time over ours, and their error."""
    cells: dict[tuple, dict[str, dict]] = {}
    for r in read("ranking_cpu"):
        cells.setdefault((r["loss"], r["positives"], r["logits"]), {})[r["implementation"]] = r
    grown = read("ranking_growth_cpu")
    times = ", ".join(f"{r['median_ms']} ms at {int(r['logits']):.0e}" for r in grown)
    return (
        "Ranking losses: the time of the published methods over that of this package, which is "
        "exact for every δ; in brackets the relative error of the negatives' gradient "
        f"(`python -m perf.bench_ranking_cpu`). Rank & Sort with 300 positives takes {times} "
        f"logits; there its peak memory is {grown[-1]['peak_memory']} times the logits' own bytes, "
        "gradient and logits included (`--growth`).\n\n"
    ) + table(
        ("loss", "positives", "logits", "this package", "bucketed (δ = 0)", "loop over positives"),
        *(
            (
                *(loss, positives, f"{int(logits):.0e}", f"{cell['ours']['median_ms']} ms"),
                *(relative(cell.get(other)) for other in ("bucketed", "loop")),
            )
            for (loss, positives, logits), cell in cells.items()
        ),
    )


def more_positives() -> str:
    """What each ranking loss takes from the fewest positives to the most."""
    times: dict[str, dict[str, str]] = {}
    for r in read("ranking_positives_cpu"):
        column = f"{int(r['positives']):,} positives"
        times.setdefault(r["loss"], {})[column] = f"{r['median_ms']} ({r['growth']})"
    return (
        "The same with more positives, among 1e6 logits: ms, in brackets as a multiple of the "
        "first column (`python -m perf.bench_ranking_cpu --growth`).\n\n"
    ) + table(
        ("loss", *next(iter(times.values()))), *((loss, *t.values()) for loss, t in times.items())
    )


def relative(row: dict[str, str] | None) -> str:
    return f"{float(row['times_ours']):.1f} x ({row['gradient_error']})" if row else "not timed"


def harmonising() -> str:
    """GHM beside BCE and the loop over bins; ISR beside its loops."""
    rows = read("ghm_cpu")
    return (
        "GHM beside BCE, and ISR-P beside loops over classes and boxes "
        "(`python -m perf.bench_ghm_cpu`).\n\n"
    ) + table(
        ("input", "what", "ms", "ratio"),
        *((r["shape"], r["what"], f"{float(r['cpu_ms']):.1f}", r["ratio"]) for r in rows),
    )


def set_prediction() -> str:
    """Matching cost and criterion beside a host's own."""
    rows = read("detr_cpu")
    first = rows[0]
    return (
        "Set prediction, all decoder layers: the matching cost without the assignment, the "
        "criterion with its backward, and a step of both with the assignment, which is SciPy's on "
        "both sides. Processor time in ms (least of rounds that take turns) and most memory of "
        "tensors in MiB of transformers' RT-DETR (with groups LW-DETR) and of ours, in brackets "
        "ours / theirs. "
        f"torch {first['torch']}, {first['device']} (`python -m perf.bench_detr_cpu`).\n\n"
    ) + table(
        ("images x queries x objects x layers x classes", "what", "ms, theirs", "ms, ours",
         "MiB, theirs", "MiB, ours"),
        *((r["shape"], r["what"], r["host_ms"], f"{r['ours_ms']} ({r['time_ratio']})",
           r["host_peak_mib"], f"{r['ours_peak_mib']} ({r['peak_ratio']})") for r in rows),
    )  # fmt: skip


def heads() -> str:
    """Levels as they come beside permute, cat and the same loss."""
    rows = read("heads_cpu")
    first = rows[0]
    return (
        "A head of five levels, channels first, two images, forward and backward: permuted and "
        "concatenated before the loss, and as it comes. Processor time in ms (least of rounds that "
        "take turns) and most memory in MiB, in brackets levels / joined. "
        f"torch {first['torch']}, {first['device']} (`python -m perf.bench_heads_cpu`).\n\n"
    ) + table(
        ("loss", "logits", "ms, joined", "ms, levels", "MiB, joined", "MiB, levels"),
        *((r["loss"], r["logits"], r["joined_ms"], f"{r['levels_ms']} ({r['time_ratio']})",
           r["joined_peak_mib"], f"{r['levels_peak_mib']} ({r['peak_ratio']})") for r in rows),
    )  # fmt: skip


def host_time() -> str:
    """What the kernels' path costs the host."""
    rows = read("host_cpu")
    first = rows[0]
    return (
        "What a forward and its backward by the kernels cost the host, for 64 anchors: launches, "
        "and microseconds of one thread, fastest of many, with Triton's own launches and with "
        "those that remember their binaries. Without a GPU: CPU tensors, whose allocations cost "
        f"less, and a stand-in for the driver. Triton {first['triton']}, torch {first['torch']}, "
        f"{first['device']} (`python -m perf.calls`).\n\n"
    ) + table(
        ("loss", "launches", "us, Triton's launches", "us"),
        *((r["loss"], r["launches"], r["by_triton_us"], r["us"]) for r in rows),
    )


def counted_heads() -> str:
    """What the kernels execute over levels, and over the same rows in one tensor."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    rows = read("executed")
    columns = list(rows[0])
    of_classes = columns[columns.index("per") + 1 : columns.index("load bytes")]
    for row in rows:
        loss, _, way = row["loss"].partition(" of ")
        if row["inputs"] != "random" or way not in ("a head", "its rows"):
            continue
        work, moved = found.setdefault(loss, {}).get(way, (0.0, 0.0))
        work += sum(float(row[c]) for c in of_classes) / 32
        found[loss][way] = work, moved + float(row["load bytes"]) + float(row["store bytes"])
    return (
        "The kernels over five levels, channels first (56 x 56 to 4 x 4, 80 classes, random "
        "float32 logits), and over the same rows in one tensor, forward and backward, a logit: "
        "warp instructions, and bytes of the 32-byte sectors that warps ask the cache for. A "
        "level's labels, read once a class, stay in it. One tensor out of levels takes 16 bytes "
        "more, of memory, for permute and cat and their gradient. Counted on interpreted PTX of "
        "sm_90 (`python -m perf.executed`).\n\n"
    ) + table(
        ("loss", "instructions, levels", "instructions, rows", "bytes, levels", "bytes, rows"),
        *((loss, *(f"{way[key][k]:.{digits}f}" for k, digits in ((0, 2), (1, 1))
                   for key in ("a head", "its rows"))) for loss, way in found.items()),
    )  # fmt: skip


def detectors() -> str:
    """AP of the example's detector, one row per loss."""
    found: dict[str, dict[str, dict]] = {}
    for row in read("detector_ap"):
        found.setdefault(row["loss"], {})[row["data"]] = row
    every = next(iter(found.values()))  # the first loss was trained on everything
    steps = " and ".join(f"{r['steps']} steps on the {data}" for data, r in every.items())
    cells = [
        (name, *(ap(row.get(data), k) for data in every for k in ("AP40", "AP50")))
        for name, row in found.items()
    ]
    return (
        f"The example's small detector after {steps}, same seed and settings for every loss "
        "(`python examples/compare_losses.py`); short runs of one model, no ranking of losses:\n\n"
    ) + table(("`--loss`", *(f"{d}, {k}" for d in every for k in ("AP40", "AP50"))), *cells)


def ap(row: dict[str, str] | None, name: str) -> str:
    return f"{float(row[name]):.2f}" if row else ""


def in_short() -> str:
    """The span of the CPU's tables, which stand in docs/benchmarks.md."""
    rows = read("ranking_cpu")
    spans = {
        name: [float(r["times_ours"]) for r in rows if r["implementation"] == name]
        for name in ("bucketed", "loop")
    }
    shortest, longest = ({n: f(s) for n, s in spans.items()} for f in (min, max))
    grown = {r["logits"]: r for r in read("ranking_growth_cpu")}
    ghm = [float(r["ratio"]) for r in read("ghm_cpu") if r["what"].startswith("ghm_c")]
    return (
        f"Ranking losses at 1e5 and 1e6 logits: {shortest['loop']:.0f} to {longest['loop']:.0f} "
        f"times as fast as the published loop over positives, {shortest['bucketed']:.1f} to "
        f"{longest['bucketed']:.1f} times as fast as the bucketed method, which is exact for no "
        f"δ > 0. Rank & Sort with 300 positives among 1e7 logits takes "
        f"{float(grown['10000000']['median_ms']):.0f} ms and {grown['10000000']['peak_memory']} "
        f"times the memory of the logits. GHM-C takes {min(ghm):.1f} to {max(ghm):.1f} times BCE. "
        "All of it: [docs/benchmarks.md](docs/benchmarks.md)."
    )


def budgets() -> str:
    """Registers and spills per kernel, the largest over all that it was compiled for."""
    rows = read("budget")
    archs = dict.fromkeys(r["arch"] for r in rows)
    found: dict[str, dict[str, int]] = {}
    spills: dict[str, int] = {}
    for r in rows:
        kernel = found.setdefault(r["kernel"], dict.fromkeys(archs, 0))
        kernel[r["arch"]] = max(kernel[r["arch"]], int(r["registers"]))
        spills[r["kernel"]] = max(spills.get(r["kernel"], 0), int(r["spills"]))
    return (
        f"Registers a thread, the most of all dtypes, layouts and options ({len(rows)} binaries, "
        f"Triton {rows[0]['triton']}), and spilled accesses; `python -m perf.budget --check` holds "
        "new code against `perf/results/budget.csv`.\n\n"
    ) + table(
        ("kernel", *archs, "spilled"),
        *((name, *registers.values(), spills[name]) for name, registers in found.items()),
    )


def compiled_step() -> str:
    """Masks beside rows under torch.compile."""
    rows = read("compiled_step_cpu")
    first = rows[0]
    return (
        "The losses of a step of the example's detector (three levels, quality focal, distribution "
        "focal and GIoU, forward and backward to the head), with the positive cells as masks, and "
        f"as rows that are joined and indexed. What Dynamo makes of {first['steps']} steps, "
        "and processor time in ms of a step. "
        f"torch {first['torch']}, {first['device']} "
        "(`python -m perf.bench_compiled_step`).\n\n"
    ) + table(
        ("positives", "graph breaks", "graphs", "recompiles", "ms, eager", "ms, compiled"),
        *((r["positives"], *(r[k] for k in ("graph_breaks", "graphs", "recompiles", "eager_ms",
                                            "compiled_ms")))
          for r in rows),
    )  # fmt: skip


def diagnosing() -> str:
    """An update of a diagnosis over a focal loss, whatever was measured."""
    found = [r for path in sorted(RESULTS.glob("diagnose_*.csv")) for r in read(path.stem)]
    updates = [r for r in found if r["what"].startswith("diagnosis")]
    parts = [
        f"{r['times_focal']} ({r['targets']}, {r['dtype']}, {r['device'].split(',')[0]})"
        for r in updates
    ]
    return (
        "One update of a diagnosis takes this part of one focal loss, forward and backward: "
        f"{', '.join(parts)} (`python -m perf.bench_diagnose`)."
    )


def swept(name: str) -> str:
    """Time of every loss and provider in a sweep, and its multiple of the copy."""
    cells: dict[str, dict[tuple, dict[str, dict]]] = {}
    usual = {"status": "ok", "mode": "both", "dtype": "float32", "inputs": "random",
             "layout": "contiguous"}  # fmt: skip
    for r in read(name):
        if all(r[k] == v for k, v in usual.items()) and r["classes"] in ("80", "17", "4"):
            point = (int(r["rows"]), int(r["classes"]), int(r["positives"]))
            cells.setdefault(r["loss"], {}).setdefault(point, {})[r["provider"]] = r
    providers = [
        p
        for p in ("triton", "eager", "compiled", "published")
        if any(p in found for points in cells.values() for found in points.values())
    ]
    rows, shown = [], []
    for loss, points in cells.items():
        # the largest point that most providers have
        point = max(points, key=lambda p: (len(points[p]), p))
        found = points[point]
        shown += found.values()
        times = (
            f"{float(found[p]['ms']):.3g} ({float(found[p]['x_floor']):.3g})" if p in found else ""
            for p in providers
        )
        rows.append((loss, f"{point[0]:.0e} x {point[1]}", point[2], *times))
    first = shown[0]
    speeds = sorted({round(float(row["copy_gbps"])) for row in shown})
    speed = "–".join(str(v) for v in dict.fromkeys((speeds[0], speeds[-1])))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in shown))
    return (
        f"Forward + backward in ms, in brackets as a multiple of the time of reading the logits "
        f"twice and writing them once at copy speed ({speed} GB/s); float32, random logits. "
        f"{first['device']}, torch {first['torch']}, commit {commits} (`python -m perf.sweep`). "
        "*Published* is the formula in plain torch, or the loop over bins or positives.\n\n"
    ) + table(("loss", "anchors x columns", "positives", *providers), *rows)


def kernels_alone(name: str, short: bool = False) -> str:
    """Time of the kernels of a step on the GPU's own clock, the host left out."""
    rows = [r for r in read(name) if r["kernel"] == "all"]
    if short:
        rows = [r for r in rows if (r["positives"], r["dtype"]) == ("500", "float32")]
    axes = ("loss", "rows", "classes", "positives", "dtype", "layout")
    inputs = list(dict.fromkeys(r["inputs"] for r in rows))
    found: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        found.setdefault(tuple(r[k] for k in axes), {})[r["inputs"]] = r

    def cell(row):
        return f"{float(row['us']):.0f} ({float(row['x_floor']):.2f})" if row else ""

    first, commits = rows[0], ", ".join(dict.fromkeys(r["commit"] for r in rows))
    return (
        "The kernels of one forward and backward alone, in microseconds on the GPU's clock, in "
        "brackets as a multiple of reading the logits twice and writing them once at copy speed; "
        "logits drawn at random, of a trained detector (recorded) and of a new one (initial). "
        f"{first['device']}, torch {first['torch']}, Triton {first['triton']}, commit {commits} "
        "(`python -m perf.kernel_times`).\n\n"
    ) + table(
        ("loss", "anchors x columns", "positives", "logits", *inputs),
        *(
            (loss, f"{rows} x {classes}", positives, f"{dtype}, {layout}",
             *(cell(cells.get(i)) for i in inputs))
            for (loss, rows, classes, positives, dtype, layout), cells in found.items()
        ),
    )  # fmt: skip


def tested_on_gpus() -> str:
    """What the test suite said on a GPU."""
    lines = []
    for path in sorted(RESULTS.glob("gpu_tests_*.csv")):
        rows = read(path.stem)
        passed, failed, skipped = (
            sum(int(r[k]) for r in rows) for k in ("passed", "failed", "skipped")
        )
        part = "The test suite" if len(rows) > 1 else f"The {rows[0]['file']}"
        commits = ", ".join(dict.fromkeys(r["commit"] for r in rows))
        lines.append(
            f"{part}, on {rows[0]['device']}, torch {rows[0]['torch']}, commit {commits}: {passed} "
            f"passed, {failed} failed, {skipped} skipped (`make gpu-check`)."
        )
    return "\n\n".join(lines)


def beside_others() -> str:
    """Focal loss as users call it, beside what they would write in its place."""
    lines = []
    for path in sorted(RESULTS.glob("sweep_*.csv")):
        points: dict[tuple, dict[str, dict]] = {}
        for r in read(path.stem):
            if (r["loss"], r["mode"], r["dtype"], r["status"]) == (
                "focal",
                "both",
                "float32",
                "ok",
            ):
                points.setdefault((int(r["rows"]), r["classes"]), {})[r["provider"]] = r
        everything = [p for p in points if {"triton", "compiled", "published"} <= set(points[p])]
        if everything:
            point = max(everything)
            found = {name: f"{float(r['ms']):.2f}" for name, r in points[point].items()}
            first = points[point]["triton"]
            lines.append(
                f"Focal loss of {point[0]:.0e} x {point[1]} float32 logits, forward + backward as "
                f"called: {found['triton']} ms ({float(first['x_floor']):.2f} x the copy), "
                f"torch.compile of the plain formula {found['compiled']} ms, eager "
                f"{found['eager']} ms, the published code {found['published']} ms "
                f"({first['device']}, commit {first['commit']}, `python -m perf.sweep`)."
            )
    return "\n\n".join(lines)


# Older runs on other GPUs are kept beside the newest.
NEWEST = "kernels_nvidia_h100_80gb_hbm3"


def on_gpus(newest_only: bool = False) -> list[str]:
    """What was measured on GPUs, or that nothing was yet."""
    sweeps = [p.stem for p in sorted(RESULTS.glob("sweep_*.csv")) if p.stem != "sweep_cpu"]
    alone = [p.stem for p in sorted(RESULTS.glob("kernels_*.csv"))]
    if newest_only and alone:
        return [tested_on_gpus(), beside_others(), kernels_alone(NEWEST, short=True)]
    if sweeps or alone:
        return [tested_on_gpus(), *map(kernels_alone, alone), *map(swept, sweeps)]
    return [
        "Not yet measured: anything on a GPU. The kernels are checked in Triton's interpreter "
        "against the float64 formulas, and compiled for sm_80, sm_90, sm_100 and gfx942 without a "
        "device (`python -m perf.budget`: at most four spilled accesses, no float64 arithmetic per "
        "logit, 16-byte loads). That proves what they compute, not how fast."
    ]


def beside_host(host: str) -> str:
    """Time of what an integration exchanges over that of the host's own."""
    rows = [r for r in read("hosts_cpu") if r["host"].split()[0] == host]
    first = rows[0]
    return (
        "Processor time of a call, forward + backward, in ms: medians of rounds that take turns in "
        "one process, and the median of their ratios, which is what to read. "
        f"{first['host']}, torch {first['torch']}, {first['device']} "
        "(`python -m perf.bench_hosts_cpu`).\n\n"
    ) + table(
        ("exchanged", "shape", "host", "ours", "ours / host"),
        *((f"`{r['loss']}`", *(r[k] for k in ("shape", "host_ms", "ours_ms", "ratio")))
          for r in rows),
    )  # fmt: skip


HOSTS = ("torchvision", "mmdet", "transformers", "ultralytics")
GPU = "On a GPU:"
CPU = "On a CPU, float32, one thread:"
FILES = {
    "README.md": lambda: [
        GPU, *on_gpus(newest_only=True), CPU, in_short(), heads(), diagnosing(), detectors()
    ],
    "docs/benchmarks.md": lambda: [
        GPU, *on_gpus(), CPU, pointwise(), ranking(), more_positives(), harmonising(),
        set_prediction(), heads(),
        counted_heads(), host_time(), compiled_step(), diagnosing(),
        swept("sweep_cpu"), budgets(),
    ],
    **{f"docs/hosts/{host}.md": lambda host=host: [beside_host(host)] for host in HOSTS},
}  # fmt: skip


def main() -> None:
    for name, parts in FILES.items():
        path = ROOT / name
        text = path.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        figures = "\n\n".join(parts())
        path.write_text(f"{before}{BEGIN}\n{figures}\n{END}{after}")


if __name__ == "__main__":
    main()
