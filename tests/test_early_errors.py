"""What is known before any work is said before any work, and the command line starts fast on every system."""

import os
import subprocess
import sys

import pytest
from annotate_stub import StubGenerator, caption_config
from annotate_stub import write_catalog as write_pictures
from tiny_catalog import write_catalog

import mmsid
from mmsid import disk
from mmsid.annotate import caption
from mmsid.artifacts import read_manifest
from mmsid.catalog import isolated_decoding
from mmsid.cli import main
from mmsid.errors import ConfigError
from mmsid.progress import track
from mmsid.tokenizer import baselines, train

SMALL = {"num_levels": 2, "codebook_size": 4}


def test_too_few_semantic_ids_are_an_error_before_any_work(tmp_path, monkeypatch):
    catalog = write_catalog(tmp_path, items=48)
    for module, name in ((train, "Training"), (baselines, "make_sids")):
        monkeypatch.setattr(module, name, lambda *args, **options: pytest.fail("work was begun"))
    words = r"48 distinct items, but 2 levels of 4 codes give only 16 .*codebook_size \(to 8 or more\) or .*num_levels \(to 3 or more\)"
    with pytest.raises(ConfigError, match=f"train_tokenizer: .*{words}"):
        mmsid.train_tokenizer(tmp_path / "tokenizer", catalog, **SMALL)
    with pytest.raises(ConfigError, match=f"baselines: .*{words}"):
        mmsid.baselines(tmp_path / "baselines", catalog, **SMALL)
    assert not list(tmp_path.glob(".*draft"))


def test_items_of_equal_content_need_one_semantic_id(tmp_path):
    lines = "".join(f'{{"item_id": "{number}", "title": "text {number % 16}"}}\n' for number in range(48))
    (tmp_path / "items.jsonl").write_text(lines)
    assert mmsid.baselines(tmp_path / "out", tmp_path / "items.jsonl", methods=["random"], **SMALL).is_dir()


@pytest.mark.parametrize(("items", "warned"), [(12, True), (6, False)])
def test_captions_that_are_all_alike_are_flagged(tmp_path, recwarn, items, warned):
    class Blind(StubGenerator):
        def _answer(self, request):
            return '{"caption": "a picture of a product"}'

    catalog = write_pictures(tmp_path / "shop", items=items)
    caption.run(caption_config(catalog, tmp_path / "out"), Blind())
    rows = read_manifest(tmp_path / "out")["counts"]["ok"]
    messages = [str(one.message) for one in recwarn]
    expected = (
        f"caption: {rows} of {rows} different inputs have the same caption, 'a picture of a product'; the model may not see the pictures"
    )
    assert any(message.startswith(expected) for message in messages) == warned
    assert ("alike" in read_manifest(tmp_path / "out")["extra"]) == warned
    caption.run(caption_config(catalog, tmp_path / "other"), StubGenerator())
    assert "alike" not in read_manifest(tmp_path / "other")["extra"]


def run_python(code: str) -> str:
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_the_command_line_imports_no_heavy_library():
    code = "import sys, mmsid.cli; mmsid.cli.main(['--help']); print(sorted({name.split('.')[0] for name in sys.modules}))"
    out = run_python(code)
    assert "mmsid quantize" in out
    assert not {"torch", "pyarrow", "numpy", "pandas", "rich", "transformers", "datasets"} & set(eval(out.splitlines()[-1]))


def test_the_version_is_printed(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"mmsid {mmsid.__version__}\n"


@pytest.mark.slow
def test_modules_that_windows_lacks_are_not_needed_for_a_catalogue(tmp_path):
    write_pictures(tmp_path / "shop", items=3)
    code = (
        "import os, sys\n"
        "for name in ('fcntl', 'resource', 'termios', 'pwd', 'grp'): sys.modules[name] = None\n"
        "import mmsid.cli, numpy, pyarrow.dataset\n"
        "del os.register_at_fork, os.posix_fallocate\n"
        "from mmsid.catalog import load_picture, CatalogConfig, read_catalog\n"
        f"config = CatalogConfig(items={str(tmp_path / 'shop' / 'items.jsonl')!r})\n"
        "item = read_catalog(config).items[0]\n"
        "print(load_picture(item.images[0], config.pictures, config.picture_roots).size)\n"
    )
    assert run_python(code).startswith("(")


def test_isolated_decoding_on_windows_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(isolated_decoding, "WINDOWS", True)
    with pytest.raises(ConfigError, match=r"pictures\.isolate: Windows .*set it to false"):
        isolated_decoding._Worker()


def test_files_are_reserved_and_folders_flushed_where_the_system_has_no_call_for_it(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    disk.reserve(tmp_path / "file", 3 * 2**20 + 5)
    assert (tmp_path / "file").read_bytes() == bytes(3 * 2**20 + 5)
    monkeypatch.setattr(disk, "WINDOWS", True)
    monkeypatch.setattr(disk.os, "fsync", lambda handle: pytest.fail("a folder was opened"))
    disk.fsync(tmp_path)


def test_the_note_of_a_progress_bar_may_be_empty_at_first(capsys):
    note: dict[str, object] = {}
    for value in track(range(3), "work", note=note):
        note["loss"] = value
    assert "loss 2" in capsys.readouterr().err
