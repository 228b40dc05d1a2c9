"""A save is whole or not at all: killed, interrupted, on a full disk, by several at once."""

import contextlib
import fcntl
import itertools
import json
import os
import resource
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_ext import load_peft_adapter, save_adapter, save_peft_adapter
from lora_ext.files import one_at_a_time
from tests.files.faults import (
    PEFT_FILES,
    assert_peft_finds_one_adapter,
    before_call,
    killed_before,
    model_of,
    value_in,
)


def foreign(folder: Path) -> None:
    """Make the folder one of PEFT's own: without the configuration in the tensors' metadata."""
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})


# What is there before the save: nothing, an adapter, one with the same alpha, one of PEFT's.
STARTS = {"nothing": None, "other_alpha": 1, "same_alpha": 2, "of_peft": 1}


def prepare(start: str, path: Path, save) -> None:
    if STARTS[start] is not None:
        save(model_of(STARTS[start]), path)
    if start == "of_peft":
        foreign(path)


def is_adapter(start: str, path: Path) -> bool:
    """Whether the old or the new adapter is there; else none, and that only where allowed."""
    with contextlib.suppress(FileNotFoundError):
        return value_in(path) in {STARTS[start], 2}
    # A folder of PEFT's has its configuration in one place alone.
    assert start == "nothing" or (start == "of_peft" and not (path / PEFT_FILES[0]).exists())
    return True


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["file", "peft"])
def test_killed_save_leaves_the_old_adapter_or_the_new(tmp_path, kind, start):
    """Before each call of the system in turn; what is left over goes with the next save."""
    if kind == "file" and start == "of_peft":
        pytest.skip("a file of save_adapter has no other form")
    save = save_adapter if kind == "file" else save_peft_adapter
    for number in itertools.count():
        path = tmp_path / str(number) / "a"
        path.parent.mkdir()
        prepare(start, path, save)
        killed = killed_before(number, lambda model, path=path: save(model, path), model_of(2))
        assert is_adapter(start, path), number
        if kind == "peft" and path.exists():
            assert_peft_finds_one_adapter(path)
        save(model_of(3), path)
        assert value_in(path) == 3
        files = os.listdir(path.parent) + (os.listdir(path) if path.is_dir() else [])
        assert sorted(files) == ["a", *(PEFT_FILES if kind == "peft" else [])], number
        if not killed:
            break
    assert number >= 6


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ["file", "peft"])
def test_failed_save_leaves_an_adapter_and_nothing_else(tmp_path, kind, error):
    """A full disk or Ctrl-C at each call of the system in turn."""
    save = save_adapter if kind == "file" else save_peft_adapter

    def fail():
        raise error

    for number in itertools.count():
        path = tmp_path / str(number) / "a"
        path.parent.mkdir()
        save(model_of(1), path)
        raised = False
        try:
            with before_call(number, fail):
                save(model_of(2), path)
        except (OSError, KeyboardInterrupt):
            raised = True
        assert value_in(path) in (1, 2) if raised else value_in(path) == 2
        if kind == "peft":
            assert_peft_finds_one_adapter(path)
        save(model_of(2), path)
        files = os.listdir(path.parent) + (os.listdir(path) if path.is_dir() else [])
        assert sorted(files) == ["a", *(PEFT_FILES if kind == "peft" else [])], number
        if not raised and number > 12:
            break


