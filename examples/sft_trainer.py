"""TRL's SFTTrainer with an adversary, on a small Llama: python -m examples.sft_trainer --steps 20."""

import argparse
import tempfile

import datasets
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from alum_kernels import AdversarialConfig
from alum_kernels.integrations.transformers import adversarial_trainer
from alum_kernels.training.models import bundled_model
from examples.corpora import documentation_paragraphs


def small_llama(vocabulary: int) -> nn.Module:
    """Two layers, from scratch, the same at every call."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **shape))


def main(arguments: list[str] | None = None) -> tuple[nn.Module, list[dict[str, float]]]:
    """The trained model, and what the Trainer logged at each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: %(default)s)")
    steps = parser.parse_args(arguments).steps

    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    model = small_llama(len(tokenizer))
    # embeddings from scratch have a deviation of 0.02; fp32, since a small divergence drowns in bf16
    config = AdversarialConfig.alum_finetuning(normalize="linf", std=5e-3, epsilon=5e-3, step_size=5e-3)
    options = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_length": 64, "bf16": False}
    options |= {"max_steps": steps, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = adversarial_trainer(SFTTrainer)(
            model=model,
            args=SFTConfig(folder, eos_token="[SEP]", **options),
            train_dataset=datasets.Dataset.from_dict({"text": documentation_paragraphs()[:256]}),
            processing_class=tokenizer,
            adversarial=config,
        )
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in history:
        gain, accuracy = entry["adv_ascent_gain"], entry["mean_token_accuracy"]
        print(f"loss {entry['loss']:.3f}, ascent gain {gain:.2f}, token accuracy {accuracy:.3f}")
    return model, history


if __name__ == "__main__":
    main()
