"""Where the models are looked for, what is loaded, and what is said when they are not there. Nothing is downloaded."""

from __future__ import annotations

import gc
import re
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Module = Callable[[str], ModuleType]
Run = Callable[..., Any]
TINY, LARGE = "IDEA-Research/grounding-dino-tiny", "facebook/sam2.1-hiera-large"
UNPINNED = "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det"


@pytest.fixture
def node(module: Module, fake_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loader on a machine without a Hugging Face cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return module("grounded_sam").LoadGroundedSam


@pytest.fixture
def errors(module: Module) -> ModuleType:
    return module("spatialalign.errors")


@pytest.fixture
def shipped(module: Module, miniature_weights: Path) -> Any:
    return module("spatialalign.miniature")


def options(node: Any, name: str) -> list[str]:
    listed: list[str] = node.INPUT_TYPES()["required"][name][1]["options"]
    return listed


def test_the_miniature_is_the_default(node: Any, run: Run, shipped: Any) -> None:
    loaded = run(node)[0]
    kinds = [type(part).__name__ for part in (loaded.tracker.detector, loaded.tracker.segmenter)]
    assert kinds == ["GroundingDinoDetector", "SamFrameSegmenter"] and loaded.tracker.rule == "robust"
    modules = [patcher.model[0] for patcher in loaded.patchers]
    assert modules == [loaded.tracker.detector.model, loaded.tracker.segmenter.model]
    assert {parameter.dtype for one in modules for parameter in one.parameters()} == {torch.float32}
    with pytest.raises(AttributeError):
        loaded.patchers = ()


def test_without_a_segmenter_there_is_one_model(node: Any, run: Run, shipped: Any) -> None:
    loaded = run(node, segmenter="none")[0]
    assert loaded.tracker.segmenter is None and len(loaded.patchers) == 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision_is_that_of_all_weights(node: Any, run: Run, shipped: Any, precision: str) -> None:
    loaded = run(node, precision=precision)[0]
    found = {parameter.dtype for patcher in loaded.patchers for parameter in patcher.model.parameters()}
    assert found == {getattr(torch, precision)}


def test_the_papers_rule_takes_the_papers_matching(node: Any, run: Run, shipped: Any, module: Module) -> None:
    tracker = run(node, rule="paper")[0].tracker
    assert tracker.rule == "paper"
    assert tracker.detector.matching == module("spatialalign.tracking.grounding_dino").OFFICIAL


def test_nothing_outlives_the_value(node: Any, run: Run, shipped: Any) -> None:
    loaded = run(node)[0]
    models = [weakref.ref(patcher.model[0]) for patcher in loaded.patchers]
    del loaded
    gc.collect()
    assert [model() for model in models] == [None, None]


def test_the_lists_show_folders_files_and_hub_models_once(node: Any, fake_host: Any) -> None:
    for place in ("grounding-dino/my-dino", "grounding-dino/grounding-dino-tiny", "sam2/facebook/sam2.1-hiera-large"):
        (fake_host.models / place).mkdir(parents=True)
        (fake_host.models / place / "config.json").write_text("{}")
    (fake_host.models / "grounding-dino/bert-base-uncased").mkdir()
    (fake_host.models / "grounding-dino/bert-base-uncased/config.json").write_text("{}")
    (fake_host.models / "sams").mkdir()
    (fake_host.models / "sams/sam_vit_b_01ec64.pth").touch()
    assert options(node, "detector") == ["miniature", UNPINNED, TINY, "my-dino"]
    assert options(node, "segmenter") == [
        "miniature", "none", "facebook/sam2.1-hiera-base-plus", LARGE, "facebook/sam-vit-base", "sam_vit_b_01ec64.pth"
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["grounding-dino-tiny", TINY])
def test_a_hub_model_in_the_models_folder_is_found_first(
    node: Any, run: Run, shipped: Any, fake_host: Any, place: str
) -> None:
    shutil.copytree(shipped.DETECTOR, fake_host.models / "grounding-dino" / place)
    shutil.copytree(shipped.SEGMENTER, fake_host.models / "sams" / "my-sam")
    loaded = run(node, detector=TINY, segmenter="my-sam", download=True)[0]
    assert type(loaded.tracker.segmenter).__name__ == "SamFrameSegmenter"


def test_a_missing_hub_model_is_named_with_its_folder_and_link(node: Any, run: Run, errors: Any, shipped: Any) -> None:
    with pytest.raises(errors.ModelError) as found:
        run(node, detector=TINY)
    message = str(found.value)
    assert message.startswith(f"{TINY} is not on this machine; put its files (https://huggingface.co/{TINY}/tree/")
    assert "690 MB, Apache-2.0) into models/grounding-dino/grounding-dino-tiny, or switch download on" in message
    with pytest.raises(
        errors.ModelError, match=f"{LARGE} is not on this machine; .* into models/sam2/sam2.1-hiera-lar"
    ):
        run(node, segmenter=LARGE)


@pytest.mark.parametrize("download", [False, True])
def test_an_unpinned_model_is_never_downloaded(
    node: Any, run: Run, errors: Any, shipped: Any, monkeypatch: pytest.MonkeyPatch, download: bool
) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.append(how) or 1 / 0)
    with pytest.raises(errors.ModelError, match=f"{UNPINNED} is not on this machine; put its files") as found:
        run(node, detector=UNPINNED, download=download)
    assert [how["local_files_only"] for how in asked] == [True] and "switch download on" not in str(found.value)
    # What someone else has put into the cache is good enough.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: str(shipped.DETECTOR))
    assert run(node, detector=UNPINNED, download=download)[0].patchers