@pytest.mark.parametrize("kind", ["file", "peft"])
def test_full_disk_is_an_os_error(tmp_path, kind):
    save, path = (save_adapter if kind == "file" else save_peft_adapter), tmp_path / "a"
    save(model_of(1), path)
    before = sorted(os.walk(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(model_of(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert value_in(path) == 1 and sorted(os.walk(tmp_path)) == before


def test_each_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order that a power cut needs: contents, then the name, then the folder."""
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)

        def record(*args, name=name, function=function):
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            calls.append("folder" if is_folder else name)
            return function(*args)

        monkeypatch.setattr(os, name, record)
    save_adapter(model_of(1), tmp_path / "a")
    assert calls == ["fsync", "replace", "folder"]
    calls.clear()
    save_peft_adapter(model_of(1), tmp_path / "p")
    assert calls == ["fsync", "fsync", "replace", "folder", "replace", "folder"]
    calls.clear()
    save_peft_adapter(model_of(2), tmp_path / "p")  # the old configuration goes first
    assert calls == ["fsync", "fsync", *["replace", "folder"] * 3]
    calls.clear()
    save_peft_adapter(model_of(2), tmp_path / "p")  # the same one stays
    assert calls == ["fsync", "fsync", "replace", "folder"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "peft"])
def test_saves_and_loads_at_once(tmp_path, kind):
    """Four threads that save different adapters, four that load: each load finds one of them."""
    save, path = (save_adapter if kind == "file" else save_peft_adapter), tmp_path / "a"
    save(model_of(1), path)
    descriptors = len(os.listdir("/proc/self/fd"))

    def work(number):
        if number % 2:
            save(model_of(number % 5 + 1), path)
        else:
            assert value_in(path) in range(1, 6)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(240)))
    files = os.listdir(path.parent) + (os.listdir(path) if kind == "peft" else [])
    assert sorted(files) == ["a", *(PEFT_FILES if kind == "peft" else [])]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    if kind == "peft":
        assert_peft_finds_one_adapter(path)


@pytest.mark.parametrize("kind", ["file", "peft"])
def test_file_replaced_while_it_is_read_is_one_file(tmp_path, kind, monkeypatch):
    """Header and data are read one after the other, and a save may come in between."""
    save, path = (save_adapter if kind == "file" else save_peft_adapter), tmp_path / "a"
    save(model_of(1), path)
    map_file, mapped = torch.UntypedStorage.from_file, []

    def replace_and_map(*args, **kwargs):
        if not mapped:
            save(model_of(2), path)
        mapped.append(args)
        return map_file(*args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replace_and_map)
    # PEFT's other file is of the new save by then, so its tensors are read again.
    assert value_in(path) == (1 if kind == "file" else 2)
    assert len(mapped) == (1 if kind == "file" else 2), "safetensors maps in another way: adapt"


def test_temporary_of_a_living_save_stays(tmp_path):
    """Only a killed one's goes: another save of the same file begins while one is going on."""
    inner = []

    def save_again():
        save_adapter(model_of(2), tmp_path / "a")
        inner.append([f for f in os.listdir(tmp_path) if f.startswith(".")])

    # Calls of the outer save: 0 creates its temporary, 1 writes it.
    with before_call(1, save_again):
        save_adapter(model_of(1), tmp_path / "a")
    assert len(inner[0]) == 1 and value_in(tmp_path / "a") == 1
    assert os.listdir(tmp_path) == ["a"]


def test_temporary_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Another save can come between its creation and its lock."""
    flock, taken = fcntl.flock, []

    def late(descriptor, operation):
        if not taken:
            taken.extend(os.listdir(tmp_path))
            os.unlink(tmp_path / taken[0])
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    save_adapter(model_of(1), tmp_path / "a")
    assert len(taken) == 1 and value_in(tmp_path / "a") == 1 and os.listdir(tmp_path) == ["a"]


def test_file_system_without_locks_takes_saves(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for value in (1, 2):
        save_adapter(model_of(value), tmp_path / "a")
        save_peft_adapter(model_of(value), tmp_path / "p")
        assert value_in(tmp_path / "a") == value_in(tmp_path / "p") == value
    assert sorted(os.listdir(tmp_path)) == ["a", "p"] and len(os.listdir(tmp_path / "p")) == 2


def test_folder_that_never_rests_is_an_error(tmp_path, monkeypatch):
    save_peft_adapter(model_of(1), tmp_path)
    times = itertools.count()
    monkeypatch.setattr("lora_ext.adapters_peft._identity", lambda path: (next(times),))
    with pytest.raises(OSError, match="was replaced again and again while it was read"):
        value_in(tmp_path)


def test_configuration_edited_by_hand_counts(tmp_path):
    """As it does for PEFT: only where there is none, the one in the tensors' file is read."""
    save_peft_adapter(model_of(2), tmp_path)
    config = json.loads((tmp_path / PEFT_FILES[0]).read_text())
    (tmp_path / PEFT_FILES[0]).write_text(json.dumps(config | {"lora_alpha": 6}))
    model = nn.Sequential(nn.Linear(8, 8))
    load_peft_adapter(model, tmp_path)
    assert model[0].lora.alpha == 6
    (tmp_path / PEFT_FILES[0]).unlink()
    assert value_in(tmp_path) == 2


def test_one_save_of_a_folder_at_a_time(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with one_at_a_time(tmp_path), pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def test_process_forked_during_a_save_does_not_keep_the_folder(tmp_path):
    """A loader's worker, forked by another thread: it lives on with a copy of the descriptor."""
    with one_at_a_time(tmp_path):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.close(write)
            os.read(read, 1)  # until the test is over
            os._exit(0)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)
