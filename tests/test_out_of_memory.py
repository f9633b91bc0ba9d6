"""A step that an allocator refuses names its batch and what needs less memory, and following that helps."""

import os
import subprocess
import sys
from contextlib import nullcontext

import numpy
import pytest
import tiny_models
import torch
from accelerate.utils.memory import should_reduce_batch_size
from tiny_trainer import CLASSIFICATION, MASKED_LM, MOVED, trainer_of
from torch import nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.out_of_memory import memory_advice

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
REFUSALS = [torch.OutOfMemoryError(CUDA), RuntimeError(CPU), MemoryError("std::bad_alloc")]


def refuse(module: nn.Module, error: BaseException, *, backward: bool = False):
    """The module's next pass, or the backward of it, raises."""

    def hook(_, args, output):
        def fail(grad):
            raise error

        if not backward:
            raise error
        if output.requires_grad:
            output.register_hook(fail)

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("error", REFUSALS, ids=["CUDA", "CPU", "host"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_refusal_names_the_batch_and_what_needs_less(error, backward, monkeypatch):
    monkeypatch.setenv("ALUM_LINEAR_CHUNK_BYTES", str(8 << 20))
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    objective = AdversarialObjective(model, MOVED)
    expected = objective.backward(batch)["loss"]
    hook = refuse(model.bert.encoder.layer[0].output.dense, error, backward=backward)
    with pytest.raises(type(error)) as caught:
        objective.backward(batch)
    hook.remove()
    message = str(caught.value)
    assert message.startswith("out of memory in a step over a batch of (B, S) = (4, 7) on cpu. What needs less: ")
    assert message.count("What needs less") == 1
    assert "ALUM_LINEAR_CHUNK_BYTES=2097152 (chunk_bytes is 8388608 now)" in message
    assert "memory='low'" in message
    assert "more gradient accumulation steps" in message
    assert message.endswith(f". {error}")
    assert caught.value.__cause__ is error
    assert type(caught.value) is type(error)
    if not isinstance(error, MemoryError):
        assert should_reduce_batch_size(caught.value)  # those who look for the allocator's words find them
    model.zero_grad()
    assert objective.backward(batch)["loss"] == pytest.approx(expected.item(), rel=0.2)  # nothing is left behind


def test_a_loop_may_put_it_around_its_own_backward():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    objective = AdversarialObjective(model, MOVED)

    def fail(grad):
        raise REFUSALS[0]

    for message, around in ((r"^CUDA out", nullcontext()), (r"^out of .* \(4, 7\)", objective.memory_advice(batch))):
        loss = objective(**batch).loss
        loss.register_hook(fail)
        with pytest.raises(torch.OutOfMemoryError, match=message), around:
            loss.backward()


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("can't allocate memory")])
def test_other_errors_are_left_alone(error):
    model = tiny_models.bert()
    objective = AdversarialObjective(model, MOVED)
    refuse(model.classifier, error)
    with pytest.raises(type(error)) as caught:
        objective.backward(tiny_models.classification_batch())
    assert caught.value is error


class TwoFactsError(RuntimeError):
    """A library's own refusal, which is not made of one message."""

    def __init__(self, wanted: int, had: int) -> None:
        super().__init__(f"can't allocate memory: {wanted} bytes of {had}")


def refused_array() -> MemoryError:
    """NumPy's own, of a shape and a dtype."""
    with pytest.raises(MemoryError) as caught:
        numpy.empty(1 << 55)
    return caught.value


@pytest.mark.parametrize("error", [TwoFactsError(9, 8), refused_array()], ids=["of two facts", "NumPy's"])
def test_a_type_that_takes_no_message_is_the_one_below_it(error):
    kind = MemoryError if isinstance(error, MemoryError) else RuntimeError
    assert type(error) is not kind
    model = tiny_models.bert()
    objective = AdversarialObjective(model, MOVED)
    refuse(model.classifier, error)
    with pytest.raises(kind, match=r"^out of memory in a step over a batch of .* = \(4, 7\)") as caught:
        objective.backward(tiny_models.classification_batch())
    assert type(caught.value) is kind
    assert caught.value.__cause__ is error
    assert str(caught.value).endswith(f". {error}")


def advice(config: AdversarialConfig, batch: dict, *, chunked: bool = False) -> str:
    with pytest.raises(MemoryError) as caught, memory_advice(batch, config, nn.Linear(1, 1), chunked=chunked):
        raise MemoryError
    return str(caught.value)


