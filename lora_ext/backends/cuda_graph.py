"""A call as a CUDA graph: what times its kernels without the host."""

from collections.abc import Callable
from typing import Any

import torch


def captured(run: Callable[[], Any], first_runs: int = 1) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of one call: the time of its kernels and not the host's.

    Args:
        run: the call.
        first_runs: how often it runs before, which compiles, allocates, and makes what a stream's
            first call makes.

    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(first_runs):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()  # the graph's memory lives as long as the replay does

    def replay() -> Any:
        graph.replay()
        return kept

    return replay
