"""Faults of annotation that must not end a job or pass silently: missing captions, early failure, refused pictures, other processes."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from annotate_stub import StubGenerator, caption_config, rows_of, write_catalog
from chat_server import ChatServer
from PIL import Image
from tiny_backbones import tiny_bert, tiny_llava
from transformers import Qwen2VLImageProcessorPil

from mmsid.annotate.caption import run
from mmsid.annotate.generator import GenerationFailure
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.artifacts import read_manifest
from mmsid.backbone.devices import torch_device
from mmsid.errors import AnnotationError, ConfigError
from mmsid.tokenizer.backbones import BackboneSettings
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import ItemTokenizer, TokenizerSettings
from mmsid.tokenizer.reconstruction import FrozenDecoder


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return write_catalog(tmp_path_factory.mktemp("catalog"))


# answers


def test_reasoning_and_line_breaks_around_and_in_an_answer_cost_no_row(catalog, tmp_path):
    class Chatty(StubGenerator):
        def _answer(self, request):
            caption = json.loads(super()._answer(request))["caption"]
            return "<think>A card.\nIt is plain.</think>\nHere is the caption:\n```json\n" + f'{{"caption": "{caption}\nSALE"}}\n```'

    rows = rows_of(run(caption_config(catalog, tmp_path / "caption"), Chatty()))
    assert all(row["status"] == "ok" and row["attempts"] == ["ok"] and row["caption"].endswith(") SALE") for row in rows)


def test_a_model_that_only_reasons_is_asked_once_per_row_and_the_remedy_is_named(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=3)
    with ChatServer(StubGenerator()._answer, share=1.0, faults=["reasoning"]) as server:
        server_options = {"base_url": server.url, "concurrency": 2}
        options = {"generator": "openai", "model": "m", "prompt": "caption_demo", "server": server_options, "retries": 2}
        with pytest.raises(AnnotationError, match=r"reasoning_only 3 \(.*characters of reasoning and no answer.*raise max_new_tokens"):
            run(caption_config(catalog, tmp_path / "caption", **options))
    assert len(server.seen) == 3


# acceptance


def test_pictures_that_the_catalogue_refused_do_not_count_against_the_model(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=20)
    for at in range(0, 20, 2):
        (catalog.items.parent / "images" / f"{at}_0.png").unlink()
    out = run(caption_config(catalog, tmp_path / "caption", max_quarantined=0.0), StubGenerator())
    manifest = read_manifest(out)
    assert manifest["counts"] == {"in": 24, "ok": 14, "quarantined": 10}
    assert manifest["extra"]["gate"] == {"passed": True, "attempted": 14, "failed": 0, "not_asked": 10, "max_quarantined": 0.0}


def test_a_job_stops_after_200_asked_rows_when_most_of_them_fail(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=400)

    def broken(colour, sampled):
        return ("I see a card.", "I'm sorry, I cannot help with that.")[colour[0] % 2] if colour[1] > 60 else None

    config = caption_config(catalog, tmp_path / "caption", shard_rows=1_000)
    generator = StubGenerator(broken)
    with pytest.raises(AnnotationError) as raised:
        run(config, generator)
    assert generator.num_requests <= 2 * 200, "the other 280 rows are not asked"
    message = str(raised.value)
    assert "of the first 200 rows that the model was asked for failed" in message
    assert "invalid_json" in message and "(I see a card.)" in message and "(I'm sorry, I cannot help with that.)" in message

    share = json.loads((tmp_path / ".caption.draft" / "gate.json").read_text())["gate"]["failed"] / 200
    patient = StubGenerator(broken)
    out = run(caption_config(catalog, tmp_path / "caption", shard_rows=1_000, max_quarantined=share + 0.1), patient)
    assert read_manifest(out)["counts"]["in"] == 480, "a raised limit lets the job go on"


def test_early_failures_that_the_second_attempt_repairs_do_not_stop_the_job(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=300)
    generator = StubGenerator(lambda colour, sampled: None if sampled else "no JSON")
    assert read_manifest(run(caption_config(catalog, tmp_path / "caption"), generator))["counts"]["ok"] == 360


def test_a_raised_limit_accepts_the_draft_without_asking_again(catalog, tmp_path):
    broken = StubGenerator(lambda colour, sampled: "no JSON" if colour[0] < 49 else None)
    with pytest.raises(AnnotationError, match=r"8 of 28 attempted .* invalid_json 8 \(no JSON\)"):
        run(caption_config(catalog, tmp_path / "caption"), broken)
    second = StubGenerator()
    out = run(caption_config(catalog, tmp_path / "caption", max_quarantined=0.5, batch_size=7, cache=tmp_path / "cache.sqlite"), second)
    assert second.num_requests == 0
    assert read_manifest(out)["counts"] == {"in": 28, "ok": 20, "quarantined": 8}
    assert "max_quarantined" not in read_manifest(out)["config"]


# pictures that the processor refuses


class _Strict(HuggingFaceGenerator):
    """The demo captioner behind the picture processor of Qwen2-VL, which raises an exception for an aspect ratio above 200."""

    batches: list[int]

    def inputs(self, requests):
        self.batches.append(len(requests))
        for request in requests:
            for picture in request.pictures:
                Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)(picture)
        return super().inputs(requests)


def test_a_picture_that_the_processor_refuses_is_quarantined_and_the_others_finish(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=8)
    Image.new("RGB", (700, 2), "red").save(catalog.items.parent / "images" / "3_0.png")
    for at in (0, 1, 2, 4, 5, 6, 7):
        Image.new("RGB", (64, 64), (at * 30, 0, 0)).save(catalog.items.parent / "images" / f"{at}_0.png")
    generator = _Strict("demo", max_new_tokens=8)
    generator.batches = []
    rows = rows_of(run(caption_config(catalog, tmp_path / "caption", batch_size=16, max_quarantined=1.0, retries=0), generator))
    refused = [row for row in rows if row["reason"] == "model_refused"]
    assert [row["item_id"] for row in refused] == ["i3"] and refused[0]["attempts"] == ["model_refused"]
    assert "ValueError: absolute aspect ratio must be smaller than 200" in refused[0]["rejected"]
    assert all(row["reason"] != "model_refused" and row["attempts"] for row in rows if row["item_id"] != "i3")
    assert max(generator.batches) > 1 and generator.batches.count(1) < 6, "a batch is halved, not taken apart"


def test_a_refused_request_is_not_asked_again(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=2)
    generator = StubGenerator(lambda colour, sampled: GenerationFailure("model_refused", "ValueError: no"))
    with pytest.raises(AnnotationError, match=r"model_refused 2 \(ValueError: no\)"):
        run(caption_config(catalog, tmp_path / "caption", retries=3), generator)
    assert generator.num_requests == 2


def test_the_backbone_reads_an_item_without_a_picture_that_its_processor_refuses(tmp_path):
    settings = TokenizerSettings(backbone=BackboneSettings(kind="vlm", path=tiny_llava(tmp_path / "llava")), use=("title", "pictures"))
    tokenizer = ItemTokenizer(settings).eval()
    plain = tokenizer.backbone.processor.image_processor

    class Strict:
        def __getattr__(self, name):
            return getattr(plain, name)

        def __call__(self, images, **options):
            Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)(images)
            return plain(images, **options)

    tokenizer.backbone.processor.image_processor = Strict()
    square, strip = Image.new("RGB", (60, 60), "red"), Image.new("RGB", (900, 3), "red")
    with pytest.warns(UserWarning, match=r"^1 items are read without their pictures; the reason: ValueError: absolute aspect ratio"):
        codes = tokenizer.encode([ItemInput("red shoe", (square,)), ItemInput("red shoe", (strip,)), ItemInput("red shoe")])
    assert torch.equal(codes.embedding[1], codes.embedding[2]) and not torch.equal(codes.embedding[0], codes.embedding[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each item is counted once
        tokenizer.encode([ItemInput("red shoe", (strip,))])


# one line instead of a traceback


@pytest.mark.parametrize("device, message", [("gpu", "no name of a device"), ("cuda", "cannot be used"), ("mps", "cannot be used")])
def test_a_device_that_is_not_there_is_named_in_one_line(tmp_path, device, message):
    if (device == "cuda" and torch.cuda.is_available()) or (device == "mps" and torch.backends.mps.is_available()):
        pytest.skip("this machine has it")
    catalog = write_catalog(tmp_path / "catalog", items=1)
    with pytest.raises(ConfigError, match=f"device '{device}' .*{message}|device '{device}' is {message}") as raised:
        run(caption_config(catalog, tmp_path / "caption", device=device))
    assert "\n" not in str(raised.value)


def test_auto_takes_mps_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert torch_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert torch_device("auto") == torch.device("cpu")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 90868376\n"
DAMAGES = {"torn": "is torn: it has", "pointer": "git lfs pull", "text": "is not a safetensors file", "empty": "is not a safetensors file"}


@pytest.mark.parametrize("damage, message", DAMAGES.items())
def test_damaged_weights_of_a_model_folder_are_named_with_their_remedy(tmp_path, damage, message):
    folders = [Path(tiny_llava(tmp_path / "llava")), Path(tiny_bert(tmp_path / "bert"))]
    for folder in folders:
        whole = (folder / "model.safetensors").read_bytes()
        damaged = {"torn": whole[: len(whole) // 2], "pointer": POINTER, "text": b"<html>not found, sorry</html>", "empty": b""}
        (folder / "model.safetensors").write_bytes(damaged[damage])
    llava, bert = folders
    for load in (
        lambda: HuggingFaceGenerator(llava),
        lambda: ItemTokenizer(TokenizerSettings(backbone=BackboneSettings(kind="vlm", path=str(llava)))),
        lambda: ItemTokenizer(TokenizerSettings(backbone=BackboneSettings(path=str(bert)))),
        lambda: FrozenDecoder.from_pretrained(str(bert)),
    ):
        with pytest.raises(ConfigError, match=f"model.safetensors .*{message}"):
            load()
