"""What the benchmarks share: presets, turns, and where the results go."""

import csv
import json

import pytest
from printed_tables import printed_tables

from benchmarks.harness import Benchmark, Report, main, take_turns
from benchmarks.report import ratios


def add_options(parser):
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")


def check(args):
    if args.size < 1:
        raise ValueError(f"--size {args.size} must be above 0")


def measure(args, report):
    rows = [{"name": name, "us": 2.0, "us_p10": 1.0} for name in ("a", "b")]
    report.add("times", "Times", {"size": args.size}, rows, hidden="_p10$")
    report.draw("times", lambda found, file: file.write_text(json.dumps(found)), rows)


PRESETS = {"quick": {"size": 10, "rounds": 1}, "tiny": {"size": 1}}
BENCHMARK = Benchmark("What it does.", measure, add_options, PRESETS, check)


@pytest.mark.parametrize(
    ("argv", "size", "rounds"),
    [
        ([], 100, 10),
        (["--quick"], 10, 1),
        (["--quick", "--tiny"], 1, 1),
        (["--quick", "--size", "7"], 7, 1),
    ],
)
def test_a_preset_gives_way_to_what_is_said(argv, size, rounds):
    args = BENCHMARK.parse(argv)
    assert (args.size, args.rounds) == (size, rounds)


def test_a_wrong_value_is_a_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        BENCHMARK.parse(["--size", "0"])
    assert "--size 0 must be above 0" in capsys.readouterr().err


def test_rows_go_to_a_file_and_most_columns_to_the_screen(tmp_path, capsys):
    for _ in range(2):
        main(BENCHMARK, ["--results", str(tmp_path)])
    with (tmp_path / "times.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["name"], row["size"], row["us_p10"]) for row in rows] == 2 * [
        ("a", "100", "1"),
        ("b", "100", "1"),
    ]
    assert list(rows[0])[-4:] == ["size", "name", "us", "us_p10"]
    table, _ = printed_tables(capsys.readouterr().out)
    assert table == [{"name": "a", "us": "2"}, {"name": "b", "us": "2"}]
    assert len(json.loads((tmp_path / "times.png").read_text())) == 2


def test_quick_runs_leave_rows_and_plots_as_they_are(tmp_path, capsys):
    main(BENCHMARK, ["--quick", "--results", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["times-quick.png"]
    assert "size 10" in capsys.readouterr().out


def test_a_file_of_other_columns_is_left_alone(tmp_path):
    main(BENCHMARK, ["--results", str(tmp_path)])
    report = Report(BENCHMARK.parse(["--results", str(tmp_path)]))
    with pytest.raises(ValueError, match=r"times\.csv has columns"):
        report.keep("times", {}, [{"another": 1}])


def test_none_is_always_first_and_ratios_are_of_the_same_turn():
    seen = []

    def run(name, repeat):
        seen.append(name)
        return (repeat + 1) * (2 if name == "b" else 1)

    found = take_turns(["a", "b", "c"], 4, run)
    assert "".join(seen) == "abcbcacababc"
    assert found["b"] == [2, 4, 6, 8]
    doubled = ratios("ratio", found["b"], found["a"], float)
    assert doubled == {"ratio": 2, "ratio_p10": 2, "ratio_p90": 2}
