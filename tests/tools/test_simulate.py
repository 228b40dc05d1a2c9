"""The simulated step: memory and traffic worked out by hand, over fake ranks and over real ones."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scaling import simulate
from benchmarks.scaling.decoder import DecoderShape, adapted_decoder, lay_out
from benchmarks.scaling.trace import DIMENSIONS, LAYERS, Trace, Traffic, simulate_step, trace_step
from tests.processes import run_cases
from tests.stacks.test_compile import WITHOUT_CPP

NEEDS_CPP = pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))
SHAPE = DecoderShape(2, hidden=64, ffn=128, heads=8, kv_heads=4, vocabulary=256, rank=4)
BATCH, SEQUENCE, TP = 2, 16, 2
SIZES = (BATCH, SEQUENCE, torch.float32)
F32 = 4  # bytes


def by_hand(data: int, shape: DecoderShape = SHAPE, checkpointing: bool = False) -> Trace:
    """Work out a step in float32 of `data` x TP ranks; `data` must divide the rank of the adapters.

    x is (BATCH, SEQUENCE, H), between linears a TP-th of its sequence. Columns have A whole and a
    TP-th of B on each rank, rows the other way round; the norms are whole.
    """
    L, H, N, R, V = shape.layers, shape.hidden, shape.ffn, shape.rank, shape.vocabulary
    KV, M = H * shape.kv_heads // shape.heads, BATCH * SEQUENCE
    block_weights = (H * H + 2 * H * KV + H * H + 3 * H * N) // TP + 2 * H
    root_weights = 2 * V * H // TP + H
    whole = 5 * H * R + 2 * R * H  # A of q, k, v, gate, up; B of o, down
    split = R * (H + 2 * KV + 2 * N) // TP + (H + N) * R // TP
    block_adapters, root_adapters = whole + split, H * R + R * V // TP
    adapters = L * block_adapters + root_adapters
    memory = {
        "weights": F32 * (L * block_weights + root_weights) // data,
        "adapters": F32 * adapters // data,
        "gradients": F32 * adapters // data,
        # Two moments, and a count of steps for each of A and B.
        "optimizer": F32 * (2 * adapters // data + 2 * (7 * L + 1)),
        "gathered": F32 * (root_weights + root_adapters) if data > 1 else 0,
    }
    norm = M // TP * H + M // TP  # x, and a number a row
    attention = M * H + M * (H + 2 * KV + H) // TP + M * shape.heads // TP  # x; q, k, v, y; sums
    mlp = M * H + 4 * M * N // TP  # x; gate, silu of it, up, the product
    kept = 2 * norm + attention + mlp + 7 * M * R
    # Of the first block the norm's input has no gradient. The loss: log-probabilities, two scalars.
    blocks = L * kept - norm
    if checkpointing:
        blocks = L * M // TP * H
    memory["activations"] = F32 * (blocks + norm + M * H + M * R + M * V // TP + 2)

    message = F32 * M * H
    again = 2 * L if checkpointing else 0
    gather, scatter = 4 * L + 1 + again, 4 * L + 1 + again // 2
    reduced = F32 * (L * whole + H * R + 3 * M)  # the loss: maximum, sum and loss of each row
    units = F32 * (2 * L * (block_weights + block_adapters) + root_weights + root_adapters)
    calls = {
        ("all_gather", "data"): (2 * L + 1, units, data, 1),
        ("reduce_scatter", "data"): (L + 1, F32 * adapters, data, 1),
        ("all_gather", "tensor"): (gather, gather * message, TP, 1),
        ("reduce_scatter", "tensor"): (scatter, scatter * message, TP, 1),
        ("all_reduce", "tensor"): (7 * L + 1 + 3, reduced, TP, 2),
    }
    traffic = {
        key: Traffic(count, size, passes * size * (n - 1) // n)
        for key, (count, size, n, passes) in calls.items()
    }
    return Trace(memory, traffic)


def assert_is(trace: Trace, want: Trace) -> None:
    assert {kind: trace.memory[kind] for kind in want.memory} == want.memory
    assert trace.memory["peak"] > sum(want.memory.values()) - want.memory["gradients"]
    assert trace.traffic == want.traffic


class Operators(TorchDispatchMode):
    """Note the names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@functools.cache
def simulated(layer: str, blocks: int = 2, checkpointing: bool = False) -> tuple[Trace, list[str]]:
    """Trace four by TP fake ranks; return the names of the operators that ran, too."""
    with Operators() as operators:
        shape = replace(SHAPE, layers=blocks)
        trace = simulate_step(shape, layer, 4 * TP, TP, *SIZES, checkpointing)
    return trace, operators.names


@NEEDS_CPP
@pytest.mark.parametrize("layer", LAYERS)
def test_fake_ranks_hold_and_send_what_is_worked_out(layer):
    trace, operators = simulated(layer)
    assert_is(trace, by_hand(4))
    assert ("lora_ext::linear_fwd" in operators) == (layer == "lora_ext")
    assert ("aten::mm" in operators) != (layer == "lora_ext")


@NEEDS_CPP
@pytest.mark.parametrize("layer", ["plain", "lora_ext"])
def test_checkpointed_blocks_keep_their_inputs_and_gather_again(layer):
    trace, _ = simulated(layer, checkpointing=True)
    assert_is(trace, by_hand(4, checkpointing=True))


