"""Defaults of models in this process: number format, batch size and its memory of overflows, expected rate, the line at the start."""

import pytest
import torch
from annotate_stub import StubGenerator, caption_config, write_catalog
from tiny_backbones import tiny_decoder, tiny_llava
from tiny_families import picture, qwen3_vl
from transformers import AutoModelForImageTextToText

from mmsid.annotate.caption import run as run_caption
from mmsid.annotate.generator import DEFAULT_BATCH_SIZE, Request
from mmsid.annotate.huggingface import HuggingFaceGenerator
from mmsid.annotate.roofline import GPUS, find_gpu, kv_bytes, model_of
from mmsid.backbone import model_loading
from mmsid.backbone.model_loading import describe_model, resolve_dtype
from mmsid.backbone.text import TextBackbone
from mmsid.tokenizer.backbones import BackboneSettings
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import ItemTokenizer, TokenizerSettings


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> str:
    return qwen3_vl(tmp_path_factory.mktemp("family") / "qwen3_vl")


def requests(count: int) -> list[Request]:
    return [Request("Describe." + " Briefly." * at, (picture(at, 64, 64),)) for at in range(count)]


def test_auto_is_float32_on_a_cpu_and_bf16_on_a_gpu_for_models_worth_it(qwen, monkeypatch):
    assert resolve_dtype("auto", qwen, torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", qwen, torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_dtype("auto", qwen, torch.device("cuda")) == torch.float32, "small and stored in float32"
    monkeypatch.setattr(model_loading, "_SMALL", 1000)
    assert resolve_dtype("auto", qwen, torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert resolve_dtype("auto", qwen, torch.device("cuda")) == torch.float32, "this GPU has no bf16"


def test_a_checkpoint_in_bf16_stays_bf16_on_a_gpu(qwen, tmp_path, monkeypatch):
    AutoModelForImageTextToText.from_pretrained(qwen, dtype=torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_dtype("auto", tmp_path, torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("auto", tmp_path, torch.device("cpu")) == torch.float32


def test_an_overflow_is_halved_and_remembered(qwen, monkeypatch):
    generator = HuggingFaceGenerator(qwen, max_new_tokens=2)
    expected, sizes = generator.generate(requests(8)), []
    generate_once = generator._generate_once

    def small_device(asked):
        sizes.append(len(asked))
        if len(asked) > 3:
            raise torch.OutOfMemoryError("no")
        return generate_once(asked)

    monkeypatch.setattr(generator, "_generate_once", small_device)
    assert generator.generate(requests(8)) == expected and sizes == [8, 4, 2, 2, 4, 2, 2]
    sizes.clear()
    assert generator.generate(requests(8)) == expected and sizes == [2, 2, 2, 2]


def test_the_job_takes_the_batch_size_of_the_generator_unless_the_configuration_names_one(tmp_path):
    catalog = write_catalog(tmp_path / "catalog", items=24)
    for name, given, own, expected in (("a", None, 5, 5), ("b", 3, 5, 3), ("c", None, None, DEFAULT_BATCH_SIZE)):
        generator = StubGenerator()
        if own is not None:
            generator.batch_size = own
        run_caption(caption_config(catalog, tmp_path / name, batch_size=given, shard_rows=100), generator)
        assert max(map(len, generator.calls)) == expected


def test_the_batch_of_a_gpu_grows_with_its_free_memory(qwen, monkeypatch):
    found = []
    for free in (1e9, 20e9, 140e9):
        monkeypatch.setattr("mmsid.annotate.huggingface.torch_device", lambda name: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        found.append(HuggingFaceGenerator(qwen).batch_size)
    assert found == [16, 64, 256]
    monkeypatch.undo()
    assert HuggingFaceGenerator(qwen).batch_size == 16


def test_inputs_do_not_depend_on_the_number_of_threads(qwen):
    one, several = HuggingFaceGenerator(qwen), HuggingFaceGenerator(qwen)
    one.prepare_threads, several.prepare_threads = 1, 4
    for key, value in one.inputs(requests(6)).items():
        assert torch.equal(several.inputs(requests(6))[key], value)


def test_a_line_at_the_start_names_the_model_its_size_format_and_device(qwen, capfd):
    model = HuggingFaceGenerator(qwen).model
    line = capfd.readouterr()
    assert f"{qwen}: " in (line.out + line.err) and "M parameters, float32, cpu" in (line.out + line.err)
    assert describe_model(model.to(torch.bfloat16), "x").endswith("bfloat16, cpu")


def test_sizes_of_the_roofline_are_those_of_the_model(qwen):
    model = HuggingFaceGenerator(qwen).model
    sizes = model_of(model, "x")
    assert sizes.vision == sum(p.numel() for p in model.model.visual.parameters())
    assert sizes.language + sizes.vision == sum(p.numel() for p in model.parameters())
    assert kv_bytes(model.config) == 2 * 2 * 8 * 2 * 2  # layers, key-value heads, width of a head, keys and values, bytes
    assert find_gpu("NVIDIA H100 80GB HBM3") == GPUS[1] and find_gpu("NVIDIA A100-SXM4-80GB") == GPUS[0]
    assert find_gpu("NVIDIA L40S").name == "L40S" and find_gpu("Tesla V100") is None


def test_codes_in_bf16_are_the_same_alone_and_in_a_batch(tmp_path):
    backbone = BackboneSettings(kind="vlm", path=tiny_llava(tmp_path / "llava"), dtype="bfloat16", max_length=24)
    tokenizer = ItemTokenizer(TokenizerSettings(backbone=backbone, codebook_size=16, num_levels=2, code_dim=8, use=("title", "pictures")))
    items = [ItemInput("red shoe " * (1 + n % 5), (picture(n, 32, 32),)) for n in range(24)]
    together = torch.cat([part.raw_codes[rows.argsort()] for rows, part in tokenizer.stream(items, 24)])
    alone = torch.cat([part.raw_codes for item in items for _, part in tokenizer.stream([item])])
    assert torch.equal(together, alone) and len(together.unique(dim=0)) > 4
    assert tokenizer.rounding_margin > 10 * ItemTokenizer(TokenizerSettings(backbone=BackboneSettings())).rounding_margin


def test_text_backbones_take_the_number_format_too(tmp_path):
    backbone = TextBackbone(tiny_decoder(tmp_path / "decoder"), max_length=24, dtype="bfloat16")
    assert backbone.causal and backbone.number_format == torch.bfloat16
    with torch.no_grad():
        assert torch.isfinite(backbone(backbone.collate([ItemInput("red shoe"), ItemInput("")]))).all()
