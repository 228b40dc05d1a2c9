"""Files that appear whole or not at all, and how much of a file's contents a message shows."""

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_QUOTED = 100  # characters; a message quotes at most two things


class Draft:
    """The new contents of a file, complete on the disk under a temporary name next to it.

    `publish` gives them the file's name, by one rename: a reader sees the old contents or the new
    ones, and so does the next start after a power cut. Until then the file is as it was. Left
    without `publish`, a draft is removed. One whose process was killed is removed by the next draft
    of the same file: a living draft holds a lock, which ends with its process.

    Args:
        path: the file. A symbolic link stays, the file that it names is the one replaced.
        data: what the file is to hold.

    Raises:
        OSError: the file can't be written: no folder, no permission, no regular file, a full disk.

    """

    def __init__(self, path: str | os.PathLike[str], data: bytes) -> None:
        self._data = data
        self.target, mode = _regular_file(path)
        self._descriptor, self._temporary = _create(self.target, 0o666 if mode is None else mode)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            if mode is not None:  # the umask may have taken some of it
                os.fchmod(self._descriptor, mode)
            os.fsync(self._descriptor)
        except BaseException:
            self._discard()
            raise

    def publish(self) -> None:
        """Replace the file by the draft."""
        os.replace(self._temporary, self.target)
        _sync(self.target.parent)

    @property
    def changes_nothing(self) -> bool:
        """Whether the file holds these contents already."""
        try:
            return self.target.read_bytes() == self._data
        except FileNotFoundError:
            return False

    @property
    def pending(self) -> bool:
        """Whether the file has not been replaced yet."""
        return os.path.exists(self._temporary)

    def __enter__(self) -> "Draft":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # published
            os.unlink(self._temporary)
        os.close(self._descriptor)


def publish_both(first: Draft, second: Draft) -> None:
    """Replace two files that belong together: the old second never stands next to the new first.

    Between the two renames there is no second file, so `first` must be of use alone. After an error
    both files are as they were, or the first is new and the second absent.
    """
    aside = _temporary_name(second.target)
    try:
        if second.target.exists():
            os.replace(second.target, aside)
            _sync(second.target.parent)
        first.publish()
        second.publish()
    except BaseException:
        if first.pending and os.path.exists(aside):
            os.replace(aside, second.target)
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other thread or process is in here with the same folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Closing alone would leave it to a process forked meanwhile, a loader's worker say.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the contents of a safetensors file."""
    # A copy of each: safetensors refuses tensors that share memory, as tied adapters do.
    copies = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    return safetensors.torch.save(copies, metadata)


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file; pickle is never used.

    Raises:
        FileNotFoundError: no regular file there.
        OSError: it can't be read.
        ValueError: it is no safetensors file.

    """
    if not path.is_file():
        raise FileNotFoundError(f"{what}, there is none at {path}")
    with open(path, "rb") as opened:  # safetensors says of every failure that there is no file
        # It opens the file twice, for the header and for the data: by its descriptor, so that both
        # are of one file even if another one takes the name in between.
        descriptor = f"/dev/fd/{opened.fileno()}"
        name = descriptor if os.path.exists(descriptor) else path
        try:
            with safe_open(name, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, file.metadata() or {}
        except (SafetensorError, AttributeError) as error:  # or a dtype that torch has not
            raise ValueError(f"{path} must be a safetensors file: {quoted(str(error))}") from None


def quoted(value: object, most: int = _QUOTED) -> str:
    """Return what a message shows of a value from a file: at most `most` characters, on one line.

    Text stands as it is, without what would steer a terminal, and anything else as its repr.
    """
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    text = _shortened(text, most)
    return text if text.isprintable() else _shortened(repr(text)[1:-1], most)


def _shortened(text: str, most: int) -> str:
    end = most // 3  # the end of a name tells more than its middle
    return text if len(text) <= most else f"{text[: most - end - 3]}...{text[-end:]}"


def _regular_file(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """Return the file to replace, behind any symbolic links, and its permissions if it is there."""
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            got = f"there is none at {target.parent}"
            raise FileNotFoundError(f"path must be in a folder that exists, {got}") from None
        return target, None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"path must be a file's, {path} is a folder")
    if not stat.S_ISREG(mode):  # a rename would put a file in the place of the device
        raise OSError(f"path must be a regular file's, {path} is a device, pipe or socket")
    if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(f"path must be writable, {path} is read-only")
    return target, stat.S_IMODE(mode)


def _sync(folder: Path) -> None:
    """Have the folder's entries, as a rename changed them, on the disk before going on."""
    with contextlib.suppress(OSError):  # a file system that syncs files alone
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary_name(target: Path) -> str:
    """Return a new name next to the file: short, since the file's own may be as long as allowed."""
    return f"{_prefix(target)}{secrets.token_hex(8)}"


def _prefix(target: Path) -> str:
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()
    return os.path.join(target.parent, f".lora_ext-{digest[:16]}-")


def _create(target: Path, mode: int) -> tuple[int, str]:
    """Create a temporary file next to `target` and lock it; return its descriptor and name."""
    _remove_leftovers(target)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    while True:
        name = _temporary_name(target)
        descriptor = os.open(name, flags, mode)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(name):
            return descriptor, name
        os.close(descriptor)  # another save took it for a leftover before it was locked


def _remove_leftovers(target: Path) -> None:
    """Remove what a killed save left: temporaries that no living process has locked."""
    prefix = os.path.basename(_prefix(target))
    for entry in os.listdir(target.parent):
        if not entry.startswith(prefix):
            continue
        with contextlib.suppress(OSError):  # in use, or gone
            path = target.parent / entry
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(descriptor)
