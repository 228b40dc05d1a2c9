"""The package where something is missing: it works, and says once what to do."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, in the repository."""
    command = [sys.executable, *flags, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


BLOCK = """
import sys, warnings

class NoExtension:
    def find_spec(self, name, path=None, target=None):
        if name == "lora_ext._C":
            raise ImportError("blocked for a test")

sys.meta_path.insert(0, NoExtension())
"""


@pytest.mark.slow
def test_without_the_extension_it_runs_and_says_how_to_build():
    code = """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import lora_ext
        import torch
        layer = lora_ext.LinearWithLoRA(torch.nn.Linear(12, 10), 3, 2.0)
        torch.nn.init.normal_(layer.lora.B)
        x = torch.randn(5, 12, requires_grad=True)
        y = layer(x)
        want = layer.linear(x) + 2.0 * (x @ layer.lora.A @ layer.lora.B)
        torch.testing.assert_close(y, want)
        y.sum().backward()
        assert layer.lora.A.grad.any()
        text = lora_ext.explain(layer)
        assert text.startswith("reference: runs") and "cpp: the extension" in text, text
        try:
            lora_ext.lora_linear(x, layer.weight, None, layer.lora.A, layer.lora.B, 1.0,
                                 backend="cpp")
        except ValueError as error:
            assert "pip install --no-build-isolation -e ." in str(error)
        else:
            raise AssertionError("backend='cpp' did not raise")
    ours = [w for w in caught if "lora_ext" in str(w.message)]
    assert len(ours) == 1, [str(w.message) for w in ours]
    assert "blocked for a test" in str(ours[0].message)
    assert "pip install --no-build-isolation -e ." in str(ours[0].message)
    print("fine")
    """
    result = run(BLOCK + textwrap.dedent(code))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "fine"


def test_import_asks_no_device_and_makes_no_threads_or_output():
    code = """
    import torch
    def refuse(*a, **k): raise AssertionError("a device was asked for at import")
    torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
    state = torch.get_rng_state()
    threads = torch.get_num_threads(), torch.get_default_dtype()
    import lora_ext
    assert torch.equal(state, torch.get_rng_state())
    assert threads == (torch.get_num_threads(), torch.get_default_dtype())
    assert set(lora_ext.__all__) <= set(dir(lora_ext))
    import sys
    heavy = {"peft", "transformers", "accelerate", "torchao", "torch.distributed.tensor"}
    assert not heavy & set(sys.modules)
    """
    result = run(code, "-W", "ignore")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_integration_without_its_library_says_what_to_install():
    code = """
    import sys
    sys.modules["peft.tuners.lora"] = sys.modules["peft"] = None
    try:
        import lora_ext.integrations.peft
    except ImportError as error:
        assert "needs PEFT" in str(error) and "pip install 'peft>=" in str(error), error
    else:
        raise AssertionError("it was imported")
    """
    result = run(code, "-W", "ignore")
    assert result.returncode == 0, result.stderr
