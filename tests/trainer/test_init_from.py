"""The source of a new run's weights, and the run that a folder belongs to."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.https import make_certificate, serving_https
from support.training import Batch, Net, make_trainer, train
from torch import nn

from events.checkpoint.store import CheckpointStore
from events.checkpoint.weights import renamed
from events.errors import ArgumentsError, CheckpointDamaged, CheckpointError, CheckpointMismatch, RunFolderMismatch
from events.messages import RunResumed, TrainStepEnded, WarningLogged
from trainer import Checkpoints, InitFrom
from trainer.checkpoint import fetch
from trainer.cli.run_config import load_run_config

OFF: dict[str, Any] = {"every_minutes": None}


def trained(folder: Path, **options: Any) -> Any:
    options = {"epochs": 1, "run_id": folder.name, "run_dir": folder, "checkpoints": Checkpoints(**OFF)} | options
    return train(Net(), **options)


def weights_of(**options: Any) -> dict[str, torch.Tensor]:
    """Run the test stage and return its weights."""

    net = Net(test_data=Net.batches)
    make_trainer(net, **options).test()
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("what", ["file", "run without checkpoints", "tensors of a checkpoint", "checkpoints"])
def test_init_from_finds_weights_in_every_folder_of_a_run(tmp_path: Path, what: str) -> None:
    old = tmp_path / "old"
    trained(old)
    place = {
        "file": old / "weights.safetensors",
        "run without checkpoints": old,
        "tensors of a checkpoint": old / "checkpoints/step-2.a1/tensors.safetensors",
        "checkpoints": old / "checkpoints",
    }[what]
    if what == "run without checkpoints":
        shutil.rmtree(old / "checkpoints")
    expected = load_file(old / "weights.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(init_from=place).items())


def test_tied_weights_may_be_stored_under_one_name(tmp_path: Path) -> None:
    """Under any of their names; any other missing name is an error."""

    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(4, 1, bias=False)
            self.again.weight = self.linear.weight

    weight, bias = torch.full((1, 4), 7.0), torch.zeros(1)
    for name in ("linear.weight", "again.weight"):
        save_file({name: weight, "linear.bias": bias}, tmp_path / "tied.safetensors")
        net = Tied()
        net.lr = 0.0
        assert train(net, init_from=tmp_path / "tied.safetensors").error is None
        assert torch.equal(net.again.weight, weight)
        assert net.again.weight is net.linear.weight
    save_file({"linear.weight": weight}, tmp_path / "torn.safetensors")
    assert "it lacks linear.bias" in str(train(Tied(), init_from=tmp_path / "torn.safetensors").error)


def test_a_pickle_is_refused_with_the_right_format(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "model.pt")
    outcome = train(Net(), init_from=tmp_path / "model.pt")
    assert isinstance(outcome.error, CheckpointDamaged)
    assert "model.pt" in str(outcome.error)
    assert "with safetensors.torch.save_file(torch.load(path, weights_only=True), ...)" in str(outcome.error)
    assert "TrainStepEnded" not in outcome.names()


def test_a_restart_does_not_need_the_weights_again(tmp_path: Path) -> None:
    remote = f"file://{tmp_path}/there"
    trained(tmp_path / "old", checkpoints=Checkpoints(upload=remote, **OFF))
    for name, source in (("by path", InitFrom(str(tmp_path / "old"))), ("by address", f"{remote}/old")):
        begun = trained(tmp_path / name, init_from=source, resume="auto")
        assert begun.error is None
        assert not begun.of(RunResumed)
    shutil.rmtree(tmp_path / "old")
    shutil.rmtree(tmp_path / "there")
    for name, source in (("by path", str(tmp_path / "old")), ("by address", f"{remote}/old")):
        again = trained(tmp_path / name, init_from=source, resume="auto", epochs=2)
        assert [event.checkpoint for event in again.of(RunResumed)] == ["step-2.a1"]


def test_the_uploads_of_the_same_run_give_weights_and_no_history(tmp_path: Path) -> None:
    """They are not copied into the run's checkpoints."""
    remote = f"file://{tmp_path}/there"
    trained(tmp_path / "a" / "same", checkpoints=Checkpoints(upload=remote, **OFF))
    begun = trained(tmp_path / "b" / "same", init_from=f"{remote}/same")
    assert (begun.result.attempt, begun.result.global_step) == (1, 2)
    assert [str(name) for name in CheckpointStore(tmp_path / "b/same/checkpoints").names()] == ["step-2.a1"]


