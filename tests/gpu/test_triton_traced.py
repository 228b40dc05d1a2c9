"""The Triton backend under torch.compile, over fake CUDA tensors: no GPU is asked."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_ext import lora_linear
from lora_ext.backends import triton as backend

pytest.importorskip("triton")


@pytest.fixture
def cuda(monkeypatch):
    """Fake tensors on a card of capability 9.0."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    backend._why_not_here.cache_clear()
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        yield
    torch._dynamo.reset()
    backend._why_not_here.cache_clear()


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=str)
def test_a_call_is_one_graph_with_our_operators(cuda, adapter):
    x, weight = (torch.empty(s, dtype=torch.bfloat16) for s in ((6, 24), (40, 24)))
    A, B = (torch.empty(s, dtype=adapter, requires_grad=True) for s in ((24, 4), (4, 40)))
    found = []

    def record(graph: torch.fx.GraphModule, inputs):
        parts = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        found.append([str(n.target) for part in parts for n in part.graph.nodes])
        return graph

    run = torch.compile(lambda *t: lora_linear(*t, 0.5), fullgraph=True, backend=record)
    y = run(x, weight, None, A, B)
    assert (y.shape, y.dtype, y.device.type) == ((6, 40), torch.bfloat16, "cuda")
    assert y.requires_grad
    (targets,) = found
    ours = {target for target in targets if "lora_ext" in target}
    assert ours == {f"lora_ext_triton.linear_{way}.default" for way in ("fwd", "bwd")}


@pytest.mark.parametrize("draw", ["hash", "torch"])
def test_a_drop_is_one_operator_more(cuda, draw):
    """The hash's bits, or the draw's packed, by a kernel each; their gradient draws none."""
    x, weight = (torch.empty(s, dtype=torch.bfloat16) for s in ((6, 24), (40, 24)))
    A, B = (torch.empty(s, dtype=torch.float32, requires_grad=True) for s in ((24, 4), (4, 40)))
    found = []

    def record(graph: torch.fx.GraphModule, inputs):
        parts = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        found.extend(str(n.target) for part in parts for n in part.graph.nodes)
        return graph

    def call(*tensors):
        return lora_linear(*tensors, 0.5, dropout=0.1, dropout_mask=draw)

    y = torch.compile(call, fullgraph=True, backend=record)(x, weight, None, A, B)
    assert y.device.type == "cuda"
    masks = [t for t in found if t.startswith("lora_ext.")]
    assert masks == [f"lora_ext.{'draw_keep' if draw == 'hash' else 'pack_keep'}.default"]


def test_operators_of_a_group_have_shape_rules(cuda):
    ops, bf16 = torch.ops.lora_ext_triton, torch.bfloat16
    x, y = torch.empty(6, 24, dtype=bf16), torch.empty(6, 40, dtype=bf16)
    W, A, B = (torch.empty(s, dtype=bf16) for s in ((40, 24), (24, 4), (4, 40)))
    two = [W, W], [None, None], [A, A], [B, B], [1.0, 2.0]
    ys, hs = ops.linears_fwd(x, *two, [None, None])
    assert [t.shape for t in (*ys, *hs)] == [(6, 40)] * 2 + [(6, 4)] * 2
    rest = ["plain"] * 2, [None] * 2, [None] * 2
    needs = [True, False, False, True, True, False, False, True, False]
    got = ops.linears_bwd([y, y], x, [W, W], [A, A], [B, B], hs, [1.0, 2.0], needs, *rest)
    empty = (0,)
    want = [(6, 24), empty, empty, (24, 4), (4, 40), empty, empty, (24, 4), empty]
    assert [t.shape for t in got] == want
