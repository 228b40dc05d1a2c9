"""Programs of one launch out of order and inside one another, in Triton's interpreter.

The interpreter runs program after program. Here their order is drawn, and where one reads or
changes a counter, others may run from start to end before it goes on: what they leave in memory is
then there between two of its lines, as on a GPU.
"""

import functools
import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from triton.runtime import interpreter


class Interleaved:
    """A kernel's function whose programs run in a drawn order, each once."""

    def __init__(self, function: Callable, draw: random.Random):
        self.function, self.draw = function, draw
        functools.update_wrapper(self, function)  # of which the interpreter reads parts
        self.__globals__, self.__signature__ = function.__globals__, inspect.signature(function)
        self.waiting: list[tuple[int, ...]] | None = None

    def __call__(self, **arguments: object) -> None:
        """Run one more program, whichever the interpreter has the turn for."""
        builder = interpreter.interpreter_builder
        if self.waiting is None:
            self.waiting = list(itertools.product(*map(range, builder.grid_dim)))
            self.draw.shuffle(self.waiting)
            self.arguments = arguments
        if self.waiting:
            self.run_next()

    def run_next(self) -> None:
        """Run the next program of the order."""
        builder = interpreter.interpreter_builder
        before = builder.grid_idx
        builder.set_grid_idx(*self.waiting.pop())
        self.function(**self.arguments)
        builder.grid_idx = before

    def interrupt(self) -> None:
        """Let up to three other programs run now."""
        for _ in range(self.draw.choice((0, 0, 1, 3))):
            if self.waiting:
                self.run_next()


@contextmanager
def interleaved(seed: int) -> Iterator[None]:
    """Run the programs of each launch inside in an order drawn from a seed."""
    draw, running = random.Random(seed), []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    prepare, atomic = executor.__init__, builder.create_atomic_rmw

    def init(self, function, *rest):
        running[:] = [Interleaved(function, draw)]
        prepare(self, running[0], *rest)

    def create_atomic_rmw(self, *operands):
        running[0].interrupt()
        return atomic(self, *operands)

    with (
        mock.patch.object(executor, "__init__", init),
        mock.patch.object(builder, "create_atomic_rmw", create_atomic_rmw),
    ):
        yield
