"""Masks that are kept from the clean pass: those that would be drawn again, in every pass, and no others."""

import gc
import weakref

import pytest
import tiny_models
import torch
from test_method_invariants import LABELLED
from tiny_models import Gradients
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial import dropout_masks, run
from alum_kernels.adversarial.dropout_masks import KeptMasks, can_keep_masks

MOVED = AdversarialConfig.alum_finetuning(normalize="linf", std=0.02, step_size=0.05, epsilon=0.1)
FRACTION = MOVED.replace(adversarial_fraction=0.25, std=0.0, step_size=0.0)


class Draws(TorchDispatchMode):
    """Counts elements that ``bernoulli_`` draws."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bernoulli_.float:
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def small_batches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout_masks, "FEWEST_TOKENS", 0)


def one_step(objective: AdversarialObjective, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Figures, gradient and state of the generator, of a step of some seed."""
    objective.model.zero_grad()
    if objective.config.proximal > 0:
        objective.follow(torch.optim.SGD(objective.model.parameters(), lr=0.0))
    torch.manual_seed(5)
    figures = objective.backward(batch, seed=torch.tensor([3]))
    return {**figures, "grads": Gradients.of(objective.model).flat(), "state": torch.get_rng_state()}


def one_step_and_draws(objective: AdversarialObjective, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The same, and elements drawn."""
    with Draws() as draws:
        return one_step(objective, batch), draws.elements


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To the bit."""
    assert wanted["divergence"] > 0
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "can_keep_masks", lambda *_: False)


@pytest.mark.parametrize(
    ("family", "task", "changes"),
    [
        *((family, "classification", {}) for family in tiny_models.FAMILIES_OF["classification"]),
        ("bert", "masked_lm", {}),
        ("bert", "masked_lm", {"fused_head": False, "steps": 3}),
        ("bert", "spans", {"signal_check_interval": 1}),
        ("bert", "choice", {"proximal": 0.5}),
        ("bert", "classification", {"ascent_depth": 1}),
        ("bart", "classification", {"steps": 2}),
    ],
    ids=str,
)
def test_a_step_is_the_one_whose_masks_are_drawn_again_and_draws_once(family, task, changes, monkeypatch):
    model, batch = tiny_models.make(family, task, 0.2), tiny_models.batch(task)
    config = MOVED.replace(**changes)
    kept, drawn_once = one_step_and_draws(AdversarialObjective(model, config), batch)
    drawn_again(monkeypatch)
    again, drawn = one_step_and_draws(AdversarialObjective(model, config), batch)
    with Draws() as standard:
        model(**batch)
    assert_same(kept, again)
    assert drawn_once == standard.elements
    assert drawn > 2 * standard.elements or "ascent_depth" in changes


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_layers_of_torch_draw_once_too(fraction):
    """Their attention has its dropout inside one function of torch."""
    model, batch = tiny_models.bert(0.2).double(), tiny_models.classification_batch(8)
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.2, batch_first=True, norm_first=True).double()
    model.bert.encoder.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=layer(output.last_hidden_state))
    )
    with Draws() as standard:
        model(**batch)
    objective = AdversarialObjective(model, FRACTION.replace(adversarial_fraction=fraction))
    found, drawn = one_step_and_draws(objective, batch)
    assert found["divergence"] < 1e-20
    assert drawn == standard.elements
    assert objective._runner.selects_masks


@pytest.mark.parametrize("name", LABELLED)
def test_methods_without_a_clean_pass_draw_as_ever(name, monkeypatch):
    model, batch = tiny_models.bert(0.2), tiny_models.classification_batch()
    config = getattr(AdversarialConfig, name)(dropout="shared")

    def step() -> dict[str, Tensor]:
        objective = AdversarialObjective(model, config)
        model.zero_grad()
        torch.manual_seed(5)
        update = {"update": model.zero_grad} if name == "freeat" else {}
        loss = objective.backward(batch, seed=torch.tensor([3]), **update)["loss"]
        objective.remove_hooks()
        return {"loss": loss, "grads": Gradients.of(model).flat(), "state": torch.get_rng_state()}

    kept = step()
    drawn_again(monkeypatch)
    assert all(torch.equal(kept[key], value) for key, value in step().items())