@pytest.mark.slow
@NEEDS_CPP
def test_further_blocks_add_what_the_third_does():
    two, three, four = (simulated("lora_ext", blocks)[0] for blocks in (2, 3, 4))
    assert simulate.extrapolate(two, three, 1) == four


@pytest.mark.slow
@NEEDS_CPP
def test_plain_layer_peaks_above_ours_where_the_loss_is_small():
    """By two results of gate or up, (4096, 28672 / 8) in bfloat16; docs/scaling.md says so."""
    shape = DecoderShape(layers=2, vocabulary=8192)
    plain, ours = (simulate_step(shape, layer, 64, 8, 1, 4096) for layer in ("plain", "lora_ext"))
    assert plain.memory["peak"] - ours.memory["peak"] == 2 * 4096 * 3584 * 2 == 56 * 2**20


def real_ranks_hold_and_send_what_is_worked_out() -> None:
    """Two by two processes over gloo, with real tensors; one block."""
    shape = replace(SHAPE, layers=1)
    mesh = init_device_mesh("cpu", (2, TP), mesh_dim_names=DIMENSIONS)
    for layer in ("plain", "lora_ext"):
        with torch.device("meta"):
            model = adapted_decoder(shape, layer == "plain", torch.float32)
        lay_out(model, mesh, checkpointing=False).to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        with Operators() as operators:
            trace = trace_step(model, mesh, torch.zeros(BATCH, SEQUENCE, dtype=torch.long))
        assert ("lora_ext::linear_fwd" in operators.names) == (layer == "lora_ext")
        assert_is(trace, by_hand(2, shape))


@pytest.mark.slow
@NEEDS_CPP
def test_real_ranks_hold_and_send_what_fake_ones_do():
    case = real_ranks_hold_and_send_what_is_worked_out
    failures = run_cases({"traced": case}, world=2 * TP)
    assert not failures, failures["traced"]


def test_command_prints_writes_and_draws(tmp_path, capsys, monkeypatch):
    def step(shape, layer, ranks, tp, batch, sequence, dtype, checkpointing):
        assert (tp, (batch, sequence, dtype)) == (TP, SIZES)
        trace = by_hand(ranks // tp, shape, checkpointing)
        trace.memory["peak"] = 2 * trace.memory["activations"]
        return trace

    monkeypatch.setattr(simulate, "simulate_step", step)
    document, picture = tmp_path / "simulated.json", tmp_path / "simulated.png"
    sizes = "--layers 80 --hidden 64 --ffn 128 --heads 8 --kv-heads 4 --vocabulary 256 --rank 4"
    options = f"{sizes} --tp 2 --ranks 8,4 --sequence 16 --batch 2 --dtype fp32"
    assert simulate.main([*options.split(), "--json", str(document), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(document.read_text())["rows"]
    modes = {"none": False, "blocks": True}
    seen = [(row["checkpointing"], row["ranks"], row["layer"]) for row in rows]
    assert seen == [(mode, ranks, layer) for mode in modes for ranks in (4, 8) for layer in LAYERS]
    out = capsys.readouterr().out
    for row in rows:
        checkpointing = modes[row["checkpointing"]]
        want = by_hand(row["ranks"] // TP, replace(SHAPE, layers=80), checkpointing)
        assert want.memory.items() <= row["memory_bytes"].items()
        assert [t["message_bytes"] for t in row["traffic"]] == [
            want.traffic[key].message_bytes for key in sorted(want.traffic)
        ]
        assert f" {want.memory['activations'] / 2**20:.1f} " in out
    assert "80 blocks (2 and 3 traced, rest linear)" in out and "not measured" in out


def test_floors_are_arithmetic_over_data_sheet_peaks():
    traffic = {("all_gather", "data"): Traffic(1, 0, 50_000_000)}
    floors = simulate.floors_ms(DecoderShape(), 8, 1, 4096, Trace({}, traffic), "none")
    assert floors["infiniband"] == 1.0 and floors["nvlink"] == 0.0
    # 69.5e9 frozen weights twice, 0.207e9 elements of adapters three times, and attention.
    flops = 4096 * (4 * 69.5e9 + 6 * 0.207e9) + 3.5 * 2 * 80 * 4096**2 * 8192
    assert floors["compute"] == pytest.approx(flops / 8 / 989e9, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ranks 8,12", "--ranks must be a multiple of --tp 8, got 12"),
        ("--ranks 8,x", "argument --ranks: must be a positive int, got 'x'"),
        ("--tp 0", "argument --tp: must be a positive int, got '0'"),
        ("--tp 3 --ranks 9", "--heads must be a multiple of --tp 3, got 64"),
        ("--kv-heads 4", "--kv-heads must be a multiple of --tp 8, got 4"),
        ("--heads 63", "--hidden must be a multiple of --heads 63, got 8192"),
        ("--kv-heads 24", "--heads must be a multiple of --kv-heads 24, got 64"),
        ("--sequence 100", "--sequence must be a multiple of --tp 8, got 100"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--json /no/such/folder/x.json", "argument --json: no file can be written at /no"),
    ],
)
def test_bad_argument_is_refused_by_name(options, message, capsys):
    with pytest.raises(SystemExit):
        simulate.main(options.split())
    assert message in capsys.readouterr().err
