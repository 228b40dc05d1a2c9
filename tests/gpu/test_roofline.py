"""The static roofline: bytes, FLOPs and floors worked out by hand, and what is picked."""

import json
import random
from pathlib import Path

import pytest

from benchmarks import GRIDS, Shape
from benchmarks.gpu import over_bare, roofline
from lora_ext.backends.triton import group_costs
from lora_ext.backends.triton.cards import KNOWN
from lora_ext.backends.triton.costs import Problem, bytes_of, time_us
from lora_ext.backends.triton.regimes import REGIMES

LARGE = Shape(8192, 4096, 4096, 16)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    file = tmp_path_factory.mktemp("roofline") / "roofline.json"
    assert roofline.main(["--json", str(file)]) == 0
    return json.loads(file.read_text())["rows"]


def test_bytes_flops_and_floor_of_a_known_case():
    """H100, bf16: 3352 GB/s, 4096 FLOPs a clock and SM, 132 SMs at 1.83 GHz: 989 TFLOP/s."""
    of = {row["regime"]: row for row in roofline.estimate(LARGE, "H100", "bf16", "forward")}
    M, K, N, R = LARGE
    once = 2 * (M * K + N * K + N + K * R + R * N + M * N + M * R)  # each tensor moved once
    assert of["in_loop"]["bytes"] == once
    # Each of the 4096 / 256 tiles of a row block computes its rows' h again.
    assert of["in_loop"]["flops"] == 2 * M * K * N + N // 256 * 2 * M * K * R
    assert of["in_loop"]["floor_us"] == pytest.approx(of["in_loop"]["flops"] / 989e6, rel=1e-3)
    assert of["plain"]["launches"] == 5 and of["two_launches"]["launches"] == 2
    # y is written, read and written as h @ B, its multiple and the sum: six times more.
    assert of["plain"]["bytes"] == pytest.approx(once + 2 * (6 * M * N + M * K), rel=0.01)
    assert of["plain"]["floor_us"] > of["two_launches"]["floor_us"]


def test_joined_launches_take_the_time_of_one():
    of = {row["regime"]: row for row in roofline.estimate(LARGE, "H100", "bf16", "forward")}
    joined, apart = of["persistent"], of["two_launches"]
    assert joined["bytes"] == apart["bytes"] and joined["launches"] == apart["launches"] == 2
    assert joined["floor_us"] < apart["floor_us"]
    assert 1.0 < joined["over_bare"] < apart["over_bare"] < of["plain"]["over_bare"]


def test_one_regime_a_shape_is_picked_and_it_moves_no_more_than_the_plain_layer(rows):
    seen = {}
    for row in rows:
        key = tuple(row[name] for name in ("card", "direction", "M", "K", "N", "R"))
        seen.setdefault(key, []).append(row)
    assert len(seen) == len(KNOWN) * 2 * len(GRIDS["cuda"]["standard"])
    for key, ways in seen.items():
        plain = next(way for way in ways if way["regime"] == "plain")
        (picked,) = (way for way in ways if way["picked"])
        assert picked["regime"] != "plain", key
        assert picked["bytes"] <= plain["bytes"] and picked["launches"] < plain["launches"], key


def test_no_shape_moves_more_than_the_plain_layer():
    draw = random.Random(0)
    for _ in range(300):
        M, K, N, R = (max(1, int(2 ** draw.uniform(0, most))) for most in (15, 15, 15, 9))
        shape = Shape(M, K, N, R)
        card, dtype = draw.choice(list(KNOWN)), draw.choice(list(roofline.DTYPES))
        for direction in REGIMES:
            ways = list(roofline.estimate(shape, card, dtype, direction))
            plain = next(way for way in ways if way["regime"] == "plain")
            (picked,) = (way for way in ways if way["picked"])
            assert picked["bytes"] <= plain["bytes"], (shape, card, dtype, direction)


def test_table_shows_every_shape_of_a_card(capsys):
    roofline.main(["--cards", "L4"])
    out = capsys.readouterr().out
    assert all(out.count(f"{shape} ") == 2 for shape in GRIDS["cuda"]["standard"])
    assert out.count("* ") == 2 * len(GRIDS["cuda"]["standard"]) + 1  # and the legend


def test_unknown_card_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        roofline.main(["--cards", "H100,B2000"])
    assert "no card 'B2000', there are: A100," in capsys.readouterr().err


def test_the_notes_have_the_table_that_the_model_gives():
    notes = Path(__file__).parents[2] / "benchmarks/results/gpu_notes.md"
    assert over_bare.table() in notes.read_text()
    assert over_bare.group_table() in notes.read_text()


def test_no_shape_is_predicted_slower_than_before():
    for shape in GRIDS["cuda"]["standard"]:
        (forward_before, forward, step_before, step), _ = over_bare.over_bare(shape, KNOWN["H100"])
        assert forward <= forward_before + 0.005 and step <= step_before + 0.005, shape


def anything(name, tile) -> bool:
    return True


def test_bytes_of_a_known_group():
    """H100, bf16: x is read once for h of all and dx written once, in place of three times."""
    M, K, N, R = LARGE
    x, card = 2 * M * K, KNOWN["H100"]
    problems = [Problem(M, K, N, R)] * 3
    for direction, saved in (("forward", 2 * x), ("backward", 2 * x + 2 * x + 2 * 3 * x)):
        joint = group_costs.joint(direction, problems, card, anything)
        apart = group_costs.apart(direction, problems, card)
        assert bytes_of(apart) - bytes_of(joint.kernels) == saved  # dA's x; dx; its sums
    assert len(joint.kernels) == 4 and len(apart) == 8


def test_no_group_is_run_jointly_that_moves_more_or_takes_longer_than_call_after_call():
    draw, jointly = random.Random(0), 0
    for _ in range(300):
        M, K = (max(1, int(2 ** draw.uniform(0, 14))) for _ in range(2))
        masked, needs = draw.random() < 0.5, draw.choice([(True,) * 3, (False, True, True)])
        problems = [
            Problem(M, K, max(1, int(2 ** draw.uniform(0, 14))), draw.choice((1, 8, 16, 40, 64)),
                    masked=masked, needs=needs)
            for _ in range(draw.randint(1, 4))
        ]  # fmt: skip
        card = KNOWN[draw.choice(list(KNOWN))]
        for direction in REGIMES:
            joint = group_costs.joint(direction, problems, card, anything)
            apart = group_costs.apart(direction, problems, card)
            if joint is None or not group_costs.gains(joint.kernels, apart, card, "half"):
                continue
            jointly += 1
            assert len(problems) > 1 and bytes_of(joint.kernels) < bytes_of(apart)
            assert time_us(joint.kernels, card, "half") <= time_us(apart, card, "half") * 1.001
    assert 100 < jointly < 500