def test_an_ascent_in_another_precision_has_the_same_masks():
    model, batch = tiny_models.bert(0.2), tiny_models.classification_batch()
    with Draws() as standard:
        model(**batch)
    objective = AdversarialObjective(model, MOVED.replace(ascent_dtype="bfloat16", signal_check_interval=1))
    assert one_step_and_draws(objective, batch)[1] == standard.elements
    assert objective.telemetry.read()["ascent_cosine"] > 0.98


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_no_mask_outlives_the_backward(fraction, monkeypatch):
    """Without the collector of cycles too, which runs when it likes."""
    kept = []
    keep = KeptMasks._keep

    def watch(self, before, noise, *args, **options) -> None:
        kept.append(weakref.ref(noise))
        keep(self, before, noise, *args, **options)

    monkeypatch.setattr(KeptMasks, "_keep", watch)
    objective = AdversarialObjective(tiny_models.bert(0.2), MOVED.replace(adversarial_fraction=fraction))
    gc.disable()
    try:
        objective.backward(tiny_models.classification_batch(8))
        assert kept
        assert not any(mask() is not None for mask in kept)
    finally:
        gc.enable()


def test_masks_are_kept_where_that_is_faster_and_takes_no_memory(monkeypatch):
    batch = tiny_models.classification_batch()
    assert can_keep_masks(tiny_models.bert(0.2), batch)
    assert not can_keep_masks(torch.compile(tiny_models.bert(0.2)), batch)
    for change in (
        lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
        lambda model: model.bert.encoder.layer[0].compile(),
        lambda model: setattr(model.bert, "encoder", torch.compile(model.bert.encoder)),
        lambda model: model.to("meta"),
    ):
        model = tiny_models.bert(0.2)
        change(model)
        assert not can_keep_masks(model, batch)
    with Draws() as standard:
        tiny_models.bert(0.2)(**batch)
    low = AdversarialObjective(tiny_models.bert(0.2), MOVED.replace(memory="low"))
    assert one_step_and_draws(low, batch)[1] == 4 * standard.elements
    monkeypatch.setattr(dropout_masks, "FEWEST_TOKENS", batch["input_ids"].numel())
    assert can_keep_masks(tiny_models.bert(0.2), batch)
    embeds = {"inputs_embeds": torch.zeros(*batch["input_ids"].shape, 8)}
    assert can_keep_masks(tiny_models.bert(0.2), embeds)
    monkeypatch.setattr(dropout_masks, "FEWEST_TOKENS", batch["input_ids"].numel() + 1)
    for inputs in (batch, embeds, {}):
        assert not can_keep_masks(tiny_models.bert(0.2), inputs)


def nested(rows: Tensor) -> Tensor:
    """Dropout of sequences that are one tensor without padding."""
    together = torch.nested.as_nested_tensor(list(rows.unbind()), layout=torch.strided)
    return torch.stack(functional.dropout(together, 0.3).unbind())


def without_gradients(rows: Tensor) -> Tensor:
    with torch.inference_mode():
        mask = functional.dropout(torch.ones_like(rows), 0.3)
    return rows * mask


def beside_a_fork(rows: Tensor) -> Tensor:
    """The same state twice, for masks of two shapes."""
    with torch.random.fork_rng(devices=[]):
        rows = functional.dropout(rows[0], 0.3) + rows
    return functional.dropout(rows, 0.3)


