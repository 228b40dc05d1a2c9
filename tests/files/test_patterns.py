"""PEFT's patterns: the names that PEFT's `re.match` takes, without the time that it may take."""

import json
import re
import sys
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_ext import load_peft_adapter, save_peft_adapter
from lora_ext.patterns import Patterns
from tests import EXAMPLES
from tests.files.test_adapters_peft import adapted, base_model
from tests.layers.test_inject import assert_unchanged, names_of, snapshot

Q_PROJ = "model.layers.0.self_attn.q_proj"


def found(pattern: str, name: str) -> bool:
    return Patterns({pattern: True}).value_for(name, False)


def found_by_peft(pattern: str, name: str) -> bool:
    """As in get_pattern_key of PEFT, and in the look-up that follows it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sets in sets
        return re.match(rf"(.*\.)?({pattern})$", name) is not None or pattern == name


ATOMS = r"""a b 0 _ - é . \. \n \w \W \d \D \s \S ^ $ \A \Z \b \B ( ) (?: ) | * + ? *? +? ?? {2}
    {1,2} {,2} {2,}? [ab] [^a] [a-c] [\d_] [^\W\d] (a|b) (?=a) (?!b) (?<=a) (?<!b.) (?P<n>a) (ab)+
    (a*)* (?:a|b?){2,} (a|)* x{0} {3} \- é""".split()


@settings(max_examples=10 * EXAMPLES, deadline=None, print_blob=True)
@given(
    st.lists(st.sampled_from(ATOMS), min_size=1, max_size=7).map("".join),
    st.text("ab.01_-\né", min_size=1, max_size=8),
)
def test_the_names_that_peft_finds_are_found(pattern, name):
    try:
        want = found_by_peft(pattern, name)
    except re.error:
        want = None
    if want is None and pattern != name:
        with pytest.raises(ValueError):
            found(pattern, name)
        return
    try:
        assert found(pattern, name) == want
    except ValueError as error:
        assert "possessive_repeat is not supported" in str(error)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "self_attn.q_proj",
        Q_PROJ,
        f"^{re.escape(Q_PROJ)}",
        r".*\.q_proj",
        r"model\.layers\.(0|1|2)\..*(q|v)_proj",
        r"^model.layers.[0-3].self_attn.(?:q_proj|k_proj)$",
        r"^(?!.*(?:vision|lm_head)).*q_proj",
        r"(?<=layers\.)\d+\.self_attn\.\w+",
        r"layers\.\d{1,2}\.self_attn\.[qkv]_proj",
    ],
)
def test_patterns_that_people_write_are_read(pattern):
    for name in (Q_PROJ, Q_PROJ.replace(".0.", ".17."), "lm_head", "vision.0.q_proj", "q_projx"):
        assert found(pattern, name) == found_by_peft(pattern, name), name
    assert found(pattern, Q_PROJ)


@pytest.mark.parametrize(
    ("pattern", "name", "wanted"),
    [
        (r"q(?<=q)_proj", "q_proj", True),
        (r"q(?<=k)_proj", "q_proj", False),
        (r"q_(?<=k_)proj", "q_proj", False),
        (r"q(?<!q)_proj", "q_proj", False),
        (r"q\B_proj", "q_proj", True),
        (r"q\b_proj", "q_proj", False),
        (r"q\b-\bproj", "q-proj", True),
        (r"q-\Bproj", "q-proj", False),
        (r"\bq_proj\b", "q_proj", True),
        (r"\Bq_proj", "q_proj", False),
        (r"q_proj\B", "q_proj", False),
        (r"-\B-", "--", True),
    ],
)
def test_looks_and_boundaries(pattern, name, wanted):
    assert found(pattern, name) == found_by_peft(pattern, name) == wanted


def test_the_first_pattern_counts():
    patterns = Patterns({".*0.*q_proj": 1, Q_PROJ: 2, "v_proj": 3, "q_proj": 4})
    assert patterns.value_for(Q_PROJ, 0) == 1
    assert patterns.value_for("model.v_proj", 0) == 3
    assert patterns.value_for("k_proj", 0) == 0


HOSTILE = {
    "exponential": ("(.+)+!", None),
    "two_stars": ("(a|a)*(.|.)*!", None),
    "stars_in_stars": ("((((((.*)*)*)*)*)*)*!", None),
    "long_repeats": ("(?:.?){300}(?:.?){300}!", None),
    "huge_repeat": ("(?:.{0,4000000000}){4000000000}!", None),
    "wide": ("|".join(["(.+)+!"] * 20), None),
    "overflow": ("a{99999999999}", "the repetition number is too large"),
    "nested": ("(" * 3000 + ")" * 3000, "6000 characters, at most 1000 are read"),
    "nested_less": ("(" * 300 + "." + ")*" * 300, "nested too deep"),
    "open": ("(", "missing ), unterminated subpattern"),
    "looks": ("(?=.*" * 50 + ")" * 50, "the patterns take too long to match"),
    "look_behind": ("(?<=a*)b", "look-behind requires fixed-width pattern"),
    "reference": (r"(.*)\1", "groupref is not supported, nor are flags"),
    "flags": ("(?i:Q_PROJ)", "subpattern is not supported, nor are flags"),
}


@pytest.mark.parametrize("limit", [None, 10_000])  # Python's own, and what a program may set
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pattern_takes_bounded_time(kind, limit, monkeypatch, request):
    monkeypatch.setattr("lora_ext.patterns._STEPS", 100_000)  # the tenth part of it
    pattern, message = HOSTILE[kind]
    patterns = Patterns({pattern: 2})
    before = sys.getrecursionlimit()
    request.addfinalizer(lambda: sys.setrecursionlimit(before))
    sys.setrecursionlimit(limit or before)
    start = time.process_time()
    if message is None:
        assert patterns.value_for(Q_PROJ * 3, 0) == 0
    else:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            patterns.value_for(Q_PROJ * 3, 0)
        assert len(str(caught.value)) <= 202
    assert time.process_time() - start < 3  # `re`: years


def test_many_patterns_over_many_layers_take_bounded_time(monkeypatch):
    """What stays within is quick, and what would not be is refused."""
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(20) for j in range(20)]
    for values in ({n: i for i, n in enumerate(names)}, {f"^{re.escape(n)}": 1 for n in names}):
        patterns = Patterns(values)
        assert all(patterns.value_for(n, None) is not None for n in names)
    monkeypatch.setattr("lora_ext.patterns._STEPS", 100_000)
    slow = Patterns({f"(.+)+{i}!": i for i in range(20_000)})
    start = time.process_time()
    with pytest.raises(ValueError, match="the patterns take too long to match"):
        slow.value_for(names[0], 0)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("pattern", ["(.+)+!", "(((.*)*)*)*q!"])
def test_hostile_adapter_loads_and_hangs_nobody(tmp_path, pattern):
    """Its pattern matches nothing, so it says nothing."""
    save_peft_adapter(adapted((4, 3, {})), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rank_pattern": {pattern: 2}}))
    model = base_model()
    load_peft_adapter(model, tmp_path)
    assert len(names_of(model)) == 5


def test_pattern_sees_only_names_of_the_model(tmp_path):
    """The length of a name is the model's: a file's own name is looked up first."""
    save_peft_adapter(adapted((4, 3, {})), tmp_path)
    model = nn.Sequential(nn.Linear(3, 3))
    before = snapshot(model)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rank_pattern": {"(?=.*" * 50 + ")" * 50: 2}}))
    with pytest.raises(ValueError, match="must be a linear layer, the model has no such module"):
        load_peft_adapter(model, tmp_path)
    assert_unchanged(model, before)
