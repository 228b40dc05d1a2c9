"""PEFT's draw next to other threads that draw: each number of the generator is used once.

The kernel draws from a copy of the generator's state and puts the copy's end in place, if nobody
has drawn meanwhile.
"""

import threading
from collections.abc import Callable

import pytest
import torch

from lora_ext import dropout
from lora_ext.backends import BACKENDS
from lora_ext.dropout import draw_keep, pack_bits
from tests.conftest import small_call

WITHOUT_CPP = BACKENDS["cpp"].unsupported(small_call())
pytestmark = pytest.mark.skipif(
    WITHOUT_CPP is not None or not dropout._draws_as_torch(),
    reason="the kernel does not draw here, bernoulli_ does",
)
M, K, P = 60, 90, 0.3


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Start as a process does, and leave no trace of what a test did."""
    monkeypatch.setattr(dropout, "_alone", True)


def masks_of(count: int) -> list[bytes]:
    """Return what `F.dropout` drops in so many calls, one after the other."""
    ones = torch.ones(M, K)
    drawn = [pack_bits(torch.nn.functional.dropout(ones, P) != 0) for _ in range(count)]
    return [bytes(bits.flatten().tolist()) for bits in drawn]


def in_threads(*jobs: Callable[[], None]) -> None:
    """Run each job in a thread of its own; raise what one raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_what_another_thread_drew_meanwhile_is_neither_lost_nor_drawn_again(monkeypatch):
    own = dropout._step_generator()

    def step(*state):
        monkeypatch.setattr(dropout, "_step_generator", lambda: own)
        torch.rand(3)  # as another thread might, in the middle of the draw
        return own(*state)

    torch.manual_seed(3)
    torch.rand(3)
    want, after = masks_of(1), torch.get_rng_state()
    torch.manual_seed(3)
    monkeypatch.setattr(dropout, "_step_generator", lambda: step)
    bits = draw_keep(torch.ones(M, K), P, "torch")
    assert [bytes(bits.flatten().tolist())] == want
    assert torch.equal(torch.get_rng_state(), after)
    assert dropout._draw_bernoulli(torch.default_generator, M, K, P) is None  # it may draw again
    assert torch.equal(torch.get_rng_state(), after)


def test_the_state_is_changed_only_from_what_it_was():
    generator = torch.Generator()
    before = generator.get_state()
    other = torch.Generator().manual_seed(7).get_state()
    step = dropout._step_generator()
    assert step(generator, before, other, 0.0) and torch.equal(generator.get_state(), other)
    assert not step(generator, before, before, 1.0) and torch.equal(generator.get_state(), other)


def test_threads_that_draw_masks_draw_each_once():
    torch.manual_seed(5)
    want, after = masks_of(80), torch.get_rng_state()
    torch.manual_seed(5)
    drawn: list[bytes] = []

    def job() -> None:
        for _ in range(20):
            bits = draw_keep(torch.ones(M, K), P, "torch")
            drawn.append(bytes(bits.flatten().tolist()))

    in_threads(*[job] * 4)
    assert sorted(drawn) == sorted(want)
    assert torch.equal(torch.get_rng_state(), after)
