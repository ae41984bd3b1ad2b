"""A loop of one's own: values under their steps, training bitwise the same, nothing that ends the run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger

from matent_callbacks import EntropyMonitor, LoopMonitor
from matent_callbacks.callbacks.run_monitor import RunMonitor
from matent_callbacks.transformers import MatrixEntropyCallback
from tests.conftest import collate, llama, text_examples
from tests.loggers.libraries import TensorBoard
from tests.wandb_history import read_history

Logged = list[tuple[int, dict[str, float]]]


def batch(step: int) -> Any:
    return collate(text_examples(3, start=3 * step))


def train(
    make: Callable[[Any, Any], LoopMonitor | None],
    *,
    steps: range = range(1, 7),
    micro_batches: int = 1,
    model: Any = None,
    around: Callable[[LoopMonitor | None, int, int], Any] | None = None,
) -> tuple[Logged, dict[str, torch.Tensor], torch.Tensor]:
    """What was logged, the weights, and the random state."""
    logged: Logged = []
    model = model or llama(layers=2)
    monitor = make(model, lambda values, step: logged.append((step, values)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for step in steps:
        for i in range(micro_batches):
            with step_of(monitor, step, i) if around is None else around(monitor, step, i):
                model(**batch(10 * i + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return logged, model.state_dict(), torch.get_rng_state()


@contextmanager
def step_of(monitor: LoopMonitor | None, step: int, i: int) -> Any:
    if monitor is None:
        yield
    else:
        with monitor.step(step):
            yield


def plain(**arguments: Any) -> Callable[[Any, Any], LoopMonitor]:
    return lambda model, log: LoopMonitor(model, 2, log=log, **{"on_error": "raise", **arguments})


def alone(model: Any, log: Any) -> None:
    return None


def assert_same(one: Any, other: Any) -> None:
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert torch.equal(one[2], other[2])


@pytest.mark.parametrize(
    "arguments",
    [{"layers": "all"}, {"background": True}, {"window_steps": 2}, {"probe": batch(40), "reference": "start"}],
    ids=str,
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_each_step_has_its_values_and_training_is_bitwise_the_same(arguments, micro_batches):
    watched = train(plain(**arguments), micro_batches=micro_batches)
    assert [step for step, _ in watched[0]] == [2, 4, 6]
    assert len({frozenset(values) for _, values in watched[0]}) == 1
    assert_same(watched, train(alone, micro_batches=micro_batches))


def test_values_are_those_of_all_micro_batches():
    logged, _, _ = train(plain(), micro_batches=2, steps=range(1, 3))
    model = llama(layers=2)
    monitor = EntropyMonitor(model)

    @contextmanager
    def by_hand(_: Any, step: int, i: int) -> Any:
        if step == 2:
            monitor.start()
        yield
        monitor.stop()

    train(alone, micro_batches=2, steps=range(1, 3), model=model, around=by_hand)
    assert logged == [(2, monitor.compute())]


def test_a_step_is_logged_when_it_is_over_and_at_once_if_that_is_told():
    order: list[str] = []
    model = llama(layers=2)
    monitor = LoopMonitor(model, 1, log=lambda values, step: order.append(f"log {step}"), on_error="raise")
    for step in (1, 2, 3):
        for micro_batch in (0, 1):
            order.append(f"batch {step}")
            with monitor.step(step, ends=step == 3 and micro_batch == 1):
                model(**batch(step))
    order.append("close")
    monitor.close()
    batches = [f"batch {step}" for step in (1, 1, 2, 2, 3, 3)]
    assert order == [*batches[:3], "log 1", *batches[3:5], "log 2", batches[5], "log 3", "close"]


def test_steps_from_zero():
    logged, _, _ = train(plain(), steps=range(6))
    assert [step for step, _ in logged] == [0, 2, 4]


@pytest.mark.parametrize(("steps", "due"), [(range(3, 28, 3), [6, 9, 12, 18, 21, 24]), ([1, 2, 9, 10], [9])])
def test_numbers_of_steps_may_be_left_out(steps, due):
    model = llama(layers=1)
    logged: Logged = []
    with LoopMonitor(model, 4, log=lambda v, step: logged.append((step, v)), on_error="raise") as monitor:
        for step in steps:
            with monitor.step(step):
                model(**batch(step))
    assert [step for step, _ in logged] == due


def test_a_step_goes_on_after_an_evaluation_inside():
    model = llama(layers=2, dropout=0.0)
    logged: Logged = []
    for evaluates in (False, True):
        with LoopMonitor(model, 1, log=lambda v, step: logged.append((step, v)), on_error="raise") as monitor:
            with monitor.step(1):
                model(**batch(1))
                if evaluates:
                    with monitor.evaluation(), torch.no_grad():
                        model(**batch(2))
                model(**batch(3))
            with monitor.step(1):
                model(**batch(4))
    (_, alone), (_, evaluated), (_, with_evaluation) = logged
    assert with_evaluation == alone
    assert evaluated.keys() == {f"eval_{key}" for key in alone}


def test_an_evaluation_has_its_values_in_the_dict_and_in_the_log():
    logged: Logged = []
    model = llama(layers=2, dropout=0.0)
    monitor = LoopMonitor(model, 1, log=lambda values, step: logged.append((step, values)), on_error="raise")
    with monitor.step(1):
        model(**batch(1))
    model.eval()
    with monitor.evaluation("test") as values, torch.no_grad():
        assert logged  # the step is over
        for i in (7, 8):
            model(**batch(i))
        assert not values
    assert logged[1:] == [(1, values)]
    own = EntropyMonitor(model)
    own.read([batch(7), batch(8)])
    assert values == {f"test_{key}": pytest.approx(value, rel=1e-5) for key, value in own.compute().items()}


def test_a_mask_of_ones_own():
    masks = []

    def mask(given: Any) -> Any:
        masks.append(given)
        return given["attention_mask"]

    model = llama(layers=2, dropout=0.0)
    logged: Logged = []
    given = batch(3)
    monitor = LoopMonitor(model, 1, mask=mask, log=lambda v, step: logged.append((step, v)), on_error="raise")
    with monitor.step(1, batch=given):
        model(input_ids=given["input_ids"])
    with monitor.evaluation() as values, torch.no_grad():
        monitor.evaluating(given)
        model(input_ids=given["input_ids"])
    monitor.close()
    assert masks == [given, given]
    own = EntropyMonitor(model)
    with own:
        model(input_ids=given["input_ids"])
    unmasked = own.compute()
    for key, value in logged[0][1].items():
        assert value == values[f"eval_{key}"] != unmasked[key]


def test_generation_inside_a_step_does_not_count():
    model = llama(layers=2, dropout=0.0)
    logged: Logged = []
    for generate in (False, True):
        monitor = LoopMonitor(model, 1, log=lambda v, step: logged.append((step, v)), on_error="raise")
        with monitor.step(1):
            if generate:
                model.generate(batch(1)["input_ids"], max_new_tokens=2)
                model.train()
            model(**batch(2))
        monitor.close()
    assert logged[0] == logged[1]


def test_a_model_that_trains_in_evaluation_mode_is_read():  # as `from_pretrained` returns it
    model = llama(layers=2, dropout=0.0)
    logged: Logged = []
    for training in (False, True):
        monitor = LoopMonitor(model.train(training), 1, log=lambda v, step: logged.append((step, v)), on_error="raise")
        with monitor.step(1):
            model(**batch(1))
            with torch.no_grad():
                model(**batch(2))
        monitor.close()
    assert logged[0] == logged[1]


def test_a_resumed_run_has_the_reference_of_its_start():
    probe = batch(40)
    whole, _, _ = train(plain(probe=probe, reference="start"))
    model = llama(layers=2)
    state: dict[str, Any] = {}
    logged: Logged = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for steps in (range(1, 4), range(4, 7)):
        monitor = plain(probe=probe, reference="start")(model, lambda values, step: logged.append((step, values)))
        if state:
            monitor.load_state_dict(state)
        for step in steps:
            with monitor.step(step):
                model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = monitor.state_dict()
    monitor.close()
    assert logged == whole
    assert logged[-1][1]["diff_erank/last"] != 0


@pytest.mark.parametrize("frozen", [False, True])
def test_the_base_inside_of_a_peft_model_is_a_reference_without_the_adapter(frozen):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    base = llama(layers=2, dropout=0.0)
    apart = copy.deepcopy(base)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name and not frozen)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found: list[dict[str, float]] = []
    for reference in (base, model.get_base_model(), apart, model):
        arguments: dict[str, Any] = {"metrics": ["effective_rank", "drift"], "probe": batch(1), "reference": reference}
        monitor = LoopMonitor(model, 1, log=lambda v, step: found.append(v), on_error="raise", **arguments)
        with monitor, monitor.step(1):
            pass
    assert found[0] == found[1] == pytest.approx(found[2], abs=1e-6)
    assert abs(found[0]["diff_erank/last"]) > 0.1
    assert found[3]["drift/last"] == found[3]["diff_erank/last"] == 0
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert not any(getattr(module, "disable_adapters", False) is True for module in model.modules())


def test_resumed_without_its_state_there_is_no_reference_and_a_warning():
    with pytest.warns(UserWarning, match="resumed without diff_erank/last: the checkpoint has no reference values"):
        logged, _, _ = train(plain(probe=batch(40), reference="start"), steps=range(5, 7))
    assert "diff_erank/last" not in logged[0][1]


class BoomError(Exception):
    pass


def fails(*args: Any, **kwargs: Any) -> Any:
    raise BoomError("boom")


PLACES = ["start", "stop", "compute", "log", "run_begins", "step_ends", "state_dict", "load_state_dict"]


@pytest.mark.filterwarnings("default:Monitoring failed")
@pytest.mark.parametrize("place", PLACES)
def test_a_failure_is_a_warning_and_training_goes_on(place, monkeypatch):
    def make(model: Any, log: Any) -> LoopMonitor:
        monitor = LoopMonitor(model, 2, log=fails if place == "log" else log)
        if place != "log":
            owner = EntropyMonitor if hasattr(EntropyMonitor, place) else RunMonitor
            original = getattr(owner, place)

            def broken(*args: Any, **kwargs: Any) -> Any:
                if place == "stop":
                    original(*args, **kwargs)
                raise BoomError("boom")

            monkeypatch.setattr(owner, place, broken)
        monitor.load_state_dict({"reference_ranks": None, "reference_of": {}})
        monitor.state_dict()
        return monitor

    with pytest.warns(UserWarning, match="boom Training goes on without") as caught:
        watched = train(make)
    assert len([w for w in caught if "boom" in str(w.message)]) == 1
    assert_same(watched, train(alone))


def test_an_error_of_the_loop_is_raised_and_what_it_broke_off_does_not_count():
    model = llama(layers=2, dropout=0.0)
    logged: Logged = []

    def broken_off(monitor: LoopMonitor) -> None:
        with monitor.step(1):
            model(**batch(5))
            raise BoomError

    def loop() -> None:
        with LoopMonitor(model, 1, log=lambda v, step: logged.append((step, v)), on_error="raise") as monitor:
            with pytest.raises(BoomError):
                broken_off(monitor)
            assert not any(module._forward_hooks for module in model.modules())
            with monitor.step(1, ends=True):
                model(**batch(1))
            with monitor.step(2):
                model(**batch(2))
            raise BoomError

    with pytest.raises(BoomError):
        loop()
    own = EntropyMonitor(model)
    with own:
        model(**batch(1))
    assert logged == [(1, own.compute())]


def test_a_wrong_configuration_raises_at_once():
    model = llama(layers=2)
    for arguments in ({"layers": "lst"}, {"every_n_steps": 0}, {"window_steps": 2, "every_n_steps": 1}):
        with pytest.raises(ValueError, match=r"must be|matches it"):
            LoopMonitor(model, **arguments)
    with pytest.raises(TypeError, match=r"`log` must be a function of values and step.* got int"):
        LoopMonitor(model, log=3)


def test_the_arguments_are_those_of_the_callback():
    callback, loop = (inspect.signature(cls).parameters for cls in (MatrixEntropyCallback, LoopMonitor))
    own = {name: argument for name, argument in loop.items() if name not in ("model", "log", "reference_dir")}
    assert list(own.items()) == [item for item in callback.items() if item[0] not in ("during_eval", "prog_bar")]


class Writer:
    """As TensorBoard's."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}
        self.images: dict[str, list[int]] = {}
        self.texts: list[tuple[str, str]] = []

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.scalars.setdefault(key, {})[step] = value

    def add_text(self, tag: str, text: str) -> None:
        self.texts.append((tag, text))

    def add_image(self, key: str, pixels: Any, step: int, dataformats: str) -> None:
        assert pixels.ndim == 3
        self.images.setdefault(key, []).append(step)


