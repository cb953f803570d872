"""The command line as a user meets it: fast help, one clear sentence, status 2, nothing half-written."""

import errno
import importlib
import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

import medclr.data.store
from medclr.cli import VERBS, main


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in VERBS)


@pytest.mark.parametrize(
    "words", [["--help"], ["index", "--help"], ["prepare", "--help"], ["verify", "--help"]], ids=" ".join
)
def test_light_verbs_import_neither_torch_nor_monai(words):
    code = (
        "import sys\nfrom medclr.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'monai', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["whereis", "--help"], ["whereis", "f-0"], ["index"]], ids=" ".join)
def test_a_reader_that_leaves_early_is_no_error(words, tmp_path):
    """As `medclr ... | head -1` does; what was to be done is done."""
    if words == ["index"]:
        (tmp_path / "scans").mkdir()
        nib.save(nib.Nifti1Image(np.arange(64.0).reshape(4, 4, 4), np.eye(4)), tmp_path / "scans" / "a.nii")
        words = ["index", "scans", "--out", "m.csv", "--modality", "MR", "--key-file", "key"]
    command = [sys.executable, "-m", "medclr", *words]
    both = words == ["whereis", "f-0"]  # says what is wrong on standard error
    errors = subprocess.STDOUT if both else subprocess.PIPE
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=tmp_path, env=usual) as process:
        process.stdout.close()
        said = b"" if both else process.stderr.read()
    assert process.returncode == 141
    assert b"Error" not in said
    assert (tmp_path / "m.csv").exists() == ("index" in words)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_each_of_its_options(verb, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([verb, "--help"])
    assert leaving.value.code == 0
    _, options = capsys.readouterr().out.split("\n\n", 1)
    entries = re.findall(r"^  (--\w\S*|\w+)[^\n]*?(?:  +|\n +)(\S.*?)$(?=\n)", options, re.MULTILINE)
    assert len(entries) >= 1
    assert [name for name, told in entries if told.startswith("(")] == [], "a type or a default, and no explanation"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["indx"], "'index'"),
        (["index", "nowhere", "--out", "m.csv"], "nowhere"),
        (["index", ".", "--out", "m.csv"], "holds no files"),
        (["index", ".", "--outt", "m.csv"], "'--out'"),
        (["index", ".", "--out", "m.csv", "--modality", "XX"], "XX"),
        (["verify"], "store"),
        (["pretrain"], "store, out"),
        (["prepare", "m.csv", "--out", "store"], "m.csv"),
        (["prepare", "m.csv", "--out", "store", "--size_px", "big"], "size_px"),
        (["verify", "store"], "store"),
        (["pretrain", "--store", "store", "--out", "run"], "store"),
        (["pretrain", "--out", "run"], "store"),
        (["pretrain", "--config", "nothing.yaml", "--store", "s", "--out", "r"], "nothing.yaml"),
        (["probe", "--encoder", "run", "--store", "store"], "store"),
        (["embed", "--encoder", "random", "--store", "store", "--out", "f.csv"], "store"),
        (["probe", "--encoder", "random", "--store", "store", "--budgets"], "--budgets"),
        (["demo", "--out", "d", "--patients", "2"], "--patients"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_status_2_and_leaves_nothing(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("medclr: ")
    assert sentence in said
    assert "\n" not in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_print_config_gives_a_file_that_works(tmp_path, capsys):
    from medclr.pretrain import read_settings

    with pytest.raises(SystemExit):
        main(["pretrain", "--epochs", "7", "--simclr.temperature", "0.3", "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    request = read_settings(["--config", str(tmp_path / "c.yaml"), "--store", "s", "--out", "o"])
    assert (request.settings.epochs, request.own.temperature) == (7, 0.3)


def test_a_list_is_given_as_words(image_store, capsys):
    words = ["probe", "--encoder", "random", "--store", str(image_store), "--budgets", "4", "50%", "--seeds", "1"]
    assert main([*words, "--resamples", "10"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"│ 4 ", shown)
    assert "(50%)" in shown
    assert "100%" not in shown


@pytest.mark.parametrize(("rank", "times"), [(None, 1), ("0", 1), ("1", 0)])
def test_of_several_processes_the_first_one_reports(rank, times, monkeypatch, capsys):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    module = importlib.import_module("medclr.pretrain")  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "command", lambda words: "run: 12 steps")
    assert main(["pretrain"]) == 0
    assert capsys.readouterr().out.count("12 steps") == times


def test_a_full_disk_is_one_sentence_wherever_it_shows(monkeypatch, capsys):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(medclr.data.store, "Store", full)
    assert main(["verify", "store"]) == 2
    said = capsys.readouterr().err.strip()
    assert "disk is full" in said
    assert "\n" not in said


@pytest.mark.parametrize(("verb", "promises"), [("verify", False), ("prepare", True)])
def test_ctrl_c_promises_only_what_is_so(verb, promises, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("medclr.data.store.read_info", stopped)
    monkeypatch.setattr("medclr.data.prepare.read_manifest", stopped)
    assert main([verb, "x", *(["--out", "y"] if verb == "prepare" else [])]) == 130
    said = capsys.readouterr().err.strip()
    assert said.startswith("medclr: interrupted")
    assert ("the same command again goes on" in said) == promises
