"""The router that reads the text: BERT, without transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from bopo_ray.models.tokens import tokenizer
from bopo_ray.rllib.router_module import ROUTER_DEFAULTS
from bopo_ray.rllib.text_router import TextRouter


@pytest.mark.parametrize(("width", "layers"), [(64, 2), (16, 1)])
def test_it_begins_as_bert_does_and_reads_as_bert_does(width: int, layers: int) -> None:
    torch.manual_seed(3)
    router = TextRouter(ROUTER_DEFAULTS | {"width": width, "layers": layers}, 2)
    after = torch.rand(1)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=tokenizer().get_vocab_size(), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * width, max_position_embeddings=96, pad_token_id=router.pad,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False).eval()
    nn.Linear(2 * width, 2)  # the head
    assert torch.equal(torch.rand(1), after), "as many draws"
    theirs, ours = bert.state_dict(), router.encoder.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)

    ids_BT = torch.randint(5, 500, (6, 40), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((1, 3, 40, 17, 40, 8)):
        ids_BT[row, length:] = router.pad
    mask_BT = ids_BT != router.pad
    for rows in (slice(0, 6), slice(2, 3)):
        ids, mask = ids_BT[rows], mask_BT[rows]
        with torch.no_grad():
            theirs_BTD = bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            ours_BTD = router.encode(ids, None if mask.all() else mask)
        assert torch.allclose(ours_BTD[mask], theirs_BTD[mask], atol=1e-5)