def test_init_from_with_a_named_checkpoint_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "old")
    again = trained(tmp_path / "new", resume=tmp_path / "old", init_from=tmp_path / "old", epochs=2)
    assert again.result.global_step == 4
    assert [text for text in caplog.messages if text.startswith("init_from=") and "is ignored" in text]


# ------------------------------------------------------------------------------------------ weights of other models


class Backbone(Net):
    """`Net` with a submodule of other names and a head of another size."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.backbone = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)

    def forward_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        return super().forward_loss((self.head(self.backbone(x)) + x, y))


def pretrained(path: Path, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Write the weights of a model with an encoder, and a head for other classes."""
    torch.manual_seed(1)
    state = {"encoder.weight": torch.randn(4, 4), "encoder.bias": torch.randn(4), "head.weight": torch.randn(7, 4)}
    save_file(state | more, path)
    return state | more


def test_a_part_of_the_weights_is_taken_and_the_rest_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run has the losses of a loop by hand: step 0, fresh optimizers, and own values where nothing fits."""
    path = tmp_path / "old.safetensors"
    state = pretrained(path, **{"pooler.weight": torch.ones(2)})

    def adam(net: Any) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=0.1)], []

    torch.manual_seed(0)
    net = Backbone(optimizers=adam)
    by_hand = copy.deepcopy(net)
    init = InitFrom(str(path), strict=False, rename={"encoder.": "backbone."})
    outcome = train(net, epochs=2, init_from=init)
    (warning,) = [text for text in caplog.messages if "init_from" in text]
    assert warning == (
        f"init_from took 2 of 6 tensors from {path}: backbone.weight, backbone.bias; left as they were:"
        f" linear.weight, linear.bias, head.bias; left because of their shapes: head.weight has the shape (7, 4) there"
        f" and (1, 4) here; not used: pooler.weight"
    )
    assert warning in [event.message for event in outcome.of(WarningLogged)]
    with torch.no_grad():
        by_hand.backbone.weight.copy_(state["encoder.weight"])
        by_hand.backbone.bias.copy_(state["encoder.bias"])
    (optimizer,), _ = adam(by_hand)
    losses = []
    for batch in by_hand.batches(8) * 2:
        optimizer.zero_grad()
        loss, _ = by_hand.forward_loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    steps = outcome.of(TrainStepEnded)
    assert [(event.global_step, event.loss) for event in steps] == list(enumerate(losses, 1))
    assert all(map(torch.equal, net.state_dict().values(), by_hand.state_dict().values()))


def test_a_part_of_a_checkpoint_is_taken_by_the_names_in_its_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A module with an own ``update_state`` receives its whole state only from a checkpoint of its kind."""

    class Own(Net):
        seen = 0

        def get_state(self) -> dict[str, Any]:
            return {"net": {"linear": self.linear.state_dict()}, "seen": self.seen}

        def update_state(self, state: dict[str, Any]) -> None:
            self.linear.load_state_dict(state["net"]["linear"])
            self.seen = state["seen"]

    old = Own(lr=0.1)
    old.seen = 7
    train(old, epochs=1, run_dir=tmp_path / "own", checkpoints=Checkpoints(**OFF))
    expected = old.linear.weight.detach().clone()
    inits: list[tuple[Any, int]] = [(tmp_path / "own", 7), (tmp_path / "own" / "weights.safetensors", 0)]
    inits += [(InitFrom(str(tmp_path / "own"), rename={"net.": ""}), 0)]
    inits += [(InitFrom(str(tmp_path / "own"), rename={"net.": ""}, strict=False), 0)]
    for init, seen in inits:
        net = Own(lr=0.0)
        assert train(net, epochs=1, init_from=init).error is None
        assert (net.seen, torch.equal(net.linear.weight, expected)) == (seen, True)
    assert not caplog.messages
    plain = Net(lr=0.0)
    error = train(plain, epochs=1, init_from=tmp_path / "own").error
    assert isinstance(error, CheckpointMismatch)
    assert "it lacks linear.weight, linear.bias" in str(error)
    error = train(plain, epochs=1, init_from=InitFrom(str(tmp_path / "own"), strict=False)).error
    assert str(error).endswith("InitFrom(path, rename={'net.': ''}) makes 2 names fit")


