"""Medians, ratios and units by hand and by a fake clock; real cases do one piece each. Nothing asserts a speed."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from gymnasium.envs.box2d.car_racing import CarRacing
from PIL import Image

from pipeline import bench, bench_peers, bench_tune
from pipeline.bench_cases import CASES, PEERS, Case, Work
from pipeline.bench_measure import measure, rate, summarize
from pipeline.bench_peers import PeerError, peer_process
from pipeline.bench_tune import Outcome, Round, recommend, steps_for
from pipeline.config import TrainParams, load

ALL = {case.name: case for case in (*CASES, *PEERS)}


@pytest.fixture
def params(params_here: Path) -> TrainParams:
    small = {"n_envs": 2, "n_steps": 4, "batch_size": 4, "n_epochs": 3, "n_workers": 1, "num_threads": 1, "resize": 36}
    return load(TrainParams, **small)


# Fakes: pieces of work with known durations, on a clock that only they move


class Machine:
    """A clock, and what was done in which order."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, list[str]()

    def clock(self) -> float:
        return self.now

    def case(self, name: str, units: int, seconds: list[float], *against: str, **more: Any) -> Case:
        """Pieces of ``units`` that take ``seconds``, one after the other."""
        return Case(name, "frames/s", against, self._prepare(name, units, seconds), **more)

    def _prepare(self, name: str, units: int, seconds: list[float]) -> Callable[..., AbstractContextManager[Work]]:
        @contextmanager
        def prepare(params: TrainParams) -> Iterator[Work]:
            durations = iter(seconds)

            def work() -> int:
                self.now += next(durations)
                self.done.append(name)
                return units

            yield work
            self.done.append(f"{name} closed")

        return prepare


def cases(machine: Machine) -> list[Case]:
    """Warm-up, then three rounds: slow 10, 20, 5 units/s; quick 100, 100, 20 units/s."""
    slow = machine.case("slow", 10, [9.0, 1.0, 0.5, 2.0])
    return [slow, machine.case("quick", 100, [9.0, 1.0, 1.0, 5.0], "slow", "not measured")]


def test_rates_are_units_over_the_time_of_whole_pieces() -> None:
    machine = Machine()
    with machine.case("a", 30, [0.4, 0.4, 0.7]).prepare(None) as work:  # type: ignore[arg-type]
        assert rate(work, 1.0, machine.clock) == pytest.approx(90 / 1.5)  # the third piece ends after 1 s


def test_cases_take_turns_after_a_warm_up_that_does_not_count(params: TrainParams) -> None:
    machine = Machine()
    rates, memory = measure(cases(machine), params, 0.5, 3, machine.clock)
    assert rates == {"slow": [10, 20, 5], "quick": [100, 100, 20]}
    assert machine.done == ["slow", "quick"] * 4 + ["quick closed", "slow closed"]
    assert memory.keys() == rates.keys()


def test_a_case_without_warm_up_is_measured_from_its_first_piece(params: TrainParams) -> None:
    machine = Machine()
    rates, _ = measure([machine.case("a", 8, [4.0, 2.0], warm_up=False)], params, 1, 2, machine.clock)
    assert rates == {"a": [2, 4]}


def test_median_range_and_ratio_of_the_rounds(params: TrainParams) -> None:
    machine = Machine()
    chosen = cases(machine)
    summary = summarize(chosen, *measure(chosen, params, 0.5, 3, machine.clock))
    assert (summary["slow"]["per_second"], summary["slow"]["low"], summary["slow"]["high"]) == (10, 5, 20)
    # Round by round 10, 5 and 4 times as fast: 5, and not 100 / 10 from medians of different rounds.
    assert summary["quick"]["ratios"] == {"slow": 5.0}


# The command


