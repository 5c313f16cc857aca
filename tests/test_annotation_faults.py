"""Faults of annotation that must not end a job or pass silently: missing captions, early failure, refused pictures, other processes."""

import io
import json
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from annotate_stub import StubGenerator, caption_config, rows_of, write_catalog
from chat_server import ChatServer
from PIL import Image
from tiny_backbones import tiny_bert, tiny_llava
from tiny_catalog import write_annotations
from tiny_catalog import write_catalog as write_tiny
from transformers import Qwen2VLImageProcessorPil

import mmsid
from mmsid.annotate.caption import run
from mmsid.annotate.generator import GenerationFailure
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.annotate.interests import InterestsConfig
from mmsid.annotate.interests import run as run_interests
from mmsid.annotate.judge import JudgeConfig
from mmsid.annotate.judge import run as run_judge
from mmsid.artifacts import read_manifest
from mmsid.backbone.devices import torch_device
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.errors import AnnotationError, ArtifactError, ConfigError
from mmsid.sids import SidTable
from mmsid.tokenizer import assign, baselines, train
from mmsid.tokenizer.backbones import BackboneSettings
from mmsid.tokenizer.bundle import write_bundle
from mmsid.tokenizer.inputs import ItemInput, load_inputs
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


# annotations that do not cover the items


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> dict:
    """A tokenizer that was trained with captions and interests of 24 items, the SIDs of these, and a catalogue of 30."""
    folder = tmp_path_factory.mktemp("annotated")
    (folder / "old").mkdir()
    (folder / "grown").mkdir()
    old, grown = (write_tiny(folder / name, items=count, sequences=False) for name, count in (("old", 24), ("grown", 30)))
    captions, interests = write_annotations(folder / "old", old)
    settings = {"codebook_size": 6, "num_levels": 2, "steps": 0, "reconstruct": "off", "captions": captions, "interests": interests}
    backbone = BackboneSettings(path=tiny_bert(folder / "bert"), max_length=40, lora={"r": 2})
    tokenizer = train.run(train.TrainTokenizerConfig(out=folder / "tokenizer", catalog=old, backbone=backbone, **settings))
    world = {"folder": folder, "old": old, "grown": grown, "tokenizer": tokenizer, "captions": captions, "interests": interests}
    return world | {"sids": _assigned(world, folder / "sids", "old")}


def _assigned(world: dict, out: Path, catalog: str, **changes) -> Path:
    given = {"captions": world["captions"], "interests": world["interests"]} | changes
    return assign.run(assign.AssignConfig(out=out, tokenizer=world["tokenizer"], catalog=world[catalog], **given))


def test_the_coverage_is_told_in_one_line(annotated, tmp_path, capsys):
    _assigned(annotated, tmp_path / "sids", "old")
    told = capsys.readouterr().err.splitlines()
    assert told.count("captions cover 22 of 24 items (no usable text for 2)") == 1, "the first is sensitive, the last quarantined"
    assert told.count("interests cover 22 of 24 items (no usable text for 2)") == 1
    load_inputs(read_catalog(annotated["grown"]), annotated["captions"], None)
    assert capsys.readouterr().err == "captions cover 22 of 30 items (no row for 6, no usable text for 2)\n"


def test_new_items_without_annotations_are_not_appended_unless_allowed(annotated, tmp_path):
    with pytest.raises(
        ConfigError, match=r"trained with captions, but 6 of 6 new items have no row in .*caption .*'i\d+', 'i\d+', 'i\d+', "
    ) as raised:
        _assigned(annotated, tmp_path / "sids", "grown", append=annotated["sids"])
    assert "Run the stage caption" in str(raised.value) and "assign.allow_missing_annotations=true" in str(raised.value)
    captions, interests = write_annotations(tmp_path, annotated["grown"])
    with pytest.raises(ConfigError, match=r"trained with interests, but 6 of 6 new items have none, because assign.interests is not set"):
        _assigned(annotated, tmp_path / "sids", "grown", append=annotated["sids"], captions=captions, interests=None)

    complete = _assigned(annotated, tmp_path / "sids", "grown", append=annotated["sids"], captions=captions, interests=interests)
    allowed = _assigned(annotated, tmp_path / "allowed", "grown", append=annotated["sids"], allow_missing_annotations=True)
    raw = [SidTable.load(folder).raw_codes for folder in (complete, allowed)]
    assert (raw[0] != raw[1]).any(), "the codes do depend on the captions"
    assert read_manifest(allowed)["config"]["allow_missing_annotations"] is True
    assert "allow_missing_annotations" not in read_manifest(complete)["config"]


