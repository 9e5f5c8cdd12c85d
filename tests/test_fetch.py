"""Weights by name: fetched once, checked and kept; without a network one line says what to do."""

import argparse
import fcntl
import hashlib
import http.client
import http.server
import io
import shutil
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import runs
from helpers.checkpoints import make
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import _hub

import fetch
import main
import utils
from analysis import robustness
from analysis.commands import add_checkpoint_options, load_models, result_folders
from analysis.models import load_model
from cli import Parser
from fetch import input_notes, is_name
from paper.options import read_settings
from utils import UserError
from weights import read_checkpoint, weights_file

DEIT = "timm:deit_small_patch16_224.fb_in1k"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Files that a server of this machine hands out: path -> bytes; ``requests`` are the paths that were asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            content = server.files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        yield server
        server.shutdown()
        thread.join()


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_what_is_a_name():
    assert all(map(is_name, ("hf-hub:timm/vit", DEIT, "https://host/a.pth", "http://host/a.pth")))
    assert not any(map(is_name, ("vit.pth", "/data/hf-hub/vit.pth", "C:/vit.pth", Path("https:/vit.pth"), "")))


# ---------------------------------------------------------------------------------------------------------- URLs


def test_a_url_is_fetched_once(server):
    server.files = {"/one/vit.pth": saved({"a": torch.ones(2)}), "/two/vit.pth?x=1": saved({"a": torch.zeros(2)})}
    for _ in range(2):
        assert torch.equal(read_checkpoint(f"{server.url}/one/vit.pth")["a"], torch.ones(2))
        assert torch.equal(read_checkpoint(f"{server.url}/two/vit.pth?x=1")["a"], torch.zeros(2)), "not the other one"
    assert server.requests == ["/one/vit.pth", "/two/vit.pth?x=1"]


def test_of_many_that_want_it_at_once_one_fetches(server):
    server.files = {"/vit.pth": saved({"a": torch.ones(2)})}
    threads = [threading.Thread(target=read_checkpoint, args=(f"{server.url}/vit.pth",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == ["/vit.pth"]


def test_the_hash_in_a_name_is_checked_and_the_file_is_where_torch_hub_keeps_it(server, tmp_path):
    content = saved({"a": torch.ones(2)})
    digits = hashlib.sha256(content).hexdigest()[:8]
    server.files = {f"/vit-{digits}.pth": content, "/vit-0000000a.pth": content}
    assert weights_file(f"{server.url}/vit-{digits}.pth") == tmp_path / f"torch/hub/checkpoints/vit-{digits}.pth"
    with pytest.raises(UserError, match=r"not the one of its name, as its SHA-256 does not begin with 0000000a; ask"):
        weights_file(f"{server.url}/vit-0000000a.pth")
    assert not (tmp_path / "torch/hub/checkpoints/vit-0000000a.pth").exists()


@pytest.mark.parametrize(
    "file",
    ["vit-224.pth", "dino-b.pth", "run-20260115.pth", "model-00001-of-00002.safetensors", "a-facade.pth", "vit-.pth"],
)
def test_numbers_and_words_in_a_name_are_no_hash(server, file):
    server.files = {f"/{folder}/{file}": saved({folder: torch.ones(2)}) for folder in ("a", "b")}
    for folder in ("a", "b"):
        assert list(read_checkpoint(f"{server.url}/{folder}/{file}")) == [folder]


@pytest.mark.parametrize("content", [saved({"a": torch.ones(2)})[:-40], b"<html>log in first</html>"])
def test_half_a_file_and_a_page_are_not_kept(server, content):
    server.files = {"/vit.pth": content}
    with pytest.raises(UserError, match=r"what arrived is truncated or not a checkpoint; .* is the URL right"):
        read_checkpoint(f"{server.url}/vit.pth")
    server.files = {"/vit.pth": saved({"a": torch.ones(2)})}
    assert list(read_checkpoint(f"{server.url}/vit.pth")) == ["a"]


def test_without_an_answer_one_line_says_where_to_put_the_file(server, tmp_path):
    with pytest.raises(UserError, match=r"/vit\.pth: cannot be fetched \(HTTP Error 404: Not Found\); give .* or put"):
        weights_file(f"{server.url}/vit.pth")
    closed = "http://127.0.0.1:9/vit.pth"
    with pytest.raises(UserError, match=r"cannot be fetched .*refused.*; .* put it at (\S+)$") as error:
        weights_file(closed)
    assert "\n" not in str(error.value)
    place = Path(str(error.value).rpartition(" ")[2])
    assert place.is_relative_to(tmp_path)
    place.write_bytes(saved({"a": torch.ones(2)}))
    assert list(read_checkpoint(closed)) == ["a"]
    with pytest.raises(UserError, match="the URL names no file"):
        weights_file("http://127.0.0.1:9/")


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9/a b.pth", "http://127.0.0.1:x/a.pth", "http://[a/b.pth", f"http://{'a' * 70}.de/b.pth",
     "http://127.0.0.1:9/ä.pth"],
)  # fmt: skip
def test_what_cannot_be_a_url_is_one_line(url, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be fetched \(.*\); check the URL$"):
        weights_file(url)


def test_an_answer_that_is_no_http_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args):
        raise http.client.BadStatusLine("SSH-2.0-OpenSSH")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match=r"cannot be fetched \(SSH-2.0-OpenSSH\); give"):
        weights_file("https://host/a.pth")