def test_weights_that_do_not_fit_are_refused_with_the_names_and_a_fix(tmp_path: Path) -> None:
    """The module is unchanged; a prefix that would make them fit is suggested."""
    weights = {"weight": torch.ones(1, 4), "bias": torch.ones(1)}
    save_file(weights, tmp_path / "bare")
    save_file({f"net.linear.{name}": value for name, value in weights.items()}, tmp_path / "wrapped")
    save_file({f"linear._orig_mod.{name}": value for name, value in weights.items()}, tmp_path / "compiled")
    save_file({"linear.weight": torch.ones(1, 4), "other.bias": torch.ones(1)}, tmp_path / "other")
    save_file({"a.linear.weight": torch.ones(1, 4), "linear.weight": torch.ones(1, 4)}, tmp_path / "twice")
    for name, options, why in (
        (
            "bare",
            {},
            "it lacks linear.weight, linear.bias; it has bias, weight, which the module lacks",
        ),
        ("bare", {}, "InitFrom(path, rename={'': 'linear.'}) makes 2 names fit"),
        ("wrapped", {}, "InitFrom(path, rename={'net.': ''}) makes 2 names fit"),
        ("compiled", {}, "InitFrom(path, rename={'linear._orig_mod.': 'linear.'}) makes 2 names fit"),
        (
            "wrapped",
            {"strict": False},
            "it has net.linear.bias, net.linear.weight, and Net has linear.weight",
        ),
        ("other", {}, "it lacks linear.bias; it has other.bias, which the module lacks"),
        ("other", {}, "InitFrom(path, strict=False) skips these"),
        ("bare", {"rename": {"nets.": ""}}, "no tensor has the prefix 'nets.'; the names are bias, weight"),
        ("twice", {"rename": {"a.": ""}}, "would both become linear.weight; choose another prefix"),
        ("wrapped", {"rename": {"net": ""}}, "leaves '.linear.bias' of net.linear.bias; end the prefix with a dot"),
    ):
        net = Net()
        before = net.linear.weight.detach().clone()
        outcome = train(net, epochs=1, init_from=InitFrom(str(tmp_path / name), **options))
        assert isinstance(outcome.error, CheckpointMismatch)
        assert why in str(outcome.error)
        assert torch.equal(net.linear.weight, before)
    net = Net(lr=0.0)
    assert train(net, epochs=1, init_from=InitFrom(str(tmp_path / "bare"), rename={"": "linear."})).error is None
    assert torch.equal(net.linear.weight, weights["weight"])


def test_the_longest_prefix_is_renamed() -> None:
    names = ["net.a.x", "net.b.x", "c"]
    assert renamed(names, {"net.": "", "net.a.": "d.", "": "e."}) == {"net.a.x": "d.x", "net.b.x": "b.x", "c": "e.c"}


def test_a_folder_of_hugging_face_is_read(tmp_path: Path) -> None:
    """One file, also behind a link as in its cache, or several with an index."""
    state = {"linear.weight": torch.full((1, 4), 2.0), "linear.bias": torch.full((1,), 3.0)}
    for name in ("one", "linked", "parts", "blobs", "broken"):
        (tmp_path / name).mkdir()
    save_file(state, tmp_path / "one" / "model.safetensors")
    save_file(state, tmp_path / "blobs" / "0123")
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    places = {}
    for number, (name, value) in enumerate(state.items(), 1):
        places[name] = f"model-0000{number}-of-00002.safetensors"
        save_file({name: value}, tmp_path / "parts" / places[name])
    index = "model.safetensors.index.json"
    (tmp_path / "parts" / index).write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": places}))
    for place in ("one", "linked", "parts", f"parts/{index}"):
        assert all(torch.equal(tensor, state[name]) for name, tensor in weights_of(init_from=tmp_path / place).items())
    for content, why in (
        (json.dumps({"weight_map": places | {"more": places["linear.bias"]}}), "lack more"),
        (
            json.dumps({"weight_map": {"linear.bias": "../blobs/0"}}),
            "'../blobs/0', which is not a file in its folder",
        ),
        (json.dumps({"weight_map": {"linear.bias": "absent"}}), "No such file"),
        ("[]", "is not an index of safetensors files"),
    ):
        (tmp_path / "parts" / index).write_text(content)
        assert why in str(train(Net(), init_from=tmp_path / "parts").error)
    save_file(state, tmp_path / "broken" / "other.safetensors")
    assert "; it has other.safetensors; give the folder" in str(train(Net(), init_from=tmp_path / "broken").error)


