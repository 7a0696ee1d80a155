"""The sweep's gate, its resumption, and the comparison of two sweeps."""

from __future__ import annotations

import ast
import csv
import json
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pandas")
pytest.importorskip("tqdm")

from perf import compare, profile, readme, scaling, sweep, workloads
from perf.workloads import LOSSES, Point
from tritonloss._dispatch import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="says the same in the plain run")
POINT = Point(60, 5, 10)


@pytest.mark.parametrize("loss", LOSSES)
def test_gate_lets_the_eager_loss_pass(loss):
    call = workloads.call_of(loss, POINT, "cpu")
    assert sweep.is_right(*sweep.provide("eager", call), call)


@pytest.mark.parametrize("loss", LOSSES)
def test_gate_lets_the_published_methods_pass(loss):
    call = workloads.call_of(loss, POINT, "cpu")
    assert sweep.is_right(*sweep.provide("published", call), call)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, loss: 1.01 * loss,
        lambda x, loss: loss + (x - x.detach()).sum() * 1e-3,  # the gradient alone
        lambda x, loss: loss * torch.tensor(float("nan")),
    ],
)
def test_a_wrong_provider_is_written_down_and_not_timed(wrong, monkeypatch):
    real = LOSSES["focal"].make

    def make(*args):
        call = real(*args)
        return call._replace(published=lambda x: wrong(x, call.loss(x)))

    monkeypatch.setitem(LOSSES, "focal", LOSSES["focal"]._replace(make=make))
    assert sweep.measure_point("focal", POINT, "published", "cpu") == ("WRONG", {})


def test_a_point_that_does_not_fit_is_passed_by(monkeypatch):
    monkeypatch.setattr(sweep, "free_memory", lambda device: 1000)
    assert sweep.measure_point("focal", POINT, "eager", "cpu") == ("skipped: memory", {})


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "points", lambda *args: [POINT, Point(50, 5, 10)])
    providers = ["eager", "compiled", "published"]
    monkeypatch.setattr(sweep, "providers_of", lambda *args: providers)
    figures = {mode: {"ms": 1.0, "ms_p20": 1.0, "ms_p80": 1.0} for mode in sweep.MODES}
    measured = []

    def measure_point(loss, point, provider, device):
        measured.append((point.rows, provider))
        if measured[-1] == (50, "eager"):
            raise KeyboardInterrupt
        return "ok", figures

    monkeypatch.setattr(sweep, "measure_point", measure_point)
    monkeypatch.setattr(sweep, "copy_bandwidth", lambda device: 10.0)
    path = tmp_path / "sweep.csv"
    with pytest.raises(KeyboardInterrupt):
        sweep.work(sweep.Sweep(path, "cpu"), ["focal"], True)
    assert json.loads(path.with_suffix(".running").read_text())[:3] == ["focal", "eager", "50"]
    assert sweep.Sweep(path, "cpu").bury(), "the point that stopped it"
    sweep.work(sweep.Sweep(path, "cpu"), ["focal"], True)
    assert len(measured) == len(set(measured)) == 6
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len({tuple(r[k] for k in sweep.KEY) for r in rows}) == len(rows) == 18
    assert [r["status"] for r in rows].count("crashed") == 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_quick_sweep_is_a_part_of_the_whole(loss, device):
    def measured(quick):
        return {
            (point, provider)
            for point in sweep.points(loss, quick, device)
            for provider in sweep.providers_of(point, quick, device)
        }

    quick, whole = measured(True), measured(False)
    assert quick < whole
    assert {p for _, p in quick} == {p for _, p in whole}


def test_a_worker_that_dies_is_started_again(tmp_path, monkeypatch):
    path = tmp_path / "sweep.csv"
    started = []

    def run(command):
        started.append(command)
        if len(started) > 1:
            return SimpleNamespace(returncode=0)
        point = ["focal", "eager", *map(str, POINT)]
        path.with_suffix(".running").write_text(json.dumps(point))
        return SimpleNamespace(returncode=-9)

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run))
    assert sweep.main(["--out", str(path), "--device", "cpu", "--loss", "focal"]) == 0
    assert len(started) == 2 and "--worker" in started[0]
    with path.open() as file:
        assert [(r["mode"], r["status"]) for r in csv.DictReader(file)] == [
            (mode, "crashed") for mode in sweep.MODES
        ]


@pytest.mark.parametrize(("provider", "code"), [("triton", 1), ("published", 0)])
def test_our_own_wrong_figures_fail_a_sweep(provider, code, tmp_path, monkeypatch, capsys):
    path = tmp_path / "sweep.csv"
    sweep.Sweep(path, "cpu").write(("focal", provider, "both", *map(str, POINT)), "WRONG")
    done = SimpleNamespace(run=lambda command: SimpleNamespace(returncode=0))
    monkeypatch.setattr(sweep, "subprocess", done)
    assert sweep.main(["--out", str(path), "--device", "cpu"]) == code
    assert f"WRONG: focal, {provider}, both" in capsys.readouterr().out


@pytest.mark.parametrize("provider", ["eager", "compiled"])
def test_every_mode_of_a_provider_is_measured(provider, monkeypatch):
    monkeypatch.setattr(
        sweep, "quantiles", lambda function, device: (function(), 1.0, 1.0, 1.0)[1:]
    )
    status, figures = sweep.measure_point("focal", POINT, provider, "cpu")
    assert status == "ok" and figures.keys() == sweep.MODES.keys()


def test_peak_memory_counts_what_a_call_holds():
    held = sweep.peak_bytes(lambda: torch.ones(32 * 2**20, dtype=torch.uint8), "cpu")
    assert 30e6 < held < 50e6