def test_a_download_is_pinned_and_asked_for(
    node: Any, run: Run, errors: Any, shipped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[str, dict[str, Any]]] = []

    def fetched(name: str, **how: Any) -> str:
        asked.append((name, how))
        return str(shipped.DETECTOR if "dino" in name else shipped.SEGMENTER)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    for download in (False, True):
        run(node, detector=TINY, segmenter="facebook/sam-vit-base", download=download)
        for name, how in asked:
            assert re.fullmatch("[0-9a-f]{40}", how["revision"]) and how["local_files_only"] is not download
            # Neither pickles nor a second copy of the weights are fetched.
            assert not any(fnmatch(file, how["allow_patterns"]) for file in ("pytorch_model.bin", "sam2.1.pt", name))
            assert all(fnmatch(file.name, how["allow_patterns"]) for file in shipped.DETECTOR.iterdir())
        assert [name for name, _ in asked] == [TINY, "facebook/sam-vit-base"]
        asked.clear()


def fnmatch(name: str, patterns: list[str]) -> bool:
    from fnmatch import fnmatch

    return any(fnmatch(name, pattern) for pattern in patterns)


def test_offline_is_offline(node: Any, run: Run, errors: Any) -> None:
    # The client refuses by itself (HF_HUB_OFFLINE); the message says what can be done by hand.
    with pytest.raises(errors.ModelError, match=f"{TINY} could not be downloaded .*put its files"):
        run(node, detector=TINY, download=True)


def test_every_pin_is_a_commit_and_every_folder_is_listed(module: Module) -> None:
    loader = module("grounded_sam")
    load = module("spatialalign.tracking.load")
    for model in loader.HUB.values():
        assert model.revision is None or re.fullmatch("[0-9a-f]{40}", model.revision)
        assert model.folder in module("host").MODEL_FOLDERS and model.megabytes > 100
    # What the command line calls recommended and the paper's can be chosen here, too.
    assert {*load.DEFAULT.split("+"), *load.PAPER.split("+")} <= set(loader.HUB)