def test_a_wait_for_another_process_is_told_and_ends(server, tmp_path, monkeypatch, caplog):
    """Such as for a lock that a killed process has left behind."""
    monkeypatch.setattr(fetch, "SECONDS_TO_TELL", 0.1)
    monkeypatch.setattr(fetch, "SECONDS_TO_WAIT", 0.1)
    monkeypatch.setattr(utils.logger, "propagate", True)
    lock = tmp_path / "torch/hub/checkpoints/vit-0000000a.pth.lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=rf"has not fetched it in 0 min; if there is none, remove {lock}$"):
            weights_file(f"{server.url}/vit-0000000a.pth")
    assert f"waiting for another process that fetches it; if there is none, remove {lock}" in caplog.text
    assert server.requests == []


def test_what_would_run_code_is_refused_from_everywhere(server):
    server.files = {"/vit.pth": saved({"a": shutil.rmtree})}
    with pytest.raises(UserError, match=r"what arrived is refused: .* would call shutil\.rmtree"):
        read_checkpoint(f"{server.url}/vit.pth")


# ------------------------------------------------------------------------------------------------ the Hub and timm


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's cache, with the weights of ``timm/deit_small_patch16_224.fb_in1k``, on a machine without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--timm--deit_small_patch16_224.fb_in1k"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    safetensors.torch.save_file({"a": torch.ones(2)}, folder / "snapshots/abc/model.safetensors")
    return folder


@pytest.mark.parametrize(
    "name",
    [DEIT, "hf-hub:timm/deit_small_patch16_224.fb_in1k", "hf-hub:timm/deit_small_patch16_224.fb_in1k@main"],
)
def test_what_the_hubs_cache_holds_needs_no_network(hub, name):
    assert list(read_checkpoint(name)) == ["a"]
    assert weights_file(name) == hub / "snapshots/abc/model.safetensors"


@pytest.mark.parametrize("name", ["timm:vit_small_patch16_224.dino", "hf-hub:someone/vit", "hf-hub:someone/vit/b.pth"])
def test_without_a_network_one_line_names_the_file_and_the_mend(hub, name, capsys):
    file = "b.pth" if name.endswith("b.pth") else "model.safetensors"
    page = "timm/vit_small_patch16_224.dino" if name.startswith("timm") else "someone/vit"
    with pytest.raises(UserError) as error:
        read_checkpoint(name)
    assert str(error.value) == (
        f"{name}: {file} is not on this machine, and the Hub cannot be reached; give the command once where it can, or "
        f"get the file from https://huggingface.co/{page} and name its path"
    )
    assert capsys.readouterr().err == f"fetching {name} from the Hugging Face Hub\n", "who waits knows for what"


def test_of_a_repository_the_safe_file_is_taken_else_the_pickled_one(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    asked = []

    def download(repository, file, revision, local_files_only):
        asked.append((repository, file, revision))
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        if not (tmp_path / file).exists():
            raise EntryNotFoundError("not there")
        return str(tmp_path / file)

    monkeypatch.setattr(_hub, "hf_hub_download", download)
    assert list(read_checkpoint("hf-hub:someone/vit@v1")) == ["a"]
    files = ["model.safetensors", "pytorch_model.bin"]
    assert asked == 2 * [("someone/vit", file, "v1") for file in files]
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no file model\.safetensors or pytorch_model\.bin; name one"):
        read_checkpoint("hf-hub:someone/vit")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:deit_smal_patch16_224.fb_in1k", "did you mean timm:deit_small_patch16_224.fb_in1k"),
        ("timm:deit_small_patch16_224.none", "timm has no such weights"),
        ("hf-hub:vit", "not a name of the Hub; give hf-hub:OWNER/NAME"),
    ],
)
def test_names_that_do_not_exist(name, message):
    with pytest.raises(UserError, match=message):
        read_checkpoint(name)