def test_a_catalogue_that_outgrew_its_annotations_is_not_encoded(annotated, tmp_path):
    with pytest.raises(ConfigError, match="trained with captions, but 6 of 30 items have no row"):
        _assigned(annotated, tmp_path / "sids", "grown")
    with pytest.raises(ConfigError, match=r"trained with captions, but 24 of 24 items have none, because assign.captions is not set"):
        _assigned(annotated, tmp_path / "sids", "old", captions=None)


def test_a_catalogue_of_which_a_part_was_annotated_at_training_is_encoded(annotated, tmp_path):
    settings = {"codebook_size": 6, "num_levels": 2, "steps": 0, "reconstruct": "off", "captions": annotated["captions"]}
    backbone = BackboneSettings(path=str(annotated["folder"] / "bert"), max_length=40, lora={"r": 2})
    config = train.TrainTokenizerConfig(out=tmp_path / "tokenizer", catalog=annotated["grown"], backbone=backbone, **settings)
    world = annotated | {"tokenizer": train.run(config)}
    assert len(SidTable.load(_assigned(world, tmp_path / "sids", "grown", interests=None))) == 30


def test_a_bundle_remembers_what_its_tokenizer_was_trained_with(annotated, tmp_path):
    bundle = write_bundle(annotated["tokenizer"], annotated["sids"], tmp_path / "bundle")
    with pytest.raises(ConfigError, match="trained with captions, but 6 of 6 new items have no row"):
        _assigned(annotated | {"tokenizer": bundle}, tmp_path / "sids", "grown", append=bundle / "sids")


def test_annotations_of_another_catalogue_are_an_error(annotated, tmp_path):
    rows = pq.read_table(annotated["old"].items).to_pylist()
    for name, rename in (("other", lambda old: f"x{old}"), ("zeros", lambda old: f"0{old[1:]}"), ("plain", lambda old: old[1:])):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist([row | {"item_id": rename(row["item_id"])} for row in rows]), tmp_path / f"{name}.parquet")
        annotated |= {name: CatalogConfig(items=tmp_path / f"{name}.parquet")}
    train_config = {"captions": annotated["captions"], "codebook_size": 6, "num_levels": 2, "reconstruct": "off"}
    other = annotated["other"]
    message = r"captions cover 0 of 24 items: .* folder has 'i\w+', 'i\w+', 'i\w+', ..., the catalogue 'xi\w+', 'xi\w+', 'xi\w+', .*another"
    for stage in (
        lambda: train.run(train.TrainTokenizerConfig(out=tmp_path / "tokenizer", catalog=other, **train_config)),
        lambda: baselines.run(baselines.BaselinesConfig(out=tmp_path / "baselines", catalog=other, captions=annotated["captions"])),
        lambda: _assigned(annotated, tmp_path / "assign", "other"),
        lambda: run_interests(
            InterestsConfig(out=tmp_path / "mined", catalog=other, captions=annotated["captions"], prompt="interests"), StubGenerator()
        ),
        lambda: run_judge(
            JudgeConfig(out=tmp_path / "j", catalog=other, model="m", captions=annotated["captions"], interests=annotated["interests"]),
            StubGenerator(),
        ),
    ):
        with pytest.raises(ArtifactError, match=message):
            stage()
    captions, _ = write_annotations(tmp_path / "zeros", annotated["zeros"])
    with pytest.raises(ArtifactError, match="the same ids are written in another way"):
        load_inputs(read_catalog(annotated["plain"]), captions, None)


# terminals and processes


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_print_the_text_does_not_end_the_job(annotated, tmp_path, monkeypatch, encoding):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))  # as PYTHONIOENCODING sets it
    run_folder = tmp_path / "über ☃"
    shutil.copytree(annotated["sids"], run_folder / "assign")
    assert (mmsid.write_report(run_folder / "report", annotated["old"], run_folder) / "report.html").is_file()
    sys.stdout.flush()
    assert {"ascii": b"/\\xfcber \\u2603/assign", "cp1252": b"/\xfcber \\u2603/assign"}[encoding] in shown.getvalue()


def test_assign_under_a_launcher_works_on_rank_0_and_the_others_wait(annotated, tmp_path, monkeypatch):
    finished = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    waiting = threading.Thread(target=lambda: finished.append(_assigned(annotated, tmp_path / "sids", "old")))
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive(), "rank 1 waits for the folder of rank 0"
    monkeypatch.setenv("RANK", "0")
    out = _assigned(annotated, tmp_path / "sids", "old")
    waiting.join(timeout=60)
    assert finished == [out] and len(SidTable.load(out)) == 24