def test_files_that_cannot_be_read(node: Any, run: Run, errors: Any, shipped: Any, fake_host: Any) -> None:
    (fake_host.models / "sam2").mkdir(parents=True)
    (fake_host.models / "sam2/sam2.1_hiera_large.pt").write_bytes(b"zip")
    with pytest.raises(errors.ModelError, match=r"sam2\.1_hiera_large\.pt: a single file of this kind cannot be read"):
        run(node, segmenter="sam2.1_hiera_large.pt")
    (fake_host.models / "sams").mkdir()
    torch.save({"weight": torch.zeros(1)}, fake_host.models / "sams/sam_vit_b.pth")
    with pytest.raises(errors.ModelError, match=r"sam_vit_b\.pth: not a segment-anything checkpoint"):
        run(node, segmenter="sam_vit_b.pth")
    with pytest.raises(errors.ConfigError, match="bfloat16: original .pth models run in float32 only"):
        run(node, segmenter="sam_vit_b.pth", precision="bfloat16")


def test_a_truncated_model_is_named(node: Any, run: Run, errors: Any, shipped: Any, fake_host: Any) -> None:
    folder = fake_host.models / "grounding-dino" / "cut"
    shutil.copytree(shipped.DETECTOR, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(errors.ModelError, match="cut: the model cannot be loaded"):
        run(node, detector="cut")
    weights.unlink()
    with pytest.raises(errors.ModelError, match=r"cut: the model folder lacks model\.safetensors"):
        run(node, detector="cut")


@pytest.mark.parametrize("name", ["../sam2", "gone", "/etc/passwd"])
def test_names_outside_the_folder_or_gone(node: Any, run: Run, errors: Any, name: str) -> None:
    with pytest.raises(errors.ModelError, match=re.escape(name)):
        run(node, detector=name)


def test_original_checkpoints_need_a_library_and_a_text_encoder(
    node: Any, run: Run, errors: Any, fake_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake_host.models / "grounding-dino").mkdir(parents=True)
    (fake_host.models / "grounding-dino/groundingdino_swint_ogc.pth").touch()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "groundingdino.models", None)
        with pytest.raises(errors.ModelError, match="groundingdino-py cannot be imported .*or take the model's transf"):
            run(node, detector="groundingdino_swint_ogc.pth")
    pytest.importorskip("groundingdino.models")
    with pytest.raises(
        errors.ModelError, match="google-bert/bert-base-uncased is not on this machine; .*models/ground"
    ):
        run(node, detector="groundingdino_swint_ogc.pth")


def test_an_original_sam_is_used_as_it_is(node: Any, run: Run, module: Module, shipped: Any, fake_host: Any) -> None:
    modeling = pytest.importorskip("segment_anything").modeling
    torch.manual_seed(0)
    sam = modeling.Sam(
        modeling.ImageEncoderViT(
            depth=2, embed_dim=32, img_size=64, num_heads=2, patch_size=8, use_rel_pos=True, global_attn_indexes=(1,),
            window_size=4, out_chans=32,
        ),
        modeling.PromptEncoder(32, (8, 8), (64, 64), mask_in_chans=8),
        modeling.MaskDecoder(
            transformer_dim=32, transformer=modeling.TwoWayTransformer(2, 32, num_heads=8, mlp_dim=48),
            iou_head_hidden_dim=24,
        ),
    )  # fmt: skip
    (fake_host.models / "sams").mkdir(parents=True)
    torch.save(sam.state_dict(), fake_host.models / "sams/sam_vit_b.pth")
    loaded = run(node, segmenter="sam_vit_b.pth")[0]
    assert type(loaded.tracker.segmenter).__name__ == "OriginalSam"
    clip = module("spatialalign.miniature.world").render(
        module("spatialalign.miniature.world").prompts("eval")[0].dsr, 1
    )
    tracks = loaded.tracker.track(clip.frames, clip.dsr.subject, clip.dsr.object, 8)
    assert tracks.frames == 13 and tracks.masks is not None
