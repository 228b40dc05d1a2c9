"""Files damaged at random: a few here, thousands by `python -m tests.files.corruptions`."""

from tests import EXAMPLES
from tests.files.corruptions import run


def test_damaged_file_is_refused_or_loads_what_it_holds():
    results = run(6 * EXAMPLES, seed=10_000)
    assert results.total() == 6 * EXAMPLES
    for file in ("a", "adapter_config.json", "adapter_model.safetensors"):
        assert results[f"{file}: refused"] > 0
        assert results[f"{file}: loaded"] > 0, "what is damaged beyond loading tests one half alone"