@pytest.fixture
def fakes(params_here: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The command with two fake cases instead of the real ones."""
    machine = Machine()
    monkeypatch.setattr(bench, "CASES", tuple(cases(machine)))
    monkeypatch.setattr(bench, "PEERS", ())
    monkeypatch.setattr(bench, "measure", lambda *given: measure(*given, machine.clock))
    return machine


def test_table_and_json_agree(fakes: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--seconds", "0.5", "--n-envs", "32"])
    written = json.loads(Path("metrics/bench.json").read_text())
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name, row in written["cases"].items():
        numbers = re.findall(r"[\d,.]+", lines[name])
        shown = [row["per_second"], row["low"], row["high"], row["memory_mib"], *row["ratios"].values()]
        assert [float(number.replace(",", "")) for number in numbers] == shown
    assert written["cases"]["quick"]["ratios"] == {"slow": 5.0}
    assert (written["seconds"], written["repeats"], written["settings"]["n_envs"]) == (0.5, 3, 32)


def test_json_says_which_machine_and_when(fakes: Machine) -> None:
    bench.main(["--seconds", "0.5"])
    machine = json.loads(Path("metrics/bench.json").read_text())["machine"]
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0.5
    assert machine["versions"].keys() >= {"torch", "gymnasium", "stable-baselines3"}
    assert re.match(r"20\d\d-\d\d-\d\dT", machine["date"])
    assert "gpu" in machine


def test_only_measures_these_alone(fakes: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--only", "quick", "--repeats", "1", "--output", "some/where.json"])
    assert set(fakes.done) == {"quick", "quick closed"}
    assert json.loads(Path("some/where.json").read_text())["cases"]["quick"]["ratios"] == {}
    assert "slow" not in capsys.readouterr().out
    assert not Path("metrics").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--seconds", "0"], "expected a number above 0, got 0"),
        (["--repeats", "1.5"], "expected a whole number from 1 on, got 1.5"),
        (["--apply"], "--apply: expected together with --tune"),
        (["--n-envs", "0"], "n_envs = 0 (--n-envs): expected integer, 1 to 1024"),
    ],
)
def test_mistakes_end_with_2_and_say_what_was_expected(
    flags: list[str], message: str, fakes: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main(flags)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not fakes.done


def test_every_ratio_is_to_a_known_case() -> None:
    assert len(ALL) == len(CASES) + len(PEERS)
    assert {name for case in ALL.values() for name in case.against} <= ALL.keys()


def test_peers_are_measured_when_asked_for() -> None:
    assert bench.choose(None, peers=False) == list(CASES)
    assert bench.choose(None, peers=True) == [*CASES, *PEERS]
    assert [case.name for case in bench.choose(["rl_zoo_training", "stock"], False)] == ["stock", "rl_zoo_training"]


# Real cases


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Physics frames of all games in this process, counted by the game itself."""
    count, step = [0], CarRacing.step

    def counted(self: CarRacing, action: Any) -> Any:
        count[0] += action is not None  # reset() steps with None
        return step(self, action)

    monkeypatch.setattr(CarRacing, "step", counted)
    return count


@pytest.mark.parametrize("name", ["stock", "fast_rgb", "fast_gray", "training_env"])
def test_frames_are_the_games_own(name: str, params: TrainParams, frames: list[int]) -> None:
    with ALL[name].prepare(params) as work:
        before = frames[0]
        assert work() == frames[0] - before == (50 * params.frame_skip if name == "training_env" else 50)


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("inference", 10 * 1),  # half of the environments, 10 times
        ("update_sb3_nature", 8),  # a rollout of 2 x 4 decisions, one pass
        ("update_nature_fp32", 8),
        ("update_nature_bf16", 8),
        ("update_default_fp32", 3 * 8),  # n_epochs passes
        ("update_default_auto", 3 * 8),
        pytest.param("vectorised_1_worker", 10 * 2 * 4, marks=pytest.mark.slow),  # steps x n_envs x frame_skip
        pytest.param("vectorised_all_cores", 10 * 2 * 4, marks=pytest.mark.slow),
        pytest.param("fast_rgb_all_cores", 10 * 2, marks=pytest.mark.slow),
        pytest.param("training", 8 * 4, marks=pytest.mark.slow),
    ],
)
def test_real_cases_count_their_units(name: str, units: int, params: TrainParams) -> None:
    with ALL[name].prepare(params) as work:
        assert [work(), work()] == [units, units]


