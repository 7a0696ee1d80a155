"""Test and time everything on the GPU of this machine: ``python -m perf.gpu_check``.

Each step runs in a process of its own with a time limit, so that none takes another down. Logs,
figures and the summary land in the ``--out`` folder. Nothing has to be installed but torch and
Triton; what is missing is listed, and its steps are skipped. The exit code is 1 if a step failed.
``--device cpu`` is a dry run of all that needs no GPU, through the interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from ._measure import ROOT, commit, cuda_tool, device_name, machine, write_rows

SKIPPED = 77
STEP_SECONDS = "TRITONLOSS_STEP_SECONDS"  # what a step in a process of its own may take
OUTCOMES = ("passed", "failed", "skipped")  # of tests
OPTIONAL = ("hypothesis", "matplotlib", "numpy", "pandas", "pycocotools", "pytest",
            "ruff", "sklearn", "tqdm", "xdist")  # fmt: skip


class Skip(Exception):
    """The step cannot run here."""


def missing(*packages: str) -> list[str]:
    return [p for p in packages if importlib.util.find_spec(p) is None]


def need_gpu(device: str) -> None:
    if device == "cpu":
        raise Skip("needs a GPU")


def run(*command) -> None:
    """A Python module in a process of its own."""
    code = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT).returncode
    if code:
        raise SystemExit(code)


# ------------------------------------------------------------------------------------- the steps


def environment(device: str, out: Path) -> None:
    """What this machine is."""
    import torch
    import triton

    import tritonloss

    print(tritonloss.show_config())
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "absent": missing(*OPTIONAL),
        "commit": commit(),
    }
    if device != "cpu":
        facts["gpu"] = {
            name: str(getattr(torch.cuda.get_device_properties(0), name))
            for name in ("name", "total_memory", "multi_processor_count", "major", "minor")
        }
    (out / "environment.json").write_text(json.dumps(facts, indent=2))
    print(json.dumps(facts, indent=2))


def tests(device: str, out: Path) -> None:
    """The test suite, with the kernels on the GPU, in many processes; ``tests.csv`` counts it."""
    if missing("pytest"):
        raise Skip("pytest is absent")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    # What these say is the same without a GPU, and they install packages, train or emulate.
    files = [f for f in files if f.stem not in ("test_package", "test_example", "test_ptx")]
    if device == "cpu":
        files = [f for f in files if f.stem == "test_boxes"]
    workers = max(min(len(os.sched_getaffinity(0)) - 2, 14), 1)
    seconds = float(os.environ.get(STEP_SECONDS, STEPS["tests"][1]))
    deadline = time.monotonic() + seconds - 30
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--tb=short"]
    command += ["-p", "no:cacheprovider"]
    (out / "tests").mkdir(exist_ok=True)
    stopped = []

    def run_files(name: str, chosen: list[Path], *options: str) -> Path:
        log = out / "tests" / f"{name}.log"
        report = log.with_suffix(".xml")
        words = [*command, *options, f"--junitxml={report}", *map(str, chosen)]
        with log.open("w") as stream:
            running = subprocess.Popen(words, cwd=ROOT, stdout=stream, stderr=stream)
            try:
                running.wait(max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:  # pytest writes down what it has
                stopped.append(name)
                running.send_signal(signal.SIGINT)
                running.wait(20)
        lines = log.read_text(errors="replace").strip().splitlines()[-1:]
        print(f"{name}: {lines[0] if lines else ''}", flush=True)
        return report

    if missing("xdist"):  # a process for each file
        with ThreadPoolExecutor(workers) as pool:
            reports = list(pool.map(lambda f: run_files(f.stem, [f]), files))
    else:
        reports = [run_files("all", files, "-n", str(workers), "--dist", "worksteal")]
    counts = outcomes(reports)
    source = machine(device)
    write_rows(
        out / "tests.csv",
        ({"file": name, **{k: found[k] for k in OUTCOMES}} | source
         for name, found in sorted(counts.items())),
        ("file", *OUTCOMES, *source),
    )  # fmt: skip
    absent = {f.stem for f in files} - set(counts)
    failed = sum(found["failed"] for found in counts.values())
    words = f"{sum(found['passed'] for found in counts.values())} passed in {len(files)} files"
    if stopped:
        words += f", stopped after {seconds:.0f} s"
    if failed or absent or stopped:
        raise SystemExit(
            f"{words}; {failed} failed; without a result: {', '.join(sorted(absent)) or 'none'}"
        )
    print(words)


def outcomes(reports: list[Path]) -> dict[str, Counter]:
    """Passed, failed and skipped of each test file, from JUnit's reports."""
    found = defaultdict(Counter)
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            tags = {child.tag for child in case}
            outcome = "failed" if tags & {"failure", "error"} else "skipped" if tags else "passed"
            if name := case.get("classname"):  # not what an interrupted worker leaves
                found[name.split(".")[-1]][outcome] += 1
    return found