def functions() -> dict[str, tuple]:
    rows, attention = (torch.arange(120.0).sin().view(shape) for shape in ((4, 5, 6), (1, 3, 5, 8)))
    few = attention[:, :1]
    return {
        "dropout": (functional.dropout, (rows, 0.3)),
        "named": (functional.dropout, {"input": rows, "p": 0.3, "training": True}),
        "strided": (functional.dropout, (rows.transpose(0, 2), 0.3)),
        "expanded": (functional.dropout, (rows[:1].expand(3, 5, 6), 0.3)),
        "fp64": (functional.dropout, (rows.double(), 0.3)),
        "bf16": (functional.dropout, (rows.bfloat16(), 0.3)),
        "all": (functional.dropout, (rows, 1.0)),
        "none": (functional.dropout, (rows, 0.0)),
        "evaluation": (functional.dropout, (rows, 0.3, False)),
        "in place": (lambda x: functional.dropout(x.clone(), 0.3, True, True), (rows,)),
        "empty": (functional.dropout, (rows[:0], 0.3)),
        "channels": (functional.dropout1d, (rows, 0.3)),
        "alpha": (functional.alpha_dropout, (rows, 0.3, True)),
        "alpha of channels": (functional.feature_alpha_dropout, (rows, 0.3, True)),
        "gumbel": (functional.gumbel_softmax, (rows,)),
        "nested": (nested, (rows,)),
        "inference": (without_gradients, (rows,)),
        "fork": (beside_a_fork, (rows,)),
        "recurrent": (nn.LSTM(6, 6, 2, dropout=0.3), (rows,)),
        "attention": (functional.scaled_dot_product_attention, (attention, attention, attention, None, 0.3)),
        "causal": (
            functional.scaled_dot_product_attention,
            {"query": attention, "key": attention, "value": attention, "dropout_p": 0.3, "is_causal": True},
        ),
        "grouped": (
            functional.scaled_dot_product_attention,
            {"query": attention, "key": few, "value": few, "dropout_p": 0.3, "enable_gqa": True},
        ),
        "no dropout": (functional.scaled_dot_product_attention, (attention, attention, attention)),
        "layer": (nn.TransformerEncoderLayer(8, 2, 16, 0.3), (attention[0],)),
        "module": (nn.MultiheadAttention(8, 2, 0.3), (attention[0], attention[0], attention[0])),
    }


@pytest.mark.parametrize("name", functions())
def test_every_function_gives_what_it_gives(name):
    """Drawn, taken again, and beside draws that are not looked at, which move the generator as ever."""
    function, given = functions()[name]

    def call() -> tuple[Tensor, ...]:
        found = function(**given) if isinstance(given, dict) else function(*given)
        return torch.rand(3), found[0] if isinstance(found, tuple) else found, torch.rand(3)

    torch.manual_seed(2)
    expected, state = call(), torch.get_rng_state()
    masks = KeptMasks()
    for context in (masks.kept, masks.repeated, masks.repeated):
        torch.manual_seed(2)
        with context():
            found = call()
        for got, want in zip(found, expected, strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_mask_of_another_precision_scales_as_in_this_one(dtypes):
    """1 / 0.7 rounded to bfloat16 is wrong by a thousandth, which a pass in fp32 must not inherit."""
    first, second = (torch.linspace(-1, 1, 1000, dtype=dtype) for dtype in dtypes)
    torch.manual_seed(2)
    expected = functional.dropout(second, 0.3)
    masks = KeptMasks()
    for context, x in ((masks.kept, first), (masks.repeated, second)):
        torch.manual_seed(2)
        with context():
            found = functional.dropout(x, 0.3)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_a_draw_in_another_state_or_of_another_kind_is_a_draw():
    x = torch.ones(2000)
    masks = KeptMasks()
    torch.manual_seed(2)
    with masks.kept():
        first = functional.dropout(x, 0.5)
    for seed, p, size in ((3, 0.5, 2000), (2, 0.25, 2000), (2, 0.5, 1000)):
        torch.manual_seed(seed)
        want = functional.dropout(x[:size], p)
        torch.manual_seed(seed)
        with masks.repeated():
            assert torch.equal(functional.dropout(x[:size], p), want)
    torch.manual_seed(2)
    with masks.repeated():
        assert torch.equal(functional.dropout(x, 0.5), first)
