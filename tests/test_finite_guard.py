"""``FiniteGuard``: which steps it lets through, what it says of the others, and that all processes decide alike."""

import warnings

import pytest
import torch
from processes import run_ranks
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective, FiniteGuard, NonFiniteError
from alum_kernels.adversarial.finite import drop_gradients

NAN, INF = float("nan"), float("inf")


def model_of(*names: str) -> nn.ParameterDict:
    """Parameters of three ones each, with gradients of one."""
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in names or ("a", "b", "c", "d", "e")})
    for parameter in model.values():
        parameter.grad = torch.ones(3)
    return model


def refused(guard: FiniteGuard, model: nn.Module, **options) -> bool:
    """Whether the guard refuses a step whose warning is not looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return not guard.allows(model, **options)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 4])
def test_one_element_decides(value, place):
    guard, model = FiniteGuard(), model_of()
    assert guard.allows(model)
    assert guard.allows(list(model.values()))
    list(model.values())[place].grad[1] = value
    assert refused(guard, model)
    assert (guard.skipped, guard.in_a_row) == (1, 1)
    assert all(parameter.grad is None for parameter in model.values())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    ],
)
def test_the_optimizer_then_changes_nothing(optimizer):
    model, guard = model_of("a"), FiniteGuard()
    steps = optimizer(model.parameters())
    steps.step()
    before = model["a"].detach().clone()
    state = {name: torch.as_tensor(value).clone() for name, value in steps.state[model["a"]].items()}
    model["a"].grad[0] = NAN
    assert refused(guard, model)
    steps.step()
    assert torch.equal(model["a"], before)
    assert all(torch.equal(torch.as_tensor(steps.state[model["a"]][name]), value) for name, value in state.items())


def test_gradients_of_any_kind_are_looked_at():
    guard = FiniteGuard()
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    assert guard.allows(table)
    (NAN * table(torch.tensor([3]))).sum().backward()
    assert refused(guard, table)
    mixed = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    mixed += [nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2))]
    for parameter in mixed[:-1]:  # the last one has none
        parameter.grad = torch.ones_like(parameter)
    assert guard.allows(mixed)
    mixed[1].grad[0] = 1e300
    assert guard.allows(mixed)
    mixed[2].grad[0] = INF
    assert refused(guard, mixed)
    half = nn.Parameter(torch.full((3,), 60000.0, dtype=torch.float16))
    half.grad = half.detach().clone()
    assert guard.allows([half])


def test_without_gradients_there_is_nothing_wrong():
    guard, model = FiniteGuard(), model_of("a")
    model["a"].grad = None
    assert guard.allows(model)
    assert guard.allows([])
    guard.watch({"loss": torch.tensor(NAN)})
    assert refused(guard, model)


def test_a_figure_decides_where_gradients_are_finite():
    guard, model = FiniteGuard(), model_of("a")
    guard.watch({"loss": torch.tensor(1.0), "divergence": torch.tensor(0.5, dtype=torch.float64)})
    assert guard.allows(model)
    guard.watch({"loss": torch.tensor(NAN)})
    guard.watch({"loss": torch.tensor(1.0)})  # a later batch of the same step does not hide it
    assert refused(guard, model)
    model["a"].grad = torch.ones(3)
    assert guard.allows(model)  # and the next step begins anew
    assert (guard.skipped, guard.in_a_row) == (1, 0)


def test_the_first_refusal_warns_with_what_is_not_finite():
    guard, model = FiniteGuard(), model_of()
    for name in "abcd":
        model[name].grad[0] = NAN
    with torch.no_grad():
        model["e"][0] = INF
    batch = {
        "inputs_embeds": torch.full((1, 2, 3), NAN),
        "attention_mask": torch.tensor([[0.0, -INF]]),
        "labels": torch.tensor([1]),
    }
    guard.watch({"loss": torch.tensor(NAN), "task_loss": torch.tensor(1.0), "divergence": torch.tensor(INF)}, batch)
    with pytest.warns(UserWarning, match="an optimizer step is left out") as caught:
        assert not guard.allows(model)
    message = str(caught[0].message)
    assert "loss nan, divergence inf;" in message
    assert "task_loss" not in message
    assert "gradients a, b, c and 1 more (4 of 5); parameters e (1 of 5); inputs inputs_embeds (1 of 1)." in message
    assert caught[0].filename == __file__
    model["a"].grad = torch.full((3,), NAN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not guard.allows(model)
    assert guard.skipped == 2


def test_parameters_without_names_are_counted():
    parameters = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))]
    parameters[1].grad = torch.full((4,), NAN)
    with pytest.warns(UserWarning, match=r"gradients number 1 of shape \(4,\) \(1 of 1\)"):
        assert not FiniteGuard().allows(parameters)


def test_too_many_in_a_row_raise_with_what_was_not_finite():
    guard = FiniteGuard(patience=3)
    for turn in range(2):
        model = model_of("weight")
        model["weight"].grad[0] = NAN
        assert refused(guard, model)
        assert guard.in_a_row == turn + 1
    assert guard.allows(model_of("weight"))  # a finite one ends the row
    for turn in range(3):
        model = model_of("weight")
        model["weight"].grad[0] = INF
        guard.watch({"task_loss": torch.tensor(INF)})
        if turn < 2:
            assert refused(guard, model)
    message = (
        r"^3 optimizer steps in a row were not finite; in the last one: task_loss inf; gradients weight \(1 of 1\)$"
    )
    with pytest.raises(NonFiniteError, match=message):
        guard.allows(model)
    assert model["weight"].grad is None
    assert guard.skipped == 5


def test_gradients_may_be_left_for_later():
    guard, model = FiniteGuard(), model_of("a")
    model["a"].grad[0] = NAN
    assert refused(guard, model, drop=False)
    assert model["a"].grad[0].isnan()
    drop_gradients(model)
    assert model["a"].grad is None


def test_a_checkpoint_goes_on_counting():
    guard = FiniteGuard(patience=2)
    model = model_of("a")
    model["a"].grad[0] = NAN
    assert refused(guard, model)
    later = FiniteGuard(patience=2)
    later.load_state_dict(guard.state_dict())
    assert (later.skipped, later.in_a_row) == (1, 1)
    model = model_of("a")
    model["a"].grad[0] = NAN
    with pytest.raises(NonFiniteError, match="2 optimizer steps in a row"):
        later.allows(model)


def test_patience_is_a_number():
    with pytest.raises(ValueError, match="patience: expected a number >= 1, got 0"):
        FiniteGuard(patience=0)
    with pytest.raises(TypeError, match="patience: expected an int, got float"):
        FiniteGuard(patience=1.5)


class Scaled:
    """An fp16 training: a weight of one, the optimizer, and a scaler that begins at a scale."""

    def __init__(self, scale: float) -> None:
        self.weight = nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.scaler.scale(torch.ones(()))  # which makes its scale a tensor

    def step(self, guard: FiniteGuard, grad: float) -> bool:
        self.weight.grad = torch.full((1,), grad) * self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        allowed = guard.allows([self.weight], scaler=self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return allowed


def test_an_overflow_is_the_scalers_until_its_scale_is_one():
    guard, training = FiniteGuard(patience=2), Scaled(8.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (4.0, 2.0, 1.0):
            assert not training.step(guard, INF)
            assert training.scaler.get_scale() == scale
    assert (guard.skipped, guard.in_a_row) == (0, 0)
    with pytest.warns(UserWarning, match="gradients number 0"):
        assert not training.step(guard, INF)
    assert guard.skipped == 1
    assert training.weight.item() == 1.0
    assert training.step(guard, 1.0)
    assert training.weight.item() == 0.5
    assert guard.in_a_row == 0


def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale():
    guard, training = FiniteGuard(), Scaled(1024.0)
    for gradient in (1.0, NAN):
        guard.watch({"loss": torch.tensor(NAN)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not training.step(guard, gradient)
        assert training.weight.item() == 1.0
    assert guard.skipped == 2


def test_the_host_reads_one_number():
    """A step that is finite stops for one number, whatever there is to look at."""
    read: list[tuple] = []

    class Counted(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in ("__bool__", "item", "tolist", "__float__", "__int__"):
                read.append((function.__name__, args[0].shape))
            return super().__torch_function__(function, types, args, kwargs or {})

    parameters = [nn.Parameter(torch.ones(3)) for _ in range(20)]
    for parameter in parameters:
        parameter.grad = torch.ones(3).as_subclass(Counted)
    guard = FiniteGuard()
    guard.watch({"loss": torch.ones(()).as_subclass(Counted)})
    assert guard.allows(parameters)
    assert read == [("__bool__", torch.Size([]))]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.embed(input_ids).tanh().mean(1))


def test_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    model = Classifier()
    adversarial = AdversarialObjective(
        model,
        AdversarialConfig.alum_finetuning(modules=("embed",)),
        head="classification",
        loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]),
    )
    optimizer, guard = torch.optim.SGD(model.parameters(), lr=0.1), FiniteGuard(patience=2)
    batch = {"input_ids": torch.randint(20, (4, 6)), "labels": torch.arange(4) % 3}
    guard.watch(adversarial.backward(batch), batch)
    assert guard.allows(model)
    with torch.no_grad():
        model.out.bias[0] = INF
    for turn in range(2):
        optimizer.zero_grad()
        guard.watch(adversarial.backward(batch), batch)
        if turn == 0:
            with pytest.warns(
                UserWarning, match=r"loss nan, .*gradients embed\.weight.*parameters out\.bias \(1 of 3\)"
            ):
                assert not guard.allows(model)
            before = model.embed.weight.detach().clone()
            optimizer.step()
            assert torch.equal(model.embed.weight, before)
    with pytest.raises(NonFiniteError, match=r"loss nan, task_loss nan, divergence nan.*parameters out\.bias"):
        guard.allows(model)


PROCESS = """
import warnings
import torch
from processes import join_group
from alum_kernels import FiniteGuard, NonFiniteError
rank, _ = join_group("{folder}")
alone = torch.distributed.new_group([rank], use_local_synchronization=True)
guard, own = FiniteGuard(patience=2), FiniteGuard(group=alone)
warnings.simplefilter("ignore")