def test_another_normalisation_of_timms_weights_is_told():
    assert input_notes(DEIT) == input_notes("vit.pth") == input_notes("hf-hub:someone/vit") == []
    (note,) = input_notes("timm:vit_small_patch16_224.augreg_in1k")
    assert note.startswith("its images had mean (0.5, 0.5, 0.5) and deviation (0.5, 0.5, 0.5), and")


def test_the_analysis_calls_models_by_their_names(hub, tmp_path, monkeypatch, caplog):
    """And not by their files, which are all called model.safetensors; notes are logged, as in training."""
    monkeypatch.setattr(utils.logger, "propagate", True)
    caplog.set_level("INFO")
    names = ["timm:vit_base_patch16_224.orig_in21k_ft_in1k", DEIT]
    state = make("vit_tiny", img_size=8, patch_size=2, num_classes=10).state_dict()
    safetensors.torch.save_file(state, hub / "snapshots/abc/model.safetensors")
    shutil.copytree(hub, hub.with_name("models--timm--vit_base_patch16_224.orig_in21k_ft_in1k"))
    parser = Parser()
    add_checkpoint_options(parser, required=True)
    given = parser.parse_args([f"--checkpoint={name}" for name in names])
    args = argparse.Namespace(**vars(given), checkpoint_key=None, num_heads=3, input_size=None, out=tmp_path / "out")
    models = load_models(args, torch.device("cpu"))
    assert [model.name for model in models] == [name.removeprefix("timm:") for name in names]
    assert result_folders(args, models) == [tmp_path / "out" / model.name for model in models]
    assert f"{names[0]}: its images had mean (0.5, 0.5, 0.5)" in caplog.text
    words = ["--checkpoint", names[0], "--data-set", "imagenet-a", "--data-path", "."]
    args = robustness.build_command_line().parse_args(words)
    digest = hashlib.sha256((hub / "snapshots/abc/model.safetensors").read_bytes()).hexdigest()
    protocol = robustness.build_protocol(args, models[0], argparse.Namespace(amp_dtype=None))
    assert protocol["checkpoint_sha256"] == digest


# -------------------------------------------------------------------------------------------------- as an option


def test_fine_tuning_evaluation_and_analysis_take_names(server, tmp_path, monkeypatch):
    state = make("vit_tiny", img_size=8, patch_size=2, num_classes=10).state_dict()
    server.files = {"/vit.pth": saved({"model": state})}
    url, data = f"{server.url}/vit.pth", runs.write_digits(tmp_path / "digits")
    short = ("--epochs", "1", "--warmup-epochs", "0", "--model", "vit_tiny", "--lr", "1e-9")
    assert main.main(runs.command(data, tmp_path / "run", *short, "--finetune", url)) == 0
    weights = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    torch.testing.assert_close(weights["patch_embed.proj.weight"], state["patch_embed.proj.weight"], atol=1e-4, rtol=0)
    evaluate = ("--model", "vit_tiny", "--last-block", "standard", "--eval", "--resume", url)
    assert main.main(runs.command(data, tmp_path / "eval", *evaluate)) == 0
    assert (tmp_path / "eval/eval/eval.json").exists()
    monkeypatch.chdir(tmp_path)
    assert main.main([*runs.SMALL, "--data-path", str(data), *evaluate]) == 0
    assert [path.name for path in Path("output").iterdir()] == ["vit_folder"], "a folder in which no run trains"
    parser = Parser()
    add_checkpoint_options(parser, required=True)
    assert parser.parse_args(["--checkpoint", url]).checkpoint == [url]
    assert load_model(url, num_heads=3).name == "vit"
    table = read_settings(["table7", "--data", str(data), "--ckpt-base", url, "--ckpt-sar", url, "--dry-run"])
    assert table.weights["base"] == [url]
    assert server.requests == ["/vit.pth"]