def test_a_summary_writer_gets_numbers_and_pictures_and_once_what_is_measured():
    writer = Writer()
    train(lambda model, log: LoopMonitor(model, 2, "all", log=writer, on_error="raise"))
    assert list(writer.scalars["effective_rank/last"]) == [2, 4, 6]
    assert writer.images.keys() == {"layers/effective_rank_profile", "layers/effective_rank_heatmap"}
    assert writer.images["layers/effective_rank_profile"][-1] == 6
    assert writer.texts == [("matent_callbacks", '{"matent_callbacks.measured": "training batches"}')]


def test_a_run_of_wandb_gets_them_under_the_step_of_the_users_own(own_wandb):
    import wandb

    with wandb.init(mode="offline") as run:

        @contextmanager
        def logging(monitor: Any, step: int, i: int) -> Any:
            with monitor.step(step):
                yield
            run.log({"loss": 1.0 / step}, step=step)

        train(lambda model, log: LoopMonitor(model, 2, "all", log=run, on_error="raise"), around=logging)
    rows = {row["_step"]: row for row in read_history(own_wandb)}
    for step in (2, 4, 6):
        assert rows[step]["loss"] == 1.0 / step
        assert rows[step]["effective_rank/last"] > 0
    assert any(key.startswith("layers/effective_rank_profile") for key in rows[6])


def as_accelerator(folder: Path) -> Any:
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("run")
    return accelerator


def as_fabric(folder: Path) -> Any:
    return Fabric(accelerator="cpu", devices=1, loggers=[TensorBoardLogger(folder)])


@pytest.mark.parametrize("make", [as_accelerator, as_fabric])
def test_what_accelerate_and_fabric_log_with_gets_numbers_and_pictures(make, tmp_path):
    log = make(tmp_path / "logs")
    train(lambda model, _: LoopMonitor(model, 2, "all", log=log, on_error="raise"))
    log.end_training() if make is as_accelerator else log.logger.finalize("success")
    stored = TensorBoard(tmp_path / "logs").stored()
    assert list(stored.numbers["effective_rank/last"]) == [2, 4, 6]
    assert list(stored.pictures["layers/effective_rank_profile"])[-1] == 6
