"""Cases of transformers and peft: a BERT that classifies, and LoRA adapters on a GPT-2."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from support.published import Case, loaders

_WORDS, _LENGTH, _TOPICS = 200, 24, 4
_PEOPLE = 3


def _documents(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Words (count, 24) and topics (count,): a quarter of a document's words are its topic's own."""
    stream = torch.Generator().manual_seed(seed)
    topics = torch.randint(_TOPICS, (count,), generator=stream)
    own = torch.randint(30, (count, _LENGTH), generator=stream) + 30 * topics[:, None]
    common = torch.randint(_WORDS, (count, _LENGTH), generator=stream)
    return torch.where(torch.rand(count, _LENGTH, generator=stream) < 0.25, own, common), topics


class _Module(pl.LightningModule):
    """A Hugging Face model, which computes its loss itself."""

    def __init__(self, model: Any, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[-1]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, self.lr)


def classifier(data: Any) -> Case:
    """BertForSequenceClassification, made small, from random weights."""
    from transformers import BertConfig, BertForSequenceClassification  # type: ignore[import-not-found]

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

    def make() -> _Module:
        config = BertConfig(vocab_size=_WORDS, max_position_embeddings=_LENGTH, num_labels=_TOPICS, **size)
        return _Module(BertForSequenceClassification(config), lr=2e-3)

    words, topics = _documents(600, seed=99)

    def measure(module: _Module) -> float:
        logits = module.model(input_ids=words).logits
        return float(multiclass_accuracy(logits, topics, _TOPICS, average="micro"))

    parts = [_documents(100, seed) for seed in range(_PEOPLE)]
    return Case(make, loaders(parts, 10), measure, "accuracy", epochs=12, strategy={"initial": "own"})


def _sentences(count: int, dialect: int, seed: int) -> Tensor:
    """Tokens (count, 24) of a Markov chain over 40 tokens. Dialects differ in a quarter of the tokens."""
    chances = [3 * torch.randn(40, 40, generator=torch.Generator().manual_seed(d)) for d in (0, dialect)]
    rules = torch.cat([chances[1][:10], chances[0][10:]]).softmax(1)
    stream = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(40, (count,), generator=stream)]
    for _ in range(_LENGTH - 1):
        tokens.append(torch.multinomial(rules[tokens[-1]], 1, generator=stream)[:, 0])
    return torch.stack(tokens, 1)


def adapters(data: Any) -> Case:
    """LoRA on a GPT-2 that was trained on a public dialect, for another dialect."""
    from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found]
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_positions": _LENGTH, "n_embd": 48, "n_layer": 2, "n_head": 2}
    config = GPT2Config(vocab_size=40, bos_token_id=0, eos_token_id=0, **size)
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, lora_dropout=0.0)
    torch.manual_seed(0)
    public = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(public.parameters(), 3e-3)
    for seed in range(300):
        tokens = _sentences(32, dialect=0, seed=seed)
        optimizer.zero_grad()
        public(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    def make() -> _Module:
        model = GPT2LMHeadModel(config)
        model.load_state_dict(public.state_dict())
        return _Module(get_peft_model(model, lora), lr=1e-2)

    unseen = _sentences(300, dialect=5, seed=999)

    def measure(module: _Module) -> float:
        return float(module.model(input_ids=unseen, labels=unseen).loss)

    parts = [[_sentences(40, dialect=5, seed=1000 + number)] for number in range(_PEOPLE)]
    settings = {"share": "*lora_*", "initial": "own"}
    return Case(make, loaders(parts, 10), measure, "loss", epochs=10, strategy=settings)