def write_row(path, **row):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sweep.COLUMNS)
        writer.writeheader()
        writer.writerow(dict.fromkeys(sweep.COLUMNS, "") | row)
    return str(path)


def write(path, ms, low, high, status="ok"):
    times = {"ms": ms, "ms_p20": low, "ms_p80": high}
    return write_row(path, loss="focal", provider="triton", status=status, **times)


@pytest.mark.parametrize(
    ("after", "code"),
    [((1.0, 0.9, 1.1), 0), ((1.5, 1.4, 1.6), 1), ((1.5, 1.0, 2.0), 0), ((0.5, 0.4, 0.6), 0)],
    ids=["same", "slower", "noise", "faster"],
)
def test_compare_sees_what_is_slower_beyond_noise(after, code, tmp_path, capsys):
    a = write(tmp_path / "a.csv", 1.0, 0.9, 1.1)
    assert compare.main([a, write(tmp_path / "b.csv", *after)]) == code
    assert "1 points in both" in capsys.readouterr().out


def test_compare_sees_a_point_that_became_wrong(tmp_path):
    a = write(tmp_path / "a.csv", 1.0, 0.9, 1.1)
    assert compare.main([a, write(tmp_path / "b.csv", "", "", "", "WRONG")]) == 1


def sweep_row(loss, rows, x_floor, **other):
    row = dict.fromkeys(sweep.COLUMNS, "") | Point(rows, 80, 500)._asdict()
    row |= {"loss": loss, "provider": "triton", "mode": "both", "status": "ok"}
    return row | {"x_floor": x_floor} | other


def test_the_profile_takes_the_slowest_kernels_one_a_loss():
    rows = [
        sweep_row("focal", 10**6, "1.5"),
        sweep_row("focal", 10**7, "1.25"),
        sweep_row("ap", 10**6, "9.5"),
        sweep_row("ghm_c", 10**6, "2.5"),
        sweep_row("varifocal", 10**3, "99"),  # launches take the time
        sweep_row("alrp", 10**6, "88", provider="eager"),
        sweep_row("alrp", 10**6, "88", mode="forward"),
        sweep_row("alrp", 10**6, "", status="WRONG"),
    ]
    found = profile.slowest(rows, 2)
    assert found == [("ap", Point(10**6, 80, 500), 9.5), ("ghm_c", Point(10**6, 80, 500), 2.5)]
    assert [f[0] for f in profile.slowest(rows, 9)] == ["ap", "ghm_c", "focal"]


RAW_PAGE = """\
==PROF== Connected to process 7
"ID","Kernel Name","dram__bytes.sum.per_second","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum","launch__registers_per_thread","sm__throughput.avg.pct_of_peak_sustained_elapsed","sm__warps_active.avg.pct_of_peak_sustained_active","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
"","","byte/second","%","nsecond","register/thread","%","%","inst","inst"
"0","pointwise_kernel","2,500,000,000,000","80.25","200,000","40","31.5","70.75","0.5","7.25"
"1","finish_kernel","n/a","1.5","4,000","32","1","12.5","3.5","0.25"
"""  # noqa: E501


def stand_in(tmp_path, page, code=0):
    """A program that is called like ncu, and writes this page."""
    path = tmp_path / "ncu"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nargs = sys.argv[1:]\n"
        f"open(args[args.index('--log-file') + 1], 'w').write({page!r})\n"
        f"sys.exit({code} if '--run' in args else 99)\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def profiled_by(monkeypatch, tmp_path, page, code=0):
    path = write_row(tmp_path / "sweep.csv", **sweep_row("focal", 10**6, "1.5"))
    monkeypatch.setattr(profile, "find_ncu", lambda: stand_in(tmp_path, page, code))
    return profile.main([path, "--out", str(tmp_path / "out")])


def test_the_profile_tabulates_what_ncu_read(tmp_path, monkeypatch):
    assert profiled_by(monkeypatch, tmp_path, RAW_PAGE) == 0
    title, head, *lines = (tmp_path / "out" / "profile.txt").read_text().splitlines()
    assert title == "focal at 1000000 80 500 float32 random contiguous: 1.50 x floor"
    assert " ".join(head.split()) == "kernel us MB dram % sm % occupancy % registers waits for"
    assert [" ".join(line.split()) for line in lines[:2]] == [
        "pointwise_kernel 200.0 500.0 80.2 31.5 70.8 40.0 long_scoreboard",
        "finish_kernel 4.0 - 1.5 1.0 12.5 32.0 barrier",
    ]


def test_a_profiler_without_counters_is_said(tmp_path, monkeypatch, capsys):
    page = "==ERROR== ERR_NVGPUCTRPERM - no permission to access the counters\n"
    assert profiled_by(monkeypatch, tmp_path, page, 1) == 2
    assert "no profile: ERR_NVGPUCTRPERM" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="focal: ncu, or what it ran, ended with 3"):
        profiled_by(monkeypatch, tmp_path, RAW_PAGE, 3)


def test_traffic_of_the_committed_table_is_that_of_the_model():
    found = scaling.predictions()
    assert {p.processes for p in found} == {1, 2, 3, 4}
    for p in found:
        assert (p.calls, p.bytes) == (p.calls_predicted, p.bytes_predicted)


@pytest.mark.parametrize("name", readme.FILES)
def test_published_figures_are_those_of_the_results(name):
    text = (readme.ROOT / name).read_text()
    for part in readme.FILES[name]():
        assert part in text, "python -m perf.readme"


SCRIPTS = [
    p for p in sorted(Path(sweep.__file__).parent.glob("*.py")) if "\ndef main(" in p.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_every_script_says_how_to_run_it(script):
    assert f"python -m perf.{script.stem}" in ast.get_docstring(ast.parse(script.read_text()))
