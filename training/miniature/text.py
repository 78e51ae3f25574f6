"""Stage 2: the text encoder (``UMT5EncoderModel``) and its word-level tokenizer.

A real text encoder has read books before a video model sees it. This one learns from the prompt grammar what each word
*does*: every token must tell its own word and role ("left" as the beginning or as the end), and the closing tokens must
tell the whole relationship. Cross-attention has no positions of its own, so without that "on the left … to the right"
and "on the right … to the left" would be the same bag of words.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from spatialalign.dsr import DSR, Relation
from spatialalign.miniature.sprites import ANIMALS, OBJECTS, SCENES
from spatialalign.miniature.world import TYPES, VERBS
from training.miniature.loop import Loop

SPECIAL = ("<pad>", "</s>", "<unk>")


def all_dsrs() -> list[DSR]:
    """Every sentence of the miniature's grammar: animal × object × scene × type × verb."""
    return [
        DSR(animal, thing, Relation(code[0]), Relation(code[1]), scene=scene, motion=verb)
        for animal in ANIMALS
        for thing in OBJECTS
        for scene in SCENES
        for code in TYPES
        for verb in VERBS[animal]
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark, lower-cased, ``</s>`` behind."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words = {word for dsr in all_dsrs() for word, _ in splitter.pre_tokenize_str(dsr.prompt().lower())}
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *sorted(words)))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = splitter
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _roles(dsr: DSR, words: list[str]) -> list[str]:
    """The role of every token: scene words, subject, object, verb, the relation at each end, or nothing special."""
    out, clause = [], "scene"
    for word in words:
        if word == dsr.subject:
            clause = "initial" if clause == "scene" else "final"
            out.append(f"subject-{clause}")
        elif word == dsr.object:
            out.append(f"object-{clause}")
        elif word in ("left", "right", "top"):
            out.append(f"{clause}-{word}")
        elif word == dsr.motion:
            out.append("verb")
        else:
            out.append(clause)
    return out


def build(folder: Path, work: Path, seed: int = 1, steps: int = 300) -> None:
    """Train and write ``folder/text_encoder`` and ``folder/tokenizer``."""
    torch.manual_seed(seed)
    words = tokenizer()
    config = UMT5Config(
        vocab_size=len(words), d_model=4096, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    encoder = UMT5EncoderModel(config)
    # Word vectors start small, so that what the layers add about the context is not drowned by the word's identity.
    nn.init.normal_(encoder.shared.weight, std=0.3)
    # And attention starts with habits of distance: from the usual near-zero start it takes thousands of steps to notice
    # that "left" stands behind "on the" in one clause and behind "to the" in the other. Buckets: k before, 16 + k
    # after.
    for layer, offsets in zip(encoder.encoder.block, ((1, 2, 3, 17), (None, 4, 6, 18)), strict=True):
        bias = layer.layer[0].SelfAttention.relative_attention_bias.weight
        for head, bucket in enumerate(offsets):
            if bucket is not None:
                bias.data[bucket, head] += 5.0

    dsrs = all_dsrs()
    batch = words([d.prompt() for d in dsrs], padding=True, return_tensors="pt")
    tokens, real = batch["input_ids"], batch["attention_mask"].bool()
    names = [_roles(d, words.convert_ids_to_tokens(row[keep])) for d, row, keep in zip(dsrs, tokens, real, strict=True)]
    role_ids = {name: number for number, name in enumerate(sorted({n for row in names for n in row}))}
    roles = torch.full_like(tokens, -100)
    for row, keep, line in zip(roles, real, names, strict=True):
        row[keep] = torch.tensor([role_ids[n] for n in line])
    facts = torch.tensor(
        [
            [TYPES.index(d.type_code), list(ANIMALS).index(d.subject), list(OBJECTS).index(d.object),
             list(SCENES).index(d.scene)]
            for d in dsrs
        ]
    )  # fmt: skip
    sizes = (len(TYPES), len(ANIMALS), len(OBJECTS), len(SCENES))
    heads = nn.ModuleDict({"word": nn.Linear(4096, len(words)), "role": nn.Linear(4096, len(role_ids))})
    heads.update({f"fact{i}": nn.Linear(4096, size) for i, size in enumerate(sizes)})
    model = nn.ModuleDict({"encoder": encoder, "heads": heads})
    entropy = nn.CrossEntropyLoss()

    def step(number: int) -> dict[str, Tensor]:
        pick = torch.from_numpy(np.random.default_rng((seed, number)).integers(0, len(dsrs), 32))
        ids, keep = tokens[pick], real[pick]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = encoder(ids, attention_mask=keep).last_hidden_state
            word = entropy(heads["word"](hidden[keep]).float(), ids[keep])
            role = entropy(heads["role"](hidden[keep]).float(), roles[pick][keep])
            closing = hidden[torch.arange(len(pick)), keep.sum(1) - 1]
            fact = sum(entropy(heads[f"fact{i}"](closing).float(), facts[pick, i]) for i in range(len(sizes)))
        return {"loss": word + role + fact, "word": word, "role": role, "fact": torch.as_tensor(fact)}

    # A projection of 4096 numbers moves by 4096 times the rate in one step of Adam: small rates are large here.
    Loop("text", work, model, steps, lr=3e-5, warmup=20).run(step)
    encoder.eval().half().save_pretrained(folder / "text_encoder")
    words.save_pretrained(folder / "tokenizer")
