"""CLIP-IQA on tiny CLIPs: the formula of torchmetrics, by its own functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spatialalign.errors import ModelError
from spatialalign.metrics_clip_iqa import ClipIqa

WORDS = "<pad> <s> </s> Natural Synthetic Good Bad photo ."


def tiny_processor(side: int) -> Any:
    """A CLIP processor with the words of the prompts alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, CLIPProcessor, PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS.split())}, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=8,
        model_input_names=["input_ids", "attention_mask"],
    )
    return CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}), tokenizer
    )


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A random CLIP of transformers' class, 16 pixels, with its processor."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": len(WORDS.split()), "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for weight in (model.text_projection.weight, model.visual_projection.weight):
            weight.mul_(30)
    model.save_pretrained(folder)
    tiny_processor(16).save_pretrained(folder)
    return folder


def frames(height: int = 16) -> NDArray[np.uint8]:
    """Five random frames."""
    return np.random.default_rng(0).integers(0, 256, (5, height, height + 8, 3), dtype=np.uint8)


def on_meta(judge: ClipIqa) -> tuple[tuple[int, ...], str]:
    """Shape and device of its answer once its model was moved: on "meta" nothing that was left behind would do."""
    with torch.no_grad():
        answer = judge.model.to("meta")(frames(64))
    return tuple(answer.shape), answer.device.type


def test_a_clip_of_transformers(tmp_path: Path) -> None:
    compute = pytest.importorskip("torchmetrics.functional.multimodal.clip_iqa")._clip_iqa_compute
    from transformers import CLIPModel, CLIPProcessor

    folder = write_clip(tmp_path / "clip")
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    texts = ["Natural photo.", "Synthetic photo.", "Good photo.", "Bad photo."]
    with torch.no_grad():
        inputs = processor(text=texts, images=list(frames()), return_tensors="pt", padding=True)
        out = model(**inputs)
        shares = compute(out.image_embeds, out.text_embeds, ["natural", "quality"])
    expected = [float(shares[name].mean()) for name in ("natural", "quality")]
    judge = ClipIqa.from_pretrained(folder, batch=2)
    assert judge.score(frames()) == pytest.approx(expected, abs=1e-5)
    assert judge.name == "clip"
    assert on_meta(judge) == ((5, 2), "meta")
    assert expected[0] != pytest.approx(expected[1], abs=1e-3), "the two prompts are told apart"
    assert all(0.001 < value < 0.999 for value in expected), "the test is no matter of rounding to 0 or 1"


def test_the_papers_model_through_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torchmetrics.multimodal.clip_iqa")
    functional = pytest.importorskip("torchmetrics.functional.multimodal.clip_iqa")
    piq_clip = pytest.importorskip("piq.feature_extractors.clip")
    torch.manual_seed(0)
    # CLIP with a small ResNet in place of ResNet-50: the class that piq builds from its download.
    model = piq_clip.CLIP(8, 64, (1, 1, 1, 1), 2, None, 8, len(WORDS.split()), 16, 2, 1).float().eval()
    processor = tiny_processor(64)
    for place in (module, functional):
        monkeypatch.setattr(place, "_get_clip_iqa_model_and_processor", lambda name: (model, processor))
    judge = ClipIqa.from_pretrained("clip_iqa", batch=2)
    pictures = torch.from_numpy(frames(64)).permute(0, 3, 1, 2) / 255
    shares = functional.clip_image_quality_assessment(pictures, prompts=("natural", "quality"))
    expected = [float(shares[name].mean()) for name in ("natural", "quality")]
    assert judge.score(frames(64)) == pytest.approx(expected, abs=1e-5)
    assert judge.score(frames(64)) == pytest.approx(expected, abs=1e-5), "nothing is left of the clip before"
    assert on_meta(judge) == ((5, 2), "meta")


def test_what_is_no_clip_is_named(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    folder = write_clip(tmp_path / "vit")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=16)).save_pretrained(folder)
    with pytest.raises(ModelError, match="'vit' is no CLIP; expected a model such as openai/clip-vit-base-patch16"):
        ClipIqa.from_pretrained(folder)


def test_a_folder_that_lacks_something(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="lacks config.json"):
        ClipIqa.from_pretrained(folder)