def test_updates_do_the_same_work_in_every_round(params: TrainParams) -> None:
    case = ALL["update_default_fp32"]
    with case.prepare(params) as work:
        (model,) = (cell.cell_contents for cell in work.__closure__ or () if hasattr(cell.cell_contents, "policy"))  # type: ignore[attr-defined]
        before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
        learned = []
        descend = model._descend
        model._descend = lambda loss, batch: (learned.append(len(batch.returns)), descend(loss, batch))
        units = work()
        assert sum(learned) == units, "no pass may be broken off"
        assert all(tensor.equal(before[name]) for name, tensor in model.policy.state_dict().items())


# Peers


def test_a_missing_peer_is_told_before_anything_is_measured(
    fakes: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "PEERS", PEERS)
    with pytest.raises(SystemExit) as end:
        bench.main(["--peers"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert (
        "expected envpool and rl_zoo3 in .venv-bench, not found: envpool, rl_zoo3; `make bench-peers` installs" in error
    )
    assert not fakes.done


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a Python program in the place of the peers' interpreter."""
    if os.name == "nt":
        pytest.skip("needs a script that starts by its first line")

    def install(program: str) -> None:
        file = tmp_path / "python"
        file.write_text(f"#!{sys.executable}\nimport sys\n{program}\n")
        file.chmod(0o755)
        monkeypatch.setattr(bench_peers, "PYTHON", file)

    return install


def test_a_peer_works_when_it_is_asked(peer: Callable[[str], None]) -> None:
    peer("print(0, flush=True)\nfor turn, _ in enumerate(sys.stdin, 1): print(50 * turn, flush=True)")
    with peer_process("someone") as work:
        assert [work(), work()] == [50, 100]


@pytest.mark.parametrize("ready", ["", "print(0, flush=True); sys.stdin.readline()"])
def test_a_peer_that_ends_is_quoted(ready: str, peer: Callable[[str], None]) -> None:
    peer(f"{ready}\nsys.exit('no such game')")
    with (
        pytest.raises(PeerError, match=r"someone: ended with status 1 .*\n.*no such game"),
        peer_process("someone") as work,
    ):
        work()


def test_a_peers_own_words_are_not_taken_for_answers(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def envpool_work(n_envs: int, threads: int) -> Work:
        print("hello", n_envs, threads)
        return lambda: 7

    monkeypatch.setattr(bench_peers, "envpool_work", envpool_work)
    monkeypatch.setattr(sys, "stdin", iter(["go\n", "go\n"]))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # serve() exchanges it
    bench_peers.serve("envpool", ["4", "2"])
    said = capfd.readouterr()
    assert said.out.split() == ["0", "7", "7"]
    assert "hello 4 2" in said.err


@pytest.mark.parametrize(
    ("wrappers", "skip"), [([{"rl_zoo3.wrappers.FrameSkip": {"skip": 2}}, "other"], 2), (["other"], 1), ([], 1)]
)
def test_frame_skip_of_rl_zoos_settings(wrappers: list[Any], skip: int) -> None:
    assert bench_peers._frame_skip(wrappers) == skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "units"), [("envpool_1_thread", 50), ("envpool_all_cores", 50)])
def test_real_peers_count_their_frames(
    name: str, units: int, params: TrainParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = Path(__file__).parents[1] / bench_peers.PYTHON
    monkeypatch.setattr(bench_peers, "PYTHON", python)
    try:
        bench_peers.check_installed(["envpool"])
    except PeerError as error:
        pytest.skip(str(error))
    n_envs = 1 if name == "envpool_1_thread" or os.cpu_count() == 1 else max(2, len(os.sched_getaffinity(0)))
    with ALL[name].prepare(params) as work:
        assert work() == units * n_envs


# Tuning


def outcome(n_envs: int, num_threads: int, speed: float, memory: float = 1000) -> Outcome:
    return Outcome(n_envs, num_threads, 2048 // n_envs, speed, [90, 80], memory)


TRIED = [outcome(8, 1, 1400), outcome(8, 2, 1480, 700), outcome(16, 1, 1460, 800), outcome(16, 2, 1500, 900)]


@pytest.mark.parametrize(
    ("present", "best"),
    [
        ((16, 2), (16, 2)),  # the fastest, and in use
        ((8, 2), (8, 2)),  # in use and 1.3% slower: no reason to change
        ((8, 1), (8, 2)),  # in use and 7% slower: of those within 3%, the one with the least memory
        ((64, 2), (8, 2)),  # not tried
    ],
)
def test_recommendation_from_a_table(present: tuple[int, int], best: tuple[int, int]) -> None:
    assert recommend(TRIED, *present)[:2] == best


@pytest.mark.parametrize(
    ("n_envs", "n_steps"),
    [(1, 2048), (2, 1024), (4, 512), (16, 128), (32, 64), (128, 16), (3, 768), (96, 24)],  # the last two: 2304
)
def test_settings_keep_the_rollout_in_whole_minibatches(n_envs: int, n_steps: int, params_here: Path) -> None:
    params = load(TrainParams, n_envs=16, n_steps=128, batch_size=256)
    assert steps_for(params, n_envs) == n_steps
    assert n_envs * n_steps % params.batch_size == 0


def test_settings_are_cut_to_the_machine(params_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tune, "cores", lambda: 2)
    tried = [(s.n_envs, s.num_threads) for s in bench_tune.settings(load(TrainParams))]
    assert tried == [(n, t) for n in (1, 2, 4, 8, 16, 32) for t in (1, 2)]


def test_rounds_become_one_outcome(params: TrainParams) -> None:
    rounds = [Round(100, [50, 90], 300), Round(130, [70, 80], 350), Round(120, [60, 100], 320)]
    assert bench_tune.summarize(params, rounds) == Outcome(2, 1, 4, 120, [60, 90], 350)


@pytest.fixture
def tuned(params_here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tuning with a made-up measurement in which 4 environments on 1 thread are fastest."""
    present = Outcome(n_envs=16, num_threads=0, n_steps=128, steps_per_second=0, cpu=[], memory_mib=0)
    bench_tune.apply(present)  # whatever the project's defaults are
    monkeypatch.setattr(bench_tune, "cores", lambda: 2)

    def speed(setting: TrainParams, seconds: float) -> Round:
        return Round(1000 - 40 * abs(setting.n_envs - 4) - 100 * setting.num_threads, [50, 60], 400)

    monkeypatch.setattr(bench_tune, "in_new_process", speed)
    return params_here


def test_tune_tells_draws_and_leaves_params_alone(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("params.yaml").read_bytes()
    bench.main(["--tune", "--repeats", "2"])
    out = capsys.readouterr().out
    (best,) = (line for line in out.splitlines() if "recommended" in line)
    assert best.split()[:4] == ["4", "1", "512", "900"]
    written = json.loads(Path("metrics/bench_tune.json").read_text())
    assert written["recommended"] in written["outcomes"]
    assert (written["recommended"]["n_envs"], written["recommended"]["steps_per_second"]) == (4, 900)
    with Image.open("plots/bench_tune.png") as picture:
        assert min(picture.size) > 300
    assert Path("params.yaml").read_bytes() == before


def test_apply_writes_the_setting_and_keeps_the_rest(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("params.yaml").read_text().splitlines()
    bench.main(["--tune", "--repeats", "1", "--apply"])
    after = Path("params.yaml").read_text().splitlines()
    changed = {new.split(":")[0]: new for old, new in zip(before, after, strict=True) if old != new}
    values = {key: line.split()[1] for key, line in changed.items()}
    assert values == {"n_envs": "4", "num_threads": "1", "n_steps": "512"}
    assert all("#" in line for line in changed.values())
    assert "changed: num_threads, n_envs, n_steps" in capsys.readouterr().out.replace(
        "n_steps, n_envs", "n_envs, n_steps"
    )


def test_a_setting_that_does_not_fit_params_yaml_is_refused(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("params.yaml").read_bytes()
    with pytest.raises(SystemExit) as end:  # 4 x 3 = 12 decisions: params.yaml's batch of 256 doesn't divide them
        bench.main(["--tune", "--repeats", "1", "--apply", "--n-envs", "4", "--n-steps", "3", "--batch-size", "12"])
    assert end.value.code == 2
    assert "batch_size" in capsys.readouterr().err
    assert Path("params.yaml").read_bytes() == before


@pytest.mark.slow
def test_a_real_setting_is_measured_in_a_process_of_its_own(params: TrainParams) -> None:
    found = bench_tune.in_new_process(params, 0.1)
    assert found.steps_per_second > 0
    assert found.memory_mib > 50
    assert all(0 <= use <= 100 for use in found.cpu)