def allows(guard, value, figure=1.0):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, value])
    guard.watch({{"loss": torch.tensor(figure)}})
    return guard.allows([weight])

nan = float("nan")
assert allows(guard, 1.0)
assert not allows(guard, nan if rank == 0 else 1.0)
assert guard.skipped == guard.in_a_row == 1
assert allows(guard, 1.0)
assert not allows(guard, 1.0, nan if rank == 1 else 1.0)
assert allows(own, nan if rank == 0 else 1.0) == (rank == 1)
try:
    allows(guard, nan if rank == 1 else 1.0)
except NonFiniteError as error:
    expected = "gradients number 0" if rank == 1 else "something on another process"
    assert expected in str(error), error
else:
    raise AssertionError("no error")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_processes_decide_alike(tmp_path):
    code = PROCESS.format(folder=tmp_path)
    run_ranks(2, "-c", code)


SHARDED = """
import warnings
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from processes import join_group
from alum_kernels import FiniteGuard, NonFiniteError
rank, _ = join_group("{folder}")
mesh = init_device_mesh("cpu", (2,))
warnings.simplefilter("ignore")
torch.manual_seed(0)
# one split, one left whole, and one with fewer rows than ranks
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
for layer in (model[0], model[2]):
    fully_shard(layer, mesh=mesh)
optimizer, guard = torch.optim.AdamW(model.parameters()), FiniteGuard(patience=2)
nan = float("nan")

def allows(row, value):
    optimizer.zero_grad()
    loss = model(torch.ones(2, 4)).sum()
    loss.backward()
    if row // 2 == rank:  # two of the four rows each
        model[0].weight.grad.to_local()[row % 2, 0] = value
    guard.watch({{"loss": loss}})
    return guard.allows(model)

for row in (0, 3):
    before = [parameter.to_local().clone() for parameter in model[0].parameters()]
    assert not allows(row, nan)
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.step()
    assert all(map(torch.equal, before, [parameter.to_local() for parameter in model[0].parameters()]))
    assert allows(row, 1.0)
    optimizer.step()
assert guard.skipped == 2
assert not allows(1, nan)
try:
    allows(1, nan)
except NonFiniteError as error:
    expected = "gradients 0.weight (1 of " if rank == 0 else "something on another process"
    assert expected in str(error), error
else:
    raise AssertionError("no error")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_a_sharded_model_is_looked_at_shard_by_shard(tmp_path):
    run_ranks(2, "-c", SHARDED.format(folder=tmp_path))