def sync(device: str, out: Path) -> None:
    """No loss makes the host wait for the GPU."""
    need_gpu(device)
    import torch

    from . import workloads

    for name, call in workloads.every_loss(device):
        workloads.value_and_gradient(call)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            workloads.value_and_gradient(call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        print("no sync:", name)


def cuda_graphs(device: str, out: Path) -> None:
    """Captured and replayed on new logits, every loss equals eager execution."""
    need_gpu(device)
    import torch

    from . import workloads

    for name, call in workloads.every_loss(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                workloads.value_and_gradient(call)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = workloads.value_and_gradient(call)
        with torch.no_grad():
            call.x.mul_(0.5)
        graph.replay()
        expect_same(name, workloads.value_and_gradient(call), captured)


def compiled(device: str, out: Path) -> None:
    """torch.compile(fullgraph=True), default and with CUDA graphs, equals eager execution."""
    import torch

    from . import workloads

    small = {"rows": 64, "classes": 5} if device == "cpu" else {}
    failed = []
    for name, call in workloads.every_loss(device, **small):
        # Every loss in both modes, every dtype and layout in one of them: compiling takes long.
        mode = "reduce-overhead" if device != "cpu" and "bfloat16" in name else "default"
        torch._dynamo.reset()
        with workloads.kernels_or_eager(device):
            loss = torch.compile(call.loss, fullgraph=True, mode=mode)
            try:
                for _ in range(3):  # reduce-overhead records at the second call
                    found = workloads.value_and_gradient(call._replace(loss=loss))
                found = tuple(t.clone() for t in found)
                # another order of the same sums
                expect_close(f"{mode}: {name}", workloads.value_and_gradient(call), found)
            except Exception as error:
                failed.append(f"{mode}: {name}")
                print(f"FAIL {mode}: {name}: {type(error).__name__}: {str(error)[:2000]}")
    if failed:
        raise SystemExit(f"{len(failed)} failed: {', '.join(failed)}")


def determinism(device: str, out: Path) -> None:
    """Two runs, the same bits."""
    from . import workloads

    small = {"rows": 64, "classes": 5} if device == "cpu" else {"rows": 100_000, "classes": 80}
    for name, call in workloads.every_loss(device, **small):
        with workloads.kernels_or_eager(device):
            expect_same(
                name, workloads.value_and_gradient(call), workloads.value_and_gradient(call)
            )


def diagnosis(device: str, out: Path) -> None:
    """Counting waits for nothing, is captured in a CUDA graph, and costs a part of a loss."""
    import torch

    import tritonloss as tl

    from . import bench_diagnose, workloads

    rows = 60 if device == "cpu" else 100_000
    for dtype, form in (("float32", "labels"), ("bfloat16", "dense")):
        with workloads.kernels_or_eager(device):
            x, targets = bench_diagnose.inputs(rows, dtype, form, device)
            bench_diagnose.check(x, targets)
            print("equal:", dtype, form)
            if device == "cpu":
                continue
            found = tl.Diagnosis()
            found.update(x, targets)
            once = found.counts.clone()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                found.update(x, targets)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found.update(x, targets)
            graph.replay()
            expect_same(f"replayed, {dtype} {form}", (3 * once, once), (found.counts, once))
    if device != "cpu":
        bench_diagnose.main(["--device", device, "--out", str(out / "diagnose.csv")])


def large(device: str, out: Path) -> None:
    """More than 2^31 logits: offsets do not overflow."""
    need_gpu(device)
    import torch

    import tritonloss as tl

    rows, classes = 2**31 // 80 + 1000, 80
    need = rows * classes * 2 * 2.2 + 2e9  # bfloat16 logits and their gradient
    free = torch.cuda.mem_get_info()[0]
    if free < need:
        raise Skip(f"{need / 1e9:.0f} GB of memory needed, {free / 1e9:.0f} free")
    x = torch.full((rows, classes), -2.0, dtype=torch.bfloat16, device=device)
    x[-1] = 3.0
    x.requires_grad_()
    labels = torch.full((rows,), classes, device=device)
    losses = {"focal": lambda: tl.sigmoid_focal_loss(x, labels, reduction="sum")}
    losses["ghm_c"] = lambda: tl.ghm_c_loss(x, labels, bins=30) * float(rows)
    for name, loss in losses.items():
        value = loss()
        (gradient,) = torch.autograd.grad(value, x)
        small = x.detach()[-4000:].clone().requires_grad_()
        print(name, value.item(), gradient[-1, 0].item())
        assert torch.isfinite(value) and gradient[-1, -1] > gradient[0, 0] > 0
        if name == "focal":
            part = tl.sigmoid_focal_loss(small, labels[-4000:], reduction="sum")
            (expected,) = torch.autograd.grad(part, small)
            assert torch.equal(gradient[-4000:], expected), "the last logits"
        del gradient


def sanitizer(device: str, out: Path) -> None:
    """No access out of bounds, no race."""
    need_gpu(device)
    tool = cuda_tool("compute-sanitizer")
    if tool is None:
        raise Skip("compute-sanitizer is absent")
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "1", sys.executable, "-m",
                   "perf.gpu_check", "--run", "touch", "--device", device]  # fmt: skip
        subprocess.run(command, cwd=ROOT, env=env, check=True)


def touch(device: str, out: Path) -> None:
    """Every loss once, small and at odd sizes: what the sanitizer watches."""
    from . import workloads

    for name, call in workloads.every_loss(device, rows=301, classes=7):
        workloads.value_and_gradient(call)
        print(name)


def sweep(device: str, out: Path) -> None:
    """The quick sweep, its plots, and the comparison with the committed figures of this GPU."""
    figures = out / "sweep.csv"
    run("perf.sweep", "--quick", "--device", device, "--out", figures)
    if not missing("matplotlib", "pandas"):
        run("perf.plot", figures, "--out", out)
    before = ROOT / "perf" / "results" / f"sweep_{device_name(device)}.csv"
    if before.exists() and device != "cpu":
        run("perf.compare", before, figures)
    else:
        print(f"nothing to compare with: no {before.name} is committed")


def profile(device: str, out: Path) -> None:
    """What the slowest kernels of the sweep wait for, as Nsight Compute counts it."""
    need_gpu(device)
    from . import profile as profiler

    figures = out / "sweep.csv"
    if not figures.exists():
        raise Skip("there is no sweep in the folder")
    try:
        profiler.profiled(figures, out, points=3)
    except profiler.NoCounters as reason:
        raise Skip(str(reason)) from None


# ------------------------------------------------------------------------------------- helpers


def expect_same(name: str, expected, found) -> None:
    import torch

    for a, b, what in zip(expected, found, ("value", "gradient"), strict=True):
        if not torch.equal(a, b):
            raise SystemExit(f"{name}: the {what} differs by {(a - b).abs().max().item():.3e}")
    print("same bits:", name)


def expect_close(name: str, expected, found) -> None:
    import torch

    for a, b, what in zip(expected, found, ("value", "gradient"), strict=True):
        tolerance = 1e-5 if a.dtype == torch.float32 else 2e-2
        error = torch.linalg.vector_norm(a.double() - b.double())
        size = torch.linalg.vector_norm(a.double())
        if not error <= tolerance * size + 1e-12:
            raise SystemExit(f"{name}: the {what} is wrong by {float(error / size):.1e}")
    print("equal:", name)


# Seconds each step may take; their usual sum is far below the sum of the limits.
STEPS: dict[str, tuple[Callable, int]] = {
    "environment": (environment, 60),
    "tests": (tests, 300),
    "sync": (sync, 60),
    "cuda_graphs": (cuda_graphs, 60),
    "compiled": (compiled, 180),
    "determinism": (determinism, 60),
    "diagnosis": (diagnosis, 60),
    "large": (large, 60),
    "sanitizer": (sanitizer, 120),
    "sweep": (sweep, 180),
    "profile": (profile, 120),
}


def run_alone(name: str, device: str, out: Path, limit: float) -> tuple[str, float, str]:
    """A step in its own process: ``(outcome, seconds, last words)``."""
    log = out / f"{name}.log"
    env = os.environ | {"PYTHONPATH": str(ROOT), STEP_SECONDS: str(limit)}
    if device == "cpu" and name != "sweep":
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "perf.gpu_check", "--run", name, "--device", device]
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--out", str(out)], cwd=ROOT, env=env, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            outcome = {0: "passed", SKIPPED: "skipped"}.get(code, "FAILED")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            outcome = "TIMEOUT"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return outcome, time.monotonic() - begin, lines[-1][:100] if lines else ""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", help=f"comma-separated, of: {', '.join(STEPS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=1.0, help="factor on the time limits")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.run:
        step = touch if args.run == "touch" else STEPS[args.run][0]
        try:
            step(args.device, out)
        except Skip as reason:
            print(f"skipped: {reason}")
            return SKIPPED
        return 0
    names = args.steps.split(",") if args.steps else list(STEPS)
    unknown = set(names) - set(STEPS)
    if unknown:
        parser.error(f"unknown steps: {', '.join(sorted(unknown))}")
    rows = []
    for name in names:
        print(f"{name} ...", flush=True)
        rows.append((name, *run_alone(name, args.device, out, STEPS[name][1] * args.limit)))
    lines = [f"{'step':12} {'outcome':8} {'seconds':>7}  last line of its log"]
    lines += [f"{n:12} {o:8} {s:7.1f}  {words}" for n, o, s, words in rows]
    absent = missing(*OPTIONAL)
    lines.append(f"absent packages: {', '.join(absent) if absent else 'none'}")
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(any(outcome in ("FAILED", "TIMEOUT") for _, outcome, *_ in rows))


if __name__ == "__main__":
    sys.exit(main())
