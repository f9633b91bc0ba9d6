"""Methods and tiny models in float64, and one step of both the objective and the one written by hand."""

import copy
import functools

import tiny_models
import torch
from step_oracle import At, Problem, Written, step
from tiny_models import BagOfEmbeddings, Gradients
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective

SEED, OFFSET = 977, 3
FIRST_LAYERS = {
    "bag": "inner",
    "bert": "bert.encoder.layer.0",
    "roberta": "roberta.encoder.layer.0",
    "electra": "electra.encoder.layer.0",
    "gpt2": "transformer.h.0",
    "opt": "model.decoder.layers.0",
    "bart": "model.encoder.layers.0",
    "llama": "model.layers.0",
    "t5": "encoder.block.0",
}
WORDS = {
    "bag": "embed",
    "bert": "bert.embeddings.word_embeddings",
    "roberta": "roberta.embeddings.word_embeddings",
    "electra": "electra.embeddings.word_embeddings",
    "gpt2": "transformer.wte",
    "opt": "model.decoder.embed_tokens",
    "bart": "model.encoder.embed_tokens",
    "llama": "model.embed_tokens",
    "t5": "encoder.embed_tokens",
}
NORMS = {
    "bert": "bert.embeddings.LayerNorm",
    "roberta": "roberta.embeddings.LayerNorm",
    "electra": "electra.embeddings.LayerNorm",
    "bart": "model.encoder.layernorm_embedding",
}
FAMILIES_OF = {
    "classification": ("bert", "gpt2", "bart"),
    "regression": ("bert", "gpt2", "bart"),
    "choice": ("bert", "roberta", "electra"),
    "token_labels": ("bert", "roberta", "gpt2"),
    "spans": ("bert", "gpt2", "bart"),
    "masked_lm": ("bert", "roberta", "electra"),
    "causal_lm": ("gpt2", "opt", "llama"),
    "seq2seq": ("bart", "t5"),
}
"""Three families of each task, or as many as have it."""

FP32_INSIDE = ("llama", "t5")
"""Their norms compute in fp32, whatever the model's dtype."""

LARGE = {"std": 2e-2, "step_size": 5e-2, "epsilon": 4e-2}
MOVED = AdversarialConfig.alum_finetuning(std=1e-2, step_size=2e-2, epsilon=2e-2, normalize="linf")
"""ALUM with a perturbation that moves, and by which the model's predictions do."""

SMALL = ("alum_pretraining", "alum_continual", "alum_finetuning", "smart", "mtdnn", "r3f")
"""Published with perturbations near 1e-5, which leave the rest of the gradient as it is to 10 digits."""


def preset(name: str, **changes) -> AdversarialConfig:
    return getattr(AdversarialConfig, name)(fused_head=False, **changes)


def visible(name: str) -> AdversarialConfig:
    """A preset whose perturbation changes the gradient in its first digits."""
    return preset(name, **LARGE) if name in SMALL else preset(name)


def without_adversary(name: str, ascent: str = "task", **changes) -> AdversarialConfig:
    """A method that trains at the end, with no weight left but that of the task's loss at the clean point."""
    weights = {"alpha": 0.0, "adversarial_weight": 0.0, "linearity": 0.0, "linearity_gradient": 0.0}
    return preset(name, clean_weight=1.0, ascent=ascent, **weights, **changes)


def mean_loss(logits: Tensor, batch: dict) -> Tensor:
    return nn.functional.cross_entropy(logits, batch["labels"])


@functools.cache
def example(family: str, task: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model without dropout and a batch, in float64."""
    batch = {name: x.double() if x.is_floating_point() else x for name, x in tiny_models.batch(task, 3, 5).items()}
    if family == "bag":
        return BagOfEmbeddings().double(), batch
    return tiny_models.make(family, task, dtype=torch.float64), batch


def site_of(family: str, config: AdversarialConfig) -> tuple[At, ...]:
    if config.modules:
        return tuple(At(name) for name in config.modules)
    if config.site == "embeddings":
        return (At(WORDS[family]),)
    return (At(NORMS[family], on_input=config.site == "embedding_norm_input"),)


def objective_of(family: str, model: nn.Module, config: AdversarialConfig) -> AdversarialObjective:
    if family != "bag":
        return AdversarialObjective(model, config)
    own = {"first_layer": "inner"} if config.inner_steps else {}
    config = config.replace(**own, **({} if config.modules else {"modules": ("embed",)}))
    return AdversarialObjective(model, config, head="classification", loss=mean_loss)


def descend(model: nn.Module, rate: float):
    """An update of plain gradient descent between replays."""

    @torch.no_grad()
    def update() -> None:
        for parameter in model.parameters():
            parameter -= 0 if parameter.grad is None else rate * parameter.grad
        model.zero_grad()

    return update


def run(family: str, model: nn.Module, batch: dict, config: AdversarialConfig, **options) -> tuple:
    """Output and gradients of one step of the objective."""
    objective = objective_of(family, model, config)
    model.zero_grad()
    if config.backward == "replay":
        options["update"] = descend(model, 0.1)
    output = objective.forward(
        batch, seed=torch.tensor([SEED]), sample_offset=OFFSET, backward=Tensor.backward, **options
    )
    output.loss.backward()
    objective.remove_hooks()
    return output, Gradients.of(model).values


def written(family: str, model: nn.Module, batch: dict, task: str, config: AdversarialConfig, **options) -> Written:
    loss = mean_loss if family == "bag" else None
    sites = options.pop("sites", None) or site_of(family, config)
    if config.inner_steps:
        options.setdefault("first_layer", FIRST_LAYERS[family])
    problem = Problem(model, batch, task, sites, loss)
    return step(problem, config, SEED, **{"sample_offset": OFFSET, "learning_rate": 0.1, **options})


def assert_same(output, gradients: dict, expected: Written, *, rtol: float = 1e-9) -> None:
    def same(name: str, got: Tensor | None, want: Tensor | None, scale: Tensor | float = 0.0) -> None:
        assert (got is None) == (want is None), name
        if got is not None:
            torch.testing.assert_close(
                got.detach().double(),
                want.detach().double(),
                rtol=rtol,
                atol=float(scale) * rtol * 1e-2,
                msg=lambda m: f"{name}: {m}",
            )

    same("loss", output.loss, expected.loss)
    same("task_loss", output.task_loss, expected.task_loss)
    same("divergence", output.divergence, torch.zeros(()) if expected.divergence is None else expected.divergence)
    same("adversarial_loss", output.adversarial_loss, expected.adversarial_loss)
    same("proximal", output.proximal, expected.proximal)
    largest = max(grad.abs().max() for grad in expected.gradients.values() if grad is not None)
    assert largest > 1e-6
    for name, grad in expected.gradients.items():
        same(name, gradients[name], grad, largest)


def check(family: str, task: str, config: AdversarialConfig, *, rtol: float = 1e-9, **options) -> Written:
    """One step of the objective is the one written by hand."""
    original, batch = example(family, task)
    model = copy.deepcopy(original)
    expected = written(family, copy.deepcopy(original), batch, task, config, **options)
    output, gradients = run(family, model, batch, config)
    assert_same(output, gradients, expected, rtol=rtol)
    return expected


def tolerance(config: AdversarialConfig, family: str = "bag") -> float:
    """Root mean squares are fp32, and so are some norms: what differs in the last digit may be rounded elsewhere."""
    if config.ascent == "linearity":  # a small remainder of losses and a slope
        return 1e-5
    return 1e-9 if config.units == "absolute" and family not in FP32_INSIDE else 2e-6
