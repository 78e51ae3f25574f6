"""The shipped models do what they are shipped for, measured on clips that no training saw."""

from __future__ import annotations

import numpy as np
import pytest

from spatialalign.files import read_json
from spatialalign.miniature import DETECTOR, FRAMES, SEGMENTER, WAN, WEIGHTS
from spatialalign.miniature.world import Clip, prompts
from spatialalign.tracking.load import load_tracker
from spatialalign.tracking.tracker import Tracker
from training.miniature import check


@pytest.fixture(scope="module")
def clips(miniature_weights: object) -> list[Clip]:
    return check.held_out_clips()


@pytest.fixture(scope="module")
def tracker(miniature_weights: object) -> Tracker:
    return load_tracker("miniature")


def test_the_autoencoder_keeps_the_picture_in_wan_s_latent_statistics(clips: list[Clip]) -> None:
    from diffusers import AutoencoderKLWan

    measured = check.autoencoder(clips)
    assert measured["psnr_db"] >= 28
    assert measured["largest_latent_mean"] < 0.3
    assert measured["largest_latent_std_error"] < 0.2
    shipped, wan = AutoencoderKLWan.from_pretrained(WAN / "vae").config, AutoencoderKLWan(base_dim=8).config
    assert (shipped.latents_mean, shipped.latents_std) == (wan.latents_mean, wan.latents_std)


def test_the_detector_finds_what_is_asked_for_and_names_it_rightly(clips: list[Clip], tracker: Tracker) -> None:
    measured = check.detector(clips, tracker)
    assert measured["recall"] >= 0.97
    assert measured["false_phrase"] <= 0.02


def test_the_segmenter_outlines_what_a_box_points_at(clips: list[Clip], tracker: Tracker) -> None:
    assert check.segmenter(clips, tracker)["mask_iou"] >= 0.85


def test_scores_from_our_tracker_equal_those_from_the_truth(clips: list[Clip], tracker: Tracker) -> None:
    measured = check.scores(clips, tracker)
    assert measured["score_difference_median"] <= 0.05
    assert measured["score_difference_over_0.1"] <= 0.2


def test_every_folder_loads_with_the_plain_library_classes(miniature_weights: object) -> None:
    from diffusers import WanPipeline
    from transformers import GroundingDinoForObjectDetection, SamModel

    pipeline = WanPipeline.from_pretrained(WAN)
    assert type(pipeline.transformer).__name__ == "WanTransformer3DModel"
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        prompts("eval")[0].text,
        height=64,
        width=64,
        num_frames=FRAMES,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="np",
    ).frames
    assert video.shape == (1, FRAMES, 64, 64, 3) and np.isfinite(video).all()
    GroundingDinoForObjectDetection.from_pretrained(DETECTOR)
    SamModel.from_pretrained(SEGMENTER)


def test_tokenizers_are_of_classes_that_transformers_4_knows_too(miniature_weights: object) -> None:
    found = {path.parent.name: read_json(path)["tokenizer_class"] for path in WEIGHTS.rglob("tokenizer_config.json")}
    assert found == {"tokenizer": "PreTrainedTokenizerFast", "detector": "BertTokenizer"}


def test_the_weights_are_small(miniature_weights: object) -> None:
    sizes = [path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()]
    assert max(sizes) <= 16_000_000
    assert sum(sizes) <= 40_000_000