def test_weights_are_converted_to_the_types_of_the_module(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As ``load_state_dict`` does, with a warning."""
    state = {name: torch.randn_like(value).bfloat16() for name, value in Net().state_dict().items()}
    save_file(state, tmp_path / "half")
    net, by_hand = Net(lr=0.0), Net()
    by_hand.load_state_dict(state)
    assert train(net, init_from=tmp_path / "half").error is None
    assert torch.equal(net.linear.weight, by_hand.linear.weight)
    assert caplog.messages == [
        f"tensors of {tmp_path / 'half'} are converted to the module's types: linear.bias from torch.bfloat16 to"
        f" torch.float32, linear.weight from torch.bfloat16 to torch.float32"
    ]


def test_different_values_of_tied_tensors_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whether or not every name is there; equal ones are not."""
    net = Net(lr=0.0)
    net.again = nn.Linear(4, 1)
    net.again.weight = net.linear.weight
    state = {name: value.clone() for name, value in net.state_dict().items()}
    save_file(state, tmp_path / "equal")
    save_file(state | {"again.weight": torch.full((1, 4), 5.0)}, tmp_path / "untied")
    assert train(net, init_from=tmp_path / "equal").error is None
    assert not caplog.messages
    assert train(net, init_from=tmp_path / "untied").error is None
    assert net.linear.weight.tolist() == [[5.0] * 4]
    assert caplog.messages == [
        f"again.weight is tied to a tensor that differs from it in {tmp_path / 'untied'}; both become again.weight"
    ]


def test_weights_initialise_a_lazy_module(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A part of one is left: torch initialises it at the first batch, as without weights."""

    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__(lr=0.0)
            self.lazy = nn.LazyLinear(4)

        def forward_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward_loss((self.lazy(batch[0]), batch[1]))

    state = {"linear.weight": torch.full((1, 4), 2.0), "linear.bias": torch.zeros(1), "lazy.bias": torch.ones(4)}
    save_file(state, tmp_path / "part")
    save_file(state | {"lazy.weight": torch.eye(4)}, tmp_path / "whole")
    net = Lazy()
    assert train(net, init_from=tmp_path / "whole").error is None
    assert torch.equal(net.lazy.weight, torch.eye(4))
    assert not caplog.messages
    assert train(Lazy(), init_from=InitFrom(str(tmp_path / "part"), strict=False)).error is None
    assert caplog.messages == [
        f"init_from took 2 of 4 tensors from {tmp_path / 'part'}: linear.weight, linear.bias; left as they were:"
        f" lazy.weight, lazy.bias"
    ]


def test_a_run_file_describes_the_weights(tmp_path: Path) -> None:
    """As a path, or as a mapping, whose fields can be overridden."""
    path = tmp_path / "run.yaml"
    path.write_text("module: {factory: 'jobs:Net'}\ninit_from: old\n")
    assert load_run_config(path).init_from == InitFrom("old")
    overrides = ["init_from.strict=false", "init_from.rename={encoder.: backbone.}"]
    expected = InitFrom("old", strict=False, rename={"encoder.": "backbone."})
    assert load_run_config(path, overrides).init_from == expected
    with pytest.raises(ArgumentsError, match=r"init_from.stric.*did you mean"):
        load_run_config(path, ["init_from.stric=false"])


def test_wrong_descriptions_of_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="the path is empty"):
        InitFrom("")
    with pytest.raises(ValueError, match=r"InitFrom\(rename=\{'a': 1\}\)"):
        InitFrom("a", rename={"a": 1})  # type: ignore[dict-item]
    with pytest.raises(ArgumentsError, match="use strict=False"):
        InitFrom("a", ignore_mismatched_sizes=True)  # type: ignore[call-arg]
    for wrong in (3, ""):
        with pytest.raises(ArgumentsError, match=r"init_from must be a path, an address, InitFrom\(\.\.\.\) or None"):
            make_trainer(Net(), init_from=wrong)
    assert InitFrom(Path("a/b")).path == "a/b"  # type: ignore[arg-type]


def test_a_remote_file_of_weights_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a store or over HTTPS; a missing, a truncated and another file are errors before the first step."""
    state = {"linear.weight": torch.full((1, 4), 2.0), "linear.bias": torch.full((1,), 3.0)}
    there = tmp_path / "there"
    there.mkdir()
    save_file(state, there / "model.safetensors", metadata={"format": "pt"})
    whole = (there / "model.safetensors").read_bytes()
    (there / "cut.safetensors").write_bytes(whole[:-1])
    (there / "text.safetensors").write_text("not weights at all")
    certificate = tmp_path / "both.pem"
    make_certificate(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(fetch, "_PIECE_BYTES", 7)
    with serving_https(there, certificate) as url:
        for base, query in ((there.as_uri(), ""), (url, "?download=true")):
            run_dir = tmp_path / base.partition(":")[0]
            found = weights_of(init_from=f"{base}/model.safetensors{query}", run_dir=run_dir)
            assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
            for name in ("absent", "cut", "text"):
                init = f"{base}/{name}.safetensors"
                outcome = train(Net(), init_from=init, run_dir=tmp_path / f"{name}-{run_dir.name}")
                assert isinstance(outcome.error, CheckpointError)
                assert "TrainStepEnded" not in outcome.names()
        assert "needs a run folder" in str(train(Net(), init_from=f"{url}/model.safetensors").error)
        secret = str(train(Net(), init_from=f"{url}/absent.safetensors?token=abc", run_dir=tmp_path / "secret").error)
        assert "404" in secret
        assert "abc" not in secret


# ----------------------------------------------------------------------------------------- the run of a folder


def test_a_folder_without_journal_and_checkpoints_knows_its_run(tmp_path: Path) -> None:
    """From its lock file, so a job that was killed before its first checkpoint keeps its id."""
    own: dict[str, Any] = {"run_dir": tmp_path / "run", "resume": "auto", "checkpoints": False}
    assert train(Net(), **own).result.run_id == train(Net(), **own).result.run_id


def test_a_folder_with_an_unreadable_id_starts_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").write_bytes(b"\xff{")
    (tmp_path / "run" / "journal").write_bytes(b"no folder")
    assert "cannot be used" in str(train(Net(), run_dir=tmp_path / "run", resume="auto").error)
    (tmp_path / "run" / "journal").unlink()
    assert train(Net(), run_dir=tmp_path / "run", resume="auto").result.attempt == 1


@pytest.mark.parametrize("resume", ["best", "step-2.a1", "run", "run/checkpoints/step-2.a1"])
def test_resuming_a_checkpoint_of_the_folder_continues_its_run(tmp_path: Path, resume: str) -> None:
    run = tmp_path / "run"
    trained(run, journal=True, checkpoints=Checkpoints(best="val_loss", **OFF))
    again = train(Net(), epochs=2, run_dir=run, resume=resume, checkpoints=Checkpoints(**OFF))
    assert (again.result.run_id, again.of(RunResumed)[0].checkpoint) == ("run", "step-2.a1")


def test_a_new_run_in_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run", journal=True)
    trained(tmp_path / "old")
    for given in ({"resume": tmp_path / "old"}, {"resume": "auto", "run_id": "other"}, {"init_from": tmp_path / "old"}):
        outcome = train(Net(), run_dir=tmp_path / "run", journal=True, **given)
        assert isinstance(outcome.error, RunFolderMismatch)
        assert "run_id='run' to continue that run" in str(outcome.error)


def test_a_run_that_is_named_is_found_without_journal_and_checkpoints(tmp_path: Path) -> None:
    trained(tmp_path / "runs" / "named", checkpoints=Checkpoints(best="val_loss", **OFF))
    expected = load_file(tmp_path / "runs/named/weights.safetensors")
    for resume in ("auto", "best"):
        found = weights_of(run_id="named", resume=resume)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
