"""Grounding DINO on tiny random weights: both transformers classes and the original package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)

from spatialalign.errors import ConfigError, ModelError
from spatialalign.tracking._compat import bert_with_mask_helpers, get_extended_attention_mask
from spatialalign.tracking.detect import Detections, caption, token_spans
from spatialalign.tracking.grounding_dino import OFFICIAL, GroundingDinoDetector, Matching, detect_frames
from spatialalign.tracking.original import OriginalGroundingDino, build_grounding_dino
from spatialalign.tracking.preprocess import Preprocess

SIZE = {"shortest_edge": 64, "longest_edge": 96}


def tiny_config(kind: type) -> Any:
    return kind(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=1030, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=12, num_feature_levels=3,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["grounding-dino", "mm-grounding-dino"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "grounding-dino":
        made: Any = GroundingDinoForObjectDetection(tiny_config(GroundingDinoConfig))
    else:
        made = MMGroundingDinoForObjectDetection(tiny_config(MMGroundingDinoConfig))
    return made.eval()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def test_official_labels_equal_the_librarys_post_processing(model: Any, tokenizer: Any, clip: np.ndarray) -> None:
    pytest.importorskip("torchvision")
    from transformers import GroundingDinoImageProcessor, GroundingDinoProcessor

    processor = GroundingDinoProcessor(GroundingDinoImageProcessor(size=SIZE), tokenizer)
    pixels = Preprocess(SIZE)(clip, torch.device("cpu"), torch.float32)
    inputs = processor(images=list(clip), text=["polar bear. box."] * len(clip), return_tensors="pt")
    # One grey level is 1 / 255 / 0.225 after normalisation.
    torch.testing.assert_close(pixels, inputs["pixel_values"], atol=1.1 / 255 / 0.224, rtol=0)
    with torch.inference_mode():
        output = model(**(dict(inputs) | {"pixel_values": pixels}))
    # Random weights know no threshold, so one in the middle of what they say is taken.
    top = float(output.logits.sigmoid().amax(-1).quantile(0.6)) + 1e-6
    words = float(output.logits.sigmoid()[..., 1:5].median()) + 1e-6
    expected = processor.post_process_grounded_object_detection(
        output, inputs["input_ids"], threshold=top, text_threshold=words, target_sizes=[(48, 64)] * len(clip)
    )
    matching = Matching("official", threshold=top, text_threshold=words)
    detector = GroundingDinoDetector(model, tokenizer, Preprocess(SIZE), matching, batch=len(clip))
    found = detector.detect(clip, ["a polar bear", "Box"])
    assert len(found) == len(clip) and sum(len(frame) for frame in found) > 5
    for ours, theirs in zip(found, expected, strict=True):
        order = np.argsort(-theirs["scores"].numpy(), kind="stable")
        np.testing.assert_allclose(ours.scores, theirs["scores"].numpy()[order], rtol=1e-6)
        np.testing.assert_allclose(ours.boxes, theirs["boxes"].numpy()[order], atol=1e-4)
        assert list(ours.texts) == [theirs["text_labels"][i] for i in order]


def test_spans_follow_the_token_scores(tokenizer: Any, clip: np.ndarray) -> None:
    # Logits by hand for "polar bear. cat." = [CLS] polar bear . cat . [SEP]: query 0 has half of the two-word phrase
    # (the string rule would read "bear"), query 1 has the cat, query 2 leaks into both (0.7 > 0.6: the cat's).
    logits = torch.full((1, 4, 16), -10.0)
    for query, token, p in [(0, 2, 0.9), (1, 4, 0.8), (2, 1, 0.6), (2, 4, 0.7), (3, 6, 0.99)]:
        logits[0, query, token] = torch.logit(torch.tensor(p))
    boxes = torch.tensor([[[0.2, 0.5, 0.2, 0.4], [0.7, 0.5, 0.2, 0.2], [0.5, 0.2, 0.2, 0.2], [0.5, 0.5, 1, 1]]])

    def forward(pixels: torch.Tensor, text: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        assert text == "polar bear. cat."
        return logits, boxes, tokenizer(text)["input_ids"]

    def run(matching: Matching) -> Detections:
        place = torch.device("cpu"), torch.float32
        phrases = ["polar bear", "the cat"]
        return detect_frames(forward, tokenizer, Preprocess(SIZE), matching, clip[:1], phrases, 8, place)[0]

    found = run(Matching())
    assert found.texts == ("polar bear", "cat", "cat")
    np.testing.assert_allclose(found.scores, [0.9, 0.8, 0.7], atol=1e-6)
    # Centre 0.2 of 64, width 0.2 of 64; centre 0.5 of 48, height 0.4 of 48.
    np.testing.assert_allclose(found.boxes[0], [6.4, 14.4, 19.2, 33.6], atol=1e-4)
    official = run(OFFICIAL)
    assert sorted(official.texts) == ["[SEP]", "bear", "cat", "polar cat"]
    assert official.phrases[official.texts.index("cat")] == 1 and (official.phrases == -1).sum() == 3


def test_batches_do_not_change_the_boxes(model: Any, tokenizer: Any, clip: np.ndarray) -> None:
    matching = Matching(threshold=0.0)
    one = GroundingDinoDetector(model, tokenizer, Preprocess(SIZE), matching, batch=1).detect(clip, ["cat", "box"])
    four = GroundingDinoDetector(model, tokenizer, Preprocess(SIZE), matching, batch=4).detect(clip, ["cat", "box"])
    for a, b in zip(one, four, strict=True):
        assert len(a) > 0 and a.texts == b.texts
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-2)
        assert (a.boxes >= 0).all() and (a.boxes[:, 2] <= 64).all() and (a.boxes[:, 3] <= 48).all()


def test_progress_after_every_batch_can_stop_the_rest(model: Any, tokenizer: Any, clip: np.ndarray) -> None:
    calls: list[tuple[int, int]] = []
    detector = GroundingDinoDetector(model, tokenizer, Preprocess(SIZE), Matching(threshold=0.0), batch=2)
    assert len(detector.detect(clip, ["cat", "box"], lambda *call: calls.append(call))) == 5
    assert calls == [(2, 5), (4, 5), (5, 5)]

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        raise KeyboardInterrupt

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        detector.detect(clip, ["cat", "box"], stop)
    assert calls == [(2, 5)]


def test_folder_round_trip_and_missing_parts(
    model: Any, tokenizer: Any, clip: np.ndarray, write_processor: Callable[..., None], tmp_path: Path
) -> None:
    folder = tmp_path / "detector"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_processor(folder, "GroundingDino", SIZE)
    loaded = GroundingDinoDetector.from_pretrained(folder, matching=Matching(threshold=0.0))
    assert type(loaded.model) is type(model)
    direct = GroundingDinoDetector(model, tokenizer, Preprocess(SIZE), Matching(threshold=0.0))
    np.testing.assert_array_equal(
        loaded.detect(clip[:1], ["cat", "box"])[0].boxes, direct.detect(clip[:1], ["cat", "box"])[0].boxes
    )
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"detector: the model folder lacks tokenizer\.json or vocab\.txt"):
        GroundingDinoDetector.from_pretrained(folder)


def test_nan_scores_are_an_error_and_not_an_empty_picture(tokenizer: Any, clip: np.ndarray) -> None:
    def forward(pixels: torch.Tensor, text: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        return torch.full((len(pixels), 3, 16), torch.nan), torch.rand(len(pixels), 3, 4), [0] * 16

    place = torch.device("cpu"), torch.float32
    with pytest.raises(ModelError, match="scores are NaN"):
        detect_frames(forward, tokenizer, Preprocess(SIZE), Matching(), clip, ["cat", "box"], 8, place)


def test_wrong_settings_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="'spans' or 'official', found 'strings'"):
        Matching("strings")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"thresholds must lie in \[0, 1\]"):
        Matching(threshold=40)


def test_spans_from_a_real_tokenizer(tokenizer: Any) -> None:
    # "hamster" is two word pieces; "sofa bed" and "sofa" share a word but no token.
    text, spans = caption(["hamster", "sofa bed", "sofa"])
    encoded = tokenizer(text, return_offsets_mapping=True)
    tokens = token_spans(encoded["offset_mapping"], spans)
    read = [tokenizer.convert_ids_to_tokens([encoded["input_ids"][i] for i in group]) for group in tokens]
    assert read == [["ham", "##ster"], ["sofa", "bed"], ["sofa"]]
    assert len({i for group in tokens for i in group}) == 5


# The original package

TINY = {
    "enc_layers": 1, "dec_layers": 1, "hidden_dim": 256, "dim_feedforward": 32, "nheads": 2, "num_queries": 10,
    "num_feature_levels": 3, "return_interm_indices": [1, 2, 3],
}  # fmt: skip


@pytest.fixture(scope="module")
def bert_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=1030, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_original_grounding_dino_from_pth(bert_folder: Path, clip: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("groundingdino.models")
    import sys

    torch.manual_seed(0)
    made = build_grounding_dino("GroundingDINO_SwinT_OGC", bert_folder, TINY).eval()
    file = tmp_path / "groundingdino_swint.pth"
    torch.save({"model": {f"module.{key}": value for key, value in made.state_dict().items()}}, file)
    loaded = OriginalGroundingDino.from_pth(
        file, bert_folder, matching=Matching(threshold=0.0), config=TINY, preprocess=Preprocess(SIZE)
    )
    calls: list[tuple[int, int]] = []
    found = loaded.detect(clip[:2], ["cat", "polar bear"], lambda *call: calls.append(call))
    assert calls == [(2, 2)]
    with torch.inference_mode():
        pixels = Preprocess(SIZE)(clip[:1], torch.device("cpu"), torch.float32)
        output = made(pixels, captions=["cat. polar bear."])
    scores = output["pred_logits"].sigmoid()[0]
    # [CLS] cat . polar bear . [SEP]
    expected = torch.stack([scores[:, 1], scores[:, 3:5].amax(1)], 1).amax(1)
    assert len(found) == 2 and found[0].scores[0] == pytest.approx(float(expected.max()), abs=1e-5)
    assert "groundingdino.util.inference" not in sys.modules

    with pytest.raises(ModelError, match=r"weights of GroundingDINO_SwinT_OGC are missing \(first: transformer"):
        OriginalGroundingDino.from_pth(file, bert_folder, config=TINY | {"enc_layers": 2})
    with pytest.raises(ModelError, match=r"swint\.pth: the model cannot be loaded \(RuntimeError"):
        OriginalGroundingDino.from_pth(file, bert_folder, config=TINY | {"num_feature_levels": 4})
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"other\.pth: not a Grounding DINO checkpoint"):
        OriginalGroundingDino.from_pth(tmp_path / "other.pth", bert_folder)


def test_bert_helpers_are_there_only_while_building(bert_folder: Path) -> None:
    bert = BertModel.from_pretrained(bert_folder)
    names = ("get_extended_attention_mask", "invert_attention_mask", "get_head_mask")
    before = {name: hasattr(BertModel, name) for name in names}
    with bert_with_mask_helpers() as added:
        assert sorted(added) == sorted(name for name in names if not before[name])
        mask = bert.get_extended_attention_mask(torch.tensor([[1, 1, 0]]), (1, 3))
        assert bert.get_head_mask(None, 3) == [None] * 3
    assert {name: hasattr(BertModel, name) for name in names} == before
    assert mask.shape == (1, 1, 1, 3)
    assert mask.flatten().tolist() == [0.0, 0.0, torch.finfo(torch.float32).min]


def test_extended_mask_hides_what_it_should(bert_folder: Path) -> None:
    # Two blocks that must not see each other, as Grounding DINO masks its phrases: changing a word of the second block
    # changes nothing in the first.
    bert = BertModel.from_pretrained(bert_folder).eval()
    blocks = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]])
    bias = get_extended_attention_mask(bert, blocks)
    assert bias.shape == (1, 1, 4, 4)
    with torch.inference_mode():
        outputs = [
            bert.encoder(bert.embeddings(torch.tensor([ids])), attention_mask=bias).last_hidden_state
            for ids in ([1, 2, 3, 4], [1, 2, 3, 9])
        ]
    torch.testing.assert_close(outputs[0][:, :2], outputs[1][:, :2])
    assert not torch.equal(outputs[0][:, 2], outputs[1][:, 2])