def test_only_what_can_help_is_advised(monkeypatch):
    batch = tiny_models.classification_batch()
    assert "memory='low'" in advice(MOVED, batch)
    for config in (MOVED.replace(memory="low"), AdversarialConfig.freelb(), AdversarialConfig.smart(proximal=1.0)):
        assert "memory='low'" not in advice(config, batch)
    assert "CHUNK_BYTES" not in advice(MOVED, batch)
    monkeypatch.delenv("ALUM_LINEAR_CHUNK_BYTES", raising=False)
    assert "ALUM_LINEAR_CHUNK_BYTES=16777216 (chunk_bytes is 67108864 now)" in advice(MOVED, batch, chunked=True)
    monkeypatch.setenv("ALUM_LINEAR_CHUNK_BYTES", "1000")
    assert "no smaller chunks (chunk_bytes is 1000 now)" in advice(MOVED, batch, chunked=True)


def test_batches_of_any_kind_are_described():
    assert "(B, choices, S) = (4, 3, 7)" in advice(MOVED, tiny_models.choice_batch())
    assert "(B, S) = (2, 5)" in advice(MOVED, {"inputs_embeds": torch.ones(2, 5, 8), "labels": torch.ones(2)})
    assert "a batch of pixels (2, 3)" in advice(MOVED, {"pixels": torch.ones(2, 3), "name": "x"})
    assert "a batch of no tensors" in advice(MOVED, {})


@pytest.mark.parametrize("backward", [False, True])
def test_the_trainer_says_it_once(tmp_path, backward):
    model = tiny_models.bert()
    trainer, _ = trainer_of(model, tmp_path, CLASSIFICATION, MOVED)
    refuse(model.classifier, REFUSALS[0], backward=backward)
    with pytest.raises(torch.OutOfMemoryError, match=r"\(B, S\) = \(8, 7\) on cpu") as caught:
        trainer.train()
    assert str(caught.value).count("What needs less") == 1


def test_the_trainer_knows_of_chunks(tmp_path):
    model = tiny_models.bert_masked_lm()
    trainer, _ = trainer_of(model, tmp_path, MASKED_LM, MOVED)
    refuse(model.bert.encoder.layer[0].output.dense, REFUSALS[1])
    with pytest.raises(RuntimeError, match=r"ALUM_LINEAR_CHUNK_BYTES=\d+ \(chunk_bytes is"):
        trainer.train()


LIMITED = """
import os, re, resource
import torch
from torch import nn
from alum_kernels import AdversarialConfig, AdversarialObjective

torch.set_num_threads(1)

class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(8192, 16), nn.Linear(16, 16), nn.Linear(16, 8192)
    def get_output_embeddings(self):
        return self.head
    def forward(self, input_ids, labels=None):
        logits = self.head(torch.tanh(self.body(self.embed(input_ids))))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}

ids = torch.randint(8192, (16, 64))
batch = {"input_ids": ids, "labels": ids}
objective = AdversarialObjective(LanguageModel(), AdversarialConfig.smart(modules=("embed",)), head="masked_lm")
os.environ["ALUM_LINEAR_CHUNK_BYTES"] = str(1 << 20)
objective.backward(batch)
assert objective.linear_head is not None
del os.environ["ALUM_LINEAR_CHUNK_BYTES"]
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (32 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
for turn in range(5):
    try:
        loss = objective.backward(batch)["loss"]
        break
    except RuntimeError as error:
        print(error)
        os.environ["ALUM_LINEAR_CHUNK_BYTES"] = re.search(r"ALUM_LINEAR_CHUNK_BYTES=(\\d+)", str(error))[1]
print("refused", turn, "loss", float(loss))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space is Linux's")
def test_following_the_advice_makes_the_step_fit():
    """32 MiB beyond what a small budget needs: 64 MiB of logits do not fit, and what the message says does."""
    environment = {key: value for key, value in os.environ.items() if key != "ALUM_LINEAR_CHUNK_BYTES"}
    run = subprocess.run([sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    first, *_, last = run.stdout.splitlines()
    assert "(B, S) = (16, 64) on cpu" in first
    assert "ALUM_LINEAR_CHUNK_BYTES=16777216 (chunk_bytes is 67108864 now)" in first
    assert "DefaultCPUAllocator: can't allocate memory" in first
    words = last.split()
    assert 1 <= int(words[1]) <= 3
    assert 0 < float(words[3]) < 20
