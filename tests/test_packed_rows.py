"""Several documents in one row: what is compared is what would be compared of each document alone."""

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective, noise_init
from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.positions import continued_positions, visible_positions

ROWS = ((3, 4), (2, 5))
"""Lengths of the documents in each row."""
NOISE = AdversarialConfig.r3f(std=0.125, fused_head=False)


def position_ids() -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in ROWS])


def labels(input_ids: Tensor) -> Tensor:
    """Those of the input, without the first token of any document, which nothing predicts."""
    return torch.where(position_ids() == 0, -100, input_ids)


def block_diagonal(kind: str) -> Tensor:
    """(2, 1, S, S) causal attention within documents."""
    documents = (position_ids() == 0).cumsum(1)
    allowed = ((documents[:, :, None] == documents[:, None, :]) & torch.ones(7, 7).tril().bool()).unsqueeze(1)
    if kind == "bool":
        return allowed
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)


def packed_batch(kind: str) -> dict:
    """A batch whose documents are told apart by ``kind``: position ids alone, or a mask as well."""
    input_ids = tiny_models.tokens(2, 7)["input_ids"].clamp(min=3)
    batch = {"input_ids": input_ids, "labels": labels(input_ids), "position_ids": position_ids(), "use_cache": False}
    return batch if kind == "position_ids" else {**batch, "attention_mask": block_diagonal(kind)}


def model_for(kind: str) -> nn.Module:
    attention = "eager" if kind == "float" else "sdpa"
    return tiny_models.make("llama", "causal_lm", dtype=torch.float64, attn_implementation=attention)


def sum_over_documents(model: nn.Module, adv_embeds: Tensor, embeds: Tensor) -> tuple[Tensor, int]:
    """The divergence of each document alone, and the number of its positions that are followed by a token."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            sides = [
                model(inputs_embeds=side[row : row + 1, start : start + length]).logits[0, :-1].double()
                for side in (adv_embeds, embeds)
            ]
            log_p, log_q = (side.log_softmax(-1) for side in sides)
            total = total + ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()
            count, start = count + length - 1, start + length
    return total, count


@pytest.mark.parametrize("positions", ["labelled", "all"])
@pytest.mark.parametrize("kind", ["position_ids", "bool", "float"])
def test_a_packed_row_is_the_sum_of_its_documents(kind, positions):
    model, batch = model_for(kind), packed_batch(kind)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        adv_embeds = noise_init(embeds, std=NOISE.std, seed=torch.tensor([3]), backend="reference")
        expected, count = sum_over_documents(model, adv_embeds, embeds)
        inputs = {name: x for name, x in batch.items() if name not in ("input_ids", "labels")}
        sides = [model(inputs_embeds=side, **inputs).logits.double() for side in (adv_embeds, embeds)]
    head = Head("causal_lm")
    mask = head.row_mask(batch, positions)
    assert mask.sum() == count
    options = {"divergence": "symmetric_kl", "gradient": "full", "temperature": 1.0, "backend": None}
    found = head.divergence(*sides, mask, reduction="sum", **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # the model's norms compute in fp32
    for fused in (False, True):
        objective = AdversarialObjective(model, NOISE.replace(positions=positions, fused_head=fused))
        output = objective.forward(batch, seed=torch.tensor([3]))
        objective.remove_hooks()
        torch.testing.assert_close(output.divergence, expected / count, rtol=1e-5, atol=0)


def test_the_last_token_of_a_document_predicts_nothing():
    expected = [[True, True, False, True, True, True, False], [True, False, True, True, True, True, False]]
    ids = torch.zeros(2, 7, dtype=torch.long)
    assert continued_positions({"input_ids": ids, "position_ids": position_ids()}).tolist() == expected
    for kind in ("bool", "float"):
        mask = block_diagonal(kind)
        assert continued_positions({"input_ids": ids, "attention_mask": mask}).tolist() == expected
        assert visible_positions({"input_ids": ids, "attention_mask": mask}).all()
        by_layer = {"attention_mask": {"full_attention": mask, "sliding_attention": mask}}
        assert continued_positions(by_layer).tolist() == expected


def test_padding_after_the_last_document():
    """Whatever position ids padding has: 0, 1 or going on."""
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    for padding in ((0, 0), (1, 1), (3, 4)):
        batch = {"attention_mask": attention_mask, "position_ids": torch.tensor([[0, 1, 0, 1, 2, *padding]])}
        assert continued_positions(batch).tolist() == [[True, False, True, True, False, False, False]]
    seen = torch.ones(7, 7).tril().bool() & (attention_mask[0] == 1) & (attention_mask[0] == 1)[:, None]
    batch = {"attention_mask": seen[None, None]}
    assert visible_positions(batch).tolist() == [[True] * 5 + [False] * 2]
    assert continued_positions(batch).tolist() == [[True] * 4 + [False] * 3]


def test_what_separates_no_documents_changes_nothing():
    """Without position ids and with a mask of positions alone, every token counts, the last of a row included."""
    mask = torch.tensor([[1, 1, 1, 0]])
    assert continued_positions({}) is None
    assert visible_positions({"attention_mask": None}) is None
    for given in (mask, mask.bool(), mask.float()):
        batch = {"attention_mask": given}
        assert continued_positions(batch).tolist() == visible_positions(batch).tolist() == [[True, True, True, False]]
    # three rows of position ids, as of models that see images, say nothing about documents
    assert continued_positions({"attention_mask": mask, "position_ids": torch.zeros(3, 1, 4)}).tolist() == mask.tolist()


def test_one_mask_or_one_row_of_position_ids_for_all_samples():
    ids = torch.zeros(3, 4, dtype=torch.long)
    row = [True, False, True, False]
    batch = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1]])}
    assert continued_positions(batch).tolist() == [row] * 3
    documents = torch.tensor([0, 0, 1, 1])
    mask = (documents[:, None] == documents).expand(1, 1, 4, 4)
    assert continued_positions({"input_ids": ids, "attention_mask": mask}).tolist() == [row] * 3
    heads = torch.cat([mask & False, mask], 1)  # one head that sees nothing
    assert visible_positions({"input_ids": ids, "attention_mask": heads}).tolist() == [[True] * 4] * 3


def test_other_masks_are_refused():
    for shape in ((4,), (2, 3, 4), (2, 1, 3, 4)):
        with pytest.raises(ValueError, match=r"^attention_mask: expected shape \(B, S\) or \(B, heads, S, S\), got"):
            visible_positions({"attention_mask": torch.ones(shape)})
