"""The static roofline: bytes, FLOPs and floors worked out by hand, and what is picked."""

import json
import random
from pathlib import Path

import pytest

from benchmarks import GRIDS, Shape
from benchmarks.gpu import over_bare, roofline
from lora_ext.backends.triton.cards import KNOWN
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


def test_no_shape_is_predicted_slower_than_before():
    for shape in GRIDS["cuda"]["standard"]:
        (forward_before, forward, step_before, step), _ = over_bare.over_bare(shape, KNOWN["H100"])
        assert forward <= forward_before + 0.005 and step <= step_before + 0.005, shape
