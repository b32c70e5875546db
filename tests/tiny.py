"""Tiny models and adapters; those of transformers with their tokenizers, written to a folder as real ones are."""

import random

import tokenizers
import torch
import transformers
from torch import nn

import omnilora as ol

WORDS = [f"w{i}" for i in range(44)]


def tokenizer():
    words = {w: i for i, w in enumerate(["[PAD]", "<s>", "</s>", "[UNK]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]",
                                                bos_token="<s>", eos_token="</s>")  # fmt: skip


def llama(home):
    """Two layers of width 32, 48 words."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                      vocab_size=48, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
                                      pad_token_id=0)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(home)
    tokenizer().save_pretrained(home)
    return home


def bert(home):
    """Four layers of width 32 without a head."""
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
                                     vocab_size=48, max_position_embeddings=32, pad_token_id=0)  # fmt: skip
    transformers.BertModel(config).save_pretrained(home)
    tokenizer().save_pretrained(home)
    return home


def text(length, seed):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(length))


def labelled(count, seed=0):
    """Texts of eight words in three classes, by the first word."""
    draw = random.Random(seed)
    texts = [[draw.randrange(len(WORDS)) for _ in range(8)] for _ in range(count)]
    return [{"text": " ".join(WORDS[i] for i in t), "label": "abc"[t[0] % 3]} for t in texts]


def pair(seed=0):
    """Two linear layers, 12 → 20 → 8."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8, bias=False)).eval()


def saved(folder, key="lora", seed=0, **hyper):
    """An adapter of :func:`pair` with random numbers, saved."""
    model = ol.adapt(pair(), ol.method(key, **hyper))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for slot in ol.slots(model):
            for _, t in slot.tensors():
                t.copy_(torch.randn(t.shape, generator=g))
    ol.save(model, folder)
    return folder
