"""Where adapters can be saved and loaded: links, permissions, devices, names."""

import os
import stat

import pytest

from lora_ext import load_adapter, save_adapter, save_peft_adapter
from tests.files.faults import PEFT_FILES, model_of, value_in


def test_symbolic_links_stay(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")  # of nothing yet
    for value in (1, 2):
        save_adapter(model_of(value), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert value_in(tmp_path / "there" / "file") == value_in(tmp_path / "link") == value
    (tmp_path / "peft").symlink_to("there", target_is_directory=True)
    for name in PEFT_FILES:
        (tmp_path / "there" / name).symlink_to(f"../blob_{name}")
    for value in (1, 2):
        save_peft_adapter(model_of(value), tmp_path / "peft")
        assert value_in(tmp_path / "peft") == value
        assert all((tmp_path / "there" / name).is_symlink() for name in PEFT_FILES)
    assert sorted(os.listdir(tmp_path / "there")) == [*PEFT_FILES, "file"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        save_adapter(model_of(1), tmp_path / "loop")


def test_permissions_stay(tmp_path):
    path = tmp_path / "a"
    save_adapter(model_of(1), path)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    for mode in (0o600, 0o666):
        path.chmod(mode)
        save_adapter(model_of(2), path)
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_what_is_no_file_is_refused(tmp_path):
    """As root a rename would take the place of a device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    model = model_of(1)
    with pytest.raises(OSError, match="path must be a regular file's, .*pipe is a device, pipe"):
        save_adapter(model, tmp_path / "pipe")
    with pytest.raises(IsADirectoryError, match="path must be a file's, .*folder is a folder"):
        save_adapter(model, tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="must be in a folder that exists, there is none"):
        save_adapter(model, tmp_path / "none" / "a")
    with pytest.raises(NotADirectoryError):
        save_adapter(model, tmp_path / "file" / "a")
    with pytest.raises(FileExistsError):
        save_peft_adapter(model, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="there is none at .*pipe"):
        load_adapter(model, tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="there is none at .*folder"):
        load_adapter(model, tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]


def test_read_only_and_unreadable_are_permission_errors(tmp_path):
    """Root may do anything, so a child without its rights tries."""
    model = model_of(1)
    save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "secret")
    (tmp_path / "free").mkdir()
    save_adapter(model, tmp_path / "free" / "a")
    for path, mode in {"a": 0o444, "secret": 0, "free/a": 0o444, "free": 0o777, "": 0o555}.items():
        (tmp_path / path).chmod(mode)
    for folder in (tmp_path, *tmp_path.parents[:3]):  # one more with pytest-xdist
        folder.chmod(folder.stat().st_mode | 0o555)
    process = os.fork()
    if process == 0:
        failures = 0
        if os.geteuid() == 0:
            os.seteuid(65534)
        for call, path, says in (
            (save_adapter, tmp_path / "new", "Permission denied"),
            (save_adapter, tmp_path / "free" / "a", "is read-only"),
            (save_peft_adapter, tmp_path / "peft", "Permission denied"),
            (load_adapter, tmp_path / "secret", "Permission denied"),
        ):
            try:
                call(model, path)
            except PermissionError as error:
                failures += says not in str(error)
            else:
                failures += 1
        os._exit(failures)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    tmp_path.chmod(0o755)
    assert sorted(os.listdir(tmp_path)) == ["a", "free", "secret"]
    assert os.listdir(tmp_path / "free") == ["a"]


@pytest.mark.parametrize(
    "name",
    [
        "n" * 255,
        "ä" * 127,
        "名" * 85,
        "🦙 with spaces",
        "-",
        "%s{}\n",
        "\udcff",
        ".hidden",
        "a" * 9,
    ],
    ids=lambda name: ascii(name[:9]),
)
def test_any_name_of_a_file(tmp_path, name):
    path = tmp_path.joinpath(*["d" * 200] * 15) if name == "a" * 9 else tmp_path  # long in all
    path.mkdir(parents=True, exist_ok=True)
    for value in (1, 2):
        save_adapter(model_of(value), path / name)
        assert value_in(path / name) == value
    assert os.listdir(path) == [name]
    save_peft_adapter(model_of(3), path / f"{name[:60]}_")
    assert value_in(path / f"{name[:60]}_") == 3
